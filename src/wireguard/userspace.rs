//! A WireGuard device in user space (wireguard-go, boringtun), over its Unix socket.
//!
//! The text protocol is that of <https://www.wireguard.com/xplatform/>. The crate prints the requests
//! and parses the answers; the socket, its deadline and what the crate cannot take are ours.

use std::collections::HashSet;
use std::fmt::Display;
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use wireguard_uapi::get;
use wireguard_uapi::xplatform::parser::{ParseGetResponseError, parse};
use wireguard_uapi::xplatform::set;

use super::sync::{batches, plan};
use super::{
    AllowedIp, Applied, Backend, Change, DeviceName, Peer, PublicKey, Snapshot, WantedPeer,
};
use crate::agent::Failure;
use crate::lock;
use crate::unix::Stream;

/// The bytes of a request that are written at a time: the kernel takes so many whole or not at all
/// (`unix_stream_sendmsg`).
const PIECE: usize = 32 * 1024;

/// The allowed IPs and peers in one request: so many that it is one piece. An allowed IP takes at most
/// 57 bytes, a peer without any 102.
const REQUEST_ITEMS: usize = 250;

/// What may be taken past the deadline to finish what has begun.
const OVERTIME: Duration = Duration::from_millis(500);

/// The longest answer that is read. A peer takes some 400 bytes.
const REPLY_LIMIT: u64 = 64 << 20;

/// The process behind the device's socket, until the deadline.
pub(super) struct Userspace<'a> {
    pub(super) device: &'a DeviceName,
    /// Where it listens.
    pub(super) path: PathBuf,
    /// The error with which the kernel refused the device, so that this one is tried.
    pub(super) kernel: Errno,
    pub(super) known: &'a Known,
    pub(super) deadline: Instant,
}

/// Inode and change time of the socket's file, since another process makes another file; and whether the
/// process behind it can change a peer that exists.
pub(super) type Known = Mutex<Option<((u64, i64, i64), bool)>>;

impl Backend for Userspace<'_> {
    fn snapshot(&self) -> Result<Snapshot, Failure> {
        let stream = self.send("get=1\n\n", self.deadline)?;
        parse_device(stream, SystemTime::now()).map_err(|error| self.parse_failure(error))
    }

    fn add(&self, key: PublicKey, allowed_ips: &[AllowedIp]) -> Result<(), Failure> {
        if self.changes_peers()? {
            return self.change(Vec::new(), vec![addition(key, allowed_ips)]);
        }
        let Snapshot { own_key, mut peers } = self.snapshot()?;
        super::refuse_own_key(self.device, own_key, &key)?;
        peers.retain(|peer| peer.public_key == key);
        let wanted = [WantedPeer { public_key: key, allowed_ips: super::sorted(allowed_ips) }];
        self.apply(&plan(&peers, &wanted).1, &peers, &mut |_| ())
    }

    fn apply(&self, changes: &[Change], present: &[Peer], applied: Applied) -> Result<(), Failure> {
        // boringtun panics when a peer that exists is changed: those are removed and added.
        let replaced: HashSet<_> = match changes.is_empty() || self.changes_peers()? {
            true => HashSet::new(),
            false => present.iter().map(|peer| peer.public_key).collect(),
        };
        for batch in batches(changes, REQUEST_ITEMS) {
            let (mut removed, mut added) = (Vec::new(), Vec::new());
            for change in batch {
                match *change {
                    Change::Remove(key) => removed.push(removal(key)),
                    Change::Set(key, allowed_ips) => {
                        removed.extend(replaced.contains(&key).then(|| removal(key)));
                        added.push(addition(key, allowed_ips));
                    }
                }
            }
            self.change(removed, added)?;
            applied(batch.len());
        }
        Ok(())
    }
}

fn removal(key: PublicKey) -> set::Peer {
    set::Peer::from_public_key(key.0).remove(true)
}

fn addition(key: PublicKey, allowed_ips: &[AllowedIp]) -> set::Peer {
    let allowed_ips = allowed_ips
        .iter()
        .map(|ip| set::AllowedIp { ipaddr: ip.address, cidr_mask: ip.prefix_len });
    set::Peer::from_public_key(key.0).replace_allowed_ips(true).allowed_ips(allowed_ips.collect())
}

impl Userspace<'_> {
    /// Removes and adds in two requests, since boringtun applies what one peer of a request has,
    /// `remove` among it, to all that follow. It answers one after the other, so that once the removal
    /// is on its way the addition follows, be it past the deadline: no time-out loses a peer.
    fn change(&self, removed: Vec<set::Peer>, added: Vec<set::Peer>) -> Result<(), Failure> {
        let (mut result, mut deadline) = (Ok(()), self.deadline);
        for peers in [removed, added].into_iter().filter(|peers| !peers.is_empty()) {
            let request = set::Device { peers, ..set::Device::default() };
            let stream = self.send(&format!("set=1\n{request}\n"), deadline)?;
            result = parse_lines(stream).map(drop).map_err(|error| self.parse_failure(error));
            if !matches!(result, Ok(()) | Err(Failure::Timeout(_))) {
                break;
            }
            deadline = self.deadline + OVERTIME;
        }
        result
    }

    /// Whether the process can change a peer that exists: wireguard-go can, boringtun cannot. It is
    /// asked once, since wireguard-go makes its whole list before the first byte is sent.
    fn changes_peers(&self) -> Result<bool, Failure> {
        let file = fs::metadata(&self.path).map_err(|error| self.io_failure(&error))?;
        let socket = (file.ino(), file.ctime(), file.ctime_nsec());
        if let Some((known, changes)) = *lock(self.known)
            && known == socket
        {
            return Ok(changes);
        }
        let mut start = [0; 4];
        let read = self.send("get=1\n\n", self.deadline)?.read_exact(&mut start);
        read.map_err(|error| self.io_failure(&error))?;
        // Each begins with the device's key: `private_key=` as the protocol wants it, boringtun with
        // `own_public_key=`. A device without a key, which has no use for peers, does not say who it is.
        let changes = &start != b"own_";
        if !changes || &start == b"priv" {
            *lock(self.known) = Some((socket, changes));
        }
        Ok(changes)
    }

    /// Connects and sends a request; gives what the answer is read from. wireguard-go applies what it
    /// has got of a request that is cut off, and of `allowed_ip=10.0.0.1/32` that may have been
    /// `allowed_ip=10.0.0.1/3`: a request is one piece. One peer's allowed IPs may take more; those
    /// pieces end with a line, and once the first is written they have time to follow.
    fn send(&self, request: &str, deadline: Instant) -> Result<Stream, Failure> {
        let mut rest = request.as_bytes();
        let sent = Stream::connect(&self.path, deadline).and_then(|mut stream| {
            while !rest.is_empty() {
                let most = rest.get(..PIECE).unwrap_or(rest);
                let line = most.iter().rposition(|byte| *byte == b'\n');
                let (piece, behind) = rest.split_at(line.map_or(most.len(), |end| end + 1));
                stream.write_all(piece)?;
                rest = behind;
                stream.deadline = deadline + OVERTIME;
            }
            stream.deadline = deadline;
            Ok(stream)
        });
        sent.map_err(|error| self.io_failure(&error))
    }

    fn io_failure(&self, error: &io::Error) -> Failure {
        use ErrorKind::{ConnectionRefused, NotFound, PermissionDenied, TimedOut};
        let Self { device, path, .. } = self;
        let path = path.display();
        // A userspace device, too, has a network interface of its name.
        let exists = self.kernel != Errno::ENODEV && if_nametoindex(device.0.as_str()).is_ok();
        let sentence = match (error.kind(), self.kernel) {
            (TimedOut, _) => {
                return Failure::Timeout(format!(
                    "WireGuard socket {path} did not answer in time: try again"
                ));
            }
            (NotFound | PermissionDenied, _) if !exists => format!(
                "WireGuard device {device} does not exist: create it (`ip link add {device} type wireguard`, \
                 wg-quick, wireguard-go or boringtun) or name another one with -wg-device"
            ),
            (NotFound | PermissionDenied, Errno::EPERM) => format!(
                "WireGuard device {device} may not be managed by this process: give it the capability CAP_NET_ADMIN"
            ),
            (NotFound, _) => format!(
                "network interface {device} is not a WireGuard device, and {path} does not exist: \
                 name a WireGuard device with -wg-device"
            ),
            (PermissionDenied, _) => format!(
                "WireGuard socket {path} may not be used by this process: \
                 give its user access to the socket and its directory"
            ),
            (ConnectionRefused, _) => format!(
                "WireGuard socket {path} has no process behind it: start the device's process, or remove the file"
            ),
            _ => format!("WireGuard socket {path} failed ({error})"),
        };
        Failure::Failed(sentence)
    }

    fn parse_failure(&self, error: ParseGetResponseError) -> Failure {
        use ParseGetResponseError::{ReadLineIoError, ServerError};
        let nonsense = |why: &dyn Display| format!("does not speak WireGuard's protocol ({why})");
        let what = match &error {
            ReadLineIoError(error) if error.kind() == ErrorKind::InvalidData => nonsense(error),
            ReadLineIoError(error) => return self.io_failure(error),
            ServerError(errno) => {
                let errno = Errno::from_raw(errno.parse().map_or(0, i32::saturating_abs));
                format!("refused the request ({})", errno.desc())
            }
            error => nonsense(error),
        };
        Failure::Failed(format!("WireGuard socket {} {what}", self.path.display()))
    }
}

/// Parses the answer to `get=1`. boringtun alone tells its own public key, and how long ago a
/// handshake was where the protocol wants its time.
pub fn parse_device(stream: impl Read, now: SystemTime) -> Result<Snapshot, ParseGetResponseError> {
    let device = parse_lines(stream)?;
    let own_key = device.private_key.map(PublicKey::from);
    let time = |time: Duration| match own_key {
        _ if time.is_zero() => None,
        Some(_) => now.checked_sub(time),
        None => SystemTime::UNIX_EPOCH.checked_add(time),
    };
    let peer = |peer: get::Peer| {
        let allowed_ips = peer.allowed_ips.iter().map(|ip| AllowedIp::new(ip.ipaddr, ip.cidr_mask));
        Some(Peer {
            public_key: peer.public_key.into(),
            allowed_ips: allowed_ips.collect::<Option<_>>()?,
            last_handshake: time(peer.last_handshake_time),
            rx_bytes: peer.rx_bytes,
            tx_bytes: peer.tx_bytes,
        })
    };
    let peers = device.peers.into_iter().map(peer).collect::<Option<_>>().ok_or_else(|| {
        ParseGetResponseError::ReadLineIoError(malformed("it has an impossible allowed IP"))
    })?;
    Ok(Snapshot { own_key, peers })
}

/// Hands an answer to the crate's parser, as it can take it: only the keys that are needed (it refuses
/// unknown ones, and secrets stay outside), after a `listen_port` (it panics without), with the
/// handshake times reset at each peer (it keeps those of the peer before), up to the empty line at the
/// end. The device's own public key, which is boringtun's first line, takes the place of the private one.
fn parse_lines(stream: impl Read) -> Result<get::Device, ParseGetResponseError> {
    let mut lines = BufReader::new(stream.take(REPLY_LIMIT)).lines().peekable();
    let mut inserted = vec!["listen_port=0".to_owned()];
    let is_own = |line: &String| line.starts_with("own_public_key=");
    if let Some(Ok(line)) = lines.next_if(|line| line.as_ref().is_ok_and(is_own)) {
        inserted.push(line.replacen("own_public", "private", 1));
    }
    let mut has_status = false;
    parse(std::iter::from_fn(|| {
        if let Some(line) = inserted.pop() {
            return Some(Ok(line));
        }
        loop {
            let next = lines.next().unwrap_or_else(|| Err(malformed("its answer ends early")));
            let Ok(line) = next else { return Some(next) };
            match line.split_once('=') {
                Some(("public_key", _)) => {
                    let zeros = ["last_handshake_time_sec=0", "last_handshake_time_nsec=0"];
                    inserted.extend(zeros.map(str::to_owned));
                }
                Some(("errno", _)) => has_status = true,
                // With nanoseconds it may be more than a `Duration` holds, and the crate panics.
                Some(("last_handshake_time_sec", time)) if time.len() > 18 => {
                    return Some(Err(malformed("it has an impossible time")));
                }
                Some(("last_handshake_time_sec" | "last_handshake_time_nsec", _)) => {}
                // Here the crate refuses the device's own key.
                Some(("own_public_key" | "allowed_ip" | "rx_bytes" | "tx_bytes", _)) => {}
                Some(_) => continue,
                None if !has_status => return Some(Err(malformed("its answer has no errno"))),
                None => {}
            }
            return Some(Ok(line));
        }
    }))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{setsockopt, sockopt};
    use nix::sys::time::{TimeVal, TimeValLike};
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread::{self, JoinHandle};

    const KEYS: [&str; 3] = [
        "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33",
        "58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376",
        "662E14FD594556F522604703340351258903B64F35553763F19426AB2A515C58",
    ];
    const NOW: u64 = 1_700_000_000;

    fn parse_text(text: &str) -> Result<Snapshot, ParseGetResponseError> {
        parse_device(text.as_bytes(), SystemTime::UNIX_EPOCH + Duration::from_secs(NOW))
    }

    fn seconds(peer: &Peer) -> Option<u64> {
        Some(peer.last_handshake?.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs())
    }

    #[test]
    fn what_wireguard_go_tells() {
        let ([first, second, third], zeros) = (KEYS, "0".repeat(64));
        let device = parse_text(&format!(
            "private_key={zeros}\nlisten_port=12912\nfwmark=1\n\
             public_key={first}\npreshared_key={zeros}\nprotocol_version=1\n\
             endpoint=[fe80::1%eth0]:51820\nlast_handshake_time_sec=1600000000\n\
             last_handshake_time_nsec=5\ntx_bytes=38333\nrx_bytes=2224\n\
             persistent_keepalive_interval=111\nallowed_ip=192.168.4.4/32\nallowed_ip=fd00::/64\n\
             public_key={second}\nprotocol_version=1\nlast_handshake_time_sec=0\n\
             last_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=18446744073709551615\n\
             public_key={third}\nnews_of_the_day=none\n\
             errno=0\n\npublic_key=what comes after the end"
        ))
        .unwrap();
        assert_eq!(device.own_key, None);
        assert!(device.peers.iter().map(seconds).eq([Some(1_600_000_000), None, None]));
        let [one, two, three] = &device.peers[..] else { panic!("three peers") };
        assert_eq!((one.public_key.0[0], one.rx_bytes, one.tx_bytes), (0xb8, 2224, 38333));
        let ips: Vec<_> = one.allowed_ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["192.168.4.4/32", "fd00::/64"]);
        assert_eq!((two.rx_bytes, two.allowed_ips.len()), (u64::MAX, 0));
        assert_eq!(three.public_key.0[31], 0x58);
    }

    #[test]
    fn what_boringtun_tells() {
        // It leaves out what is zero, and tells the age of a handshake in place of its time.
        let [own, first, second] = KEYS;
        let device = parse_text(&format!(
            "own_public_key={own}\nlisten_port=5\npublic_key={first}\nendpoint=10.0.0.1:5\n\
             allowed_ip=10.0.0.0/8\nlast_handshake_time_sec=100\nlast_handshake_time_nsec=1\n\
             rx_bytes=1\ntx_bytes=2\npublic_key={second}\nrx_bytes=0\ntx_bytes=0\nerrno=0\n\n"
        ))
        .unwrap();
        assert_eq!(device.own_key.unwrap().0[0], 0xb8);
        assert!(device.peers.iter().map(seconds).eq([Some(NOW - 101), None]));
        let alone = parse_text(&format!("own_public_key={own}\nerrno=0\n\n")).unwrap();
        assert_eq!((alone.own_key.is_some(), alone.peers.len()), (true, 0));
        for nothing in ["errno=0\n\n", "listen_port=1\nerrno=0\n\n"] {
            assert_eq!(parse_text(nothing).unwrap(), Snapshot::default());
        }
    }

    #[test]
    fn malformed_answers() {
        let key = KEYS[0];
        for text in [
            "",
            "\n",
            "errno=0",
            "errno=0\n",
            "errno\n\n",
            "errno=0\nnonsense\n\n",
            "errno=1\n\n",
            "errno=-22\n\n",
            "errno=zero\n\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "allowed_ip=10.0.0.0/8\nerrno=0\n\n",
            "rx_bytes=1\nerrno=0\n\n",
            "public_key=\nerrno=0\n\n",
            "public_key\nerrno=0\n\n",
            "public_key=b8\nerrno=0\n\n",
            "own_public_key=b8\nerrno=0\n\n",
            &format!("public_key={key}\n\n"),
            &format!("public_key={key}\nerrno=5\n\n"),
            &format!("public_key={key}\nerrno=0\n"),
            &format!("public_key={key}\nallowed_ip=10.0.0.0\nerrno=0\n\n"),
            &format!("public_key={key}\nallowed_ip=10.0.0.0/33\nerrno=0\n\n"),
            &format!("public_key={key}\nrx_bytes=-1\nerrno=0\n\n"),
            &format!("public_key={key}\nrx_bytes=18446744073709551616\nerrno=0\n\n"),
            &format!("public_key={key}\nlast_handshake_time_nsec=4294967296\nerrno=0\n\n"),
            // More than a `Duration` holds.
            &format!(
                "public_key={key}\nlast_handshake_time_sec=18446744073709551615\n\
                 last_handshake_time_nsec=1000000000\nerrno=0\n\n"
            ),
            // The first peer is not the device itself, and what is a peer's is not the device's.
            &format!("public_key={key}\nown_public_key={key}\nerrno=0\n\n"),
            &format!("own_public_key={key}\nown_public_key={key}\nerrno=0\n\n"),
            &format!("own_public_key={key}\nallowed_ip=10.0.0.0/8\nerrno=0\n\n"),
        ] {
            assert!(parse_text(text).is_err(), "{text:?}");
        }
        assert!(parse_device(&b"\xff\xfe\nerrno=0\n\n"[..], SystemTime::now()).is_err());
        assert!(parse_device(io::repeat(b'\n'), SystemTime::now()).is_err());
        assert!(parse_device(io::repeat(b'x'), SystemTime::now()).is_err());
    }

    /// A process that reads a request, and then gives the next of these answers after a wait; its
    /// requests in the end.
    struct Process {
        path: PathBuf,
        device: DeviceName,
        known: Known,
        listener: UnixListener,
    }

    impl Process {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("wg-{}-{name}.sock", std::process::id()));
            let listener = Self::bind(&path);
            Self { path, device: "wg0".parse().unwrap(), known: Known::default(), listener }
        }

        /// Does not wait for ever for a request that does not come.
        fn bind(path: &Path) -> UnixListener {
            let listener = UnixListener::bind(path).unwrap();
            setsockopt(&listener, sockopt::ReceiveTimeout, &TimeVal::seconds(20)).unwrap();
            listener
        }

        fn answers(&self, answers: Vec<(String, Duration)>) -> JoinHandle<Vec<String>> {
            let listener = self.listener.try_clone().unwrap();
            thread::spawn(move || {
                let answer = |(answer, wait): (String, Duration)| {
                    let mut stream = listener.accept().unwrap().0;
                    let mut request = String::new();
                    let mut lines = BufReader::new(&stream);
                    while !request.ends_with("\n\n") {
                        assert!(lines.read_line(&mut request).unwrap() > 0, "{request:?}");
                    }
                    thread::sleep(wait);
                    // Nobody may be there to read it.
                    let _ = stream.write_all(answer.as_bytes());
                    request
                };
                answers.into_iter().map(answer).collect()
            })
        }

        fn until(&self, deadline: Instant) -> Userspace<'_> {
            let Self { path, device, known, .. } = self;
            Userspace { device, path: path.clone(), kernel: Errno::EOPNOTSUPP, known, deadline }
        }

        /// For so many milliseconds.
        fn within(&self, time: u64) -> Userspace<'_> {
            self.until(Instant::now() + Duration::from_millis(time))
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            fs::remove_file(&self.path).unwrap();
        }
    }

    fn at_once(answers: &[&str]) -> Vec<(String, Duration)> {
        answers.iter().map(|answer| ((*answer).to_owned(), Duration::ZERO)).collect()
    }

    #[test]
    fn failures_name_the_socket() {
        let process = Process::new("moods");
        for (answer, part) in [
            ("", "ends early"),
            ("errno=0\n", "ends early"),
            ("errno=-22\n\n", "refused the request (Invalid argument)"),
            ("220 ESMTP\r\n\n", "does not speak WireGuard's protocol"),
        ] {
            let asked = process.answers(at_once(&[answer]));
            let failure = process.within(60_000).snapshot().unwrap_err();
            assert_eq!(asked.join().unwrap(), ["get=1\n\n"]);
            assert!(failure.to_string().contains(part), "{answer:?}: {failure}");
            assert!(failure.to_string().contains(process.path.to_str().unwrap()), "{failure}");
        }
        assert!(matches!(process.within(50).snapshot(), Err(Failure::Timeout(_))));
        for (device, kernel, kind, part) in [
            ("nobody", Errno::ENODEV, ErrorKind::NotFound, "does not exist: create it"),
            ("nobody", Errno::EPERM, ErrorKind::PermissionDenied, "does not exist: create it"),
            ("lo", Errno::ENODEV, ErrorKind::NotFound, "does not exist: create it"),
            ("lo", Errno::EOPNOTSUPP, ErrorKind::NotFound, "lo is not a WireGuard device"),
            ("lo", Errno::ENOENT, ErrorKind::NotFound, "lo is not a WireGuard device"),
            ("lo", Errno::EPERM, ErrorKind::NotFound, "CAP_NET_ADMIN"),
            ("lo", Errno::EPERM, ErrorKind::PermissionDenied, "CAP_NET_ADMIN"),
            ("lo", Errno::ENOENT, ErrorKind::PermissionDenied, "access to the socket"),
            ("lo", Errno::EPERM, ErrorKind::ConnectionRefused, "no process behind it"),
        ] {
            let device = device.parse().unwrap();
            let userspace = Userspace { device: &device, kernel, ..process.within(0) };
            let failure = userspace.io_failure(&kind.into());
            assert!(failure.to_string().contains(part), "{device} {kernel} {kind}: {failure}");
        }
    }

    #[test]
    fn an_implementation_is_found_out_once_and_anew_for_another_process() {
        let (key, ips) = (PublicKey::from([2; 32]), ["10.0.0.2/32".parse().unwrap()]);
        let mut process = Process::new("known");
        let ok = "errno=0\n\n";
        let asked = process.answers(at_once(&["private_key=01", ok, ok]));
        process.within(60_000).add(key, &ips).unwrap();
        process.within(60_000).add(key, &ips).unwrap();
        let addition = format!(
            "set=1\npublic_key={}\nreplace_allowed_ips=true\nallowed_ip=10.0.0.2/32\n\n",
            "02".repeat(32)
        );
        assert_eq!(asked.join().unwrap(), ["get=1\n\n", &addition, &addition]);

        // boringtun at the same place: what is there already is left alone, what differs is replaced.
        fs::remove_file(&process.path).unwrap();
        process.listener = Process::bind(&process.path);
        let [own, key_text] = ["01", "02"].map(|byte| byte.repeat(32));
        let list =
            |ip| format!("own_public_key={own}\npublic_key={key_text}\nallowed_ip={ip}/32\n{ok}");
        let answers = [list("10.0.0.1"), list("10.0.0.2"), list("10.0.0.1"), ok.into(), ok.into()];
        let asked = process.answers(at_once(&answers.each_ref().map(String::as_str)));
        process.within(60_000).add(key, &ips).unwrap();
        process.within(60_000).add(key, &ips).unwrap();
        let removal = format!("set=1\npublic_key={key_text}\nremove=true\n\n");
        let get = "get=1\n\n";
        assert_eq!(asked.join().unwrap(), [get, get, get, &removal, &addition]);
    }

    #[test]
    fn a_peer_that_is_replaced_is_not_lost_to_a_time_out() {
        let process = Process::new("late");
        let peer = Peer {
            public_key: [2; 32].into(),
            allowed_ips: vec![],
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        let ips = ["10.0.0.2/32".parse().unwrap()];
        let change = [Change::Set(peer.public_key, &ips)];
        // The process answers the removal too late.
        let ok = || "errno=0\n\n".to_owned();
        let start = ("own_public_key=01".to_owned(), Duration::ZERO);
        let late = Duration::from_millis(600);
        let asked = process.answers(vec![start, (ok(), late), (ok(), Duration::ZERO)]);
        let mut applied = 0;
        let userspace = process.within(400);
        userspace.apply(&change, &[peer], &mut |done| applied = done).unwrap();
        let [_, removal, addition] = &asked.join().unwrap()[..] else { panic!("three requests") };
        assert!(removal.contains("remove=true"), "{removal}");
        assert!(addition.contains("allowed_ip=10.0.0.2/32") && !addition.contains("remove"));
        assert_eq!(applied, 1);
        // A change that has not begun at the deadline does not begin.
        assert!(matches!(userspace.apply(&change, &[], &mut |_| ()), Err(Failure::Timeout(_))));
    }

    /// What a process that hangs finds in its socket when it goes on: whole requests, or whole lines of
    /// one peer that is larger than the socket.
    #[test]
    fn a_request_is_written_whole_or_not_begun() {
        let process = Process::new("whole");
        let ips: Vec<AllowedIp> =
            (0..20_000).map(|n| format!("fd00::{n:x}/128").parse().unwrap()).collect();
        let changes: Vec<_> =
            (0..200).map(|number| Change::Set([number; 32].into(), &ips[..1])).collect();
        *lock(&process.known) = {
            let file = fs::metadata(&process.path).unwrap();
            Some(((file.ino(), file.ctime(), file.ctime_nsec()), true))
        };
        for (changes, peers) in [
            (&changes[..], REQUEST_ITEMS / 2),
            (&[Change::Set([7; 32].into(), &ips[..3000])], 1),
            (&[Change::Set([7; 32].into(), &ips)], 1),
        ] {
            let failure = process.within(100).apply(changes, &[], &mut |_| panic!("applied"));
            assert!(matches!(failure, Err(Failure::Timeout(_))));
            let mut request = String::new();
            process.listener.accept().unwrap().0.read_to_string(&mut request).unwrap();
            assert_eq!(request.matches("public_key").count(), peers);
            assert!(request.len() <= PIECE || peers == 1, "{} bytes", request.len());
            let is_whole = request.ends_with("/128\n\n");
            assert!(is_whole || peers == 1 && request.ends_with("/128\n"), "{}", request.len());
            assert!(is_whole || changes[0] == Change::Set([7; 32].into(), &ips));
        }
    }
}
