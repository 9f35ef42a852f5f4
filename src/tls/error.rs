//! Every sentence about credentials that cannot be used.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::file::MAX_SIZE;

/// Certificates of the CAs whose clients are served.
pub const CA_CERTIFICATES: &str = "ca.crt";
/// The server's certificate, followed by the intermediate certificates that clients need.
pub const SERVER_CERTIFICATE: &str = "server.crt";
/// The private key of the server's certificate.
pub const SERVER_KEY: &str = "server.key";
/// Certificate revocation lists of the CAs; may be missing.
pub const REVOCATION_LISTS: &str = "ca.crl";

/// Why the credentials cannot be used. One line: the file, what is wrong, what to do.
#[derive(Debug)]
pub enum Error {
    /// The path of the credentials directory is empty.
    NoDirectory,
    /// The credentials directory is not there or is no directory.
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A file in the directory is not there or cannot be used.
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Problem,
    },
    /// rustls was built without what TLS 1.3 needs.
    Rustls(rustls::Error),
}

/// What is wrong with a file of the credentials directory.
///
/// Certificates and lists are numbered as they stand in their file, from 1.
#[derive(Debug)]
pub enum Problem {
    /// It does not exist.
    Missing,
    /// The system does not let us read it.
    Unreadable(io::Error),
    /// It is a directory, a pipe or a device.
    NotAFile,
    /// It is larger than anything sensible.
    TooLarge,
    /// It is binary DER, not PEM.
    Der,
    /// The PEM around this line is broken.
    Malformed {
        /// Line number, from 1.
        line: usize,
        /// Completes "line N: …".
        what: &'static str,
    },
    /// It holds a block that does not belong there.
    Foreign {
        /// Line number, from 1.
        line: usize,
        /// The block's PEM label.
        label: String,
    },
    /// There is none of what it is for.
    Nothing {
        /// What is missing, with its article.
        what: &'static str,
    },
    /// The private key is encrypted, and nobody is there to type a pass phrase.
    Encrypted,
    /// It holds more than one private key.
    SeveralKeys,
    /// A certificate is not one that we can parse.
    Certificate {
        /// Which.
        number: usize,
        /// What the parser said.
        error: webpki::Error,
    },
    /// A certificate among the CAs' must not issue certificates.
    NotCa {
        /// Which.
        number: usize,
    },
    /// A private key that we cannot parse or whose kind we do not support.
    Key,
    /// The private key is not the one of the server's certificate.
    KeyMismatch,
    /// A revocation list is not one that we can parse.
    List {
        /// Which.
        number: usize,
        /// What the parser said.
        error: webpki::Error,
    },
    /// A revocation list is not signed by any certificate among the CAs'.
    ListSigner {
        /// Which.
        number: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDirectory => write!(
                f,
                "CREDENTIALS_DIRECTORY is empty: set it to the directory with {CA_CERTIFICATES}, \
                 {SERVER_CERTIFICATE} and {SERVER_KEY}, or unset it for plain HTTP"
            ),
            Self::Directory { path, error } => write!(
                f,
                "credentials directory {}: {error}: it must hold {CA_CERTIFICATES}, \
                 {SERVER_CERTIFICATE} and {SERVER_KEY}",
                path.display()
            ),
            Self::File { path, problem } => write!(f, "{} {problem}", path.display()),
            Self::Rustls(error) => write!(f, "TLS cannot be set up: {error}"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("does not exist: put it there"),
            Self::Unreadable(error) => {
                write!(f, "cannot be read: {error}: let the daemon's user read it")
            }
            Self::NotAFile => f.write_str("is not a regular file: put a PEM file there"),
            Self::TooLarge => write!(f, "is larger than {} MiB", MAX_SIZE / 1024 / 1024),
            Self::Der => f.write_str(
                "is DER, not PEM: convert it with openssl (x509, pkey or crl) -inform DER",
            ),
            Self::Malformed { line, what } => {
                write!(f, "is malformed: line {line}: {what}: copy the file again")
            }
            Self::Foreign { line, label } => write!(
                f,
                "holds a block that does not belong there: line {line}: {}: take it out",
                label.chars().take(40).flat_map(char::escape_default).collect::<String>()
            ),
            Self::Nothing { what } => write!(f, "holds no {what} (PEM)"),
            Self::Encrypted => f.write_str(
                "is encrypted: take the pass phrase off with openssl pkey -in OLD -out NEW",
            ),
            Self::SeveralKeys => f.write_str("holds several private keys: leave only one"),
            Self::Certificate { number, error } => write!(
                f,
                "is malformed: certificate {number} cannot be used: {}: issue it again",
                explain(error)
            ),
            Self::NotCa { number } => write!(
                f,
                "must hold CA certificates only: certificate {number} is not one \
                 (basicConstraints CA:TRUE)"
            ),
            Self::Key => f.write_str(
                "cannot be used: it must be an Ed25519, ECDSA (P-256, P-384) or RSA \
                 (2048 to 4096 bits) key",
            ),
            Self::KeyMismatch => write!(
                f,
                "does not belong to the first certificate in {SERVER_CERTIFICATE}: \
                 put the pair that was made together there, the server's own certificate first"
            ),
            Self::List { number, error } => {
                write!(f, "is malformed: revocation list {number} cannot be used: {error}")
            }
            Self::ListSigner { number } => write!(
                f,
                "does not fit: revocation list {number} is not signed by a certificate in \
                 {CA_CERTIFICATES}: add its issuer there or take the list out"
            ),
        }
    }
}

impl std::error::Error for Error {}

/// webpki's errors are bare names, some with long contexts: the usual ones in words.
pub(super) fn explain(error: &webpki::Error) -> String {
    use webpki::Error as E;
    let words = match error {
        E::BadDer | E::TrailingData(_) => "it is not well-formed DER",
        E::UnsupportedCertVersion => "it is not X.509 version 3 (it has no extensions)",
        E::UnsupportedCriticalExtension => "it has a critical extension that we do not know",
        E::CaUsedAsEndEntity => "it is a CA's (basicConstraints CA:TRUE)",
        E::EndEntityUsedAsCa => "its issuer is not a CA (basicConstraints)",
        E::PathLenConstraintViolated => "its chain is longer than a CA allows (pathlen)",
        E::UnsupportedSignatureAlgorithmContext(_)
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
            "it is signed with an algorithm that we do not support"
        }
        E::InvalidSignatureForPublicKey => "its issuer's key has not signed it",
        E::CertExpired { .. } => "a certificate of its chain has expired",
        E::CertNotValidYet { .. } => "a certificate of its chain is not valid yet",
        other => return other.to_string(),
    };
    words.to_string()
}
