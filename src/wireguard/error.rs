//! What can go wrong with the device, each as a whole sentence that names it and says what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use super::{DeviceName, PublicKey, Synced};

/// What went wrong with the device. Each variant names it, or the path of its socket.
#[derive(Debug)]
pub enum Error {
    /// There is neither a kernel device of that name nor a userspace socket.
    NoDevice(DeviceName),
    /// The kernel's device may not be read or changed.
    NoPermission(DeviceName),
    /// An interface of that name exists and is something else, and has no userspace socket.
    NotWireGuard(DeviceName),
    /// The device did not answer before the deadline, or earlier requests still wait for it.
    Timeout(DeviceName),
    /// Every dump was disturbed: another program changes the device all the time.
    Disturbed(DeviceName),
    /// The peer to be added has the key of the device itself.
    OwnKey(DeviceName, PublicKey),
    /// The device said that it had added the peer, and does not list it.
    NotAdded(DeviceName, PublicKey),
    /// The kernel refused or failed.
    Kernel(DeviceName, Errno),
    /// This process is not as it should be.
    Internal(DeviceName, String),
    /// The userspace process cannot be spoken to.
    Socket(PathBuf, io::Error),
    /// The userspace process did not answer before the deadline.
    SocketTimeout(PathBuf),
    /// The userspace process refused, with this error number.
    Refused(PathBuf, i32),
    /// The userspace process answered with something other than the protocol.
    Reply(PathBuf, String),
}

impl Error {
    /// Whether the device did not answer in time (as opposed to refused or failed).
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout(_) | Self::SocketTimeout(_))
    }
}

/// Why a synchronisation failed, and how far it had come.
#[derive(Debug)]
pub struct SyncError {
    /// What went wrong.
    pub cause: Error,
    /// How many peers had to be changed; 0 where that is not known.
    pub changes: usize,
    /// How many of them are known to be changed. The device may have taken a few more.
    pub applied: usize,
    /// Those in detail, where the device said so in time.
    pub done: Box<Synced>,
}

impl fmt::Display for SyncError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cause, changes, applied, .. } = self;
        match changes {
            0 => write!(f, "{cause}; nothing was changed"),
            _ => write!(
                f,
                "{cause}; {applied} of {changes} changes are known to be applied, \
                 the same call again does the rest"
            ),
        }
    }
}
impl std::error::Error for SyncError {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDevice(device) => write!(
                f,
                "WireGuard device {device} does not exist: create it (`ip link add {device} type wireguard`, \
                 wg-quick, wireguard-go or boringtun) or name another one with -wg-device"
            ),
            Self::NoPermission(device) => write!(
                f,
                "WireGuard device {device} may not be managed by this process: give it the capability CAP_NET_ADMIN"
            ),
            Self::NotWireGuard(device) => write!(
                f,
                "network interface {device} is not a WireGuard device, and {} does not exist: \
                 name a WireGuard device with -wg-device",
                super::userspace::socket_path(device).display()
            ),
            Self::Timeout(device) => {
                write!(f, "WireGuard device {device} did not answer in time: try again")
            }
            Self::Disturbed(device) => write!(
                f,
                "WireGuard device {device} could not be read: another program keeps changing it; try again"
            ),
            Self::OwnKey(device, key) => {
                write!(
                    f,
                    "WireGuard device {device} cannot have the peer {key}: it is the device's own public key"
                )
            }
            Self::NotAdded(device, key) => {
                write!(
                    f,
                    "WireGuard device {device} did not take the peer {key}: is it the device's own public key?"
                )
            }
            Self::Kernel(device, errno) => {
                write!(f, "WireGuard device {device} failed: {}", errno.desc())
            }
            Self::Internal(device, reason) => {
                write!(f, "WireGuard device {device} could not be used: {reason}")
            }
            Self::Socket(path, error) => {
                let path = path.display();
                match error.kind() {
                    io::ErrorKind::ConnectionRefused => write!(
                        f,
                        "WireGuard socket {path} has no process behind it: start the device's process, or remove the file"
                    ),
                    io::ErrorKind::PermissionDenied => write!(
                        f,
                        "WireGuard socket {path} may not be used by this process: \
                         give its user access to the socket and its directory"
                    ),
                    _ => write!(f, "WireGuard socket {path} failed: {error}"),
                }
            }
            Self::SocketTimeout(path) => {
                write!(f, "WireGuard socket {} did not answer in time: try again", path.display())
            }
            Self::Refused(path, errno) => write!(
                f,
                "WireGuard socket {} refused the request: {}",
                path.display(),
                Errno::from_raw(*errno).desc()
            ),
            Self::Reply(path, reason) => {
                write!(
                    f,
                    "WireGuard socket {} does not speak WireGuard's protocol: {reason}",
                    path.display()
                )
            }
        }
    }
}
impl std::error::Error for Error {}
