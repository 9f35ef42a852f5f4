//! `vpn-daemon check`: faults planted one at a time, each named with what mends it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
#[path = "common/device.rs"]
mod device;
#[path = "common/management.rs"]
mod management;
#[path = "common/pki.rs"]
mod pki;

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{DAEMON, Daemon, TempDir};
use device::FakeDevice;
use management::{FakeOpenVpn, Mood};
use pki::Pki;

const OK: i32 = 0;
const WARNING: i32 = 1;
const PROBLEM: i32 = 2;

/// Without root's rights.
const NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Everything in order: a device, one OpenVPN process, a free address on loopback.
struct Installation {
    device: FakeDevice,
    directory: TempDir,
    _openvpn: FakeOpenVpn,
}

/// What a check has said.
struct Checked {
    status: i32,
    entries: Vec<serde_json::Value>,
}

impl Installation {
    fn new() -> Self {
        let directory = TempDir::new("check");
        let openvpn = directory.path().join("openvpn");
        fs::create_dir(&openvpn).unwrap();
        chmod(&openvpn, 0o755);
        let socket = openvpn.join("default.sock");
        let process = FakeOpenVpn::start(socket.clone(), Mood::Healthy, vec![]);
        // As OpenVPN leaves it.
        chmod(socket, 0o777);
        let device = FakeDevice::start("listen_port=51820\nerrno=0\n\n".to_owned());
        Self { device, directory, _openvpn: process }
    }

    fn openvpn(&self) -> PathBuf {
        self.directory.path().join("openvpn")
    }

    /// The words of `wrapper` run the check.
    fn run(&self, wrapper: &[&str], flags: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command.env_remove("CREDENTIALS_DIRECTORY").args(["-s", "KILL", "30"]).args(wrapper);
        command.args([DAEMON, "check", "-openvpn-dir"]).arg(self.openvpn()).args(flags);
        command.output().unwrap()
    }

    fn check_with(&self, wrapper: &[&str], flags: &[&str]) -> Checked {
        let output = self.run(wrapper, &[flags, &["-json"]].concat());
        assert!(output.stderr.is_empty(), "{output:?}");
        let entries = serde_json::from_slice(&output.stdout).unwrap();
        Checked { status: output.status.code().unwrap(), entries }
    }

    fn usual(&self) -> [&str; 4] {
        ["-listen", "127.0.0.1:0", "-wg-device", &self.device.name]
    }

    /// With address and device, unless `flags` have others.
    fn check(&self, wrapper: &[&str], flags: &[&str]) -> Checked {
        self.check_with(wrapper, &[&self.usual(), flags].concat())
    }

    /// After a script in a mount namespace.
    fn check_after(&self, script: &str, flags: &[&str]) -> Checked {
        let script = format!("{script}; exec \"$@\"");
        self.check_with(&["unshare", "--mount", "sh", "-ec", &script, "sh"], flags)
    }
}

impl Checked {
    /// An entry with these words in what was seen and in the remedy.
    fn has(&self, level: i32, seen: &str, remedy: &str) {
        let level = ["ok", "warning", "problem"][usize::try_from(level).unwrap()];
        let found = self.entries.iter().any(|entry| {
            let text = |field| entry[field].as_str().unwrap_or("");
            text("level") == level
                && format!("{} {}", text("subject"), text("seen")).contains(seen)
                && text("remedy").contains(remedy)
        });
        assert!(found, "{level} {seen:?} {remedy:?}: {:#?}", self.entries);
    }

    /// That, and nothing worse.
    fn names(&self, status: i32, seen: &str, remedy: &str) {
        self.has(status, seen, remedy);
        assert_eq!(self.status, status, "{:#?}", self.entries);
    }
}

#[test]
fn all_is_well() {
    let installation = Installation::new();
    let checked = installation.check(&[], &[]);
    checked.names(OK, "has 0 peers", "");
    checked.names(OK, "answers: OpenVPN Management Interface Version 5", "");
    checked.names(OK, "plain HTTP, reachable only from this host", "");
    for entry in &checked.entries {
        let fields: Vec<_> = entry.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(fields, ["level", "remedy", "seen", "subject"]);
    }
    // Also where the daemon runs already.
    let daemon = Daemon::start(&["-listen", ":0"]);
    for address in [format!("127.0.0.1:{}", daemon.address.port()), daemon.address.to_string()] {
        let seen = format!("{address} is served by vpn-daemon {}", env!("CARGO_PKG_VERSION"));
        installation.check(&[], &["-listen", &address]).has(OK, &seen, "");
    }
    assert_eq!(daemon.get("/i/node").status, 200);
    let text = installation.run(&[], &installation.usual());
    assert!(text.status.success() && text.stdout.ends_with(b"\nAll is well.\n"), "{text:?}");
}

#[test]
fn flags_that_lead_nowhere() {
    let (installation, stale) = (Installation::new(), FakeDevice::stale());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = &taken.local_addr().unwrap().to_string();
    let in_use = &format!("cannot listen on {address}: Address already in use");
    let holder = &format!("ss -ltnp 'sport = :{}'", taken.local_addr().unwrap().port());
    let no_process = &format!("{} has no process behind it", stale.socket.display());
    let refusing = FakeDevice::start("errno=-22\n\n".to_owned());
    for (flag, value, status, seen, remedy) in [
        ("-listen", address.as_str(), PROBLEM, in_use.as_str(), holder.as_str()),
        ("-listen", "192.0.2.1:9", PROBLEM, "cannot listen on 192.0.2.1:9: Cannot", "LISTEN="),
        ("-listen", "name.invalid:1", PROBLEM, "cannot listen on name.invalid:1: ", "LISTEN="),
        ("-listen", ":0", WARNING, "plain HTTP on :0", "credentials.conf"),
        ("-wg-device", "vd-none", PROBLEM, "vd-none does not exist", "ip link add vd-none type"),
        ("-wg-device", "lo", PROBLEM, "lo is not a WireGuard device", "-wg-device"),
        ("-wg-device", &stale.name, PROBLEM, no_process, "remove the file"),
        ("-wg-device", &refusing.name, PROBLEM, "refused the request (Invalid", "see its log"),
        ("-openvpn-dir", "/nowhere", WARNING, "/nowhere does not exist", "-openvpn-dir"),
        ("-openvpn-dir", "/dev/null", PROBLEM, "/dev/null", "-openvpn-dir"),
    ] {
        installation.check(&[], &[flag, value]).names(status, seen, remedy);
    }
}

#[test]
fn what_the_service_may_not_use() {
    let installation = Installation::new();
    let directory = installation.openvpn();
    let line = format!("z {} 0750 root", directory.display());
    chmod(&directory, 0o710);
    installation.check(&NOBODY, &[]).names(PROBLEM, "permission denied", &line);
    installation.check(&[], &[]).names(WARNING, "may be listed by root alone", &line);
    chmod(&directory, 0o755);
    installation.check(&NOBODY, &[]).names(OK, "management sockets in ", "");
    chmod(&installation.device.socket, 0o700);
    installation.check(&NOBODY, &[]).names(PROBLEM, &installation.device.name, "");
    installation.check(&[], &[]).names(WARNING, "sock is open to root alone", "chmod 660 ");
}

#[test]
fn openvpn_sockets() {
    let moods = [
        (Mood::Silent, "did not answer within 1.5 s: another program holds it", "ss -xp"),
        (Mood::Full, "did not answer within 1.5 s: too many others wait", "ss -xp"),
        (Mood::Deaf, "did not answer within 1.5 s", "ss -xp"),
        (Mood::Password, "asked for a password; remove the password file", ""),
        (Mood::GarbageGreeting, "sent a reply that was not understood", ""),
    ];
    let installation = Installation::new();
    let directory = installation.openvpn();
    let start = |name: &str, mood| FakeOpenVpn::start(directory.join(name), mood, vec![]);
    let name = |mood: &Mood| format!("{mood:?}.sock");
    let _processes = moods.map(|(mood, ..)| start(&name(&mood), mood));
    // One after another they would take longer than a check may.
    let _hanging: Vec<_> =
        (0..64).map(|number| start(&format!("hangs-{number}.sock"), Mood::Silent)).collect();
    let stale = directory.join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let checked = installation.check(&[], &[]);
    for (mood, seen, remedy) in moods {
        checked.names(PROBLEM, &format!("{} {seen}", name(&mood)), remedy);
    }
    checked.has(WARNING, "stale.sock is stale", &format!("rm {}", stale.display()));
    let problems = checked.entries.iter().filter(|entry| entry["level"] == "problem");
    assert_eq!(problems.count(), 69, "{:#?}", checked.entries);
}

#[test]
fn credentials() {
    let (installation, pki) = (Installation::new(), Pki::usual());
    let variable = format!("CREDENTIALS_DIRECTORY={}", pki.credentials_directory().display());
    let check = |flags: &[&str]| installation.check(&["env", &variable], flags);
    check(&[]).names(OK, "certificate and key belong together, valid until 2099-12-31", "");
    let nobody = installation.check(&[&["env", &variable], &NOBODY[..]].concat(), &[]);
    nobody.names(PROBLEM, "server.key cannot be read: Permission denied", "");
    let daemon = pki.daemon(&[]);
    let served = check(&["-listen", &daemon.address.to_string()]);
    served.names(OK, "is served by a program that speaks TLS", "");

    // What the daemon would say of them.
    chmod(pki.credential("server.key"), 0o644);
    check(&[]).names(WARNING, "server.key may be read by everybody (mode 0644): chmod o=", "");
    let empty = installation.check(&["env", "CREDENTIALS_DIRECTORY="], &[]);
    empty.names(PROBLEM, "CREDENTIALS_DIRECTORY is empty: set it", "");
}

/// A /run of its own, with what the device's socket needs.
const OWN_RUN: &str = "mount --bind /run/wireguard /mnt; mount -t tmpfs none /run; \
                       mkdir /run/wireguard; mount --move /mnt /run/wireguard";

#[test]
fn the_settings_of_the_service_count_where_no_flag_is_given() {
    let installation = Installation::new();
    let device = &installation.device.name;
    let check = |default: &str, sysconfig: &str, flags: &[&str]| {
        let script = format!(
            "mount -t tmpfs none /mnt; cp -a /etc /mnt; mount --bind /mnt/etc /etc; \
             mkdir -p /etc/default /etc/sysconfig; rm -f /etc/default/vpn-daemon; \
             printf '{default}' >/etc/default/vpn-daemon; \
             printf '{sysconfig}' >/etc/sysconfig/vpn-daemon"
        );
        installation.check_after(&script, flags)
    };
    let default = format!("# LISTEN=:1\\nLISTEN=127.0.0.1:0\\nWG_DEVICE=\"{device}\"\\n");
    let checked = check(&default, "", &[]);
    checked.names(OK, &format!("WG_DEVICE={device}, from /etc/default/vpn-daemon"), "");
    checked.names(OK, "127.0.0.1:0 is free", "");
    checked.names(OK, &format!("{device} (user space) has 0 peers"), "");
    // Fedora's file comes second in the unit, and a flag before both.
    let checked = check(&default, "WG_DEVICE=vd-other", &[]);
    checked.names(PROBLEM, "vd-other does not exist", "ip link add vd-other");
    let checked = check("LISTEN=:1\\n", "WG_DEVICE=vd-other\\n", &installation.usual());
    checked.names(OK, "127.0.0.1:0 is free", "");
    assert!(checked.entries.iter().all(|entry| entry["subject"] != "settings"));
    let checked = check(&default, "LISTEN=41194", &[]);
    checked.names(PROBLEM, "LISTEN=41194 in /etc/sysconfig/vpn-daemon: has no port", "");
}

#[test]
fn the_credentials_of_the_service_count_where_the_variable_is_not_set() {
    let (installation, pki) = (Installation::new(), Pki::usual());
    let check = |who: &str| {
        let script = format!(
            "{OWN_RUN}; mkdir -p /run/credentials; \
             cp -r {} /run/credentials/vpn-daemon.service; \
             chmod 500 /run/credentials/vpn-daemon.service; set -- {who} \"$@\"",
            pki.credentials_directory().display()
        );
        installation.check_after(&script, &installation.usual())
    };
    let checked = check("");
    checked.names(OK, "credentials of the running service", "");
    checked.names(OK, "certificate and key belong together, valid until ", "");
    check(&NOBODY.join(" ")).names(WARNING, "credentials that may not be read here", "sudo");
}

#[test]
fn the_node() {
    let installation = Installation::new();
    let flag = "/run/vpn-daemon/maintenance-mode";
    let script = format!("{OWN_RUN}; mkdir /run/vpn-daemon; touch {flag}; ulimit -n 300");
    let checked = installation.check_after(&script, &installation.usual());
    checked.names(WARNING, "in maintenance", &format!("rm {flag}"));
    checked.names(WARNING, "only 300 allowed", "LimitNOFILE=");
}
