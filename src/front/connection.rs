//! One connection: handshake, head, body, answer. tiny_http is given what is known to be harmless.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use log::error;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use rustls::{ServerConfig, ServerConnection};

use super::Door;
use super::head::{self, Head, Refusal};
use super::table::{Phase, Place};
use crate::api::error_body;
use crate::logging::warn_seldom;
use crate::metrics::{self, OTHER};
use crate::tls::{self, Tls};

/// For a TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// From the first byte of a head to its end.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// From the end of the head to the end of the body.
const BODY_TIME: Duration = Duration::from_secs(20);
/// Without a byte, before and between requests.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// From the end of the request until the client has taken the whole answer. The daemon has it after
/// 3 s.
const ANSWER_TIME: Duration = Duration::from_secs(20);
/// For a client that was refused to read why, before the connection is cut.
const FAREWELL_TIME: Duration = Duration::from_secs(2);
/// After this, a connection is not kept.
const LIFE_TIME: Duration = Duration::from_secs(600);

/// A body up to this size is complete before tiny_http sees its request, so that a client that
/// sends slowly occupies nothing but its own connection.
const WHOLE_BODY: usize = head::MAX_FORM;

const PIECE: usize = 16 * 1024;

/// Who has come in.
pub(super) struct Visitor {
    pub(super) socket: Arc<TcpStream>,
    pub(super) address: SocketAddr,
    pub(super) place: Place,
    /// When the handshake has to be over, or the first request to begin.
    pub(super) deadline: Instant,
}

/// By when a new client has to have said something.
pub(super) fn first_deadline(tls: bool) -> Instant {
    Instant::now() + if tls { HANDSHAKE_TIME } else { IDLE_TIME }
}

/// Answers the requests of one client until the connection ends.
pub(super) fn serve(door: &Door, visitor: &Visitor) {
    let Visitor { socket, address, place, deadline } = visitor;
    let mut stream = Stream { socket: Socket { tcp: socket, place, heard: false }, tls: None };
    let generation = door.tls.as_deref().map(Tls::generation);
    if let Some(tls) = door.tls.as_deref()
        && let Err(error) = stream.shake_hands(tls.config())
    {
        // A socket that is shut down under the handshake looks like a client that left.
        let timed_out = Instant::now() >= *deadline;
        let error = if timed_out { io::ErrorKind::TimedOut.into() } else { error };
        let (kind, sentence) = tls::refusal(&error);
        metrics::add("tls_handshakes_failed_total", &[("reason", &kind)], 1.0);
        warn_seldom(&kind, format_args!("refused handshake of {address}: {sentence}"));
        // The alert that says why is sent; what the client sends meanwhile must not reset
        // the connection before it is read.
        return stream.farewell();
    }
    let certificate = stream.tls.as_ref().and_then(|tls| tls.peer_certificates()?.first());
    let validity = certificate.and_then(tls::certificate::validity);
    let name = certificate.and_then(tls::certificate::common_name);
    let left =
        validity.map(|of| of.not_after.duration_since(SystemTime::now()).unwrap_or_default());
    let mut connection = Connection {
        door,
        place,
        address: address.to_string(),
        name,
        generation,
        ends: Instant::now() + left.unwrap_or(LIFE_TIME).min(LIFE_TIME),
        stream,
        buffer: Vec::new(),
        is_head: false,
    };
    match connection.run() {
        Ok(()) => connection.leave(),
        Err(End::Refused(refusal)) => drop(connection.refuse(refusal)),
        Err(End::Gone) => {}
    }
}

/// Why a connection ends before its time.
enum End {
    Refused(Refusal),
    /// The client has gone, was too slow or lost its place to another.
    Gone,
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

struct Connection<'a> {
    door: &'a Door,
    place: &'a Place,
    stream: Stream<'a>,
    /// The client's address and port.
    address: String,
    /// Common name of the client's certificate.
    name: Option<String>,
    /// Of the credentials by which it has been let in.
    generation: Option<u64>,
    /// When its certificate or its life is over.
    ends: Instant,
    /// What the client has sent and no request has taken yet.
    buffer: Vec<u8>,
    /// Whether the request's method is HEAD, whose answer has a length but no body.
    is_head: bool,
}

impl Connection<'_> {
    /// Returns when no further request is to be read.
    fn run(&mut self) -> Result<(), End> {
        if self.generation.is_some() {
            self.enter(Phase::Arriving, IDLE_TIME)?;
        }
        // Over TLS an error as well: the client has gone silently.
        while !self.buffer.is_empty() || self.receive(PIECE).is_ok() {
            let mut head = self.read_head()?;
            if head.forbidden.is_none() && self.has_foreign_host(&head)? {
                head.forbidden = Some(FOREIGN_HOST);
            }
            let body_deadline = Instant::now() + BODY_TIME;
            self.read_whole_body(&head, body_deadline)?;
            if !self.is_current() {
                break;
            }
            if !self.place.begin(Instant::now() + ANSWER_TIME)? {
                metrics::add("connections_refused_total", &[("reason", "limit")], 1.0);
                return Err(refusal(503, "the connection limit is reached; try again"));
            }
            let idle = self.ends.min(Instant::now() + IDLE_TIME);
            if !self.answer(&head, body_deadline)? || self.place.enter(Phase::Idle, idle).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn enter(&self, phase: Phase, time: Duration) -> io::Result<()> {
        self.place.enter(phase, Instant::now() + time)
    }

    /// Whether the credentials in force are those that the client was let in by. Nobody who has
    /// been revoked since is answered.
    fn is_current(&self) -> bool {
        self.generation == self.door.tls.as_deref().map(Tls::generation)
    }

    /// Whether a browser may be asking for a page whose host name has been turned to this address
    /// (DNS rebinding): without TLS, on a loopback address, only a program of this host is to ask.
    fn has_foreign_host(&self, head: &Head) -> io::Result<bool> {
        Ok(self.generation.is_none()
            && head.host.as_deref().is_some_and(|host| !is_own(host, &self.door.allow_hosts))
            && self.stream.socket.tcp.local_addr()?.ip().to_canonical().is_loopback())
    }

    /// Appends what has arrived, at most `limit` bytes, to the buffer.
    fn receive(&mut self, limit: usize) -> io::Result<()> {
        let start = self.buffer.len();
        self.buffer.resize(start + limit.min(PIECE), 0);
        let count = self.stream.read(&mut self.buffer[start..]);
        self.buffer.truncate(start + *count.as_ref().unwrap_or(&0));
        if count? == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn read_head(&mut self) -> Result<Head, End> {
        let mut seen = 0;
        loop {
            self.is_head = self.buffer.trim_ascii_start().starts_with(b"HEAD ");
            match head::check(&self.buffer, seen)? {
                Some(head) => return Ok(head),
                None if seen == 0 => self.enter(Phase::Arriving, HEAD_TIME)?,
                None => {}
            }
            seen = self.buffer.len();
            self.receive(PIECE)?;
        }
    }

    /// Reads the body, or the beginning of a long one, into the buffer behind the head.
    fn read_whole_body(&mut self, head: &Head, deadline: Instant) -> io::Result<()> {
        if self.buffer.len() >= head.length + head.content_length {
            return Ok(());
        }
        self.place.enter(Phase::Arriving, deadline)?;
        if head.expect_continue {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            self.stream.flush()?;
        }
        let wanted = head.length + head.content_length.min(WHOLE_BODY);
        while self.buffer.len() < wanted {
            self.receive(wanted - self.buffer.len())?;
        }
        Ok(())
    }

    /// Passes the request on and the answer back. Whether the connection is kept.
    fn answer(&mut self, head: &Head, body_deadline: Instant) -> Result<bool, End> {
        let available = head.content_length.min(self.buffer.len() - head.length);
        let left = (head.content_length - available) as u64;
        let mut extra = vec![(head::CLIENT_ADDRESS, self.address.as_str())];
        extra.extend(self.name.as_deref().map(|name| (head::CLIENT_NAME, name)));
        extra.extend(head.forbidden.map(|reason| (head::FORBIDDEN, reason)));
        let mut request = head.rewritten(&extra);
        request.extend(self.buffer.drain(..head.length + available).skip(head.length));
        let mut inner = self.door.inner.take().map_err(|error| {
            error!("no connection to the HTTP server: {error}");
            refusal(503, "the daemon has run out of resources; try again")
        })?;
        let sent = inner.write_all(&request);
        drop(request);
        if sent.is_ok() && left > 0 {
            self.place.enter(Phase::Arriving, body_deadline)?;
            if io::copy(&mut (&mut self.stream).take(left), &mut inner)? < left {
                return Err(End::Gone);
            }
            self.enter(Phase::UnderWay, ANSWER_TIME)?;
        }
        let mut answer = BufReader::with_capacity(4 * PIECE, &inner);
        let text = sent.and_then(|()| read_lines(&mut answer)).map_err(|error| {
            error!("the HTTP server gave no answer: {error}");
            self.door.inner.probe();
            refusal(500, "internal error; see the log of the daemon")
        })?;
        let in_time = Instant::now() < self.ends;
        let keep = head.keep_alive && in_time && self.place.is_kept() && self.is_current();
        let (mut piece, length) = outer_head(&text, head, keep);
        let length = if self.is_head { 0 } else { length };
        let first = length.min(4 * PIECE as u64);
        let mut copied = answer.by_ref().take(first).read_to_end(&mut piece)? as u64;
        if length > first {
            self.stream.write_all(&piece)?;
            piece.clear();
            copied += io::copy(&mut answer.take(length - first), &mut self.stream)?;
        }
        if copied < length {
            return Err(End::Gone);
        }
        // Over the last of it the client may take its time.
        self.door.inner.give_back(inner);
        self.stream.write_all(&piece)?;
        self.stream.flush()?;
        Ok(keep)
    }

    /// Answers with an error and ends the connection; what else the client sends is thrown away.
    fn refuse(&mut self, Refusal { status, reason }: Refusal) -> io::Result<()> {
        metrics::add("requests_total", &[("call", OTHER), ("status", &status.to_string())], 1.0);
        let body = error_body(reason);
        let phrase = tiny_http::StatusCode(status).default_reason_phrase();
        let mut answer = format!(
            "HTTP/1.1 {status} {phrase}\r\nServer: vpn-daemon\r\n\
             Content-Type: application/json\r\nCache-Control: no-store\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        if !self.is_head {
            answer.push_str(&body);
        }
        self.enter(Phase::UnderWay, FAREWELL_TIME)?;
        self.stream.write_all(answer.as_bytes())?;
        self.stream.flush()?;
        self.leave();
        Ok(())
    }

    /// Closes the connection once the client has read its answer, or at once where its place is
    /// lost.
    fn leave(&mut self) {
        match self.enter(Phase::Arriving, FAREWELL_TIME) {
            Ok(()) => self.stream.farewell(),
            Err(_) => self.stream.finish(),
        }
    }
}

fn refusal(status: u16, reason: &'static str) -> End {
    End::Refused(Refusal { status, reason })
}

const FOREIGN_HOST: &str = "the header Host is neither localhost nor a loopback address: without \
                            TLS, a browser page may be asking; -allow-host allows another name";

/// Whether the header `Host` names this host, or what `-allow-host` allows.
fn is_own(host: &str, allowed: &[String]) -> bool {
    let with_port = host.parse().map(|address: SocketAddr| address.ip());
    let address = with_port.or_else(|_| host.trim_matches(['[', ']']).parse());
    let name = host.split(':').next().unwrap_or_default();
    address.is_ok_and(|address: IpAddr| address.is_loopback())
        || name.eq_ignore_ascii_case("localhost")
        || allowed.iter().any(|allowed| name.eq_ignore_ascii_case(allowed))
}

/// The client's socket. The table hears of its first byte, and when it is not taking its answer.
struct Socket<'a> {
    tcp: &'a TcpStream,
    place: &'a Place,
    heard: bool,
}

impl Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.tcp.read(buffer)?;
        if count > 0 && !std::mem::replace(&mut self.heard, true) {
            self.place.hear()?;
        }
        Ok(count)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match send(self.tcp.as_raw_fd(), buffer, flags) {
            Err(Errno::EAGAIN) => {
                self.place.stall(true)?;
                let written = self.tcp.write(buffer);
                self.place.stall(false)?;
                written
            }
            result => Ok(result?),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The connection to a client, plain or TLS.
struct Stream<'a> {
    socket: Socket<'a>,
    tls: Option<ServerConnection>,
}

impl Stream<'_> {
    fn shake_hands(&mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
        while tls.is_handshaking() {
            if let Err(error) = tls.complete_io(&mut self.socket) {
                // The alert that says why may stand behind other messages.
                while tls.wants_write() && tls.write_tls(&mut self.socket).is_ok() {}
                return Err(error);
            }
        }
        self.tls = Some(tls);
        Ok(())
    }

    /// Tells the client that nothing more comes. Where the place is lost, it does not wait.
    fn finish(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
        }
        // An error means that the client was faster.
        let _ = self.flush();
        let _ = self.socket.tcp.shutdown(Shutdown::Write);
    }

    /// Closing a socket with unread bytes resets it, and the client may lose what it was told:
    /// reads on until the client closes or its place in the table is taken back.
    fn farewell(&mut self) {
        self.finish();
        let mut piece = [0; 4096];
        while matches!(self.read(&mut piece), Ok(1..)) {}
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.read(buffer),
            Some(tls) => rustls::Stream::new(tls, &mut self.socket).read(buffer),
        }
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.write(buffer),
            Some(tls) => rustls::Stream::new(tls, &mut self.socket).write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => rustls::Stream::new(tls, &mut self.socket).flush(),
        }
    }
}

/// The head of tiny_http's answer.
pub(super) fn read_lines(answer: &mut impl BufRead) -> io::Result<String> {
    let mut text = String::new();
    while !text.ends_with("\r\n\r\n") {
        if answer.read_line(&mut text)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(text)
}

/// The head as the client gets it, and the length that it tells: 204 has none (RFC 9110, 8.6), and
/// what becomes of the connection is said where the client would not expect it.
fn outer_head(text: &str, head: &Head, keep: bool) -> (Vec<u8>, u64) {
    let mut outer = String::with_capacity(1024);
    let mut length = 0;
    for line in text.trim_end().split("\r\n") {
        if let Some(value) = line.strip_prefix("Content-Length: ") {
            length = value.parse().unwrap_or(0);
            if text.contains(" 204 ") {
                continue;
            }
        }
        outer.push_str(line);
        outer.push_str("\r\n");
    }
    outer.push_str(match (keep, head.http10) {
        (false, _) => "Connection: close\r\n\r\n",
        (true, true) => "Connection: keep-alive\r\n\r\n",
        (true, false) => "\r\n",
    });
    (outer.into_bytes(), length)
}
