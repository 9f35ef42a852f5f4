//! Credentials that cannot be used, and what is noteworthy about those that can.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::Site;
use super::pki::{CA, Kind, Pki, Profile, SERVER};

const LATER: &str = "20990101000000Z";

/// What a daemon says that does not start, without the directory's path.
fn sentence(pki: &Pki) -> String {
    let directory = pki.credentials_directory();
    // One that starts where it should not is ended.
    let output = Command::new("timeout")
        .args(["-s", "KILL", "20", env!("CARGO_BIN_EXE_vpn-daemon"), "-listen", "127.0.0.1:0"])
        .env("CREDENTIALS_DIRECTORY", &directory)
        .env_remove("RUNTIME_DIRECTORY")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && said.lines().count() == 1, "{said}");
    assert!(!said.contains("MC4CAQ"), "the key in an error: {said}");
    said.trim_end().replace(&format!("{}/", directory.display()), "").replace("vpn-daemon: ", "")
}

#[test]
fn files_that_cannot_be_used() {
    let pki = Pki::usual();
    let truncated = |file: &str| pki.read(file)[..70].to_string();
    // A certificate's header and end around something else.
    let wrapped =
        |label: &str| format!("-----BEGIN {label}-----\nMAMCAQU=\n-----END {label}-----\n");
    let (ca, server, key) = (pki.read("ca.crt"), pki.read("server.crt"), pki.read("server.key"));
    pki.openssl("pkey -in server.key -aes128 -passout pass:x -out enc.key");
    pki.key("rsa", Kind::Rsa);
    pki.openssl("rsa -in rsa.key -traditional -aes128 -passout pass:x -out old.key");
    pki.issue("p521", "ca", Profile { kind: Kind::P521, ..SERVER });
    pki.revoke("ca", &[], LATER);
    let list = pki.read("ca.crl");
    let partial = "issuingDistributionPoint=critical,@idp\n[idp]\nfullname=URI:http://ca/1\n";
    fs::write(pki.path("ca.cnf"), pki.read("ca.cnf") + partial).unwrap();
    pki.revoke("ca", &[], LATER);
    let partial = pki.read("ca.crl");
    // The name of our CA, and another one's key.
    let stranger = Pki::usual();
    stranger.revoke("ca", &[], LATER);
    let foreign = stranger.read("ca.crl");
    let one_line = key.replace('\n', "");

    #[rustfmt::skip]
    let cases = [
        ("ca.crt", String::new(), "ca.crt holds no certificate in PEM"),
        ("server.crt", String::new(), "server.crt holds no certificate in PEM"),
        ("server.key", String::new(), "server.key holds no private key in PEM"),
        ("ca.crl", String::new(), "ca.crl holds no revocation list in PEM"),
        ("ca.crt", "garbage\n".into(), "ca.crt holds no certificate in PEM"),
        ("ca.crt", truncated("ca.crt"), "ca.crt is malformed: "),
        ("server.crt", truncated("server.crt"), "server.crt is malformed: "),
        ("server.key", truncated("server.key"), "server.key is malformed: "),
        ("server.key", one_line, "server.key is malformed: "),
        ("ca.crl", truncated("ca.crl"), "ca.crl is malformed: "),
        ("ca.crt", wrapped("CERTIFICATE"), "ca.crt cannot be used: certificate 1: "),
        ("server.crt", wrapped("CERTIFICATE"), "server.crt cannot be used: certificate 1: "),
        ("server.crt", server.clone() + &wrapped("CERTIFICATE"), "server.crt cannot be used: certificate 2: "),
        ("server.key", wrapped("PRIVATE KEY"), "server.key cannot be used: must be"),
        ("server.key", wrapped("EC PRIVATE KEY"), "server.key cannot be used: must be"),
        ("server.key", wrapped("RSA PRIVATE KEY"), "server.key cannot be used: must be"),
        ("ca.crl", wrapped("X509 CRL"), "ca.crl cannot be used: revocation list 1: "),
        // Beside what is good.
        ("ca.crt", ca.clone() + &wrapped("CERTIFICATE"), "ca.crt cannot be used: certificate 2: "),
        ("ca.crt", ca.clone() + &truncated("ca.crt"), "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &ca[1..], "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &ca.replace("BEGIN", "begin"), "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &ca.replace("END CERT", "END X"), "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &wrapped("TRUSTED CERTIFICATE"), "ca.crt is malformed: "),
        ("ca.crt", ca.replace('M', "-"), "ca.crt is malformed: "),
        ("ca.crt", ca.clone() + &key, "ca.crt holds something other than a certificate"),
        ("ca.crt", ca.clone() + &server, "ca.crt cannot be used: certificate 2: it is not a CA's"),
        ("ca.crt", pki.read("portal.crt"), "ca.crt cannot be used: certificate 1: it is not a CA's"),
        ("server.crt", server.clone() + &key, "server.crt holds something other than a certificate"),
        ("server.key", key.clone() + &key, "server.key holds several private keys"),
        ("server.key", server.clone(), "server.key holds something other than a private key"),
        ("ca.crl", list.clone() + &foreign, "ca.crl cannot be used: revocation list 2: no CA in ca.crt"),
        ("ca.crl", partial, "ca.crl cannot be used: revocation list 1: it speaks for some"),
        // What does not fit together.
        ("server.key", pki.read("portal.key"), "server.key does not belong to the first certificate"),
        ("server.crt", ca.clone() + &server, "server.key does not belong to the first certificate"),
        ("server.key", pki.read("enc.key"), "server.key is encrypted: "),
        ("server.key", pki.read("old.key"), "server.key is encrypted: "),
        ("server.key", pki.read("p521.key"), "server.key cannot be used: must be"),
        ("ca.crt", " ".repeat(17 << 20), "ca.crt is larger than 16 MiB"),
    ];
    for (file, content, expected) in cases {
        let good = fs::read(pki.credential(file)).ok();
        fs::write(pki.credential(file), &content).unwrap();
        let said = sentence(&pki);
        assert!(said.starts_with(expected), "{file}: {said}, not {expected}");
        match good {
            Some(good) => fs::write(pki.credential(file), good).unwrap(),
            None => fs::remove_file(pki.credential(file)).unwrap(),
        }
    }

    // Comments, as `openssl x509 -text` writes them, and carriage returns are no harm.
    let text = pki.openssl("x509 -in ca.crt -text");
    fs::write(pki.credential("ca.crt"), format!("# ---- our CA ----\r\n{text}")).unwrap();
    fs::write(pki.credential("server.crt"), server.replace('\n', "\r\n")).unwrap();
    Site::start(pki).accepts("portal");
}

#[test]
fn files_that_cannot_be_read() {
    let pki = Pki::usual();
    for file in ["ca.crt", "server.crt", "server.key", "ca.crl"] {
        let path = pki.credential(file);
        let good = fs::read(&path).ok();
        if good.is_some() {
            fs::remove_file(&path).unwrap();
            assert_eq!(sentence(&pki), format!("{file} does not exist: put it there"));
        }
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
        if let Some(good) = good {
            fs::write(&path, good).unwrap();
        }
    }
    fs::remove_dir_all(pki.credentials_directory()).unwrap();
    assert_eq!(sentence(&pki), "ca.crt does not exist: put it there");
}

#[test]
fn findings() {
    let pki = Pki::usual();
    // The server's certificate may come from anywhere.
    pki.authority("public", None, CA);
    pki.issue("foreign", "public", SERVER);
    pki.issue("past", "ca", Profile { not_after: "20210101000000Z", ..SERVER });
    pki.issue("early", "ca", Profile { not_before: "20980101000000Z", ..SERVER });
    pki.issue("soon", "ca", SERVER);
    pki.openssl(
        "x509 -req -days 10 -CA ca.crt -CAkey ca.key -extensions ext -extfile soon.ext \
         -in soon.csr -out soon.crt",
    );
    let constraint = "nameConstraints=critical,permitted;DNS:.vpn.example.com\n";
    let extensions = format!("{}{constraint}", CA.extensions);
    pki.authority("tight", None, Profile { extensions: &extensions, ..CA });
    pki.issue("outside", "tight", SERVER);
    pki.authority("self", None, CA);
    let said = |authority: &str, server: &str| {
        pki.credentials(
            &[&format!("{authority}.crt")],
            &[&format!("{server}.crt")],
            &format!("{server}.key"),
        );
        if server == "server" {
            let open = fs::Permissions::from_mode(0o644);
            fs::set_permissions(pki.credential("server.key"), open).unwrap();
        }
        let daemon = super::common::Daemon::start_with(&[], |command| {
            command.env("CREDENTIALS_DIRECTORY", pki.credentials_directory());
        });
        daemon.wait_for_log("listening on");
        std::thread::sleep(std::time::Duration::from_millis(100));
        daemon.log().into_iter().filter(|line| line.contains("server.")).collect::<Vec<_>>()
    };
    for (authority, server, level, expected) in [
        ("ca", "foreign", "INFO", "server.crt is not issued by a CA in ca.crt"),
        ("ca", "past", "ERROR", "server.crt has expired on 2021-01-01T00:00:00Z: renew it"),
        ("ca", "early", "ERROR", "server.crt is not valid before 2098-01-01T00:00:00Z: check"),
        ("ca", "soon", "WARN", "server.crt expires in 9 days, on "),
        ("ca", "portal", "ERROR", "server.crt is not for server authentication: issue it with"),
        ("tight", "outside", "ERROR", "server.crt has a name outside of its CA's name constraint"),
        ("ca", "self", "WARN", "server.crt does not begin a good chain: "),
        ("ca", "server", "WARN", "server.key may be read by everybody (mode 0644): chmod o= it"),
    ] {
        let lines = said(authority, server);
        let found = lines.iter().any(|line| line.contains(level) && line.contains(expected));
        assert!(found, "{expected}: {lines:?}");
    }
}
