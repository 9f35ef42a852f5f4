//! The WireGuard device: kernel or user space, its peers, and whether it is up.

use std::fs;
use std::time::{Duration, Instant};

use super::Entry;
use crate::wireguard::{DeviceName, WireGuard};

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
        Err(failure) => {
            let sentence = failure.sentence;
            let (seen, remedy) = sentence.split_once(": ").unwrap_or((&sentence, "see its log"));
            vec![Entry::problem(SUBJECT, seen, remedy)]
        }
    }
}

/// `IFF_UP` in the flags of a network interface, in hexadecimal.
fn is_up(flags: &str) -> bool {
    let digits = flags.trim().trim_start_matches("0x");
    u32::from_str_radix(digits, 16).is_ok_and(|flags| flags & 1 == 1)
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
