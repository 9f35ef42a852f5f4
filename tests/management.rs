//! OpenVPN's clients over scripted management sockets in every mood.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;
#[path = "common/management.rs"]
mod management;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::{Answer, Daemon, TempDir, wait_until};
use management::{FakeClient, FakeOpenVpn, Mood, crowd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

const NO_ANSWER: &str = "did not answer within 2.5 s";

fn daemon(directory: &TempDir) -> Daemon {
    Daemon::start(&["-openvpn-dir", directory.path().to_str().unwrap()])
}

fn clients(count: u8) -> Vec<FakeClient> {
    let client =
        |n: u8| FakeClient::new(&format!("c{n}"), &format!("10.0.0.{n}"), "fd00::1", n.into());
    (1..=count).map(client).collect()
}

/// The answer to a list: how many clients are in it, and sockets that failed with their errors.
fn list(daemon: &Daemon) -> (usize, Vec<(String, String)>) {
    let answer = daemon.get("/o/connection_list");
    assert_eq!(answer.status, 200, "{answer:?}");
    let list = answer.json();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let failed = list["failed"].as_array().cloned().unwrap_or_default();
    let failed = failed.iter().map(|failed| (text(&failed["socket"]), text(&failed["error"])));
    (list["connection_list"].as_array().unwrap().len(), failed.collect())
}

fn disconnect(daemon: &Daemon, name: &str) -> Answer {
    daemon.post("/o/disconnect_client", &[("common_name", name)])
}

#[test]
fn lists_clients_with_names_and_addresses() {
    let directory = TempDir::new("sockets");
    // Real ones show other names: see tests/openvpn.rs.
    let odd = [
        ("CLIENT_LIST", "10.0.0.1", "fd00::1"),
        ("a:\"b\" c", "", "::"),
        ("not UTF-8 \u{fffd}", "10.0.0.9", ""),
    ];
    let mut fakes = odd.map(|(name, v4, v6)| FakeClient::new(name, v4, v6, 1)).to_vec();
    fakes.last_mut().unwrap().name = b"not UTF-8 \xff".to_vec();
    fakes.push(FakeClient::new("UNDEF", "10.0.0.8", "", 2));
    fakes.push(FakeClient::new("no address yet", "", "", 3));
    let daemon = daemon(&directory);
    let expected = odd.map(|(common_name, ip_four, ip_six)| {
        json!({"common_name": common_name, "ip_four": ip_four, "ip_six": ip_six})
    });
    for mood in [Mood::Healthy, Mood::Chatty, Mood::Slow(50), Mood::Stalled] {
        let _process = FakeOpenVpn::start(directory.join("s.sock"), mood, fakes.clone());
        let list = daemon.get("/o/connection_list").json();
        assert_eq!(list, json!({ "connection_list": expected }), "{mood:?}");
    }
    let log = daemon.log();
    assert!(!log.iter().any(|line| line.contains("time-out")), "{log:#?}");
}

#[test]
fn a_bad_process_costs_its_own_entry_only() {
    let too_long = "sent a reply of more than 2048 KiB";
    let moods = [
        (Mood::Silent, NO_ANSWER),
        (Mood::Full, NO_ANSWER),
        (Mood::Deaf, NO_ANSWER),
        (Mood::Reply(""), NO_ANSWER),
        (Mood::NoEnd, NO_ANSWER),
        (Mood::Drip, NO_ANSWER),
        (Mood::CloseAtOnce, "closed the connection before its greeting"),
        (Mood::Close(0), "closed the connection in the middle of its reply"),
        (
            Mood::GarbageGreeting,
            "sent a reply that was not understood: \"HTTP/1.0 400 Bad Request\" for a greeting",
        ),
        (Mood::Reply("END\r\n"), "sent a reply that was not understood: a report without clients"),
        (Mood::Reply("ERROR: no \x1b[2J\r\n"), "refused the command: no \u{fffd}[2J"),
        (Mood::FloodLine, "sent a line of more than 8 KiB"),
        (Mood::FloodNews, too_long),
        (Mood::FloodRows, too_long),
        (
            Mood::Password,
            "asked for a password; remove the password file from the `management` line of its \
             OpenVPN configuration",
        ),
    ];
    let directory = TempDir::new("sockets");
    let start = |name: &str, mood| FakeOpenVpn::start(directory.join(name), mood, clients(3));
    let _healthy = start("ok", Mood::Healthy);
    let name = |number| format!("{number:02}");
    let numbered = || moods.iter().enumerate();
    let _bad: Vec<_> = numbered().map(|(number, (mood, _))| start(&name(number), *mood)).collect();
    let expected = numbered().map(|(number, (_, error))| (name(number), (*error).to_owned()));
    let daemon = daemon(&directory);
    // So for twenty callers at once, and once more for what the first ones have left behind.
    for callers in [20, 1] {
        thread::scope(|scope| {
            for _ in 0..callers {
                scope.spawn(|| assert_eq!(list(&daemon), (3, expected.clone().collect())));
            }
        });
    }
}

#[test]
fn what_is_not_there_has_no_clients() {
    let (directory, elsewhere) = (TempDir::new("sockets"), TempDir::new("sockets"));
    let missing = Daemon::start(&["-openvpn-dir", directory.join("missing").to_str().unwrap()]);
    let daemon = daemon(&directory);
    drop(UnixListener::bind(directory.join("stale.sock")).unwrap());
    fs::write(directory.join("notes.txt"), "x").unwrap();
    fs::create_dir(directory.join("sub")).unwrap();
    symlink("nowhere", directory.join("broken")).unwrap();
    symlink("notes.txt", directory.join("link-to-notes")).unwrap();
    for daemon in [&missing, &daemon] {
        assert_eq!(daemon.get("/o/connection_list").body, r#"{"connection_list":[]}"#);
        assert_eq!(disconnect(daemon, "x").status, 204);
    }
    // A socket counts once, whatever leads to it.
    let start = |path, count| FakeOpenVpn::start(path, Mood::Healthy, clients(count));
    let _here = start(directory.join("here"), 1);
    let _there = start(elsewhere.join("there"), 2);
    symlink("here", directory.join("a-link")).unwrap();
    symlink(elsewhere.join("there"), directory.join("link")).unwrap();
    symlink(elsewhere.join("there"), directory.join("link-again")).unwrap();
    assert_eq!(list(&daemon), (3, vec![]));
}

#[test]
fn a_process_that_comes_and_goes() {
    let directory = TempDir::new("sockets");
    let daemon = daemon(&directory);
    for mood in [Mood::Healthy, Mood::Stalled, Mood::Silent, Mood::Healthy] {
        let _process = FakeOpenVpn::start(directory.join("s"), mood, clients(2));
        let answer = daemon.get("/o/connection_list");
        assert_eq!(answer.status, if mood == Mood::Silent { 504 } else { 200 }, "{mood:?}");
        assert_eq!(answer.body.contains("c2"), mood != Mood::Silent, "{mood:?}");
    }
    assert_eq!(list(&daemon), (0, vec![]));
    // A thread that nobody needs any more ends, and so does what it holds.
    wait_until("no agent is left", || !daemon.thread_names().contains(&"agent".to_owned()));
}

#[test]
fn what_keeps_the_daemon_from_asking_is_said() {
    let directory = TempDir::new("sockets");
    let error = |path: &str| Daemon::start(&["-openvpn-dir", path]).get("/o/connection_list");
    fs::write(directory.join("file"), "").unwrap();
    let file = directory.join("file").to_str().unwrap().to_owned();
    let sentence = format!("OpenVPN directory {file} cannot be read: Not a directory");
    assert!(error(&file).error().contains(&sentence));

    // Bound where its path is short, then moved.
    let deep = directory.join(&"d".repeat(120));
    fs::create_dir(&deep).unwrap();
    let _listener = UnixListener::bind(directory.join("s")).unwrap();
    fs::rename(directory.join("s"), deep.join("s")).unwrap();
    let answer = error(deep.to_str().unwrap());
    assert_eq!(answer.status, 502);
    let error = answer.error();
    assert!(error.contains("/s has a path of more than the 107 bytes"), "{error}");
}

/// The daemon runs as another user; needs root and `setpriv`.
#[test]
fn permissions() {
    let (directory, inner) = (TempDir::new("sockets"), TempDir::new("inner"));
    let process = FakeOpenVpn::start(directory.join("ok.sock"), Mood::Healthy, clients(3));
    let set_mode =
        |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    set_mode(&process.path, 0o777);
    set_mode(inner.path(), 0o777);
    let path = directory.path().to_str().unwrap();
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    nobody.arg(env!("CARGO_BIN_EXE_vpn-daemon"));
    let daemon = Daemon::start_as(nobody, &["-openvpn-dir", path], |command| {
        command.env("RUNTIME_DIRECTORY", inner.path());
    });
    let unreadable = "cannot be read: permission denied; run the daemon in the directory's group, \
                      and give that group the right to read and enter it (mode 0750)";
    let closed = "/ok.sock may not be used by the daemon: permission denied; run the daemon in the \
                  group of the directory, and give that group the right to enter it (mode 0750)";
    for (mode, error) in [(0o751, unreadable), (0o754, closed)] {
        set_mode(directory.path(), mode);
        let answer = daemon.get("/o/connection_list");
        assert_eq!(answer.status, 502, "{answer:?}");
        assert!(answer.error().contains(path) && answer.error().ends_with(error), "{answer:?}");
    }
    set_mode(directory.path(), 0o755);
    assert_eq!(list(&daemon), (3, vec![]));
    // Nor is a link passed over because nobody may see where it leads.
    let elsewhere = TempDir::new("sockets");
    symlink(elsewhere.join("s"), directory.join("link")).unwrap();
    assert_eq!(list(&daemon), (3, vec![]));
    set_mode(elsewhere.path(), 0o700);
    let (listed, failed) = list(&daemon);
    assert_eq!((listed, failed.len(), &*failed[0].0), (3, 1, "link"));
    assert!(failed[0].1.starts_with("may not be used by the daemon: permission denied"));
}

/// The reserve of descriptors is what 1,024 sockets at their worst take: connected, and knocked at.
#[test]
fn a_thousand_that_hang_and_several_callers_leave_the_others_their_lists() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most.min(8192), most).unwrap();
    let directory = TempDir::new("sockets");
    let (hanging, healthy, excess) = (1016, 8, 76);
    let hang = |number| UnixListener::bind(directory.join(&format!("b{number}"))).unwrap();
    let _hanging: Vec<_> = (0..hanging + excess).map(hang).collect();
    let path = |number| directory.join(&format!("a{number}"));
    let answer = |number| FakeOpenVpn::start(path(number), Mood::Slow(300), clients(64));
    let processes: Vec<_> = (0..healthy).map(answer).collect();
    let start = |limit: &str| {
        let mut limited = Command::new("prlimit");
        limited.args([&format!("--nofile={limit}"), env!("CARGO_BIN_EXE_vpn-daemon")]);
        let path = directory.path().to_str().unwrap();
        Daemon::start_as(limited, &["-max-connections", "16", "-openvpn-dir", path], |_| {})
    };
    // A hard limit that is not one too many.
    let line = start("256:256").wait_for_log("are needed");
    let needed = line.split(" are needed").next().unwrap().rsplit(' ').next().unwrap();
    let daemon = start(&format!("256:{needed}"));
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                let (listed, failed) = list(&daemon);
                assert_eq!((listed, failed.len()), (64 * healthy, hanging + excess));
                let not_asked = "was not asked: the directory has more than 1024 sockets";
                assert!(failed[..hanging].iter().all(|(_, error)| error == NO_ANSWER));
                assert!(failed[hanging..].iter().all(|(_, error)| error == not_asked));
            });
        }
    });
    // Who comes while a list is under way shares the next one.
    assert!(processes.iter().all(|process| process.commands().len() < 12));
    let log = daemon.log();
    assert!(!log.iter().any(|line| line.contains("open files")), "{log:#?}");
}

#[test]
fn out_of_descriptors_is_an_error_of_that_socket() {
    let directory = TempDir::new("sockets");
    let processes: Vec<_> = (0..100)
        .map(|n| FakeOpenVpn::start(directory.join(&n.to_string()), Mood::Slow(500), clients(1)))
        .collect();
    let daemon = daemon(&directory);
    let limit = |number: usize| {
        let pid = format!("--pid={}", daemon.pid());
        let status = Command::new("prlimit").args([&pid, &format!("--nofile={number}:")]).status();
        assert!(status.unwrap().success());
    };
    limit(daemon.open_files() + 40);
    let (listed, failed) = list(&daemon);
    assert_eq!(listed + failed.len(), 100);
    let error = "could not be connected to: Too many open files (os error 24)";
    assert!(listed > 0 && !failed.is_empty());
    assert!(failed.iter().all(|(_, failure)| failure == error), "{failed:?}");
    limit(1024);
    assert_eq!(list(&daemon), (processes.len(), vec![]));
}

#[test]
fn a_backlog_that_empties_is_used() {
    let directory = TempDir::new("sockets");
    let process = FakeOpenVpn::start(directory.join("s"), Mood::Healthy, clients(2));
    // The first of them is being served, the others wait; then they leave.
    let (crowd, daemon) = (crowd(&process.path), daemon(&directory));
    thread::scope(|scope| {
        let caller = scope.spawn(|| list(&daemon));
        thread::sleep(Duration::from_millis(100));
        drop(crowd);
        assert_eq!(caller.join().unwrap(), (2, vec![]));
    });
}

#[test]
fn disconnects_every_client_of_that_name() {
    let (long, fits) = ("é".repeat(64), "é".repeat(63) + "x");
    let names = "plain|  spaces  |say \"hi\"|back\\slash\\|\\\"|10.0.0.1:1194|tcp:10.0.0.1:1194|:";
    let names: Vec<_> = names.split('|').chain([&*long, &fits, "lossy\u{fffd}"]).collect();
    let directory = TempDir::new("sockets");
    let others = ["plain", "10.0.0.1:1194", "UNDEF", "bystander"];
    let mut all: Vec<_> = names
        .iter()
        .chain(&others)
        .zip(1..)
        .map(|(name, id)| FakeClient::new(name, "", "", id))
        .collect();
    all[names.len() - 1].name = b"lossy\xff".to_vec();
    let moods = [Mood::Healthy, Mood::Chatty, Mood::Stalled];
    let start = |mood| FakeOpenVpn::start(directory.join(&format!("{mood:?}")), mood, all.clone());
    let processes = moods.map(start);
    let daemon = daemon(&directory);
    // `UNDEF` is nobody.
    for name in names.iter().chain(&["UNDEF"]) {
        for _ in 0..2 {
            assert_eq!(disconnect(&daemon, name).status, 204, "{name:?}");
        }
        let left = processes[0].names();
        assert!(*name == "UNDEF" || !left.iter().any(|left| left == name), "{name:?}");
    }
    for process in &processes {
        assert_eq!(process.names(), ["UNDEF", "bystander"]);
    }
    let line = daemon.wait_for_log(r#"common_name="10.0.0.1:1194" socket"#);
    let counts = ["Chatty", "Healthy", "Stalled"].map(|at| format!("socket={at:?} disconnected=2"));
    assert!(line.contains(&counts.join(" ")), "{line}");
}

#[test]
fn disconnecting_goes_on_when_a_process_fails() {
    let directory = TempDir::new("sockets");
    let start = |name, mood| FakeOpenVpn::start(directory.join(name), mood, clients(2));
    let _hangs = start("a", Mood::Silent);
    let healthy = start("b", Mood::Healthy);
    let daemon = daemon(&directory);
    assert_eq!(disconnect(&daemon, "c1").status, 504);
    assert_eq!(healthy.names(), ["c2"]);
    daemon.wait_for_log(r#"common_name="c1" socket="b" disconnected=1 error="#);

    let _refuses = start("c", Mood::Reply("ERROR: out of order\r\n"));
    let answer = disconnect(&daemon, "c2");
    assert_eq!((answer.status, healthy.names().len()), (502, 0));
    let path = directory.path().display();
    assert_eq!(
        answer.error(),
        format!(
            "OpenVPN management socket {path}/a {NO_ANSWER}; {path}/c refused the command: out of \
             order"
        )
    );
}

#[test]
fn a_process_that_ends_half_way_through_disconnecting() {
    let directory = TempDir::new("sockets");
    let twins = vec![FakeClient::new("a:b", "", "", 1), FakeClient::new("a:b", "", "", 2)];
    let _process = FakeOpenVpn::start(directory.join("s"), Mood::Close(2), twins);
    let daemon = daemon(&directory);
    let answer = disconnect(&daemon, "a:b");
    assert_eq!(answer.status, 502);
    assert!(answer.error().contains("in the middle of its reply"), "{}", answer.error());
    daemon.wait_for_log(r#"common_name="a:b" socket="s" disconnected=1 error="#);
}
