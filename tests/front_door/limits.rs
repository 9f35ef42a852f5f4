//! Floods, slow clients, and what they may cost.

use std::fs::Permissions;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, connect, setsockopt, socket, sockopt,
};
use nix::unistd::chown;

use super::common::{DAEMON, Daemon, TempDir, wait_until};
use super::pki::{self, Pki};
use super::{CONNECTIONS, Connection, NODE, Site, names, post, raise_own_open_files};

// How a connection is held open: by what its client has said.
const SILENT: &str = "";
const HALF_A_HEAD: &str = "GET /i/node HTTP/1.1\r\nHost: n";
const HALF_A_BODY: &str = "POST /w/add_peer HTTP/1.1\r\nHost: n\r\nContent-Length: 99\r\n\r\na";
const IDLE: &str = NODE;
const MOODS: [&str; 4] = [SILENT, HALF_A_HEAD, HALF_A_BODY, IDLE];

fn hold_open(site: &Site, mood: &str) -> Box<dyn Connection> {
    if mood == SILENT {
        return Box::new(site.daemon.connect());
    }
    let mut connection = site.connect();
    connection.send(mood);
    if mood == IDLE {
        assert_eq!(connection.answer().status, 200);
    }
    connection
}

/// The best of a few tries: a machine that does ten things at once is not what is measured.
fn time_of_a_newcomer(site: &Site) -> Duration {
    let one = || {
        let start = Instant::now();
        site.serves();
        start.elapsed()
    };
    (0..5).map(|_| one()).min().unwrap()
}

#[test]
fn a_flood_does_not_keep_newcomers_out() {
    raise_own_open_files();
    let flood = |site: &Site| {
        for mood in MOODS {
            let _held: Vec<_> = (0..1500).map(|_| hold_open(site, mood)).collect();
            let time = time_of_a_newcomer(site);
            assert!(time < Duration::from_secs(1), "{mood:?}: {time:?}");
        }
    };
    let sites = Site::both(&[]);
    thread::scope(|scope| sites.iter().for_each(|site| drop(scope.spawn(move || flood(site)))));
}

/// Until threads and descriptors are what they were, or nearly so: tiny_http keeps some threads and
/// the front door some connections to it.
fn settles(daemon: &Daemon, threads: u64, files: usize) {
    wait_until("threads and descriptors come back", || {
        daemon.status("Threads") <= threads + 8 && daemon.open_files() <= files + 16
    });
}

#[test]
fn endless_heads_cost_no_memory() {
    let site = Site::plain(&[]);
    site.serves();
    let daemon = &site.daemon;
    let (threads, files) = (daemon.status("Threads"), daemon.open_files());
    let before = daemon.status("VmHWM");
    let end = Instant::now() + Duration::from_secs(8);
    let flood = || {
        while Instant::now() < end {
            let mut stream = daemon.connect();
            let mut result = stream.try_send("GET /i/node HTTP/1.1\r\nX: ");
            while result.is_ok() && Instant::now() < end {
                // 30 clients at full speed would only measure the machine.
                thread::sleep(Duration::from_millis(2));
                result = stream.write_all(&[b'a'; 16 * 1024]);
            }
        }
    };
    thread::scope(|scope| (0..30).for_each(|_| drop(scope.spawn(flood))));
    let rise = daemon.status("VmHWM") - before;
    assert!(rise < 40 * 1024, "{rise} KiB");
    settles(daemon, threads, files);
    site.serves();
}

#[test]
fn threads_and_descriptors_come_back() {
    for site in Site::both(&[]) {
        site.serves();
        let (threads, files) = (site.daemon.status("Threads"), site.daemon.open_files());
        let mut held: Vec<_> =
            (0..200).map(|number| hold_open(&site, MOODS[number % MOODS.len()])).collect();
        for connection in held.iter_mut().skip(3).step_by(4) {
            connection.send(CONNECTIONS);
        }
        assert!(site.daemon.status("Threads") > threads + 100);
        drop(held);
        settles(&site.daemon, threads, files);
    }
}

/// Requests that hang in the backend, as many as there may be connections.
fn fill(site: &Site, count: usize) -> Vec<Box<dyn Connection>> {
    let mut busy: Vec<_> = (0..count).map(|_| site.connect()).collect();
    busy.iter_mut().for_each(|connection| connection.send(CONNECTIONS));
    // They are under way once read, which nothing shows from outside.
    thread::sleep(Duration::from_millis(700));
    busy
}

/// All have their answers.
fn drain(busy: Vec<Box<dyn Connection>>) {
    for mut connection in busy {
        let answer = connection.answer();
        assert_eq!(answer.status, 504, "{answer:?}");
    }
}

#[test]
fn over_the_limit_everybody_is_told() {
    raise_own_open_files();
    for site in Site::both(&["-max-connections", "4"]) {
        let _openvpn = site.hang();
        let silent: Vec<_> = (0..4).map(|_| site.connect()).collect();
        let busy = fill(&site, 4);
        drop(silent);
        let mut newcomer = site.connect();
        let answer = newcomer.ask(NODE);
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(answer.error().contains("connection limit"));
        newcomer.ends();
        // What is asked with HEAD has no body, whatever the answer.
        let mut newcomer = site.connect();
        let answer = newcomer.ask(&NODE.replace("GET", "HEAD"));
        assert_eq!((answer.status, answer.body.as_str()), (503, ""));
        newcomer.ends();
        // A body is read first, or the client would lose the answer.
        assert_eq!(site.ask(&post("/w/add_peer", &"a".repeat(60_000))).status, 503);
        // The last ones may be served, once the others have their answers.
        thread::scope(|scope| {
            let newcomers: Vec<_> = (0..100).map(|_| scope.spawn(|| site.try_ask(NODE))).collect();
            for newcomer in newcomers {
                let status = newcomer.join().unwrap();
                assert!(matches!(status, Ok(503 | 200)), "{status:?}");
            }
        });
        drain(busy);
        site.serves();
    }
}

#[test]
fn node_is_answered_while_every_backend_hangs() {
    let site = Site::plain(&[]);
    let _openvpn = site.hang();
    let _busy = fill(&site, 60);
    let time = time_of_a_newcomer(&site);
    assert!(time < Duration::from_secs(1), "{time:?}");
}

/// A user whose threads can be limited: root's cannot.
fn as_nobody(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", program]);
    command
}

/// Lets the daemon start no more threads.
fn without_threads(daemon: &Daemon) {
    let limit = [format!("--pid={}", daemon.pid()), "--nproc=1:1".to_owned()];
    assert!(as_nobody("prlimit").args(limit).status().unwrap().success());
    wait_until("none is left", || !daemon.thread_names().contains(&"request".to_owned()));
}

#[test]
fn without_threads_backends_are_not_asked_and_node_is_answered() {
    let inner = TempDir::new("inner");
    std::fs::set_permissions(inner.path(), Permissions::from_mode(0o777)).unwrap();
    let daemon = Daemon::start_as(as_nobody(DAEMON), &[], |command| {
        command.env("RUNTIME_DIRECTORY", inner.path());
    });
    let mut connection = daemon.connect();
    assert_eq!(connection.ask(NODE).status, 200);
    without_threads(&daemon);
    assert_eq!(connection.ask(NODE).status, 200);
    let answer = connection.ask(CONNECTIONS);
    assert_eq!(answer.status, 503);
    assert_eq!(answer.error(), "the daemon has run out of threads; try again");
    daemon.wait_for_log("no thread for a request: ");
}

/// With buffers that few answers fill: segments so small keep the daemon's small as well.
fn connect_narrowly(site: &Site) -> Box<dyn Connection> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let stream = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    setsockopt(&stream, sockopt::RcvBuf, &4096).unwrap();
    setsockopt(&stream, sockopt::TcpMaxSeg, &536).unwrap();
    let address = SockaddrIn::new(127, 0, 0, 1, site.daemon.address.port());
    connect(stream.as_raw_fd(), &address).unwrap();
    match &site.tls {
        None => Box::new(TcpStream::from(stream)),
        Some((_, client)) => Box::new(pki::connect(client, stream.into()).unwrap()),
    }
}

#[test]
fn who_reads_late_gets_every_answer() {
    for site in Site::both(&[]) {
        let mut late = connect_narrowly(&site);
        let waits = || site.daemon.thread_names().iter().any(|name| name == "answer");
        let ask = |_: &usize| {
            late.send(NODE);
            thread::sleep(Duration::from_millis(2));
            waits()
        };
        let asked = (1..5000).find(ask).expect("an answer that has to wait");
        for _ in 0..asked {
            assert_eq!(late.answer().status, 200);
        }
        assert_eq!(late.ask(NODE).status, 200);
    }
}

/// Nor is a client waited for that takes no answers: it is cut.
#[test]
fn without_threads_nobody_waits_for_a_client_that_does_not_read() {
    let inner = TempDir::new("inner");
    std::fs::set_permissions(inner.path(), Permissions::from_mode(0o777)).unwrap();
    let pki = Pki::usual();
    let client = pki.client("portal", "portal");
    chown(&pki.credential("server.key"), Some(65534.into()), None).unwrap();
    let daemon = Daemon::start_as(as_nobody(DAEMON), &[], |command| {
        command.env("RUNTIME_DIRECTORY", inner.path());
        command.env("CREDENTIALS_DIRECTORY", pki.credentials_directory());
    });
    let site = Site { daemon, tls: Some((pki, client)) };
    let (mut reads, mut deaf) = (site.connect(), connect_narrowly(&site));
    without_threads(&site.daemon);
    let is_cut = (0..5000).any(|_| {
        let is_cut = deaf.try_send(NODE).is_err();
        // Its answer is written, or not, before the other one's.
        thread::sleep(Duration::from_millis(3));
        assert_eq!(reads.ask(NODE).status, 200);
        is_cut
    });
    assert!(is_cut, "its answers went somewhere");
}

/// Out of descriptors, under the lowest limit at which the daemon is of use.
#[test]
fn a_low_limit_of_open_files_is_lived_with() {
    raise_own_open_files();
    for files in [64, 128, 300] {
        let site = Site::limited(&format!("{files}:{files}"), &[]);
        let line = site.daemon.wait_for_log("open files are allowed");
        assert!(line.contains("connections at a time"), "{line}");
        let openvpn = site.hang();
        for _ in 0..3 {
            let mut held: Vec<_> = (0..400).map(|_| site.daemon.connect()).collect();
            for connection in &mut held {
                // Cut already, if its place was given away.
                let _ = connection.try_send(CONNECTIONS);
            }
            thread::sleep(Duration::from_millis(300));
        }
        drop(openvpn);
        wait_until("it serves again", || site.try_ask(NODE).is_ok_and(|status| status == 200));
        let shortages =
            site.daemon.log().iter().filter(|line| line.contains("cannot accept")).count();
        assert!(shortages < 60, "{shortages} lines about it");
    }
}

/// `accept` itself fails: those that only wait make room, and the end comes all the same.
#[test]
fn without_descriptors_the_waiting_make_room() {
    let mut site = Site::plain(&[]);
    site.serves();
    let _idle = [(); 8].map(|()| hold_open(&site, IDLE));
    // The inner connections that nobody needs have been closed after this.
    thread::sleep(Duration::from_secs(2));
    site.daemon.limit_open_files(&format!("{}:", site.daemon.open_files()));
    site.serves();
    let line = site.daemon.wait_for_log("cannot accept a connection");
    assert!(line.contains("that were waiting"), "{line}");
    site.serves();
    site.daemon.limit_open_files("3:");
    let _queued = [(); 4].map(|()| site.daemon.connect());
    site.daemon.signal("TERM");
    assert_eq!(site.daemon.wait().code(), Some(0));
    // It says so once a second while it waits for descriptors.
    let log = site.daemon.log();
    let tries = log.iter().skip_while(|line| !line.contains("SIGTERM: stopping"));
    assert!(tries.filter(|line| line.contains("cannot accept")).count() < 4, "{log:#?}");
    assert_eq!(names(site.daemon.directory()), [""; 0]);
}

#[test]
fn a_handshake_has_five_seconds() {
    let site = Site::tls(&[]);
    let started = Instant::now();
    let [mut silent, mut half] = [(); 2].map(|()| site.daemon.connect());
    // The beginning of a ClientHello of 512 bytes.
    half.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]).unwrap();
    site.serves();
    for stream in [&mut silent, &mut half] {
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let taken = started.elapsed();
    assert!((5..9).contains(&taken.as_secs()), "{taken:?}");
    site.daemon.wait_for_log("the handshake took too long");
}

/// 10 s for a head, 20 s for a body, 60 s idle, 20 s to take an answer: all at once.
#[test]
fn slow_clients_run_out_of_time() {
    let site = Site::plain(&[]);
    let tls = Site::tls(&[]);
    let [mut silent, mut head, mut body, mut idle] = MOODS.map(|mood| hold_open(&site, mood));
    let mut stingy = hold_open(&tls, HALF_A_HEAD);
    let (mut deaf, mut deaf_tls) = (site.connect(), tls.connect());
    let requests = NODE.repeat(10_000);
    let start = Instant::now();
    thread::scope(|scope| {
        // A byte now and then does not help.
        scope.spawn(|| is_cut(&mut *head, "a", start, 8..18));
        scope.spawn(|| is_cut(&mut *stingy, "a", start, 8..18));
        scope.spawn(|| is_cut(&mut *body, "a", start, 18..28));
        // Until the daemon cannot write any more.
        scope.spawn(|| is_cut(&mut *deaf, &requests, start, 15..60));
        scope.spawn(|| is_cut(&mut *deaf_tls, &requests, start, 15..60));
        for connection in [&mut silent, &mut idle] {
            scope.spawn(move || {
                connection.socket().set_read_timeout(Some(Duration::from_secs(80))).unwrap();
                assert_eq!(connection.read(&mut [0]).unwrap_or(0), 0);
                assert!((58..68).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
            });
        }
    });
    site.serves();
    tls.serves();
}

/// Says this again and again, without reading an answer, until it is cut. Late by what a busy machine
/// takes, early by what passed before `start`.
fn is_cut(connection: &mut dyn Connection, says: &str, start: Instant, seconds: Range<u64>) {
    connection.socket().set_write_timeout(Some(Duration::from_secs(45))).unwrap();
    let error = loop {
        match connection.try_send(says) {
            Ok(()) => assert!(start.elapsed().as_secs() < seconds.end, "never cut"),
            Err(error) => break error,
        }
        thread::sleep(Duration::from_millis(400));
    };
    assert!([ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()), "{error}");
    assert!(seconds.contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}
