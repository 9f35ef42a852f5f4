//! What the WireGuard backends speak of: device names, keys, allowed IPs and peers, checked at the edge.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::time::SystemTime;

use base64::Engine as _;
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;

/// The name of a network interface, e.g. `wg0`: 1 to 15 bytes, no `/`, no white space.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct DeviceName(pub(super) String);

/// The public key of a peer or device: 32 bytes, written as canonical base64 (44 characters).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PublicKey(pub(super) [u8; 32]);

/// `wg0`.
impl Default for DeviceName {
    fn default() -> Self {
        Self("wg0".to_owned())
    }
}

/// An allowed IP of a peer: a network address and its prefix length, host bits cleared.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct AllowedIp {
    pub(super) address: IpAddr,
    pub(super) prefix_len: u8,
}

/// A peer as the device knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Who the peer is.
    pub public_key: PublicKey,
    /// What it may send and is sent.
    pub allowed_ips: Vec<AllowedIp>,
    /// When the last handshake was; `None` for a peer never seen.
    pub last_handshake: Option<SystemTime>,
    /// Bytes received from the peer.
    pub rx_bytes: u64,
    /// Bytes sent to the peer.
    pub tx_bytes: u64,
}

// The errors complete a sentence that begins with the name of the parameter or flag.

impl FromStr for DeviceName {
    type Err = &'static str;
    /// The kernel's rule for names (`dev_valid_name`), within `IFNAMSIZ`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() || text.len() > 15 {
            return Err("must have 1 to 15 characters");
        }
        let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if text == "." || text == ".." || text.contains(forbidden) {
            return Err("must be the name of a network interface, such as wg0");
        }
        Ok(Self(text.to_owned()))
    }
}
impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<[u8; 32]> for PublicKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}
impl FromStr for PublicKey {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // `STANDARD` demands the padding and refuses stray bits before it.
        let bytes = STANDARD.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or("must be 32 bytes in base64 (44 characters, the last one `=`)")
    }
}
impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Base64Display::new(&self.0, &STANDARD), f)
    }
}
impl AllowedIp {
    /// Clears the host bits, as WireGuard does; `None` where the prefix is longer than the address.
    pub fn new(address: IpAddr, prefix_len: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(v4) => {
                let host_bits = 32_u32.checked_sub(prefix_len.into())?;
                let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
                Ipv4Addr::from_bits(v4.to_bits() & mask).into()
            }
            IpAddr::V6(v6) => {
                let host_bits = 128_u32.checked_sub(prefix_len.into())?;
                let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
                Ipv6Addr::from_bits(v6.to_bits() & mask).into()
            }
        };
        Some(Self { address, prefix_len })
    }
}
impl FromStr for AllowedIp {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const MALFORMED: &str =
            "must be an address and a prefix length, such as 10.0.0.1/32 or fd00::1/128";
        let (address, prefix_len) = text.split_once('/').ok_or(MALFORMED)?;
        let address: IpAddr = address.parse().map_err(|_| MALFORMED)?;
        // std's integers also take a sign and leading zeros.
        let plain = prefix_len == "0" || !prefix_len.starts_with(['0', '+', '-']);
        let prefix_len = prefix_len.parse().ok().filter(|_| plain).ok_or(MALFORMED)?;
        Self::new(address, prefix_len)
            .ok_or("must have a prefix length of at most 32 (IPv4) or 128 (IPv6)")
    }
}
impl fmt::Display for AllowedIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_keys() {
        let text = "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=";
        let key: PublicKey = text.parse().unwrap();
        assert_eq!((key.0[0], key.to_string().as_str()), (0xd1, text));
        for malformed in [
            "",
            "=",
            "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ", // not padded
            "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkR=", // stray bits
            "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXg==", // 31 bytes
            "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQA", // 33 bytes
            "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXk_=", // URL alphabet
            " 0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=",
            "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=\n",
            "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ==",
        ] {
            assert!(malformed.parse::<PublicKey>().is_err(), "{malformed:?}");
        }
    }

    #[test]
    fn allowed_ips() {
        for (text, canonical) in [
            ("10.43.43.2/32", "10.43.43.2/32"),
            ("10.43.43.2/24", "10.43.43.0/24"),
            ("255.255.255.255/0", "0.0.0.0/0"),
            ("255.255.255.255/1", "128.0.0.0/1"),
            ("fd43::2/128", "fd43::2/128"),
            ("FD43:0:0::0002/127", "fd43::2/127"),
            ("ffff::1/0", "::/0"),
            ("::ffff:10.0.0.1/128", "::ffff:10.0.0.1/128"),
        ] {
            assert_eq!(text.parse::<AllowedIp>().unwrap().to_string(), canonical);
        }
        for malformed in [
            "",
            "/",
            "10.0.0.1",
            "10.0.0.1/",
            "/32",
            "10.0.0.1/33",
            "fd43::/129",
            "10.0.0.1/+1",
            "10.0.0.1/-1",
            "10.0.0.1/08",
            "10.0.0.1/00",
            "10.0.0.1/256",
            "10.0.0.1/99999999999",
            "10.0.0.1/32/32",
            "10.0.0/24",
            "10.0.0.01/32",
            "0x0a.0.0.1/32",
            "10.0.0.1/32 ",
            " 10.0.0.1/32",
            "10.0.0.1 /32",
            "fe80::1%eth0/64",
            "fe80::1%1/64",
            "[fd43::1]/64",
            "fd43:::1/64",
            "host/32",
            "10.0.0.1/٣",
        ] {
            assert!(malformed.parse::<AllowedIp>().is_err(), "{malformed:?}");
        }
    }

    #[test]
    fn device_names() {
        for name in ["wg0", "w", "wg-default.15by", "tun_1@x", "wg+"] {
            assert_eq!(name.parse::<DeviceName>().unwrap().0, name);
        }
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "wg 0",
            "wg\t",
            "wg0\n",
            "wg\0",
            "a:b",
            "sixteen-bytes-xx",
            "wg\u{a0}",
        ] {
            assert!(name.parse::<DeviceName>().is_err(), "{name:?}");
        }
    }
}
