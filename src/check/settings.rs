//! The settings of the service, for what no flag and no variable says: what is checked is what the
//! service uses.

use std::fmt::Display;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{Entry, Level};
use crate::cli::{self, Given, Options};

/// `EnvironmentFile=` of the unit. Where both set a variable, the second one counts.
const FILES: [&str; 2] = ["/etc/default/vpn-daemon", "/etc/sysconfig/vpn-daemon"];

/// Where systemd puts the credentials of the service (systemd.exec(5)).
pub(super) const OF_THE_SERVICE: &str = "/run/credentials/vpn-daemon.service";

const SUBJECT: &str = "settings";

/// Puts into `options` what the files set, and says so.
pub(super) fn apply(options: &mut Options, given: Given) -> Vec<Entry> {
    let mut entries = Vec::new();
    for file in FILES {
        match read(file) {
            Ok(text) => {
                if !given.wg_device {
                    entries.extend(take(file, &text, "WG_DEVICE", &mut options.wg_device));
                }
                if !given.listen {
                    entries.extend(take(file, &text, "LISTEN", &mut options.listen));
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                let seen = format!("{file} cannot be read ({error}): what it sets is not known");
                entries.push(Entry::warning(SUBJECT, seen, "sudo vpn-daemon check"));
            }
        }
    }
    entries
}

fn take<T: FromStr<Err: Display>>(
    file: &str,
    text: &str,
    variable: &str,
    option: &mut T,
) -> Option<Entry> {
    let value = value(text, variable)?;
    let setting = format!("{variable}={value}");
    Some(match value.parse() {
        Ok(parsed) => {
            *option = parsed;
            Entry::ok(SUBJECT, format!("{setting}, from {file}"))
        }
        Err(error) => Entry::new(Level::Problem, SUBJECT, format!("{setting} in {file}: {error}")),
    })
}

fn read(file: impl AsRef<Path>) -> io::Result<String> {
    // Looked at before it is opened: opening a pipe waits for a writer.
    match fs::metadata(&file)?.is_file() {
        true => fs::read_to_string(file),
        false => Err(io::Error::other("it is no regular file")),
    }
}

/// The value of a variable in an `EnvironmentFile=` (systemd.exec(5)), for values without
/// backslashes and line feeds.
fn value<'a>(text: &'a str, variable: &str) -> Option<&'a str> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with(['#', ';']));
    let mut values = lines
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| name.trim() == variable)
        .map(|(_, value)| value.trim());
    let value = values.next_back()?;
    let quoted = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    Some(quoted('"').or_else(|| quoted('\'')).unwrap_or(value))
}

/// The credentials directory of the environment, else that of the running service where this process
/// may list it.
pub(super) fn credentials() -> (Option<PathBuf>, Option<Entry>) {
    if let Some(directory) = cli::credentials_directory() {
        return (Some(directory), None);
    }
    if fs::read_dir(OF_THE_SERVICE).is_err() {
        return (None, None);
    }
    let seen = format!("credentials of the running service, from {OF_THE_SERVICE}");
    (Some(OF_THE_SERVICE.into()), Some(Entry::ok(SUBJECT, seen)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use nix::unistd::{mkdtemp, mkfifo};

    #[test]
    fn a_pipe_is_not_waited_for() {
        let directory = mkdtemp(&std::env::temp_dir().join("vpn-daemon.XXXXXX")).unwrap();
        let pipe = directory.join("pipe");
        mkfifo(&pipe, Mode::S_IRUSR).unwrap();
        assert_eq!(read(&pipe).unwrap_err().to_string(), "it is no regular file");
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn values_are_read_as_systemd_reads_them() {
        for (text, expected) in [
            ("", None),
            ("# LISTEN=:1\n ;LISTEN=:2\nLISTEN\nXLISTEN=:3\n", None),
            ("LISTEN=:1", Some(":1")),
            ("LISTEN=:1\nLISTEN=:2\n", Some(":2")),
            ("\t LISTEN = :1 \r\n", Some(":1")),
            ("LISTEN=\"[::1]:1\"\n", Some("[::1]:1")),
            ("LISTEN=':1'\n", Some(":1")),
            ("LISTEN=\":1'\n", Some("\":1'")),
            ("LISTEN=\"\n", Some("\"")),
            ("LISTEN=\n", Some("")),
            // Part of the value, and the service fails on it.
            ("LISTEN=:1 # all", Some(":1 # all")),
        ] {
            assert_eq!(value(text, "LISTEN"), expected, "{text:?}");
        }
    }
}
