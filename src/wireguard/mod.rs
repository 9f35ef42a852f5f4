//! WireGuard peers: one device, in the kernel or in user space, one operation at a time.

pub mod dump;
mod kernel;
pub mod sync;
mod types;
pub mod userspace;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use log::info;
use nix::errno::Errno;

use crate::agent::{Agent, Answer, Failure};
use crate::{lock, metrics};
use kernel::Kernel;
use sync::Change;
pub use sync::{Synced, WantedPeer};
pub use types::{AllowedIp, DeviceName, Peer, PublicKey};
use userspace::{Known, Userspace};

/// The one WireGuard device that the daemon manages.
pub struct WireGuard {
    device: Arc<Device>,
    agent: Arc<Agent<Arc<Vec<Peer>>>>,
}

struct Device {
    name: DeviceName,
    known: Known,
}

/// What a kernel device and a userspace device can both do, within a deadline.
trait Backend {
    /// The device as it is now.
    fn snapshot(&self) -> Result<Snapshot, Failure>;
    /// Adds the peer, or replaces its allowed IPs.
    fn add(&self, key: PublicKey, allowed_ips: &[AllowedIp]) -> Result<(), Failure>;
    /// Applies the changes in their order to a device that has these peers. A change that has begun
    /// before the deadline is finished, so that no peer is left with half of its allowed IPs.
    fn apply(&self, changes: &[Change], present: &[Peer], applied: Applied) -> Result<(), Failure>;
}

/// Told how many more changes are known to be applied.
type Applied<'a> = &'a mut dyn FnMut(usize);

/// A device at one moment.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Its own public key; wireguard-go does not tell.
    pub own_key: Option<PublicKey>,
    /// In its order.
    pub peers: Vec<Peer>,
}

impl WireGuard {
    /// The device of that name. Nothing is opened yet: it may come and go while the daemon runs.
    pub fn new(device: DeviceName) -> Self {
        let agent = Agent::new(format!("WireGuard device {device}"));
        Self { device: Arc::new(Device { name: device, known: Known::default() }), agent }
    }

    /// All peers. Callers who wait at the same time share one list.
    pub(crate) fn peers(&self, deadline: Instant) -> Result<Arc<Vec<Peer>>, Failure> {
        self.begin_list(deadline)?.wait(deadline)
    }

    /// The same, to be waited for later.
    pub(crate) fn begin_list(&self, deadline: Instant) -> Result<Answer<Arc<Vec<Peer>>>, Failure> {
        let device = Arc::clone(&self.device);
        let read = move |deadline| {
            let started = Instant::now();
            let peers = device.open(deadline)?.snapshot()?.peers;
            metrics::listed(&peers, started);
            Ok(Arc::new(peers))
        };
        self.agent.list(deadline, read)
    }

    /// Adds the peer, or replaces the allowed IPs of the one that exists and leaves its session,
    /// endpoint and counters alone. boringtun cannot change a peer: where the allowed IPs differ, it is
    /// removed and added, and its session and preshared key are lost. wireguard-go ignores a peer of
    /// its own key in silence; elsewhere that is [`Failure::Invalid`].
    pub(crate) fn add_peer(
        &self,
        key: PublicKey,
        allowed_ips: Vec<AllowedIp>,
        asked_by: &str,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let what = format!("adding peer {key}");
        self.change(deadline, asked_by, what, move |backend, _, _| backend.add(key, &allowed_ips))
    }

    /// Removes the peer and returns it with its final counters; `None` where there was none.
    pub(crate) fn remove_peer(
        &self,
        key: PublicKey,
        asked_by: &str,
        deadline: Instant,
    ) -> Result<Option<Peer>, Failure> {
        let what = format!("removing peer {key}");
        self.change(deadline, asked_by, what, move |backend, name, asked_by| {
            let present = backend.snapshot()?.peers;
            let Some(peer) = present.iter().find(|peer| peer.public_key == key) else {
                return Ok(None);
            };
            backend.apply(&[Change::Remove(key)], &present, &mut |_| ())?;
            metrics::removed(peer);
            if Instant::now() >= deadline {
                // Its counters are not to be lost with an answer that comes too late.
                info!("{}", removed(peer, name, asked_by));
            }
            Ok(Some(peer.clone()))
        })
    }

    /// Makes these the device's only peers, each with exactly these allowed IPs. Peers that are right
    /// already are not touched. With `dry_run`, nothing is changed.
    ///
    /// # Errors
    /// [`Failure::Invalid`] where the list contradicts itself or has the device's own key. What
    /// fails half-way says how far it has come, and leaves whole peers; the same call again does the
    /// rest.
    pub(crate) fn sync_peers(
        &self,
        mut wanted: Vec<WantedPeer>,
        dry_run: bool,
        asked_by: &str,
        deadline: Instant,
    ) -> Result<Synced, Failure> {
        sync::check(&mut wanted)?;
        // How many changes there are, and how many are applied.
        let progress = Arc::new(Mutex::new((0, 0)));
        let shared = Arc::clone(&progress);
        let what = format!("a sync of {} peers", wanted.len());
        let synced = self.change(deadline, asked_by, what, move |backend, name, asked_by| {
            let Snapshot { own_key, peers: present } = backend.snapshot()?;
            for peer in &wanted {
                refuse_own_key(name, own_key, &peer.public_key)?;
            }
            let (synced, changes) = sync::plan(&present, &wanted);
            if dry_run {
                return Ok(synced);
            }
            *lock(&shared) = (changes.len(), 0);
            backend.apply(&changes, &present, &mut |more| {
                let applied = lock(&shared).1;
                // Their counters are not to be lost with an answer that comes too late.
                for peer in synced.removed.iter().skip(applied).take(more) {
                    metrics::removed(peer);
                    info!("{}", removed(peer, name, asked_by));
                }
                lock(&shared).1 += more;
            })?;
            Ok(synced)
        });
        synced.map_err(|failure| {
            let (changes, applied) = *lock(&progress);
            let done = match changes {
                0 => "; nothing was changed".to_owned(),
                _ => format!(
                    "; {applied} of {changes} changes are known to be applied, \
                     the same call again does the rest"
                ),
            };
            failure.with(&done)
        })
    }

    /// Runs an operation that changes the device. It writes its own lines for the log: it may end when
    /// nobody waits for it any more.
    fn change<T: Send + 'static>(
        &self,
        deadline: Instant,
        asked_by: &str,
        what: String,
        operation: impl FnOnce(&dyn Backend, &DeviceName, &str) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (device, asked_by) = (Arc::clone(&self.device), asked_by.to_owned());
        let what = format!("{what} on {}, {asked_by}", device.name);
        let change = move |deadline| operation(&*device.open(deadline)?, &device.name, &asked_by);
        self.agent.change(deadline, what, change)?.wait(deadline)
    }
}

impl Device {
    /// The kernel's device of that name; where there is none, or none that may be used, the userspace
    /// one.
    fn open(&self, deadline: Instant) -> Result<Box<dyn Backend + '_>, Failure> {
        match dump::own_key(&self.name) {
            Ok(own_key) => Ok(Box::new(Kernel { device: &self.name, own_key, deadline })),
            Err(kernel @ (Errno::ENODEV | Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EPERM)) => {
                Ok(Box::new(Userspace {
                    device: &self.name,
                    path: format!("/var/run/wireguard/{}.sock", self.name).into(),
                    kernel,
                    known: &self.known,
                    deadline,
                }))
            }
            Err(errno) => Err(kernel::failure(&self.name, errno)),
        }
    }
}

fn removed(peer: &Peer, device: &DeviceName, asked_by: &str) -> String {
    let Peer { public_key: key, rx_bytes: rx, tx_bytes: tx, .. } = peer;
    format!("peer {key} on {device}: removed after {rx} bytes in, {tx} bytes out, {asked_by}")
}

fn refuse_own_key(
    device: &DeviceName,
    own_key: Option<PublicKey>,
    key: &PublicKey,
) -> Result<(), Failure> {
    if own_key != Some(*key) {
        return Ok(());
    }
    Err(Failure::Invalid(format!(
        "WireGuard device {device} cannot have the peer {key}: it is the device's own public key"
    )))
}

/// As a set: in order, each once.
fn sorted(allowed_ips: &[AllowedIp]) -> Vec<AllowedIp> {
    let mut sorted = allowed_ips.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_device_that_is_not_there() {
        let wireguard = WireGuard::new("no-such-device".parse().unwrap());
        let (key, soon) = (PublicKey::from([1; 32]), Instant::now() + Duration::from_secs(60));
        let wanted = |count| vec![WantedPeer { public_key: key, allowed_ips: vec![] }; count];
        let failures = [
            wireguard.peers(soon).map(drop),
            wireguard.add_peer(key, vec![], "a test", soon),
            wireguard.remove_peer(key, "a test", soon).map(drop),
            wireguard.sync_peers(wanted(1), true, "a test", soon).map(drop),
        ];
        for failure in failures.map(Result::unwrap_err) {
            assert!(matches!(failure, Failure::Failed(_)), "{failure}");
            assert!(failure.to_string().contains("no-such-device does not exist"), "{failure}");
        }
        // A list that contradicts itself does not come so far.
        let failure = wireguard.sync_peers(wanted(2), false, "a test", soon).unwrap_err();
        assert!(matches!(failure, Failure::Invalid(_)), "{failure}");
    }
}
