//! OpenVPN clients: asks every management socket of a directory at once, within one deadline.
//!
//! OpenVPN serves one connection, lets two wait and keeps the rest from connecting: each socket has an agent,
//! so that the daemon's own callers do not push each other out.

pub mod management;
pub mod status;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirEntryExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use log::debug;

use crate::agent::{Agent, Answer, Failure};
use crate::{lock, metrics};
pub(crate) use management::probe;

/// Most sockets that one call asks.
const MAX_SOCKETS: usize = 1024;

/// Descriptors that all conversations together take: a connection to each socket, and a second one
/// where its greeting is overdue.
pub(crate) const MAX_DESCRIPTORS: u64 = 2 * MAX_SOCKETS as u64;

/// Room for what is written of a usual process: 64 clients.
const ROOM: usize = 8 * 1024;

/// The name on a client's certificate: 1 to 64 characters, no control characters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CommonName(String);

/// A connected client, as its process reports it; U+FFFD stands for what is not UTF-8.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Client<'a> {
    /// Name on its certificate (or user name).
    pub common_name: &'a str,
    /// Its addresses inside the VPN, as OpenVPN writes them; empty if it has none. In a list it has at
    /// least one.
    pub ipv4: &'a str,
    /// Likewise.
    pub ipv6: &'a str,
    /// What `client-kill` takes; never used twice by one process. OpenVPN has it since 2.4.
    pub id: Option<u64>,
}

/// The clients of one process.
#[derive(Clone, Debug)]
pub(crate) struct Clients {
    pub(crate) count: usize,
    /// What was written of each, one behind the other.
    pub(crate) text: Arc<Vec<u8>>,
}

/// The clients of the processes that answered, and the processes that did not.
#[derive(Debug)]
pub(crate) struct Listing {
    /// Those of each process that answered, in the order of the sockets' names.
    pub(crate) processes: Vec<Clients>,
    /// Never all of them: that is a failure.
    pub(crate) failed: Vec<SocketFailure>,
}

/// What became of the clients of one name.
#[derive(Debug)]
pub(crate) struct Disconnection {
    /// File names of sockets, and how many clients were disconnected there; at least one each.
    pub(crate) disconnected: Vec<(String, usize)>,
    /// Here some of them may still be connected.
    pub(crate) failed: Vec<SocketFailure>,
}

/// One process that could not be asked, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SocketFailure {
    /// File name of the management socket in the OpenVPN directory.
    pub(crate) socket: String,
    pub(crate) timed_out: bool,
    /// Completes the sentence "OpenVPN management socket `socket` …".
    pub(crate) error: String,
}

/// All OpenVPN processes whose management sockets lie in one directory.
pub(crate) struct OpenVpn {
    directory: PathBuf,
    /// Writes what is kept of a client.
    write: fn(&Client, &mut Vec<u8>),
    agents: Mutex<HashMap<PathBuf, Arc<SocketAgent>>>,
}

/// What sockets answered, by file name, `None` where there is no process; and which failed.
pub(crate) type Answers<T> = (Vec<(String, Option<T>)>, Vec<SocketFailure>);

/// Its list is `None` where there is no process.
type SocketAgent = Agent<Option<Clients>>;

impl OpenVpn {
    /// `directory` holds the management sockets, e.g. `/run/openvpn-server`. It is read at
    /// every call: processes may come and go. `write` writes what is to be kept of a client: once,
    /// by the thread that talks to its process, for all who share the list.
    pub(crate) fn new(directory: PathBuf, write: fn(&Client, &mut Vec<u8>)) -> Self {
        Self { directory, write, agents: Mutex::default() }
    }

    /// Clients of all processes. Answers or fails by `deadline`.
    ///
    /// # Errors
    /// The directory cannot be read, or no process could be asked though some are there.
    pub(crate) fn clients(&self, deadline: Instant) -> Result<Listing, Failure> {
        let (answers, failed) = self.lists(deadline)?;
        let processes: Vec<_> = answers.into_iter().filter_map(|(_, clients)| clients).collect();
        if processes.is_empty() && !failed.is_empty() {
            return Err(self.failure(&failed));
        }
        Ok(Listing { processes, failed })
    }

    /// The clients of each process, by `deadline`.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(crate) fn lists(&self, deadline: Instant) -> Result<Answers<Clients>, Failure> {
        self.ask(deadline, |agent, socket| {
            let (socket, write) = (socket.to_owned(), self.write);
            agent.list(deadline, move |deadline| {
                let (started, mut count, mut text) = (Instant::now(), 0, Vec::with_capacity(ROOM));
                let list = management::list(&socket, deadline, |client| {
                    count += 1;
                    write(client, &mut text);
                });
                text.shrink_to_fit();
                there(list.map(|()| {
                    let (socket, time) = (file_name(&socket), started.elapsed().as_secs_f64());
                    metrics::set("openvpn_answer_seconds", &[("socket", &socket)], time);
                    Clients { count, text: Arc::new(text) }
                }))
            })
        })
    }

    /// Disconnects all clients of that name from all processes, even when some processes fail, by
    /// `deadline`. `asked_by` is for the log.
    ///
    /// `UNDEF` is what OpenVPN calls clients that have not yet proved who they are: that name
    /// disconnects nobody.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(crate) fn disconnect(
        &self,
        name: &CommonName,
        asked_by: &str,
        deadline: Instant,
    ) -> Result<Disconnection, Failure> {
        let mut counts = Vec::new();
        if name.as_str() == status::NO_NAME {
            return Ok(Disconnection { disconnected: Vec::new(), failed: Vec::new() });
        }
        let (_, failed) = self.ask(deadline, |agent, socket| {
            let (name, socket, count) = (name.clone(), socket.to_owned(), Arc::default());
            counts.push((file_name(&socket), Arc::clone(&count)));
            let (client, at) = (name.as_str(), socket.display());
            let what = format!("disconnecting {client:?} at {at}, {asked_by}");
            agent.change(deadline, what, move |deadline| {
                there(management::disconnect(&socket, &name, deadline, &count))
            })
        })?;
        let counts = counts.into_iter().map(|(socket, count)| (socket, count.load(Relaxed)));
        Ok(Disconnection { disconnected: counts.filter(|(_, count)| *count > 0).collect(), failed })
    }

    /// All that failed, as one failure: a time-out if that is all there was.
    pub(crate) fn failure(&self, failed: &[SocketFailure]) -> Failure {
        let sentence = |failure: &SocketFailure| {
            format!("{} {}", self.directory.join(&failure.socket).display(), failure.error)
        };
        let sentences: Vec<_> = failed.iter().map(sentence).collect();
        let sentence = format!("OpenVPN management socket {}", sentences.join("; "));
        let timed_out = failed.iter().all(|failure| failure.timed_out);
        if timed_out { Failure::Timeout(sentence) } else { Failure::Failed(sentence) }
    }

    /// Begins a job at each socket, then waits for all. What there is no process for is `None`.
    fn ask<T>(
        &self,
        deadline: Instant,
        mut begin: impl FnMut(&Arc<SocketAgent>, &Path) -> Result<Answer<Option<T>>, Failure>,
    ) -> Result<Answers<T>, Failure> {
        let budget = deadline.saturating_duration_since(Instant::now());
        let mut sockets = sockets(&self.directory)?;
        let excess = sockets.split_off(sockets.len().min(MAX_SOCKETS));
        let agents = self.agents(&sockets);
        let jobs = agents.iter().zip(&sockets).map(|(agent, socket)| begin(agent, socket));
        // All of them begin before the first one is waited for.
        let jobs: Vec<_> = jobs.collect();
        let (mut answers, mut failed) = (Vec::new(), Vec::new());
        // From the last: it mostly ends last, so that this thread is woken up about once, not for each.
        for (socket, job) in sockets.iter().zip(jobs).rev() {
            match job.and_then(|job| job.wait(deadline)) {
                Ok(answer) => answers.push((file_name(socket), answer)),
                Err(failure) => failed.push(socket_failure(socket, failure, budget)),
            }
        }
        answers.reverse();
        failed.reverse();
        failed.extend(excess.iter().map(|socket| SocketFailure {
            socket: file_name(socket),
            timed_out: false,
            error: format!("was not asked: the directory has more than {MAX_SOCKETS} sockets"),
        }));
        Ok((answers, failed))
    }

    /// The agents of these sockets. Those of sockets that have gone are let go of, unless they have
    /// a thread: there are never two at a socket.
    fn agents(&self, sockets: &[PathBuf]) -> Vec<Arc<SocketAgent>> {
        let mut agents = lock(&self.agents);
        let mut agent = |socket: &PathBuf| {
            let agent = agents.entry(socket.clone());
            agent.or_insert_with(|| Agent::new(socket.display().to_string())).clone()
        };
        let asked = sockets.iter().map(&mut agent).collect();
        metrics::keep_sockets(&sockets.iter().map(|socket| file_name(socket)).collect());
        agents.retain(|_, agent| Arc::strong_count(agent) > 1);
        asked
    }
}

/// The management sockets that are there now, sorted; a symbolic link counts if it leads to
/// a socket that is not in the list yet. None if the directory is missing.
///
/// # Errors
/// The directory is there but cannot be read.
pub(crate) fn sockets(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    read_directory(directory).or_else(|error| {
        let why = match error.kind() {
            ErrorKind::NotFound => return Ok(Vec::new()),
            ErrorKind::PermissionDenied => "permission denied; run the daemon in the \
                 directory's group, and give that group the right to read and enter it (mode \
                 0750)"
                .to_owned(),
            _ => error.to_string(),
        };
        let directory = directory.display();
        Err(Failure::Failed(format!("OpenVPN directory {directory} cannot be read: {why}")))
    })
}

fn read_directory(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let device = fs::metadata(directory)?.dev();
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // What kind of file it is cannot fail on most file systems. Else it is asked, and says why.
        let kind = entry.file_type().ok();
        if kind.is_none_or(|kind| kind.is_socket()) {
            found.push((false, entry.path(), (device, entry.ino())));
        } else if kind.is_some_and(|kind| kind.is_symlink()) {
            let inode = match fs::metadata(entry.path()) {
                Ok(target) if target.file_type().is_socket() => (target.dev(), target.ino()),
                // What may not be looked at is asked, and says why it cannot be.
                Err(why) if why.kind() == ErrorKind::PermissionDenied => (device, entry.ino()),
                // It leads nowhere, or to no socket.
                _ => continue,
            };
            found.push((true, entry.path(), inode));
        }
    }
    // Links come last: a socket has its own name.
    found.sort_unstable();
    let mut seen = HashSet::new();
    found.retain(|(_, _, inode)| seen.insert(*inode));
    let mut sockets: Vec<_> = found.into_iter().map(|(_, path, _)| path).collect();
    sockets.sort_unstable();
    Ok(sockets)
}

/// `None` where nobody listens: a stale file, or it went away just now.
fn there<T>(result: io::Result<T>) -> Result<Option<T>, Failure> {
    result.map(Some).or_else(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => Ok(None),
        ErrorKind::TimedOut => Err(Failure::Timeout(error.to_string())),
        _ => Err(Failure::Failed(error.to_string())),
    })
}

fn socket_failure(socket: &Path, failure: Failure, budget: Duration) -> SocketFailure {
    let (path, sentence) = (socket.display(), failure.to_string());
    let timed_out = matches!(failure, Failure::Timeout(_));
    let reason = if timed_out { "timeout" } else { "failed" };
    let labels = [("socket", &*file_name(socket)), ("reason", reason)];
    metrics::add("openvpn_failures_total", &labels, 1.0);
    let error = if timed_out {
        debug!("{path} did not answer: {sentence}");
        format!("did not answer within {:.1} s", budget.as_secs_f64())
    } else {
        // The agent's own sentences begin with its name.
        sentence.strip_prefix(&format!("{path} ")).unwrap_or(&sentence).to_owned()
    };
    SocketFailure { socket: file_name(socket), timed_out, error }
}

fn file_name(socket: &Path) -> String {
    socket.file_name().unwrap_or_default().to_string_lossy().into_owned()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_go_with_their_sockets_unless_they_are_in_use() {
        let openvpn = OpenVpn::new(PathBuf::new(), |_, _| {});
        let count = || lock(&openvpn.agents).len();
        let sockets = ["a", "b"].map(PathBuf::from);
        let in_use = openvpn.agents(&sockets);
        for _ in 0..2 {
            assert!(Arc::ptr_eq(&in_use[1], &openvpn.agents(&sockets[1..])[0]));
            assert_eq!(count(), 2);
        }
        drop(in_use);
        openvpn.agents(&sockets[1..]);
        assert_eq!(count(), 1);
    }

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
