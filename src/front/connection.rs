//! One client: handshake, head, body, and the answer, which the thread that has it writes. tiny_http is
//! given what is known to be harmless.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

use log::error;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use rustls::{ServerConfig, ServerConnection};
use tiny_http::{HTTPVersion, Header, Response, StatusCode};

use super::Door;
use super::head::{self, Head, Refusal};
use super::inner::PASS_TIME;
use super::table::{Phase, Place};
use crate::api::Error;
use crate::logging::warn_seldom;
use crate::metrics::{self, OTHER};
use crate::routes::Answer;
use crate::tls::{self, Tls};
use crate::{lock, unix};

/// For a TLS handshake.
pub(super) const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// From the first byte of a head to its end.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// From the end of the head to the end of the body.
const BODY_TIME: Duration = Duration::from_secs(20);
/// Without a byte, before and between requests.
pub(super) const IDLE_TIME: Duration = Duration::from_secs(60);
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

/// tiny_http reads a body up to this size with its head. A longer one would keep the next request on
/// the same connection waiting until it is answered.
const SHORT_BODY: usize = 1024;
/// No answer takes this long: a wait beyond it is a defect, not a slow backend.
const PATIENCE: Duration = Duration::from_secs(30);

/// Read from a client at a time; long bodies and answers go in sixteen of these.
const PIECE: usize = 4 * 1024;

/// Who has come in.
pub(super) struct Visitor {
    pub(super) socket: Socket,
    pub(super) address: SocketAddr,
    /// When the handshake has to be over, or the first request to begin.
    pub(super) deadline: Instant,
}

/// Answers the requests of one client until the connection ends.
pub(super) fn serve(door: &Arc<Door>, visitor: Visitor) {
    let Visitor { socket, address, deadline } = visitor;
    let mut stream = Stream { socket, tls: None };
    let generation = door.tls.as_deref().map(Tls::generation);
    if let Some(tls) = door.tls.as_deref()
        && let Err(error) = stream.shake_hands(tls.config())
    {
        // A socket that is shut down under the handshake looks like a client that left.
        let timed_out = Instant::now() >= deadline;
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
    let (back, answered) = mpsc::sync_channel(1);
    let mut connection = Connection {
        door: Arc::clone(door),
        caller: format!("asked_by={:?} address={address}", name.unwrap_or_default()),
        generation,
        ends: Instant::now() + left.unwrap_or(LIFE_TIME).min(LIFE_TIME),
        stream,
        buffer: Vec::new(),
        unsent: Vec::new(),
        is_head: false,
        head: Head::default(),
        is_kept: true,
        back,
    };
    if generation.is_some() && connection.enter(Phase::Arriving, IDLE_TIME).is_err() {
        return;
    }
    while let Some(returned) = connection.ask(&answered) {
        connection = returned;
    }
}

/// Why a connection ends: the client is told, or has gone, was too slow or lost its place.
struct End(Option<Refusal>);

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self(None)
    }
}

/// What has to be passed on yet of a request, and where, if it has a connection of its own.
type Rest = (Option<unix::Stream>, Vec<u8>);

/// A client. The thread that reads its requests has it, and then the one that answers.
pub(crate) struct Connection {
    door: Arc<Door>,
    stream: Stream,
    /// The client's address, and the common name of its certificate, for the log.
    caller: String,
    /// Of the credentials by which it has been let in.
    generation: Option<u64>,
    /// When its certificate or its life is over.
    ends: Instant,
    /// What the client has sent and no request has taken yet.
    buffer: Vec<u8>,
    /// Of the answer, what the client has not taken at once.
    unsent: Vec<u8>,
    /// Whether the request's method is HEAD, whose answer has a length but no body.
    is_head: bool,
    /// Of the request that is being answered.
    head: Head,
    /// Whether another request may follow.
    is_kept: bool,
    /// To the thread that reads.
    back: mpsc::SyncSender<Self>,
}

impl Connection {
    /// Has the next request answered, by another thread. `None` when the connection is over.
    fn ask(mut self, answered: &mpsc::Receiver<Self>) -> Option<Self> {
        let (own, rest) = self.read_request().map_err(|end| self.end(end)).ok()?;
        let (door, id) = (Arc::clone(&self.door), self.place().id);
        let tcp = Arc::clone(&self.stream.socket.tcp);
        // What is here already does not wake up who waits for more. Over TLS, rustls may have it: bytes
        // behind a long body or a head that fills the buffer, or the client's close_notify.
        let is_read = |tls: &ServerConnection| !tls.wants_read();
        let has_more = !self.buffer.is_empty()
            || own.is_some()
            || self.stream.tls.as_deref().is_some_and(is_read);
        // Nothing is to follow: the thread that answers closes the connection.
        let is_last = !self.head.keep_alive && self.head.content_length == 0;
        let is_over = is_last && !has_more && self.generation.is_none();
        lock(&door.inner.waiting).insert(id, self);
        let passed = match own {
            Some(mut inner) => inner.write_all(&rest),
            None => door.inner.pass(&rest),
        };
        if let Err(error) = passed {
            let this = lock(&door.inner.waiting).remove(&id);
            this?.end(no_server(&error));
            return None;
        }
        if is_over {
            return None;
        }
        // Mostly this thread wakes up when the client sends its next request, or leaves.
        if !has_more {
            let _ = tcp.peek(&mut [0]);
        }
        let returned = answered.recv_timeout(PATIENCE);
        let mut this = returned.map_err(|_| lock(&door.inner.waiting).remove(&id)).ok()?;
        if this.is_kept {
            return Some(this);
        }
        this.end(End(None));
        None
    }

    /// Reads the next request, and passes on all but the rest of a long one.
    fn read_request(&mut self) -> Result<Rest, End> {
        if self.buffer.is_empty() {
            self.receive()?;
        }
        let mut head = self.read_head()?;
        if head.forbidden.is_none() && self.has_foreign_host(&head)? {
            head.forbidden = Some(FOREIGN_HOST);
        }
        let body_deadline = Instant::now() + BODY_TIME;
        self.read_whole_body(&head, body_deadline)?;
        if !self.is_current() {
            return Err(End(None));
        }
        if !self.place().begin(Instant::now() + ANSWER_TIME)? {
            metrics::add("connections_refused_total", &[("reason", "limit")], 1.0);
            return Err(refusal(503, "the connection limit is reached; try again"));
        }
        self.pass_on(head, body_deadline)
    }

    fn place(&self) -> &Place {
        &self.stream.socket.place
    }

    fn enter(&self, phase: Phase, time: Duration) -> io::Result<()> {
        self.place().enter(phase, Instant::now() + time)
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

    /// Appends what has arrived to the buffer.
    fn receive(&mut self) -> io::Result<()> {
        let start = self.buffer.len();
        self.buffer.resize(start + PIECE, 0);
        let count = self.stream.read(&mut self.buffer[start..]);
        self.buffer.truncate(start + *count.as_ref().unwrap_or(&0));
        if count? == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn read_head(&mut self) -> Result<Head, End> {
        let mut seen = 0;
        loop {
            self.is_head = self.buffer.trim_ascii_start().starts_with(b"HEAD ");
            match head::check(&self.buffer, seen).map_err(|refusal| End(Some(refusal)))? {
                Some(head) => return Ok(head),
                None if seen == 0 => self.enter(Phase::Arriving, HEAD_TIME)?,
                None => {}
            }
            seen = self.buffer.len();
            self.receive()?;
        }
    }

    /// Reads the body, or the beginning of a long one, into the buffer behind the head.
    fn read_whole_body(&mut self, head: &Head, deadline: Instant) -> io::Result<()> {
        if self.buffer.len() >= head.length + head.content_length {
            return Ok(());
        }
        self.place().enter(Phase::Arriving, deadline)?;
        if head.expect_continue {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            self.stream.flush()?;
        }
        let wanted = head.length + head.content_length.min(WHOLE_BODY);
        while self.buffer.len() < wanted {
            self.receive()?;
        }
        Ok(())
    }

    /// Makes the request that tiny_http reads. A body that is not here yet goes to a connection of its own
    /// as it comes, but for its last byte.
    fn pass_on(&mut self, head: Head, body_deadline: Instant) -> Result<Rest, End> {
        let available = head.content_length.min(self.buffer.len() - head.length);
        let left = (head.content_length - available) as u64;
        let id = self.place().id.to_string();
        let mut extra = vec![(head::CONNECTION, &*id), (head::CALLER, &self.caller)];
        extra.extend(head.forbidden.map(|reason| (head::FORBIDDEN, reason)));
        let mut rest = head.rewritten(&extra);
        rest.extend(self.buffer.drain(..head.length + available).skip(head.length));
        let mut own = None;
        if head.content_length > SHORT_BODY {
            let inner = self.door.inner.connect(PASS_TIME).map_err(|error| no_server(&error))?;
            let inner = own.insert(inner);
            inner.deadline = body_deadline;
            if left > 0 {
                self.place().enter(Phase::Arriving, body_deadline)?;
                inner.write_all(&rest)?;
                let body = (&mut self.stream).take(left - 1);
                io::copy(&mut BufReader::with_capacity(16 * PIECE, body), inner)?;
                // With its last byte it can be answered: not before this connection waits for that.
                rest = vec![0];
                self.stream.read_exact(&mut rest)?;
                self.enter(Phase::UnderWay, ANSWER_TIME)?;
            }
        }
        self.head = head;
        Ok((own, rest))
    }

    /// Writes the answer, and returns the connection to the thread that reads. Without patience, it
    /// comes back where the client does not take all of it at once: [`Self::go_on`] waits for that. Such
    /// an answer is to be shorter than the buffer of [`Self::write`].
    pub(crate) fn answer(mut self, answer: Answer, patient: bool) -> Option<Self> {
        self.stream.socket.patient = patient;
        let in_time = Instant::now() < self.ends;
        self.is_kept =
            self.head.keep_alive && in_time && self.place().is_kept() && self.is_current();
        match self.write(answer) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Some(self),
            written => self.finish_answer(written),
        }
        None
    }

    /// Writes the rest of the answer.
    pub(crate) fn go_on(mut self) {
        self.stream.socket.patient = true;
        let unsent = std::mem::take(&mut self.unsent);
        let written = self.stream.write_all(&unsent).and_then(|()| self.stream.flush());
        self.finish_answer(written);
    }

    fn finish_answer(mut self, written: io::Result<()>) {
        if written.is_err() {
            return;
        }
        let idle = self.ends.min(Instant::now() + IDLE_TIME);
        if !self.is_kept || self.place().enter(Phase::Idle, idle).is_err() {
            self.is_kept = false;
            let _ = self.enter(Phase::Arriving, FAREWELL_TIME);
            self.stream.finish();
        }
        self.stream.socket.patient = true;
        let back = self.back.clone();
        let _ = back.send(self);
    }

    /// Writes head and body; tiny_http formats the head.
    fn write(&mut self, answer: Answer) -> io::Result<()> {
        let Answer { status, mut body, media_type, allow } = answer;
        self.stream.socket.is_final = !self.is_kept;
        let length: usize = body.iter().map(|piece| piece.len()).sum();
        let mut headers = vec![("Server", "vpn-daemon"), ("Cache-Control", "no-store")];
        headers.extend((!body.is_empty()).then_some(("Content-Type", media_type)));
        headers.extend(allow.map(|methods| ("Allow", methods)));
        // These names and values are ASCII, which is all that a header can be refused for.
        let header = |(name, value): &(&str, &str)| Header::from_bytes(*name, *value).ok();
        let headers = headers.iter().filter_map(header).collect();
        let version = HTTPVersion::from((1, u8::from(!self.head.http10)));
        let mut text = Vec::with_capacity(4096);
        Response::new(StatusCode(status), headers, io::empty(), Some(length), None)
            .with_chunked_threshold(usize::MAX)
            .raw_print(&mut text, version, &[], true, None)?;
        // RFC 9110, 8.6: 204 has no length. The connection is the front door's, not tiny_http's.
        let end = if status == 204 { "Content-Length: 0\r\n\r\n" } else { "\r\n" };
        text.truncate(text.len() - end.len());
        text.extend_from_slice(match (self.is_kept, self.head.http10) {
            (false, _) => b"Connection: close\r\n\r\n".as_slice(),
            (true, true) => b"Connection: keep-alive\r\n\r\n",
            (true, false) => b"\r\n",
        });
        if self.is_head {
            body.clear();
        }
        // All of a short answer and a byte more: what fills the buffer would not stay in it.
        let room = (text.len() + length + 1).min(16 * PIECE);
        let mut client = BufWriter::with_capacity(room, &mut self.stream);
        client.write_all(&text)?;
        body.iter().try_for_each(|piece| client.write_all(piece))?;
        let flushed = client.flush();
        flushed.inspect_err(|_| self.unsent = client.into_parts().1.unwrap_or_default())
    }

    /// Ends the connection once the client has read its last answer; what else it sends is thrown
    /// away.
    fn end(&mut self, End(refusal): End) {
        if let Some(Refusal { status, reason }) = refusal {
            let labels = [("call", OTHER), ("status", &*status.to_string())];
            metrics::add("requests_total", &labels, 1.0);
            self.is_kept = false;
            let entered = self.enter(Phase::UnderWay, FAREWELL_TIME);
            let _ = entered.and_then(|()| self.write(Error::new(status, reason).into()));
        }
        let _ = self.enter(Phase::Arriving, FAREWELL_TIME);
        self.stream.farewell();
    }
}

fn refusal(status: u16, reason: &'static str) -> End {
    End(Some(Refusal { status, reason }))
}

fn no_server(error: &io::Error) -> End {
    error!("the HTTP server takes no request: {error}");
    refusal(503, "the daemon has run out of resources; try again")
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
pub(super) struct Socket {
    pub(super) tcp: Arc<TcpStream>,
    pub(super) place: Place,
    pub(super) heard: bool,
    /// Whether to wait for a client that is not taking its answer; else that is a time-out.
    pub(super) patient: bool,
    /// No more answers follow: the kernel holds a last short segment back, and sends it with the end.
    pub(super) is_final: bool,
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = (&*self.tcp).read(buffer)?;
        if count > 0 && !std::mem::replace(&mut self.heard, true) {
            self.place.hear()?;
        }
        Ok(count)
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let mut flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        flags.set(MsgFlags::from_bits_retain(nix::libc::MSG_MORE), self.is_final);
        match send(self.tcp.as_raw_fd(), buffer, flags) {
            Err(Errno::EAGAIN) if self.patient => {
                self.place.stall(true)?;
                let written = (&*self.tcp).write(buffer);
                self.place.stall(false)?;
                written
            }
            // Where a write would block, rustls reads instead, and that waits for the client.
            Err(Errno::EAGAIN) => Err(io::ErrorKind::TimedOut.into()),
            result => Ok(result?),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Socket {
    /// Wakes the thread that waits for the next request, where the one that answers gives up.
    fn drop(&mut self) {
        let _ = self.tcp.shutdown(Shutdown::Both);
    }
}

/// The connection to a client, plain or TLS.
struct Stream {
    socket: Socket,
    tls: Option<Box<ServerConnection>>,
}

impl Stream {
    fn shake_hands(&mut self, config: Arc<ServerConfig>) -> io::Result<()> {
        let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
        while tls.is_handshaking() {
            if let Err(error) = tls.complete_io(&mut self.socket) {
                // The alert that says why may stand behind other messages.
                while tls.wants_write() && tls.write_tls(&mut self.socket).is_ok() {}
                return Err(error);
            }
        }
        self.tls = Some(Box::new(tls));
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

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.read(buffer),
            Some(tls) => rustls::Stream::new(tls.as_mut(), &mut self.socket).read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.write(buffer),
            Some(tls) => rustls::Stream::new(tls.as_mut(), &mut self.socket).write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => rustls::Stream::new(tls.as_mut(), &mut self.socket).flush(),
        }
    }
}
