//! The peers of a device, perhaps a hundred thousand, in two blocks of memory.

use std::borrow::Cow;
use std::time::SystemTime;

use super::{AllowedIp, Peer, PublicKey};

/// The C library takes a block of more than 32 MiB from the system alone, and gives it back when it
/// is freed. Of smaller ones it keeps a part, up to twice as much as the largest that was ever
/// freed (mallopt(3), `M_MMAP_THRESHOLD`). What is never written to takes no memory.
const OWN_BLOCK: usize = 33 << 20;

/// Lists up to this size grow as usual.
const SMALL: usize = 64 << 10;

/// A list of peers.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Peers {
    entries: Vec<Entry>,
    /// Those of all peers, one after the other.
    allowed_ips: Vec<AllowedIp>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Entry {
    public_key: PublicKey,
    last_handshake: Option<SystemTime>,
    rx_bytes: u64,
    tx_bytes: u64,
    /// Where its allowed IPs end; they begin where those of the entry before end.
    end: usize,
}

impl Peers {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The peer at that place.
    pub fn get(&self, place: usize) -> Option<Peer<'_>> {
        let entry = self.entries.get(place)?;
        let before = place.checked_sub(1).and_then(|before| self.entries.get(before));
        let start = before.map_or(0, |entry| entry.end);
        Some(Peer {
            public_key: entry.public_key,
            allowed_ips: Cow::Borrowed(self.allowed_ips.get(start..entry.end)?),
            last_handshake: entry.last_handshake,
            rx_bytes: entry.rx_bytes,
            tx_bytes: entry.tx_bytes,
        })
    }

    /// One after the other.
    pub fn iter(&self) -> impl Iterator<Item = Peer<'_>> {
        (0..self.len()).filter_map(|place| self.get(place))
    }

    /// The public key of the peer at that place.
    pub fn key(&self, place: usize) -> Option<&PublicKey> {
        self.entries.get(place).map(|entry| &entry.public_key)
    }

    /// When the last handshakes were, of the peers that had one.
    pub(super) fn handshakes_mut(&mut self) -> impl Iterator<Item = &mut SystemTime> {
        self.entries.iter_mut().filter_map(|entry| entry.last_handshake.as_mut())
    }

    /// Adds a peer at the end.
    pub fn push(&mut self, peer: &Peer<'_>) {
        make_room(&mut self.allowed_ips, peer.allowed_ips.len());
        self.allowed_ips.extend_from_slice(&peer.allowed_ips);
        make_room(&mut self.entries, 1);
        self.entries.push(Entry {
            public_key: peer.public_key,
            last_handshake: peer.last_handshake,
            rx_bytes: peer.rx_bytes,
            tx_bytes: peer.tx_bytes,
            end: self.allowed_ips.len(),
        });
    }

    /// Gives more allowed IPs to the last peer, if that is the one.
    pub(super) fn extend_last(&mut self, key: &PublicKey, allowed_ips: &[AllowedIp]) -> bool {
        let last = self.entries.last_mut().filter(|last| last.public_key == *key);
        last.is_some_and(|last| {
            make_room(&mut self.allowed_ips, allowed_ips.len());
            self.allowed_ips.extend_from_slice(allowed_ips);
            last.end = self.allowed_ips.len();
            true
        })
    }
}

/// Before a list grows: from small to a block of its own.
fn make_room<T>(list: &mut Vec<T>, more: usize) {
    if list.len() + more > list.capacity() && size_of_val(list.as_slice()) >= SMALL {
        // Refused where the system lends no memory that it does not have: then as usual.
        let _ = list.try_reserve_exact(more.max(OWN_BLOCK / size_of::<T>()));
    }
}

impl<'a> FromIterator<Peer<'a>> for Peers {
    fn from_iter<I: IntoIterator<Item = Peer<'a>>>(items: I) -> Self {
        let mut peers = Self::default();
        items.into_iter().for_each(|peer| peers.push(&peer));
        peers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        let peer = |number: u8| Peer {
            public_key: [number; 32].into(),
            allowed_ips: (0..number % 4)
                .map(|host| format!("10.{number}.0.{host}/32").parse().unwrap())
                .collect(),
            last_handshake: (number % 2 == 1).then_some(SystemTime::UNIX_EPOCH),
            rx_bytes: u64::from(number),
            tx_bytes: u64::MAX,
        };
        let all: Vec<_> = (0..100).map(peer).collect();
        let mut peers: Peers = all.iter().cloned().collect();
        assert!(peers.iter().eq(all.iter().cloned()));
        assert_eq!((peers.key(99), peers.key(100)), (Some(&[99; 32].into()), None));
        assert_eq!(peers.handshakes_mut().count(), 50);
        assert_eq!((peers.len(), peers.is_empty(), peers.get(100)), (100, false, None));

        let more: Vec<AllowedIp> = vec!["fd00::/8".parse().unwrap(); 2];
        assert!(!peers.extend_last(&[98; 32].into(), &more));
        assert!(peers.extend_last(&[99; 32].into(), &more));
        assert_eq!(peers.get(98).unwrap(), peer(98));
        assert_eq!(peers.get(99).unwrap().allowed_ips.len(), 3 + 2);
        assert!(!Peers::default().extend_last(&[0; 32].into(), &more));
    }

    #[test]
    fn a_long_list_has_blocks_of_its_own() {
        let peer = Peer {
            public_key: [1; 32].into(),
            allowed_ips: vec!["::/0".parse().unwrap(); 3].into(),
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        let mut peers = Peers::default();
        (0..100).for_each(|_| peers.push(&peer));
        assert!(peers.entries.capacity() * size_of::<Entry>() < 2 * SMALL);
        (0..10_000).for_each(|_| peers.push(&peer));
        assert!(peers.entries.capacity() * size_of::<Entry>() > 32 << 20);
        assert!(peers.allowed_ips.capacity() * size_of::<AllowedIp>() > 32 << 20);
        assert!(peers.iter().all(|one| one == peer));
    }
}
