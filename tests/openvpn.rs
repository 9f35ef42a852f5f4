//! The OpenVPN backend over real OpenVPN: three servers and their clients on the loopback device
//! of a network namespace of their own. Needs root and what `tests/install-deps` installs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
#[path = "common/programs.rs"]
mod programs;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::{Daemon, TempDir, wait_until};
use programs::{Namespace, Process, command};
use serde_json::{Value, json};

/// A network namespace, and a directory with a throw-away CA. All certificates share one key: only
/// names matter here.
struct Site {
    namespace: Namespace,
    directory: TempDir,
}

impl Site {
    fn new() -> Self {
        let site = Self { namespace: Namespace::new(), directory: TempDir::new("openvpn") };
        let (key, ca) = (site.file("key"), site.file("ca"));
        let curve = "ec_paramgen_curve:P-256";
        command("openssl", &["genpkey", "-algorithm", "EC", "-pkeyopt", curve, "-out", &key]);
        command("openssl", &["req", "-x509", "-key", &key, "-subj", "/CN=test CA", "-out", &ca]);
        site
    }

    fn file(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    /// An OpenVPN process that shows this common name; `file` is the beginning of its files' names.
    fn start(&self, file: &str, common_name: &str, options: &str) -> OpenVpn {
        let subject = common_name.replace('\\', "\\\\").replace('/', "\\/").replace('+', "\\+");
        let subject = format!("/CN={subject}");
        let (key, ca, certificate) = (self.file("key"), self.file("ca"), self.file(file));
        let sign = ["req", "-x509", "-utf8", "-key", &key, "-CA", &ca, "-CAkey", &key];
        let usage = ["-addext", "basicConstraints=critical,CA:FALSE"];
        let names = ["-subj", &subject, "-out", &certificate];
        command("openssl", &[&sign[..], &usage, &names].concat());
        let log = self.file(&format!("{file}.log"));
        let mut openvpn = Command::new("nsenter");
        openvpn.arg(format!("--net={}", self.namespace.path()));
        // `make test-versions` names other versions.
        openvpn.arg(std::env::var_os("OPENVPN").unwrap_or("openvpn".into()));
        openvpn.args(["--verb", "3", "--ca", &ca, "--key", &key, "--cert", &certificate]);
        openvpn.args(options.split_whitespace()).stdin(Stdio::null());
        openvpn.stdout(File::create(&log).unwrap()).stderr(Stdio::null());
        OpenVpn { process: Process::start(&mut openvpn), log }
    }
}

struct OpenVpn {
    process: Process,
    log: String,
}

impl OpenVpn {
    fn wait_ready(&mut self) {
        wait_until("OpenVPN is ready", || {
            let text = fs::read_to_string(&self.log).unwrap();
            assert!(self.process.is_running(), "OpenVPN has ended:\n{text}");
            text.contains("Initialization Sequence Completed")
        });
    }
}

/// The clients of each server.
const CLIENTS: [&str; 3] = [
    "YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=|a, b|a|say \"hi\"|back\\slash|10.91.0.2:1194|twice",
    "YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E|two  spaces|Zoë 🐈|twice",
    "tcp4-server:127.0.0.1:1194|END|# no comment|it's",
];

/// Names, and the server each connects to.
fn clients() -> Vec<(&'static str, usize)> {
    let of_one =
        |(server, names): (usize, &&'static str)| names.split('|').map(move |n| (n, server));
    CLIENTS.iter().enumerate().flat_map(of_one).collect()
}

#[test]
fn lists_and_disconnects_real_clients() {
    let sockets = TempDir::new("sockets");
    let site = Site::new();
    let script = site.file("client-connect");
    fs::write(&script, format!("#!/bin/sh\n[ ! -e {script}-hangs ] || sleep 4\n")).unwrap();
    command("chmod", &["755", &script]);
    let server = |(number, pool): (usize, &str)| {
        let socket = sockets.path().join(format!("default-{number}.sock"));
        let options = format!(
            "--dev tun --proto tcp-server --local 127.0.0.1 --topology subnet --dh none \
             --duplicate-cn --keepalive 10 60 --script-security 2 --client-connect {script} \
             --port 119{number} --management {} unix {pool}",
            socket.display()
        );
        site.start(&format!("server-{number}"), "server", &options)
    };
    let pools = [
        "--server 10.91.0.0 255.255.255.0 --server-ipv6 fd91::/64",
        "--server-ipv6 fd92::/64",
        "--server 10.93.0.0 255.255.255.0",
    ];
    let mut servers: Vec<_> = pools.into_iter().enumerate().map(server).collect();
    servers.iter_mut().for_each(OpenVpn::wait_ready);
    // A client that loses its connection ends.
    let client = |(number, (name, server)): (usize, (&'static str, usize))| {
        let options = format!(
            "--client --dev null --proto tcp-client --nobind --ifconfig-noexec --route-noexec \
             --remap-usr1 SIGTERM --remote 127.0.0.1 119{server}"
        );
        (name, site.start(&format!("client-{number}"), name, &options))
    };
    let mut clients: Vec<_> = self::clients().into_iter().enumerate().map(client).collect();
    clients.iter_mut().for_each(|(_, client)| client.wait_ready());

    let daemon = Daemon::start(&["-openvpn-dir", sockets.path().to_str().unwrap()]);
    check_list(&daemon);
    check_held_socket(&daemon, &sockets.path().join("default-1.sock"));
    check_disconnect(&daemon, &mut clients);

    // A process whose script hangs is no process without clients, and answers when it is over.
    let failed = |socket| json!([{"socket": socket, "error": "did not answer within 2.5 s"}]);
    fs::write(format!("{script}-hangs"), "").unwrap();
    let (_, mut late) = client((99, ("late", 0)));
    wait_until("the script hangs", || list(&daemon)["failed"] == failed("default-0.sock"));
    late.wait_ready();
    wait_until("it answers again", || list(&daemon)["failed"].is_null());
    assert_eq!(list(&daemon)["connection_list"][0]["common_name"], "late");

    // So with one that is stopped; one that has gone has no clients.
    let signal = |name| command("kill", &["-s", name, &servers[2].process.0.id().to_string()]);
    signal("STOP");
    assert_eq!(list(&daemon)["failed"], failed("default-2.sock"));
    signal("CONT");
    assert_eq!(list(&daemon)["failed"], Value::Null);
    servers.clear();
    assert_eq!(fs::read_dir(sockets.path()).unwrap().count(), 3, "their files are stale");
    assert_eq!(list(&daemon), json!({"connection_list": []}));
}

fn list(daemon: &Daemon) -> Value {
    daemon.get("/o/connection_list").json()
}

fn check_list(daemon: &Daemon) {
    let list = list(daemon);
    assert_eq!(list["failed"], Value::Null);
    let mut listed: Vec<(&str, usize)> = Vec::new();
    for client in list["connection_list"].as_array().unwrap() {
        let text = |field: &str| client[field].as_str().unwrap();
        let server = match (text("ip_four").get(..6), text("ip_six").get(..6)) {
            (Some("10.91."), Some("fd91::")) => 0,
            (None, Some("fd92::")) => 1,
            (Some("10.93."), None) => 2,
            _ => panic!("{client:?}"),
        };
        listed.push((text("common_name"), server));
    }
    let mut expected = clients();
    expected.sort_unstable();
    listed.sort_unstable();
    assert_eq!(listed, expected);
}

/// Somebody else talks to one of the processes.
fn check_held_socket(daemon: &Daemon, socket: &Path) {
    let mut holder = UnixStream::connect(socket).unwrap();
    holder.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    // OpenVPN may forget a connection until the next one comes.
    let knock = holder.read_exact(&mut [0; 10]).is_err().then(|| UnixStream::connect(socket));
    for _ in 0..2 {
        assert_eq!(list(daemon)["failed"][0]["socket"], "default-1.sock");
    }
    drop((holder, knock));
    check_list(daemon);
    // Callers that come at once all get whole lists.
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| check_list(daemon));
        }
    });
}

/// Each name in turn: all of its clients go, nobody else does.
fn check_disconnect(daemon: &Daemon, clients: &mut Vec<(&str, OpenVpn)>) {
    let disconnect = |name: &str| daemon.post("/o/disconnect_client", &[("common_name", name)]);
    assert_eq!(disconnect("nobody").status, 204);
    while let Some((name, _)) = clients.first() {
        let name = *name;
        assert_eq!(disconnect(name).status, 204, "{name:?}");
        for (_, client) in clients.iter_mut().filter(|(other, _)| *other == name) {
            wait_until(name, || !client.process.is_running());
        }
        clients.retain(|(other, _)| *other != name);
        for (other, client) in clients.iter_mut() {
            assert!(client.process.is_running(), "{name:?} ended {other:?}");
        }
        wait_until("it is gone from the list", || {
            let listed = list(daemon)["connection_list"].as_array().unwrap().len();
            assert!(listed >= clients.len());
            listed == clients.len()
        });
    }
    let log = daemon.log();
    let disconnected = log.iter().filter(|line| line.contains(" disconnected=")).count();
    assert_eq!(disconnected, self::clients().len() - 1, "a line for each name: {log:#?}");
}
