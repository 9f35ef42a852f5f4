//! The kernel's WireGuard device: listed by our own dump, changed through the crate.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use wireguard_uapi::WgSocket;
use wireguard_uapi::err::{NlError, SetDeviceError};
use wireguard_uapi::linux::set;

use super::sync::batches;
use super::{AllowedIp, Applied, Backend, Change, DeviceName, Peer, PublicKey, Snapshot, dump};
use crate::agent::Failure;
use crate::metrics;

/// How often a disturbed dump is started again.
const TRIES: u32 = 50;

/// The allowed IPs and peers in one message: so many that the message stays below 32 KiB, since the
/// kernel's refusal repeats it and the crate reads no more than that. An allowed IP takes at most 40
/// bytes, a peer without any 56.
const MESSAGE_ITEMS: usize = 500;

/// The kernel's device of that name, until the deadline.
pub(super) struct Kernel<'a> {
    pub(super) device: &'a DeviceName,
    pub(super) own_key: Option<PublicKey>,
    pub(super) deadline: Instant,
}

impl Kernel<'_> {
    fn unusable(&self, reason: &dyn Display) -> Failure {
        Failure::Failed(format!("WireGuard device {} could not be used ({reason})", self.device))
    }
}

impl Backend for Kernel<'_> {
    fn snapshot(&self) -> Result<Snapshot, Failure> {
        for attempt in 1..=TRIES {
            let dump = dump::snapshot(self.device, self.deadline);
            if let Some(snapshot) = dump.map_err(|errno| failure(self.device, errno))? {
                return Ok(snapshot);
            }
            metrics::add("wireguard_lists_restarted_total", &[], 1.0);
            // Bursts of changes pass: give them more and more time.
            let pause = Duration::from_millis(attempt.min(20).into());
            if Instant::now() + pause >= self.deadline {
                break;
            }
            thread::sleep(pause);
        }
        Err(Failure::Failed(format!(
            "WireGuard device {} could not be read since another program keeps changing it: try again",
            self.device
        )))
    }

    fn add(&self, key: PublicKey, allowed_ips: &[AllowedIp]) -> Result<(), Failure> {
        // The kernel ignores such a peer in silence.
        super::refuse_own_key(self.device, self.own_key, &key)?;
        self.apply(&[Change::Set(key, allowed_ips)], &[], &mut |_| ())
    }

    fn apply(&self, changes: &[Change], _: &[Peer], applied: Applied) -> Result<(), Failure> {
        let mut socket = WgSocket::connect().map_err(|error| self.unusable(&error))?;
        for batch in batches(changes, MESSAGE_ITEMS) {
            if Instant::now() >= self.deadline {
                return Err(failure(self.device, Errno::EAGAIN));
            }
            let request = set::Device::from_ifname(self.device.0.as_str());
            let peers = batch.iter().map(peer).collect();
            socket.set_device(request.peers(peers)).map_err(|error| match error {
                SetDeviceError::NlError(NlError::Nlmsgerr(refusal)) => {
                    failure(self.device, Errno::from_raw(refusal.error.saturating_neg()))
                }
                error => self.unusable(&error),
            })?;
            applied(batch.len());
        }
        Ok(())
    }
}

/// A change as the kernel takes it. Nothing but the allowed IPs of a peer that exists is touched.
fn peer<'a>(change: &'a Change) -> set::Peer<'a> {
    let (key, allowed_ips, flag) = match change {
        Change::Remove(key) => (key, &[][..], set::WgPeerF::RemoveMe),
        Change::Set(key, allowed_ips) => (key, *allowed_ips, set::WgPeerF::ReplaceAllowedIps),
    };
    let allowed_ips = allowed_ips
        .iter()
        .map(|ip| set::AllowedIp { ipaddr: &ip.address, cidr_mask: Some(ip.prefix_len) });
    set::Peer::from_public_key(&key.0).flags(vec![flag]).allowed_ips(allowed_ips.collect())
}

/// What the kernel's error number says.
pub(super) fn failure(device: &DeviceName, errno: Errno) -> Failure {
    match errno {
        Errno::EAGAIN => {
            Failure::Timeout(format!("WireGuard device {device} did not answer in time: try again"))
        }
        errno => Failure::Failed(format!("WireGuard device {device} failed ({})", errno.desc())),
    }
}
