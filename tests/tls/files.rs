//! Credentials that cannot be used, and what is noteworthy about those that can.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::Site;
use super::pki::{CA, LATER, P521, PAST, Pki, Profile, RSA, SERVER};

/// What a daemon says that reads a directory with this file in it; the old files stay in force.
fn refuses(site: &Site, file: &str, make: impl FnOnce(&Path), expected: &str) {
    let (path, good) = (site.pki.credential(file), site.pki.credential("good"));
    let _ = fs::rename(&path, &good);
    make(&path);
    let line = site.reload();
    let directory = site.pki.credentials_directory();
    let expected = format!("the old credentials stay in force: {}/{expected}", directory.display());
    assert!(line.contains(&expected), "{file}: {line}, not {expected}");
    assert!(!line.contains("MC4CAQ"), "the key in an error: {line}");
    let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir(&path));
    let _ = fs::rename(&good, &path);
}

/// A PEM header and end around something else.
fn wrapped(label: &str) -> String {
    format!("-----BEGIN {label}-----\nMAMCAQU=\n-----END {label}-----\n")
}

#[test]
fn files_that_cannot_be_used() {
    let site = Site::start(Pki::usual());
    let pki = &site.pki;
    let truncated = |file: &str| pki.read(file)[..70].to_string();
    let (ca, server, key) = (pki.read("ca.crt"), pki.read("server.crt"), pki.read("server.key"));
    let encrypted = pki.openssl("pkey -in server.key -aes128 -passout pass:x");
    pki.openssl(&format!("genpkey -out rsa.key -algorithm {RSA}"));
    let encrypted_rsa = pki.openssl("rsa -in rsa.key -traditional -aes128 -passout pass:x");
    pki.issue("p521", "ca", Profile { key: P521, ..SERVER });
    // The name of our CA, and another one's key.
    let stranger = Pki::usual();
    stranger.revoke("ca", &[], LATER);
    let foreign = stranger.read("ca.crl");
    pki.revoke("ca", &[], LATER);
    let list = pki.read("ca.crl");
    pki.configure(
        "[the_list]\nissuingDistributionPoint=critical,@the_part\n[the_part]\nfullname=URI:http://ca/1\n",
    );
    pki.revoke("ca", &[], LATER);
    let partial = pki.read("ca.crl");

    #[rustfmt::skip]
    let cases = [
        ("ca.crt", "garbage\n".to_owned(), "ca.crt holds no certificate in PEM"),
        ("server.key", String::new(), "server.key holds no private key in PEM"),
        ("ca.crl", String::new(), "ca.crl holds no revocation list in PEM"),
        ("server.key", truncated("server.key"), "server.key is malformed: "),
        ("ca.crl", truncated("ca.crl"), "ca.crl is malformed: "),
        ("server.crt", server.clone() + &wrapped("CERTIFICATE"), "server.crt cannot be used: certificate 2: "),
        ("server.key", wrapped("PRIVATE KEY"), "server.key cannot be used: must be"),
        ("server.key", wrapped("RSA PRIVATE KEY"), "server.key cannot be used: must be"),
        ("ca.crl", wrapped("X509 CRL"), "ca.crl cannot be used: revocation list 1: "),
        // Beside what is good.
        ("ca.crt", ca.clone() + &wrapped("CERTIFICATE"), "ca.crt cannot be used: certificate 2: "),
        ("ca.crt", ca.clone() + &truncated("ca.crt"), "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &ca[1..], "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &ca.replace("BEGIN", "begin"), "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &ca.replace("END CERT", "END X"), "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &wrapped("TRUSTED CERTIFICATE"), "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &key, "ca.crt holds something other than a certificate"),
        ("ca.crt", ca.clone() + &server, "ca.crt cannot be used: certificate 2: it is not a CA's"),
        ("server.crt", server.clone() + &key, "server.crt holds something other than a certificate"),
        ("server.key", key.clone() + &key, "server.key holds several private keys"),
        ("server.key", server.clone(), "server.key holds something other than a private key"),
        ("ca.crl", list + &foreign, "ca.crl cannot be used: revocation list 2: no CA in ca.crt"),
        ("ca.crl", partial, "ca.crl cannot be used: revocation list 1: it speaks for some"),
        // What does not fit together.
        ("server.key", pki.read("portal.key"), "server.key does not belong to the first certificate"),
        ("server.crt", ca.clone() + &server, "server.key does not belong to the first certificate"),
        ("server.key", encrypted, "server.key is encrypted: "),
        ("server.key", encrypted_rsa, "server.key is encrypted: "),
        ("server.key", pki.read("p521.key"), "server.key cannot be used: must be"),
        ("ca.crt", " ".repeat(17 << 20), "ca.crt is larger than 16 MiB"),
    ];
    for (file, content, expected) in cases {
        refuses(&site, file, |path| fs::write(path, content).unwrap(), expected);
    }
    site.accepts("portal");
}

#[test]
fn comments_and_carriage_returns_are_no_harm() {
    let site = Site::start(Pki::usual());
    let pki = &site.pki;
    // As `openssl x509 -text` writes them.
    let text = pki.openssl("x509 -in ca.crt -text");
    fs::write(pki.path("text.crt"), format!("# ---- our CA ----\r\n{text}")).unwrap();
    let server = pki.read("server.crt").replace('\n', "\r\n");
    fs::write(pki.path("server.crt"), server).unwrap();
    site.uses(&["text"], &["server"]);
    site.accepts("portal");
}

#[test]
fn files_that_cannot_be_read() {
    let site = Site::start(Pki::usual());
    let fifo = |path: &Path| mkfifo(path, Mode::S_IRUSR).unwrap();
    for file in ["ca.crt", "server.crt", "server.key", "ca.crl"] {
        let special = format!("{file} is not a regular file: ");
        refuses(&site, file, |path| fs::create_dir(path).unwrap(), &special);
        refuses(&site, file, fifo, &special);
        // Not even root can follow it.
        let circle = |path: &Path| symlink(path, path).unwrap();
        refuses(&site, file, circle, &format!("{file} cannot be read: "));
        if file != "ca.crl" {
            refuses(&site, file, |_| {}, &format!("{file} does not exist: put it there"));
        }
    }
    fs::remove_dir_all(site.pki.credentials_directory()).unwrap();
    refuses(&site, "ca.crt", |_| {}, "ca.crt does not exist: put it there");
}

#[test]
fn findings() {
    let pki = Pki::usual();
    let constraint = |names: &str| format!("{} nameConstraints=critical,{names}", CA.extensions);
    let tight = constraint("permitted;DNS:vpn.example.org,permitted;DNS:.vpn.example.org");
    let other = constraint("permitted;DNS:.vpn.example.com");
    for (name, issuer, profile) in [
        // The server's certificate may come from anywhere.
        ("public", "public", CA),
        ("foreign", "public", SERVER),
        ("past", "ca", Profile { not_after: PAST, ..SERVER }),
        ("tight", "tight", Profile { extensions: &tight, ..CA }),
        ("inside", "tight", SERVER),
        ("other", "other", Profile { extensions: &other, ..CA }),
        ("outside", "other", SERVER),
        ("below", "ca", CA),
        ("node", "below", SERVER),
        ("self", "self", CA),
    ] {
        pki.issue(name, issuer, profile);
    }
    let site = Site::start(pki);
    let says = |level: &str, expected: &str| {
        let seen = site.daemon.log().len();
        // All that the first one has to say stands before what the second one says.
        let _ = (site.reload(), site.reload());
        let log = site.daemon.log();
        let mut lines = log[seen..].iter().filter(|line| line.contains("server."));
        let found = match expected {
            "" => lines.next().is_none(),
            _ => lines.any(|line| line.contains(level) && line.contains(expected)),
        };
        assert!(found, "{expected}: {:?}", &log[seen..]);
    };
    for (authority, server, level, expected) in [
        ("ca", "server", "", ""),
        ("tight", "inside", "", ""),
        ("ca", "foreign", "INFO", "server.crt is not issued by a CA in ca.crt"),
        ("ca", "past", "ERROR", "server.crt has expired on 2021-01-01T00:00:00Z: renew it"),
        ("ca", "portal", "ERROR", "server.crt is not for server authentication: issue it with"),
        ("other", "outside", "ERROR", "server.crt has a name outside of its CA's name constraint"),
        ("ca", "self", "WARN", "server.crt does not begin a good chain: "),
    ] {
        site.pki.credentials(&[authority], &[server]);
        says(level, expected);
    }
    site.pki.credentials(&["ca"], &["node", "below"]);
    says("", "");
    site.pki.credentials(&["ca"], &["server"]);
    let open = fs::Permissions::from_mode(0o644);
    fs::set_permissions(site.pki.credential("server.key"), open).unwrap();
    says("WARN", "server.key may be read by everybody (mode 0644): chmod o= it");
}
