//! Which clients are let in, and what the log says of the others.

use std::fs;

use super::pki::{CA, CLIENT, Kind, Pki, Profile, SERVER};
use super::{Site, s_client};

const LATER: &str = "20990101000000Z";
const PAST: &str = "20210101000000Z";
const UNKNOWN: &str = "invalid peer certificate: UnknownIssuer";
const REVOKED: &str = "invalid peer certificate: Revoked";

/// Puts the issuer's certificate behind the client's own.
fn bundle(pki: &Pki, client: &str, issuer: &str) {
    let file = format!("{client}.crt");
    fs::write(pki.path(&file), pki.read(&file) + &pki.read(&format!("{issuer}.crt"))).unwrap();
}

/// Makes a certificate with `openssl x509 -req`, with a serial number of our choice.
fn sign_simply(pki: &Pki, name: &str, issuer: &str, serial: &str, extensions: Option<&str>) {
    pki.openssl(&format!("req -new -key {name}.key -subj /CN={name} -out {name}.csr"));
    let extensions = extensions.map(|file| format!("-extfile {file}")).unwrap_or_default();
    pki.openssl(&format!(
        "x509 -req -in {name}.csr -out {name}.crt -days 10 -CA {issuer}.crt -CAkey {issuer}.key \
         -set_serial {serial} {extensions}"
    ));
}

#[test]
fn every_kind_of_key() {
    let site = Site::start(Pki::usual());
    let pki = &site.pki;
    for kind in [Kind::Ed25519, Kind::P256, Kind::P384, Kind::Rsa] {
        // The CA's, the server's and the client's key are all of that kind.
        let name = |who: &str| format!("{who}-{kind:?}");
        let (ca, server, client) = (name("ca"), name("server"), name("client"));
        pki.authority(&ca, None, Profile { kind, ..CA });
        pki.issue(&server, &ca, Profile { kind, ..SERVER });
        pki.issue(&client, &ca, Profile { kind, ..CLIENT });
        pki.revoke(&ca, &[], LATER);
        fs::rename(pki.path(&format!("{ca}.crl")), pki.path("list")).unwrap();
        let (ca, crt, key) = (ca + ".crt", format!("{server}.crt"), server + ".key");
        let mut encodings = vec![key.clone()];
        // PKCS#1, SEC1, and SEC1 behind the parameters as `openssl ecparam -genkey` writes it.
        match kind {
            Kind::Rsa => {
                pki.openssl(&format!("rsa -in {key} -traditional -out pkcs1.key"));
                assert!(pki.read("pkcs1.key").starts_with("-----BEGIN RSA PRIVATE KEY-----"));
                encodings.push("pkcs1.key".to_owned());
            }
            Kind::P256 | Kind::P384 => {
                let (sec1, behind) = (name("sec1"), name("behind"));
                pki.openssl(&format!("ec -in {key} -out {sec1}"));
                assert!(pki.read(&sec1).starts_with("-----BEGIN EC PRIVATE KEY-----"));
                let parameters = pki.openssl(&format!("ec -in {key} -param_out"));
                assert!(parameters.starts_with("-----BEGIN EC PARAMETERS-----"), "{parameters}");
                fs::write(pki.path(&behind), parameters + &pki.read(&sec1)).unwrap();
                encodings.extend([sec1, behind]);
            }
            _ => {}
        }
        for key in encodings {
            pki.credentials(&[&ca], &[&crt], &key);
            fs::copy(pki.path("list"), pki.credential("ca.crl")).unwrap();
            let line = site.reload();
            assert!(line.contains("as they are now"), "{line}");
            let served = |who: &str| pki.curl(site.port(), Some(who), &["--cacert", &ca]).is_some();
            assert!(served(&client) && !served("portal"), "{key}");
        }
    }
}

#[test]
fn clients_are_refused_for_a_reason() {
    let pki = Pki::usual();
    pki.authority("other", None, CA);
    pki.issue("stranger", "other", CLIENT);
    // The same name as our CA, with another key.
    pki.authority("namesake", None, Profile { subject: "/CN=ca", ..CA });
    pki.issue("impostor", "namesake", CLIENT);
    pki.issue("expired", "ca", Profile { not_after: PAST, ..CLIENT });
    pki.issue("early", "ca", Profile { not_before: "20980101000000Z", ..CLIENT });
    pki.issue("weak", "ca", Profile { kind: Kind::Rsa1024, ..CLIENT });
    let self_signed = "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=clientAuth\n";
    pki.authority("alone", None, Profile { extensions: self_signed, ..CA });
    // Issued by a client, who must not issue anything.
    pki.authority("client", Some("ca"), CLIENT);
    pki.issue("below", "client", CLIENT);
    bundle(&pki, "below", "client");
    pki.authority("lapsed", Some("ca"), Profile { not_after: PAST, ..CA });
    pki.issue("orphan", "lapsed", CLIENT);
    bundle(&pki, "orphan", "lapsed");
    // Made without an extension file: version 1.
    pki.key("bare", Kind::Ed25519);
    sign_simply(&pki, "bare", "ca", "1", None);
    // No usage named means any usage (RFC 5280, section 4.2.1.12).
    let extensions = "basicConstraints=critical,CA:FALSE\n";
    pki.issue("any", "ca", Profile { extensions, ..CLIENT });
    pki.revoke("ca", &[], LATER);
    let site = Site::start(pki);

    site.accepts("portal");
    site.accepts("any");
    let expired = "certificate expired: ";
    for (client, sentence) in [
        (None, "peer sent no certificates"),
        (Some("stranger"), UNKNOWN),
        (Some("alone"), UNKNOWN),
        (Some("impostor"), "a CA in ca.crt has its issuer's name, but another key"),
        (Some("expired"), expired),
        (Some("orphan"), expired),
        (Some("early"), "certificate not valid yet: "),
        (Some("server"), "does not allow extended key usage for client authentication"),
        (Some("bare"), "UnsupportedCertVersion"),
        (Some("ca"), "CaUsedAsEndEntity"),
        (Some("below"), "EndEntityUsedAsCa"),
    ] {
        site.refuses(client, sentence);
    }
    // `curl` would not use it.
    let weak = ["-cert", "weak.crt", "-key", "weak.key", "-cipher", "DEFAULT@SECLEVEL=0"];
    site.logs("its key is RSA of less than 2048 bits", || drop(s_client(&site, &weak)));
    site.accepts("portal");
}

#[test]
fn intermediates_and_several_authorities() {
    let pki = Pki::usual();
    pki.authority("below", Some("ca"), CA);
    pki.issue("client", "below", CLIENT);
    pki.issue("node", "below", SERVER);
    pki.authority("second", None, Profile { kind: Kind::P256, ..CA });
    pki.issue("partner", "second", CLIENT);

    // Clients that trust only the root need the intermediate from the server, and it from them.
    pki.credentials(&["ca.crt"], &["node.crt"], "node.key");
    let site = Site::start(pki);
    let pki = &site.pki;
    site.refuses(Some("portal"), "received fatal alert: UnknownCA");
    pki.credentials(&["ca.crt"], &["node.crt", "below.crt"], "node.key");
    site.reload();
    site.accepts("portal");
    site.refuses(Some("client"), UNKNOWN);
    site.refuses(Some("partner"), UNKNOWN);

    // An intermediate among the CAs serves its clients alone.
    pki.credentials(&["below.crt"], &["node.crt", "below.crt"], "node.key");
    site.reload();
    site.accepts("client");
    site.refuses(Some("portal"), UNKNOWN);

    pki.credentials(&["ca.crt", "second.crt"], &["node.crt", "below.crt"], "node.key");
    site.reload();
    bundle(pki, "client", "below");
    for client in ["portal", "client", "partner"] {
        site.accepts(client);
    }
}

#[test]
fn a_ca_that_has_expired_serves_nobody() {
    let pki = Pki::usual();
    pki.authority("old", None, Profile { not_after: PAST, ..CA });
    pki.issue("client", "old", CLIENT);
    pki.credentials(&["ca.crt", "old.crt"], &["server.crt"], "server.key");
    let site = Site::start(pki);
    site.accepts("portal");
    site.refuses(Some("client"), UNKNOWN);
    site.daemon.wait_for_log(
        "ca.crt: certificate 2 has expired on 2021-01-01T00:00:00Z: renew it and reload the daemon",
    );
    let pki = &site.pki;
    pki.credentials(&["old.crt"], &["server.crt"], "server.key");
    site.reload();
    site.refuses(Some("client"), "every CA in ca.crt has expired");
    // Renewed with the same name and key: its clients need nothing new.
    fs::copy(pki.path("old.crt"), pki.path("expired.crt")).unwrap();
    pki.sign("old", "old", CA);
    pki.credentials(&["ca.crt", "expired.crt", "old.crt"], &["server.crt"], "server.key");
    site.reload();
    site.accepts("client");
}

#[test]
fn a_name_constraint_leaves_clients_alone() {
    for constraint in [
        "nameConstraints=critical,permitted;DNS:.vpn.example.org\n",
        "nameConstraints=permitted;DNS:vpn.example.org,permitted;DNS:.vpn.example.org\n",
    ] {
        let pki = Pki::usual();
        let extensions = format!("{}{constraint}", CA.extensions);
        pki.authority("tight", None, Profile { extensions: &extensions, ..CA });
        pki.issue("node", "tight", SERVER);
        pki.issue("client", "tight", CLIENT);
        let elsewhere = format!("{}subjectAltName=DNS:portal.example.com\n", CLIENT.extensions);
        pki.issue("elsewhere", "tight", Profile { extensions: &elsewhere, ..CLIENT });
        fs::copy(pki.path("tight.crt"), pki.path("ca.crt")).unwrap();
        pki.credentials(&["tight.crt"], &["node.crt"], "node.key");
        let site = Site::start(pki);
        site.accepts("client");
        site.refuses(Some("elsewhere"), "NameConstraintViolation");
        assert!(!site.daemon.log().iter().any(|line| line.contains("server.crt")));
    }
}

#[test]
fn revoked_clients_stay_out() {
    let pki = Pki::usual();
    pki.issue("lost", "ca", CLIENT);
    pki.authority("second", None, CA);
    pki.issue("partner", "second", CLIENT);
    // The lost one's serial number comes from each CA anew.
    let serial = pki.openssl("x509 -in lost.crt -noout -serial");
    let serial = serial.trim().replace("serial=", "0x");
    fs::write(pki.path("client.ext"), CLIENT.extensions).unwrap();
    sign_simply(&pki, "partner", "second", &serial, Some("client.ext"));
    pki.authority("below", Some("ca"), CA);
    pki.issue("deep", "below", CLIENT);
    bundle(&pki, "deep", "below");
    let everybody = ["portal", "lost", "partner", "deep"];
    pki.credentials(&["ca.crt", "second.crt"], &["server.crt"], "server.key");
    let site = Site::start(pki);
    let pki = &site.pki;
    let lists = |names: &[&str]| {
        let lists = names.iter().map(|name| pki.read(&format!("{name}.crl"))).collect::<String>();
        fs::write(pki.credential("ca.crl"), lists).unwrap();
        let line = site.reload();
        assert!(line.contains("as they are now"), "{line}");
    };
    let lets_in = |expected: &[&str]| {
        for client in everybody {
            let served = pki.curl(site.port(), Some(client), &[]).is_some();
            assert_eq!(served, expected.contains(&client), "{client}");
        }
    };

    lets_in(&everybody);
    // One list, of one CA of two.
    pki.revoke("ca", &["lost"], LATER);
    lists(&["ca"]);
    lets_in(&["portal", "partner", "deep"]);
    site.refuses(Some("lost"), REVOKED);
    // A list each; an intermediate is revoked.
    pki.revoke("ca", &["below"], LATER);
    pki.revoke("second", &["partner"], LATER);
    lists(&["second", "ca"]);
    lets_in(&["portal"]);
    // An intermediate that is trusted by itself: its list counts on the way over its CA, too.
    pki.credentials(&["ca.crt", "below.crt"], &["server.crt"], "server.key");
    pki.revoke("below", &["deep"], LATER);
    lists(&["below"]);
    lets_in(&["portal", "lost"]);
    // A list that is overdue still counts, and nobody else is kept out.
    pki.credentials(&["ca.crt"], &["server.crt"], "server.key");
    pki.revoke("ca", &[], PAST);
    lists(&["ca"]);
    lets_in(&["portal"]);
    site.daemon.wait_for_log("a newer version of list 1 was due on 2021-01-01T00:00:00Z");
    // No file, no revocation.
    fs::remove_file(pki.credential("ca.crl")).unwrap();
    site.reload();
    site.daemon.wait_for_log("ca.crl is not there any more: clients that it revoked");
    site.accepts("lost");
}
