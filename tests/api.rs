//! The contract over real HTTP: names, types, statuses and sentences of every call.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod common;
#[path = "common/management.rs"]
mod management;

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Answer, Daemon};
use management::{Directory, FakeClient, FakeOpenVpn, Mood};
use serde_json::{Value, json};

const JSON: &str = "Content-Type: application/json";
const FORM: &str = "Content-Type: application/x-www-form-urlencoded";
const KEY: &str = "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=";

fn daemon(directory: &Directory) -> Daemon {
    Daemon::start(&["-openvpn-dir", directory.path().to_str().unwrap()])
}

fn clients() -> Vec<FakeClient> {
    vec![
        FakeClient::new("YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=", "10.66.21.3", "fde6::3", 1),
        FakeClient::new("O'Hara, \"Bob\" é", "10.66.21.4", "", 2),
    ]
}

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
    for (load, relative) in (node["load_average"].as_array().unwrap().iter())
        .zip(node["rel_load_average"].as_array().unwrap())
    {
        let hundredths = format!("{:.2}", load.as_f64().unwrap()).replace('.', "");
        let hundredths: u64 = hundredths.parse().unwrap();
        assert_eq!(relative.as_u64().unwrap(), hundredths / cpus);
    }
    assert_eq!(node["load_average"].as_array().unwrap().len(), 3);
}

#[test]
fn cpus_are_those_of_the_affinity_mask() {
    let daemon = Daemon::start_with(&[], |command| {
        let program = command.get_program().to_owned();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let runtime = command.get_envs().find(|(name, _)| *name == "RUNTIME_DIRECTORY");
        let runtime = runtime.unwrap().1.unwrap().to_owned();
        *command = Command::new("taskset");
        command.args(["--cpu-list", "0"]).arg(program).args(arguments);
        command.env("RUNTIME_DIRECTORY", runtime).env_remove("CREDENTIALS_DIRECTORY");
    });
    assert_eq!(daemon.get("/i/node").json()["cpu_count"], 1);
}

#[test]
fn maintenance_mode_is_a_path() {
    // A mount namespace of the daemon's own: the path is fixed.
    let daemon = Daemon::start_with(&[], |command| {
        let program = command.get_program().to_owned();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let runtime = command.get_envs().find(|(name, _)| *name == "RUNTIME_DIRECTORY");
        let runtime = runtime.unwrap().1.unwrap().to_owned();
        *command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c"]);
        command.arg("mount -t tmpfs none /run && mkdir /run/vpn-daemon && exec \"$0\" \"$@\"");
        command.arg(program).args(arguments);
        command.env("RUNTIME_DIRECTORY", runtime).env_remove("CREDENTIALS_DIRECTORY");
    });
    assert_eq!(daemon.get("/i/node").json()["maintenance_mode"], false);
    let flag = format!("/proc/{}/root/run/vpn-daemon/maintenance-mode", daemon.pid());
    std::fs::write(&flag, "").unwrap();
    assert_eq!(daemon.get("/i/node").json()["maintenance_mode"], true);
    std::fs::remove_file(&flag).unwrap();
    assert_eq!(daemon.get("/i/node").json()["maintenance_mode"], false);
}

#[test]
fn counts_are_left_out_when_nobody_can_be_asked() {
    let directory = Directory::new();
    let healthy = FakeOpenVpn::start(directory.join("a.sock"), Mood::Healthy, clients());
    let daemon = daemon(&directory);
    let node = daemon.get("/i/node?include_client_peer_count=yes").json();
    assert_eq!(node["o_client_count"], 2);
    assert_eq!(node.get("w_peer_count"), None, "there is no such device");
    assert!(daemon.wait_for_log("no count of WireGuard peers").contains("vd-none"));

    let _broken = FakeOpenVpn::start(directory.join("b.sock"), Mood::Password, vec![]);
    let answer = daemon.get("/i/node?include_client_peer_count=yes");
    assert_eq!((answer.status, answer.json().get("o_client_count")), (200, None));
    daemon.wait_for_log("b.sock asked for a password");
    assert_eq!(daemon.get("/i/node?include_client_peer_count=no").json().get("v"), node.get("v"));
    drop(healthy);
}

#[test]
fn a_warning_that_anybody_can_cause_comes_once_a_second() {
    let daemon = Daemon::start(&[]);
    let started = Instant::now();
    let counts = || daemon.get("/i/node?include_client_peer_count=yes");
    for _ in 0..200 {
        assert_eq!(counts().status, 200);
    }
    let log = daemon.log();
    let lines = log.iter().filter(|line| line.contains("no count of WireGuard peers")).count();
    assert!(lines as u64 <= 1 + started.elapsed().as_secs(), "{log:#?}");
    std::thread::sleep(Duration::from_secs(1));
    counts();
    daemon.wait_for_log("more like it were left out");
}

#[test]
fn long_lists_at_once_take_64_mib_and_leave_nothing_behind() {
    let daemon = Daemon::start(&[]);
    let peer = |number: u32| {
        let ip = std::net::Ipv4Addr::from(0x0a00_0000 + number);
        format!(r#"{{"public_key":"{number:05}{}A=","ip_net":["{ip}/32"]}}"#, "A".repeat(37))
    };
    let peers = (0..20_000).map(peer).collect::<Vec<_>>().join(",");
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
    let end = Instant::now() + common::PATIENCE;
    while daemon.status("VmRSS") >= 25 << 10 {
        assert!(Instant::now() < end, "{} KiB stay", daemon.status("VmRSS"));
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn connection_list() {
    let directory = Directory::new();
    let daemon = daemon(&directory);
    assert_eq!(daemon.get("/o/connection_list").body, r#"{"connection_list":[]}"#);
    let _a = FakeOpenVpn::start(directory.join("a.sock"), Mood::Healthy, clients());
    let _b = FakeOpenVpn::start(directory.join("default-2"), Mood::Healthy, clients());
    let answer = daemon.get("/o/connection_list");
    assert_eq!(answer.status, 200);
    let one = [
        json!({"common_name": "YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=",
               "ip_four": "10.66.21.3", "ip_six": "fde6::3"}),
        json!({"common_name": "O'Hara, \"Bob\" é", "ip_four": "10.66.21.4", "ip_six": ""}),
    ];
    let both: Vec<_> = one.iter().chain(&one).cloned().collect();
    assert_eq!(answer.json(), json!({ "connection_list": both }));
}

#[test]
fn a_process_that_hangs_is_an_entry_in_failed_and_the_answer_is_there_in_time() {
    let directory = Directory::new();
    let _healthy = FakeOpenVpn::start(directory.join("a.sock"), Mood::Healthy, clients());
    let _hanging = FakeOpenVpn::start(directory.join("default-1.sock"), Mood::Silent, vec![]);
    let daemon = daemon(&directory);
    let start = Instant::now();
    let answer = daemon.get("/o/connection_list");
    assert!(start.elapsed() < Duration::from_secs(3), "the contract: {:?}", start.elapsed());
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["connection_list"].as_array().unwrap().len(), 2);
    assert_eq!(
        answer.json()["failed"],
        json!([{"socket": "default-1.sock", "error": "did not answer within 2.5 s"}])
    );
}

#[test]
fn all_processes_failed_is_502_or_504() {
    for (mood, status, part) in
        [(Mood::Silent, 504, "did not answer within 2.5 s"), (Mood::Password, 502, "password")]
    {
        let directory = Directory::new();
        let _process = FakeOpenVpn::start(directory.join("only.sock"), mood, vec![]);
        let daemon = daemon(&directory);
        for answer in [
            daemon.get("/o/connection_list"),
            daemon.post("/o/disconnect_client", &[("common_name", "x")]),
        ] {
            assert_eq!(answer.status, status, "{answer:?}");
            let error = answer.error();
            assert!(error.contains("only.sock") && error.contains(part), "{error}");
        }
    }
}

#[test]
fn disconnect_client() {
    let directory = Directory::new();
    let a = FakeOpenVpn::start(directory.join("a.sock"), Mood::Healthy, clients());
    let b = FakeOpenVpn::start(directory.join("b.sock"), Mood::Healthy, clients());
    let daemon = daemon(&directory);
    let name = "O'Hara, \"Bob\" é";
    let answer = daemon.post("/o/disconnect_client", &[("common_name", name)]);
    assert_eq!((answer.status, answer.body.as_str()), (204, ""));
    assert_eq!((answer.header("Content-Length"), answer.header("Content-Type")), (None, None));
    for process in [&a, &b] {
        assert_eq!(process.names(), ["YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E="]);
    }
    let line = daemon.wait_for_log("asked by");
    assert!(line.contains("Bob") && line.contains("127.0.0.1:"), "{line}");
    let answer = daemon.post("/o/disconnect_client", &[("common_name", name)]);
    assert_eq!(answer.status, 204, "also where no such client is connected");
}

#[test]
fn a_failing_process_does_not_keep_the_others_from_disconnecting() {
    let directory = Directory::new();
    let healthy = FakeOpenVpn::start(directory.join("a.sock"), Mood::Healthy, clients());
    let _broken = FakeOpenVpn::start(directory.join("b.sock"), Mood::CloseAfterGreeting, vec![]);
    let answer = daemon(&directory).post(
        "/o/disconnect_client",
        &[("common_name", "YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=")],
    );
    assert_eq!(answer.status, 502);
    assert!(answer.error().contains("b.sock"), "{}", answer.error());
    assert_eq!(healthy.names().len(), 1);
}

#[test]
fn bad_parameters_are_400_and_named() {
    let daemon = Daemon::start(&[]);
    let good: &[(&str, &str)] = &[("public_key", KEY), ("ip_net", "10.0.0.1/32")];
    let long = "x".repeat(65);
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
        ("/o/disconnect_client", &[("common_name", "")], "`common_name`"),
        ("/o/disconnect_client", &[("common_name", &long)], "`common_name`"),
        ("/o/disconnect_client", &[("common_name", "a\nb")], "`common_name`"),
        (
            "/o/disconnect_client",
            &[("common_name", "a"), ("common_name", "a")],
            "`common_name` must not be repeated",
        ),
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
    let name = "😀".repeat(64);
    let answer = daemon.post("/o/disconnect_client", &[("x", "y"), ("common_name", &name)]);
    assert_eq!(answer.status, 204);
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
        ("POST", "/w/remove_peer", &["Content-Type: application/json"], form, 415, None),
        (
            "POST",
            "/w/remove_peer",
            &["Content-Type: multipart/form-data; boundary=x"],
            form,
            415,
            None,
        ),
        (
            "POST",
            "/w/remove_peer",
            &["Content-Type: Application/X-WWW-Form-Urlencoded ; charset=utf-8"],
            form,
            400,
            None,
        ),
        ("POST", "/w/remove_peer", &[FORM], &[b'x'; 64 * 1024], 400, None),
    ] {
        let answer = daemon.call(method, target, headers, body);
        assert_eq!(answer.status, status, "{method} {target} {headers:?}: {answer:?}");
        assert_eq!(answer.header("Allow"), allow, "{method} {target}");
        if method != "HEAD" {
            assert!(!answer.error().is_empty());
        }
    }
}

#[test]
fn head_is_get_without_the_body() {
    let directory = Directory::new();
    let _process = FakeOpenVpn::start(directory.join("a.sock"), Mood::Healthy, clients());
    let daemon = daemon(&directory);
    let get = daemon.get("/o/connection_list");
    let head = daemon.call("HEAD", "/o/connection_list", &[], b"");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert_eq!(head.header("Content-Length"), Some(get.body.len().to_string().as_str()));
}

#[test]
fn connections_are_kept_as_the_client_wishes() {
    let daemon = Daemon::start(&[]);
    let mut stream = daemon.connect();
    for target in ["/i/node", "/nothing", "/i/node"] {
        stream
            .write_all(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes())
            .unwrap();
        let answer = Answer::read(&mut stream, false).unwrap();
        assert_eq!(answer.status, if target == "/nothing" { 404 } else { 200 });
        assert_eq!(answer.header("Connection"), None);
    }
    stream.write_all(b"GET /i/node HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").unwrap();
    let answer = Answer::read(&mut stream, false).unwrap();
    assert_eq!(answer.header("Connection"), Some("keep-alive"));
    stream.write_all(b"GET /i/node HTTP/1.0\r\n\r\n").unwrap();
    let answer = Answer::read(&mut stream, false).unwrap();
    assert_eq!(answer.header("Connection"), Some("close"));
    assert_eq!(std::io::Read::read(&mut stream, &mut [0]).unwrap(), 0);
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
fn the_node_answers_at_once_while_every_process_hangs_and_forty_wait() {
    let directory = Directory::new();
    let _hanging: Vec<_> = (0..8)
        .map(|number| directory.join(&format!("{number}.sock")))
        .map(|path| FakeOpenVpn::start(path, Mood::Silent, vec![]))
        .collect();
    let daemon = daemon(&directory);
    let waiting: Vec<_> = (0..40)
        .map(|_| {
            let mut stream = daemon.connect();
            stream
                .write_all(b"GET /o/connection_list HTTP/1.1\r\nHost: localhost\r\n\r\n")
                .unwrap();
            stream
        })
        .collect();
    // All forty have their thread before the first of them has its answer.
    let end = Instant::now() + common::PATIENCE;
    while daemon.status("Threads") < 40 + 40 {
        assert!(Instant::now() < end, "the requests are not taken");
        std::thread::sleep(Duration::from_millis(5));
    }
    let fastest = (0..20)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(daemon.get("/i/node").status, 200);
            start.elapsed()
        })
        .min()
        .unwrap();
    assert!(fastest < Duration::from_millis(50), "the contract: {fastest:?}");
    for mut stream in waiting {
        let answer = Answer::read(&mut stream, false).unwrap();
        assert_eq!(answer.status, 504, "{answer:?}");
    }
}

#[test]
fn forty_lists_at_once_are_all_complete() {
    let directory = Directory::new();
    let _processes: Vec<_> = (0..8)
        .map(|number| directory.join(&format!("{number}.sock")))
        .map(|path| FakeOpenVpn::start(path, Mood::Slow(5), clients()))
        .collect();
    let daemon = daemon(&directory);
    std::thread::scope(|scope| {
        let callers: Vec<_> =
            (0..40).map(|_| scope.spawn(|| daemon.get("/o/connection_list"))).collect();
        for caller in callers {
            let list: Value = caller.join().unwrap().json();
            assert_eq!(list["connection_list"].as_array().unwrap().len(), 16, "{list}");
            assert_eq!(list.get("failed"), None);
        }
    });
}
