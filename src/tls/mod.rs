//! TLS: the credentials directory as a rustls server configuration, and its reload.
//!
//! TLS 1.3 only, a client certificate is required. Sessions are never resumed: a resumed session
//! does not look at the client's certificate again, and would let in who has been revoked or has
//! expired since.
//!
//! A client is let in when its chain leads to a certificate in `ca.crt`, every certificate of the
//! chain is valid now (the CA's too), names client authentication as a usage or no usage at all
//! (RFC 5280, section 4.2.1.12), keeps to its CA's name constraints, and is in no list in `ca.crl`.
//! A list speaks for the clients of the CA that has signed it; clients of a CA without a list are
//! not looked up. A list whose next update is overdue stays in force and is warned of: refusing
//! everybody because nobody renewed a list would shut the portal out.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use webpki::{EndEntityCert, KeyUsage};

mod der;
mod error;
mod file;
mod finding;
mod refusal;
mod source;
mod verifier;

pub use der::Validity;
pub use error::{
    CA_CERTIFICATES, Error, Problem, REVOCATION_LISTS, SERVER_CERTIFICATE, SERVER_KEY,
};
pub use finding::{Finding, Severity, Whose};
pub use refusal::{Reason, Refusal, Throttle};

use source::Source;
use verifier::{Authority, ClientVerifier};

/// Longest common name that is kept, in characters of the certificate.
const MAX_NAME: usize = 128;

/// A set of credentials that fit together, read from one directory.
pub struct Credentials {
    config: Arc<ServerConfig>,
    authorities: Vec<Authority>,
    verifier: Arc<ClientVerifier>,
    chain: Vec<CertificateDer<'static>>,
    validity: Validity,
    key_mode: u32,
}

/// The credentials in force.
#[derive(Debug)]
pub struct Tls {
    directory: PathBuf,
    current: RwLock<Arc<Credentials>>,
}

/// A certificate's common name in printable ASCII, fit for a log line and a header.
///
/// Everything else, and the backslash, is written as `\u{…}`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientName(String);

/// Reads `ca.crt`, `server.crt`, `server.key` and, where there is one, `ca.crl`.
///
/// # Errors
/// The first file that cannot be used.
pub fn load(directory: &Path) -> Result<Credentials, Error> {
    let source = Source::new(directory)?;
    let authorities = source.authorities()?;
    let chain = source.chain()?;
    let key = source.key()?;
    let lists = source.lists(&authorities)?;
    source.assemble(authorities, chain, key, lists)
}

/// Everything that keeps [`load`] from succeeding, at most one error per file; empty if nothing.
pub fn errors(directory: &Path) -> Vec<Error> {
    let source = match Source::new(directory) {
        Ok(source) => source,
        Err(error) => return vec![error],
    };
    let authorities = source.authorities();
    let lists = source.lists(authorities.as_deref().unwrap_or_default());
    match (authorities, source.chain(), source.key(), lists) {
        (Ok(authorities), Ok(chain), Ok(key), Ok(lists)) => {
            source.assemble(authorities, chain, key, lists).err().into_iter().collect()
        }
        (authorities, chain, key, lists) => {
            // Without the CAs nothing can be said about who has signed a list.
            let lists = lists.err().filter(|_| authorities.is_ok());
            [authorities.err(), chain.err(), key.err(), lists].into_iter().flatten().collect()
        }
    }
}

impl Credentials {
    /// For [`rustls::ServerConnection::new`].
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.config.clone()
    }

    /// The server's own certificate.
    pub fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.chain.first()
    }

    /// When the server's certificate expires.
    pub fn expires(&self) -> SystemTime {
        self.validity.not_after
    }

    /// The server's certificate: its common name and validity.
    pub fn server(&self) -> (Option<ClientName>, Validity) {
        (self.chain.first().and_then(ClientName::of), self.validity)
    }

    /// The CAs whose clients are served, as they stand in `ca.crt`: common name and validity.
    pub fn authorities(&self) -> impl Iterator<Item = (Option<ClientName>, Validity)> {
        let name = |authority: &Authority| authority.name.as_deref().map(ClientName::new);
        self.authorities.iter().map(move |authority| (name(authority), authority.validity))
    }

    /// Number of revocation lists.
    pub fn revocation_lists(&self) -> usize {
        self.verifier.lists().len()
    }

    /// What is noteworthy at a time, in the order of the files.
    pub fn findings(&self, now: SystemTime) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (authority, number) in self.authorities.iter().zip(1..) {
            let whose = Whose::Authority { number };
            findings.extend(Finding::of_validity(whose, authority.validity, now));
        }
        findings.extend(Finding::of_validity(Whose::Server, self.validity, now));
        self.examine_chain(now, &mut findings);
        if self.key_mode & 0o004 != 0 {
            findings.push(Finding::KeyOpen { mode: self.key_mode });
        }
        for (list, number) in self.verifier.lists().iter().zip(1..) {
            let next_update = list.next_update;
            if now >= next_update {
                findings.push(Finding::ListOverdue { number, next_update });
            }
        }
        findings
    }

    /// Looks at the server's certificate the way clients that trust `ca.crt` do.
    fn examine_chain(&self, now: SystemTime, findings: &mut Vec<Finding>) {
        let Some((Ok(leaf), intermediates)) =
            self.chain.split_first().map(|(leaf, rest)| (EndEntityCert::try_from(leaf), rest))
        else {
            return;
        };
        let algorithms = self.config.crypto_provider().signature_verification_algorithms;
        let anchors: Vec<_> = self.authorities.iter().map(Authority::anchor).collect();
        // Whether it is valid now has been said already.
        let Validity { not_before, not_after } = self.validity;
        let time = now.min(not_after).max(not_before);
        let verdict = leaf.verify_for_usage(
            algorithms.all,
            &anchors,
            intermediates,
            verifier::unix_time(time),
            KeyUsage::server_auth(),
            None,
            None,
        );
        findings.extend(verdict.err().map(|error| match error {
            webpki::Error::UnknownIssuer => Finding::OtherIssuer,
            webpki::Error::NameConstraintViolation => Finding::NameConstraint,
            webpki::Error::RequiredEkuNotFoundContext(_) => Finding::Usage,
            other => Finding::Chain(other),
        }));
        // Asked about any name, webpki tells which names there are.
        if let Ok(any) = ServerName::try_from("invalid")
            && let Err(webpki::Error::CertNotValidForName(names)) =
                leaf.verify_is_valid_for_subject_name(&any)
            && names.presented.is_empty()
        {
            findings.push(Finding::NoName);
        }
    }
}

impl fmt::Debug for Credentials {
    /// Shows nothing of the private key, whatever rustls may print.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("validity", &self.validity).finish_non_exhaustive()
    }
}

impl Tls {
    /// Loads the directory, as [`load`] does.
    ///
    /// # Errors
    /// The first file that cannot be used.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        Ok(Self {
            current: RwLock::new(Arc::new(load(directory)?)),
            directory: directory.to_path_buf(),
        })
    }

    /// The credentials in force.
    pub fn credentials(&self) -> Arc<Credentials> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// For the next connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.credentials().server_config()
    }

    /// Reads the directory again: what it holds counts for new connections.
    ///
    /// # Errors
    /// The first file that cannot be used; the old credentials stay in force.
    pub fn reload(&self) -> Result<(), Error> {
        let new = Arc::new(load(&self.directory)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// Logs what is to be mended, above all certificates that expire within 30 days. For the
    /// start, each reload and once a day.
    pub fn log_findings(&self, now: SystemTime) {
        for finding in self.credentials().findings(now) {
            match finding.severity() {
                Severity::Note => log::info!("{finding}"),
                Severity::Warning => log::warn!("{finding}"),
                Severity::Problem => log::error!("{finding}"),
            }
        }
    }
}

impl ClientName {
    /// The common name in a certificate's subject, if it has one.
    pub fn of(certificate: &CertificateDer) -> Option<Self> {
        Some(Self::new(&der::Certificate::read(certificate)?.common_name()?))
    }

    fn new(name: &str) -> Self {
        let escape = |c: char| match c {
            ' '..='~' if c != '\\' => c.to_string(),
            _ => c.escape_unicode().to_string(),
        };
        Self(name.chars().take(MAX_NAME).map(escape).collect())
    }

    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClientName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_names_are_printable() {
        for (name, expected) in [
            ("portal", "portal"),
            ("vpn portal, Inc. (\"x\")", "vpn portal, Inc. (\"x\")"),
            ("a\r\nX-Forged: b", "a\\u{d}\\u{a}X-Forged: b"),
            ("a\0\x1b\x7f", "a\\u{0}\\u{1b}\\u{7f}"),
            ("\\u{d}", "\\u{5c}u{d}"),
            ("p\u{f6}rtal \u{202e}", "p\\u{f6}rtal \\u{202e}"),
            ("", ""),
        ] {
            assert_eq!(ClientName::new(name).as_str(), expected);
        }
        assert_eq!(ClientName::new(&"x".repeat(1000)).as_str().len(), MAX_NAME);
    }

    #[test]
    fn a_directory_is_needed() {
        let sentence = load(Path::new("")).unwrap_err().to_string();
        assert!(sentence.starts_with("CREDENTIALS_DIRECTORY is empty: "), "{sentence}");
        let sentence = load(Path::new("/nonexistent/credentials")).unwrap_err().to_string();
        assert!(
            sentence.starts_with("credentials directory /nonexistent/credentials: No such file")
        );
        let sentence = load(Path::new("/dev/null")).unwrap_err().to_string();
        assert!(sentence.starts_with("credentials directory /dev/null: Not a directory"));
    }
}
