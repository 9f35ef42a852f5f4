//! The backends: the WireGuard device, the OpenVPN directory and every management socket in it.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use super::{Entry, Level};
use crate::cli::Options;
use crate::openvpn;
use crate::wireguard::{DeviceName, WireGuard};

/// For one greeting. While a VPN client connects, its script may keep the process from answering for
/// longer than this: then the next check finds it well.
const TIME: Duration = Duration::from_millis(1500);

/// For the whole list of peers.
const LIST_TIME: Duration = Duration::from_secs(5);

pub(super) fn wireguard(device: &DeviceName) -> Vec<Entry> {
    match WireGuard::new(device.clone()).peers(Instant::now() + LIST_TIME) {
        Ok(peers) => {
            let file = |name| fs::read_to_string(format!("/sys/class/net/{device}/{name}"));
            let kernel = file("uevent").is_ok_and(|text| text.contains("DEVTYPE=wireguard"));
            let kind = if kernel { "kernel" } else { "user space" };
            let plural = if peers.len() == 1 { "" } else { "s" };
            let seen = format!("{device} ({kind}) has {} peer{plural}", peers.len());
            let mut entries = vec![Entry::ok("WireGuard", seen)];
            let socket = format!("/var/run/wireguard/{device}.sock");
            if !kernel && only_root_may(0o2, Path::new(&socket)) {
                let seen = format!("{socket} is open to root alone, and the service is not root");
                let remedy = format!("chgrp {} {socket} && chmod 660 {socket}", group());
                entries.push(Entry::warning("WireGuard", seen, remedy));
            }
            if file("flags").is_ok_and(|flags| !is_up(&flags)) {
                let seen = format!("{device} is down: no peer can connect");
                entries.push(Entry::warning("WireGuard", seen, format!("ip link set {device} up")));
            }
            entries
        }
        Err(failure) => {
            let sentence = failure.to_string();
            // The colon stands before what mends it; a reason stands in parentheses.
            let mended = sentence.split_once(": ").filter(|(seen, _)| !seen.contains(" ("));
            let (seen, remedy) = mended.unwrap_or((&sentence, "see its log, or journalctl -k"));
            vec![Entry::problem("WireGuard", seen, remedy)]
        }
    }
}

/// `IFF_UP` in the flags of a network interface, in hexadecimal.
fn is_up(flags: &str) -> bool {
    let digits = flags.trim().trim_start_matches("0x");
    u32::from_str_radix(digits, 16).is_ok_and(|flags| flags & 1 == 1)
}

pub(super) fn openvpn(directory: &Path) -> Vec<Entry> {
    let shown = directory.display();
    if fs::metadata(directory).is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        let seen = format!("{shown} does not exist: no OpenVPN here");
        return vec![match directory == Options::default().openvpn_dir {
            true => Entry::ok("OpenVPN", seen),
            false => Entry::warning("OpenVPN", seen, "-openvpn-dir DIRECTORY"),
        }];
    }
    let sockets = match openvpn::sockets(directory) {
        Ok(sockets) => sockets,
        Err(failure) => {
            let remedy = match fs::read_dir(directory).map_err(|error| error.kind()) {
                Err(ErrorKind::PermissionDenied) => open_directory(directory),
                _ => "-openvpn-dir DIRECTORY".to_owned(),
            };
            return vec![Entry::problem("OpenVPN", failure.to_string(), remedy)];
        }
    };
    let found = format!("management sockets in {shown}: {}", sockets.len());
    let mut entries = vec![Entry::ok("OpenVPN", found)];
    if only_root_may(0o5, directory) {
        let seen = format!("{shown} may be listed by root alone, and the service is not root");
        entries.push(Entry::warning("OpenVPN", seen, open_directory(directory)));
    }
    let probes = sockets.into_iter().map(|socket| {
        let thread = thread::Builder::new().stack_size(128 * 1024);
        thread.spawn(move || probe(&socket))
    });
    // All of them begin before the first one is waited for.
    let probes: Vec<io::Result<_>> = probes.collect();
    entries.extend(probes.into_iter().filter_map(|probe| probe.ok()?.join().ok()));
    entries
}

/// Whether this process is root, who may do anything, and the file's mode does not give these rights to the
/// service: as one of its group, or as anybody.
fn only_root_may(rights: u32, file: &Path) -> bool {
    let closed = fs::metadata(file).is_ok_and(|file| {
        let (mode, group) = (file.mode(), file.gid());
        mode & rights != rights && (group == 0 || mode >> 3 & rights != rights)
    });
    closed && geteuid().is_root()
}

/// The group of the OpenVPN sockets, which the package puts the service into.
fn group() -> &'static str {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let fedora = groups.lines().any(|line| line.starts_with("openvpn:"));
    if fedora { "openvpn" } else { "nogroup" }
}

/// A tmpfiles.d(5) file, since the directory is made again at every boot.
fn open_directory(directory: &Path) -> String {
    const FILE: &str = "vpn-daemon-openvpn.conf";
    let line = format!("z {} 0750 root {} -", directory.display(), group());
    format!("echo '{line}' >/etc/tmpfiles.d/{FILE} && systemd-tmpfiles --create {FILE}")
}

fn probe(socket: &Path) -> Entry {
    let subject = &socket.file_name().unwrap_or_default().to_string_lossy();
    let path = socket.display();
    match openvpn::probe(socket, Instant::now() + TIME) {
        Ok(version) => Entry::ok(subject, format!("answers: {version}")),
        Err(error) => match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                Entry::warning(subject, error.to_string(), format!("rm {path}"))
            }
            ErrorKind::TimedOut => {
                let seen = format!("did not answer within {:.1} s: {error}", TIME.as_secs_f64());
                Entry::problem(subject, seen, format!("ss -xp | grep -F {path}"))
            }
            _ => Entry::new(Level::Problem, subject, error.to_string()),
        },
    }
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
