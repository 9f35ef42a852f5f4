//! The kernel's WireGuard device, over generic netlink.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use wireguard_uapi::WgSocket;
use wireguard_uapi::err::{ConnectError, NlError, SetDeviceError};
use wireguard_uapi::linux::set;

use super::{Backend, Change, DeviceName, Error, Snapshot, dump};

/// How often a disturbed dump is started again.
const TRIES: u32 = 50;

/// The allowed IPs and peers in one message: so many that the message stays below 32 KiB, since
/// the kernel's refusal repeats it and the crate reads no more than that. An allowed IP takes at
/// most 40 bytes, a peer without any 56.
const MESSAGE_ITEMS: usize = 500;

/// The removals in one message. For each the kernel waits until no CPU uses the peer any more, up to
/// some milliseconds, and holds the lock of all network configuration from the first to the last.
const MESSAGE_REMOVALS: usize = 16;

/// The kernel's device of that name, until the deadline.
pub(super) struct Kernel<'a> {
    pub(super) device: &'a DeviceName,
    pub(super) deadline: Instant,
}

impl Backend for Kernel<'_> {
    fn device(&self) -> &DeviceName {
        self.device
    }

    fn snapshot(&self) -> Result<Snapshot, Error> {
        for attempt in 1..=TRIES {
            let dump = dump::snapshot(self.device, self.deadline);
            if let Some(snapshot) = dump.map_err(|errno| self.error(errno))? {
                return Ok(snapshot);
            }
            // Bursts of changes pass: give them more and more time.
            let pause = Duration::from_millis(attempt.min(20).into());
            if Instant::now() + pause >= self.deadline {
                break;
            }
            thread::sleep(pause);
        }
        Err(Error::Disturbed(self.device.clone()))
    }

    fn apply(
        &self,
        changes: &[Change],
        before: Option<&Snapshot>,
        applied: &AtomicUsize,
    ) -> Result<(), Error> {
        // The kernel silently ignores a peer with the device's own key.
        let own_key = match before {
            Some(before) => before.own_key,
            None => dump::own_key(self.device, self.deadline).map_err(|errno| self.error(errno))?,
        };
        let own = changes.iter().find_map(|change| match change {
            Change::Set(key, _) if Some(**key) == own_key => Some(**key),
            _ => None,
        });
        if let Some(key) = own {
            return Err(Error::OwnKey(self.device.clone(), key));
        }
        let mut socket = self.connect()?;
        let mut message = Message::default();
        for (done, change) in changes.iter().enumerate() {
            for (part, peer) in set_peers(change).enumerate() {
                if !message.has_room(&peer) {
                    self.send(&mut socket, &mut message)?;
                    applied.store(done, Ordering::Relaxed);
                    message.finishes_a_peer = part > 0;
                }
                message.push(peer);
            }
        }
        self.send(&mut socket, &mut message)?;
        applied.store(changes.len(), Ordering::Relaxed);
        Ok(())
    }
}

/// What goes to the kernel at one go.
#[derive(Default)]
struct Message<'a> {
    peers: Vec<set::Peer<'a>>,
    /// Peers and allowed IPs.
    items: usize,
    removals: usize,
    /// The message before has the beginning of the first peer.
    finishes_a_peer: bool,
}

impl<'a> Message<'a> {
    fn has_room(&self, peer: &set::Peer) -> bool {
        self.items + 1 + peer.allowed_ips.len() <= MESSAGE_ITEMS
            && self.removals + removals(peer) <= MESSAGE_REMOVALS
    }

    fn push(&mut self, peer: set::Peer<'a>) {
        self.items += 1 + peer.allowed_ips.len();
        self.removals += removals(&peer);
        self.peers.push(peer);
    }
}

fn removals(peer: &set::Peer) -> usize {
    usize::from(peer.flags.contains(&set::WgPeerF::RemoveMe))
}

impl Kernel<'_> {
    /// A fresh socket: the crate does not check sequence numbers.
    fn connect(&self) -> Result<WgSocket, Error> {
        WgSocket::connect().map_err(|error| match error {
            ConnectError::NlError(error) => self.internal(&error.to_string()),
            ConnectError::ResolveFamilyError(error) => self.internal(&error.to_string()),
        })
    }

    /// Sends the message and makes it empty.
    fn send(&self, socket: &mut WgSocket, message: &mut Message) -> Result<(), Error> {
        let message = std::mem::take(message);
        if message.peers.is_empty() {
            return Ok(());
        }
        if Instant::now() >= self.deadline && !message.finishes_a_peer {
            return Err(Error::Timeout(self.device.clone()));
        }
        let message = set::Device::from_ifname(self.device.as_str()).peers(message.peers);
        socket.set_device(message).map_err(|error| match error {
            SetDeviceError::NlError(NlError::Nlmsgerr(error)) => {
                self.error(Errno::from_raw(error.error.saturating_neg()))
            }
            error => self.internal(&error.to_string()),
        })
    }

    fn error(&self, errno: Errno) -> Error {
        match errno {
            Errno::EAGAIN => Error::Timeout(self.device.clone()),
            errno => Error::Kernel(self.device.clone(), errno),
        }
    }

    fn internal(&self, reason: &str) -> Error {
        Error::Internal(self.device.clone(), reason.to_owned())
    }
}

/// A change as the kernel takes it: in several parts where its allowed IPs fill more than one
/// message. Nothing but the allowed IPs of a peer that exists is touched.
fn set_peers<'a>(change: &Change<'a>) -> impl Iterator<Item = set::Peer<'a>> {
    let (key, allowed_ips, flag) = match *change {
        Change::Remove(key) => (key, &[][..], set::WgPeerF::RemoveMe),
        Change::Set(key, allowed_ips) => (key, allowed_ips, set::WgPeerF::ReplaceAllowedIps),
    };
    let mut chunks = allowed_ips.chunks(MESSAGE_ITEMS - 1);
    let peer = |chunk: &'a [super::AllowedIp]| {
        let allowed_ips = chunk
            .iter()
            .map(|ip| set::AllowedIp { ipaddr: ip.address(), cidr_mask: Some(ip.prefix_len()) });
        set::Peer::from_public_key(key.as_bytes()).allowed_ips(allowed_ips.collect())
    };
    let first = peer(chunks.next().unwrap_or_default()).flags(vec![flag]);
    std::iter::once(first).chain(chunks.map(peer))
}
