//! What several oracles share: slow, obvious, and none of the daemon's own code.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, SystemTime};

use vpn_daemon::openvpn::Client;
use vpn_daemon::wireguard::dump::Report;
use vpn_daemon::wireguard::{AllowedIp, Peer, Snapshot};

/// Cuts `bytes` into at most so many pieces; `seed` says where.
pub fn pieces(bytes: &[u8], seed: u8, most: usize) -> Vec<&[u8]> {
    let (mut rest, mut pieces) = (bytes, Vec::new());
    for number in 1..most {
        let length = 1 + usize::from(seed) * number % 127;
        let Some((piece, behind)) = rest.split_at_checked(length) else { break };
        pieces.push(piece);
        rest = behind;
    }
    pieces.push(rest);
    pieces
}

/// The clients with a name in a reply to `status 3`, which ends with the line `END`; `None` where that
/// does not come, or something else is wrong.
pub fn status<'a>(lines: impl IntoIterator<Item = &'a str>) -> Option<Vec<Client<'a>>> {
    let (mut names, mut clients) = (None, Vec::new());
    for line in lines {
        let fields: Vec<_> = line.split('\t').collect();
        match &fields[..] {
            ["END"] => return names.map(|_| clients),
            [_] => return None,
            ["HEADER", "CLIENT_LIST", columns @ ..] if !columns.is_empty() => {
                if !["Common Name", "Virtual Address"].iter().all(|name| columns.contains(name)) {
                    return None;
                }
                names = Some(columns.to_vec());
            }
            ["CLIENT_LIST", row @ ..] if !row.is_empty() => {
                let names = names.as_ref()?;
                let field = |name| match names.iter().position(|column| *column == name) {
                    Some(at) => row.get(at).copied(),
                    None => Some(""),
                };
                let (ipv4, ipv6) = (field("Virtual Address")?, field("Virtual IPv6 Address")?);
                let addresses = ipv4.is_empty() || ipv4.parse::<Ipv4Addr>().is_ok();
                if !addresses || !(ipv6.is_empty() || ipv6.parse::<Ipv6Addr>().is_ok()) {
                    return None;
                }
                let id = field("Client ID")?;
                let id = if id.is_empty() { None } else { Some(id.parse().ok()?) };
                let common_name = field("Common Name")?;
                if common_name != "" && common_name != "UNDEF" {
                    clients.push(Client { common_name, ipv4, ipv6, id });
                }
            }
            _ => {}
        }
    }
    None
}

/// The 32 bytes that canonical base64 stands for, bit by bit.
pub fn public_key(text: &str) -> Option<[u8; 32]> {
    const DIGITS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bits = String::new();
    for digit in text.strip_suffix('=')?.chars() {
        bits += &format!("{:06b}", DIGITS.find(digit)?);
    }
    let (key, stray) = bits.split_at_checked(256)?;
    let byte = |at| u8::from_str_radix(&key[8 * at..8 * at + 8], 2).unwrap();
    (stray == "00").then(|| std::array::from_fn(byte))
}

/// `10.0.0.9/24` as `10.0.0.0/24`.
pub fn allowed_ip(text: &str) -> Option<String> {
    let (address, text) = text.split_once('/')?;
    let length = (0..=128_u8).find(|length| length.to_string() == text)?;
    network(address.parse().ok()?, length)
}

/// An address and its prefix length, the host bits cleared one by one.
pub fn network(address: IpAddr, length: u8) -> Option<String> {
    let mut octets = match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let (start, end) = (usize::from(length), octets.len() * 8);
    if start > end {
        return None;
    }
    for bit in start..end {
        octets[bit / 8] &= !(0x80 >> (bit % 8));
    }
    let v4 = <[u8; 4]>::try_from(&octets[..]).map(IpAddr::from);
    let address = v4.or_else(|_| <[u8; 16]>::try_from(&octets[..]).map(IpAddr::from)).unwrap();
    Some(format!("{address}/{length}"))
}

/// What the pages of a netlink dump say; `None` where anything is malformed or a refusal.
pub fn dump(pages: &[Vec<u8>]) -> Option<Report> {
    let mut report = Report::default();
    let Report { snapshot: Snapshot { own_key, peers }, interrupted, complete } = &mut report;
    for (head, body) in
        pages.iter().map(|page| records(page, 16)).collect::<Option<Vec<_>>>()?.concat()
    {
        *interrupted |= u16::from_ne_bytes([head[6], head[7]]) & 0x10 != 0;
        match u16::from_ne_bytes([head[4], head[5]]) {
            3 if body.get(..4)? == [0; 4] => *complete = true,
            2 | 3 => return None,
            _ => {
                for (kind, payload) in attributes(body.get(4..)?)? {
                    match kind {
                        4 => *own_key = Some(<[u8; 32]>::try_from(payload).ok()?.into()),
                        8 => {
                            for (_, peer) in attributes(payload)? {
                                let peer = dumped_peer(peer)?;
                                match peers.last_mut() {
                                    Some(last) if last.public_key == peer.public_key => {
                                        last.allowed_ips.extend(peer.allowed_ips);
                                    }
                                    _ => peers.push(peer),
                                }
                            }
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    Some(report)
}

fn dumped_peer(bytes: &[u8]) -> Option<Peer> {
    let (mut key, mut allowed_ips, mut last_handshake) = (None, Vec::new(), None);
    let (mut rx_bytes, mut tx_bytes) = (0, 0);
    let number = |bytes: &[u8]| Some(u64::from_ne_bytes(bytes.try_into().ok()?));
    for (kind, payload) in attributes(bytes)? {
        match kind {
            1 => key = Some(<[u8; 32]>::try_from(payload).ok()?.into()),
            6 => {
                let (seconds, nanoseconds) = (payload.get(..8)?, payload.get(8..)?);
                let since = Duration::from_secs(number(seconds)?)
                    .checked_add(Duration::from_nanos(number(nanoseconds)?))?;
                let time = SystemTime::UNIX_EPOCH.checked_add(since);
                last_handshake = if since.is_zero() { None } else { time };
            }
            7 => rx_bytes = number(payload)?,
            8 => tx_bytes = number(payload)?,
            9 => {
                for (_, ip) in attributes(payload)? {
                    let ip = attributes(ip)?;
                    let (_, address) = ip.iter().rfind(|(kind, _)| *kind == 2)?;
                    let (_, length) =
                        ip.iter().rfind(|(kind, length)| *kind == 3 && length.len() == 1)?;
                    let v4 = <[u8; 4]>::try_from(*address).map(IpAddr::from);
                    let address = v4.or(<[u8; 16]>::try_from(*address).map(IpAddr::from)).ok()?;
                    allowed_ips.push(network(address, length[0])?.parse::<AllowedIp>().ok()?);
                }
            }
            _ => {}
        }
    }
    Some(Peer { public_key: key?, allowed_ips, last_handshake, rx_bytes, tx_bytes })
}

fn attributes(bytes: &[u8]) -> Option<Vec<(u16, &[u8])>> {
    let kind = |head: &[u8]| u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
    Some(records(bytes, 4)?.into_iter().map(|(head, payload)| (kind(head), payload)).collect())
}

/// Header and payload of each record: messages have a header of 16 bytes, attributes one of 4.
fn records(bytes: &[u8], header: usize) -> Option<Vec<(&[u8], &[u8])>> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let head = bytes.get(at..at + header)?;
        let length = match header {
            16 => u32::from_ne_bytes(head[..4].try_into().unwrap()) as usize,
            _ => u16::from_ne_bytes(head[..2].try_into().unwrap()).into(),
        };
        found.push((head, bytes.get(at + header..at + length)?));
        at += length.next_multiple_of(4);
    }
    Some(found)
}
