//! Credentials that cannot be used, and what is noteworthy about those that can.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use vpn_daemon::tls::{self, Finding, Whose};

use super::pki::{CA, Kind, Pki, Profile, SERVER};

/// What [`tls::load`] says about the credentials directory, without the directory's path.
fn sentence(pki: &Pki) -> String {
    let directory = pki.credentials_directory();
    let sentence = tls::load(&directory).unwrap_err().to_string();
    let errors = tls::errors(&directory).iter().map(ToString::to_string).collect::<Vec<_>>();
    assert!(errors.contains(&sentence), "{sentence}: {errors:?}");
    assert!(!sentence.contains('\n'), "{sentence}");
    sentence.replace(&format!("{}/", directory.display()), "")
}

#[test]
fn files_that_cannot_be_used() {
    let pki = Pki::usual();
    assert!(tls::errors(&pki.credentials_directory()).is_empty());
    let truncated = |file: &str| pki.read(file)[..70].to_string();
    // A certificate's header and end around something else, and one byte of it changed.
    let wrapped =
        |label: &str| format!("-----BEGIN {label}-----\nMAMCAQU=\n-----END {label}-----\n");
    let (ca, server, key) = (pki.read("ca.crt"), pki.read("server.crt"), pki.read("server.key"));
    pki.openssl(&["x509", "-in", "ca.crt", "-outform", "DER", "-out", "ca.der"]);
    pki.openssl(&["pkey", "-in", "server.key", "-aes128", "-passout", "pass:x", "-out", "enc.key"]);
    pki.key("rsa", Kind::Rsa);
    pki.openssl(&[
        "rsa",
        "-in",
        "rsa.key",
        "-traditional",
        "-aes128",
        "-passout",
        "pass:x",
        "-out",
        "old.key",
    ]);
    pki.issue("p521", "ca", Profile { kind: Kind::P521, ..SERVER });
    pki.revoke("ca", &[], "20990101000000Z");
    let stranger = Pki::usual();
    stranger.revoke("ca", &[], "20990101000000Z");

    #[rustfmt::skip]
    let cases = [
        ("ca.crt", String::new(), "ca.crt holds no certificate"),
        ("server.crt", String::new(), "server.crt holds no certificate"),
        ("server.key", String::new(), "server.key holds no private key"),
        ("ca.crl", String::new(), "ca.crl holds no revocation list"),
        ("ca.crt", "garbage\n".into(), "ca.crt holds no certificate"),
        ("ca.crt", truncated("ca.crt"), "ca.crt is malformed: line 1: "),
        ("server.crt", truncated("server.crt"), "server.crt is malformed: line 1: "),
        ("server.key", truncated("server.key"), "server.key is malformed: line 1: "),
        ("ca.crl", truncated("ca.crl"), "ca.crl is malformed: line 1: "),
        ("ca.crt", wrapped("CERTIFICATE"), "ca.crt is malformed: certificate 1 "),
        ("server.crt", wrapped("CERTIFICATE"), "server.crt is malformed: certificate 1 "),
        ("server.crt", server.clone() + &wrapped("CERTIFICATE"), "server.crt is malformed: certificate 2 "),
        ("server.key", wrapped("PRIVATE KEY"), "server.key cannot be used: it must be"),
        ("server.key", wrapped("EC PRIVATE KEY"), "server.key cannot be used: it must be"),
        ("server.key", wrapped("RSA PRIVATE KEY"), "server.key cannot be used: it must be"),
        ("ca.crl", wrapped("X509 CRL"), "ca.crl is malformed: revocation list 1 "),
        // Beside what is good.
        ("ca.crt", ca.clone() + &wrapped("CERTIFICATE"), "ca.crt is malformed: certificate 2 "),
        ("ca.crt", ca.clone() + &truncated("ca.crt"), "ca.crt is malformed: line "),
        ("ca.crt", ca.clone() + &ca[1..], "ca.crt is malformed: line "),
        ("ca.crt", ca.clone() + &key, "ca.crt holds a block that does not belong"),
        ("ca.crt", ca.clone() + &server, "ca.crt must hold CA certificates only: certificate 2 "),
        ("ca.crt", pki.read("portal.crt"), "ca.crt must hold CA certificates only: certificate 1 "),
        ("server.crt", server.clone() + &key, "server.crt holds a block that does not belong"),
        ("server.key", key.clone() + &key, "server.key holds several private keys"),
        ("server.key", server.clone(), "server.key holds a block that does not belong"),
        ("ca.crl", pki.read("ca.crl") + &stranger.read("ca.crl"), "ca.crl does not fit: revocation list 2 "),
        // What does not fit together.
        ("server.key", pki.read("portal.key"), "server.key does not belong to the first certificate"),
        ("server.crt", ca.clone() + &server, "server.key does not belong to the first certificate"),
        ("server.key", pki.read("enc.key"), "server.key is encrypted: "),
        ("server.key", pki.read("old.key"), "server.key is encrypted: "),
        ("server.key", pki.read("p521.key"), "server.key cannot be used: it must be"),
    ];
    for (file, content, expected) in cases {
        let good = fs::read(pki.credential(file)).ok();
        fs::write(pki.credential(file), &content).unwrap();
        let said = sentence(&pki);
        assert!(said.starts_with(expected), "{file}: {said}, not {expected}");
        assert!(!said.contains("MC4CAQ"), "the key in an error: {said}");
        match good {
            Some(good) => fs::write(pki.credential(file), good).unwrap(),
            None => fs::remove_file(pki.credential(file)).unwrap(),
        }
    }
    fs::copy(pki.path("ca.der"), pki.credential("ca.crt")).unwrap();
    assert!(sentence(&pki).starts_with("ca.crt is DER, not PEM: "));

    // Comments, as `openssl x509 -text` writes them, and carriage returns are no harm.
    let text = pki.openssl(&["x509", "-in", "ca.crt", "-text"]);
    fs::write(pki.credential("ca.crt"), format!("# ---- our CA ----\r\n{text}")).unwrap();
    fs::write(pki.credential("server.crt"), server.replace('\n', "\r\n")).unwrap();
    tls::load(&pki.credentials_directory()).unwrap();
}

#[test]
fn files_that_cannot_be_read() {
    let pki = Pki::usual();
    for file in ["ca.crt", "server.crt", "server.key"] {
        let (path, good) = (pki.credential(file), fs::read(pki.credential(file)).unwrap());
        fs::remove_file(&path).unwrap();
        assert_eq!(sentence(&pki), format!("{file} does not exist: put it there"));
        fs::create_dir(&path).unwrap();
        assert!(sentence(&pki).starts_with(&format!("{file} is not a regular file")));
        fs::remove_dir(&path).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(sentence(&pki).starts_with(&format!("{file} is not a regular file")));
        fs::remove_file(&path).unwrap();
        // Not even root can follow it.
        std::os::unix::fs::symlink(&path, &path).unwrap();
        assert!(sentence(&pki).starts_with(&format!("{file} cannot be read: ")));
        fs::remove_file(&path).unwrap();
        fs::write(&path, good).unwrap();
    }
    for file in ["ca.crt", "server.crt", "server.key"] {
        fs::remove_file(pki.credential(file)).unwrap();
    }
    assert_eq!(sentence(&pki), "ca.crt does not exist: put it there");
    assert_eq!(tls::errors(&pki.credentials_directory()).len(), 3);
    assert!(tls::load(Path::new("")).is_err());
}

#[test]
fn findings() {
    let pki = Pki::usual();
    let end = SystemTime::UNIX_EPOCH + Duration::from_secs(4_102_444_799);
    let day = Duration::from_secs(24 * 3600);
    let findings = |now| tls::load(&pki.credentials_directory()).unwrap().findings(now);
    let said = |now| findings(now).iter().map(ToString::to_string).collect::<Vec<_>>();
    let credentials = tls::load(&pki.credentials_directory()).unwrap();
    assert_eq!(credentials.expires(), end);
    assert_eq!(findings(SystemTime::now()), []);
    assert_eq!(findings(end - 31 * day), []);
    assert!(matches!(
        findings(end - 10 * day)[..],
        [
            Finding::Expires { whose: Whose::Authority { number: 1 }, days: 10, .. },
            Finding::Expires { whose: Whose::Server, days: 10, .. }
        ]
    ));
    assert!(matches!(
        findings(end + day)[..],
        [Finding::Expired { .. }, Finding::Expired { whose: Whose::Server, .. }]
    ));
    assert_eq!(findings(SystemTime::UNIX_EPOCH).len(), 2);

    // The server's certificate may come from anywhere; its end is known all the same.
    pki.authority("public", None, CA);
    let profile = Profile { not_after: "20990101000000Z", ..SERVER };
    pki.issue("node", "public", profile);
    pki.credentials(&["ca.crt"], &["node.crt"], "node.key");
    assert_eq!(findings(SystemTime::now()), [Finding::OtherIssuer]);
    let credentials = tls::load(&pki.credentials_directory()).unwrap();
    assert_eq!(credentials.expires(), SystemTime::UNIX_EPOCH + Duration::from_secs(4_070_908_800));

    pki.credentials(&["ca.crt"], &["portal.crt"], "portal.key");
    assert_eq!(findings(SystemTime::now()), [Finding::Usage, Finding::NoName]);

    // Self-signed.
    pki.openssl(&[
        "req",
        "-x509",
        "-newkey",
        "ed25519",
        "-nodes",
        "-subj",
        "/CN=self",
        "-days",
        "10",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
        "-keyout",
        "self.key",
        "-out",
        "self.crt",
    ]);
    pki.credentials(&["ca.crt"], &["self.crt"], "self.key");
    let list = said(SystemTime::now());
    assert!(list[0].starts_with("server.crt expires in 9 days, on "), "{list:?}");
    assert!(list[1].starts_with("server.crt does not hold a good chain: it is a CA's "));

    pki.credentials(&["ca.crt"], &["server.crt"], "server.key");
    let permissions = fs::Permissions::from_mode(0o644);
    fs::set_permissions(pki.credential("server.key"), permissions).unwrap();
    assert_eq!(findings(SystemTime::now()), [Finding::KeyOpen { mode: 0o644 }]);
}
