//! The OpenVPN directory, and every management socket in it.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use super::Entry;
use crate::cli::Options;
use crate::openvpn::{self, OpenVpn};

/// For one greeting. A client of the process that connects may keep it for longer than this, and
/// is told apart by asking again.
const TIME: Duration = Duration::from_millis(1500);

/// Sockets probed at the same time; with [`TIME`], a thousand that hang take 6 s.
const AT_ONCE: usize = 256;

const SUBJECT: &str = "OpenVPN";

pub(super) fn look(directory: &Path) -> Vec<Entry> {
    let shown = directory.display();
    if !directory.exists() && is_missing(directory) {
        if directory == Options::default().openvpn_dir {
            return vec![Entry::ok(SUBJECT, format!("{shown} does not exist: no OpenVPN here"))];
        }
        let remedy = "name the directory of the management sockets with -openvpn-dir";
        return vec![Entry::warning(SUBJECT, format!("{shown} does not exist"), remedy)];
    }
    let openvpn = OpenVpn::new(directory.to_owned());
    let sockets = match openvpn.sockets() {
        Ok(sockets) => sockets,
        Err(failure) => {
            let remedy = match fs::read_dir(directory) {
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    open_directory(directory)
                }
                _ => "name the directory of the management sockets with -openvpn-dir".to_owned(),
            };
            return vec![Entry::problem(SUBJECT, failure.sentence, remedy)];
        }
    };
    let mut entries = vec![directory_entry(directory, sockets.len())];
    entries.extend(probe_all(&sockets));
    entries
}

/// Whether it is not there, as opposed to hidden.
fn is_missing(path: &Path) -> bool {
    fs::metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

fn directory_entry(directory: &Path, sockets: usize) -> Entry {
    let shown = directory.display();
    if geteuid().is_root() && only_root_may_list(directory) {
        return Entry::warning(
            SUBJECT,
            format!("{shown} may be listed by root alone, and the service is not root"),
            open_directory(directory),
        );
    }
    match sockets {
        0 if openvpn_runs() => Entry::warning(
            SUBJECT,
            format!("{shown} holds no management socket, but an openvpn process runs"),
            format!("management {shown}/NAME.sock unix, a line for each server's configuration"),
        ),
        0 => Entry::ok(SUBJECT, format!("{shown} holds no management socket")),
        1 => Entry::ok(SUBJECT, format!("{shown} holds 1 management socket")),
        count => Entry::ok(SUBJECT, format!("{shown} holds {count} management sockets")),
    }
}

/// Root may do anything, the service only what the directory's mode says.
fn only_root_may_list(directory: &Path) -> bool {
    fs::metadata(directory).is_ok_and(|directory| {
        let (mode, group) = (directory.mode(), directory.gid());
        mode & 0o005 != 0o005 && (group == 0 || mode & 0o050 != 0o050)
    })
}

/// A tmpfiles.d(5) file, since the directory is made again at every boot. The packages bring one.
fn open_directory(directory: &Path) -> String {
    const FILE: &str = "vpn-daemon-openvpn.conf";
    let create = format!("systemd-tmpfiles --create {FILE}");
    let there = |etc: &str| {
        let line = fs::read_to_string(Path::new(etc).join(FILE)).unwrap_or_default();
        line.split_whitespace().any(|word| Path::new(word) == directory)
    };
    if there("/usr/lib/tmpfiles.d") || there("/etc/tmpfiles.d") {
        return create;
    }
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let fedora = groups.lines().any(|line| line.starts_with("openvpn:"));
    let group = if fedora { "openvpn" } else { "nogroup" };
    let directory = directory.display();
    format!("echo 'z {directory} 0750 root {group} -' >/etc/tmpfiles.d/{FILE} && {create}")
}

fn openvpn_runs() -> bool {
    let Ok(processes) = fs::read_dir("/proc") else { return false };
    processes.flatten().any(|process| {
        fs::read_to_string(process.path().join("comm")).is_ok_and(|name| name == "openvpn\n")
    })
}

fn probe_all(sockets: &[PathBuf]) -> Vec<Entry> {
    let (left, found) = (Mutex::new(sockets.iter()), Mutex::new(Vec::new()));
    let next = || lock(&left).next();
    thread::scope(|scope| {
        for _ in 0..sockets.len().min(AT_ONCE) {
            let work = || {
                while let Some(socket) = next() {
                    let entry = probe(socket);
                    lock(&found).push(entry);
                }
            };
            // Those that could be started do the work.
            let _ = thread::Builder::new().stack_size(128 * 1024).spawn_scoped(scope, work);
        }
    });
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by(|one, other| one.subject.cmp(&other.subject));
    found
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn probe(socket: &Path) -> Entry {
    let subject = socket.file_name().unwrap_or_default().to_string_lossy();
    let path = socket.display();
    let error = match openvpn::probe(socket, Instant::now() + TIME) {
        Ok(version) => return Entry::ok(subject, format!("answers: {version}")),
        Err(error) => error,
    };
    let (seen, remedy) = match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            let remedy = format!("start its OpenVPN, or: rm {path}");
            return Entry::warning(subject, error.to_string(), remedy);
        }
        ErrorKind::TimedOut => (
            format!("did not answer within {:.1} s: {error}", TIME.as_secs_f64()),
            format!(
                "end the program that holds it, or restart its OpenVPN; both are shown by: ss -xp \
                 | grep -F \"$(ss -Hx src {path} | awk '{{print $8}}')\""
            ),
        ),
        ErrorKind::PermissionDenied => (
            error.to_string(),
            match fs::metadata(socket) {
                Ok(_) => format!("chmod a+rw {path}"),
                // The directory may be listed and not be entered.
                Err(_) => open_directory(socket.parent().unwrap_or(socket)),
            },
        ),
        ErrorKind::InvalidFilename => {
            (error.to_string(), "-openvpn-dir with a shorter path".to_owned())
        }
        _ => (
            error.to_string(),
            format!(
                "make it an OpenVPN management socket: management {path} unix, without a password \
                 file, in its configuration"
            ),
        ),
    };
    Entry::problem(subject, seen, remedy)
}
