//! Whatever a userspace device answers to `get=1`: it is read whole, as a slow parser reads it, or
//! refused, however it is cut into pieces.
#![no_main]

use std::collections::VecDeque;
use std::io::{self, Read};
use std::time::{Duration, SystemTime};

use libfuzzer_sys::fuzz_target;
use vpn_daemon::wireguard::userspace::parse_device;
use vpn_daemon::wireguard::{Peer, PublicKey, Snapshot};

/// Gives one piece at a time.
struct Pieces<'a>(VecDeque<&'a [u8]>);

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(piece) = self.0.front_mut() else { return Ok(0) };
        let count = piece.read(buffer)?;
        if piece.is_empty() {
            self.0.pop_front();
        }
        Ok(count)
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((seed, answer)) = bytes.split_first() else { return };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let whole = parse_device(answer, now).ok();
    let pieces = common::pieces(answer, *seed, 40).into_iter().filter(|piece| !piece.is_empty());
    assert_eq!(parse_device(Pieces(pieces.collect()), now).ok(), whole, "in pieces");
    assert_eq!(whole, slow(answer, now));
});

/// The lines up to the empty one, of which one is `errno=0`.
fn slow(answer: &[u8], now: SystemTime) -> Option<Snapshot> {
    let (mut own_key, mut peers, mut has_status) = (None, Vec::<Slow>::new(), false);
    for (number, line) in answer.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.is_empty() {
            let peers = peers.iter().map(|peer| peer.known(own_key.is_some(), now));
            let peers = peers.collect::<Option<_>>()?;
            return has_status.then_some(Snapshot { own_key, peers });
        }
        let (key, value) = line.split_once('=')?;
        let (long, value) = (value.len() > 18, value.trim_end());
        let count = || value.parse::<u64>().ok();
        match key {
            "errno" => has_status = (value == "0").then_some(true)?,
            // boringtun alone tells it, before all else.
            "own_public_key" if number == 0 => own_key = Some(hex(value)?),
            "own_public_key" => return None,
            "public_key" => peers.push(Slow::new(hex(value)?)),
            "allowed_ip" => peers.last_mut()?.allowed_ips.push(value),
            "rx_bytes" => peers.last_mut()?.rx_bytes = count()?,
            "tx_bytes" => peers.last_mut()?.tx_bytes = count()?,
            "last_handshake_time_sec" if long => return None,
            "last_handshake_time_sec" => peers.last_mut()?.seconds = count()?,
            "last_handshake_time_nsec" => peers.last_mut()?.nanoseconds = value.parse().ok()?,
            _ => {}
        }
    }
    None
}

struct Slow<'a> {
    key: PublicKey,
    allowed_ips: Vec<&'a str>,
    rx_bytes: u64,
    tx_bytes: u64,
    seconds: u64,
    nanoseconds: u32,
}

impl Slow<'_> {
    fn new(key: PublicKey) -> Self {
        let allowed_ips = Vec::new();
        Self { key, allowed_ips, rx_bytes: 0, tx_bytes: 0, seconds: 0, nanoseconds: 0 }
    }

    /// `None` where an allowed IP is impossible.
    fn known(&self, is_age: bool, now: SystemTime) -> Option<Peer> {
        let ip = |text: &&str| {
            let (address, length) = text.split_once('/')?;
            // It may have a sign, and zeros before it.
            common::network(address.parse().ok()?, length.parse().ok()?)?.parse().ok()
        };
        let time =
            Duration::from_secs(self.seconds) + Duration::from_nanos(self.nanoseconds.into());
        let last_handshake = match (time.is_zero(), is_age) {
            (true, _) => None,
            (false, true) => now.checked_sub(time),
            (false, false) => SystemTime::UNIX_EPOCH.checked_add(time),
        };
        Some(Peer {
            public_key: self.key,
            allowed_ips: self.allowed_ips.iter().map(ip).collect::<Option<_>>()?,
            last_handshake,
            rx_bytes: self.rx_bytes,
            tx_bytes: self.tx_bytes,
        })
    }
}

fn hex(text: &str) -> Option<PublicKey> {
    let digit = |at| text.chars().nth(at)?.to_digit(16);
    let byte = |at| u8::try_from(digit(2 * at)? * 16 + digit(2 * at + 1)?).ok();
    let key: Option<Vec<u8>> = (0..text.chars().count().div_ceil(2)).map(byte).collect();
    <[u8; 32]>::try_from(key?).ok().map(PublicKey::from)
}
