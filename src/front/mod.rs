//! The front door: binds, accepts, stops. Each connection gets a place and a thread of its own.

mod connection;
pub mod head;
mod inner;
mod table;

use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn6, bind, listen, setsockopt, socket,
    sockopt,
};

pub(crate) use connection::Connection;
use connection::{HANDSHAKE_TIME, IDLE_TIME, Socket, Visitor};
pub(crate) use inner::{Inner, InnerDirectory, Waiting};
pub(crate) use table::OVER_LIMIT;
use table::Table;

use crate::cli::ListenAddress;
use crate::lock;
use crate::logging::warn_seldom;
use crate::metrics;
use crate::threads::Threads;
use crate::tls::Tls;

/// For requests under way when the daemon stops.
const STOP_TIME: Duration = Duration::from_secs(4);
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(250);
/// The accepting thread comes round at least this often, in milliseconds.
const ROUND: u16 = 1000;
/// A thread that has not come round for so long is dead.
const DEAD_TIME: Duration = Duration::from_secs(5);
/// Waiting connections closed at once when the process is out of descriptors or memory.
const SHED: usize = 16;
/// Rust's default of 2 MiB would only be address space.
const STACK: usize = 128 * 1024;

/// Listens on `address`. Every address of the host is one socket for IPv6 and IPv4, or IPv4
/// alone where the host has no IPv6.
///
/// # Errors
/// Why that is not possible.
pub(crate) fn bind_tcp(address: &ListenAddress) -> Result<TcpListener, String> {
    let listener = match &address.host {
        Some(host) => (host.as_str(), address.port)
            .to_socket_addrs()
            .and_then(|addresses| TcpListener::bind(addresses.collect::<Vec<_>>().as_slice())),
        None => match bind_every_address(address.port) {
            Err(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL) => {
                TcpListener::bind(("0.0.0.0", address.port))
            }
            result => result.map_err(io::Error::from),
        },
    };
    listener.map_err(|error| format!("cannot listen on {address}: {error}"))
}

/// The standard library leaves it to a sysctl whether a socket for `::` also takes IPv4.
fn bind_every_address(port: u16) -> nix::Result<TcpListener> {
    let fd = socket(AddressFamily::Inet6, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
    let every = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
    bind(fd.as_raw_fd(), &SockaddrIn6::from(every))?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(fd.into())
}

/// The front door of a running daemon.
pub(crate) struct FrontDoor {
    door: Arc<Door>,
    /// Closed to wake the thread that accepts.
    stop: UnixStream,
    accepting: thread::JoinHandle<()>,
}

/// What the threads of the front door share.
struct Door {
    table: Arc<Table>,
    inner: Inner,
    tls: Option<Arc<Tls>>,
    allow_hosts: Vec<String>,
    /// When the two threads came round last.
    accepting: Mutex<Instant>,
    watching: Mutex<Instant>,
}

impl FrontDoor {
    /// Serves the connections of `listener`, at most `limit` at a time, by way of `inner`; over
    /// TLS where there are credentials. Without, on a loopback address, the header `Host` has to
    /// name this host or be one of `allow_hosts`.
    ///
    /// # Errors
    /// When the process has no descriptors or threads left.
    pub(crate) fn open(
        listener: TcpListener,
        limit: usize,
        inner: Inner,
        tls: Option<Arc<Tls>>,
        allow_hosts: Vec<String>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        // The standard library's queue of 128 is too short for a burst. Linux takes a new length at
        // any time, and accepted sockets inherit the option: without it an answer in two writes
        // waits for the client's acknowledgement.
        listen(&listener, Backlog::MAXCONN)?;
        setsockopt(&listener, sockopt::TcpNoDelay, &true)?;
        // Where descriptors are short, nobody is let in who can only be refused.
        let (files, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let over_limit = usize::try_from(files / 16).unwrap_or(OVER_LIMIT).min(OVER_LIMIT);
        let table = Table::new(limit, over_limit);
        let (accepting, watching) = (Mutex::new(Instant::now()), Mutex::new(Instant::now()));
        let door = Arc::new(Door { table, inner, tls, allow_hosts, accepting, watching });
        let watched = Arc::clone(&door);
        let builder = |name: &str| thread::Builder::new().name(name.to_owned()).stack_size(STACK);
        builder("deadlines").spawn(move || watched.watch())?;
        let (stop, stopped) = UnixStream::pair()?;
        let accepting = Arc::clone(&door);
        let accepting = builder("accept").spawn(move || accepting.accept(&listener, &stopped))?;
        Ok(Self { door, stop, accepting })
    }

    /// Closes the connections that wait for their next request: the credentials have changed.
    /// The others are closed before theirs.
    pub(crate) fn close_idle(&self) {
        self.door.table.close_idle();
    }

    /// What says within a given time whether requests are answered.
    pub(crate) fn pulse(&self) -> impl Fn(Duration) -> io::Result<()> + Send + use<> {
        let door = Arc::clone(&self.door);
        move |time| {
            door.check_threads(Instant::now())?;
            door.inner.connect(time).map(drop)
        }
    }

    /// Stops accepting, answers what is under way (for at most 4 s) and closes the rest. What is
    /// queued waits for the next process where systemd holds the socket.
    pub(crate) fn close(self) {
        drop(self.stop);
        let _ = self.accepting.join();
        self.door.table.begin_stop();
        self.door.table.wait_until_empty(STOP_TIME);
    }
}

impl Door {
    /// Whether the threads are alive on which all connections depend.
    fn check_threads(&self, now: Instant) -> io::Result<()> {
        for (beat, what) in [(&self.accepting, "accepts"), (&self.watching, "closes late")] {
            if now.saturating_duration_since(*lock(beat)) > DEAD_TIME {
                return Err(io::Error::other(format!(
                    "the thread that {what} connections is dead"
                )));
            }
        }
        Ok(())
    }

    fn watch(&self) -> ! {
        loop {
            thread::sleep(TICK);
            *lock(&self.watching) = Instant::now();
            self.table.close_late(Instant::now());
        }
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener, stopped: &UnixStream) {
        let door = Arc::clone(self);
        let threads = Threads::new("connection", move |visitor| connection::serve(&door, visitor));
        loop {
            *lock(&self.accepting) = Instant::now();
            let mut ready = [
                PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            // EINTR and the like: accept says what is the matter.
            let _ = poll(&mut ready, PollTimeout::from(ROUND));
            if ready[0].any() == Some(true) {
                return;
            }
            match listener.accept() {
                Ok((socket, address)) => self.admit(&threads, socket, address),
                Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                    Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => {
                        self.relieve("cannot accept a connection", &error);
                        // What was closed is free once its threads have noticed.
                        thread::sleep(Duration::from_millis(20));
                    }
                    // Nobody has come, the client has given up already, or the network told of an
                    // error (accept(2)).
                    _ => {}
                },
            }
        }
    }

    fn admit(&self, threads: &Arc<Threads<Visitor>>, socket: TcpStream, address: SocketAddr) {
        // Accepted sockets do not inherit O_NONBLOCK on Linux.
        let tcp = Arc::new(socket);
        // An IPv4 client on a socket for both families shows as `::ffff:192.0.2.1`.
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let time = if self.tls.is_some() { HANDSHAKE_TIME } else { IDLE_TIME };
        let deadline = Instant::now() + time;
        let Some(place) = self.table.admit(Arc::clone(&tcp), address.ip(), deadline) else {
            metrics::add("connections_refused_total", &[("reason", "crowded")], 1.0);
            return warn_seldom(
                "crowd",
                format_args!("too many connections: closed one of {}", address.ip()),
            );
        };
        let socket = Socket { tcp, place, heard: false, patient: true, is_final: false };
        if let Err((_visitor, error)) = threads.run(Visitor { socket, address, deadline }) {
            metrics::add("connections_refused_total", &[("reason", "threads")], 1.0);
            self.relieve("no thread for a connection", &error);
        }
    }

    /// The process has run out of descriptors, threads or memory: closes what is only waiting.
    fn relieve(&self, what: &str, error: &io::Error) {
        let shed = self.table.shed(SHED);
        warn_seldom(what, format_args!("{what}: {error}; closed {shed} that were waiting"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_does_not_come_round_is_noticed() {
        let directory = InnerDirectory::below(&std::env::temp_dir()).unwrap();
        let (inner, _listener) = Inner::open(&directory, |_| {}).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let front_door = FrontDoor::open(listener, 1, inner, None, Vec::new()).unwrap();
        let door = front_door.door;
        let nearly_dead =
            || Instant::now() + DEAD_TIME - Duration::from_millis(2 * u64::from(ROUND));
        // Both come round by themselves.
        thread::sleep(Duration::from_millis(3 * u64::from(ROUND)));
        door.check_threads(nearly_dead()).unwrap();
        drop(front_door.stop);
        front_door.accepting.join().unwrap();
        thread::sleep(Duration::from_millis(3 * u64::from(ROUND)));
        let error = door.check_threads(nearly_dead()).unwrap_err();
        assert_eq!(error.to_string(), "the thread that accepts connections is dead");
    }
}
