//! The contract over real HTTP, as far as no backend has a part in it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use common::{Daemon, PATIENCE};

const FORM: &str = "Content-Type: application/x-www-form-urlencoded";
const JSON: &str = "Content-Type: application/json";
const KEY: &str = "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=";
const COUNTS: &str = "/i/node?include_client_peer_count=yes";
const DAEMON: &str = env!("CARGO_BIN_EXE_vpn-daemon");

#[test]
fn node() {
    let daemon = Daemon::start(&[]);
    let answer = daemon.get("/i/node");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("Content-Type"), Some("application/json"));
    assert_eq!(answer.header("Cache-Control"), Some("no-store"));
    let node = answer.json();
    let names: Vec<_> = node.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["cpu_count", "load_average", "maintenance_mode", "node_uptime", "rel_load_average", "v"]
    );
    assert_eq!(node["v"], env!("CARGO_PKG_VERSION"));
    assert_eq!(node["cpu_count"], std::thread::available_parallelism().unwrap().get());
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    let uptime: u64 = uptime.split('.').next().unwrap().parse().unwrap();
    assert!((uptime - 60..=uptime).contains(&node["node_uptime"].as_u64().unwrap()));
    let cpus = node["cpu_count"].as_u64().unwrap();
    let loads = node["load_average"].as_array().unwrap();
    for (load, relative) in loads.iter().zip(node["rel_load_average"].as_array().unwrap()) {
        let hundredths = format!("{:.2}", load.as_f64().unwrap()).replace('.', "");
        assert_eq!(relative.as_u64().unwrap(), hundredths.parse::<u64>().unwrap() / cpus);
    }
    assert_eq!(loads.len(), 3);
    let head = daemon.call("HEAD", "/i/node", &[], b"");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert!(head.header("Content-Length").unwrap().parse::<usize>().unwrap() > 100);
}

/// The kernel's own rounding; a load changes every 5 s.
#[test]
fn loads_are_those_of_proc_loadavg() {
    let daemon = Daemon::start(&[]);
    let end = Instant::now() + PATIENCE;
    loop {
        let text = std::fs::read_to_string("/proc/loadavg").unwrap();
        let printed: Vec<f64> = text.split(' ').take(3).map(|load| load.parse().unwrap()).collect();
        let told = daemon.get("/i/node").json()["load_average"].clone();
        if told == serde_json::json!(printed) {
            break;
        }
        assert!(Instant::now() < end, "{printed:?} {told}");
    }
}

#[test]
fn cpus_are_those_of_the_affinity_mask() {
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", "0", DAEMON]);
    let daemon = Daemon::start_as(command, &[], |_| {});
    assert_eq!(daemon.get("/i/node").json()["cpu_count"], 1);
}

#[test]
fn maintenance_mode_is_a_path_and_proc_is_of_no_use() {
    // A mount namespace of the daemon's own: the path is fixed.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--", "sh", "-c"]);
    let script = "mount -t tmpfs none /run && mkdir /run/vpn-daemon &&
         mount -t proc -o subset=pid proc /proc && exec \"$0\" \"$@\"";
    command.args([script, DAEMON]);
    let daemon = Daemon::start_as(command, &[], |_| {});
    let flag = format!("/proc/{}/root/run/vpn-daemon/maintenance-mode", daemon.pid());
    let node = || daemon.get("/i/node").json();
    assert_eq!(node()["maintenance_mode"], false);
    assert!(node()["node_uptime"].as_u64() > Some(0) && node()["load_average"][2].is_number());
    std::fs::write(&flag, "").unwrap();
    assert_eq!(node()["maintenance_mode"], true);
    std::fs::remove_file(&flag).unwrap();
    assert_eq!(node()["maintenance_mode"], false);
}

#[test]
fn counts_are_left_out_when_nobody_can_be_asked_and_the_warning_comes_once_a_second() {
    let daemon = Daemon::start(&[]);
    let started = Instant::now();
    for _ in 0..100 {
        let answer = daemon.get(COUNTS);
        let node = answer.json();
        assert_eq!((answer.status, &node["o_client_count"]), (200, &serde_json::json!(0)));
        assert_eq!(node.get("w_peer_count"), None, "there is no such device");
    }
    let line = daemon.wait_for_log("no count of WireGuard peers: WireGuard device vd-none");
    let log = daemon.log();
    let lines = log.iter().filter(|logged| logged.ends_with(&line[30..])).count();
    assert!(lines as u64 <= 1 + started.elapsed().as_secs(), "{log:#?}");
    std::thread::sleep(Duration::from_secs(1));
    daemon.get(COUNTS);
    daemon.wait_for_log("more like it were left out");

    // One process that fails is no count of the others.
    std::fs::create_dir(daemon.directory().join("openvpn")).unwrap();
    let socket = daemon.directory().join("openvpn/broken.sock");
    let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let answer = daemon.get(COUNTS);
    assert_eq!((answer.status, answer.json().get("o_client_count")), (200, None));
    daemon.wait_for_log("broken.sock closed the connection before its greeting");
}

#[test]
fn bad_parameters_are_400_and_named() {
    let daemon = Daemon::start(&[]);
    let good: &[(&str, &str)] = &[("public_key", KEY), ("ip_net", "10.0.0.1/32")];
    let name = "common_name";
    let (long, repeated) = ("x".repeat(65), [(name, "a"), (name, "a")]);
    for (target, form, part) in [
        ("/w/add_peer", &[][..], "`public_key`"),
        ("/w/add_peer", &[("public_key", KEY)], "`ip_net` is missing"),
        ("/w/add_peer", &[("ip_net", "10.0.0.1/32")], "`public_key` is missing"),
        ("/w/add_peer", &[good[0], good[0], good[1]], "`public_key` must not be repeated"),
        ("/w/add_peer", &[("public_key", &KEY[..43]), good[1]], "`public_key`"),
        ("/w/add_peer", &[("public_key", &KEY.replace("kQ=", "kR=")), good[1]], "`public_key`"),
        ("/w/add_peer", &[good[0], ("ip_net", "10.0.0.1")], "`ip_net`"),
        ("/w/add_peer", &[good[0], good[1], ("ip_net", "10.0.0.1/33")], "`ip_net`"),
        ("/w/add_peer", &[good[0], ("ip_net", "fd00::1/129")], "`ip_net`"),
        ("/w/add_peer", &[good[0], ("ip_net", "10.0.0.1/+8")], "`ip_net`"),
        ("/w/add_peer", &[good[0], ("ip_net", "")], "`ip_net`"),
        ("/w/remove_peer", &[], "`public_key` is missing"),
        ("/w/remove_peer", &[("public_key", "")], "`public_key`"),
        ("/w/remove_peer", &[good[0], good[0]], "`public_key` must not be repeated"),
        ("/o/disconnect_client", &[], "`common_name` is missing"),
        ("/o/disconnect_client", &[(name, "")], "`common_name`"),
        ("/o/disconnect_client", &[(name, &long)], "`common_name`"),
        ("/o/disconnect_client", &[(name, "a\nb")], "`common_name`"),
        ("/o/disconnect_client", &repeated, "`common_name` must not be repeated"),
    ] {
        let answer = daemon.post(target, form);
        assert_eq!(answer.status, 400, "{target} {form:?}: {answer:?}");
        assert!(answer.error().contains(part), "{target} {form:?}: {}", answer.error());
    }
    for (target, part) in [
        ("/i/node?include_client_peer_count=1", "`include_client_peer_count`"),
        ("/i/node?include_client_peer_count=", "`include_client_peer_count`"),
        ("/w/peer_list?show_all=YES", "`show_all`"),
        ("/w/peer_list?show_all=yes&show_all=yes", "`show_all` must not be repeated"),
    ] {
        let answer = daemon.get(target);
        assert_eq!(answer.status, 400, "{target}");
        assert!(answer.error().contains(part), "{target}: {}", answer.error());
    }
    // A name of 64 characters of four bytes is allowed; parameters nobody knows are ignored.
    let answer = daemon.post("/o/disconnect_client", &[("x", "y"), (name, &"😀".repeat(64))]);
    assert_eq!((answer.status, answer.body.as_str()), (204, ""));
    assert_eq!((answer.header("Content-Length"), answer.header("Content-Type")), (None, None));
    assert_eq!(daemon.get("/i/node?whatever=1&include_client_peer_count=no").status, 200);
}

#[test]
fn a_device_that_does_not_exist_is_502_and_named() {
    let daemon = Daemon::start(&[]);
    for answer in [
        daemon.get("/w/peer_list"),
        daemon.post("/w/add_peer", &[("public_key", KEY), ("ip_net", "10.0.0.1/32")]),
        daemon.post("/w/remove_peer", &[("public_key", KEY)]),
    ] {
        assert_eq!(answer.status, 502, "{answer:?}");
        let error = answer.error();
        assert!(error.contains("vd-none") && error.contains("does not exist"), "{error}");
    }
}

#[test]
fn statuses_that_no_backend_has_a_part_in() {
    let daemon = Daemon::start(&[]);
    let form = b"public_key=x";
    let multipart = "Content-Type: multipart/form-data; boundary=x";
    let odd = "Content-Type: Application/X-WWW-Form-Urlencoded ; charset=utf-8";
    for (method, target, headers, body, status, allow) in [
        ("GET", "/", &[][..], &b""[..], 404, None),
        ("GET", "/i/node/", &[], b"", 404, None),
        ("POST", "/i/nodes", &[FORM], form, 404, None),
        ("POST", "/i/node", &[FORM], form, 405, Some("GET, HEAD")),
        ("PUT", "/w/peer_list", &[], b"", 405, Some("GET, HEAD")),
        ("DELETE", "/o/connection_list", &[], b"", 405, Some("GET, HEAD")),
        ("GET", "/w/add_peer", &[], b"", 405, Some("POST")),
        ("HEAD", "/w/remove_peer", &[], b"", 405, Some("POST")),
        ("GET", "/o/disconnect_client", &[], b"", 405, Some("POST")),
        ("GET", "/i/node", &["Origin: http://localhost"], b"", 403, None),
        ("POST", "/w/remove_peer", &[FORM, "Origin: null"], form, 403, None),
        ("POST", "/w/remove_peer", &[], form, 415, None),
        ("POST", "/w/remove_peer", &[JSON], form, 415, None),
        ("POST", "/w/remove_peer", &[multipart], form, 415, None),
        ("POST", "/w/remove_peer", &[odd], form, 400, None),
        ("POST", "/w/remove_peer", &[FORM], &[b'x'; 64 * 1024], 400, None),
    ] {
        let answer = daemon.call(method, target, headers, body);
        assert_eq!(answer.status, status, "{method} {target} {headers:?}: {answer:?}");
        assert_eq!(answer.header("Allow"), allow, "{method} {target}");
        assert!(method == "HEAD" || !answer.error().is_empty());
    }
}

#[test]
fn curl_calls_as_the_portal_does() {
    // A body over 1 KiB makes curl ask with `Expect: 100-continue`.
    let daemon = Daemon::start(&[]);
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "20", "-w", " %{http_code}"]);
    command.args(["--data-urlencode", &format!("public_key={KEY}")]);
    for number in 0..100 {
        command.args(["-d", &format!("ip_net=10.0.0.{number}/32")]);
    }
    command.arg(format!("http://{}/w/add_peer", daemon.address));
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.ends_with(" 502") && text.contains("vd-none"), "{text} {:?}", output.stderr);
}

#[test]
fn long_lists_at_once_take_64_mib_and_leave_nothing_behind() {
    let daemon = Daemon::start(&[]);
    let peer = |number: u32| {
        let ip = std::net::Ipv4Addr::from(0x0a00_0000 + number);
        format!(r#"{{"public_key":"{number:06}{}A=","ip_net":["{ip}/32"]}}"#, "A".repeat(36))
    };
    let peers = (0..100_000).map(peer).collect::<Vec<_>>().join(",");
    let padding = "x".repeat((31 << 20) - peers.len());
    let body = format!(r#"{{"peer_list":[{peers}],"x":"{padding}"}}"#);
    let post = || daemon.call("POST", "/w/sync_peers", &[JSON], body.as_bytes());
    for _ in 0..2 {
        let statuses = std::thread::scope(|scope| {
            let callers: Vec<_> = (0..12).map(|_| scope.spawn(|| post().status)).collect();
            callers.into_iter().map(|caller| caller.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(statuses.iter().all(|status| [502, 503].contains(status)), "{statuses:?}");
        assert!(statuses.contains(&503), "{statuses:?}");
    }
    assert_eq!(post().status, 502, "there is room again");
    let peak = daemon.status("VmHWM");
    assert!(peak < 200 << 10, "{peak} KiB");
    let end = Instant::now() + PATIENCE;
    while daemon.status("VmRSS") >= 25 << 10 {
        assert!(Instant::now() < end, "{} KiB stay", daemon.status("VmRSS"));
        std::thread::sleep(Duration::from_millis(100));
    }
}
