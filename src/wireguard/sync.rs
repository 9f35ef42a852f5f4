//! Bringing a device to a wanted list of peers: the list, and its difference from what is there.

use std::fmt;

use super::{AllowedIp, Change, Peers, PublicKey};

/// The peers that a device is to have: each key once, each allowed IP at one peer.
#[derive(Debug, Default)]
pub struct Wanted {
    keys: Vec<PublicKey>,
    /// Where the allowed IPs of each peer end; they begin where those of the peer before end.
    ends: Vec<usize>,
    /// Sorted within a peer, each once.
    allowed_ips: Vec<AllowedIp>,
    /// Places in `keys`, in order of the key.
    by_key: Vec<usize>,
}

/// A [`Wanted`] that is being made, some 60 bytes a peer and 18 an allowed IP.
#[derive(Debug, Default)]
pub struct WantedBuilder(Wanted);

/// Why a list is not to be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Conflict {
    /// Two peers have this key.
    Key(PublicKey),
    /// Two peers, of these keys, have this allowed IP.
    AllowedIp(AllowedIp, PublicKey, PublicKey),
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => write!(f, "the peer {key} is listed twice"),
            Self::AllowedIp(ip, first, second) => {
                write!(f, "the allowed IP {ip} is given to two peers, {first} and {second}")
            }
        }
    }
}
impl std::error::Error for Conflict {}

impl WantedBuilder {
    /// An allowed IP of the peer that [`WantedBuilder::peer`] is going to name.
    pub fn allowed_ip(&mut self, allowed_ip: AllowedIp) {
        self.0.allowed_ips.push(allowed_ip);
    }

    /// The peer that has the allowed IPs since the last one. One that is repeated counts once.
    pub fn peer(&mut self, key: PublicKey) {
        let Wanted { keys, ends, allowed_ips, .. } = &mut self.0;
        let start = ends.last().copied().unwrap_or(0);
        if let Some(own) = allowed_ips.get_mut(start..) {
            own.sort_unstable();
        }
        // Close the gaps, without a second copy of what may be the whole list.
        let mut end = start;
        for place in start..allowed_ips.len() {
            if place == start || allowed_ips.get(place) != allowed_ips.get(end - 1) {
                allowed_ips.swap(end, place);
                end += 1;
            }
        }
        allowed_ips.truncate(end);
        keys.push(key);
        ends.push(end);
    }

    /// The list, where nothing in it contradicts itself.
    pub fn build(self) -> Result<Wanted, Conflict> {
        let mut wanted = self.0;
        let keys = &wanted.keys;
        let mut by_key: Vec<usize> = (0..keys.len()).collect();
        by_key.sort_unstable_by_key(|&place| keys.get(place));
        for (one, two) in by_key.iter().zip(by_key.iter().skip(1)) {
            if let (Some(one), Some(two)) = (keys.get(*one), keys.get(*two))
                && one == two
            {
                return Err(Conflict::Key(*one));
            }
        }
        wanted.by_key = by_key;

        let ips = &wanted.allowed_ips;
        let mut by_ip: Vec<usize> = (0..ips.len()).collect();
        by_ip.sort_unstable_by_key(|&place| ips.get(place));
        let owner =
            |place: usize| keys.get(wanted.ends.partition_point(|end| *end <= place)).copied();
        for (&one, &two) in by_ip.iter().zip(by_ip.iter().skip(1)) {
            if ips.get(one) == ips.get(two)
                && let (Some(ip), Some(first), Some(second)) =
                    (ips.get(one), owner(one.min(two)), owner(one.max(two)))
            {
                return Err(Conflict::AllowedIp(*ip, first, second));
            }
        }
        Ok(wanted)
    }
}

impl Wanted {
    /// Whether the list has a peer of this key.
    pub fn contains(&self, key: &PublicKey) -> bool {
        self.find(key).is_some()
    }

    fn find(&self, key: &PublicKey) -> Option<usize> {
        let found = self.by_key.binary_search_by_key(&Some(key), |&place| self.keys.get(place));
        found.ok().and_then(|order| self.by_key.get(order)).copied()
    }

    fn get(&self, place: usize) -> Option<(&PublicKey, &[AllowedIp])> {
        let start = place.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).copied());
        let allowed_ips = self.allowed_ips.get(start?..*self.ends.get(place)?)?;
        Some((self.keys.get(place)?, allowed_ips))
    }
}

/// What a device lacks of a [`Wanted`]: places in the list of its peers and in the wanted list.
#[derive(Default, PartialEq, Eq, Debug)]
pub(super) struct Difference {
    removed: Vec<usize>,
    updated: Vec<usize>,
    added: Vec<usize>,
    unchanged: usize,
}

/// What a synchronisation did, or would do.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Synced {
    /// New peers, in the order of the list.
    pub added: Vec<PublicKey>,
    /// Peers whose allowed IPs were replaced, in the order of the list.
    pub updated: Vec<PublicKey>,
    /// Peers that are gone, with their final counters, in the device's order.
    pub removed: Peers,
    /// How many peers were right already.
    pub unchanged: usize,
}

impl Difference {
    /// Compares what is there with what is wanted.
    pub(super) fn new(present: &Peers, wanted: &Wanted) -> Self {
        let mut difference = Self::default();
        let mut seen = vec![false; wanted.keys.len()];
        let mut sorted = Vec::new();
        for (place, peer) in present.iter().enumerate() {
            let Some(found) = wanted.find(&peer.public_key) else {
                difference.removed.push(place);
                continue;
            };
            if let Some(seen) = seen.get_mut(found) {
                *seen = true;
            }
            sorted.clear();
            sorted.extend_from_slice(&peer.allowed_ips);
            sorted.sort_unstable();
            sorted.dedup();
            match wanted.get(found) {
                Some((_, allowed_ips)) if allowed_ips == sorted => difference.unchanged += 1,
                _ => difference.updated.push(found),
            }
        }
        difference.updated.sort_unstable();
        let unseen = seen.iter().enumerate().filter(|(_, seen)| !**seen);
        difference.added = unseen.map(|(place, _)| place).collect();
        difference
    }

    /// The changes that make the difference good.
    ///
    /// Removals come first, so that what they free can be given away. Further order does not matter:
    /// no two wanted peers have an allowed IP in common, so that a peer that is set takes an allowed
    /// IP only from one that is not to have it. Such a one differs from what is wanted and is set
    /// itself, unless losing that allowed IP made it right. So the changes may also be cut anywhere
    /// and the rest be found by comparing again.
    pub(super) fn changes<'a>(&self, present: &'a Peers, wanted: &'a Wanted) -> Vec<Change<'a>> {
        let removed = self.removed.iter().filter_map(|place| present.key(*place));
        let removed = removed.map(Change::Remove);
        let set = self.updated.iter().chain(&self.added).filter_map(|place| wanted.get(*place));
        removed.chain(set.map(|(key, allowed_ips)| Change::Set(key, allowed_ips))).collect()
    }

    /// Forgets all but the first changes.
    pub(super) fn truncate(&mut self, mut changes: usize) {
        for places in [&mut self.removed, &mut self.updated, &mut self.added] {
            places.truncate(changes);
            changes -= places.len();
        }
    }

    /// The same in words, with the peers themselves.
    pub(super) fn into_synced(self, present: &Peers, wanted: &Wanted) -> Synced {
        let keys = |places: Vec<usize>| {
            places.into_iter().filter_map(|place| wanted.keys.get(place).copied()).collect()
        };
        Synced {
            added: keys(self.added),
            updated: keys(self.updated),
            removed: self.removed.iter().filter_map(|place| present.get(*place)).collect(),
            unchanged: self.unchanged,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Peer;
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn key(number: u8) -> PublicKey {
        [number; 32].into()
    }

    fn ips(texts: &[&str]) -> Vec<AllowedIp> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn wanted(peers: &[(u8, &[&str])]) -> Result<Wanted, Conflict> {
        let mut builder = WantedBuilder::default();
        for (number, texts) in peers {
            ips(texts).into_iter().for_each(|ip| builder.allowed_ip(ip));
            builder.peer(key(*number));
        }
        builder.build()
    }

    fn peer(public_key: PublicKey, allowed_ips: Vec<AllowedIp>) -> Peer<'static> {
        let allowed_ips = allowed_ips.into();
        Peer { public_key, allowed_ips, last_handshake: None, rx_bytes: 0, tx_bytes: 0 }
    }

    #[test]
    fn lists() {
        let list = wanted(&[
            (3, &["10.0.0.3/32", "10.0.0.1/32", "10.0.0.3/32", "10.0.0.9/24", "10.0.0.0/24"]),
            (1, &[]),
            (2, &["fd00::2/128"]),
        ]);
        let list = list.unwrap();
        assert_eq!(
            list.get(0),
            Some((&key(3), &ips(&["10.0.0.0/24", "10.0.0.1/32", "10.0.0.3/32"])[..]))
        );
        assert_eq!(list.get(1), Some((&key(1), &[][..])));
        assert_eq!(list.get(2), Some((&key(2), &ips(&["fd00::2/128"])[..])));
        assert_eq!(list.get(3), None);
        assert_eq!([1, 2, 3, 4].map(|n| list.find(&key(n))), [Some(1), Some(2), Some(0), None]);
    }

    #[test]
    fn conflicts() {
        let twice = wanted(&[(1, &[]), (2, &[]), (1, &["10.0.0.1/32"])]);
        assert_eq!(twice.unwrap_err(), Conflict::Key(key(1)));
        let ip = "10.0.0.0/24".parse().unwrap();
        let shared = wanted(&[(1, &[]), (9, &["10.0.0.1/24"]), (3, &["::/0", "10.0.0.2/24"])]);
        assert_eq!(shared.unwrap_err(), Conflict::AllowedIp(ip, key(9), key(3)));
        // Another length or another family is another allowed IP.
        let near = [(1, &["10.0.0.0/24"][..]), (2, &["10.0.0.0/25"]), (3, &["::10.0.0.0/120"])];
        assert!(wanted(&near).is_ok());
    }

    #[test]
    fn differences() {
        let present: Peers = [
            peer(key(1), ips(&["10.0.0.2/32", "10.0.0.1/32"])),
            peer(key(2), ips(&["10.0.1.1/32"])),
            peer(key(3), ips(&["10.0.2.1/32"])),
            peer(key(4), ips(&[])),
        ]
        .into_iter()
        .collect();
        let wanted = wanted(&[
            (5, &["10.0.2.1/32"]),
            (4, &[]),
            (2, &["10.0.1.1/32", "10.0.1.2/32"]),
            (1, &["10.0.0.1/32", "10.0.0.2/32"]),
        ]);
        let wanted = wanted.unwrap();
        let difference = Difference::new(&present, &wanted);
        let changes = difference.changes(&present, &wanted);
        assert!(matches!(
            changes[..],
            [Change::Remove(one), Change::Set(two, _), Change::Set(three, _)]
                if [*one, *two, *three] == [key(3), key(2), key(5)]
        ));
        let expected = Synced {
            added: vec![key(5)],
            updated: vec![key(2)],
            removed: present.get(2).into_iter().collect(),
            unchanged: 2,
        };
        assert_eq!(difference.into_synced(&present, &wanted), expected);
        let nothing = Difference::new(&Peers::default(), &Wanted::default());
        assert_eq!(nothing, Difference::default());
    }

    /// A device as the kernel sees it: an allowed IP belongs to the last peer that it was given to.
    type Model = BTreeMap<PublicKey, BTreeSet<AllowedIp>>;

    fn apply(model: &mut Model, change: &Change) {
        match *change {
            Change::Remove(key) => drop(model.remove(key)),
            Change::Set(key, allowed_ips) => {
                for set in model.values_mut() {
                    set.retain(|ip| !allowed_ips.contains(ip));
                }
                model.insert(*key, allowed_ips.iter().copied().collect());
            }
        }
    }

    fn peers(model: &Model) -> Peers {
        model.iter().map(|(key, ips)| peer(*key, ips.iter().copied().collect())).collect()
    }

    /// Marsaglia's xorshift64.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }

        /// Up to 8 of 12 peers that share out 16 allowed IPs.
        fn model(&mut self) -> Model {
            let mut model = Model::new();
            for _ in 0..self.below(9) {
                model.insert(key(u8::try_from(self.below(12)).unwrap()), BTreeSet::new());
            }
            let keys: Vec<_> = model.keys().copied().collect();
            for number in 0..16 {
                let text = format!("10.0.0.{number}/32");
                let owner = usize::try_from(self.below(12)).unwrap();
                if let Some(owner) = keys.get(owner) {
                    model.get_mut(owner).unwrap().insert(text.parse().unwrap());
                }
            }
            model
        }
    }

    #[test]
    fn changes_cut_anywhere_and_begun_again_end_at_the_wanted_list() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for round in 0..2000 {
            let (before, after) = (random.model(), random.model());
            let mut builder = WantedBuilder::default();
            for (key, allowed_ips) in after.iter().rev() {
                allowed_ips.iter().rev().for_each(|ip| builder.allowed_ip(*ip));
                builder.peer(*key);
            }
            let wanted = builder.build().unwrap();
            let present = peers(&before);
            let difference = Difference::new(&present, &wanted);
            let changes = difference.changes(&present, &wanted);
            for cut in 0..=changes.len() {
                let mut model = before.clone();
                changes[..cut].iter().for_each(|change| apply(&mut model, change));
                let present = peers(&model);
                let rest = Difference::new(&present, &wanted);
                let rest = rest.changes(&present, &wanted);
                assert!(rest.len() <= changes.len() - cut, "round {round}, cut {cut}: more to do");
                rest.iter().for_each(|change| apply(&mut model, change));
                assert_eq!(model, after, "round {round}, cut {cut}");
            }
        }
    }
}
