//! WireGuard peers: one device, in the kernel or in user space, one operation at a time.

mod dump;
mod error;
mod kernel;
mod netlink;
mod peers;
mod reply;
mod sync;
mod turns;
mod types;
mod uapi;
mod userspace;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

pub use error::{Error, SyncError};
use kernel::Kernel;
pub use peers::Peers;
use sync::Difference;
pub use sync::{Conflict, Synced, Wanted, WantedBuilder};
use turns::Turns;
pub use types::{AllowedIp, DeviceName, ParseError, Peer, PublicKey};
use userspace::Userspace;

/// An operation gives up this long before its caller does, so that the caller learns why.
const MARGIN: Duration = Duration::from_millis(50);

/// The one WireGuard device that the daemon manages.
pub struct WireGuard {
    device: DeviceName,
    turns: Arc<Turns>,
    caller: Option<String>,
}

/// What a kernel device and a userspace device can both do, within a deadline.
trait Backend {
    /// Name of the device.
    fn device(&self) -> &DeviceName;
    /// The device as it is now.
    fn snapshot(&self) -> Result<Snapshot, Error>;
    /// Applies the changes, removals first, and counts those that are known to be applied. `before`
    /// is the device as it is now, where the caller knows. A change that has begun before the
    /// deadline is finished, so that no peer is left with half of its allowed IPs.
    fn apply(
        &self,
        changes: &[Change],
        before: Option<&Snapshot>,
        applied: &AtomicUsize,
    ) -> Result<(), Error>;
}

/// A device at one moment.
struct Snapshot {
    /// Its own public key; wireguard-go does not tell.
    own_key: Option<PublicKey>,
    peers: Peers,
}

/// A change to a device.
#[derive(Clone, Copy)]
enum Change<'a> {
    /// The peer is there and has exactly these allowed IPs.
    Set(&'a PublicKey, &'a [AllowedIp]),
    /// The peer is not there.
    Remove(&'a PublicKey),
}

impl WireGuard {
    /// The device of that name. Nothing is opened yet: it may come and go while the daemon runs.
    pub fn new(device: DeviceName) -> Self {
        Self { device, turns: Arc::default(), caller: None }
    }

    /// The same device, for what `caller` asks: a change that ends too late to be answered is logged
    /// with that name.
    pub fn asked_by(&self, caller: &str) -> Self {
        let (device, turns) = (self.device.clone(), Arc::clone(&self.turns));
        Self { device, turns, caller: Some(caller.to_owned()) }
    }

    /// Name of the device.
    pub fn device(&self) -> &str {
        self.device.as_str()
    }

    /// All peers. Answers or fails by `deadline`.
    pub fn peers(&self, deadline: Instant) -> Result<Peers, Error> {
        self.run(
            deadline,
            |backend| Ok(backend.snapshot()?.peers),
            |_| "a list of peers".to_owned(),
        )
    }

    /// Adds the peer, or replaces the allowed IPs of the one that exists and leaves its session,
    /// endpoint and counters alone (on boringtun, which cannot change a peer, its session is lost
    /// where the allowed IPs differ).
    pub fn add_peer(
        &self,
        key: &PublicKey,
        allowed_ips: &[AllowedIp],
        deadline: Instant,
    ) -> Result<(), Error> {
        let (key, allowed_ips) = (*key, allowed_ips.to_vec());
        let operation = move |backend: &dyn Backend| {
            backend.apply(&[Change::Set(&key, &allowed_ips)], None, &AtomicUsize::new(0))
        };
        self.run(deadline, operation, move |()| format!("peer {key} was set"))
    }

    /// Removes the peer and returns it with its final counters; `None` where there was none.
    pub fn remove_peer(
        &self,
        key: &PublicKey,
        deadline: Instant,
    ) -> Result<Option<Peer<'static>>, Error> {
        let key = *key;
        let operation = move |backend: &dyn Backend| {
            let before = backend.snapshot()?;
            let Some(peer) = before.peers.iter().find(|peer| peer.public_key == key) else {
                return Ok(None);
            };
            backend.apply(&[Change::Remove(&key)], Some(&before), &AtomicUsize::new(0))?;
            Ok(Some(peer.into_owned()))
        };
        self.run(deadline, operation, move |removed| match removed {
            Some(Peer { rx_bytes: rx, tx_bytes: tx, .. }) => {
                format!("peer {key} was removed after {rx} bytes in, {tx} bytes out")
            }
            None => format!("peer {key} was not there"),
        })
    }

    /// Makes these the device's only peers, each with exactly these allowed IPs. Peers that are
    /// right already are not touched. With `dry_run`, nothing is changed.
    ///
    /// What fails half-way leaves whole peers; the same call again does the rest.
    pub fn sync_peers(
        &self,
        wanted: Wanted,
        dry_run: bool,
        deadline: Instant,
    ) -> Result<Synced, SyncError> {
        // How many changes there are, and how many are applied.
        let progress = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
        let shared = Arc::clone(&progress);
        let failed = move |cause, done| {
            let changes = progress.0.load(Ordering::Relaxed);
            SyncError { cause, changes, applied: progress.1.load(Ordering::Relaxed), done }
        };
        let operation = move |backend: &dyn Backend| {
            let before = backend.snapshot()?;
            if let Some(own_key) = before.own_key.filter(|key| wanted.contains(key)) {
                return Err(Error::OwnKey(backend.device().clone(), own_key));
            }
            let mut difference = Difference::new(&before.peers, &wanted);
            let mut failure = None;
            if !dry_run {
                let changes = difference.changes(&before.peers, &wanted);
                shared.0.store(changes.len(), Ordering::Relaxed);
                failure = backend.apply(&changes, Some(&before), &shared.1).err();
            }
            if failure.is_some() {
                difference.truncate(shared.1.load(Ordering::Relaxed));
            }
            Ok((failure, difference.into_synced(&before.peers, &wanted)))
        };
        let result = self.run(deadline, operation, move |(_, synced): (_, Synced)| {
            let (added, updated) = (synced.added.len(), synced.updated.len());
            let (removed, done) = (synced.removed.len(), if dry_run { "would be " } else { "" });
            format!("{done}{added} peers added, {updated} updated, {removed} removed")
        });
        match result {
            Ok((None, synced)) => Ok(synced),
            Ok((Some(cause), done)) => Err(failed(cause, Box::new(done))),
            Err(cause) => Err(failed(cause, Box::default())),
        }
    }

    /// Runs an operation on a thread of its own, which keeps the turn until it ends: the kernel may
    /// hang in a way that no time-out reaches. That costs one thread; those who come later time out
    /// waiting for the turn. What ends after its caller has given up is logged as `late` says it.
    fn run<T: Send + 'static>(
        &self,
        deadline: Instant,
        operation: impl Fn(&dyn Backend) -> Result<T, Error> + Send + 'static,
        late: impl FnOnce(T) -> String + Send + 'static,
    ) -> Result<T, Error> {
        let timeout = || Error::Timeout(self.device.clone());
        let turn = self.turns.take(deadline).ok_or_else(timeout)?;
        let (sender, receiver) = mpsc::sync_channel(1);
        let (device, caller) = (self.device.clone(), self.caller.clone());
        let thread = thread::Builder::new().name("wireguard".to_owned()).spawn(move || {
            let until = deadline.checked_sub(MARGIN).unwrap_or(deadline);
            // Nothing below is known to panic; if something does, it is this operation that fails.
            let result = catch_unwind(AssertUnwindSafe(|| choose(&device, until, operation)))
                .unwrap_or_else(|_| {
                    Err(Error::Internal(device.clone(), "the operation panicked".to_owned()))
                });
            drop(turn);
            if let Err(mpsc::SendError(result)) = sender.send(result) {
                let outcome = result.map_or_else(|error| error.to_string(), late);
                let asked_by =
                    caller.map_or_else(String::new, |caller| format!(", asked by {caller}"));
                log::warn!(
                    "WireGuard device {device} answered after its time-out: {outcome}{asked_by}"
                );
            }
        });
        thread.map_err(|error| {
            Error::Internal(self.device.clone(), format!("cannot start a thread: {error}"))
        })?;
        let left = deadline.saturating_duration_since(Instant::now());
        let result = receiver.recv_timeout(left);
        // What came with the end of the time is not to be lost: nobody would log it.
        result.or_else(|_| receiver.try_recv()).unwrap_or_else(|_| Err(timeout()))
    }
}

/// Runs the operation on the kernel's device of that name; where there is none, or none that may
/// be used, on the userspace one.
fn choose<T>(
    device: &DeviceName,
    deadline: Instant,
    operation: impl Fn(&dyn Backend) -> Result<T, Error>,
) -> Result<T, Error> {
    use Errno::{ENODEV, ENOENT, EOPNOTSUPP, EPERM};
    let errno = match operation(&Kernel { device, deadline }) {
        Err(Error::Kernel(_, errno @ (ENODEV | ENOENT | EOPNOTSUPP | EPERM))) => errno,
        result => return result,
    };
    match operation(&Userspace::new(device, deadline)) {
        Err(Error::Socket(path, error)) => {
            Err(neither(device, errno, error.kind()).unwrap_or(Error::Socket(path, error)))
        }
        result => result,
    }
}

/// What it means that the kernel refused with `errno` and the socket could not be used either;
/// `None` where the socket's own error says it best. A userspace device, too, has a network
/// interface of its name.
fn neither(device: &DeviceName, errno: Errno, socket: io::ErrorKind) -> Option<Error> {
    let hidden = socket == io::ErrorKind::PermissionDenied;
    if socket != io::ErrorKind::NotFound && !hidden {
        return None;
    }
    let device = device.clone();
    if errno == Errno::ENODEV || if_nametoindex(device.as_str()).is_err() {
        return Some(Error::NoDevice(device));
    }
    match errno {
        Errno::EPERM => Some(Error::NoPermission(device)),
        _ if hidden => None,
        _ => Some(Error::NotWireGuard(device)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn done((): ()) -> String {
        "it is done".to_owned()
    }

    /// Keeps what the tests log.
    static LOG: Log = Log(Mutex::new(String::new()));

    struct Log(Mutex<String>);

    impl log::Log for Log {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            *self.0.lock().unwrap() += &format!("{}\n", record.args());
        }
        fn flush(&self) {}
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(200)
    }

    #[test]
    fn neither_backend() {
        use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
        let sentence = |device: &str, errno, socket| {
            let error = neither(&device.parse().unwrap(), errno, socket);
            error.map_or_else(|| "that of the socket".to_owned(), |error| error.to_string())
        };
        for (device, errno, socket, expected) in [
            ("no-such-device", Errno::ENODEV, NotFound, "does not exist"),
            ("no-such-device", Errno::ENOENT, NotFound, "does not exist"),
            ("no-such-device", Errno::EPERM, NotFound, "does not exist"),
            ("no-such-device", Errno::EPERM, PermissionDenied, "does not exist"),
            ("lo", Errno::ENODEV, NotFound, "does not exist"),
            ("lo", Errno::ENOENT, NotFound, "not a WireGuard device"),
            ("lo", Errno::EOPNOTSUPP, NotFound, "not a WireGuard device"),
            ("lo", Errno::EPERM, NotFound, "CAP_NET_ADMIN"),
            ("lo", Errno::EPERM, PermissionDenied, "CAP_NET_ADMIN"),
            ("lo", Errno::EOPNOTSUPP, PermissionDenied, "that of the socket"),
            ("lo", Errno::EPERM, ConnectionRefused, "that of the socket"),
        ] {
            let sentence = sentence(device, errno, socket);
            assert!(sentence.contains(expected), "{device} {errno} {socket}: {sentence}");
        }
    }

    #[test]
    fn a_device_that_is_not_there() {
        let wireguard = WireGuard::new("no-such-device".parse().unwrap());
        let key = PublicKey::from([1; 32]);
        let errors = [
            wireguard.peers(soon()).unwrap_err(),
            wireguard.add_peer(&key, &[], soon()).unwrap_err(),
            wireguard.remove_peer(&key, soon()).unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, Error::NoDevice(_)), "{error}");
        }
    }

    #[test]
    fn panics_and_hangs_stay_inside() {
        log::set_logger(&LOG).unwrap();
        log::set_max_level(log::LevelFilter::Warn);
        let wireguard = WireGuard::new("wg0".parse().unwrap());
        let far = Instant::now() + Duration::from_secs(60);
        let result: Result<(), _> = wireguard.run(far, |_| panic!("as a bug does"), done);
        assert!(matches!(result, Err(Error::Internal(..))));

        // An operation hangs: it and those after it time out, until it comes back.
        let (release, hang) = mpsc::channel::<()>();
        let hang = Mutex::new(hang);
        let hung = wireguard.asked_by("192.0.2.1:5").run(
            soon(),
            move |_| {
                let _ = hang.lock().unwrap().recv();
                Ok(())
            },
            done,
        );
        assert!(hung.unwrap_err().is_timeout());
        assert!(wireguard.run(soon(), |_| Ok(()), done).unwrap_err().is_timeout());
        drop(release);
        assert!(wireguard.run(far, |_| Ok(()), done).is_ok());
        let late =
            "WireGuard device wg0 answered after its time-out: it is done, asked by 192.0.2.1:5";
        while !LOG.0.lock().unwrap().contains(late) {
            assert!(Instant::now() < far, "{}", LOG.0.lock().unwrap());
            thread::sleep(Duration::from_millis(5));
        }
    }
}
