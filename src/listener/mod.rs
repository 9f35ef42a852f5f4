//! The front door: accepts connections, gives each a place and a thread of its own.

mod inner;
mod relay;
mod table;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::warn;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn6, bind, listen, setsockopt, socket,
    sockopt,
};

pub use inner::{Inner, InnerDirectory};
use relay::{Client, Stream};
use table::{Place, Table};

use crate::cli::ListenAddress;
use crate::logging;
use crate::tls::{self, Tls};

/// For a TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// For requests under way when the daemon stops.
const STOP_TIME: Duration = Duration::from_secs(4);
/// Connections accepted after the daemon has been told to stop.
const LAST: usize = 256;
/// Waiting connections closed at once when the process is out of descriptors or memory.
const SHED: usize = 16;
/// Rust's default of 2 MiB would only be address space; TLS needs a fraction of this.
const STACK: usize = 512 * 1024;

/// Why the daemon cannot listen.
#[derive(Debug)]
pub struct BindError {
    address: ListenAddress,
    error: io::Error,
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot listen on {}: {}", self.address, self.error)
    }
}

impl std::error::Error for BindError {}

/// Listens on `address`. Every address of the host is one socket for IPv6 and IPv4, or IPv4
/// alone where the host has no IPv6.
pub fn bind_tcp(address: &ListenAddress) -> Result<TcpListener, BindError> {
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
    listener.map_err(|error| BindError { address: address.clone(), error })
}

/// The standard library leaves it to a sysctl whether a socket for `::` also takes IPv4.
fn bind_every_address(port: u16) -> nix::Result<TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = socket(AddressFamily::Inet6, SockType::Stream, flags, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
    let every = std::net::SocketAddrV6::new(std::net::Ipv6Addr::UNSPECIFIED, port, 0, 0);
    bind(fd.as_raw_fd(), &SockaddrIn6::from(every))?;
    listen(&fd, Backlog::MAXCONN)?;
    Ok(fd.into())
}

/// The accepting thread and what it shares with the connections' threads.
pub struct FrontDoor {
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    accepting: thread::JoinHandle<()>,
}

struct Shared {
    table: Arc<Table>,
    inner: Inner,
    tls: Option<Arc<Tls>>,
    shortages: Mutex<Option<Instant>>,
}

impl FrontDoor {
    /// Serves the connections of `listener`, at most `limit` at a time, by way of `inner`; over
    /// TLS where there are credentials.
    ///
    /// # Errors
    /// When the process has no descriptors or threads left.
    pub(crate) fn open(
        listener: TcpListener,
        limit: usize,
        inner: Inner,
        tls: Option<Arc<Tls>>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let table = Table::new(limit);
        let shortages = Mutex::default();
        let shared = Arc::new(Shared { table, inner, tls, shortages });
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let watched = Arc::clone(&shared);
        spawn("deadlines", move || {
            watched.table.watch_deadlines(|| watched.inner.trim());
        })?;
        let (accepting, ended) = (Arc::clone(&shared), Arc::clone(&stop));
        let accepting = spawn("accept", move || accept_loop(&listener, &accepting, &ended))?;
        Ok(Self { shared, stop, accepting })
    }

    /// Stops accepting, answers what is under way (for at most 4 s) and closes the rest.
    pub fn close(self) {
        self.shared.table.begin_stop();
        if self.stop.write(1).is_ok() {
            // The listening socket is closed with the thread.
            let _ = self.accepting.join();
        }
        self.shared.table.wait_until_empty(STOP_TIME);
    }
}

fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<thread::JoinHandle<T>> {
    thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(work)
}

fn accept_loop(listener: &TcpListener, shared: &Arc<Shared>, stop: &EventFd) {
    // What is queued when the daemon stops is still answered, within reason: the rest waits for
    // the next process where systemd holds the socket, and is reset where it is ours alone.
    let mut last = LAST;
    while last > 0 {
        last -= usize::from(shared.table.is_stopping());
        match listener.accept() {
            Ok((stream, address)) => admit(stream, address, shared),
            Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                Errno::EAGAIN => {
                    let mut ready = [
                        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                        PollFd::new(stop.as_fd(), PollFlags::POLLIN),
                    ];
                    // EINTR and the like: accept says what is the matter.
                    let _ = poll(&mut ready, PollTimeout::NONE);
                    let [_, stopped] = &ready;
                    if stopped.any() == Some(true) {
                        return;
                    }
                }
                Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => {
                    // The end does not wait for long until something is free.
                    if shared.table.is_stopping() {
                        last = last.saturating_sub(LAST / 8);
                    }
                    shared.relieve("cannot accept a connection", &error);
                    // What was closed is free once its threads have noticed.
                    thread::sleep(Duration::from_millis(20));
                }
                // The client has given up already, or the network told of an error (accept(2)).
                _ => {}
            },
        }
    }
}

fn admit(stream: TcpStream, address: SocketAddr, shared: &Arc<Shared>) {
    // Accepted sockets do not inherit O_NONBLOCK on Linux. Without TCP_NODELAY an answer in two
    // writes waits for the client's acknowledgement; an error means that the client has gone.
    let _ = stream.set_nodelay(true);
    let (stream, deadline) = (Arc::new(stream), Instant::now() + HANDSHAKE_TIME);
    let place = shared.table.admit(Arc::clone(&stream), deadline);
    let connection = Arc::clone(shared);
    let address = canonical(address).to_string();
    let work = move || match &connection.tls {
        None => serve(Plain(stream), address, None, &place, &connection),
        Some(tls) => serve_tls(tls, Plain(stream), address, deadline, &place, &connection),
    };
    if let Err(error) = spawn("connection", work) {
        shared.relieve("no thread for a connection", &error);
    }
}

fn serve(
    stream: impl Stream,
    address: String,
    name: Option<String>,
    place: &Place,
    shared: &Shared,
) {
    relay::serve(stream, place, &shared.inner, &Client { address, name });
}

/// The handshake has to be complete by `deadline`.
fn serve_tls(
    tls: &Tls,
    socket: Plain,
    address: String,
    deadline: Instant,
    place: &Place,
    shared: &Shared,
) {
    let conn = match rustls::ServerConnection::new(tls.config()) {
        Ok(conn) => conn,
        Err(error) => return shared.log_refusal(&address, &io::Error::other(error)),
    };
    let mut tunnel = Tunnel(rustls::StreamOwned::new(conn, socket));
    let rustls::StreamOwned { conn, sock } = &mut tunnel.0;
    while conn.is_handshaking() {
        if let Err(error) = conn.complete_io(sock) {
            // A socket that is shut down under the handshake looks like a client that left.
            let timed_out = Instant::now() >= deadline;
            let error = if timed_out { io::ErrorKind::TimedOut.into() } else { error };
            shared.log_refusal(&address, &error);
            // The alert that says why is sent already; what the client sends meanwhile must not
            // reset the connection before it is read.
            return relay::farewell(sock);
        }
    }
    let certificate = conn.peer_certificates().and_then(|chain| chain.first());
    let name = certificate.and_then(tls::certificate::common_name);
    let name = name.map(|name| name.escape_default().to_string());
    serve(tunnel, address, name, place, shared);
}

impl Shared {
    /// The process has run out of descriptors, threads or memory: closes what is only waiting,
    /// and says so once a second.
    fn relieve(&self, what: &str, error: &io::Error) {
        let shed = self.table.shed(SHED);
        self.inner.trim();
        let mut logged = self.shortages.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|at| at.elapsed() >= Duration::from_secs(1)) {
            *logged = Some(Instant::now());
            warn!("{what}: {error}; closed {shed} that were waiting");
        }
    }

    fn log_refusal(&self, address: &str, error: &io::Error) {
        let (kind, sentence) = tls::refusal(error);
        logging::warn_seldom(&kind, format_args!("refused handshake of {address}: {sentence}"));
    }
}

/// An IPv4 client on a socket for both families shows as `::ffff:192.0.2.1`.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

struct Plain(Arc<TcpStream>);

impl io::Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.as_ref().read(buffer)
    }
}

impl io::Write for Plain {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.as_ref().write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Plain {
    fn finish(&mut self) {
        // An error means that the client was faster.
        let _ = self.0.shutdown(std::net::Shutdown::Write);
    }

    fn finish_at_once(&mut self) {
        self.finish();
    }
}

/// A TLS connection after its handshake.
struct Tunnel(rustls::StreamOwned<rustls::ServerConnection, Plain>);

impl io::Read for Tunnel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl io::Write for Tunnel {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Stream for Tunnel {
    fn finish(&mut self) {
        self.0.conn.send_close_notify();
        // An error means that the client was faster.
        let _ = io::Write::flush(&mut self.0);
        self.0.sock.finish();
    }

    fn finish_at_once(&mut self) {
        if self.0.sock.0.set_nonblocking(true).is_ok() {
            self.finish();
        }
    }
}
