//! Which clients are let in, and what the log says of the others.

use std::fs;

use super::pki::{
    CA, CLIENT, ED25519, LATER, P256, P384, PAST, Pki, Profile, RSA, RSA_1024, SERVER,
};
use super::{Site, s_client};

const UNKNOWN: &str = "invalid peer certificate: UnknownIssuer";

#[test]
fn every_kind_of_key() {
    for key in [ED25519, P256, P384, RSA] {
        let pki = Pki::of(key);
        pki.revoke("ca", &[], LATER);
        fs::copy(pki.path("ca.crl"), pki.credential("ca.crl")).unwrap();
        let site = Site::start(pki);
        let pki = &site.pki;
        site.accepts("portal");
        // PKCS#1 or SEC1, and SEC1 behind the parameters as `openssl ecparam -genkey` writes it.
        let traditional = || pki.openssl("pkey -in server.key -traditional");
        let forms = match key {
            ED25519 => vec![],
            RSA => vec![traditional()],
            _ => vec![traditional(), pki.openssl("ec -in server.key -param_out") + &traditional()],
        };
        for form in forms {
            assert!(form.starts_with(&format!("-----BEGIN {}", &key[..2])), "{form}");
            fs::write(pki.path("server.key"), form).unwrap();
            site.uses(&["ca"], &["server"]);
            site.accepts("portal");
        }
    }
}

#[test]
fn clients_are_refused_for_a_reason() {
    let pki = Pki::usual();
    let constraint = format!("{} nameConstraints=critical,permitted;DNS:.b", CA.extensions);
    let elsewhere = format!("{} subjectAltName=DNS:portal.c", CLIENT.extensions);
    for (name, issuer, profile) in [
        ("other", "other", CA),
        ("stranger", "other", CLIENT),
        ("alone", "alone", CLIENT),
        // The same name as our CA, with another key.
        ("namesake", "namesake", Profile { common_name: "ca", ..CA }),
        ("impostor", "namesake", CLIENT),
        ("expired", "ca", Profile { not_after: PAST, ..CLIENT }),
        ("lapsed", "ca", Profile { not_after: PAST, ..CA }),
        ("orphan", "lapsed", CLIENT),
        ("early", "ca", Profile { not_before: "20980101000000Z", ..CLIENT }),
        // Issued by a client, who must not issue anything.
        ("below", "portal", CLIENT),
        // No extensions: version 1.
        ("bare", "ca", Profile { extensions: "", ..CLIENT }),
        ("weak", "ca", Profile { key: RSA_1024, ..CLIENT }),
        ("tight", "tight", Profile { extensions: &constraint, ..CA }),
        ("inside", "tight", CLIENT),
        ("elsewhere", "tight", Profile { extensions: &elsewhere, ..CLIENT }),
        // No usage named means any usage (RFC 5280, section 4.2.1.12).
        ("any", "ca", Profile { extensions: "basicConstraints=critical,CA:FALSE", ..CLIENT }),
    ] {
        pki.issue(name, issuer, profile);
    }
    pki.bundle("orphan", &["lapsed"]);
    pki.bundle("below", &["portal"]);
    pki.credentials(&["ca", "tight"], &["server"]);
    let site = Site::start(pki);

    for client in ["portal", "inside", "any"] {
        site.accepts(client);
    }
    for (client, sentence) in [
        (None, "peer sent no certificates"),
        (Some("stranger"), UNKNOWN),
        (Some("alone"), UNKNOWN),
        (Some("impostor"), "a CA in ca.crt has its issuer's name, but another key"),
        (Some("expired"), "certificate expired: "),
        (Some("orphan"), "certificate expired: "),
        (Some("early"), "certificate not valid yet: "),
        (Some("server"), "does not allow extended key usage for client authentication"),
        (Some("bare"), "UnsupportedCertVersion"),
        (Some("ca"), "CaUsedAsEndEntity"),
        (Some("below"), "EndEntityUsedAsCa"),
        (Some("elsewhere"), "NameConstraintViolation"),
    ] {
        site.refuses(client, &[], sentence);
    }
    // The alert comes behind the server's first messages.
    let told = s_client(&site, "-msg -sigalgs ECDSA+SHA256");
    assert!(told.contains("fatal handshake_failure"), "{told}");
    // `curl` would not use it.
    let weak = "-cert weak.crt -key weak.key -cipher DEFAULT@SECLEVEL=0";
    site.logs("its key is RSA of less than 2048 bits", || drop(s_client(&site, weak)));
    site.accepts("portal");
}

#[test]
fn intermediates_and_several_authorities() {
    let pki = Pki::usual();
    for (name, issuer, profile) in [
        ("below", "ca", CA),
        ("client", "below", CLIENT),
        ("bundled", "below", CLIENT),
        ("node", "below", SERVER),
        ("second", "second", Profile { key: P256, ..CA }),
        ("partner", "second", CLIENT),
        ("expired", "expired", Profile { common_name: "old", not_after: PAST, ..CA }),
        ("late", "expired", CLIENT),
    ] {
        pki.issue(name, issuer, profile);
    }
    pki.bundle("bundled", &["below"]);
    // With the same name and key.
    pki.openssl("x509 -in expired.crt -days 999 -signkey expired.key -out renewed.crt");
    // Clients that trust only the root need the intermediate from the server, and it from them.
    pki.credentials(&["ca"], &["node"]);
    let site = Site::start(pki);
    site.refuses(Some("portal"), &[], "received fatal alert: UnknownCA");
    for (authorities, served, refused, sentence) in [
        (&["ca"][..], &["portal", "bundled"][..], &["client", "partner"][..], UNKNOWN),
        // An intermediate among the CAs serves its clients alone.
        (&["below"], &["client", "bundled"], &["portal"], UNKNOWN),
        (&["ca", "second"], &["portal", "bundled", "partner"], &["client"], UNKNOWN),
        (&["ca", "expired"], &["portal"], &["late"], UNKNOWN),
        (&["expired"], &[], &["late"], "every CA in ca.crt has expired"),
        // Its clients need nothing new.
        (&["ca", "expired", "renewed"], &["portal", "late"], &[], ""),
    ] {
        site.uses(authorities, &["node", "below"]);
        served.iter().for_each(|client| site.accepts(client));
        refused.iter().for_each(|client| site.refuses(Some(client), &[], sentence));
    }
    let text = "ca.crt: certificate 2 has expired on 2021-01-01T00:00:00Z: renew it and reload";
    site.daemon.wait_for_log(text);
}

#[test]
fn revoked_clients_stay_out() {
    type Names<'a> = &'a [&'a str];
    type List<'a> = (&'a str, Names<'a>, &'a str);

    let pki = Pki::usual();
    pki.issue("lost", "ca", CLIENT);
    pki.issue("second", "second", CA);
    // The lost one's serial number comes from each CA anew.
    (0..3).for_each(|_| pki.issue("partner", "second", CLIENT));
    let serial = |name| pki.openssl(&format!("x509 -in {name}.crt -noout -serial"));
    assert_eq!(serial("partner"), serial("lost"));
    pki.issue("below", "ca", CA);
    pki.issue("deep", "below", CLIENT);
    pki.bundle("deep", &["below"]);
    let site = Site::start(pki);
    let pki = &site.pki;
    let both = &["ca", "second"];
    let steps: [(Names, &[List], Names); 6] = [
        (both, &[], &["portal", "lost", "partner", "deep"]),
        // One list, of one CA of two.
        (both, &[("ca", &["lost"], LATER)], &["portal", "partner", "deep"]),
        // A list each; an intermediate is revoked.
        (both, &[("second", &["partner"], LATER), ("ca", &["below"], LATER)], &["portal"]),
        // An intermediate that is trusted by itself: its list counts on the way over its CA, too.
        (&["ca", "below"], &[("below", &["deep"], LATER)], &["portal", "lost"]),
        // A list that is overdue still counts, and nobody else is kept out.
        (&["ca"], &[("ca", &[], PAST)], &["portal"]),
        // No file, no revocation.
        (&["ca"], &[], &["portal", "lost", "deep"]),
    ];
    for (authorities, lists, served) in steps {
        let _ = fs::remove_file(pki.credential("ca.crl"));
        let list = |(issuer, names, due): &List| {
            pki.revoke(issuer, names, due);
            pki.read(&format!("{issuer}.crl"))
        };
        if !lists.is_empty() {
            let all: String = lists.iter().map(list).collect();
            fs::write(pki.credential("ca.crl"), all).unwrap();
        }
        site.uses(authorities, &["server"]);
        for client in ["portal", "lost", "partner", "deep"] {
            assert_eq!(site.curl(Some(client), &[]), served.contains(&client), "{client}");
        }
    }
    for text in [
        "invalid peer certificate: Revoked",
        "a newer version of list 1 was due on 2021-01-01T00:00:00Z",
        "ca.crl is not there any more: clients that it revoked",
    ] {
        site.daemon.wait_for_log(text);
    }
}
