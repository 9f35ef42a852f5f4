//! The kernel's WireGuard device, over generic netlink.

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::netlink::{Request, Socket};
use super::uapi::{
    AF_INET, AF_INET6, WG_CMD_SET_DEVICE, WGALLOWEDIP_A_CIDR_MASK, WGALLOWEDIP_A_FAMILY,
    WGALLOWEDIP_A_IPADDR, WGDEVICE_A_IFNAME, WGDEVICE_A_PEERS, WGPEER_A_ALLOWEDIPS, WGPEER_A_FLAGS,
    WGPEER_A_PUBLIC_KEY, WGPEER_F_REMOVE_ME, WGPEER_F_REPLACE_ALLOWEDIPS,
};
use super::{AllowedIp, Backend, Change, DeviceName, Error, PublicKey, Snapshot, dump};

/// How often a disturbed dump is started again.
const TRIES: u32 = 50;

/// The allowed IPs and peers in one message: so many that the message stays below 32 KiB, since
/// the kernel's refusal repeats it (nix cannot set `NETLINK_CAP_ACK`, which would spare us that) and
/// no more than that is read. An allowed IP takes at most 40 bytes, a peer without any 52.
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
        let mut socket = Socket::open(self.deadline).map_err(|errno| self.error(errno))?;
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
    peers: Vec<Part<'a>>,
    /// Peers and allowed IPs.
    items: usize,
    removals: usize,
    /// The message before has the beginning of the first peer.
    finishes_a_peer: bool,
}

/// A peer, or as much of it as one message holds.
struct Part<'a> {
    key: &'a PublicKey,
    flags: u32,
    allowed_ips: &'a [AllowedIp],
}

impl<'a> Message<'a> {
    fn has_room(&self, peer: &Part) -> bool {
        self.items + 1 + peer.allowed_ips.len() <= MESSAGE_ITEMS
            && self.removals + removals(peer) <= MESSAGE_REMOVALS
    }

    fn push(&mut self, peer: Part<'a>) {
        self.items += 1 + peer.allowed_ips.len();
        self.removals += removals(&peer);
        self.peers.push(peer);
    }

    fn request(&self, device: &DeviceName) -> Request {
        let mut request = Request::new(WG_CMD_SET_DEVICE);
        request.text(WGDEVICE_A_IFNAME, device.as_str());
        request.nested(WGDEVICE_A_PEERS, |peers| {
            for part in &self.peers {
                peers.nested(0, |peer| part.write(peer));
            }
        });
        request
    }
}

impl Part<'_> {
    fn write(&self, peer: &mut Request) {
        peer.attribute(WGPEER_A_PUBLIC_KEY, self.key.as_bytes());
        peer.attribute(WGPEER_A_FLAGS, &self.flags.to_ne_bytes());
        peer.nested(WGPEER_A_ALLOWEDIPS, |allowed_ips| {
            for allowed_ip in self.allowed_ips {
                allowed_ips.nested(0, |attributes| write_allowed_ip(allowed_ip, attributes));
            }
        });
    }
}

fn write_allowed_ip(allowed_ip: &AllowedIp, attributes: &mut Request) {
    let family = match allowed_ip.address() {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    };
    attributes.attribute(WGALLOWEDIP_A_FAMILY, &family.to_ne_bytes());
    match allowed_ip.address() {
        IpAddr::V4(v4) => attributes.attribute(WGALLOWEDIP_A_IPADDR, &v4.octets()),
        IpAddr::V6(v6) => attributes.attribute(WGALLOWEDIP_A_IPADDR, &v6.octets()),
    }
    attributes.attribute(WGALLOWEDIP_A_CIDR_MASK, &[allowed_ip.prefix_len()]);
}

fn removals(peer: &Part) -> usize {
    usize::from(peer.flags == WGPEER_F_REMOVE_ME)
}

impl Kernel<'_> {
    /// Sends the message and makes it empty.
    fn send(&self, socket: &mut Socket, message: &mut Message) -> Result<(), Error> {
        let message = std::mem::take(message);
        if message.peers.is_empty() {
            return Ok(());
        }
        if Instant::now() >= self.deadline && !message.finishes_a_peer {
            return Err(Error::Timeout(self.device.clone()));
        }
        socket.execute(message.request(self.device)).map_err(|errno| self.error(errno))
    }

    fn error(&self, errno: Errno) -> Error {
        match errno {
            Errno::EAGAIN => Error::Timeout(self.device.clone()),
            errno => Error::Kernel(self.device.clone(), errno),
        }
    }
}

/// A change as the kernel takes it: in several parts where its allowed IPs fill more than one
/// message. Nothing but the allowed IPs of a peer that exists is touched.
fn set_peers<'a>(change: &Change<'a>) -> impl Iterator<Item = Part<'a>> {
    let (key, allowed_ips, flags) = match *change {
        Change::Remove(key) => (key, &[][..], WGPEER_F_REMOVE_ME),
        Change::Set(key, allowed_ips) => (key, allowed_ips, WGPEER_F_REPLACE_ALLOWEDIPS),
    };
    let mut chunks = allowed_ips.chunks(MESSAGE_ITEMS - 1);
    let first = Part { key, flags, allowed_ips: chunks.next().unwrap_or_default() };
    std::iter::once(first).chain(chunks.map(move |allowed_ips| Part { key, flags: 0, allowed_ips }))
}

#[cfg(test)]
mod tests {
    use super::super::netlink::{attributes, messages};
    use super::*;

    /// The messages that `Kernel::apply` makes of the changes, as bytes.
    fn written(changes: &[Change]) -> Vec<Vec<u8>> {
        let device = "fifteen-bytes-x".parse().unwrap();
        let mut requests = vec![];
        let mut message = Message::default();
        for part in changes.iter().flat_map(set_peers) {
            if !message.has_room(&part) {
                requests.push(std::mem::take(&mut message));
            }
            message.push(part);
        }
        requests.push(message);
        requests.iter().map(|message| message.request(&device).finish(1, 0, 0)).collect()
    }

    /// What is nested in the attribute of that type.
    fn nested(bytes: &[u8], kind: u16) -> Vec<&[u8]> {
        let all = attributes(bytes).map(Result::unwrap);
        let found = all.filter(|(other, _)| *other == kind).map(|(_, payload)| payload);
        found.flat_map(|payload| attributes(payload).map(|inner| inner.unwrap().1)).collect()
    }

    #[test]
    fn a_change_as_it_is_written() {
        let (added, removed) = (PublicKey::from([1; 32]), PublicKey::from([2; 32]));
        let allowed_ips = ["10.0.0.0/8", "fd00::/64"].map(|text| text.parse().unwrap());
        let changes = [Change::Remove(&removed), Change::Set(&added, &allowed_ips)];
        let [bytes] = &written(&changes)[..] else { panic!("one message") };
        let message = messages(bytes).next().unwrap().unwrap();
        assert_eq!(message.body[..4], [WG_CMD_SET_DEVICE, 1, 0, 0]);
        let device: Vec<_> = attributes(&message.body[4..]).map(Result::unwrap).collect();
        assert_eq!(device[0], (WGDEVICE_A_IFNAME, &b"fifteen-bytes-x\0"[..]));
        let peers = nested(&message.body[4..], WGDEVICE_A_PEERS);
        let expected = [(removed, WGPEER_F_REMOVE_ME), (added, WGPEER_F_REPLACE_ALLOWEDIPS)];
        for (peer, (key, flags)) in peers.iter().zip(expected) {
            let fields: Vec<_> = attributes(peer).map(Result::unwrap).collect();
            assert_eq!(fields[0], (WGPEER_A_PUBLIC_KEY, &key.as_bytes()[..]));
            assert_eq!(fields[1], (WGPEER_A_FLAGS, &flags.to_ne_bytes()[..]));
        }
        assert!(nested(peers[0], WGPEER_A_ALLOWEDIPS).is_empty());
        let allowed_ips = nested(peers[1], WGPEER_A_ALLOWEDIPS);
        let expected: [(u16, &[u8], u8); 2] = [
            (AF_INET, &[10, 0, 0, 0], 8),
            (AF_INET6, &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 64),
        ];
        for (allowed_ip, (family, address, bits)) in allowed_ips.iter().zip(expected) {
            let fields: Vec<_> = attributes(allowed_ip).map(Result::unwrap).collect();
            assert_eq!(fields[0], (WGALLOWEDIP_A_FAMILY, &family.to_ne_bytes()[..]));
            assert_eq!(fields[1], (WGALLOWEDIP_A_IPADDR, address));
            assert_eq!(fields[2], (WGALLOWEDIP_A_CIDR_MASK, &[bits][..]));
        }
        assert_eq!((peers.len(), allowed_ips.len()), (2, 2));
    }

    #[test]
    fn messages_stay_small() {
        let key = PublicKey::from([1; 32]);
        let allowed_ips = vec!["fd00::/64".parse().unwrap(); 3 * MESSAGE_ITEMS];
        for (changes, messages) in [
            (vec![Change::Set(&key, &[]); 2 * MESSAGE_ITEMS], 2),
            (vec![Change::Set(&key, &allowed_ips[..1]); MESSAGE_ITEMS], 2),
            (vec![Change::Set(&key, &allowed_ips)], 4),
            (vec![Change::Remove(&key); 10 * MESSAGE_REMOVALS], 10),
        ] {
            let written = written(&changes);
            assert_eq!(written.len(), messages);
            // The refusal has a header and a status before it.
            assert!(written.iter().all(|message| 16 + 4 + message.len() <= 32 * 1024));
        }
    }
}
