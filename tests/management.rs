//! The OpenVPN backend over scripted management sockets in every mood.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/management.rs"]
mod management;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use management::{Directory, FakeClient, FakeOpenVpn, Mood, crowd};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vpn_daemon::openvpn::{Client, CommonName, Error, OpenVpn, SocketError, Stage};

/// For what answers.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// For what hangs.
fn short() -> Instant {
    Instant::now() + Duration::from_millis(2500)
}

fn name(text: &str) -> CommonName {
    text.parse().unwrap()
}

fn clients(count: u8) -> Vec<FakeClient> {
    (1..=count)
        .map(|n| {
            FakeClient::new(
                &format!("c{n}"),
                &format!("10.0.0.{n}"),
                &format!("fd00::{n}"),
                n.into(),
            )
        })
        .collect()
}

fn backend(directory: &Directory) -> OpenVpn {
    OpenVpn::new(directory.path().to_owned())
}

#[test]
fn lists_clients_with_names_and_addresses() {
    let directory = Directory::new();
    let odd = [
        ("END", "10.0.0.1", "fd00::1"),
        ("CLIENT_LIST", "10.0.0.2", ""),
        ("a, \"b\" \\ c:d;e", "", "fd00::3"),
        ("YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=", "10.0.0.4", "fd00::4"),
        ("Zoë 🐈", "10.0.0.5", "::"),
        ("twice", "10.0.0.6", ""),
        ("twice", "10.0.0.7", ""),
    ];
    let mut fakes: Vec<FakeClient> =
        odd.iter().map(|(name, v4, v6)| FakeClient::new(name, v4, v6, 1)).collect();
    fakes.push(FakeClient::new("UNDEF", "", "", 2));
    fakes.push(FakeClient::new("UNDEF", "10.0.0.8", "", 3));
    fakes.push(FakeClient::new("no address yet", "", "", 4));
    for mood in [Mood::Healthy, Mood::Chatty, Mood::Slow(50), Mood::Stalled] {
        let _process = FakeOpenVpn::start(directory.join("s.sock"), mood, fakes.clone());
        let listing = backend(&directory).clients(soon()).unwrap();
        let expected: Vec<Client> = odd
            .iter()
            .map(|(common_name, ipv4, ipv6)| Client { common_name, ipv4, ipv6 })
            .collect();
        assert_eq!(listing.clients().collect::<Vec<_>>(), expected, "{mood:?}");
        assert!(listing.failed.is_empty(), "{mood:?}");
    }
}

#[test]
fn a_bad_process_costs_its_own_entry_only() {
    let moods = [
        (Mood::Silent, "did not answer within 2.5 s"),
        (Mood::Full, "did not answer within 2.5 s"),
        (Mood::Deaf, "did not answer within 2.5 s"),
        (Mood::Mute, "did not answer within 2.5 s"),
        (Mood::NoEnd, "did not answer within 2.5 s"),
        (Mood::Drip, "did not answer within 2.5 s"),
        (Mood::CloseAtOnce, "closed the connection before its greeting"),
        (Mood::CloseAfterGreeting, "closed the connection in the middle of its reply"),
        (Mood::CloseInReply, "closed the connection in the middle of its reply"),
        (
            Mood::GarbageGreeting,
            "sent a reply that was not understood: \"HTTP/1.0 400 Bad Request\" for a greeting",
        ),
        (
            Mood::Garbage,
            "sent a reply that was not understood: a line that is no part of a status report",
        ),
        (Mood::Reply("END\r\n"), "sent a reply that was not understood: a report without clients"),
        (
            Mood::Reply("CLIENT_LIST\tx\r\n"),
            "sent a reply that was not understood: a client before the names of the columns",
        ),
        (
            Mood::Reply("SUCCESS: pid=1\r\n"),
            "sent a reply that was not understood: a line that is no part of a status report",
        ),
        (Mood::Reply("ERROR: no \x1b[2J\r\n"), "refused the command: no \u{fffd}[2J"),
        (Mood::FloodLine, "sent a line of more than 8 KiB"),
        (Mood::FloodNews, "sent a reply of more than 2048 KiB"),
        (Mood::FloodRows, "sent a reply of more than 2048 KiB"),
        (
            Mood::Password,
            "asked for a password; remove the password file from the `management` line of its \
             OpenVPN configuration",
        ),
    ];
    // All at once beside a healthy one, and each alone.
    let directory = Directory::new();
    let mut processes = vec![FakeOpenVpn::start(directory.join("ok"), Mood::Healthy, clients(3))];
    for (index, (mood, _)) in moods.iter().enumerate() {
        processes.push(FakeOpenVpn::start(
            directory.join(&format!("{index:02}")),
            *mood,
            clients(3),
        ));
    }
    let backend = backend(&directory);
    let listing = backend.clients(short()).unwrap();
    assert_eq!(listing.clients().count(), 3);
    let failed: Vec<(String, String)> =
        listing.failed.iter().map(|f| (f.socket.clone(), f.error.to_string())).collect();
    let expected: Vec<(String, String)> = moods
        .iter()
        .enumerate()
        .map(|(index, (_, error))| (format!("{index:02}"), (*error).to_owned()))
        .collect();
    assert_eq!(failed, expected);

    thread::scope(|scope| {
        for (mood, error) in moods {
            scope.spawn(move || {
                let directory = Directory::new();
                let process = FakeOpenVpn::start(directory.join("x.sock"), mood, clients(3));
                let backend = OpenVpn::new(directory.path().to_owned());
                let all = backend.clients(short()).unwrap_err();
                let path = process.path.display();
                let sentence = format!("OpenVPN management socket {path} {error}");
                assert_eq!(all.to_string(), sentence);
                let timeout = error.starts_with("did not answer");
                assert_eq!(all.is_timeout(), timeout, "{mood:?}");
            });
        }
    });
}

#[test]
fn says_the_budget_it_had() {
    let directory = Directory::new();
    let _process = FakeOpenVpn::start(directory.join("default-1.sock"), Mood::Silent, clients(1));
    let _healthy = FakeOpenVpn::start(directory.join("ok"), Mood::Healthy, clients(1));
    let deadline = Instant::now() + Duration::from_millis(1200);
    let listing = backend(&directory).clients(deadline).unwrap();
    assert_eq!(listing.failed[0].socket, "default-1.sock");
    assert_eq!(listing.failed[0].error.to_string(), "did not answer within 1.2 s");
}

#[test]
fn what_is_not_there_has_no_clients() {
    let directory = Directory::new();
    let missing = OpenVpn::new(directory.join("missing"));
    assert!(missing.clients(soon()).unwrap().clients().next().is_none());
    assert_eq!(missing.disconnect(&name("x"), soon()).unwrap(), 0);

    drop(UnixListener::bind(directory.join("stale.sock")).unwrap());
    fs::write(directory.join("notes.txt"), "x").unwrap();
    fs::create_dir(directory.join("sub")).unwrap();
    symlink("nowhere", directory.join("broken")).unwrap();
    symlink("notes.txt", directory.join("link-to-notes")).unwrap();
    let backend = backend(&directory);
    assert_eq!(backend.sockets().unwrap(), [directory.join("stale.sock")]);
    let listing = backend.clients(soon()).unwrap();
    assert!(listing.clients().next().is_none() && listing.failed.is_empty());
    assert_eq!(backend.disconnect(&name("x"), soon()).unwrap(), 0);
    let probe = backend.probe(&directory.join("stale.sock"), soon());
    assert_eq!(probe, Err(SocketError::NotThere));

    // The stale one is no process: the only process has failed.
    let _silent = FakeOpenVpn::start(directory.join("silent"), Mood::Silent, clients(1));
    assert!(backend.clients(short()).unwrap_err().is_timeout());
}

#[test]
fn a_link_to_a_socket_counts_once() {
    let (directory, elsewhere) = (Directory::new(), Directory::new());
    let _here = FakeOpenVpn::start(directory.join("here"), Mood::Healthy, clients(1));
    let _there = FakeOpenVpn::start(elsewhere.join("there"), Mood::Healthy, clients(2));
    symlink("here", directory.join("a-link")).unwrap();
    symlink(elsewhere.join("there"), directory.join("link")).unwrap();
    symlink(elsewhere.join("there"), directory.join("link-again")).unwrap();
    let backend = backend(&directory);
    assert_eq!(backend.sockets().unwrap(), [directory.join("here"), directory.join("link")]);
    assert_eq!(backend.clients(soon()).unwrap().clients().count(), 3);
}

#[test]
fn a_file_in_place_of_the_directory_is_an_error() {
    let directory = Directory::new();
    fs::write(directory.join("file"), "").unwrap();
    let backend = OpenVpn::new(directory.join("file"));
    assert!(matches!(backend.clients(soon()), Err(Error::Directory { .. })));
}

/// The part of [`permissions`] that must not run as root: it is run by it, as another user.
#[test]
fn permissions_as_nobody() {
    let Some(directory) = std::env::var_os("VPN_DAEMON_TEST_PERMISSIONS") else {
        return;
    };
    let backend = OpenVpn::new(directory.clone().into());
    let path = backend.directory();
    match fs::metadata(path).unwrap().mode() & 0o007 {
        0o001 => {
            let error = backend.clients(soon()).unwrap_err();
            assert!(!error.is_timeout());
            assert_eq!(
                error.to_string(),
                format!(
                    "OpenVPN directory {} cannot be read: permission denied; run the daemon in \
                     the directory's group, and give that group the right to read and enter it \
                     (mode 0750)",
                    path.display()
                )
            );
        }
        0o004 => {
            let error = backend.clients(soon()).unwrap_err().to_string();
            assert!(
                error.contains("ok.sock may not be used by the daemon: permission denied"),
                "{error}"
            );
        }
        _ => assert_eq!(backend.clients(soon()).unwrap().clients().count(), 3),
    }
}

#[test]
fn permissions() {
    let directory = Directory::new();
    let process = FakeOpenVpn::start(directory.join("ok.sock"), Mood::Healthy, clients(3));
    fs::set_permissions(&process.path, fs::Permissions::from_mode(0o777)).unwrap();
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    for other in [0o001, 0o004, 0o005] {
        // Without root, the directory is closed to its owner, who is us.
        let mode = if root { 0o750 | other } else { other << 6 | other };
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
        // The path of the test binary may be closed to others, this link is not.
        let mut test = Command::new("/proc/self/exe");
        test.args(["--exact", "permissions_as_nobody"]);
        test.env("VPN_DAEMON_TEST_PERMISSIONS", directory.path()).current_dir("/");
        if root {
            test.uid(65534).gid(65534);
        }
        let output = test.output().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "mode {mode:o}: {printed}");
        assert!(printed.contains("1 passed"), "{printed}");
    }
}

/// The part of [`out_of_descriptors`] that needs a process of its own.
#[test]
fn out_of_descriptors_alone() {
    let Some(directory) = std::env::var_os("VPN_DAEMON_TEST_DESCRIPTORS") else {
        return;
    };
    let backend = OpenVpn::new(directory.into());
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let used = fs::read_dir("/proc/self/fd").unwrap().count() - 1;
    let limit =
        |spare: usize| setrlimit(Resource::RLIMIT_NOFILE, (used + spare) as u64, most).unwrap();
    let (mut errors, mut holes) = (0, 0);
    for spare in 0..12 {
        limit(spare);
        match backend.clients(soon()) {
            Ok(listing) => {
                assert_eq!(listing.clients().count() + listing.failed.len(), 20);
                for failed in &listing.failed {
                    let error = failed.error.to_string();
                    assert_eq!(error, "could not be opened: Too many open files");
                }
                holes += usize::from(!listing.failed.is_empty());
            }
            Err(error) => {
                assert!(error.to_string().contains("oo many open files"), "{error}");
                errors += 1;
            }
        }
    }
    assert!(errors > 0 && holes > 0);
    limit(30);
    assert_eq!(backend.clients(soon()).unwrap().clients().count(), 20);
}

#[test]
fn out_of_descriptors() {
    let directory = Directory::new();
    let _processes: Vec<FakeOpenVpn> = (0..20)
        .map(|n| FakeOpenVpn::start(directory.join(&n.to_string()), Mood::Healthy, clients(1)))
        .collect();
    let output = Command::new("/proc/self/exe")
        .args(["--exact", "out_of_descriptors_alone", "--test-threads=1"])
        .env("VPN_DAEMON_TEST_DESCRIPTORS", directory.path())
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
}

#[test]
fn a_path_too_long_for_an_address_is_an_entry() {
    let directory = Directory::new();
    let deep = directory.join(&"d".repeat(120));
    fs::create_dir(&deep).unwrap();
    // Bound where its path is short, then moved.
    let listener = UnixListener::bind(directory.join("s")).unwrap();
    fs::rename(directory.join("s"), deep.join("s")).unwrap();
    let error = OpenVpn::new(deep).clients(soon()).unwrap_err().to_string();
    assert!(error.contains("a Unix socket address holds 107"), "{error}");
    drop(listener);
}

#[test]
fn many_processes_at_once() {
    for count in [64, 200] {
        let directory = Directory::new();
        let processes: Vec<FakeOpenVpn> = (0..count)
            .map(|n| {
                FakeOpenVpn::start(
                    directory.join(&format!("{n}.sock")),
                    Mood::Slow(20),
                    clients(64),
                )
            })
            .collect();
        let listing = backend(&directory).clients(soon()).unwrap();
        assert_eq!(listing.clients().count(), 64 * processes.len());
        assert!(listing.failed.is_empty());
    }
}

#[test]
fn callers_at_once_all_get_whole_lists() {
    let directory = Directory::new();
    let processes: Vec<FakeOpenVpn> = (0..16)
        .map(|n| {
            FakeOpenVpn::start(directory.join(&format!("{n}.sock")), Mood::Slow(5), clients(64))
        })
        .collect();
    let backend = backend(&directory);
    thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| {
                let listing = backend.clients(soon()).unwrap();
                assert!(listing.failed.is_empty(), "{:?}", listing.failed);
                assert_eq!(listing.clients().count(), 64 * processes.len());
            });
        }
    });
    for process in &processes {
        assert_eq!(process.commands().len(), 40);
    }
}

#[test]
fn callers_at_a_socket_that_hangs_get_the_others() {
    let directory = Directory::new();
    let _hangs = FakeOpenVpn::start(directory.join("hangs"), Mood::Silent, clients(1));
    let _full = FakeOpenVpn::start(directory.join("full"), Mood::Full, clients(1));
    let _healthy = FakeOpenVpn::start(directory.join("ok"), Mood::Healthy, clients(9));
    let backend = backend(&directory);
    thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| {
                let listing = backend.clients(short()).unwrap();
                assert_eq!(listing.clients().count(), 9);
                assert_eq!(listing.failed.len(), 2);
            });
        }
    });
}

#[test]
fn a_backlog_that_empties_is_used() {
    let directory = Directory::new();
    let process = FakeOpenVpn::start(directory.join("s"), Mood::Healthy, clients(2));
    // The first of them is being served, the others wait; then they leave.
    let crowd = crowd(&process.path);
    let backend = backend(&directory);
    thread::scope(|scope| {
        let caller = scope.spawn(|| backend.clients(soon()).unwrap());
        thread::sleep(Duration::from_millis(100));
        drop(crowd);
        assert_eq!(caller.join().unwrap().clients().count(), 2);
    });
}

#[test]
fn disconnects_every_client_of_that_name() {
    let long = "€".repeat(64);
    let names = [
        "YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=",
        "plain",
        "a, b",
        "  spaces  ",
        "say \"hi\"",
        "back\\slash\\",
        "\\\"",
        "'single'",
        "# not a comment",
        "Zoë 🐈",
        "END",
        "10.0.0.1:1194",
        "tcp:10.0.0.1:1194",
        ":",
        &long,
        "lossy\u{fffd}",
    ];
    let directory = Directory::new();
    let all: Vec<FakeClient> = names
        .iter()
        .chain(&["plain", "10.0.0.1:1194", "bystander"])
        .zip(1..)
        .map(|(name, id)| FakeClient {
            name: name
                .replace('\u{fffd}', "\u{1}")
                .bytes()
                .map(|b| if b == 1 { 0xff } else { b })
                .collect(),
            ..FakeClient::new("", "", "", id)
        })
        .collect();
    let processes: Vec<FakeOpenVpn> = [Mood::Healthy, Mood::Chatty, Mood::Stalled]
        .into_iter()
        .map(|mood| FakeOpenVpn::start(directory.join(&format!("{mood:?}")), mood, all.clone()))
        .collect();
    let backend = backend(&directory);
    for text in names {
        let own = if ["plain", "10.0.0.1:1194"].contains(&text) { 2 } else { 1 };
        assert_eq!(backend.disconnect(&name(text), soon()).unwrap(), 3 * own, "{text:?}");
        assert!(!processes[0].names().iter().any(|left| left == text));
        assert_eq!(backend.disconnect(&name(text), soon()).unwrap(), 0, "{text:?}");
    }
    for process in &processes {
        assert_eq!(process.names(), ["bystander"]);
    }
}

#[test]
fn undef_is_nobody() {
    let directory = Directory::new();
    let unnamed = vec![FakeClient::new("UNDEF", "", "", 1)];
    let process = FakeOpenVpn::start(directory.join("s"), Mood::Healthy, unnamed);
    assert_eq!(backend(&directory).disconnect(&name("UNDEF"), soon()).unwrap(), 0);
    assert_eq!(process.names().len(), 1);
}

#[test]
fn disconnecting_goes_on_when_a_process_fails() {
    let directory = Directory::new();
    let _a = FakeOpenVpn::start(directory.join("a"), Mood::Silent, clients(1));
    let b = FakeOpenVpn::start(directory.join("b"), Mood::Healthy, clients(2));
    let backend = backend(&directory);
    let error = backend.disconnect(&name("c1"), short()).unwrap_err();
    assert!(error.is_timeout());
    assert_eq!(b.names(), ["c2"]);
    assert!(matches!(error, Error::Sockets { disconnected: 1, .. }));

    let _c =
        FakeOpenVpn::start(directory.join("c"), Mood::Reply("ERROR: out of order\r\n"), clients(1));
    let error = backend.disconnect(&name("c2"), short()).unwrap_err();
    assert!(!error.is_timeout());
    assert!(b.names().is_empty());
    let path = directory.path().display();
    assert_eq!(
        error.to_string(),
        format!(
            "OpenVPN management socket {path}/a did not answer within 2.5 s; \
             {path}/c refused the command: out of order"
        )
    );
}

#[test]
fn probe_tells_what_is_wrong() {
    let directory = Directory::new();
    let backend = backend(&directory);
    let probe = |mood| {
        let process = FakeOpenVpn::start(directory.join("probed"), mood, clients(1));
        let result = backend.probe(&process.path, short());
        assert!(process.commands().is_empty(), "a probe changes and asks nothing");
        result
    };
    assert_eq!(probe(Mood::Healthy).unwrap(), "OpenVPN Management Interface Version 5");
    assert_eq!(probe(Mood::Password), Err(SocketError::Password));
    assert_eq!(probe(Mood::CloseAtOnce), Err(SocketError::Closed(Stage::Greeting)));
    for (mood, expected) in [(Mood::Silent, Stage::Greeting), (Mood::Full, Stage::Connect)] {
        let result = probe(mood);
        assert!(
            matches!(result, Err(SocketError::NoAnswer { stage, .. }) if stage == expected),
            "{result:?}"
        );
    }
}
