//! The files of the credentials directory as DER blocks, and every sentence about a file that is wrong.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Certificates of the CAs whose clients are served.
pub const CA_CERTIFICATES: &str = "ca.crt";
/// The server's certificate, followed by the intermediate certificates that clients need.
pub const SERVER_CERTIFICATE: &str = "server.crt";
/// The private key of the server's certificate.
pub const SERVER_KEY: &str = "server.key";
/// Certificate revocation lists of the CAs; may be missing.
pub const REVOCATION_LISTS: &str = "ca.crl";

/// Largest file that is read, in bytes: some 300,000 revoked certificates.
const MAX_SIZE: u64 = 16 * 1024 * 1024;

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

/// One PEM block.
pub(super) struct Block {
    pub(super) label: String,
    pub(super) der: Vec<u8>,
}

/// Reads the blocks of a file. Text outside of them is a comment, as `openssl` writes it;
/// a block with a label that is neither in `wanted` nor in `ignored` is an error.
pub(super) fn read(
    path: &Path,
    wanted: &[&str],
    ignored: &[&str],
    what: &'static str,
) -> Result<Vec<Block>, Problem> {
    let bytes = read_bytes(path)?;
    // The tag of a SEQUENCE and a long length: no text begins like this.
    if matches!(bytes.as_slice(), [0x30, 0x80..=0xff, ..]) {
        return Err(Problem::Der);
    }
    let mut blocks = Vec::new();
    for (line, block) in parse(&bytes)? {
        if wanted.contains(&block.label.as_str()) {
            blocks.push(block);
        } else if block.label == "ENCRYPTED PRIVATE KEY" && wanted.contains(&"PRIVATE KEY") {
            return Err(Problem::Encrypted);
        } else if !ignored.contains(&block.label.as_str()) {
            let label = block.label;
            return Err(Problem::Foreign { line, label });
        }
    }
    if blocks.is_empty() {
        return Err(Problem::Nothing { what });
    }
    Ok(blocks)
}

fn read_bytes(path: &Path) -> Result<Vec<u8>, Problem> {
    let unreadable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Problem::Missing,
        _ => Problem::Unreadable(error),
    };
    // Looked at before it is opened: opening a pipe waits for a writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(Problem::NotAFile);
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(Problem::TooLarge);
    }
    Ok(bytes)
}

/// The PEM blocks (RFC 7468) with the number of the line each begins at.
fn parse(text: &[u8]) -> Result<Vec<(usize, Block)>, Problem> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, &[u8], Vec<u8>)> = None;
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let malformed = |what| Problem::Malformed { line: index + 1, what };
        let line = line.trim_ascii();
        let begin = label(line, b"-----BEGIN ");
        let Some((start, opened, mut base64)) = open.take() else {
            if let Some(label) = begin {
                open = Some((index + 1, label, Vec::new()));
            } else if contains(line, b"--BEGIN ") || contains(line, b"--END ") {
                return Err(malformed("this is neither a PEM block's beginning nor a comment"));
            }
            continue;
        };
        if let Some(closed) = label(line, b"-----END ") {
            if closed != opened {
                return Err(malformed("this does not end the PEM block that is open"));
            }
            let der = STANDARD.decode(base64).map_err(|_| Problem::Malformed {
                line: start,
                what: "the PEM block that begins here is not base64",
            })?;
            let label = String::from_utf8_lossy(opened).into_owned();
            blocks.push((start, Block { label, der }));
        } else if contains(line, b"ENCRYPTED") {
            return Err(Problem::Encrypted);
        } else if line.starts_with(b"-") {
            return Err(malformed("the PEM block before this line has no end"));
        } else {
            base64.extend_from_slice(line);
            open = Some((start, opened, base64));
        }
    }
    match open {
        None => Ok(blocks),
        Some((line, ..)) => {
            Err(Problem::Malformed { line, what: "the PEM block that begins here has no end" })
        }
    }
}

fn label<'a>(line: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    line.strip_prefix(prefix)?.strip_suffix(b"-----")
}

fn contains(line: &[u8], needle: &[u8]) -> bool {
    line.windows(needle.len()).any(|window| window == needle)
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
                "is malformed: certificate {number} cannot be used: {error}: issue it again \
                 as X.509 version 3"
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

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(text: &str) -> Result<Vec<(usize, String, Vec<u8>)>, String> {
        match parse(text.as_bytes()) {
            Ok(blocks) => Ok(blocks.into_iter().map(|(n, b)| (n, b.label, b.der)).collect()),
            Err(problem) => Err(problem.to_string()),
        }
    }

    #[test]
    fn well_formed_pem() {
        let block = |line, label: &str, der: &[u8]| (line, label.to_string(), der.to_vec());
        for (text, expected) in [
            ("", vec![]),
            ("a comment\n# ----- my CA -----\n", vec![]),
            ("-----BEGIN A-----\nAQID\n-----END A-----", vec![block(1, "A", &[1, 2, 3])]),
            (
                "-----BEGIN A-----\r\nAQ\r\nID\r\n-----END A-----\r\n",
                vec![block(1, "A", &[1, 2, 3])],
            ),
            (
                "Certificate:\n    Data:\n-----BEGIN A-----\nAQ==\n-----END A-----\n\n\
                 -----BEGIN B C-----\nAg==\n-----END B C-----\n",
                vec![block(3, "A", &[1]), block(7, "B C", &[2])],
            ),
            ("  -----BEGIN A-----\n  AQ==\n  -----END A-----  \n", vec![block(1, "A", &[1])]),
            ("-----BEGIN A-----\n-----END A-----\n", vec![block(1, "A", &[])]),
        ] {
            assert_eq!(outcome(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn malformed_pem() {
        for (text, expected) in [
            ("-----BEGIN A-----\nAQID\n", "line 1: the PEM block that begins here has no end"),
            (
                "\n-----BEGIN A-----\nA\n-----END A-----",
                "line 2: the PEM block that begins here is not",
            ),
            ("-----BEGIN A-----\nA Q I D\n-----END A-----", "is not base64"),
            ("-----BEGIN A-----\nAQ==\nAQ==\n-----END A-----", "is not base64"),
            ("-----BEGIN A-----\nAQID\n-----END B-----", "line 3: this does not end"),
            ("-----BEGIN A-----\nAQID\n-----BEGIN A-----\n", "line 3: the PEM block before"),
            ("-----BEGIN A-----\nAQID\n----END A-----\n", "line 3: the PEM block before"),
            ("----BEGIN A-----\nAQID\n-----END A-----\n", "line 1: this is neither"),
            ("\u{feff}-----BEGIN A-----\nAQID\n-----END A-----\n", "line 1: this is neither"),
            ("AQID\n-----END A-----\n", "line 2: this is neither"),
            ("-----BEGIN A-----\nProc-Type: 4,ENCRYPTED\n\nAQID\n-----END A-----", "is encrypted"),
        ] {
            let sentence = outcome(text).unwrap_err();
            assert!(sentence.contains(expected), "{text}\n{sentence}");
        }
    }
}
