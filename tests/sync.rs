//! `POST /w/sync_peers` over real HTTP: what is refused, and what the longest lists cost. How devices
//! take it is told by the cases of `tests/wireguard`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

mod common;
#[path = "common/device.rs"]
mod device;

use std::fmt::Write as _;

use common::{Answer, Daemon, wait_until};
use device::FakeDevice;

const JSON: &str = "Content-Type: application/json";

fn post(daemon: &Daemon, query: &str, body: &str) -> Answer {
    daemon.call("POST", &format!("/w/sync_peers{query}"), &[JSON], body.as_bytes())
}

#[test]
fn refusals() {
    let daemon = Daemon::start(&[]);
    let answer = daemon.post("/w/sync_peers", &[("peer_list", "")]);
    assert_eq!((answer.status, answer.error().contains("application/json")), (415, true));
    let answer = daemon.get("/w/sync_peers");
    assert_eq!((answer.status, answer.header("Allow")), (405, Some("POST")));
    for (query, body, status, part) in [
        ("", "{}", 400, "missing field `peer_list`"),
        ("?dry_run=maybe", r#"{"peer_list":[]}"#, 400, "`dry_run` must be `yes` or `no`"),
        ("", r#"{"peer_list":[{"public_key":"short","ip_net":[]}]}"#, 400, "must be 32 bytes"),
        // A list that is good comes as far as the device, which does not exist.
        ("", r#"{"peer_list":[]}"#, 502, "with -wg-device; nothing was changed"),
    ] {
        let answer = post(&daemon, query, body);
        assert_eq!((answer.status, answer.error().contains(part)), (status, true), "{answer:?}");
    }
}

#[test]
fn a_hundred_thousand_peers_are_listed_in_bounded_memory() {
    const PEERS: u32 = 100_000;
    let mut peers = String::new();
    for number in 0..PEERS {
        let [_, b, c, d] = number.to_be_bytes();
        writeln!(peers, "public_key={number:064x}\nallowed_ip=10.{b}.{c}.{d}/32").unwrap();
        let (high, low) = (number >> 16, number & 0xffff);
        writeln!(peers, "allowed_ip=fd00::{high:x}:{low:x}/128").unwrap();
    }
    let device = FakeDevice::start(peers + "errno=0\n\n");
    let daemon = Daemon::start(&["-wg-device", &device.name]);
    // A build for tests on a busy machine may miss the deadline.
    let in_time = |ask: &dyn Fn() -> Answer| {
        (0..30).map(|_| ask()).find(|answer| answer.status == 200).expect("an answer in time").body
    };
    let list = || in_time(&|| daemon.get("/w/peer_list?show_all=yes"));
    for _ in 0..4 {
        assert_eq!(list().matches("\"public_key\":").count(), PEERS as usize);
    }
    let body = list();
    let nothing = format!(r#"{{"added":[],"updated":[],"removed":[],"unchanged":{PEERS}}}"#);
    assert_eq!(in_time(&|| post(&daemon, "", &body)), nothing);
    let peak = daemon.status("VmHWM");
    assert!(peak < 100 * 1024, "at the peak {peak} KiB");
    wait_until("it is freed after the answer", || daemon.status("VmRSS") < 25 * 1024);
    println!("{PEERS} peers: {peak} KiB at the peak, {} KiB afterwards", daemon.status("VmRSS"));
}
