//! OpenVPN clients: asks every management socket of a directory at once, within one deadline.

mod address;
mod clients;
mod commands;
mod fanout;
mod management;
mod status;
mod turns;

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::num::NonZero;
use std::os::unix::fs::{DirEntryExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread::available_parallelism;
use std::time::Instant;

use log::{debug, info, warn};
use nix::errno::Errno;

pub use clients::{Client, Clients};
use commands::{Dialogue, Disconnect, List, Probe};
use fanout::{Helpers, Outcome};
pub use management::{SocketError, Stage};
use turns::Turns;

/// Most sockets that one call asks: each takes a file descriptor for a moment.
const MAX_SOCKETS: usize = 1024;

/// The name on a client's certificate: 1 to 64 characters, no control characters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CommonName(String);

/// One process that could not be asked, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// File name of the management socket in the OpenVPN directory.
    pub socket: String,
    /// Completes the sentence "OpenVPN management socket `socket` …".
    pub error: SocketError,
}

/// What went wrong with all of OpenVPN. Each variant names the directory.
#[derive(Debug)]
pub enum Error {
    /// The directory is there but cannot be read.
    Directory {
        /// Where the management sockets lie.
        directory: PathBuf,
        /// Why it cannot be read.
        error: io::Error,
    },
    /// The daemon has no file descriptors left to wait with.
    Wait {
        /// Where the management sockets lie.
        directory: PathBuf,
        /// What the system said.
        error: Errno,
    },
    /// All processes failed (listing), or some did (disconnecting).
    Sockets {
        /// Where the management sockets lie.
        directory: PathBuf,
        /// Each process that failed; at least one.
        failed: Vec<Failure>,
        /// Clients that were disconnected nevertheless.
        disconnected: usize,
    },
}

/// The clients of the processes that answered, and the processes that did not.
#[derive(Debug)]
pub struct Listing {
    /// Clients of each process that answered, in the order of the sockets' names.
    pub processes: Vec<Clients>,
    /// Processes that could not be asked; never all of them (that is an [`Error`]).
    pub failed: Vec<Failure>,
}

impl Listing {
    /// The clients of all processes.
    pub fn clients(&self) -> impl Iterator<Item = Client<'_>> {
        self.processes.iter().flat_map(Clients::iter)
    }
}

/// All OpenVPN processes whose management sockets lie in one directory.
pub struct OpenVpn {
    directory: PathBuf,
    turns: Turns,
    helpers: Helpers,
}

impl OpenVpn {
    /// `directory` holds the management sockets, e.g. `/run/openvpn-server`. It is read at
    /// every call: processes may come and go.
    pub fn new(directory: PathBuf) -> Self {
        let cpus = available_parallelism().map_or(1, NonZero::get);
        Self { directory, turns: Turns::default(), helpers: Helpers::new(cpus) }
    }

    /// Where the management sockets lie.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Clients of all processes. Answers or fails by `deadline`.
    ///
    /// # Errors
    /// The directory cannot be read, or no process could be asked though some are there.
    pub fn clients(&self, deadline: Instant) -> Result<Listing, Error> {
        let (outcomes, mut failed) = self.ask(List::new, deadline)?;
        let mut processes = Vec::new();
        for Outcome { socket, dialogue, result } in outcomes {
            match result {
                Ok(()) => processes.push(dialogue.clients),
                Err(error) => failed.push(failure(&socket, error)),
            }
        }
        if !failed.is_empty() && processes.is_empty() {
            return Err(self.sockets_failed(failed, 0));
        }
        Ok(Listing { processes, failed })
    }

    /// Disconnects all clients of that name from all processes, even when some processes
    /// fail. Returns how many were disconnected, by `deadline`.
    ///
    /// `UNDEF` is what OpenVPN calls clients that have not yet proved who they are: that name
    /// disconnects nobody.
    ///
    /// # Errors
    /// The directory cannot be read, or at least one process could not be asked.
    pub fn disconnect(&self, name: &CommonName, deadline: Instant) -> Result<usize, Error> {
        if name.as_str() == status::NO_NAME {
            return Ok(0);
        }
        let (outcomes, mut failed) = self.ask(|| Disconnect::new(name), deadline)?;
        let mut disconnected = 0;
        for Outcome { socket, dialogue, result } in outcomes {
            let count = dialogue.disconnected;
            disconnected += count;
            if count > 0 {
                let (name, socket) = (name.as_str(), socket.display());
                info!("{socket}: disconnected {count} client(s) named {name:?}");
            }
            if let Err(error) = result {
                failed.push(failure(&socket, error));
            }
        }
        if failed.is_empty() {
            return Ok(disconnected);
        }
        let (name, failures) = (name.as_str(), failed.len());
        warn!("disconnected {disconnected} client(s) named {name:?}; {failures} socket(s) failed");
        Err(self.sockets_failed(failed, disconnected))
    }

    /// The management sockets that are there now, sorted; a symbolic link counts if it leads to
    /// a socket that is not in the list yet. None if the directory is missing.
    ///
    /// # Errors
    /// The directory is there but cannot be read.
    pub fn sockets(&self) -> Result<Vec<PathBuf>, Error> {
        self.read_directory().or_else(|error| match error.kind() {
            ErrorKind::NotFound => Ok(Vec::new()),
            _ => Err(Error::Directory { directory: self.directory.clone(), error }),
        })
    }

    /// Connects to one socket, waits for its greeting and says no more. Returns the version of
    /// its management interface, as the process words it.
    ///
    /// # Errors
    /// Why there was no greeting by `deadline`. [`SocketError::NoAnswer`] says what was waited
    /// for.
    pub fn probe(&self, socket: &Path, deadline: Instant) -> Result<String, SocketError> {
        let sockets = [socket.to_owned()];
        let outcomes = fanout::ask(&self.turns, &sockets, Probe::default, deadline, &self.helpers)
            .map_err(|error| SocketError::System("could not be waited for", error))?;
        let mut version = String::new();
        for outcome in outcomes {
            outcome.result?;
            version = outcome.dialogue.version;
        }
        Ok(version)
    }

    /// Asks all sockets. Leaves out those that nobody listens on: no process, no clients.
    fn ask<D: Dialogue + Send>(
        &self,
        new: impl Fn() -> D + Sync,
        deadline: Instant,
    ) -> Result<(Vec<Outcome<D>>, Vec<Failure>), Error> {
        let mut sockets = self.sockets()?;
        let excess = sockets.split_off(sockets.len().min(MAX_SOCKETS));
        let failed = excess
            .iter()
            .map(|socket| failure(socket, SocketError::TooMany(MAX_SOCKETS)))
            .collect();
        let mut outcomes = fanout::ask(&self.turns, &sockets, new, deadline, &self.helpers)
            .map_err(|error| Error::Wait { directory: self.directory.clone(), error })?;
        outcomes.retain(|outcome| outcome.result != Err(SocketError::NotThere));
        Ok((outcomes, failed))
    }

    fn read_directory(&self) -> io::Result<Vec<PathBuf>> {
        let device = fs::metadata(&self.directory)?.dev();
        let mut seen = HashSet::new();
        let mut sockets = Vec::new();
        let mut links = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            let kind = match entry.file_type() {
                Ok(kind) => kind,
                // Removed since it was listed.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if kind.is_socket() {
                if seen.insert((device, entry.ino())) {
                    sockets.push(entry.path());
                }
            } else if kind.is_symlink() {
                links.push(entry.path());
            }
        }
        links.sort_unstable();
        for link in links {
            // A link that leads nowhere is no socket.
            if let Ok(target) = fs::metadata(&link)
                && target.file_type().is_socket()
                && seen.insert((target.dev(), target.ino()))
            {
                sockets.push(link);
            }
        }
        sockets.sort_unstable();
        Ok(sockets)
    }

    fn sockets_failed(&self, failed: Vec<Failure>, disconnected: usize) -> Error {
        Error::Sockets { directory: self.directory.clone(), failed, disconnected }
    }
}

fn failure(socket: &Path, error: SocketError) -> Failure {
    if let SocketError::NoAnswer { stage, .. } = &error {
        debug!("{}: {error}: {stage}", socket.display());
    }
    Failure { socket: socket.file_name().unwrap_or_default().to_string_lossy().into_owned(), error }
}

impl CommonName {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CommonName {
    /// Completes the sentence "`common_name` …".
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            Err("is empty")
        } else if text.chars().count() > 64 {
            Err("is longer than 64 characters")
        } else if text.chars().any(char::is_control) {
            Err("contains a control character")
        } else {
            Ok(Self(text.to_owned()))
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory { directory, error } => {
                let directory = directory.display();
                write!(f, "OpenVPN directory {directory} cannot be read: ")?;
                match error.kind() {
                    ErrorKind::PermissionDenied => f.write_str(
                        "permission denied; run the daemon in the directory's group, and give \
                         that group the right to read and enter it (mode 0750)",
                    ),
                    _ => error.fmt(f),
                }
            }
            Self::Wait { directory, error } => {
                let (directory, error) = (directory.display(), error.desc());
                write!(f, "OpenVPN sockets in {directory} cannot be waited for: {error}")
            }
            Self::Sockets { directory, failed, .. } => {
                f.write_str("OpenVPN management socket ")?;
                for (index, Failure { socket, error }) in failed.iter().enumerate() {
                    let separator = if index == 0 { "" } else { "; " };
                    write!(f, "{separator}{} {error}", directory.join(socket).display())?;
                }
                Ok(())
            }
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// Whether all that failed did not answer in time (as opposed to refused or failed).
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::Directory { .. } | Self::Wait { .. } => false,
            Self::Sockets { failed, .. } => failed.iter().all(|failure| failure.error.is_timeout()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_names() {
        for good in
            ["a", "YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=", " ", "a\"b\\c:d,e", "Zoë 🐈"]
        {
            assert_eq!(good.parse::<CommonName>().unwrap().as_str(), good);
        }
        assert!("🐈".repeat(64).parse::<CommonName>().is_ok());
        for (bad, why) in [
            (String::new(), "is empty"),
            ("🐈".repeat(65), "is longer than 64 characters"),
            ("a\nkill b".to_owned(), "contains a control character"),
            ("\t".to_owned(), "contains a control character"),
            ("\u{7f}".to_owned(), "contains a control character"),
            ("a\0".to_owned(), "contains a control character"),
        ] {
            assert_eq!(bad.parse::<CommonName>(), Err(why), "{bad:?}");
        }
    }
}
