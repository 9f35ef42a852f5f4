//! Which clients are let in, and why the others are not.

use std::fs;
use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use vpn_daemon::tls::{ClientName, Finding, Reason};

use super::pki::{CA, CLIENT, Kind, Pki, Profile, SERVER};
use super::{Server, bundle};

#[test]
fn every_kind_of_key() {
    let pki = Pki::usual();
    for kind in [Kind::Ed25519, Kind::P256, Kind::P384, Kind::Rsa] {
        // The CA's, the server's and the client's key are all of that kind.
        let ca = format!("ca-{kind:?}");
        let server = format!("server-{kind:?}");
        let client = format!("client-{kind:?}");
        pki.authority(&ca, None, Profile { kind, ..CA });
        pki.issue(&server, &ca, Profile { kind, ..SERVER });
        pki.issue(&client, &ca, Profile { kind, ..CLIENT });
        let (ca, crt) = (format!("{ca}.crt"), format!("{server}.crt"));
        let key = format!("{server}.key");
        let mut encodings = vec![key.clone()];
        // PKCS#1, SEC1, and SEC1 behind the parameters as `openssl ecparam -genkey` writes it.
        match kind {
            Kind::Rsa => {
                pki.openssl(&["rsa", "-in", &key, "-traditional", "-out", "pkcs1.key"]);
                assert!(pki.read("pkcs1.key").starts_with("-----BEGIN RSA PRIVATE KEY-----"));
                encodings.push("pkcs1.key".to_string());
            }
            Kind::P256 | Kind::P384 => {
                let (sec1, behind) = (format!("sec1-{kind:?}.key"), format!("behind-{kind:?}.key"));
                pki.openssl(&["ec", "-in", &key, "-out", &sec1]);
                assert!(pki.read(&sec1).starts_with("-----BEGIN EC PRIVATE KEY-----"));
                let parameters = pki.openssl(&["ec", "-in", &key, "-param_out"]);
                assert!(parameters.starts_with("-----BEGIN EC PARAMETERS-----"), "{parameters}");
                fs::write(pki.path(&behind), parameters + &pki.read(&sec1)).unwrap();
                encodings.extend([sec1, behind]);
            }
            _ => {}
        }
        for key in encodings {
            pki.credentials(&[&ca], &[&crt], &key);
            let server = Server::start(&pki);
            let body = pki.curl_trusting(&ca, server.port, Some(&client), &[]);
            assert_eq!(body, Some(format!("hello {client}\n")), "{key}");
            assert_eq!(server.outcome().unwrap(), Some(client.clone()));
            // The client of another CA, whose key is Ed25519.
            assert_eq!(pki.curl_trusting(&ca, server.port, Some("portal"), &[]), None);
            assert_eq!(server.outcome().unwrap_err().reason, Reason::UnknownIssuer);
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
    pki.issue("expired", "ca", Profile { not_after: "20210101000000Z", ..CLIENT });
    pki.issue("early", "ca", Profile { not_before: "20980101000000Z", ..CLIENT });
    let self_signed = "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=clientAuth\n";
    pki.authority("alone", None, Profile { extensions: self_signed, ..CA });
    // Issued by a client, who must not issue anything.
    pki.authority("client", Some("ca"), CLIENT);
    pki.issue("below", "client", CLIENT);
    bundle(&pki, "below", "client");
    // Made without an extension file: version 1.
    pki.key("bare", Kind::Ed25519);
    sign_simply(&pki, "bare", "ca", "1", None);
    // No usage named means any usage (RFC 5280, section 4.2.1.12).
    let extensions = "basicConstraints=critical,CA:FALSE\n";
    pki.issue("any", "ca", Profile { extensions, ..CLIENT });
    let server = Server::start(&pki);

    server.accepts(&pki, "portal");
    server.accepts(&pki, "any");
    let refusal = server.refuses(&pki, Some("bare"), Reason::BadCertificate);
    assert_eq!(refusal.detail, "it is not X.509 version 3 (it has no extensions)");
    server.refuses(&pki, None, Reason::NoCertificate);
    server.refuses(&pki, Some("stranger"), Reason::UnknownIssuer);
    server.refuses(&pki, Some("impostor"), Reason::UnknownIssuer);
    server.refuses(&pki, Some("alone"), Reason::UnknownIssuer);
    let refusal = server.refuses(&pki, Some("expired"), Reason::Expired);
    assert_eq!(
        refusal.to_string(),
        "the client's certificate or its CA's has expired (on 2021-01-01T00:00:00Z)"
    );
    let refusal = server.refuses(&pki, Some("early"), Reason::NotYetValid);
    assert!(refusal.to_string().ends_with("(before 2098-01-01T00:00:00Z)"), "{refusal}");
    server.refuses(&pki, Some("server"), Reason::Usage);
    let refusal = server.refuses(&pki, Some("ca"), Reason::BadCertificate);
    assert_eq!(refusal.detail, "it is a CA's (basicConstraints CA:TRUE)");
    let refusal = server.refuses(&pki, Some("below"), Reason::BadCertificate);
    assert_eq!(refusal.detail, "its issuer is not a CA (basicConstraints)");
    server.accepts(&pki, "portal");
}

/// Makes a certificate with `openssl x509 -req`, with a serial number of our choice.
fn sign_simply(pki: &Pki, name: &str, issuer: &str, serial: &str, extensions: Option<&str>) {
    let file = |suffix: &str| format!("{name}.{suffix}");
    let (key, csr, crt) = (file("key"), file("csr"), file("crt"));
    let (issuer_crt, issuer_key) = (format!("{issuer}.crt"), format!("{issuer}.key"));
    let subject = format!("/CN={name}");
    pki.openssl(&["req", "-new", "-key", &key, "-subj", &subject, "-out", &csr]);
    let mut arguments = vec!["x509", "-req", "-in", &csr, "-out", &crt, "-days", "10"];
    arguments.extend(["-CA", &issuer_crt, "-CAkey", &issuer_key, "-set_serial", serial]);
    arguments.extend(extensions.into_iter().flat_map(|file| ["-extfile", file]));
    pki.openssl(&arguments);
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
    let server = Server::start(&pki);
    server.refuses(&pki, Some("portal"), Reason::ServerRefused);
    pki.credentials(&["ca.crt"], &["node.crt", "below.crt"], "node.key");
    server.tls.reload().unwrap();
    server.accepts(&pki, "portal");
    server.refuses(&pki, Some("client"), Reason::UnknownIssuer);
    server.refuses(&pki, Some("partner"), Reason::UnknownIssuer);

    // An intermediate among the CAs serves its clients alone.
    pki.credentials(&["below.crt"], &["node.crt", "below.crt"], "node.key");
    server.tls.reload().unwrap();
    server.accepts(&pki, "client");
    server.refuses(&pki, Some("portal"), Reason::UnknownIssuer);

    pki.credentials(&["ca.crt", "second.crt"], &["node.crt", "below.crt"], "node.key");
    server.tls.reload().unwrap();
    bundle(&pki, "client", "below");
    for client in ["portal", "client", "partner"] {
        server.accepts(&pki, client);
    }
}

#[test]
fn a_ca_that_has_expired_serves_nobody() {
    let pki = Pki::usual();
    pki.authority("old", None, Profile { not_after: "20210101000000Z", ..CA });
    pki.issue("client", "old", CLIENT);
    pki.credentials(&["ca.crt", "old.crt"], &["server.crt"], "server.key");
    let server = Server::start(&pki);
    server.accepts(&pki, "portal");
    server.refuses(&pki, Some("client"), Reason::Expired);
    let findings = server.tls.credentials().findings(SystemTime::now());
    assert_eq!(
        findings.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [
            "ca.crt: certificate 2 has expired on 2021-01-01T00:00:00Z: renew it and reload the daemon"
        ]
    );
    // Renewed with the same name and key: its clients need nothing new.
    fs::copy(pki.path("old.crt"), pki.path("expired.crt")).unwrap();
    pki.sign("old", "old", CA);
    pki.credentials(&["ca.crt", "expired.crt", "old.crt"], &["server.crt"], "server.key");
    server.tls.reload().unwrap();
    server.accepts(&pki, "client");
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
        let server = Server::start(&pki);
        server.accepts(&pki, "client");
        server.refuses(&pki, Some("elsewhere"), Reason::NameConstraint);
        assert_eq!(server.tls.credentials().findings(SystemTime::now()), []);

        let extensions = SERVER.extensions.replace("example.org", "example.com");
        pki.issue("outside", "tight", Profile { extensions: &extensions, ..SERVER });
        pki.credentials(&["tight.crt"], &["outside.crt"], "outside.key");
        server.tls.reload().unwrap();
        let findings = server.tls.credentials().findings(SystemTime::now());
        assert_eq!(findings, [Finding::NameConstraint]);
    }
}

#[test]
fn revoked_clients_stay_out() {
    const LATER: &str = "20990101000000Z";
    let pki = Pki::usual();
    pki.issue("lost", "ca", CLIENT);
    pki.authority("second", None, CA);
    pki.issue("partner", "second", CLIENT);
    // Made again with a new key: same name, other clients.
    pki.authority("new", None, Profile { subject: "/CN=ca", kind: Kind::P256, ..CA });
    pki.issue("modern", "new", CLIENT);
    // The lost one's serial number comes from each CA anew.
    let serial = pki.openssl(&["x509", "-in", "lost.crt", "-noout", "-serial"]);
    let serial = serial.trim().replace("serial=", "0x");
    fs::write(pki.path("client.ext"), CLIENT.extensions).unwrap();
    sign_simply(&pki, "modern", "new", &serial, Some("client.ext"));
    sign_simply(&pki, "partner", "second", &serial, Some("client.ext"));
    pki.authority("below", Some("ca"), CA);
    pki.issue("deep", "below", CLIENT);
    bundle(&pki, "deep", "below");
    let everybody = ["portal", "lost", "partner", "modern", "deep"];
    pki.credentials(&["ca.crt", "second.crt", "new.crt"], &["server.crt"], "server.key");
    let server = Server::start(&pki);
    for client in everybody {
        server.accepts(&pki, client);
    }
    let lists = |names: &[&str]| {
        let lists = names.iter().map(|name| pki.read(&format!("{name}.crl"))).collect::<String>();
        fs::write(pki.credential("ca.crl"), lists).unwrap();
        server.tls.reload().unwrap();
    };

    // One list, of one CA of three.
    pki.revoke("ca", &["lost"], LATER);
    lists(&["ca"]);
    for client in everybody {
        match client {
            "lost" => drop(server.refuses(&pki, Some(client), Reason::Revoked)),
            _ => server.accepts(&pki, client),
        }
    }
    // A list each; an intermediate is revoked.
    pki.revoke("ca", &["below"], LATER);
    pki.revoke("second", &["partner"], LATER);
    pki.revoke("new", &[], LATER);
    lists(&["new", "ca", "second"]);
    for client in everybody {
        match client {
            "portal" | "modern" => server.accepts(&pki, client),
            _ => drop(server.refuses(&pki, Some(client), Reason::Revoked)),
        }
    }
    assert_eq!(server.tls.credentials().findings(SystemTime::now()), []);
    // A list that is overdue still counts, and nobody else is kept out.
    pki.revoke("ca", &[], "20210101000000Z");
    lists(&["ca"]);
    server.refuses(&pki, Some("lost"), Reason::Revoked);
    server.accepts(&pki, "portal");
    let findings = server.tls.credentials().findings(SystemTime::now());
    assert!(matches!(findings[..], [Finding::ListOverdue { number: 1, .. }]), "{findings:?}");
    // No file, no revocation.
    fs::remove_file(pki.credential("ca.crl")).unwrap();
    server.tls.reload().unwrap();
    server.accepts(&pki, "lost");
}

#[test]
fn names_of_clients() {
    let pki = Pki::usual();
    let server = Server::start(&pki);
    for (subject, expected) in [
        ("/CN=portal", Some("portal")),
        ("/CN=vpn portal 2, \"x\"", Some("vpn portal 2, \"x\"")),
        ("/CN=p\u{f6}rtal", Some("p\\u{f6}rtal")),
        ("/CN=a\r\nb", Some("a\\u{d}\\u{a}b")),
        ("/CN=outer/CN=inner", Some("inner")),
        ("/", None),
    ] {
        pki.issue("named", "ca", Profile { subject, ..CLIENT });
        let body = pki.curl(server.port, Some("named"), &[]);
        assert!(body.is_some(), "{subject:?}");
        assert_eq!(server.outcome().unwrap().as_deref(), expected, "{subject:?}");
    }
    // Whatever the bytes are, reading the name ends.
    let der = CertificateDer::from_pem_file(pki.path("portal.crt")).unwrap().to_vec();
    for (index, bit) in (0..der.len()).flat_map(|index| (0..8).map(move |bit| (index, bit))) {
        let mut changed = der.clone();
        changed[index] ^= 1 << bit;
        let _ = ClientName::of(&CertificateDer::from(changed));
        let _ = ClientName::of(&CertificateDer::from(&der[..index]));
    }
}
