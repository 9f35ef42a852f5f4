//! Reads the credentials directory file by file and puts the pieces together.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer,
};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use webpki::EndEntityCert;

use super::error::{
    CA_CERTIFICATES, Error, Problem, REVOCATION_LISTS, SERVER_CERTIFICATE, SERVER_KEY,
};
use super::verifier::{Authority, ClientVerifier, RevocationList};
use super::{Credentials, der, file};

/// The directory that is being read.
pub(super) struct Source<'a> {
    directory: &'a Path,
    provider: Arc<CryptoProvider>,
}

impl<'a> Source<'a> {
    pub(super) fn new(directory: &'a Path) -> Result<Self, Error> {
        if directory.as_os_str().is_empty() {
            return Err(Error::NoDirectory);
        }
        match fs::read_dir(directory) {
            // Listing it is not needed.
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => {
                Err(Error::Directory { path: directory.to_path_buf(), error })
            }
            _ => Ok(Self { directory, provider: Arc::new(ring::default_provider()) }),
        }
    }

    fn error(&self, name: &str, problem: Problem) -> Error {
        Error::File { path: self.directory.join(name), problem }
    }

    fn read(
        &self,
        name: &str,
        wanted: &[&str],
        ignored: &[&str],
        what: &'static str,
    ) -> Result<Vec<file::Block>, Error> {
        file::read(&self.directory.join(name), wanted, ignored, what)
            .map_err(|problem| self.error(name, problem))
    }

    pub(super) fn authorities(&self) -> Result<Vec<Authority>, Error> {
        self.read(CA_CERTIFICATES, &["CERTIFICATE"], &[], "certificate")?
            .into_iter()
            .zip(1..)
            .map(|(block, number)| Authority::new(block.der, number))
            .collect::<Result<_, _>>()
            .map_err(|problem| self.error(CA_CERTIFICATES, problem))
    }

    pub(super) fn chain(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        self.read(SERVER_CERTIFICATE, &["CERTIFICATE"], &[], "certificate")?
            .into_iter()
            .zip(1..)
            .map(|(block, number)| {
                let certificate = CertificateDer::from(block.der);
                match EndEntityCert::try_from(&certificate) {
                    Ok(_) => Ok(certificate),
                    Err(error) => Err(Problem::Certificate { number, error }),
                }
            })
            .collect::<Result<_, _>>()
            .map_err(|problem| self.error(SERVER_CERTIFICATE, problem))
    }

    pub(super) fn key(&self) -> Result<PrivateKeyDer<'static>, Error> {
        let wanted = ["PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY"];
        let mut blocks = self.read(SERVER_KEY, &wanted, &["EC PARAMETERS"], "private key")?;
        match (blocks.pop(), blocks.is_empty()) {
            (Some(file::Block { label, der }), true) => Ok(match label.as_str() {
                "EC PRIVATE KEY" => PrivateSec1KeyDer::from(der).into(),
                "RSA PRIVATE KEY" => PrivatePkcs1KeyDer::from(der).into(),
                _ => PrivatePkcs8KeyDer::from(der).into(),
            }),
            _ => Err(self.error(SERVER_KEY, Problem::SeveralKeys)),
        }
    }

    pub(super) fn lists(&self, authorities: &[Authority]) -> Result<Vec<RevocationList>, Error> {
        let blocks = match self.read(REVOCATION_LISTS, &["X509 CRL"], &[], "revocation list") {
            Err(Error::File { problem: Problem::Missing, .. }) => return Ok(Vec::new()),
            blocks => blocks?,
        };
        let algorithms = &self.provider.signature_verification_algorithms;
        blocks
            .iter()
            .zip(1..)
            .map(|(block, number)| RevocationList::new(&block.der, number, authorities, algorithms))
            .collect::<Result<_, _>>()
            .map_err(|problem| self.error(REVOCATION_LISTS, problem))
    }

    pub(super) fn assemble(
        &self,
        authorities: Vec<Authority>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        lists: Vec<RevocationList>,
    ) -> Result<Credentials, Error> {
        let key = self.provider.key_provider.load_private_key(key);
        let key = key.map_err(|_| self.error(SERVER_KEY, Problem::Key))?;
        let certified = CertifiedKey::new(chain.clone(), key);
        certified.keys_match().map_err(|_| self.error(SERVER_KEY, Problem::KeyMismatch))?;
        let malformed = || Problem::Certificate { number: 1, error: webpki::Error::BadDer };
        let validity = chain.first().and_then(|leaf| Some(der::Certificate::read(leaf)?.validity));
        let validity = validity.ok_or_else(|| self.error(SERVER_CERTIFICATE, malformed()))?;

        let algorithms = self.provider.signature_verification_algorithms;
        let verifier = Arc::new(ClientVerifier::new(&authorities, lists, algorithms));
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(Error::Rustls)?
            .with_client_cert_verifier(verifier.clone())
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;

        let metadata = fs::metadata(self.directory.join(SERVER_KEY));
        Ok(Credentials {
            config: Arc::new(config),
            authorities,
            verifier,
            chain,
            validity,
            key_mode: metadata.map_or(0, |metadata| metadata.permissions().mode() & 0o7777),
        })
    }
}
