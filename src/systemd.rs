//! What systemd is told and what it hands over: readiness, watchdog, the listening socket.
//!
//! Protocols: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3). Without their environment
//! variables nothing here does anything.

use std::env;
use std::ffi::OsStr;
use std::fmt::{self, Write};
use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use listenfd::ListenFd;
use log::{debug, error, info, warn};
use nix::sys::socket::{getsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};

use crate::openvpn::OpenVpn;

/// For systemd to take a notification.
const NOTIFY_TIME: Duration = Duration::from_secs(2);

/// How often the status is looked at.
const STATUS_TIME: Duration = Duration::from_secs(60);

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Tells systemd how the service is; a no-op where nobody asks for it.
pub struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    stopping: AtomicBool,
}

impl Notifier {
    /// By `NOTIFY_SOCKET`.
    pub fn from_environment() -> Self {
        let name = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        Self { manager: name.and_then(|name| open(&name)), stopping: AtomicBool::new(false) }
    }

    /// The first request would be served, or a reload is over.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", one_line(status)));
    }

    /// A reload begins; [`Notifier::ready`] ends it.
    pub fn reloading(&self) {
        let mut message = "RELOADING=1".to_owned();
        // Without the time, only a service of Type=notify-reload would mind.
        if let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) {
            let now = Duration::from(now).as_micros();
            // Writing to a string cannot fail.
            let _ = write!(message, "\nMONOTONIC_USEC={now}");
        }
        self.send(&message);
    }

    /// The service ends: the watchdog is not fed any more.
    pub fn stopping(&self) {
        self.stopping.store(true, Ordering::Release);
        self.send("STOPPING=1\nSTATUS=Answering the requests under way");
    }

    fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", one_line(status)));
    }

    fn feed_watchdog(&self) {
        self.send("WATCHDOG=1");
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.manager
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            warn!("systemd was not told {message:?}: {error}");
        }
    }
}

fn open(name: &OsStr) -> Option<(UnixDatagram, SocketAddr)> {
    let opened = address(name.as_bytes()).and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(NOTIFY_TIME))?;
        Ok((socket, address))
    });
    opened
        .inspect_err(|error| {
            warn!("NOTIFY_SOCKET={} cannot be used: {error}", name.display());
        })
        .ok()
}

/// A path, or `@` and an abstract name. AF_VSOCK is for the machine's own manager, not services.
fn address(name: &[u8]) -> io::Result<SocketAddr> {
    match name {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(Path::new(OsStr::from_bytes(name))),
        _ => Err(io::Error::other("it is neither a path nor an abstract name")),
    }
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// What `systemctl status` shows.
pub struct Status {
    /// `http://ADDRESS` or `https://ADDRESS`.
    pub url: String,
    /// Name of the WireGuard device.
    pub device: String,
    /// Where sockets are counted; nobody is asked.
    pub openvpn: OpenVpn,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = if self.url.starts_with("https:") { "TLS" } else { "no TLS" };
        write!(f, "Serving {} ({tls}), WireGuard device {}, ", self.url, self.device)?;
        match self.openvpn.sockets() {
            Ok(sockets) if sockets.len() == 1 => f.write_str("1 OpenVPN socket"),
            Ok(sockets) => write!(f, "{} OpenVPN sockets", sockets.len()),
            Err(_) => write!(f, "{} cannot be read", self.openvpn.directory().display()),
        }
    }
}

/// Starts the thread that feeds the watchdog while `alive`, keeps the status up to date, and
/// calls `daily` once a day. `alive` is to answer within the time that it is given.
///
/// # Errors
/// When there is no thread.
pub fn keep(
    notifier: Arc<Notifier>,
    status: Arc<Status>,
    alive: impl Fn(Duration) -> io::Result<()> + Send + 'static,
    daily: impl Fn() + Send + 'static,
) -> io::Result<()> {
    let watchdog = watchdog_time(|name| env::var(name).ok(), std::process::id());
    if let Some(time) = watchdog {
        debug!("the watchdog is fed every {:.1} s", time.as_secs_f64() / 3.0);
    }
    let keep = move || {
        let period = watchdog.map(|time| time / 3);
        let tick = period.unwrap_or(STATUS_TIME).min(STATUS_TIME);
        let mut next_status = Instant::now() + STATUS_TIME;
        let mut next_daily = Instant::now() + DAY;
        let mut told = status.to_string();
        let mut next_tick = Instant::now();
        loop {
            if period.is_some() {
                match alive(tick) {
                    // The inner socket goes away with the last connection.
                    _ if notifier.stopping.load(Ordering::Acquire) => return,
                    Ok(()) => notifier.feed_watchdog(),
                    Err(error) => error!(
                        "the watchdog is not fed: the daemon's own request got no answer: {error}"
                    ),
                }
            }
            let now = Instant::now();
            if now >= next_status {
                next_status = now + STATUS_TIME;
                let status = status.to_string();
                if status != told {
                    notifier.status(&status);
                    told = status;
                }
            }
            if now >= next_daily {
                next_daily = now + DAY;
                daily();
            }
            next_tick = (next_tick + tick).max(now);
            thread::sleep(next_tick.saturating_duration_since(now));
        }
    };
    thread::Builder::new().name("keeper".to_owned()).stack_size(128 * 1024).spawn(keep)?;
    Ok(())
}

/// After how long without a sign of life systemd ends this process; `None`: never.
fn watchdog_time(variable: impl Fn(&str) -> Option<String>, pid: u32) -> Option<Duration> {
    let time = variable("WATCHDOG_USEC")?;
    if variable("WATCHDOG_PID").is_some_and(|of| of.parse() != Ok(pid)) {
        return None;
    }
    match time.parse() {
        Ok(microseconds @ 1..) => Some(Duration::from_micros(microseconds)),
        _ => {
            warn!("WATCHDOG_USEC={time} is no number of microseconds: the watchdog is not fed");
            None
        }
    }
}

/// Why the socket that systemd hands over cannot be used.
#[derive(Debug)]
pub enum SocketError {
    /// `LISTEN_FDS` is no number.
    Malformed(String),
    /// There is more than one.
    Several(usize),
    /// It is no TCP socket; what the descriptor is.
    NotTcp(io::Error),
    /// It is a TCP socket that does not listen.
    NotListening,
}

impl fmt::Display for SocketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(value) => write!(f, "LISTEN_FDS={value} is no number of sockets"),
            Self::Several(count) => write!(
                f,
                "systemd has passed {count} sockets, the daemon takes one: leave a single \
                 ListenStream= in the socket unit (a port alone is every address)"
            ),
            Self::NotTcp(error) => write!(
                f,
                "systemd has passed something other than a TCP socket ({error}): the socket unit \
                 needs ListenStream= with a port, or an address and a port"
            ),
            Self::NotListening => f.write_str(
                "systemd has passed a socket that does not listen: the socket unit needs Accept=no",
            ),
        }
    }
}

impl std::error::Error for SocketError {}

/// The listening socket of the socket unit, if this process has been given one. To be called
/// before there are threads, once: it clears the variables.
///
/// # Errors
/// What was passed cannot be used.
pub fn passed_socket() -> Result<Option<TcpListener>, SocketError> {
    match passed_count(|name| env::var(name).ok(), std::process::id())? {
        0 => return Ok(None),
        1 => {}
        count => return Err(SocketError::Several(count)),
    }
    let Some(listener) = ListenFd::from_env().take_tcp_listener(0).map_err(SocketError::NotTcp)?
    else {
        return Ok(None);
    };
    if !getsockopt(&listener, sockopt::AcceptConn).unwrap_or(false) {
        return Err(SocketError::NotListening);
    }
    info!("listening on the socket that systemd has passed: -listen is not used");
    Ok(Some(listener))
}

/// How many sockets have been passed to the process `pid`.
fn passed_count(variable: impl Fn(&str) -> Option<String>, pid: u32) -> Result<usize, SocketError> {
    let (Some(of), Some(count)) = (variable("LISTEN_PID"), variable("LISTEN_FDS")) else {
        return Ok(0);
    };
    if of.parse() != Ok(pid) {
        return Ok(0);
    }
    count.parse().map_err(|_| SocketError::Malformed(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn the_watchdog_is_for_the_process_it_names() {
        for (variables, expected) in [
            (&[][..], None),
            (&[("WATCHDOG_USEC", "20000000")], Some(20)),
            (&[("WATCHDOG_USEC", "20000000"), ("WATCHDOG_PID", "7")], Some(20)),
            (&[("WATCHDOG_USEC", "20000000"), ("WATCHDOG_PID", "8")], None),
            (&[("WATCHDOG_USEC", "20000000"), ("WATCHDOG_PID", "")], None),
            (&[("WATCHDOG_USEC", "0")], None),
            (&[("WATCHDOG_USEC", "20s")], None),
            (&[("WATCHDOG_PID", "7")], None),
        ] {
            let time = watchdog_time(environment(variables), 7);
            assert_eq!(time, expected.map(Duration::from_secs), "{variables:?}");
        }
    }

    #[test]
    fn sockets_are_for_the_process_they_name() {
        for (variables, expected) in [
            (&[][..], Some(0)),
            (&[("LISTEN_FDS", "1")], Some(0)),
            (&[("LISTEN_FDS", "1"), ("LISTEN_PID", "8")], Some(0)),
            (&[("LISTEN_FDS", "x"), ("LISTEN_PID", "8")], Some(0)),
            (&[("LISTEN_PID", "7")], Some(0)),
            (&[("LISTEN_FDS", "0"), ("LISTEN_PID", "7")], Some(0)),
            (&[("LISTEN_FDS", "2"), ("LISTEN_PID", "7")], Some(2)),
            (&[("LISTEN_FDS", "-1"), ("LISTEN_PID", "7")], None),
            (&[("LISTEN_FDS", ""), ("LISTEN_PID", "7")], None),
        ] {
            assert_eq!(passed_count(environment(variables), 7).ok(), expected, "{variables:?}");
        }
    }

    #[test]
    fn addresses_to_notify() {
        let path = address(b"/run/systemd/notify").unwrap();
        assert_eq!(path.as_pathname(), Some(Path::new("/run/systemd/notify")));
        assert_eq!(address(b"@a\xff/b").unwrap().as_abstract_name(), Some(&b"a\xff/b"[..]));
        for name in [&b"vsock:2:1234"[..], b"relative", b"", &[b'/'; 200]] {
            assert!(address(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_status_is_one_line() {
        let status = Status {
            url: "https://[::]:41194".to_owned(),
            device: "wg0".to_owned(),
            openvpn: OpenVpn::new("/nonexistent".into()),
        };
        let expected = "Serving https://[::]:41194 (TLS), WireGuard device wg0, 0 OpenVPN sockets";
        assert_eq!(status.to_string(), expected);
        let unreadable = Status {
            url: "http://127.0.0.1:41194".to_owned(),
            openvpn: OpenVpn::new("/dev/null".into()),
            ..status
        };
        let expected = "Serving http://127.0.0.1:41194 (no TLS), WireGuard device wg0, \
                        /dev/null cannot be read";
        assert_eq!(unreadable.to_string(), expected);
        assert_eq!(one_line("a\nREADY=1\r"), "a READY=1 ");
    }
}
