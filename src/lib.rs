//! The node daemon of a VPN service; [`run`] is the whole program.

mod agent;
pub mod api;
mod check;
pub mod cli;
pub mod front;
mod logging;
mod metrics;
mod node;
pub mod openvpn;
mod rfc3339;
pub mod routes;
mod server;
mod systemd;
mod threads;
mod tls;
mod unix;
pub mod wireguard;

// The oracle of `front/head`, which the fuzz target uses as well.
#[cfg(test)]
extern crate self as vpn_daemon;
#[cfg(test)]
#[path = "../fuzz/oracle.rs"]
mod oracle;

use std::fmt::Display;
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{error, info, warn};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use cli::{Command, Options};
use front::{FrontDoor, Inner, InnerDirectory};
use tls::Tls;

/// Descriptors of one connection with a request under way: its socket, a connection to tiny_http
/// if the body is long, of which tiny_http holds two and the front door one, the OpenVPN directory while
/// it is read, and the socket of a connection that has lost its place and whose thread has yet to notice.
const DESCRIPTORS_PER_CONNECTION: u64 = 6;

/// Descriptors for everything else: a conversation with each OpenVPN process, clients that are told
/// 503, WireGuard, logging.
const OTHER_DESCRIPTORS: u64 = openvpn::MAX_DESCRIPTORS + front::OVER_LIMIT as u64 + 128;

/// The daemon sends itself this signal when its HTTP server has given up.
const GAVE_UP: Signal = Signal::SIGUSR1;

/// For the answer to the request that the daemon sends itself before it counts as started.
const FIRST_ANSWER_TIME: Duration = Duration::from_secs(10);

/// Runs what the command line asks for; the result is the exit status.
#[must_use]
pub fn run() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print(cli::HELP, 0),
        Ok(Command::Version) => print(concat!("vpn-daemon ", env!("CARGO_PKG_VERSION"), "\n"), 0),
        Ok(Command::Check { options, given, json }) => {
            let report = check::run(options, given);
            let text = if json { report.json() } else { report.to_string() };
            print(&text, report.exit_status())
        }
        Ok(Command::Serve(options)) => daemon(options),
        Err(error) => fail(&error, 2),
    }
}

fn daemon(options: Options) -> ExitCode {
    // Blocked before the first thread is made, so that all of them inherit it: signals come to the
    // `wait` below and interrupt no system call.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, GAVE_UP]);
    let blocked = signals.thread_block().map_err(io::Error::from);
    if let Err(error) = blocked.and_then(|()| logging::start()) {
        return fail(&format!("cannot start: {error}"), 1);
    }
    let result = serve(options, &signals);
    let last_words = result.as_ref().err().map(|error| format!("vpn-daemon: {error}\n"));
    logging::finish(&last_words.unwrap_or_default());
    ExitCode::from(u8::from(result.is_err()))
}

fn print(text: &str, status: u8) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::from(status),
        Err(error) => fail(&format!("cannot write to standard output: {error}"), 1),
    }
}

fn fail(error: &str, status: u8) -> ExitCode {
    // Nobody is left to tell when stderr is closed.
    let _ = writeln!(io::stderr(), "vpn-daemon: {error}");
    ExitCode::from(status)
}

/// Serves until a signal comes; an error is one line for the operator.
fn serve(options: Options, signals: &SigSet) -> Result<(), String> {
    let notifier = Arc::new(systemd::Notifier::from_environment());
    let tls = cli::credentials_directory().map(|directory| Tls::open(&directory).map(Arc::new));
    let tls = tls.transpose()?;
    let limit = raise_open_files(options.max_connections);
    let tcp = systemd::passed_socket()?.map_or_else(|| front::bind_tcp(&options.listen), Ok)?;
    let address = tcp.local_addr().map_err(cannot("tell the address"))?;
    // The directory stays here and goes to no thread: it is removed however this function ends.
    let (_directory, (inner, inner_listener)) = open_inner()?;
    let url = format!("{}://{address}", if tls.is_some() { "https" } else { "http" });
    let status = || systemd::status(&url, &options.wg_device, &options.openvpn_dir);
    let node = routes::Node {
        wireguard: wireguard::WireGuard::new(options.wg_device.clone()),
        openvpn: openvpn::OpenVpn::new(options.openvpn_dir.clone(), api::connection),
        cpu_count: node::cpu_count(),
        lists: AtomicUsize::new(0),
        tls: tls.clone(),
        metrics: options.metrics,
        waiting: Arc::clone(&inner.waiting),
    };
    metrics::start(limit);
    server::start(inner_listener, node, failed).map_err(cannot("start the HTTP server"))?;
    let front_door = FrontDoor::open(tcp, limit, inner, tls.clone(), options.allow_hosts)
        .map_err(cannot("start the front door"))?;
    let alive = front_door.pulse();
    alive(FIRST_ANSWER_TIME).map_err(cannot("answer a request of its own"))?;
    info!("listening on {url}");
    if tls.is_none() && !address.ip().is_loopback() {
        warn!("{url} is plain HTTP: everybody who reaches this address may remove peers");
    }
    tls.iter().for_each(|tls| tls.log_findings());
    notifier.ready(&status());
    // Leaves out a CA that has expired meanwhile.
    let daily = tls.clone();
    let daily = move || daily.iter().for_each(|tls| reload(Some(tls), "once a day"));
    systemd::keep(Arc::clone(&notifier), alive, daily)
        .map_err(cannot("start the watchdog's thread"))?;
    let last = loop {
        let signal = signals.wait().unwrap_or(GAVE_UP);
        if signal != Signal::SIGHUP {
            break signal;
        }
        notifier.reloading();
        reload(tls.as_deref(), "SIGHUP");
        front_door.close_idle();
        notifier.ready(&status());
    };
    info!("{last}: stopping");
    notifier.stopping();
    front_door.close();
    match last {
        GAVE_UP => Err("the HTTP server has given up".to_owned()),
        _ => Ok(()),
    }
}

/// What to do when nothing is left that answers requests.
fn failed(error: &io::Error) {
    error!("the HTTP server does not go on: {error}");
    // Wakes the `wait` in `serve`; signalling oneself cannot fail.
    let _ = kill(Pid::this(), GAVE_UP);
}

/// The private directory of the inner socket, and its two ends: the front door's and tiny_http's.
fn open_inner() -> Result<(InnerDirectory, (Inner, UnixListener)), String> {
    let parent = runtime_directory();
    let opened = InnerDirectory::below(&parent)
        .and_then(|directory| Inner::open(&directory, failed).map(|inner| (directory, inner)));
    let parent = parent.display();
    let what = format!("make a socket in {parent} (RUNTIME_DIRECTORY or TMPDIR names another)");
    opened.map_err(cannot(what))
}

fn cannot(what: impl Display) -> impl FnOnce(io::Error) -> String {
    move |error| format!("cannot {what}: {error}")
}

fn reload(tls: Option<&Tls>, why: &str) {
    match tls.map(Tls::reload) {
        None => info!("{why}: no credentials to read again, CREDENTIALS_DIRECTORY is not set"),
        Some(Ok(())) => info!("{why}: new connections use the credentials as they are now"),
        Some(Err(error)) => error!("{why}: the old credentials stay in force: {error}"),
    }
    tls.into_iter().for_each(Tls::log_findings);
}

/// Where sockets belong that only this process uses.
fn runtime_directory() -> PathBuf {
    let directories = std::env::var_os("RUNTIME_DIRECTORY");
    // systemd.exec(5): several are separated by colons.
    let first = directories.as_ref().and_then(|paths| std::env::split_paths(paths).next());
    first.filter(|path| !path.as_os_str().is_empty()).unwrap_or_else(std::env::temp_dir)
}

/// Locks, also after a panic in a thread that held the lock: what these locks guard changes in one
/// step and is never left half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Raises the soft limit of open files to what `connections` need and returns how many
/// connections the hard limit allows.
fn raise_open_files(connections: usize) -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return connections };
    let (needed, _) = open_files(connections, hard);
    let wanted = needed.min(hard).max(soft);
    let granted = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).map_or(soft, |()| wanted);
    let (_, served) = open_files(connections, granted);
    if served < connections {
        warn!(
            "only {granted} open files are allowed, {needed} are needed: serving {served} \
             connections at a time; raise the hard limit (systemd: LimitNOFILE={needed})"
        );
    }
    served
}

/// Open files that serving `connections` at a time takes, and how many `allowed` ones suffice for.
fn open_files(connections: usize, allowed: u64) -> (u64, usize) {
    let needed = connections as u64 * DESCRIPTORS_PER_CONNECTION + OTHER_DESCRIPTORS;
    // Where there are too few, connections get a quarter of them at least.
    let others = OTHER_DESCRIPTORS.min(allowed / 4 * 3);
    let affordable = usize::try_from((allowed - others) / DESCRIPTORS_PER_CONNECTION);
    (needed, affordable.unwrap_or(usize::MAX).clamp(1, connections))
}
