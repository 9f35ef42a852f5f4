//! The WireGuard device: kernel or user space, its peers, and whether it is up.

use std::fs;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use super::Entry;
use crate::wireguard::{DeviceName, Error, WireGuard};

/// For the whole list of peers.
const TIME: Duration = Duration::from_secs(5);

const SUBJECT: &str = "WireGuard";

pub(super) fn look(device: &DeviceName) -> Vec<Entry> {
    match WireGuard::new(device.clone()).peers(Instant::now() + TIME) {
        Ok(peers) => {
            let file = |name| fs::read_to_string(format!("/sys/class/net/{device}/{name}"));
            let kernel = file("uevent").is_ok_and(|text| text.contains("DEVTYPE=wireguard"));
            let kind = if kernel { "kernel" } else { "user space" };
            let plural = if peers.len() == 1 { "" } else { "s" };
            let seen = format!("{device} ({kind}) has {} peer{plural}", peers.len());
            let mut entries = vec![Entry::ok(SUBJECT, seen)];
            if file("flags").is_ok_and(|flags| !is_up(&flags)) {
                let seen = format!("{device} is down: no peer can connect");
                entries.push(Entry::warning(SUBJECT, seen, format!("ip link set {device} up")));
            }
            entries
        }
        Err(error) => vec![problem(device, &error)],
    }
}

/// `IFF_UP` in the flags of a network interface, in hexadecimal.
fn is_up(flags: &str) -> bool {
    let digits = flags.trim().trim_start_matches("0x");
    u32::from_str_radix(digits, 16).is_ok_and(|flags| flags & 1 == 1)
}

fn problem(device: &DeviceName, error: &Error) -> Entry {
    let (seen, remedy) = match error {
        Error::NoDevice(_) => (
            format!("{device} does not exist"),
            format!(
                "ip link add {device} type wireguard (or wg-quick up {device}, wireguard-go \
                 {device}), or {}",
                super::setting("WG_DEVICE", "NAME")
            ),
        ),
        Error::NoPermission(_) => (
            format!("{device} may not be read: CAP_NET_ADMIN is missing"),
            "AmbientCapabilities=CAP_NET_ADMIN in the unit; for this check, run it as root"
                .to_owned(),
        ),
        Error::NotWireGuard(_) => (
            format!("{device} exists and is no WireGuard device"),
            super::setting("WG_DEVICE", "NAME"),
        ),
        Error::Socket(path, error) if error.kind() == ErrorKind::ConnectionRefused => (
            format!("{device} has a stale socket, {}: no process listens on it", path.display()),
            format!("start its program: wireguard-go {device}, or: rm {}", path.display()),
        ),
        Error::Socket(path, error) if error.kind() == ErrorKind::PermissionDenied => (
            format!("{device} may not be used: no access to {}", path.display()),
            format!(
                "give the daemon's group read and write on the socket and its directory (chgrp, \
                 chmod g+rwx), or run the daemon as root: {}",
                path.display()
            ),
        ),
        Error::SocketTimeout(path) => (
            format!("{device} does not answer on {}", path.display()),
            "start its program again".to_owned(),
        ),
        Error::Timeout(_) => (
            format!("{device} does not answer within {} s", TIME.as_secs()),
            format!("wg show {device}; journalctl -k"),
        ),
        other => (other.to_string(), format!("wg show {device}")),
    };
    Entry::problem(SUBJECT, seen, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_an_interface() {
        assert!(is_up("0x1003\n") && is_up("0x91"));
        assert!(!is_up("0x1002\n") && !is_up("") && !is_up("x"));
    }
}
