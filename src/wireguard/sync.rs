//! Bringing a device to a wanted list of peers: the list, and its difference from what is there.

use std::collections::{HashMap, HashSet};

use super::{AllowedIp, Peer, PublicKey, sorted};
use crate::agent::Failure;

/// The removals in one batch. For each the kernel waits until no CPU uses the peer any more, up to
/// some milliseconds, and holds the lock of all network configuration from the first to the last.
const BATCH_REMOVALS: usize = 16;

/// A peer that the device is to have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WantedPeer {
    /// Who the peer is.
    pub public_key: PublicKey,
    /// What it shall have, no more and no less.
    pub allowed_ips: Vec<AllowedIp>,
}

/// What a synchronisation did, or would do.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Synced {
    /// New peers, in the order of the list.
    pub added: Vec<PublicKey>,
    /// Peers whose allowed IPs were replaced, in the order of the list.
    pub updated: Vec<PublicKey>,
    /// Peers that are gone, with their final counters, in the device's order.
    pub removed: Vec<Peer>,
    /// How many peers were right already.
    pub unchanged: usize,
}

/// A change to a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Change<'a> {
    /// The peer is there and has exactly these allowed IPs.
    Set(PublicKey, &'a [AllowedIp]),
    /// The peer is not there.
    Remove(PublicKey),
}

/// Refuses a list with a key twice, or with one allowed IP at two peers. Each peer's allowed IPs come
/// out sorted, and each once.
pub fn check(wanted: &mut [WantedPeer]) -> Result<(), Failure> {
    let invalid = |sentence| Err(Failure::Invalid(sentence));
    let mut keys = HashSet::with_capacity(wanted.len());
    let mut owners = HashMap::with_capacity(wanted.len());
    for WantedPeer { public_key, allowed_ips } in wanted {
        if !keys.insert(*public_key) {
            return invalid(format!("the peer {public_key} is listed twice"));
        }
        allowed_ips.sort_unstable();
        allowed_ips.dedup();
        for ip in allowed_ips {
            if let Some(owner) = owners.insert(*ip, *public_key) {
                return invalid(format!(
                    "the allowed IP {ip} is given to two peers, {owner} and {public_key}"
                ));
            }
        }
    }
    Ok(())
}

/// Compares what is there with what is wanted, and gives the changes that make the difference good.
///
/// Removals come first, so that the allowed IPs that they free can be given away. The order of the rest does
/// not matter: no two wanted peers have an allowed IP in common, so that a peer that is set takes one only
/// from a peer that is not to have it, and that one is set or removed itself. So the changes may be cut
/// off anywhere: comparing again finds the rest.
pub(super) fn plan<'a>(present: &[Peer], wanted: &'a [WantedPeer]) -> (Synced, Vec<Change<'a>>) {
    let mut left: HashMap<_, _> = present.iter().map(|peer| (peer.public_key, peer)).collect();
    let mut synced = Synced::default();
    let (mut updates, mut additions) = (Vec::new(), Vec::new());
    for WantedPeer { public_key, allowed_ips } in wanted {
        let set = Change::Set(*public_key, allowed_ips);
        match left.remove(public_key) {
            Some(peer) if peer.allowed_ips == *allowed_ips => synced.unchanged += 1,
            Some(peer) if sorted(&peer.allowed_ips) == *allowed_ips => synced.unchanged += 1,
            Some(_) => {
                synced.updated.push(*public_key);
                updates.push(set);
            }
            None => {
                synced.added.push(*public_key);
                additions.push(set);
            }
        }
    }
    let removed = present.iter().filter(|peer| left.contains_key(&peer.public_key));
    synced.removed = removed.cloned().collect();
    let removals = synced.removed.iter().map(|peer| Change::Remove(peer.public_key));
    let changes = removals.chain(updates).chain(additions).collect();
    (synced, changes)
}

/// Cuts the changes into batches of at most so many peers and allowed IPs; a peer that has more stands
/// alone.
pub(super) fn batches<'b, 'a>(
    mut changes: &'b [Change<'a>],
    items: usize,
) -> impl Iterator<Item = &'b [Change<'a>]> {
    std::iter::from_fn(move || {
        let (mut sum, mut removals) = (0, 0);
        let fits = |change: &&Change| {
            match change {
                Change::Remove(_) => (sum, removals) = (sum + 1, removals + 1),
                Change::Set(_, allowed_ips) => sum += 1 + allowed_ips.len(),
            }
            sum <= items && removals <= BATCH_REMOVALS
        };
        let count = changes.iter().take_while(fits).count().max(1);
        let (batch, behind) = changes.split_at_checked(count)?;
        changes = behind;
        Some(batch)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn key(number: u8) -> PublicKey {
        [number; 32].into()
    }

    fn ips(texts: &[&str]) -> Vec<AllowedIp> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn wanted(peers: &[(u8, &[&str])]) -> Result<Vec<WantedPeer>, Failure> {
        let peer = |&(number, texts): &(u8, &[&str])| WantedPeer {
            public_key: key(number),
            allowed_ips: ips(texts),
        };
        let mut wanted: Vec<_> = peers.iter().map(peer).collect();
        check(&mut wanted)?;
        Ok(wanted)
    }

    fn peer(public_key: PublicKey, allowed_ips: Vec<AllowedIp>) -> Peer {
        Peer { public_key, allowed_ips, last_handshake: None, rx_bytes: 0, tx_bytes: 0 }
    }

    #[test]
    fn lists() {
        let texts = ["10.0.0.3/32", "10.0.0.1/32", "10.0.0.3/32", "10.0.0.9/24", "10.0.0.0/24"];
        let list = wanted(&[(3, &texts), (1, &[])]).unwrap();
        assert_eq!(list[0].allowed_ips, ips(&["10.0.0.0/24", "10.0.0.1/32", "10.0.0.3/32"]));
        // Another length or another family is another allowed IP.
        let near = [(1, &["10.0.0.0/24"][..]), (2, &["10.0.0.0/25"]), (3, &["::10.0.0.0/120"])];
        assert!(wanted(&near).is_ok());
        let twice = wanted(&[(1, &[]), (2, &[]), (1, &["10.0.0.1/32"])]).unwrap_err();
        assert!(twice.to_string().contains(&key(1).to_string()), "{twice}");
        let shared = [(1, &[][..]), (9, &["10.0.0.1/24"]), (3, &["::/0", "10.0.0.2/24"])];
        let shared = wanted(&shared).unwrap_err();
        for part in ["10.0.0.0/24".to_owned(), key(9).to_string(), key(3).to_string()] {
            assert!(matches!(&shared, Failure::Invalid(why) if why.contains(&part)));
        }
    }

    #[test]
    fn plans() {
        let present = [
            peer(key(1), ips(&["10.0.0.2/32", "10.0.0.1/32"])),
            peer(key(2), ips(&["10.0.1.1/32"])),
            peer(key(3), ips(&["10.0.2.1/32"])),
            peer(key(4), ips(&[])),
        ];
        let wanted = wanted(&[
            (5, &["10.0.2.1/32"]),
            (4, &[]),
            (2, &["10.0.1.1/32", "10.0.1.2/32"]),
            (1, &["10.0.0.1/32", "10.0.0.2/32"]),
        ]);
        let wanted = wanted.unwrap();
        let (synced, changes) = plan(&present, &wanted);
        let set = |place: usize| Change::Set(wanted[place].public_key, &wanted[place].allowed_ips);
        assert_eq!(changes, [Change::Remove(key(3)), set(2), set(0)]);
        let removed = vec![present[2].clone()];
        let (added, updated) = (vec![key(5)], vec![key(2)]);
        assert_eq!(synced, Synced { added, updated, removed, unchanged: 2 });
        assert_eq!(plan(&[], &[]), (Synced::default(), vec![]));
    }

    #[test]
    fn batches_stay_small() {
        let many = ips(&["::/0"; 300]);
        for (changes, sizes) in [
            (vec![], vec![]),
            (vec![Change::Remove(key(1)); 40], vec![16, 16, 8]),
            (vec![Change::Set(key(1), &[]); 250], vec![100, 100, 50]),
            (
                [[Change::Remove(key(1)); 2], [Change::Set(key(1), &many[..49]); 2]].concat(),
                vec![3, 1],
            ),
            (vec![Change::Set(key(1), &many[..49]); 5], vec![2, 2, 1]),
            (vec![Change::Set(key(1), &many), Change::Set(key(2), &many[..1])], vec![1, 1]),
        ] {
            assert!(batches(&changes, 100).map(<[_]>::len).eq(sizes));
        }
    }

    /// A device as the kernel sees it: an allowed IP belongs to the last peer that it was given to.
    type Model = BTreeMap<PublicKey, BTreeSet<AllowedIp>>;

    fn apply(model: &mut Model, change: &Change) {
        match *change {
            Change::Remove(key) => drop(model.remove(&key)),
            Change::Set(key, allowed_ips) => {
                for set in model.values_mut() {
                    set.retain(|ip| !allowed_ips.contains(ip));
                }
                model.insert(key, allowed_ips.iter().copied().collect());
            }
        }
    }

    fn peers(model: &Model) -> Vec<Peer> {
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
            let peer = |peer: Peer| WantedPeer {
                public_key: peer.public_key,
                allowed_ips: peer.allowed_ips,
            };
            let mut wanted: Vec<_> = peers(&after).into_iter().rev().map(peer).collect();
            check(&mut wanted).unwrap();
            let (_, changes) = plan(&peers(&before), &wanted);
            for cut in 0..=changes.len() {
                let mut model = before.clone();
                changes[..cut].iter().for_each(|change| apply(&mut model, change));
                let (_, rest) = plan(&peers(&model), &wanted);
                assert!(rest.len() <= changes.len() - cut, "round {round}, cut {cut}: more to do");
                rest.iter().for_each(|change| apply(&mut model, change));
                assert_eq!(model, after, "round {round}, cut {cut}");
            }
        }
    }
}
