//! Throw-away CAs, made with the `openssl` command in a directory of their own.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use rustls::crypto::ring::{self, sign::any_supported_type};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::common::{Daemon, TempDir};

/// The server name in every server certificate.
pub const SERVER_NAME: &str = "node1.vpn.example.org";

// Kinds of keys, in the words of `openssl`.
pub const ED25519: &str = "ED25519";
pub const P256: &str = "EC -pkeyopt ec_paramgen_curve:P-256";
pub const P384: &str = "EC -pkeyopt ec_paramgen_curve:P-384";
pub const P521: &str = "EC -pkeyopt ec_paramgen_curve:P-521";
pub const RSA: &str = "RSA -pkeyopt rsa_keygen_bits:2048";
pub const RSA_1024: &str = "RSA -pkeyopt rsa_keygen_bits:1024";

pub const PAST: &str = "20210101000000Z";
pub const LATER: &str = "20990101000000Z";

/// What a certificate is.
#[derive(Clone, Copy)]
pub struct Profile<'a> {
    pub key: &'a str,
    /// Empty: the file's name.
    pub common_name: &'a str,
    /// `YYYYMMDDHHMMSSZ`.
    pub not_before: &'a str,
    pub not_after: &'a str,
    /// In the form of `openssl`, without spaces but those between them.
    pub extensions: &'a str,
}

pub const CA: Profile = Profile {
    key: ED25519,
    common_name: "",
    not_before: "20200101000000Z",
    not_after: "20991231235959Z",
    extensions: "basicConstraints=critical,CA:TRUE keyUsage=critical,keyCertSign,cRLSign",
};
pub const CLIENT: Profile = Profile {
    extensions: "basicConstraints=critical,CA:FALSE keyUsage=critical,digitalSignature \
                 extendedKeyUsage=clientAuth",
    ..CA
};
pub const SERVER: Profile = Profile {
    extensions: "basicConstraints=critical,CA:FALSE keyUsage=critical,digitalSignature \
                 extendedKeyUsage=serverAuth subjectAltName=DNS:node1.vpn.example.org",
    ..CA
};

/// A directory of keys (`NAME.key`, PKCS#8), certificates (`NAME.crt`) and lists (`NAME.crl`). Each
/// CA counts its serial numbers from 1.
pub struct Pki(TempDir);

impl Pki {
    /// A CA `ca` with a server `server` and a client `portal`, and the credentials directory.
    pub fn usual() -> Self {
        Self::of(ED25519)
    }

    /// The same, with keys of this kind.
    pub fn of(key: &str) -> Self {
        let pki = Self(TempDir::new("pki"));
        // What stands before the first section counts for every CA.
        pki.configure(
            "new_certs_dir=.\npolicy=the_policy\ndefault_md=sha256\nunique_subject=no\n\
             copy_extensions=copy\ncrl_extensions=the_list\n[the_policy]\ncommonName=optional\n\
             [the_list]\nauthorityKeyIdentifier=keyid\n[req]\ndistinguished_name=the_name\n[the_name]\n",
        );
        pki.issue("ca", "ca", Profile { key, ..CA });
        pki.issue("server", "ca", Profile { key, ..SERVER });
        pki.issue("portal", "ca", Profile { key, ..CLIENT });
        pki.credentials(&["ca"], &["server"]);
        pki
    }

    /// Appends to the configuration of `openssl`.
    pub fn configure(&self, lines: &str) {
        let path = self.path("openssl.cnf");
        let file = OpenOptions::new().append(true).create(true).open(path);
        file.unwrap().write_all(lines.as_bytes()).unwrap();
    }

    /// A file of the directory.
    pub fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    /// What a file holds.
    pub fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
    }

    pub fn credentials_directory(&self) -> PathBuf {
        self.path("credentials")
    }

    /// A file of the credentials directory.
    pub fn credential(&self, file: &str) -> PathBuf {
        self.credentials_directory().join(file)
    }

    /// Fills the credentials directory: several certificates each, and the first server's key.
    pub fn credentials(&self, authorities: &[&str], chain: &[&str]) {
        fs::create_dir_all(self.credentials_directory()).unwrap();
        fs::write(self.credential("ca.crt"), self.certificates(authorities)).unwrap();
        fs::write(self.credential("server.crt"), self.certificates(chain)).unwrap();
        let path = self.credential("server.key");
        fs::write(&path, self.read(&format!("{}.key", chain.first().unwrap()))).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// These certificates, one after another.
    pub fn certificates(&self, names: &[&str]) -> String {
        names.iter().map(|name| self.read(&format!("{name}.crt"))).collect()
    }

    /// Puts the certificates of `issuers` behind the client's own.
    pub fn bundle(&self, client: &str, issuers: &[&str]) {
        let chain = self.certificates(&[&[client], issuers].concat());
        fs::write(self.path(&format!("{client}.crt")), chain).unwrap();
    }

    /// A daemon with the credentials directory.
    pub fn daemon(&self, arguments: &[&str]) -> Daemon {
        Daemon::start_with(arguments, |command| {
            command.env("CREDENTIALS_DIRECTORY", self.credentials_directory());
        })
    }

    /// A client with this certificate, and this key, which need not be the certificate's.
    pub fn client(&self, certificate: &str, key: &str) -> Arc<ClientConfig> {
        let read =
            |name: &str| CertificateDer::from_pem_file(self.path(&format!("{name}.crt"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.path(&format!("{key}.key"))).unwrap();
        let identity =
            CertifiedKey::new(vec![read(certificate)], any_supported_type(&key).unwrap());
        let mut roots = RootCertStore::empty();
        roots.add(read("ca")).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
        let resolver = Arc::new(SingleCertAndKey::from(identity));
        Arc::new(builder.with_root_certificates(roots).with_client_cert_resolver(resolver))
    }

    /// Runs `openssl` in the directory, with arguments that have no spaces.
    pub fn openssl(&self, arguments: &str) -> String {
        let output = Command::new("openssl")
            .args(arguments.split_whitespace())
            .current_dir(self.path(""))
            .env("OPENSSL_CONF", self.path("openssl.cnf"))
            .output()
            .expect("the tests need the openssl command: install the package openssl");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "openssl {arguments}: {said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Makes a certificate, self-signed where the issuer has the same name, and its key, unless there
    /// is one.
    pub fn issue(&self, name: &str, issuer: &str, profile: Profile) {
        let Profile { key, common_name, not_before, not_after, extensions } = profile;
        if !self.path(&format!("{name}.key")).exists() {
            self.openssl(&format!("genpkey -out {name}.key -algorithm {key}"));
            fs::write(self.path(&format!("{name}.index")), "").unwrap();
            fs::write(self.path(&format!("{name}.serial")), "01").unwrap();
            self.configure(&format!("[{name}]\ndatabase={name}.index\nserial={name}.serial\n"));
        }
        let common_name = if common_name.is_empty() { name } else { common_name };
        let extensions = extensions.split_whitespace().map(|one| format!("-addext {one} "));
        self.openssl(&format!(
            "req -new -key {name}.key -subj /CN={common_name} -out {name}.csr {}",
            extensions.collect::<String>()
        ));
        let signer = match name == issuer {
            true => "-selfsign".to_owned(),
            false => format!("-cert {issuer}.crt"),
        };
        self.openssl(&format!(
            "ca -batch -notext -name {issuer} -in {name}.csr -out {name}.crt \
             -keyfile {issuer}.key -startdate {not_before} -enddate {not_after} {signer}"
        ));
    }

    /// Revokes certificates and makes the issuer's `ISSUER.crl`, whose next update is due then.
    pub fn revoke(&self, issuer: &str, names: &[&str], next_update: &str) {
        let by = format!("ca -name {issuer} -keyfile {issuer}.key -cert {issuer}.crt");
        for name in names {
            self.openssl(&format!("{by} -revoke {name}.crt"));
        }
        self.openssl(&format!(
            "{by} -gencrl -out {issuer}.crl -crl_lastupdate 20200101000000Z \
             -crl_nextupdate {next_update}"
        ));
    }

    /// `curl`, as a client with these files of the directory, of a daemon on loopback: whether it has
    /// its answer.
    pub fn curl(&self, port: u16, client: Option<&str>, extra: &[&str]) -> bool {
        let mut command = Command::new("curl");
        command.args(["--silent", "--output", "/dev/null", "--fail", "--max-time", "20"]);
        command.args(["--noproxy", "*", "--resolve", &format!("{SERVER_NAME}:{port}:127.0.0.1")]);
        command.args(["--cacert", "ca.crt"]).args(extra).current_dir(self.path(""));
        if let Some(client) = client {
            command.args(["--cert", &format!("{client}.crt"), "--key", &format!("{client}.key")]);
        }
        command.arg(format!("https://{SERVER_NAME}:{port}/i/node"));
        command.status().expect("the tests need the curl command: install curl").success()
    }
}

pub type Tunnel = StreamOwned<ClientConnection, TcpStream>;

/// Shakes hands.
pub fn connect(client: &Arc<ClientConfig>, stream: TcpStream) -> io::Result<Tunnel> {
    let name = SERVER_NAME.try_into().unwrap();
    let mut tunnel =
        StreamOwned::new(ClientConnection::new(Arc::clone(client), name).unwrap(), stream);
    tunnel.flush()?;
    Ok(tunnel)
}
