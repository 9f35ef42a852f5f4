//! Whatever pages a netlink dump has: a list that is made into pages comes out of them as it was, and
//! any pages are read as a slow parser reads them, or refused.
//!
//! An input that begins with a zero is one page; any other says how to make a list, cut it into pages
//! and change their bytes.
#![no_main]

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use libfuzzer_sys::arbitrary::{Result as Made, Unstructured};
use libfuzzer_sys::fuzz_target;
use vpn_daemon::wireguard::dump::Report;
use vpn_daemon::wireguard::{AllowedIp, Peer, Snapshot};

fuzz_target!(|bytes: &[u8]| {
    match bytes.split_first() {
        Some((0, page)) => drop(read(&[page.to_vec()])),
        Some((_, recipe)) => make(&mut Unstructured::new(recipe)).unwrap_or_default(),
        None => {}
    }
});

fn read(pages: &[Vec<u8>]) -> Option<Report> {
    let mut report = Report::default();
    let whole = pages.iter().try_for_each(|page| report.read_page(page)).is_ok();
    let report = whole.then_some(report);
    assert_eq!(report, common::dump(pages));
    report
}

/// Makes a list and its pages, and then changes some of their bytes.
fn make(recipe: &mut Unstructured) -> Made<()> {
    let mut snapshot = Snapshot { own_key: Some([0xee; 32].into()), peers: Vec::new() };
    let (mut pages, mut page) = (Vec::new(), attribute(4, &[0xee; 32]));
    let mut finish = |peers: &[u8], page: &mut Vec<u8>| {
        let body = [&[0, 1, 0, 0], &page[..], &attribute(8, peers)].concat();
        pages.push(message(0x1d, 2, &body));
        page.clear();
    };
    let mut peers = Vec::new();
    for number in 0..recipe.int_in_range(0..=8)? {
        let key = attribute(1, &[number; 32]);
        let [seconds, nanoseconds] =
            [recipe.arbitrary::<u32>()?, recipe.arbitrary()?].map(u64::from);
        let [rx_bytes, tx_bytes] = recipe.arbitrary()?;
        let time = [seconds.to_ne_bytes(), nanoseconds.to_ne_bytes()].concat();
        let [rx, tx] = [rx_bytes, tx_bytes].map(u64::to_ne_bytes);
        let mut head =
            [&*key, &attribute(6, &time), &attribute(7, &rx), &attribute(8, &tx)].concat();
        let (mut allowed_ips, mut nested) = (Vec::new(), Vec::new());
        for _ in 0..recipe.int_in_range(0..=4)? {
            let (v4, v6): (Option<[u8; 4]>, [u8; 16]) = recipe.arbitrary()?;
            let address = v4.map_or(IpAddr::from(v6), IpAddr::from);
            let octets = v4.as_ref().map_or(&v6[..], |v4| &v4[..]);
            let length = recipe.int_in_range(0..=if v4.is_some() { 32 } else { 128 })?;
            allowed_ips.push(AllowedIp::new(address, length).unwrap());
            nested.extend(attribute(0, &[attribute(3, &[length]), attribute(2, octets)].concat()));
            if recipe.ratio(1, 4)? {
                // The rest of it comes in the next page, with nothing else but its key.
                peers.extend(attribute(0, &[&*head, &attribute(9, &nested)].concat()));
                finish(&std::mem::take(&mut peers), &mut page);
                (head, nested) = (key.clone(), Vec::new());
            }
        }
        peers.extend(attribute(0, &[&*head, &attribute(9, &nested)].concat()));
        if recipe.ratio(1, 4)? {
            finish(&std::mem::take(&mut peers), &mut page);
        }
        let since = Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds);
        let last_handshake = (!since.is_zero()).then(|| SystemTime::UNIX_EPOCH + since);
        let public_key = [number; 32].into();
        snapshot.peers.push(Peer { public_key, allowed_ips, last_handshake, rx_bytes, tx_bytes });
    }
    finish(&peers, &mut page);
    assert!(!read(&pages).unwrap().complete, "without an end");
    let done = message(3, 2, &[0; 4]);
    match recipe.arbitrary()? {
        true => pages.push(done),
        false => pages.last_mut().unwrap().extend(done),
    }
    let interrupted = recipe.ratio(1, 8)?;
    if interrupted {
        let page = recipe.choose_index(pages.len())?;
        pages[page][6] |= 0x10;
    }
    assert_eq!(read(&pages), Some(Report { snapshot, interrupted, complete: true }));
    spoil(recipe, pages)
}

/// Changes some bytes of the pages, or leaves out the end of one.
fn spoil(recipe: &mut Unstructured, mut pages: Vec<Vec<u8>>) -> Made<()> {
    for _ in 0..recipe.int_in_range(0..=3)? {
        let page = recipe.choose_index(pages.len())?;
        let at = recipe.choose_index(pages[page].len())?;
        match recipe.arbitrary()? {
            Some(byte) => pages[page][at] = byte,
            None => pages[page].truncate(at),
        }
        read(&pages);
        read(&pages[..pages.len() - 1]);
    }
    Ok(())
}

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + payload.len()).unwrap();
    let mut bytes = [&length.to_ne_bytes(), &kind.to_ne_bytes(), payload].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + body.len()).unwrap().to_ne_bytes();
    [&length[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8], body].concat()
}
