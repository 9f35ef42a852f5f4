//! `vpn-daemon check`: faults planted one at a time, each named with what mends it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
#[path = "common/management.rs"]
mod management;
#[path = "common/pki.rs"]
mod pki;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Daemon, TempDir};
use management::{FakeOpenVpn, Mood};
use pki::{CA, Pki};

const OK: i32 = 0;
const WARNING: i32 = 1;
const PROBLEM: i32 = 2;

/// A userspace WireGuard device without peers; its socket is removed when dropped.
struct Device {
    name: String,
    socket: PathBuf,
}

impl Device {
    fn new() -> Self {
        let device = Self::stale();
        fs::remove_file(&device.socket).unwrap();
        let listener = UnixListener::bind(&device.socket).unwrap();
        fs::set_permissions(&device.socket, fs::Permissions::from_mode(0o777)).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let mut request = [0; 64];
                let _ = stream.read(&mut request);
                let _ = stream.write_all(b"listen_port=51820\nerrno=0\n\n");
            }
        });
        device
    }

    /// Only the file.
    fn stale() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vd{}.{number}", std::process::id());
        fs::create_dir_all("/var/run/wireguard").unwrap();
        let socket = PathBuf::from(format!("/var/run/wireguard/{name}.sock"));
        drop(UnixListener::bind(&socket).unwrap());
        Self { name, socket }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}

/// Everything in order: a device, one OpenVPN process, a free address on loopback.
struct Installation {
    device: Device,
    directory: TempDir,
    _openvpn: FakeOpenVpn,
}

/// What a check has said.
struct Checked {
    status: i32,
    text: String,
    entries: Vec<serde_json::Value>,
}

impl Installation {
    fn new() -> Self {
        let directory = TempDir::new("check");
        let openvpn = directory.path().join("openvpn");
        fs::create_dir(&openvpn).unwrap();
        fs::set_permissions(&openvpn, fs::Permissions::from_mode(0o755)).unwrap();
        let socket = openvpn.join("default.sock");
        let process = FakeOpenVpn::start(socket.clone(), Mood::Healthy, vec![]);
        // As OpenVPN leaves it.
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
        Self { device: Device::new(), directory, _openvpn: process }
    }

    fn openvpn(&self) -> PathBuf {
        self.directory.path().join("openvpn")
    }

    /// With address and device; the first words of `wrapper` run what follows.
    fn check(&self, wrapper: &[&str], environment: &[(&str, &str)], flags: &[&str]) -> Checked {
        let usual = ["-listen", "127.0.0.1:0", "-wg-device", &self.device.name];
        self.check_with(wrapper, environment, &[&usual, flags].concat())
    }

    /// The checks of text and of JSON.
    fn check_with(
        &self,
        wrapper: &[&str],
        environment: &[(&str, &str)],
        flags: &[&str],
    ) -> Checked {
        let run = |format: &[&str]| {
            let mut words = wrapper.to_vec();
            let openvpn = self.openvpn();
            words.extend([env!("CARGO_BIN_EXE_vpn-daemon"), "check"]);
            words.extend(["-openvpn-dir", openvpn.to_str().unwrap()]);
            words.extend(flags.iter().chain(format));
            let mut command = Command::new("timeout");
            command.args(["-s", "KILL", "30"]).args(words);
            command.env_remove("CREDENTIALS_DIRECTORY").envs(environment.iter().copied());
            let output = command.output().unwrap();
            assert!(output.stderr.is_empty(), "{output:?}");
            (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
        };
        let (status, text) = run(&[]);
        let (json_status, json) = run(&["-json"]);
        assert_eq!(status, json_status, "{text}\n{json}");
        let entries = serde_json::from_str(&json).unwrap();
        Checked { status, text, entries }
    }

    fn plain(&self, flags: &[&str]) -> Checked {
        self.check(&[], &[], flags)
    }

    fn tls(&self, directory: &Path) -> Checked {
        self.check(&[], &[("CREDENTIALS_DIRECTORY", directory.to_str().unwrap())], &[])
    }
}

impl Checked {
    /// The exit status, and an entry with these words in what was seen and in the remedy.
    fn names(&self, status: i32, seen: &str, remedy: &str) {
        let level = ["ok", "warning", "problem"][usize::try_from(status).unwrap()];
        let text =
            |entry: &serde_json::Value, field| entry[field].as_str().unwrap_or("").to_owned();
        let found = self.entries.iter().any(|entry| {
            let named = format!("{} {}", text(entry, "subject"), text(entry, "seen"));
            entry["level"] == level
                && named.contains(seen)
                && text(entry, "remedy").contains(remedy)
        });
        assert!(
            found && self.status == status,
            "{seen:?} {remedy:?}: {} {}",
            self.status,
            self.text
        );
        // The same in the text, in columns.
        let text = self.text.split_whitespace().collect::<Vec<_>>().join(" ");
        let line = format!("{level} ");
        assert!(text.contains(&line) && text.contains(seen) && text.contains(remedy), "{text}");
    }
}

/// Without root's rights.
const NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

#[test]
fn all_is_well() {
    let checked = Installation::new().plain(&[]);
    checked.names(OK, "has 0 peers", "");
    checked.names(OK, "answers: OpenVPN Management Interface Version 5", "");
    checked.names(OK, "plain HTTP, reachable only from this host", "");
    assert!(checked.text.ends_with("\nAll is well.\n"), "{}", checked.text);
    for entry in &checked.entries {
        let fields: Vec<_> = entry.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fields, ["level", "remedy", "seen", "subject"]);
    }
}

#[test]
fn addresses() {
    let installation = Installation::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let checked = installation.plain(&["-listen", &address.to_string()]);
    let remedy = format!("ss -ltnp 'sport = :{}'", address.port());
    checked.names(PROBLEM, &format!("cannot listen on {address}: Address already in use"), &remedy);

    let daemon = Daemon::start(&["-listen", ":0"]);
    for address in [format!("127.0.0.1:{}", daemon.address.port()), daemon.address.to_string()] {
        let version = env!("CARGO_PKG_VERSION");
        installation
            .plain(&["-listen", &address])
            .entries
            .iter()
            .find(|entry| {
                let seen = entry["seen"].as_str().unwrap();
                seen == format!("{address} is served by vpn-daemon {version}")
            })
            .expect(&address);
    }
    assert_eq!(daemon.get("/i/node").status, 200);

    let checked = installation.plain(&["-listen", "192.0.2.1:41194"]);
    checked.names(PROBLEM, "cannot listen on 192.0.2.1:41194: Cannot assign", "LISTEN=");
    let checked = installation.plain(&["-listen", "name.invalid:1"]);
    checked.names(PROBLEM, "cannot listen on name.invalid:1: ", "LISTEN=");
    let checked = installation.plain(&["-listen", ":0"]);
    checked.names(WARNING, "plain HTTP on :0", "credentials.conf");
}

#[test]
fn wireguard_devices() {
    let installation = Installation::new();
    let checked = installation.plain(&["-wg-device", "vd-none"]);
    checked.names(PROBLEM, "vd-none does not exist", "ip link add vd-none type wireguard");
    let checked = installation.plain(&["-wg-device", "lo"]);
    checked.names(PROBLEM, "lo is not a WireGuard device", "-wg-device");
    let stale = Device::stale();
    let checked = installation.plain(&["-wg-device", &stale.name]);
    let seen = format!("{} has no process behind it", stale.socket.display());
    checked.names(PROBLEM, &seen, "remove the file");
    let closed = Device::new();
    fs::set_permissions(&closed.socket, fs::Permissions::from_mode(0o700)).unwrap();
    let checked = installation.check(&NOBODY, &[], &["-wg-device", &closed.name]);
    assert_eq!(checked.status, PROBLEM, "{}", checked.text);
}

#[test]
fn the_openvpn_directory() {
    let installation = Installation::new();
    let directory = installation.openvpn();
    let line = format!("z {} 0750 root", directory.display());
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o710)).unwrap();
    installation.check(&NOBODY, &[], &[]).names(PROBLEM, "permission denied", &line);
    installation.plain(&[]).names(WARNING, "may be listed by root alone", &line);
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
    installation.check(&NOBODY, &[], &[]).names(OK, "holds 1 management socket", "");

    let nowhere = installation.directory.path().join("nowhere");
    let checked = installation.plain(&["-openvpn-dir", nowhere.to_str().unwrap()]);
    checked.names(WARNING, "nowhere does not exist", "-openvpn-dir");
    let checked = installation.plain(&["-openvpn-dir", "/dev/null"]);
    checked.names(PROBLEM, "/dev/null", "-openvpn-dir");
}

#[test]
fn openvpn_sockets() {
    let moods = [
        (Mood::Silent, "did not answer within 1.5 s: another program holds it", "ss -xp"),
        (Mood::Full, "did not answer within 1.5 s: too many others wait", "ss -xp"),
        (Mood::Deaf, "did not answer within 1.5 s", "ss -xp"),
        (Mood::Password, "asked for a password; remove the password file", ""),
        (Mood::CloseAtOnce, "closed the connection before its greeting", ""),
        (Mood::GarbageGreeting, "sent a reply that was not understood", ""),
        (Mood::FloodLine, "sent a line of more than", ""),
        (Mood::FloodNews, "sent", ""),
    ];
    let installation = Installation::new();
    let name = |mood| format!("{mood:?}.sock");
    let start = |mood| FakeOpenVpn::start(installation.openvpn().join(name(mood)), mood, vec![]);
    let _processes: Vec<_> = moods.iter().map(|(mood, ..)| start(*mood)).collect();
    // One after another they would take longer than a check may.
    let socket = |number| installation.openvpn().join(format!("hangs-{number}.sock"));
    let _hanging: Vec<_> =
        (0..64).map(|number| FakeOpenVpn::start(socket(number), Mood::Silent, vec![])).collect();
    let checked = installation.plain(&[]);
    for (mood, seen, remedy) in moods {
        checked.names(PROBLEM, &format!("{} {seen}", name(mood)), remedy);
    }
    assert!(checked.text.contains("72 problems, 0 warnings."), "{}", checked.text);

    let installation = Installation::new();
    let stale = installation.openvpn().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let checked = installation.plain(&[]);
    checked.names(WARNING, "stale.sock is stale", &format!("rm {}", stale.display()));
}

#[test]
fn credentials() {
    let installation = Installation::new();
    let checked = |pki: &Pki| installation.tls(&pki.credentials_directory());
    let pki = Pki::usual();
    checked(&pki).names(OK, "certificate and key belong together, valid until 2099-12-31", "");
    let directory = pki.credentials_directory();
    let variable = [("CREDENTIALS_DIRECTORY", directory.to_str().unwrap())];
    let nobody = installation.check(&NOBODY, &variable, &[]);
    nobody.names(PROBLEM, "server.key cannot be read: Permission denied", "");
    let daemon = Daemon::start_with(&[], |command| {
        command.envs(variable);
    });
    let served = installation.check(&[], &variable, &["-listen", &daemon.address.to_string()]);
    served.names(OK, "is served by a program that speaks TLS", "");

    pki.authority("other", None, CA);
    pki.credentials(&["other.crt"], &["server.crt"], "server.key");
    checked(&pki).names(OK, "server.crt is not issued by a CA in ca.crt", "");
    pki.credentials(&["ca.crt"], &["portal.crt"], "portal.key");
    checked(&pki).names(PROBLEM, "server.crt is not for server authentication: issue it", "");
    pki.credentials(&["ca.crt"], &["server.crt"], "server.key");
    fs::set_permissions(pki.credential("server.key"), fs::Permissions::from_mode(0o644)).unwrap();
    checked(&pki).names(WARNING, "server.key may be read by everybody (mode 0644): chmod o=", "");
    fs::remove_file(pki.credential("ca.crt")).unwrap();
    checked(&pki).names(PROBLEM, "ca.crt does not exist: put it there", "");
    let empty = installation.tls(Path::new(""));
    empty.names(PROBLEM, "CREDENTIALS_DIRECTORY is empty: set it", "");
}

/// A /run of its own, with what the device's socket needs.
const OWN_RUN: &str = "mount --bind /run/wireguard /mnt; mount -t tmpfs none /run; \
                       mkdir /run/wireguard; mount --move /mnt /run/wireguard";

/// Runs `"$@"` after a script in a mount namespace.
fn after(script: &str) -> [String; 6] {
    let script = format!("{script}; exec \"$@\"");
    ["unshare", "--mount", "sh", "-ec", &script, "sh"].map(str::to_owned)
}

#[test]
fn the_settings_of_the_service_count_where_no_flag_is_given() {
    let installation = Installation::new();
    let device = &installation.device.name;
    let check = |default: &str, sysconfig: &str, flags: &[&str]| {
        let words = after(&format!(
            "mount -t tmpfs none /mnt; cp -a /etc /mnt; mount --bind /mnt/etc /etc; \
             mkdir -p /etc/default /etc/sysconfig; rm -f /etc/default/vpn-daemon; \
             printf '{default}' >/etc/default/vpn-daemon; \
             printf '{sysconfig}' >/etc/sysconfig/vpn-daemon"
        ));
        installation.check_with(&words.each_ref().map(String::as_str), &[], flags)
    };
    let default = format!("# LISTEN=:1\\nLISTEN=127.0.0.1:0\\nWG_DEVICE=\"{device}\"\\n");
    let checked = check(&default, "", &[]);
    checked.names(OK, &format!("WG_DEVICE={device}, from /etc/default/vpn-daemon"), "");
    checked.names(OK, "127.0.0.1:0 is free", "");
    checked.names(OK, &format!("{device} (user space) has 0 peers"), "");
    // Fedora's file comes second in the unit, and a flag before both.
    let checked = check(&default, "WG_DEVICE=vd-other", &[]);
    checked.names(PROBLEM, "vd-other does not exist", "ip link add vd-other");
    let flags = ["-wg-device", device, "-listen", "127.0.0.1:0"];
    let checked = check("LISTEN=:1\\n", "WG_DEVICE=vd-other\\n", &flags);
    checked.names(OK, "127.0.0.1:0 is free", "");
    assert!(!checked.text.contains("settings"), "{}", checked.text);
    let checked = check(&default, "LISTEN=41194", &[]);
    checked.names(PROBLEM, "LISTEN=41194 in /etc/sysconfig/vpn-daemon: has no port", "");
}

#[test]
fn the_credentials_of_the_service_count_where_the_variable_is_not_set() {
    let (installation, pki) = (Installation::new(), Pki::usual());
    let check = |who: &str| {
        let words = after(&format!(
            "{OWN_RUN}; mkdir -p /run/credentials/vpn-daemon.service; \
             cp {}/ca.crt {0}/server.* /run/credentials/vpn-daemon.service/; \
             chmod 500 /run/credentials/vpn-daemon.service; set -- {who} \"$@\"",
            pki.credentials_directory().display()
        ));
        installation.check(&words.each_ref().map(String::as_str), &[], &[])
    };
    let checked = check("");
    checked.names(OK, "credentials of the running service", "");
    checked.names(OK, "certificate and key belong together, valid until ", "");
    check(&NOBODY.join(" ")).names(WARNING, "credentials that may not be read here", "sudo");
}

#[test]
fn the_node() {
    let installation = Installation::new();
    let shell =
        |script: &str| installation.check(&after(script).each_ref().map(String::as_str), &[], &[]);
    let checked =
        shell(&format!("{OWN_RUN}; mkdir /run/vpn-daemon; touch /run/vpn-daemon/maintenance-mode"));
    checked.names(WARNING, "in maintenance", "rm /run/vpn-daemon/maintenance-mode");
    let checked = shell("ulimit -n 300");
    checked.names(WARNING, "only 300 allowed", "LimitNOFILE=");
}

#[test]
fn unknown_arguments_are_refused() {
    for arguments in [&["check", "-frobnicate"][..], &["check", "now"], &["-json"]] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_vpn-daemon")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(arguments.last().unwrap().trim_matches('"')), "{text}");
        assert!(output.stdout.is_empty());
    }
}
