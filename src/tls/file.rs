//! The files of the credentials directory as DER blocks.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::error::Problem;

/// Largest file that is read, in bytes: some 300,000 revoked certificates.
pub(super) const MAX_SIZE: u64 = 16 * 1024 * 1024;

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
