//! The OpenVPN backend over real OpenVPN: three servers and their clients on the loopback device
//! of a network namespace of their own. Needs root, `openvpn`, `openssl`, `ip` and `setpriv`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/management.rs"]
mod management;

use std::fs::{self, File};
use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use management::Directory;
use vpn_daemon::openvpn::{OpenVpn, SocketError, Stage};

/// Generous: the machine may be busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

fn soon() -> Instant {
    Instant::now() + PATIENCE
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = soon();
    while !done() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("this test needs {program}: {error}"));
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}, as root: {printed}");
}

/// A network namespace with a loopback device; deleted at the end.
struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        let name = format!("vd-openvpn-{}", std::process::id());
        run("ip", &["netns", "add", &name]);
        let namespace = Self(name);
        run("ip", &["-n", &namespace.0, "link", "set", "lo", "up"]);
        namespace
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

/// An OpenVPN process; ended at the end.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(namespace: &Namespace, log: PathBuf, options: &[&str]) -> Self {
        let child = Command::new("ip")
            .args(["netns", "exec", &namespace.0, "setpriv", "--pdeathsig", "KILL", "openvpn"])
            .args(["--verb", "3"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(File::create(&log).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn wait_ready(&mut self) {
        let log = self.log.clone();
        wait_until("OpenVPN is ready", || {
            let text = fs::read_to_string(&log).unwrap();
            assert!(self.is_running(), "OpenVPN has ended:\n{text}");
            text.contains("Initialization Sequence Completed")
        });
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A throw-away CA in a directory. All certificates share one key: only names matter here.
struct Authority<'a>(&'a Directory);

impl Authority<'_> {
    fn new(directory: &Directory) -> Authority<'_> {
        let authority = Authority(directory);
        let (key, ca) = (authority.file("key"), authority.file("ca"));
        let curve = "ec_paramgen_curve:P-256";
        run("openssl", &["genpkey", "-algorithm", "EC", "-pkeyopt", curve, "-out", &key]);
        run("openssl", &["req", "-x509", "-key", &key, "-subj", "/CN=test CA", "-out", &ca]);
        authority
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    fn issue(&self, common_name: &str, file: &str) {
        let subject = common_name.replace('\\', "\\\\").replace('/', "\\/").replace('+', "\\+");
        let subject = format!("/CN={subject}");
        let (key, ca, file) = (self.file("key"), self.file("ca"), self.file(file));
        let sign = ["req", "-x509", "-utf8", "-key", &key, "-CA", &ca, "-CAkey", &key];
        let usage = ["-addext", "basicConstraints=critical,CA:FALSE"];
        run("openssl", &[&sign[..], &usage, &["-subj", &subject, "-out", &file]].concat());
    }
}

fn keys<'a>(ca: &'a str, key: &'a str, certificate: &'a str) -> [&'a str; 6] {
    ["--ca", ca, "--key", key, "--cert", certificate]
}

/// A client and the server (0, 1, 2) it connects to.
const CLIENTS: [(&str, usize); 15] = [
    ("YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=", 0),
    ("YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E", 1),
    ("a, b", 0),
    ("a", 0),
    ("say \"hi\"", 0),
    ("back\\slash", 0),
    ("two  spaces", 1),
    ("Zoë 🐈", 1),
    ("10.91.0.2:1194", 0),
    ("tcp4-server:127.0.0.1:1194", 2),
    ("END", 2),
    ("# no comment", 2),
    ("it's", 2),
    ("twice", 0),
    ("twice", 1),
];

#[test]
fn lists_and_disconnects_real_clients() {
    let files = Directory::new();
    let sockets = Directory::new();
    let authority = Authority::new(&files);
    authority.issue("server", "server");
    let namespace = Namespace::new();

    let pools: [&[&str]; 3] = [
        &["--server", "10.91.0.0", "255.255.255.0", "--server-ipv6", "fd91::/64"],
        &["--server-ipv6", "fd92::/64"],
        &["--server", "10.93.0.0", "255.255.255.0"],
    ];
    let ports = ["1190", "1191", "1192"];
    let (key, ca, server) = (authority.file("key"), authority.file("ca"), authority.file("server"));
    let mut servers: Vec<Process> = Vec::new();
    for (index, pool) in pools.iter().enumerate() {
        let socket = sockets.join(&format!("default-{index}.sock"));
        let common = [
            "--dev",
            "tun",
            "--proto",
            "tcp-server",
            "--local",
            "127.0.0.1",
            "--topology",
            "subnet",
            "--dh",
            "none",
            "--duplicate-cn",
            "--keepalive",
            "10",
            "60",
            "--port",
            ports[index],
            "--management",
            socket.to_str().unwrap(),
            "unix",
        ];
        let options = [&common[..], &keys(&ca, &key, &server), pool].concat();
        let log = files.join(&format!("server-{index}.log"));
        servers.push(Process::start(&namespace, log, &options));
    }
    servers.iter_mut().for_each(Process::wait_ready);

    // A client that loses its connection ends.
    let mut clients: Vec<(&str, Process)> = Vec::new();
    for (index, (name, server)) in CLIENTS.iter().enumerate() {
        let certificate = format!("client-{index}");
        authority.issue(name, &certificate);
        let certificate = authority.file(&certificate);
        let common = [
            "--client",
            "--dev",
            "null",
            "--proto",
            "tcp-client",
            "--nobind",
            "--ifconfig-noexec",
            "--route-noexec",
            "--remap-usr1",
            "SIGTERM",
            "--remote",
            "127.0.0.1",
            ports[*server],
        ];
        let log = files.join(&format!("client-{index}.log"));
        let options = [&common[..], &keys(&ca, &key, &certificate)].concat();
        clients.push((name, Process::start(&namespace, log, &options)));
    }
    clients.iter_mut().for_each(|(_, client)| client.wait_ready());

    let backend = OpenVpn::new(sockets.path().to_owned());
    check_list(&backend);
    check_probe(&backend);
    check_held_socket(&backend, &sockets.join("default-1.sock"));
    check_disconnect(&backend, &mut clients);

    // A process that hangs is no process without clients; one that has gone is.
    let pid = nix::unistd::Pid::from_raw(servers[0].child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::SIGSTOP).unwrap();
    let listing = backend.clients(Instant::now() + Duration::from_millis(800)).unwrap();
    assert_eq!(listing.failed.len(), 1);
    assert_eq!(listing.failed[0].error.to_string(), "did not answer within 0.8 s");
    nix::sys::signal::kill(pid, nix::sys::signal::SIGCONT).unwrap();
    assert!(backend.clients(soon()).unwrap().failed.is_empty());
    servers.clear();
    assert_eq!(backend.sockets().unwrap().len(), 3, "their files are stale");
    let listing = backend.clients(soon()).unwrap();
    assert!(listing.clients().next().is_none() && listing.failed.is_empty());
}

fn check_list(backend: &OpenVpn) {
    let listing = backend.clients(soon()).unwrap();
    assert!(listing.failed.is_empty(), "{:?}", listing.failed);
    let mut listed: Vec<(&str, usize)> = Vec::new();
    for client in listing.clients() {
        let ipv4 = client.ipv4.parse::<Ipv4Addr>().ok().map(|address| address.octets()[1]);
        let ipv6 = client.ipv6.parse::<Ipv6Addr>().ok().map(|address| address.segments()[0]);
        let server = match (ipv4, ipv6) {
            (Some(91), Some(0xfd91)) => 0,
            (None, Some(0xfd92)) => 1,
            (Some(93), None) => 2,
            _ => panic!("{client:?}"),
        };
        listed.push((client.common_name, server));
    }
    let mut expected = CLIENTS;
    expected.sort_unstable();
    listed.sort_unstable();
    assert_eq!(listed, expected);
}

fn check_probe(backend: &OpenVpn) {
    for socket in backend.sockets().unwrap() {
        let version = backend.probe(&socket, soon()).unwrap();
        assert!(version.starts_with("OpenVPN Management Interface Version "), "{version}");
    }
}

/// Somebody else talks to one of the processes.
fn check_held_socket(backend: &OpenVpn, socket: &Path) {
    let mut holder = UnixStream::connect(socket).unwrap();
    holder.read_exact(&mut [0; 10]).unwrap();
    let deadline = Instant::now() + Duration::from_millis(800);
    let listing = backend.clients(deadline).unwrap();
    assert_eq!(listing.failed.len(), 1);
    assert_eq!(listing.failed[0].socket, "default-1.sock");
    let error = &listing.failed[0].error;
    assert!(matches!(error, SocketError::NoAnswer { stage: Stage::Greeting, .. }), "{error:?}");
    drop(holder);
    check_list(backend);
    // Callers that come at once all get whole lists.
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| check_list(backend));
        }
    });
}

/// Each name in turn: all of its clients go, nobody else does.
fn check_disconnect(backend: &OpenVpn, clients: &mut Vec<(&str, Process)>) {
    let nobody = "nobody".parse().unwrap();
    assert_eq!(backend.disconnect(&nobody, soon()).unwrap(), 0);
    while let Some((name, _)) = clients.first() {
        let name = *name;
        let own = clients.iter().filter(|(other, _)| *other == name).count();
        assert_eq!(backend.disconnect(&name.parse().unwrap(), soon()).unwrap(), own, "{name:?}");
        for (_, client) in clients.iter_mut().filter(|(other, _)| *other == name) {
            wait_until(name, || !client.is_running());
        }
        clients.retain(|(other, _)| *other != name);
        for (other, client) in clients.iter_mut() {
            assert!(client.is_running(), "{name:?} ended {other:?}");
        }
        wait_until("it is gone from the list", || {
            let listing = backend.clients(soon()).unwrap();
            assert!(listing.clients().count() >= clients.len());
            listing.clients().count() == clients.len()
        });
    }
}
