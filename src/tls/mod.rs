//! TLS: the credentials directory as a rustls server configuration, its reload, and what is
//! noteworthy about it.
//!
//! TLS 1.3 only, a client certificate is required. Sessions are never resumed: a resumed session
//! does not look at the client's certificate again, and would let in who has been revoked or has
//! expired since.
//!
//! A list in `ca.crl` speaks for the clients of the CA that has signed it; clients of a CA without
//! a list are not looked up. A list whose next update is overdue stays in force and is warned of:
//! refusing everybody because nobody renewed a list would shut the portal out.

pub(crate) mod certificate;
mod verifier;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use log::Level;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{PemObject, SectionKind};
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, TrustAnchor,
};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use webpki::{CertRevocationList, EndEntityCert, KeyUsage, OwnedCertRevocationList};

use crate::{lock, rfc3339};
use certificate::{List, Validity, common_name, unix_time};
use verifier::ClientVerifier;
pub(crate) use verifier::refusal;

/// Largest file that is read, in bytes: some 300,000 revoked certificates.
const MAX_FILE: u64 = 16 * 1024 * 1024;
/// How long before its end a certificate is to be renewed.
const RENEWAL: Duration = Duration::from_secs(30 * 24 * 3600);

/// A file that cannot be used. One line: the file, what is wrong, what to do.
#[derive(Debug)]
pub(crate) struct Error {
    file: PathBuf,
    reason: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.file.display(), self.reason)
    }
}

/// Something noteworthy about credentials that can be used.
pub(crate) struct Finding {
    /// Info: nothing to mend. Warning: works now. Error: some or all clients cannot connect.
    pub(crate) severity: Level,
    /// One line: the file, what is wrong, what to do.
    pub(crate) text: String,
}

/// The credentials in force.
pub(crate) struct Tls {
    directory: PathBuf,
    current: Mutex<Credentials>,
}

/// What fits together in one directory.
struct Credentials {
    config: Arc<ServerConfig>,
    authorities: Vec<Authority>,
    chain: Vec<CertificateDer<'static>>,
    validity: Validity,
    /// For each list, when the one that follows it is due.
    next_updates: Vec<String>,
    key_mode: u32,
    generation: u64,
}

/// A certificate in `ca.crt`.
struct Authority {
    certificate: CertificateDer<'static>,
    validity: Validity,
    anchor: TrustAnchor<'static>,
}

impl Tls {
    /// Reads `ca.crt` (the CAs whose clients are served), `server.crt` (the server's certificate,
    /// then those between it and its CA), `server.key` and, where there is one, `ca.crl`.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub(crate) fn open(directory: &Path) -> Result<Self, Error> {
        let current = Mutex::new(Credentials::read(directory)?);
        Ok(Self { directory: directory.to_owned(), current })
    }

    /// Reads the directory again: what it holds counts for new connections.
    ///
    /// # Errors
    /// The first file that cannot be used; the old credentials stay in force.
    pub(crate) fn reload(&self) -> Result<(), Error> {
        let mut new = Credentials::read(&self.directory)?;
        let mut current = lock(&self.current);
        if new.next_updates.is_empty() && !current.next_updates.is_empty() {
            log::warn!("ca.crl is not there any more: clients that it revoked are let in again");
        }
        new.generation = current.generation + 1;
        *current = new;
        Ok(())
    }

    /// For the next connection.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&lock(&self.current).config)
    }

    /// How often the credentials have been replaced. Who asks for it before [`Tls::config`] never
    /// takes an old configuration for a new one.
    #[allow(dead_code)]
    pub(crate) fn generation(&self) -> u64 {
        lock(&self.current).generation
    }

    /// Logs what is to be mended, above all certificates that expire within 30 days. For the
    /// start, each reload and once a day.
    pub(crate) fn log_findings(&self, now: SystemTime) {
        for finding in self.findings(now) {
            log::log!(finding.severity, "{}", finding.text);
        }
    }

    /// What is noteworthy at a time, in the order of the files.
    pub(crate) fn findings(&self, now: SystemTime) -> Vec<Finding> {
        lock(&self.current).findings(now)
    }

    /// Until when the server's certificate is valid, and whose clients are served.
    pub(crate) fn summary(&self) -> String {
        let current = lock(&self.current);
        let until = rfc3339::format(current.validity.not_after);
        let names = current.authorities.iter().map(|authority| {
            common_name(&authority.certificate).unwrap_or_else(|| "an unnamed CA".to_owned())
        });
        let names = names.collect::<Vec<_>>().join(", ");
        format!("server.crt is valid until {until}; clients need a certificate of {names}")
    }
}

impl Credentials {
    fn read(directory: &Path) -> Result<Self, Error> {
        if directory.as_os_str().is_empty() {
            let reason = "is empty: set it to the directory with ca.crt, server.crt and \
                          server.key, or unset it for plain HTTP";
            return Err(Error { file: "CREDENTIALS_DIRECTORY".into(), reason: reason.to_owned() });
        }
        let path = |name| directory.join(name);
        let failed = |name| move |reason| Error { file: directory.join(name), reason };
        let provider = Arc::new(ring::default_provider());
        let authorities = read_authorities(&path("ca.crt")).map_err(failed("ca.crt"))?;
        let (chain, validity) = read_chain(&path("server.crt")).map_err(failed("server.crt"))?;
        let (key, key_mode) = read_key(&path("server.key")).map_err(failed("server.key"))?;
        let lists = read_lists(&path("ca.crl")).map_err(failed("ca.crl"))?;
        let lists = parse_lists(&lists, &authorities, &provider).map_err(failed("ca.crl"))?;
        let verifiers = authorities
            .iter()
            .map(|authority| Ok((authority.validity, authority.verifier(&lists, &provider)?)));
        let verifier = ClientVerifier {
            authorities: verifiers.collect::<Result<_, _>>().map_err(failed("ca.crl"))?,
            algorithms: provider.signature_verification_algorithms,
        };
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map(|builder| builder.with_client_cert_verifier(Arc::new(verifier)))
            .and_then(|builder| builder.with_single_cert(chain.clone(), key));
        let mut config = config.map_err(|error| failed("server.key")(unusable_key(&error)))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let next_updates = lists.into_iter().map(|list| list.next_update).collect();
        let (config, generation) = (Arc::new(config), 0);
        Ok(Self { config, authorities, chain, validity, next_updates, key_mode, generation })
    }

    fn findings(&self, now: SystemTime) -> Vec<Finding> {
        let find = |severity, text: &str| Finding { severity, text: text.to_owned() };
        let mut findings = Vec::new();
        for (authority, number) in self.authorities.iter().zip(1..) {
            let whose = format!("ca.crt: certificate {number}");
            findings.extend(of_validity(&whose, authority.validity, now));
        }
        findings.extend(of_validity("server.crt", self.validity, now));
        findings.extend(self.examine_chain(now).err().map(|error| match error {
            webpki::Error::UnknownIssuer => find(
                Level::Info,
                "server.crt is not issued by a CA in ca.crt: clients must trust its CA",
            ),
            webpki::Error::NameConstraintViolation => find(
                Level::Error,
                "server.crt has a name outside of its CA's name constraint: clients refuse it",
            ),
            webpki::Error::RequiredEkuNotFoundContext(_) => find(
                Level::Error,
                "server.crt is not for server authentication: issue it again with \
                 extendedKeyUsage serverAuth",
            ),
            webpki::Error::CertNotValidForName(_) => find(
                Level::Warn,
                "server.crt has no subjectAltName: clients that check the server's name refuse it",
            ),
            other => find(
                Level::Warn,
                &format!(
                    "server.crt does not hold a good chain: {other}: put the server's certificate \
                     first, then its intermediate certificates"
                ),
            ),
        }));
        if self.key_mode & 0o004 != 0 {
            let mode = self.key_mode;
            let text =
                format!("server.key may be read by everybody (mode {mode:04o}): chmod o= it");
            findings.push(find(Level::Warn, &text));
        }
        for (next_update, number) in self.next_updates.iter().zip(1..) {
            if rfc3339::format(now) >= *next_update {
                let text = format!(
                    "ca.crl: a newer version of list {number} was due on {next_update}: what it \
                     revokes stays revoked; later revocations are unknown"
                );
                findings.push(find(Level::Warn, &text));
            }
        }
        findings
    }

    /// Looks at the server's certificate the way clients that trust `ca.crt` do.
    fn examine_chain(&self, now: SystemTime) -> Result<(), webpki::Error> {
        let leaf = EndEntityCert::try_from(&self.chain[0])?;
        let anchors: Vec<_> = self.authorities.iter().map(|one| one.anchor.clone()).collect();
        leaf.verify_for_usage(
            self.config.crypto_provider().signature_verification_algorithms.all,
            &anchors,
            &self.chain[1..],
            // Whether it is valid now has been said already.
            unix_time(now.min(self.validity.not_after).max(self.validity.not_before)),
            KeyUsage::server_auth(),
            None,
            None,
        )?;
        // Asked about any name, webpki tells which names there are.
        if let Ok(any) = ServerName::try_from("invalid")
            && let Err(webpki::Error::CertNotValidForName(names)) =
                leaf.verify_is_valid_for_subject_name(&any)
            && names.presented.is_empty()
        {
            return Err(webpki::Error::CertNotValidForName(names));
        }
        Ok(())
    }
}

/// What a certificate's validity has to say at a time.
fn of_validity(whose: &str, validity: Validity, now: SystemTime) -> Option<Finding> {
    let Validity { not_before, not_after } = validity;
    let (begin, end) = (rfc3339::format(not_before), rfc3339::format(not_after));
    let (severity, what) = match not_after.duration_since(now) {
        _ if now < not_before => (
            Level::Error,
            format!("is not valid before {begin}: check the clock, or issue it again"),
        ),
        Err(_) => (Level::Error, format!("has expired on {end}: renew it and reload the daemon")),
        Ok(left) if left <= RENEWAL => {
            let days = left.as_secs() / (24 * 3600);
            let what = format!("expires in {days} days, on {end}: renew it and reload the daemon");
            (Level::Warn, what)
        }
        Ok(_) => return None,
    };
    Some(Finding { severity, text: format!("{whose} {what}") })
}

impl Authority {
    fn new(der: Vec<u8>) -> Result<Self, String> {
        let certificate = CertificateDer::from(der);
        let parsed = EndEntityCert::try_from(&certificate).map_err(|error| error.to_string())?;
        let validity = certificate::validity(&certificate).ok_or("its dates are malformed")?;
        if !certificate::is_authority(&parsed, validity) {
            return Err("it is not a CA's (basicConstraints CA:TRUE)".to_owned());
        }
        let anchor = webpki::anchor_from_trusted_cert(&certificate);
        let anchor = anchor.map_err(|error| error.to_string())?.to_owned();
        Ok(Self { certificate, validity, anchor })
    }

    fn has_signed(&self, list: &List, provider: &CryptoProvider) -> bool {
        self.anchor.subject.as_ref() == list.issuer
            && list.is_signed_by(&self.certificate, &provider.signature_verification_algorithms)
    }

    /// For this CA's clients, and those of the CAs below it.
    fn verifier(
        &self,
        lists: &[List],
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, String> {
        // webpki asks the first list of an issuer's name: another CA of that name has its own.
        let lists = lists.iter().filter(|list| {
            self.anchor.subject.as_ref() != list.issuer || self.has_signed(list, provider)
        });
        let lists = lists.map(|list| CertificateRevocationListDer::from(list.der.to_vec()));
        let roots = RootCertStore { roots: vec![self.anchor.clone()] };
        WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(provider))
            .with_crls(lists)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| format!("cannot be used: {error}"))
    }
}

fn read_authorities(path: &Path) -> Result<Vec<Authority>, String> {
    let (blocks, _) = read(path, &[SectionKind::Certificate], "certificate")?;
    let authorities = blocks.into_iter().zip(1..).map(|((_, der), number)| {
        Authority::new(der)
            .map_err(|why| format!("cannot be used: certificate {number}: {why}: take it out"))
    });
    authorities.collect()
}

/// The certificates, and until when the first is valid.
fn read_chain(path: &Path) -> Result<(Vec<CertificateDer<'static>>, Validity), String> {
    let (blocks, _) = read(path, &[SectionKind::Certificate], "certificate")?;
    let chain: Vec<_> = blocks.into_iter().map(|(_, der)| CertificateDer::from(der)).collect();
    let validities = chain.iter().zip(1..).map(|(certificate, number)| {
        certificate::validity(certificate).ok_or_else(|| {
            format!("cannot be used: certificate {number}: it is malformed: issue it again")
        })
    });
    let validities = validities.collect::<Result<Vec<_>, _>>()?;
    Ok((chain, validities[0]))
}

/// The private key, and who may read it.
fn read_key(path: &Path) -> Result<(PrivateKeyDer<'static>, u32), String> {
    use SectionKind::{EcPrivateKey, PrivateKey, RsaPrivateKey};
    let (blocks, mode) = read(path, &[PrivateKey, EcPrivateKey, RsaPrivateKey], "private key")?;
    let several = "holds several private keys: leave only one";
    let [(kind, der)] = <[Block; 1]>::try_from(blocks).map_err(|_| several)?;
    Ok((PrivateKeyDer::from_pem(kind, der).ok_or("holds no private key")?, mode))
}

fn unusable_key(error: &rustls::Error) -> String {
    let reason = match error {
        rustls::Error::InconsistentKeys(_) => {
            "does not belong to the first certificate in server.crt: put the pair that was made \
             together there, the server's own certificate first"
        }
        _ => {
            "cannot be used: it must be an Ed25519, ECDSA (P-256, P-384) or RSA (2048 to 4096 \
             bits) key"
        }
    };
    reason.to_owned()
}

fn read_lists(path: &Path) -> Result<Vec<Vec<u8>>, String> {
    if fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(Vec::new());
    }
    let (blocks, _) = read(path, &[SectionKind::Crl], "revocation list")?;
    Ok(blocks.into_iter().map(|(_, der)| der).collect())
}

/// What is wrong with a list shows here, once, rather than at each client's handshake.
fn parse_lists<'a>(
    lists: &'a [Vec<u8>],
    authorities: &[Authority],
    provider: &CryptoProvider,
) -> Result<Vec<List<'a>>, String> {
    let mut signers = Vec::new();
    let mut parse = |der: &'a Vec<u8>| {
        let parsed = OwnedCertRevocationList::from_der(der).map_err(|error| error.to_string())?;
        // webpki would let in clients that it takes for those of another distribution point.
        if CertRevocationList::from(parsed).issuing_distribution_point().is_some() {
            return Err("it speaks for some of its CA's clients: issue one for all".to_owned());
        }
        let list = List::read(der).ok_or("it is malformed")?;
        let signer = authorities.iter().position(|one| one.has_signed(&list, provider));
        let signer = signer.ok_or("no CA in ca.crt has signed it: add its issuer there")?;
        if signers.contains(&signer) {
            return Err("it is the second one of its CA: leave only the newer one".to_owned());
        }
        signers.push(signer);
        Ok(list)
    };
    let lists = lists.iter().zip(1..).map(|(der, number)| {
        parse(der).map_err(|why| {
            format!("cannot be used: revocation list {number}: {why}, or take it out")
        })
    });
    lists.collect()
}

type Block = (SectionKind, Vec<u8>);

/// Reads the PEM blocks of a file, at least one, and its permission bits. Text around them is a
/// comment, as `openssl` writes it. No error quotes the file, which may be a private key's.
fn read(path: &Path, kinds: &[SectionKind], what: &str) -> Result<(Vec<Block>, u32), String> {
    let unreadable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => "does not exist: put it there".to_owned(),
        _ => format!("cannot be read: {error}: let the daemon's user read it"),
    };
    // Looked at before it is opened: opening a pipe waits for a writer.
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
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
        let reason = "is encrypted: take the pass phrase off with openssl pkey -in OLD -out NEW";
        return Err(reason.to_owned());
    }
    // The reader passes over what it does not know, and takes what is broken for a comment.
    // `openssl ecparam` writes the curve before the key.
    let curves = count(b"-----BEGIN EC PARAMETERS-----");
    let (begun, ended) = (count(b"--BEGIN ") - curves, count(b"--END ") - curves);
    let blocks = Block::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>().ok();
    let whole = blocks.filter(|blocks| (blocks.len(), blocks.len()) == (begun, ended));
    let blocks = whole.ok_or("is malformed: a PEM block is broken or unknown: copy it again")?;
    if blocks.is_empty() {
        return Err(format!("holds no {what} in PEM (openssl x509, pkey and crl convert DER)"));
    }
    if blocks.iter().any(|(kind, _)| !kinds.contains(kind)) {
        return Err(format!("holds something other than a {what}: take it out"));
    }
    Ok((blocks, metadata.permissions().mode() & 0o7777))
}
