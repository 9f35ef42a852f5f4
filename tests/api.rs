//! The contract over real HTTP, as far as no backend has a part in it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;

use common::{Daemon, wait_until};

const FORM: &str = "Content-Type: application/x-www-form-urlencoded";
const JSON: &str = "Content-Type: application/json";
const KEY: &str = "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=";
const COUNTS: &str = "/i/node?include_client_peer_count=yes";

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
    // The kernel's own rounding; a load changes every 5 s.
    wait_until("the loads are those of /proc/loadavg", || {
        let text = std::fs::read_to_string("/proc/loadavg").unwrap();
        let printed: Vec<f64> = text.split(' ').take(3).map(|load| load.parse().unwrap()).collect();
        daemon.get("/i/node").json()["load_average"] == serde_json::json!(printed)
    });
}

#[test]
fn cpus_are_those_of_the_affinity_mask() {
    let daemon = Daemon::start_by(&["taskset", "--cpu-list", "0"], &[]);
    assert_eq!(daemon.get("/i/node").json()["cpu_count"], 1);
}

#[test]
fn maintenance_mode_is_a_path_and_proc_is_of_no_use() {
    // A mount namespace of the daemon's own: the path is fixed.
    let script = "mount -t tmpfs none /run && mkdir /run/vpn-daemon &&
         mount -t proc -o subset=pid proc /proc && exec \"$0\" \"$@\"";
    let daemon = Daemon::start_by(&["unshare", "--mount", "--", "sh", "-c", script], &[]);
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
fn counts_are_left_out_when_nobody_can_be_asked() {
    let daemon = Daemon::start(&[]);
    let answer = daemon.get(COUNTS);
    let node = answer.json();
    assert_eq!((answer.status, &node["o_client_count"]), (200, &serde_json::json!(0)));
    assert_eq!(node.get("w_peer_count"), None, "there is no such device");
    daemon.wait_for_log("no count of WireGuard peers: WireGuard device vd-none");

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
        ("/w/add_peer", &[("public_key", KEY)][..], "`ip_net` is missing"),
        ("/w/add_peer", &[("ip_net", "10.0.0.1/32")], "`public_key` is missing"),
        ("/w/add_peer", &[good[0], good[0], good[1]], "`public_key` must not be repeated"),
        ("/w/add_peer", &[("public_key", &KEY.replace("kQ=", "kR=")), good[1]], "`public_key`"),
        ("/w/add_peer", &[good[0], ("ip_net", "10.0.0.1")], "`ip_net`"),
        ("/w/add_peer", &[good[0], good[1], ("ip_net", "10.0.0.1/33")], "`ip_net`"),
        ("/w/remove_peer", &[good[0], good[0]], "`public_key` must not be repeated"),
        ("/o/disconnect_client", &[], "`common_name` is missing"),
        ("/o/disconnect_client", &[(name, &long)], "`common_name`"),
        ("/o/disconnect_client", &[(name, "a\nb")], "`common_name`"),
        ("/o/disconnect_client", &repeated, "`common_name` must not be repeated"),
        ("/i/node?include_client_peer_count=1", &[], "`include_client_peer_count`"),
        ("/w/peer_list?show_all=YES", &[], "`show_all`"),
        ("/w/peer_list?show_all=yes&show_all=yes", &[], "`show_all` must not be repeated"),
    ] {
        let is_get = target.contains('?');
        let answer = if is_get { daemon.get(target) } else { daemon.post(target, form) };
        assert_eq!(answer.status, 400, "{target} {form:?}: {answer:?}");
        assert!(answer.error().contains(part), "{target} {form:?}: {}", answer.error());
    }
    // A name of 64 characters of four bytes is allowed; parameters nobody knows are ignored.
    let answer = daemon.post("/o/disconnect_client", &[("x", "y"), (name, &"😀".repeat(64))]);
    assert_eq!((answer.status, answer.body.as_str()), (204, ""));
    assert_eq!((answer.header("Content-Length"), answer.header("Content-Type")), (None, None));
    assert_eq!(daemon.get("/i/node?whatever=1&include_client_peer_count=no").status, 200);
}

#[test]
fn statuses_that_no_backend_has_a_part_in() {
    let daemon = Daemon::start(&[]);
    let (bad, good) = (&b"public_key=x"[..], format!("ip_net=::/0&public_key={KEY}").into_bytes());
    let multipart = "Content-Type: multipart/form-data; boundary=x";
    let odd = "Content-Type: Application/X-WWW-Form-Urlencoded ; charset=utf-8";
    for (method, target, headers, body, status, part) in [
        ("GET", "/i/node/", &[][..], &b""[..], 404, ""),
        ("POST", "/i/node", &[FORM], bad, 405, "GET or HEAD"),
        ("PUT", "/w/peer_list", &[], b"", 405, "GET or HEAD"),
        ("HEAD", "/w/remove_peer", &[], b"", 405, "POST"),
        ("GET", "/o/disconnect_client", &[], b"", 405, "POST"),
        ("GET", "/i/node", &["Origin: http://localhost"], b"", 403, "Origin"),
        ("POST", "/w/remove_peer", &[FORM, "Origin: null"], bad, 403, "Origin"),
        ("POST", "/w/remove_peer", &[], bad, 415, "application/x-www-form-urlencoded"),
        ("POST", "/w/remove_peer", &[JSON], bad, 415, "application/x-www-form-urlencoded"),
        ("POST", "/w/remove_peer", &[multipart], bad, 415, "application/x-www-form-urlencoded"),
        ("POST", "/w/remove_peer", &[odd], bad, 400, "public_key"),
        ("GET", "/w/peer_list", &[], b"", 502, "vd-none does not exist"),
        ("POST", "/w/add_peer", &[FORM], &good, 502, "vd-none does not exist"),
        ("POST", "/w/remove_peer", &[FORM], &good, 502, "vd-none does not exist"),
    ] {
        let answer = daemon.call(method, target, headers, body);
        assert_eq!(answer.status, status, "{method} {target} {headers:?}: {answer:?}");
        assert!(method == "HEAD" || answer.error().contains(part), "{answer:?}");
        let allow = (status == 405).then(|| part.replace(" or ", ", "));
        assert_eq!(answer.header("Allow"), allow.as_deref(), "{method} {target}");
    }
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
        assert!(statuses.iter().all(|status| [502, 503, 504].contains(status)), "{statuses:?}");
        assert!(statuses.contains(&503), "{statuses:?}");
    }
    assert_eq!(post().status, 502, "there is room again");
    let peak = daemon.status("VmHWM");
    assert!(peak < 200 << 10, "{peak} KiB");
    wait_until("memory is given back", || daemon.status("VmRSS") < 25 << 10);
}
