//! The node daemon of a VPN service; [`run`] is the whole program.

#[allow(dead_code)] // the backends move onto it one by one
mod agent;
pub mod api;
pub mod check;
pub mod cli;
pub mod head;
pub mod listener;
pub mod logging;
pub mod node;
pub mod openvpn;
pub mod probe;
pub mod rfc3339;
pub mod routes;
pub mod server;
pub mod systemd;
#[allow(dead_code)]
mod threads;
mod tls;
mod unix;
pub mod uploads;
pub mod wireguard;

use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use log::{error, info, warn};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use cli::{Command, Options};
use listener::{FrontDoor, Inner, InnerDirectory};
use server::Server;

/// Descriptors of one connection with a request under way: its socket, the connection to
/// tiny_http, of which tiny_http holds two and the front door one, the OpenVPN directory while it is
/// read, and the socket of a connection that has lost its place and whose thread has yet to notice.
const DESCRIPTORS_PER_CONNECTION: u64 = 6;

/// Descriptors for everything else: a conversation with each OpenVPN process, WireGuard, logging.
const OTHER_DESCRIPTORS: u64 = openvpn::MAX_DESCRIPTORS + 128;

/// For the daemon's first answer, which nobody but itself asks for.
const FIRST_ANSWER_TIME: Duration = Duration::from_secs(10);

/// Why the daemon does not run: one line for the operator.
#[derive(Debug)]
enum Error {
    Usage(String),
    Bind(listener::BindError),
    Tls(tls::Error),
    Passed(systemd::SocketError),
    Start { what: &'static str, error: io::Error },
    Inner { directory: PathBuf, error: io::Error },
    HttpServer,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(error) => f.write_str(error),
            Self::Bind(error) => error.fmt(f),
            Self::Tls(error) => error.fmt(f),
            Self::Passed(error) => error.fmt(f),
            Self::Start { what, error } => write!(f, "cannot {what}: {error}"),
            Self::Inner { directory, error } => write!(
                f,
                "cannot make the inner socket in {}: {error}; RUNTIME_DIRECTORY or TMPDIR names \
                 another directory",
                directory.display()
            ),
            Self::HttpServer => write!(f, "the HTTP server has given up"),
        }
    }
}

impl Error {
    fn start(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Start { what, error }
    }
}

/// Runs what the command line asks for; the result is the exit status.
#[must_use]
pub fn run() -> ExitCode {
    let result = match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => print(cli::HELP),
        Ok(Command::Version) => print(concat!("vpn-daemon ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Command::Serve(options)) => serve(options),
        Ok(Command::Check { options, given, json }) => {
            let report = check::run(options, given);
            let printed = print(&if json { report.json() } else { report.to_string() });
            match printed {
                Ok(()) => return ExitCode::from(report.exit_status()),
                error => error,
            }
        }
        Err(error) => Err(Error::Usage(error)),
    };
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    // Nobody is left to tell when stderr is closed.
    let _ = writeln!(io::stderr(), "vpn-daemon: {error}");
    ExitCode::from(if matches!(error, Error::Usage(_)) { 2 } else { 1 })
}

fn print(text: &str) -> Result<(), Error> {
    io::stdout().write_all(text.as_bytes()).map_err(Error::start("write to standard output"))
}

fn serve(options: Options) -> Result<(), Error> {
    logging::start();
    let notifier = Arc::new(systemd::Notifier::from_environment());
    // Blocked before the first thread is made, so that all of them inherit it: signals come to
    // the `wait` below and interrupt no system call.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    signals
        .thread_block()
        .map_err(|errno| Error::Start { what: "block signals", error: errno.into() })?;
    let tls = cli::credentials_directory()
        .map(|directory| tls::Tls::open(&directory).map(Arc::new))
        .transpose()
        .map_err(Error::Tls)?;
    let limit = raise_open_files(options.max_connections);
    let tcp = match systemd::passed_socket().map_err(Error::Passed)? {
        Some(passed) => passed,
        None => listener::bind_tcp(&options.listen).map_err(Error::Bind)?,
    };
    let address = tcp.local_addr().map_err(Error::start("tell the address"))?;
    let gave_up = Arc::new(AtomicBool::new(false));
    let tell = Arc::clone(&gave_up);
    let failed = move |error: &io::Error| {
        if !tell.swap(true, Ordering::AcqRel) {
            error!("the HTTP server has given up: {error}");
            // Wakes the `wait` below; signalling oneself cannot fail.
            let _ = kill(Pid::this(), Signal::SIGTERM);
        }
    };
    let parent = runtime_directory();
    let no_inner = |error| Error::Inner { directory: parent.clone(), error };
    // Here and not in the threads that use it: it goes however this function ends.
    let directory = InnerDirectory::below(&parent).map_err(no_inner)?;
    let (inner, inner_listener) = Inner::open(&directory, failed.clone()).map_err(no_inner)?;
    let status = Arc::new(systemd::Status {
        url: format!("{}://{address}", if tls.is_some() { "https" } else { "http" }),
        device: options.wg_device.to_string(),
        openvpn: openvpn::OpenVpn::new(options.openvpn_dir.clone()),
    });
    let inner_socket = inner.socket().to_owned();
    let alive = move |time| probe::unix(&inner_socket, Instant::now() + time).map(drop);
    let node = routes::Node {
        wireguard: wireguard::WireGuard::new(options.wg_device),
        openvpn: openvpn::OpenVpn::new(options.openvpn_dir),
        cpu_count: node::cpu_count(),
        uploads: uploads::Uploads::default(),
    };
    let http = Server::start(inner_listener, node, failed)
        .map_err(Error::start("start the HTTP server"))?;
    let front_door = FrontDoor::open(tcp, limit, inner, tls.clone())
        .map_err(Error::start("start the front door"))?;
    alive(FIRST_ANSWER_TIME).map_err(Error::start("answer a request of its own"))?;
    info!("listening on {}", status.url);
    log_findings(tls.as_deref());
    notifier.ready(&status.to_string());
    let daily = tls.clone();
    systemd::keep(notifier.clone(), status.clone(), alive, move || log_findings(daily.as_deref()))
        .map_err(Error::start("start the watchdog's thread"))?;
    loop {
        match signals.wait() {
            Ok(Signal::SIGHUP) => {
                notifier.reloading();
                reload(tls.as_deref());
                notifier.ready(&status.to_string());
            }
            Ok(signal) if !gave_up.load(Ordering::Acquire) => {
                info!("{signal}: stopping");
                break;
            }
            _ => break,
        }
    }
    notifier.stopping();
    front_door.close();
    drop(directory);
    http.stop();
    match gave_up.load(Ordering::Acquire) {
        true => Err(Error::HttpServer),
        false => Ok(()),
    }
}

fn reload(tls: Option<&tls::Tls>) {
    match tls.map(tls::Tls::reload) {
        None => info!("SIGHUP: no credentials to read again, CREDENTIALS_DIRECTORY is not set"),
        Some(Ok(())) => info!("SIGHUP: new connections use the credentials as they are now"),
        Some(Err(error)) => error!("SIGHUP: the old credentials stay in force: {error}"),
    }
    log_findings(tls);
}

fn log_findings(tls: Option<&tls::Tls>) {
    if let Some(tls) = tls {
        tls.log_findings(SystemTime::now());
    }
}

/// Where sockets belong that only this process uses.
fn runtime_directory() -> PathBuf {
    let directories = std::env::var_os("RUNTIME_DIRECTORY");
    // systemd.exec(5): several are separated by colons.
    let first = directories.as_ref().and_then(|paths| std::env::split_paths(paths).next());
    first.filter(|path| !path.as_os_str().is_empty()).unwrap_or_else(std::env::temp_dir)
}

/// Locks; what a panic left behind is used on. What these locks guard changes in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Raises the soft limit of open files to what `connections` need and returns how many
/// connections the hard limit allows.
fn raise_open_files(connections: usize) -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return connections;
    };
    let needed = needed_files(connections);
    let granted = if soft < needed && soft < hard {
        let wanted = needed.min(hard);
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).map_or(soft, |()| wanted)
    } else {
        soft
    };
    if granted >= needed {
        return connections;
    }
    let affordable = affordable_connections(granted).min(connections);
    warn!(
        "only {granted} open files are allowed, {needed} are needed: serving {affordable} \
         connections at a time; raise the hard limit (systemd: LimitNOFILE={needed})"
    );
    affordable
}

/// Open files that serving `connections` at the same time may take.
fn needed_files(connections: usize) -> u64 {
    connections as u64 * DESCRIPTORS_PER_CONNECTION + OTHER_DESCRIPTORS
}

/// Connections that can be served with too few open files.
fn affordable_connections(files: u64) -> usize {
    // A quarter for the connections leaves three for everything else.
    let affordable = (files / 4 / DESCRIPTORS_PER_CONNECTION).max(1);
    usize::try_from(affordable).unwrap_or(usize::MAX)
}
