//! What systemd is told and what it hands over: readiness, watchdog, the listening socket.
//!
//! Protocols: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3). Without their environment
//! variables nothing here does anything.

use std::env;
use std::ffi::OsStr;
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
use log::{error, info, warn};
use nix::sys::socket::{getsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};

use crate::openvpn;
use crate::wireguard::DeviceName;

/// How long systemd may take for a notification.
const NOTIFY_TIME: Duration = Duration::from_secs(2);

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Tells systemd how the service is; a no-op where nobody asks for it.
pub(crate) struct Notifier {
    manager: Option<(UnixDatagram, SocketAddr)>,
    stopping: AtomicBool,
}

impl Notifier {
    /// By `NOTIFY_SOCKET`.
    pub(crate) fn from_environment() -> Self {
        let name = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        Self { manager: name.and_then(|name| open(&name)), stopping: AtomicBool::new(false) }
    }

    /// The first request would be served, or a reload is over.
    pub(crate) fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={status}"));
    }

    /// A reload begins; [`Notifier::ready`] ends it.
    pub(crate) fn reloading(&self) {
        // Without the time, only a service of Type=notify-reload would mind.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()));
    }

    /// The service ends: the watchdog is not fed any more.
    pub(crate) fn stopping(&self) {
        self.stopping.store(true, Ordering::Release);
        self.send("STOPPING=1\nSTATUS=Answering the requests under way");
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.manager
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            warn!("systemd was not told {message:?}: {error}");
        }
    }
}

/// A path, or `@` and an abstract name.
fn open(name: &OsStr) -> Option<(UnixDatagram, SocketAddr)> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(Path::new(name)),
    };
    let opened = address.and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(NOTIFY_TIME))?;
        Ok((socket, address))
    });
    let log = |error: &_| warn!("NOTIFY_SOCKET={} cannot be used: {error}", name.display());
    opened.inspect_err(log).ok()
}

/// What `systemctl status` shows: one line. The sockets are counted, nobody is asked.
pub(crate) fn status(url: &str, device: &DeviceName, openvpn_dir: &Path) -> String {
    let tls = if url.starts_with("https:") { "TLS" } else { "no TLS" };
    let openvpn = match openvpn::sockets(openvpn_dir) {
        Ok(sockets) if sockets.len() == 1 => "1 OpenVPN socket".to_owned(),
        Ok(sockets) => format!("{} OpenVPN sockets", sockets.len()),
        Err(failure) => failure.to_string(),
    };
    let status = format!("Serving {url} ({tls}), WireGuard device {device}, {openvpn}");
    status.replace(char::is_control, " ")
}

/// Starts the thread that feeds the watchdog while the daemon is `alive`, and calls `daily` once a
/// day. `alive` is to answer within the time that it is given.
///
/// # Errors
/// There is no thread.
pub(crate) fn keep(
    notifier: Arc<Notifier>,
    alive: impl Fn(Duration) -> io::Result<()> + Send + 'static,
    daily: impl Fn() + Send + 'static,
) -> io::Result<()> {
    let period = watchdog_time(|name| env::var(name).ok(), std::process::id()).map(|time| time / 3);
    let tick = period.unwrap_or(DAY);
    let keep = move || {
        let mut next_daily = Instant::now() + DAY;
        loop {
            let started = Instant::now();
            if let Some(period) = period {
                match alive(period) {
                    // A daemon that ends closes the inner socket: that is no failure.
                    _ if notifier.stopping.load(Ordering::Acquire) => return,
                    Ok(()) => notifier.send("WATCHDOG=1"),
                    Err(error) => error!("the watchdog is not fed: {error}"),
                }
            }
            thread::sleep(tick.saturating_sub(started.elapsed()));
            if Instant::now() >= next_daily {
                next_daily += DAY;
                daily();
            }
        }
    };
    thread::Builder::new().name("keeper".to_owned()).stack_size(128 * 1024).spawn(keep).map(drop)
}

/// After how long without a sign of life systemd ends this process; `None`: never.
fn watchdog_time(variable: impl Fn(&str) -> Option<String>, pid: u32) -> Option<Duration> {
    if variable("WATCHDOG_PID").is_some_and(|of| of.parse() != Ok(pid)) {
        return None;
    }
    let time = variable("WATCHDOG_USEC")?.parse().ok().filter(|microseconds| *microseconds > 0);
    time.map(Duration::from_micros)
}

/// The listening socket of the socket unit, if this process has been given one. To be called
/// before there are threads that read the environment, once: it clears the variables.
///
/// # Errors
/// Why what was passed cannot be used.
pub(crate) fn passed_socket() -> Result<Option<TcpListener>, String> {
    let mut passed = ListenFd::from_env();
    if passed.len() > 1 {
        return Err(format!(
            "systemd has passed {} sockets, the daemon takes one: leave a single ListenStream= in \
             the socket unit (a port alone is every address)",
            passed.len()
        ));
    }
    let socket = passed.take_tcp_listener(0).map_err(|error| {
        format!(
            "systemd has passed something other than a TCP socket ({error}): the socket unit \
             needs ListenStream= with a port, or an address and a port"
        )
    })?;
    if let Some(socket) = &socket {
        if !getsockopt(socket, sockopt::AcceptConn).unwrap_or(false) {
            return Err("systemd has passed a socket that does not listen: the socket unit needs \
                        Accept=no"
                .to_owned());
        }
        info!("listening on the socket that systemd has passed: -listen is not used");
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let variable = |name: &str| {
                let found = variables.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            let expected = expected.map(Duration::from_secs);
            assert_eq!(watchdog_time(variable, 7), expected, "{variables:?}");
        }
    }

    #[test]
    fn addresses_to_notify() {
        let open = |name: &[u8]| open(OsStr::from_bytes(name));
        let (_, path) = open(b"/run/systemd/notify").unwrap();
        assert_eq!(path.as_pathname(), Some(Path::new("/run/systemd/notify")));
        let (_, name) = open(b"@a\xff/b").unwrap();
        assert_eq!(name.as_abstract_name(), Some(&b"a\xff/b"[..]));
        assert!(open(&[b'/'; 200]).is_none());
    }

    #[test]
    fn a_status_is_one_line() {
        let expected = "Serving https://[::]:41194 (TLS), WireGuard device wg0, 0 OpenVPN sockets";
        assert_eq!(
            status("https://[::]:41194", &DeviceName::default(), Path::new("/nonexistent")),
            expected
        );
        let expected = "Serving http://127.0.0.1:41194 (no TLS), WireGuard device wg0, \
                        OpenVPN directory /dev/null/a READY=1 cannot be read: Not a directory (os \
                        error 20)";
        let openvpn = Path::new("/dev/null/a\nREADY=1");
        assert_eq!(status("http://127.0.0.1:41194", &DeviceName::default(), openvpn), expected);
    }
}
