//! OpenVPN clients: asks every management socket of a directory at once, within one deadline.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

/// The name on a client's certificate: 1 to 64 characters, no control characters.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CommonName(String);

/// A connected client that has a common name and at least one address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Client {
    /// Name on its certificate (or user name), as OpenVPN reports it.
    pub common_name: String,
    /// Its IPv4 address inside the VPN.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address inside the VPN.
    pub ipv6: Option<Ipv6Addr>,
}

/// One process that could not be asked, and why.
#[derive(Debug)]
pub struct Failure {
    /// File name of the management socket in the OpenVPN directory.
    pub socket: String,
    /// Completes the sentence "OpenVPN management socket `socket` …".
    pub error: SocketError,
}

/// Why one conversation failed.
#[derive(Debug)]
pub enum SocketError {}

/// What went wrong with all of OpenVPN. Each variant names the directory or socket.
#[derive(Debug)]
pub enum Error {}

/// The clients of the processes that answered, and the processes that did not.
#[derive(Debug)]
pub struct Listing {
    /// Clients of all processes that answered.
    pub clients: Vec<Client>,
    /// Processes that could not be asked; never all of them (that is an [`Error`]).
    pub failed: Vec<Failure>,
}

/// All OpenVPN processes whose management sockets lie in one directory.
pub struct OpenVpn {
    directory: PathBuf,
}

impl OpenVpn {
    /// `directory` holds the management sockets, e.g. `/run/openvpn-server`. It is read at
    /// every call: processes may come and go.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }
    /// Where the management sockets lie.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
    /// Clients of all processes. Answers or fails by `deadline`.
    pub fn clients(&self, deadline: Instant) -> Result<Listing, Error> {
        let _ = deadline;
        Ok(Listing { clients: Vec::new(), failed: Vec::new() })
    }
    /// Disconnects all clients of that name from all processes, even when some processes
    /// fail. Returns how many were disconnected.
    pub fn disconnect(&self, name: &CommonName, deadline: Instant) -> Result<usize, Error> {
        let _ = (name, deadline);
        Ok(0)
    }
}

impl CommonName {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl FromStr for CommonName {
    type Err = &'static str;
    fn from_str(_: &str) -> Result<Self, &'static str> {
        Err("is not there yet")
    }
}
impl fmt::Display for SocketError {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}
impl fmt::Display for Error {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}
impl std::error::Error for Error {}
impl Error {
    /// Whether no process answered in time (as opposed to refused or failed).
    pub fn is_timeout(&self) -> bool {
        false
    }
}
