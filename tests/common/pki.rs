//! Throw-away CAs, made with the `openssl` command in a directory of their own.
//!
//! Include it with `#[path = "common/pki.rs"] mod pki;`.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The server name in every server certificate.
pub const SERVER_NAME: &str = "node1.vpn.example.org";

/// A directory of keys (`NAME.key`, PKCS#8), certificates (`NAME.crt`) and lists (`NAME.crl`);
/// removed when dropped.
pub struct Pki {
    directory: PathBuf,
}

/// What a key is.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Ed25519,
    P256,
    P384,
    Rsa,
    P521,
    Rsa1024,
}

/// What a certificate is.
#[derive(Clone, Copy)]
pub struct Profile<'a> {
    pub kind: Kind,
    /// In `openssl`'s form, e.g. `/CN=portal`; empty: the common name is the file name.
    pub subject: &'a str,
    /// `YYYYMMDDHHMMSSZ`.
    pub not_before: &'a str,
    pub not_after: &'a str,
    /// Lines of an `openssl` extension section.
    pub extensions: &'a str,
}

/// A CA's certificate.
pub const CA: Profile = Profile {
    kind: Kind::Ed25519,
    subject: "",
    not_before: "20200101000000Z",
    not_after: "20991231235959Z",
    extensions: "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n",
};
/// A client's certificate: a common name and no alternative name.
pub const CLIENT: Profile = Profile {
    extensions: "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
                 extendedKeyUsage=clientAuth\n",
    ..CA
};
/// A server's certificate.
pub const SERVER: Profile = Profile {
    extensions: "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
                 extendedKeyUsage=serverAuth\nsubjectAltName=DNS:node1.vpn.example.org\n",
    ..CA
};

impl Pki {
    /// An empty directory.
    pub fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("vpn-daemon-pki-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory).unwrap();
        fs::write(
            directory.join("openssl.cnf"),
            "[req]\ndistinguished_name=dn\n[dn]\n[any]\ncommonName=optional\n",
        )
        .unwrap();
        Self { directory }
    }

    /// A CA `ca` with a server `server` and a client `portal`, and the credentials directory.
    pub fn usual() -> Self {
        let pki = Self::new();
        pki.authority("ca", None, CA);
        pki.issue("server", "ca", SERVER);
        pki.issue("portal", "ca", CLIENT);
        pki.credentials(&["ca.crt"], &["server.crt"], "server.key");
        pki
    }

    /// A file of the directory.
    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    /// What a file holds.
    pub fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    /// The credentials directory.
    pub fn credentials_directory(&self) -> PathBuf {
        self.path("credentials")
    }

    /// Fills the credentials directory: `ca.crt` and `server.crt` from several files each.
    pub fn credentials(&self, authorities: &[&str], chain: &[&str], key: &str) {
        let directory = self.credentials_directory();
        fs::create_dir_all(&directory).unwrap();
        let join = |files: &[&str]| files.iter().map(|file| self.read(file)).collect::<String>();
        fs::write(directory.join("ca.crt"), join(authorities)).unwrap();
        fs::write(directory.join("server.crt"), join(chain)).unwrap();
        let path = directory.join("server.key");
        fs::write(&path, self.read(key)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// A file of the credentials directory.
    pub fn credential(&self, file: &str) -> PathBuf {
        self.credentials_directory().join(file)
    }

    /// Runs `openssl` in the directory, with arguments that have no spaces.
    pub fn openssl(&self, arguments: &str) -> String {
        let output = Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(&self.directory)
            .env("OPENSSL_CONF", self.path("openssl.cnf"))
            .output()
            .expect("the tests need the openssl command: install the package openssl");
        assert!(
            output.status.success(),
            "openssl {arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Makes `NAME.key`.
    pub fn key(&self, name: &str, kind: Kind) {
        let algorithm = match kind {
            Kind::Ed25519 => "ED25519",
            Kind::P256 => "EC -pkeyopt ec_paramgen_curve:P-256",
            Kind::P384 => "EC -pkeyopt ec_paramgen_curve:P-384",
            Kind::P521 => "EC -pkeyopt ec_paramgen_curve:P-521",
            Kind::Rsa => "RSA -pkeyopt rsa_keygen_bits:2048",
            Kind::Rsa1024 => "RSA -pkeyopt rsa_keygen_bits:1024",
        };
        self.openssl(&format!("genpkey -out {name}.key -algorithm {algorithm}"));
    }

    /// Makes a CA, self-signed or below another one.
    pub fn authority(&self, name: &str, issuer: Option<&str>, profile: Profile) {
        let own = self.path(&format!("{name}.d"));
        fs::create_dir(&own).unwrap();
        fs::write(own.join("index.txt"), "").unwrap();
        fs::write(
            self.path(&format!("{name}.cnf")),
            format!(
                "[ca]\ndefault_ca=this\n[this]\ndatabase={0}/index.txt\nnew_certs_dir={0}\n\
                 rand_serial=yes\ndefault_md=default\npolicy=any\nunique_subject=no\n\
                 email_in_dn=no\ncrl_extensions=crl\n[any]\ncommonName=optional\n\
                 [crl]\nauthorityKeyIdentifier=keyid\n",
                own.display()
            ),
        )
        .unwrap();
        self.issue(name, issuer.unwrap_or(name), profile);
    }

    /// Makes a key and a certificate. A second call with the same name makes new ones.
    pub fn issue(&self, name: &str, issuer: &str, profile: Profile) {
        self.key(name, profile.kind);
        self.sign(name, issuer, profile);
    }

    /// Makes a certificate for a key that exists.
    pub fn sign(&self, name: &str, issuer: &str, profile: Profile) {
        let Profile { not_before, not_after, extensions, .. } = profile;
        fs::write(self.path(&format!("{name}.ext")), format!("[ext]\n{extensions}")).unwrap();
        let subject = match profile.subject {
            "" => format!("/CN={name}"),
            subject => subject.to_string(),
        };
        self.openssl(&format!(
            "req -new -utf8 -config openssl.cnf -key {name}.key -subj {subject} -out {name}.csr"
        ));
        let signer = match name == issuer {
            true => "-selfsign".to_owned(),
            false => format!("-cert {issuer}.crt"),
        };
        self.openssl(&format!(
            "ca -batch -notext -utf8 -config {issuer}.cnf -in {name}.csr -out {name}.crt \
             -keyfile {issuer}.key -extfile {name}.ext -extensions ext \
             -startdate {not_before} -enddate {not_after} {signer}"
        ));
    }

    /// Revokes certificates and makes the issuer's `ISSUER.crl`, whose next update is due then.
    pub fn revoke(&self, issuer: &str, names: &[&str], next_update: &str) {
        let by = format!("ca -config {issuer}.cnf -keyfile {issuer}.key -cert {issuer}.crt");
        for name in names {
            self.openssl(&format!("{by} -revoke {name}.crt"));
        }
        self.openssl(&format!(
            "{by} -gencrl -out {issuer}.crl -crl_lastupdate 20200101000000Z \
             -crl_nextupdate {next_update}"
        ));
    }

    /// `curl`, as a client with these files of the directory, of a daemon on loopback. The answer's
    /// body, or `None` if it failed.
    pub fn curl(&self, port: u16, client: Option<&str>, extra: &[&str]) -> Option<String> {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--fail", "--max-time", "20", "--noproxy", "*"])
            .args(["--resolve", &format!("{SERVER_NAME}:{port}:127.0.0.1")])
            .args(["--cacert", "ca.crt"])
            .args(extra)
            .current_dir(&self.directory);
        if let Some(client) = client {
            command.args(["--cert", &format!("{client}.crt"), "--key", &format!("{client}.key")]);
        }
        let output = command
            .arg(format!("https://{SERVER_NAME}:{port}/i/node"))
            .output()
            .expect("the tests need the curl command: install the package curl");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl AsRef<Path> for Pki {
    fn as_ref(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}
