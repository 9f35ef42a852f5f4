//! WireGuard peers: the types, and the choice between kernel and userspace device.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::{Instant, SystemTime};

/// The public key of a peer or device: 32 bytes, written as canonical base64 (44 characters).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; 32]);

/// An allowed IP of a peer: a network address and its prefix length, host bits cleared.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct AllowedIp {
    address: IpAddr,
    prefix_len: u8,
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

/// Why text is no public key or allowed IP: a sentence that completes "`public_key` …".
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseError(pub &'static str);

/// What went wrong with the device. Each variant names it.
#[derive(Debug)]
pub enum Error {}

/// The one WireGuard device that the daemon manages.
pub struct WireGuard {
    device: String,
}

impl WireGuard {
    /// `device` is the name of the network interface, e.g. `wg0`. Nothing is opened yet:
    /// the device may come and go while the daemon runs.
    pub fn new(device: String) -> Self {
        Self { device }
    }
    /// Name of the device.
    pub fn device(&self) -> &str {
        &self.device
    }
    /// All peers. Answers or fails by `deadline`.
    pub fn peers(&self, deadline: Instant) -> Result<Vec<Peer>, Error> {
        let _ = deadline;
        Ok(Vec::new())
    }
    /// Adds the peer, or replaces the allowed IPs of the one that exists.
    pub fn add_peer(
        &self,
        key: &PublicKey,
        allowed_ips: &[AllowedIp],
        deadline: Instant,
    ) -> Result<(), Error> {
        let _ = (key, allowed_ips, deadline);
        Ok(())
    }
    /// Removes the peer and returns it with its final counters; `None` where there was none.
    pub fn remove_peer(&self, key: &PublicKey, deadline: Instant) -> Result<Option<Peer>, Error> {
        let _ = (key, deadline);
        Ok(None)
    }
}

impl PublicKey {
    /// The key's 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}
impl From<[u8; 32]> for PublicKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}
impl FromStr for PublicKey {
    type Err = ParseError;
    fn from_str(_: &str) -> Result<Self, ParseError> {
        Err(ParseError("is not there yet"))
    }
}
impl fmt::Display for PublicKey {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}
impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}
impl FromStr for AllowedIp {
    type Err = ParseError;
    fn from_str(_: &str) -> Result<Self, ParseError> {
        Err(ParseError("is not there yet"))
    }
}
impl fmt::Display for AllowedIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}
impl fmt::Display for Error {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}
impl std::error::Error for Error {}
impl Error {
    /// Whether the device did not answer in time (as opposed to refused or failed).
    pub fn is_timeout(&self) -> bool {
        false
    }
}
