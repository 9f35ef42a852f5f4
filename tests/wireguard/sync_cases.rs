//! Bringing devices to a wanted list of peers, for every implementation.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vpn_daemon::wireguard::{AllowedIp, Peer, PublicKey, Synced, Wanted, WantedBuilder};

use crate::Case;
use crate::cases::{block, ips, key, texts};
use crate::common::{Answer, Daemon};
use crate::devices::{Device, Kind, soon};

/// For every implementation.
pub const COMMON: &[Case] = &[
    ("sync adds, updates and removes", adds_updates_removes),
    ("sync moves allowed IPs between peers", moves_allowed_ips),
    ("sync of one peer with 3,000 allowed IPs", many_allowed_ips),
    ("sync refuses the device's own key", own_key),
    ("sync of 2,000 peers that is cut and begun again", cut_and_begun_again),
    ("sync over HTTP", over_http),
];

type Peers = Vec<(PublicKey, Vec<AllowedIp>)>;

fn wanted(peers: &Peers) -> Wanted {
    let mut builder = WantedBuilder::default();
    for (key, allowed_ips) in peers {
        allowed_ips.iter().for_each(|ip| builder.allowed_ip(*ip));
        builder.peer(*key);
    }
    builder.build().unwrap()
}

/// As `wg` sees the device.
fn seen(device: &Device) -> BTreeMap<String, BTreeSet<String>> {
    device.dump().into_iter().map(|row| (row.public_key, row.allowed_ips)).collect()
}

fn expected(peers: &Peers) -> BTreeMap<String, BTreeSet<String>> {
    peers.iter().map(|(key, ips)| (key.to_string(), texts(ips))).collect()
}

/// Brings the device to these peers, and asserts that it is there and that a dry run before told
/// the same.
fn sync(device: &Device, peers: &Peers) -> Synced {
    let before = seen(device);
    let run = |dry_run| {
        let mut synced = device.wireguard.sync_peers(wanted(peers), dry_run, soon()).unwrap();
        // wireguard-go gives its peers in another order each time.
        let mut removed: Vec<_> = synced.removed.iter().map(Peer::into_owned).collect();
        removed.sort_by_key(|peer| peer.public_key);
        removed.iter_mut().for_each(|peer| peer.allowed_ips.to_mut().sort_unstable());
        synced.removed = removed.into_iter().collect();
        synced
    };
    let dry = run(true);
    assert_eq!(seen(device), before, "a dry run changes nothing");
    let synced = run(false);
    assert_eq!(synced, dry);
    assert_eq!(seen(device), expected(peers));
    device.check();
    assert_eq!(run(false), Synced { unchanged: peers.len(), ..Synced::default() });
    synced
}

fn adds_updates_removes(kind: Kind) {
    let device = Device::new(kind);
    let first: Peers = vec![
        (key(1), ips(&["10.1.0.1/32", "fd00::1/128"])),
        (key(2), ips(&["10.1.0.2/32"])),
        (key(3), ips(&[])),
        (key(4), ips(&["10.1.0.4/32"])),
    ];
    let synced = sync(&device, &first);
    assert_eq!(synced.added, [key(1), key(2), key(3), key(4)]);
    assert_eq!((synced.updated.len(), synced.removed.len(), synced.unchanged), (0, 0, 0));

    let second: Peers = vec![
        (key(5), ips(&["10.1.0.4/32"])),
        (key(3), ips(&["10.1.0.3/32"])),
        (key(2), ips(&[])),
        (key(1), ips(&["fd00::1/128", "10.1.0.1/32"])),
    ];
    let synced = sync(&device, &second);
    assert_eq!((synced.added, synced.unchanged), (vec![key(5)], 1));
    assert_eq!(synced.updated, [key(3), key(2)]);
    assert_eq!(synced.removed.len(), 1);
    let removed = synced.removed.get(0).unwrap();
    assert_eq!((removed.public_key, removed.allowed_ips.to_vec()), (key(4), ips(&["10.1.0.4/32"])));

    let synced = sync(&device, &vec![]);
    assert_eq!(synced.removed.len(), 4);
}

fn moves_allowed_ips(kind: Kind) {
    let device = Device::new(kind);
    let [a, b, c] = [["10.1.0.1/32"], ["10.1.0.2/32"], ["10.1.0.0/24"]].map(|list| ips(&list));
    let lists = [&a, &b, &c];
    // Each order of three allowed IPs over three peers, one after another.
    for [one, two, three] in [[0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 2, 1], [1, 2, 0], [2, 0, 1]] {
        sync(
            &device,
            &vec![
                (key(1), lists[one].clone()),
                (key(2), lists[two].clone()),
                (key(3), lists[three].clone()),
            ],
        );
    }
    sync(&device, &vec![(key(2), [a.clone(), b.clone()].concat()), (key(1), c.clone())]);
    sync(&device, &vec![(key(1), [a, c].concat()), (key(2), b), (key(3), vec![])]);
}

fn many_allowed_ips(kind: Kind) {
    let device = Device::new(kind);
    let neighbours = || vec![(key(1), ips(&["fd00::1/128"])), (key(3), ips(&["fd00::3/128"]))];
    sync(&device, &[neighbours(), vec![(key(2), block(0, 3000))]].concat());
    sync(&device, &[neighbours(), vec![(key(2), block(1, 3000))]].concat());
}

fn own_key(kind: Kind) {
    let device = Device::new(kind);
    let before: Peers = vec![(key(1), ips(&["10.1.0.1/32"]))];
    sync(&device, &before);
    let list = vec![(device.public_key, ips(&["10.1.0.2/32"]))];
    let result = device.wireguard.sync_peers(wanted(&list), false, soon());
    let error = result.unwrap_err().to_string();
    assert!(error.contains(&device.public_key.to_string()), "{error}");
    // wireguard-go does not tell its key, and ignores such a peer in silence.
    if kind != Kind::WireguardGo {
        assert!(error.ends_with("nothing was changed"), "{error}");
        assert_eq!(seen(&device), expected(&before));
    }
}

fn cut_and_begun_again(kind: Kind) {
    let device = Device::new(kind);
    let peers = |numbers: std::ops::Range<u32>, shift: u32| -> Peers {
        numbers.map(|n| (key(n), block((n + shift) * 2, 2))).collect()
    };
    sync(&device, &peers(0..2000, 0));
    // A third goes, a third comes, and what stays takes the allowed IPs of its neighbours.
    let goal = peers(700..2700, 1);
    let mut time = Duration::from_millis(60);
    let mut left = usize::MAX;
    loop {
        match device.wireguard.sync_peers(wanted(&goal), false, Instant::now() + time) {
            Ok(_) => break,
            Err(error) => {
                assert!(error.cause.is_timeout(), "{error}");
                assert!(error.applied <= error.changes && error.changes <= left, "{error}");
                if error.changes > 0 {
                    left = error.changes - error.applied;
                    assert!(error.to_string().contains("changes are known to be applied"));
                }
            }
        }
        time = time * 3 / 2;
        assert!(time < Duration::from_secs(60), "{kind}: no end");
    }
    assert_eq!(seen(&device), expected(&goal));
    sync(&device, &goal);
}

fn over_http(kind: Kind) {
    let device = Device::new(kind);
    let daemon = Daemon::start(&["-wg-device", &device.name]);
    let post = |query: &str, body: &Value| -> Answer {
        let headers = ["Content-Type: application/json"];
        let target = format!("/w/sync_peers{query}");
        daemon.call("POST", &target, &headers, body.to_string().as_bytes())
    };
    let peer =
        |n: u32, list: &[&str]| json!({"public_key": key(n).to_string(), "ip_net": list, "x": 1});
    let empty = json!({"added": [], "updated": [], "removed": [], "unchanged": 0});

    let list = json!({"peer_list": [peer(1, &["10.1.0.1/32"]), peer(2, &["10.1.0.2/32"])]});
    let keys = [key(1), key(2)].map(|key| key.to_string());
    let mut synced = empty.clone();
    synced["added"] = json!(keys);
    let dry = post("?dry_run=yes", &list);
    assert_eq!((dry.status, dry.json()), (200, synced.clone()));
    assert!(seen(&device).is_empty());
    let answer = post("", &list);
    assert_eq!((answer.status, answer.json()), (200, synced));
    let last = keys.last().unwrap();
    daemon.wait_for_log(&format!("{last} on {}: added, asked by 127.0.0.1", device.name));

    // The list as the daemon itself gives it changes nothing.
    let listed = daemon.get("/w/peer_list?show_all=yes").json();
    let mut unchanged = empty.clone();
    unchanged["unchanged"] = json!(2);
    assert_eq!(post("?dry_run=no", &listed).json(), unchanged);

    // What is wrong anywhere is said before anything is changed.
    let before = seen(&device);
    for (bad, part) in [
        (json!({"peer_list": [peer(3, &[]), peer(1, &[]), peer(1, &[])]}), &*keys[0]),
        (
            json!({"peer_list": [peer(3, &["10.9.0.0/16"]), peer(4, &["10.9.1.1/16"])]}),
            "10.9.0.0/16",
        ),
        (json!({"peer_list": [peer(3, &[]), peer(4, &["10.9.0.1"])]}), "10.9.0.1"),
        (json!({}), "`peer_list` is missing"),
    ] {
        let answer = post("", &bad);
        assert_eq!(answer.status, 400);
        assert!(answer.error().contains(part), "{answer:?}");
        assert_eq!(seen(&device), before);
    }
    if kind != Kind::WireguardGo {
        let own = json!({"public_key": device.public_key.to_string(), "ip_net": []});
        let answer = post("?dry_run=yes", &json!({ "peer_list": [own] }));
        assert_eq!(answer.status, 400);
        assert!(answer.error().contains(&device.public_key.to_string()), "{answer:?}");
    }

    let answer = post("", &json!({"peer_list": [peer(2, &[]), peer(3, &["10.1.0.2/32"])]}));
    assert_eq!(answer.json()["added"], json!([key(3).to_string()]));
    assert_eq!(answer.json()["updated"], json!([keys[1]]));
    let removed = &answer.json()["removed"];
    let before = listed["peer_list"].as_array().unwrap().iter();
    let before: Vec<_> = before.filter(|peer| peer["public_key"] == *keys[0]).collect();
    assert_eq!(*removed, json!(before));
    daemon.wait_for_log(&format!("peer {} on {}: removed after 0 bytes in", keys[0], device.name));
    assert_eq!(post("", &json!({"peer_list": []})).json()["removed"].as_array().unwrap().len(), 2);
    assert!(seen(&device).is_empty());
}
