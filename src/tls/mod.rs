//! TLS: the credentials directory as a rustls server configuration, its reload, and what is
//! noteworthy about it.
//!
//! TLS 1.3 only, a client certificate is required. Sessions are never resumed: a resumed session
//! does not look at the client's certificate again, and would let in who has been revoked or has
//! expired since.
//!
//! A list in `ca.crl` speaks for the clients of the CA that has signed it; clients of a CA without
//! a list are not looked up. A list whose next update is overdue stays in force and is warned of:
//! refusing everybody because nobody renewed a list would shut the portal out. Two CAs of one name,
//! each with a list, are not served: webpki finds a list by its issuer's name alone.

pub(crate) mod certificate;
mod verifier;

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use log::Level;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{PemObject, SectionKind};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, TrustAnchor};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, version};
use webpki::{EndEntityCert, Error as E, KeyUsage};

use crate::{lock, rfc3339};
use certificate::{List, Validity, unix_time};
use verifier::ClientVerifier;
pub(crate) use verifier::refusal;

/// Largest file that is read, in bytes: some 300,000 revoked certificates.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// How long before its end a certificate is to be renewed.
const RENEWAL: Duration = Duration::from_secs(30 * 24 * 3600);

/// What is noteworthy about credentials that can be used: info where there is nothing to mend, a
/// warning where it works now, an error where some or all clients cannot connect; then one line that
/// names the file, what is wrong, and what to do.
pub(crate) type Finding = (Level, String);

/// The credentials in force.
pub(crate) struct Tls {
    directory: PathBuf,
    current: Mutex<Credentials>,
}

/// The files of one directory, read and found to fit together.
struct Credentials {
    config: Arc<ServerConfig>,
    authorities: Vec<Authority>,
    chain: Vec<CertificateDer<'static>>,
    validity: Validity,
    lists: Vec<List>,
    key_mode: u32,
    generation: u64,
}

/// A certificate in `ca.crt`.
#[derive(Clone, PartialEq)]
struct Authority {
    validity: Validity,
    anchor: TrustAnchor<'static>,
}

impl Tls {
    /// Reads `ca.crt` (the CAs whose clients are served), `server.crt` (the server's certificate,
    /// then those between it and its CA), `server.key` and, where there is one, `ca.crl`.
    ///
    /// # Errors
    /// The first file that cannot be used: one line that names it, what is wrong, and what to do.
    pub(crate) fn open(directory: &Path) -> Result<Self, String> {
        let current = Mutex::new(Credentials::read(directory)?);
        Ok(Self { directory: directory.to_owned(), current })
    }

    /// Reads the directory again: what it holds counts for new connections.
    ///
    /// # Errors
    /// As [`Tls::open`]; the old credentials stay in force.
    pub(crate) fn reload(&self) -> Result<(), String> {
        // One at a time, so that what was read last counts: a signal may come while the daily one reads.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = lock(&ONE);
        let mut new = Credentials::read(&self.directory)?;
        let mut current = lock(&self.current);
        if new.lists.is_empty() && !current.lists.is_empty() {
            log::warn!("ca.crl is not there any more: clients that it revoked are let in again");
        }
        // The files are read every day: where they are the same, no client has to connect again.
        let files = |of: &Credentials| (of.chain.clone(), of.authorities.clone(), of.lists.clone());
        let is_new = files(&new) != files(&current);
        new.generation = current.generation + u64::from(is_new);
        *current = new;
        Ok(())
    }

    /// The configuration for the next connection.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&lock(&self.current).config)
    }

    /// How often the credentials have changed. Who asks for it before [`Tls::config`] never
    /// takes an old configuration for a new one.
    pub(crate) fn generation(&self) -> u64 {
        lock(&self.current).generation
    }

    /// Logs what is to be mended, above all certificates that expire within 30 days.
    pub(crate) fn log_findings(&self) {
        for (severity, text) in self.findings(SystemTime::now()) {
            log::log!(severity, "{text}");
        }
    }

    /// When the server's certificate expires, and the first of the CAs'.
    pub(crate) fn expire(&self) -> (SystemTime, SystemTime) {
        let current = lock(&self.current);
        let server = current.validity.not_after;
        let first = current.authorities.iter().map(|one| one.validity.not_after).min();
        (server, first.unwrap_or(server))
    }

    /// What is noteworthy at a time, in the order of the files.
    pub(crate) fn findings(&self, now: SystemTime) -> Vec<Finding> {
        let current = lock(&self.current);
        let Credentials { authorities, validity, lists, key_mode, .. } = &*current;
        let named = authorities.iter().zip(1..);
        let mut findings: Vec<_> = named
            .map(|(one, number)| (format!("ca.crt: certificate {number}"), one.validity))
            .chain([("server.crt".to_owned(), *validity)])
            .filter_map(|(whose, validity)| of_validity(&whose, validity, now))
            .collect();
        findings.extend(current.examine_chain(now));
        if key_mode & 0o004 != 0 {
            let text =
                format!("server.key may be read by everybody (mode {key_mode:04o}): chmod o= it");
            findings.push((Level::Warn, text));
        }
        for (List { next_update, .. }, number) in lists.iter().zip(1..) {
            if rfc3339::format(now) >= *next_update {
                let text = format!(
                    "ca.crl: a newer version of list {number} was due on {next_update}: what it \
                     revokes stays revoked; later revocations are unknown"
                );
                findings.push((Level::Warn, text));
            }
        }
        findings
    }
}

impl Credentials {
    fn read(directory: &Path) -> Result<Self, String> {
        use SectionKind::{Certificate, Crl, EcPrivateKey, PrivateKey, RsaPrivateKey};
        if directory.as_os_str().is_empty() {
            return Err("CREDENTIALS_DIRECTORY is empty: set it to the directory with ca.crt, \
                        server.crt and server.key, or unset it for plain HTTP"
                .to_owned());
        }
        let path = |name| directory.join(name);
        let provider = Arc::new(ring::default_provider());
        let authorities = read(&path("ca.crt"), "certificate", &[Certificate], |_, der| {
            Authority::new(&der.into())
        })?;
        let chain = read(&path("server.crt"), "certificate", &[Certificate], |_, der| {
            let certificate = CertificateDer::from(der);
            let validity = certificate::validity(&certificate).ok_or("it is malformed")?;
            Ok((certificate, validity))
        })?;
        let validity = chain[0].1;
        let chain: Vec<_> = chain.into_iter().map(|(certificate, _)| certificate).collect();
        let key_path = path("server.key");
        let key_error = |why: &str| format!("{} {why}", key_path.display());
        let kinds = [PrivateKey, EcPrivateKey, RsaPrivateKey];
        let keys = read(&key_path, "private key", &kinds, |kind, der| {
            Ok(PrivateKeyDer::from_pem(kind, der).ok_or("it is malformed")?)
        })?;
        let [key] = <[_; 1]>::try_from(keys)
            .map_err(|_| key_error("holds several private keys: leave only one"))?;
        let key_mode = fs::metadata(&key_path).map_or(0, |file| file.permissions().mode() & 0o7777);
        let mut lists = Vec::new();
        let is_missing = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
        if !fs::symlink_metadata(path("ca.crl")).is_err_and(is_missing) {
            lists = read(&path("ca.crl"), "revocation list", &[Crl], |_, der| {
                List::new(der, authorities.iter().map(|one| &one.anchor), &provider)
            })?;
        }
        let verifier = client_verifier(&authorities, &lists, &provider)
            .map_err(|error| format!("{} cannot be used: {error}", path("ca.crl").display()))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .map(|builder| builder.with_client_cert_verifier(verifier))
            .and_then(|builder| builder.with_single_cert(chain.clone(), key));
        let mut config = config.map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => key_error(
                "does not belong to the first certificate in server.crt: put a pair there",
            ),
            _ => key_error(
                "cannot be used: must be Ed25519, P-256, P-384 or RSA of 2048 to 4096 bits",
            ),
        })?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let (config, generation) = (Arc::new(config), 0);
        Ok(Self { config, authorities, chain, validity, lists, key_mode, generation })
    }

    /// Looks at the server's certificate the way clients that trust `ca.crt` do.
    fn examine_chain(&self, now: SystemTime) -> Option<Finding> {
        let (severity, what) = match self.verify_chain(now).err()? {
            E::UnknownIssuer => {
                (Level::Info, "is not issued by a CA in ca.crt: clients must trust its CA")
            }
            E::NameConstraintViolation => {
                (Level::Error, "has a name outside of its CA's name constraint: issue it again")
            }
            E::RequiredEkuNotFoundContext(_) => (
                Level::Error,
                "is not for server authentication: issue it with extendedKeyUsage=serverAuth",
            ),
            E::CertNotValidForName(_) => {
                (Level::Warn, "has no subjectAltName: many clients refuse it")
            }
            _ => (Level::Warn, "does not begin a good chain: those up to its CA belong behind it"),
        };
        Some((severity, format!("server.crt {what}")))
    }

    fn verify_chain(&self, now: SystemTime) -> Result<(), E> {
        let own = EndEntityCert::try_from(&self.chain[0])?;
        let anchors: Vec<_> = self.authorities.iter().map(|one| one.anchor.clone()).collect();
        // `of_validity` says whether it is valid now.
        let time = unix_time(now.min(self.validity.not_after).max(self.validity.not_before));
        let algorithms = self.config.crypto_provider().signature_verification_algorithms.all;
        let usage = KeyUsage::server_auth();
        own.verify_for_usage(algorithms, &anchors, &self.chain[1..], time, usage, None, None)?;
        // Asked about any name, webpki tells which names there are.
        let any = ServerName::try_from("invalid").map_err(|_| E::BadDer)?;
        match own.verify_is_valid_for_subject_name(&any) {
            Err(E::CertNotValidForName(names)) if names.presented.is_empty() => {
                Err(E::CertNotValidForName(names))
            }
            _ => Ok(()),
        }
    }
}

impl Authority {
    fn new(certificate: &CertificateDer) -> Result<Self, String> {
        let parsed = EndEntityCert::try_from(certificate).map_err(|error| error.to_string())?;
        let validity = certificate::validity(certificate).ok_or("its dates are malformed")?;
        if !certificate::is_authority(&parsed, validity) {
            return Err("it is not a CA's (basicConstraints CA:TRUE): take it out".to_owned());
        }
        let anchor = webpki::anchor_from_trusted_cert(certificate);
        let anchor = anchor.map_err(|error| error.to_string())?.to_owned();
        Ok(Self { validity, anchor })
    }
}

/// rustls lets in clients of a CA that has expired: such a CA is left out. No hints which CAs there
/// are: they would keep clients whose CA is an intermediate from sending their certificate, and would
/// tell every scanner whose node this is.
fn client_verifier(
    authorities: &[Authority],
    lists: &[List],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<ClientVerifier>, VerifierBuilderError> {
    let now = SystemTime::now();
    let last = authorities.iter().map(|one| one.validity.not_after).max().unwrap_or(now);
    let current = authorities.iter().filter(|one| one.validity.not_after >= now.min(last));
    let roots = RootCertStore { roots: current.map(|one| one.anchor.clone()).collect() };
    let inner = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(provider))
        .with_crls(lists.iter().map(|list| list.der.clone().into()))
        .allow_unknown_revocation_status()
        .clear_root_hint_subjects()
        .build()?;
    Ok(Arc::new(ClientVerifier { inner, until: unix_time(last) }))
}

/// What a certificate's validity has to say at a time.
fn of_validity(whose: &str, validity: Validity, now: SystemTime) -> Option<Finding> {
    let Validity { not_before, not_after } = validity;
    let (from, until) = (rfc3339::format(not_before), rfc3339::format(not_after));
    let renew = "renew it and reload the daemon";
    let (severity, what) = match not_after.duration_since(now) {
        _ if now < not_before => (
            Level::Error,
            format!("is not valid before {from}: check the clock, or issue it again"),
        ),
        Err(_) => (Level::Error, format!("has expired on {until}: {renew}")),
        Ok(left) if left <= RENEWAL => {
            let days = left.as_secs() / (24 * 3600);
            (Level::Warn, format!("expires in {days} days, on {until}: {renew}"))
        }
        Ok(_) => return None,
    };
    Some((severity, format!("{whose} {what}")))
}

/// Reads the PEM blocks of a file, at least one, and makes a `T` of each. Text around them is a
/// comment, as `openssl` writes it. No error quotes the file, which may be a private key's.
fn read<T>(
    path: &Path,
    what: &str,
    kinds: &[SectionKind],
    parse: impl Fn(SectionKind, Vec<u8>) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    let blocks =
        read_blocks(path, what, kinds).map_err(|reason| format!("{} {reason}", path.display()))?;
    let numbered = blocks.into_iter().zip(1..).map(|((kind, der), number)| {
        parse(kind, der)
            .map_err(|why| format!("{} cannot be used: {what} {number}: {why}", path.display()))
    });
    numbered.collect()
}

type Block = (SectionKind, Vec<u8>);

fn read_blocks(path: &Path, what: &str, kinds: &[SectionKind]) -> Result<Vec<Block>, String> {
    let unreadable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => "does not exist: put it there".to_owned(),
        _ => format!("cannot be read: {error}: let the daemon's user read it"),
    };
    // Looked at before it is opened: opening a pipe waits for a writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("is not a regular file: put a PEM file there".to_owned());
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("is larger than {} MiB", MAX_FILE / 1024 / 1024));
    }
    let count = |word: &[u8]| text.windows(word.len()).filter(|window| *window == word).count();
    if kinds.contains(&SectionKind::PrivateKey) && count(b"ENCRYPTED") > 0 {
        return Err(
            "is encrypted: take the pass phrase off with openssl pkey -in OLD -out NEW".to_owned()
        );
    }
    // The reader passes over what it does not know, and takes what is broken for a comment.
    // `openssl ecparam` writes the curve before the key.
    let curves = count(b"-----BEGIN EC PARAMETERS-----");
    let (begun, ended) = (count(b"--BEGIN "), count(b"--END "));
    let blocks = Block::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>().ok();
    let whole = blocks.filter(|blocks| blocks.len() + curves == begun && begun == ended);
    let blocks = whole.ok_or("is malformed: a PEM block is broken or unknown: copy it again")?;
    if blocks.is_empty() {
        return Err(format!("holds no {what} in PEM (openssl x509, pkey and crl convert DER)"));
    }
    if blocks.iter().any(|(kind, _)| !kinds.contains(kind)) {
        return Err(format!("holds something other than a {what}: take it out"));
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_due_thirty_days_before_the_end() {
        const DAY: u64 = 24 * 3600;
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let validity = Validity { not_before: at(1000 * DAY), not_after: at(2000 * DAY) };
        for (now, severity, expected) in [
            (1000 * DAY - 1, Some(Level::Error), "is not valid before 1972-09-27T00:00:00Z"),
            (1000 * DAY, None, ""),
            (1970 * DAY - 1, None, ""),
            (1970 * DAY, Some(Level::Warn), "expires in 30 days, on 1975-06-24T00:00:00Z: renew"),
            (2000 * DAY, Some(Level::Warn), "expires in 0 days"),
            (2000 * DAY + 1, Some(Level::Error), "has expired on 1975-06-24T00:00:00Z: renew"),
        ] {
            let found = of_validity("x", validity, at(now));
            assert_eq!(found.as_ref().map(|(severity, _)| *severity), severity, "{now}");
            assert!(found.is_none_or(|(_, text)| text[2..].starts_with(expected)), "{now}");
        }
    }
}
