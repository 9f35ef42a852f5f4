//! Floods, slow clients, and what they may cost.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::common::{Answer, Daemon, PATIENCE};
use super::{
    CONNECTIONS, Connection, NODE, Site, hang, limit_open_files, post, raise_own_open_files,
};

const FLOOD: usize = 1500;

/// How a connection is held open.
#[derive(Clone, Copy, Debug)]
enum Mood {
    Silent,
    HalfAHead,
    HalfABody,
    Idle,
}

const MOODS: [Mood; 4] = [Mood::Silent, Mood::HalfAHead, Mood::HalfABody, Mood::Idle];

fn hold_open(site: &Site, mood: Mood) -> Box<dyn Connection> {
    if matches!(mood, Mood::Silent) {
        return Box::new(site.daemon.connect());
    }
    let mut connection = site.connect();
    let sent = match mood {
        Mood::HalfAHead => connection.write_all(b"GET /i/node HTTP/1.1\r\nHost: n"),
        Mood::HalfABody => {
            connection.write_all(&post("/w/add_peer", &"a".repeat(99)).as_bytes()[..150])
        }
        Mood::Silent | Mood::Idle => {
            assert_eq!(connection.ask(NODE).status, 200);
            Ok(())
        }
    };
    sent.and_then(|()| connection.flush()).unwrap();
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

fn newcomers_are_served_during_floods(site: &Site) {
    raise_own_open_files();
    for mood in MOODS {
        let held: Vec<_> = (0..FLOOD).map(|_| hold_open(site, mood)).collect();
        let time = time_of_a_newcomer(site);
        assert!(time < Duration::from_secs(1), "{mood:?}: {time:?}");
        drop(held);
    }
}

#[test]
fn a_flood_does_not_keep_newcomers_out() {
    newcomers_are_served_during_floods(&Site::plain(&[]));
}

#[test]
fn a_flood_does_not_keep_newcomers_out_of_https() {
    newcomers_are_served_during_floods(&Site::tls(&[]));
}

/// Until threads and descriptors are what they were, or nearly so.
fn settles(daemon: &Daemon, threads: u64, files: usize) {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = (daemon.status("Threads"), daemon.open_files());
        // tiny_http keeps some threads and the front door some connections to it.
        if now.0 <= threads + 8 && now.1 <= files + 16 {
            return;
        }
        assert!(
            Instant::now() < end,
            "{now:?} threads and files, {:?} before: {:?}",
            (threads, files),
            daemon.thread_names()
        );
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn endless_heads_cost_no_memory() {
    let site = Site::plain(&[]);
    site.serves();
    let daemon = &site.daemon;
    let (threads, files) = (daemon.status("Threads"), daemon.open_files());
    let before = daemon.status("VmRSS");
    let over = AtomicBool::new(false);
    let most = thread::scope(|scope| {
        for _ in 0..30 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let mut stream = daemon.connect();
                    let mut result = stream.write_all(b"GET /i/node HTTP/1.1\r\nX: ");
                    while result.is_ok() && !over.load(Ordering::Relaxed) {
                        // 30 clients at full speed would only measure the machine.
                        thread::sleep(Duration::from_millis(2));
                        result = stream.write_all(&[b'a'; 16 * 1024]);
                    }
                }
            });
        }
        let end = Instant::now() + Duration::from_secs(8);
        let mut most = 0;
        while Instant::now() < end {
            most = most.max(daemon.status("VmRSS"));
            thread::sleep(Duration::from_millis(50));
        }
        over.store(true, Ordering::Relaxed);
        most
    });
    let rise = most.saturating_sub(before);
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
            connection.write_all(CONNECTIONS.as_bytes()).unwrap();
        }
        assert!(site.daemon.status("Threads") > threads + 100);
        drop(held);
        settles(&site.daemon, threads, files);
    }
}

/// Requests that hang in the backend, as many as there may be connections.
pub(super) fn fill(site: &Site, count: usize) -> Vec<Box<dyn Connection>> {
    let mut busy: Vec<_> = (0..count).map(|_| site.connect()).collect();
    for connection in &mut busy {
        connection.write_all(CONNECTIONS.as_bytes()).unwrap();
        connection.flush().unwrap();
    }
    // They are under way once read, which nothing shows from outside.
    thread::sleep(Duration::from_millis(700));
    busy
}

#[test]
fn over_the_limit_is_503_and_only_then() {
    for site in Site::both(&["-max-connections", "4"]) {
        let _openvpn = hang(&site.daemon);
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
        for mut connection in busy {
            let answer = Answer::read(&mut *connection, false).unwrap();
            assert_eq!(answer.status, 504, "{answer:?}");
        }
        site.serves();
    }
}

#[test]
fn idle_connections_end_in_order_when_they_make_room() {
    for site in Site::both(&["-max-connections", "2"]) {
        let hold_open = |_| {
            let connection = hold_open(&site, Mood::Idle);
            // Its client has the answer a moment before it counts as idle.
            thread::sleep(Duration::from_millis(100));
            connection
        };
        let mut idle: Vec<_> = (0..4).map(hold_open).collect();
        idle[0].ends();
        idle[1].ends();
    }
}

#[test]
fn node_is_answered_while_every_backend_hangs() {
    let site = Site::plain(&[]);
    let _openvpn = hang(&site.daemon);
    let _busy = fill(&site, 60);
    let time = time_of_a_newcomer(&site);
    assert!(time < Duration::from_secs(1), "{time:?}");
}

/// The daemon raises the limit of open files itself, to what it may need.
#[test]
fn every_connection_may_wait_for_many_openvpn_processes() {
    raise_own_open_files();
    let daemon = Daemon::start_with(&["-max-connections", "400"], |command| {
        limit_open_files(command, "1024:");
    });
    let site = Site { daemon, client: None, _pki: None };
    let _openvpn = hang(&site.daemon);
    let directory = site.daemon.directory().join("openvpn");
    let bind = |number| UnixListener::bind(directory.join(format!("{number}.sock"))).unwrap();
    let _more: Vec<_> = (0..23).map(bind).collect();
    let busy = fill(&site, 395);
    site.serves();
    for mut connection in busy {
        let answer = Answer::read(&mut *connection, false).unwrap();
        assert_eq!(answer.status, 504, "{answer:?}");
    }
    let log = site.daemon.log();
    assert!(!log.iter().any(|line| line.contains("open files")), "{log:#?}");
}

/// Out of descriptors, under the lowest limit at which the daemon is of use.
#[test]
fn a_low_limit_of_open_files_is_lived_with() {
    raise_own_open_files();
    for files in [64, 128, 300] {
        let daemon = Daemon::start_with(&[], |command| {
            limit_open_files(command, &format!("{files}:{files}"));
        });
        let line = daemon.wait_for_log("open files are allowed");
        assert!(line.contains("connections at a time"), "{line}");
        let site = Site { daemon, client: None, _pki: None };
        let openvpn = hang(&site.daemon);
        for _ in 0..3 {
            let mut held: Vec<_> = (0..400).map(|_| site.daemon.connect()).collect();
            for connection in &mut held {
                // Cut already, if its place was given away.
                let _ = connection.write_all(CONNECTIONS.as_bytes());
            }
            thread::sleep(Duration::from_millis(300));
        }
        drop(openvpn);
        let end = Instant::now() + PATIENCE;
        while !site.try_ask(NODE).is_ok_and(|answer| answer.status == 200) {
            assert!(Instant::now() < end, "it serves nobody any more: {:#?}", site.daemon.log());
            thread::sleep(Duration::from_millis(50));
        }
        let shortages =
            site.daemon.log().iter().filter(|line| line.contains("cannot accept")).count();
        assert!(shortages < 60, "{shortages} lines about it");
    }
}

/// `accept` itself fails: those that only wait make room.
#[test]
fn without_descriptors_the_waiting_make_room() {
    let site = Site::plain(&[]);
    site.serves();
    let idle: Vec<_> = (0..8).map(|_| hold_open(&site, Mood::Idle)).collect();
    // The inner connections that nobody needs have been closed after this.
    thread::sleep(Duration::from_secs(2));
    let limit = format!("--nofile={0}:{0}", site.daemon.open_files());
    let pid = site.daemon.pid().to_string();
    let status = std::process::Command::new("prlimit").args(["--pid", &pid, &limit]).status();
    assert!(status.unwrap().success());
    site.serves();
    let line = site.daemon.wait_for_log("cannot accept a connection");
    assert!(line.contains("that were waiting"), "{line}");
    site.serves();
    drop(idle);
}

/// 10 s for a head, 20 s for a body, 60 s idle, 20 s to take an answer: all at once.
#[test]
fn slow_clients_run_out_of_time() {
    let site = Site::plain(&[]);
    let tls = Site::tls(&[]);
    let (mut head, mut body) =
        (hold_open(&site, Mood::HalfAHead), hold_open(&site, Mood::HalfABody));
    let (mut idle, mut silent) = (hold_open(&site, Mood::Idle), hold_open(&site, Mood::Silent));
    let mut stingy = hold_open(&tls, Mood::HalfAHead);
    // Asks and asks and never reads an answer, until the daemon cannot write any more.
    let mut deaf = site.connect();
    let mut deaf_tls = tls.connect();
    let start = Instant::now();
    thread::scope(|scope| {
        // A byte now and then does not help.
        scope.spawn(|| trickle(&mut *head, start, 10));
        scope.spawn(|| trickle(&mut *stingy, start, 10));
        scope.spawn(|| trickle(&mut *body, start, 20));
        scope.spawn(|| ask_without_reading(&mut *deaf, start));
        scope.spawn(|| ask_without_reading(&mut *deaf_tls, start));
        scope.spawn(|| ends_after(&mut *idle, start, 60));
        scope.spawn(|| ends_after(&mut *silent, start, 60));
    });
    site.serves();
    tls.serves();
}

fn assert_about(taken: Duration, seconds: u64) {
    let due = Duration::from_secs(seconds);
    // Early by what passed before the clock was started; late by what a busy machine takes.
    let early = due.saturating_sub(Duration::from_secs(2));
    assert!(taken >= early && taken < due + Duration::from_secs(8), "{taken:?}, not {due:?}");
}

fn trickle(connection: &mut dyn Connection, start: Instant, seconds: u64) {
    while start.elapsed() < PATIENCE {
        if connection.write_all(b"a").and_then(|()| connection.flush()).is_err() {
            return assert_about(start.elapsed(), seconds);
        }
        thread::sleep(Duration::from_millis(400));
    }
    panic!("still open after {PATIENCE:?}");
}

fn ends_after(connection: &mut dyn Connection, start: Instant, seconds: u64) {
    connection.socket().set_read_timeout(Some(Duration::from_secs(seconds + 20))).unwrap();
    assert_eq!(connection.read(&mut [0]).unwrap_or(0), 0);
    assert_about(start.elapsed(), seconds);
}

fn ask_without_reading(connection: &mut dyn Connection, start: Instant) {
    connection.socket().set_write_timeout(Some(Duration::from_secs(45))).unwrap();
    let requests = NODE.repeat(100);
    loop {
        match connection.write_all(requests.as_bytes()).and_then(|()| connection.flush()) {
            Ok(()) => assert!(start.elapsed() < Duration::from_secs(60), "never cut"),
            Err(error) => {
                let cut = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
                assert!(cut.contains(&error.kind()), "{error:?}");
                let taken = start.elapsed();
                return assert!(taken > Duration::from_secs(15), "cut after {taken:?}");
            }
        }
    }
}
