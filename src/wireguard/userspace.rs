//! A WireGuard device in user space (wireguard-go, boringtun), over its Unix socket.
//!
//! The text protocol is that of <https://www.wireguard.com/xplatform/>.

use std::collections::{HashMap, HashSet};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use memchr::{memmem, memrchr};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use wireguard_uapi::get;
use wireguard_uapi::xplatform::parser::ParseGetResponseError;
use wireguard_uapi::xplatform::set;

use super::reply::{parse_device, parse_settings, parse_status};
use super::{Backend, Change, DeviceName, Error, PublicKey, Snapshot};

/// The peers in one request: so many that the process answers well before the deadline.
const REQUEST_PEERS: usize = 1000;

/// What the addition of a peer may take that was removed just before, past the deadline if need be.
const ADDITION: Duration = Duration::from_millis(500);

/// The bytes of a request that are written at a time: the kernel takes so many whole or not at all
/// (`unix_stream_sendmsg`).
const PIECE: usize = 32 * 1024;

/// The process behind the device's socket, until the deadline.
pub(super) struct Userspace<'a> {
    device: &'a DeviceName,
    path: PathBuf,
    deadline: Instant,
}

/// Where the process of a device listens.
pub(super) fn socket_path(device: &DeviceName) -> PathBuf {
    format!("/var/run/wireguard/{device}.sock").into()
}

impl Backend for Userspace<'_> {
    fn device(&self) -> &DeviceName {
        self.device
    }

    fn snapshot(&self) -> Result<Snapshot, Error> {
        let reader = self.exchange("get=1\n\n")?;
        parse_device(reader, SystemTime::now()).map_err(|error| self.parse_error(error))
    }

    fn apply(
        &self,
        changes: &[Change],
        before: Option<&Snapshot>,
        applied: &AtomicUsize,
    ) -> Result<(), Error> {
        if changes.is_empty() {
            return Ok(());
        }
        let fresh = before.is_none().then(|| self.snapshot()).transpose()?;
        let Some(before) = before.or(fresh.as_ref()) else { return Ok(()) };
        let is_boringtun = before.own_key.is_some();
        let present = before.peers.iter().map(|peer| (peer.public_key, peer.allowed_ips));
        let present: HashMap<_, _> = present.collect();
        let mut added = false;
        for change in changes {
            match *change {
                Change::Set(key, _) if Some(*key) == before.own_key => {
                    return Err(Error::OwnKey(self.device.clone(), *key));
                }
                Change::Set(key, _) => added |= !present.contains_key(key),
                Change::Remove(_) => {}
            }
        }
        // boringtun panics when a peer that exists is changed.
        let replaced = |change: &Change| match *change {
            Change::Set(key, wanted) if is_boringtun => {
                present.get(key).is_some_and(|now| !same_set(now, wanted))
            }
            _ => false,
        };
        let settings = match changes.iter().any(replaced) {
            true => self.settings()?,
            false => HashMap::new(),
        };
        for batch in changes.chunks(REQUEST_PEERS) {
            let (mut removed, mut set) = (Vec::new(), Vec::new());
            for change in batch {
                match *change {
                    Change::Remove(key) => removed.push(*key),
                    Change::Set(key, allowed_ips) => {
                        let allowed_ips = allowed_ips.iter().map(|ip| set::AllowedIp {
                            ipaddr: *ip.address(),
                            cidr_mask: ip.prefix_len(),
                        });
                        let peer = set::Peer::from_public_key(*key.as_bytes())
                            .replace_allowed_ips(true)
                            .allowed_ips(allowed_ips.collect());
                        match settings.get(key) {
                            Some(old) if replaced(change) => {
                                self.replace(*key, with_settings(peer, old))?;
                            }
                            _ if is_boringtun && present.contains_key(key) => {}
                            _ => set.push(peer),
                        }
                    }
                }
            }
            self.set(removed.into_iter().map(removal).collect())?;
            self.set(set)?;
            applied.fetch_add(batch.len(), Ordering::Relaxed);
        }
        // wireguard-go silently ignores a peer with the device's own key.
        if added && !is_boringtun {
            let after = self.snapshot()?;
            let listed: HashSet<_> = after.peers.iter().map(|peer| peer.public_key).collect();
            let missing = changes.iter().find_map(|change| match change {
                Change::Set(key, _) if !listed.contains(key) => Some(**key),
                _ => None,
            });
            if let Some(key) = missing {
                return Err(Error::NotAdded(self.device.clone(), key));
            }
        }
        Ok(())
    }
}

/// Cuts a piece off a request. It ends where a peer does, or else where a line does: wireguard-go
/// applies what it has got when the deadline cuts a request off, and of `allowed_ip=10.0.0.1/32` that
/// may have been `allowed_ip=10.0.0.1/3`.
fn split_piece(request: &[u8]) -> (&[u8], &[u8]) {
    let Some(most) = request.get(..PIECE).filter(|most| most.len() < request.len()) else {
        return (request, &[]);
    };
    let end = memmem::rfind(most, b"\npublic_key=").or_else(|| memrchr(b'\n', most));
    request.split_at(end.map_or(PIECE, |end| end + 1))
}

fn removal(key: PublicKey) -> set::Peer {
    set::Peer::from_public_key(*key.as_bytes()).remove(true)
}

/// `peer` with what else is known of it.
fn with_settings(peer: set::Peer, old: &get::Peer) -> set::Peer {
    set::Peer {
        preshared_key: Some(old.preshared_key).filter(|key| *key != [0; 32]),
        endpoint: old.endpoint,
        persistent_keepalive_interval: Some(old.persistent_keepalive_interval)
            .filter(|seconds| *seconds != 0),
        ..peer
    }
}

/// Whether both hold the same, in whatever order.
fn same_set<T: Ord + Copy>(left: &[T], right: &[T]) -> bool {
    let (mut left, mut right) = (left.to_vec(), right.to_vec());
    for side in [&mut left, &mut right] {
        side.sort_unstable();
        side.dedup();
    }
    left == right
}

impl<'a> Userspace<'a> {
    pub(super) fn new(device: &'a DeviceName, deadline: Instant) -> Self {
        Self { device, path: socket_path(device), deadline }
    }

    /// What is known of each peer, secrets among it.
    fn settings(&self) -> Result<HashMap<PublicKey, get::Peer>, Error> {
        let peers = parse_settings(self.exchange("get=1\n\n")?);
        let peers = peers.map_err(|error| self.parse_error(error))?;
        Ok(peers.into_iter().map(|peer| (peer.public_key.into(), peer)).collect())
    }

    fn set(&self, peers: Vec<set::Peer>) -> Result<(), Error> {
        match peers.is_empty() {
            true => Ok(()),
            false => self.status(self.request(peers)?),
        }
    }

    /// Removes the peer and adds it as it shall be: two requests, since boringtun applies what one
    /// peer of a request has, `remove` among it, to all that follow. It answers one after the other,
    /// so that once the removal is on its way the addition follows, be it past the deadline: no
    /// time-out loses a peer.
    fn replace(&self, key: PublicKey, peer: set::Peer) -> Result<(), Error> {
        let removal = self.request(vec![removal(key)])?;
        match self.status(removal) {
            Err(error) if !error.is_timeout() => return Err(error),
            _ => {}
        }
        let deadline = self.deadline.max(Instant::now() + ADDITION);
        Userspace { device: self.device, path: self.path.clone(), deadline }.set(vec![peer])
    }

    /// Sends the peers and gives what the answer is read from.
    fn request(&self, peers: Vec<set::Peer>) -> Result<BufReader<Stream>, Error> {
        let request = set::Device { peers, ..set::Device::default() };
        self.exchange(&format!("set=1\n{request}\n"))
    }

    fn status(&self, reader: BufReader<Stream>) -> Result<(), Error> {
        parse_status(reader).map_err(|error| self.parse_error(error))
    }

    /// Connects, sends a request and gives what the answer is read from.
    fn exchange(&self, request: &str) -> Result<BufReader<Stream>, Error> {
        let stream = self.connect().map_err(|error| self.io_error(error))?;
        let mut stream = Stream { stream, deadline: self.deadline };
        let mut rest = request.as_bytes();
        while !rest.is_empty() {
            let (piece, behind) = split_piece(rest);
            stream.write_all(piece).map_err(|error| self.io_error(error))?;
            rest = behind;
        }
        Ok(BufReader::with_capacity(1 << 16, stream))
    }

    /// `UnixStream::connect` waits without limit for a process that does not accept; a send
    /// time-out ends `connect` as well.
    fn connect(&self) -> io::Result<UnixStream> {
        let kind = SockType::Stream;
        let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
        let left = i64::try_from(time_left(self.deadline)?.as_micros()).unwrap_or(i64::MAX);
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::microseconds(left))?;
        connect(socket.as_raw_fd(), &UnixAddr::new(&self.path)?)?;
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    fn io_error(&self, error: io::Error) -> Error {
        let path = self.path.clone();
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::SocketTimeout(path),
            _ => Error::Socket(path, error),
        }
    }

    fn parse_error(&self, error: ParseGetResponseError) -> Error {
        let path = self.path.clone();
        match error {
            ParseGetResponseError::ReadLineIoError(error) => match error.kind() {
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                    Error::Reply(path, error.to_string())
                }
                _ => self.io_error(error),
            },
            ParseGetResponseError::ServerError(errno) => match errno.parse::<i32>() {
                Ok(errno) => Error::Refused(path, errno.saturating_abs()),
                Err(_) => Error::Reply(path, "its error number is no number".to_owned()),
            },
            // The crate's sentence holds the key.
            ParseGetResponseError::InvalidPresharedKey(_) => {
                Error::Reply(path, "a preshared key is malformed".to_owned())
            }
            error => Error::Reply(path, error.to_string()),
        }
    }
}

/// The socket, which never blocks, with one deadline for all that is read and written. `poll` is
/// exact, while the kernel rounds socket time-outs of some seconds up by a quarter of a second.
struct Stream {
    stream: UnixStream,
    deadline: Instant,
}

fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    // A time-out below a microsecond would mean none.
    if left < Duration::from_micros(1) { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

impl Stream {
    /// Does the operation once the socket is ready for it.
    fn when_ready<T>(
        &mut self,
        event: PollFlags,
        mut operation: impl FnMut(&mut UnixStream) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let left = time_left(self.deadline)? + Duration::from_millis(1);
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            poll(&mut [PollFd::new(self.stream.as_fd(), event)], left)?;
            match operation(&mut self.stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.when_ready(PollFlags::POLLIN, |stream| stream.read(buffer))
    }
}
impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.when_ready(PollFlags::POLLOUT, |stream| stream.write(buffer))
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufRead;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread;

    use super::super::Peers;

    /// A socket of its own for a test.
    fn listen(name: &str) -> (PathBuf, UnixListener) {
        let path = std::env::temp_dir().join(format!("wg-{}-{name}.sock", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        (path, listener)
    }

    /// What `peers` gives within 300 ms.
    fn peers(path: &Path) -> Result<Peers, Error> {
        let device = "wg0".parse().unwrap();
        let deadline = Instant::now() + Duration::from_millis(300);
        Userspace { device: &device, path: path.to_owned(), deadline }
            .snapshot()
            .map(|now| now.peers)
    }

    #[test]
    fn answers_of_every_kind() {
        let (path, listener) = listen("moods");
        let answers = [
            ("errno=0\n\n", "no peers"),
            ("", "ends early"),
            ("errno=0\n", "ends early"),
            ("errno=-22\n\n", "refused the request: Invalid argument"),
            ("220 ESMTP\r\n\n", "does not speak WireGuard's protocol"),
        ];
        for (answer, expected) in answers {
            let result = thread::scope(|scope| {
                scope.spawn(|| {
                    let mut stream = listener.accept().unwrap().0;
                    let mut request = [0; 7];
                    stream.read_exact(&mut request).unwrap();
                    assert_eq!(&request, b"get=1\n\n");
                    stream.write_all(answer.as_bytes()).unwrap();
                });
                peers(&path)
            });
            let result = result.map_or_else(
                |error| error.to_string(),
                |peers| {
                    if peers.is_empty() { "no peers".to_owned() } else { "peers".to_owned() }
                },
            );
            assert!(result.contains(expected), "{answer:?}: {result}");
        }
        drop(listener);
        let stale = peers(&path);
        assert!(matches!(&stale, Err(Error::Socket(..))), "{stale:?}");
        assert!(stale.unwrap_err().to_string().contains("no process"));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn every_wait_ends() {
        let (path, listener) = listen("silent");
        // Accepted by the kernel, and never answered: at the end the backlog is full as well.
        for _ in 0..3 {
            assert!(peers(&path).unwrap_err().is_timeout());
        }
        let mut held = Vec::new();
        let device = "wg0".parse().unwrap();
        loop {
            let deadline = Instant::now() + Duration::from_millis(50);
            let userspace = Userspace { device: &device, path: path.clone(), deadline };
            match userspace.connect() {
                Ok(stream) => held.push(stream),
                Err(error) => break assert!(userspace.io_error(error).is_timeout()),
            }
        }
        assert!(peers(&path).unwrap_err().is_timeout());
        drop((held, listener));

        // A drip of lines does not move the deadline.
        std::fs::remove_file(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        let drip = thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            while stream.write_all(b"fwmark=1\n").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        assert!(peers(&path).unwrap_err().is_timeout());
        drip.join().unwrap();
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_peer_that_is_changed_is_not_lost_to_a_time_out() {
        let (path, listener) = listen("changed");
        let [own, key, secret] = ["01", "02", "03"].map(|byte| byte.repeat(32));
        let now = format!(
            "own_public_key={own}\npublic_key={key}\npreshared_key={secret}\n\
             allowed_ip=10.0.0.1/32\nerrno=0\n\n"
        );
        // The process answers the removal too late.
        let deadline = Instant::now() + Duration::from_secs(1);
        let done = "errno=0\n\n";
        let answers = [(&*now, false), (&*now, false), (done, true), (done, false)];
        let process = thread::spawn({
            let answers = answers.map(|(answer, is_late)| (answer.to_owned(), is_late));
            move || {
                answers.map(|(answer, is_late)| {
                    let mut stream = listener.accept().unwrap().0;
                    let mut request = String::new();
                    let mut lines = BufReader::new(&stream);
                    while !request.ends_with("\n\n") {
                        assert!(lines.read_line(&mut request).unwrap() > 0, "{request:?}");
                    }
                    if is_late {
                        let late = deadline + Duration::from_millis(100);
                        thread::sleep(late.saturating_duration_since(Instant::now()));
                    }
                    // Nobody may be there to read it.
                    let _ = stream.write_all(answer.as_bytes());
                    request
                })
            }
        });
        let device = "wg0".parse().unwrap();
        let userspace = Userspace { device: &device, path: path.clone(), deadline };
        let (peer, wanted) = (PublicKey::from([2; 32]), ["10.0.0.2/32".parse().unwrap()]);
        let change = [Change::Set(&peer, &wanted)];
        userspace.apply(&change, None, &AtomicUsize::new(0)).unwrap();
        let [_, _, removal, addition] = process.join().unwrap();
        assert!(removal.contains("remove=true"), "{removal}");
        for part in [key, secret, "allowed_ip=10.0.0.2/32".to_owned()] {
            assert!(addition.contains(&part) && !addition.contains("remove"), "{addition}");
        }
        // A change that has not begun at the deadline does not begin.
        assert!(userspace.apply(&change, None, &AtomicUsize::new(0)).unwrap_err().is_timeout());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_the_deadline_cuts_off_begins_with_a_peer() {
        let (path, listener) = listen("cut");
        let device = "wg0".parse().unwrap();
        let deadline = Instant::now() + Duration::from_millis(200);
        let userspace = Userspace { device: &device, path: path.clone(), deadline };
        let allowed_ips = (0..100).map(|n| format!("fd00::{n:x}/128").parse().unwrap());
        let allowed_ips: Vec<_> = allowed_ips.collect();
        let keys: Vec<_> = (0..200).map(|number| PublicKey::from([number; 32])).collect();
        let changes: Vec<_> = keys.iter().map(|key| Change::Set(key, &allowed_ips)).collect();
        let before = Snapshot { own_key: None, peers: Peers::default() };
        let error = userspace.apply(&changes, Some(&before), &AtomicUsize::new(0)).unwrap_err();
        assert!(error.is_timeout(), "{error}");
        // The process hung, and now reads what there is.
        let mut request = String::new();
        listener.accept().unwrap().0.read_to_string(&mut request).unwrap();
        assert!(!request.ends_with("\n\n"), "{} bytes fit into the socket", request.len());
        assert!(request.ends_with("\nallowed_ip=fd00::63/128\n"), "{}", request.len());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn pieces() {
        let peer = |allowed_ips| {
            format!("public_key=x\n{}", "allowed_ip=10.0.0.0/8\n".repeat(allowed_ips))
        };
        let (small, large) = (peer(1000), peer(3000));
        for (request, first) in [
            ("get=1\n\n".to_owned(), "get=1\n\n".len()),
            (format!("{small}{small}\n"), small.len()),
            (format!("set=1\n{large}\n"), "set=1\n".len()),
            (large, PIECE - (PIECE - "public_key=x\n".len()) % "allowed_ip=10.0.0.0/8\n".len()),
            ("x".repeat(PIECE + 1), PIECE),
        ] {
            assert_eq!(split_piece(request.as_bytes()).0.len(), first);
        }
    }

    #[test]
    fn sets() {
        assert!(same_set(&[2, 1, 1], &[1, 2]));
        assert!(!same_set(&[1], &[1, 2]));
        assert!(same_set::<u8>(&[], &[]));
    }
}
