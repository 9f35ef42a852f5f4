//! One connection: reads a request, passes it to tiny_http once it is known to be harmless, and
//! gives the answer back.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use log::error;

use super::inner::Inner;
use super::table::{Phase, Place};
use crate::api::error_body;
use crate::head::{self, Checker, Head, Verdict};

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

/// A body up to this size is complete before tiny_http sees its request, so that a client that
/// sends slowly occupies nothing but its own connection.
const WHOLE_BODY: u64 = head::MAX_FORM;

/// tiny_http's answers have a head of a few lines.
const MAX_ANSWER_HEAD: usize = 8 * 1024;

const PIECE: usize = 16 * 1024;

/// A connection to a client, plain or TLS.
pub(super) trait Stream: Read + Write {
    /// Tells the client that nothing more comes. Reading goes on.
    fn finish(&mut self);

    /// The same without waiting, and without reading on: the client may miss it.
    fn finish_at_once(&mut self);
}

/// Who is at the other end.
pub(super) struct Client {
    /// Address and port.
    pub(super) address: String,
    /// Common name of the client's certificate.
    pub(super) name: Option<String>,
}

/// Answers the requests of one client until the connection ends.
pub(super) fn serve(mut stream: impl Stream, place: &Place, inner: &Inner, client: &Client) {
    let mut relay = Relay { stream: &mut stream, place, inner, client, buffer: Vec::new() };
    // An error means that the client has gone, was too slow or lost its place to another.
    let _ = relay.run();
}

struct Relay<'a, S> {
    stream: &'a mut S,
    place: &'a Place,
    inner: &'a Inner,
    client: &'a Client,
    /// What the client has sent and no request has taken yet.
    buffer: Vec<u8>,
}

impl<S: Stream> Relay<'_, S> {
    fn run(&mut self) -> io::Result<()> {
        let mut waiting = Phase::Arriving;
        loop {
            if self.buffer.is_empty() {
                let received = self.enter(waiting, IDLE_TIME).and_then(|()| self.receive(PIECE));
                // Over TLS an error as well: the place is lost, or the client has gone silently.
                if !matches!(received, Ok(1..)) {
                    return self.leave();
                }
            }
            let head = match self.read_head()? {
                Ok(head) => head,
                Err(refusal) => {
                    let is_head = self.buffer.trim_ascii_start().starts_with(b"HEAD ");
                    return self.refuse(refusal.status, refusal.reason, is_head);
                }
            };
            self.read_whole_body(&head)?;
            if self.place.over_limit {
                let sentence = "the connection limit is reached; try again";
                return self.refuse(503, sentence, head.is_head);
            }
            if !self.answer(&head)? {
                return self.leave();
            }
            waiting = Phase::Idle;
        }
    }

    fn enter(&self, phase: Phase, time: Duration) -> io::Result<()> {
        match self.place.enter(phase, Instant::now() + time) {
            true => Ok(()),
            false => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }

    /// Appends what has arrived, at most `limit` bytes, to the buffer; 0 at the end of the stream.
    fn receive(&mut self, limit: usize) -> io::Result<usize> {
        let start = self.buffer.len();
        self.buffer.resize(start + limit.min(PIECE), 0);
        let result = loop {
            match self.stream.read(self.buffer.get_mut(start..).unwrap_or_default()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        self.buffer.truncate(start + *result.as_ref().unwrap_or(&0));
        result
    }

    fn read_head(&mut self) -> io::Result<Result<Head, head::Refusal>> {
        let mut checker = Checker::default();
        let mut arriving = false;
        loop {
            match checker.check(&self.buffer) {
                Verdict::Complete(head) => return Ok(Ok(head)),
                Verdict::Refused(refusal) => return Ok(Err(refusal)),
                Verdict::Incomplete if !arriving => {
                    self.enter(Phase::Arriving, HEAD_TIME)?;
                    arriving = true;
                }
                Verdict::Incomplete => {}
            }
            if self.receive(PIECE)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Reads the body, or the beginning of a long one, into the buffer behind the head.
    fn read_whole_body(&mut self, head: &Head) -> io::Result<()> {
        let wanted = head.length + usize_of(head.content_length.min(WHOLE_BODY));
        if self.buffer.len() >= head.length + usize_of(head.content_length) {
            return Ok(());
        }
        // For the rest of a long body as well, which comes later.
        self.enter(Phase::Arriving, BODY_TIME)?;
        if head.expect_continue {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            self.stream.flush()?;
        }
        while self.buffer.len() < wanted {
            if self.receive(wanted - self.buffer.len())? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Passes the request on and the answer back. Whether the connection is kept.
    fn answer(&mut self, head: &Head) -> io::Result<bool> {
        let body_length = usize_of(head.content_length);
        let available = body_length.min(self.buffer.len() - head.length);
        let mut request = head.rewritten(&[
            (head::CLIENT_ADDRESS, &self.client.address),
            (head::CLIENT_NAME, self.client.name.as_deref().unwrap_or_default()),
        ]);
        let body = self.buffer.drain(..head.length + available).skip(head.length);
        request.extend(body);
        if available == body_length {
            self.enter(Phase::UnderWay, ANSWER_TIME)?;
        }
        let mut inner = match self.inner.take() {
            Ok(inner) => inner,
            Err(error) => {
                error!("no connection to the HTTP server: {error}");
                let sentence = "the daemon has run out of resources; try again";
                self.refuse(503, sentence, head.is_head)?;
                return Ok(false);
            }
        };
        let sent = inner.write_all(&request);
        drop(request);
        if sent.is_ok() && available < body_length {
            self.stream_body(&mut inner, body_length - available)?;
            self.enter(Phase::UnderWay, ANSWER_TIME)?;
        }
        let answer = match sent.and_then(|()| AnswerHead::read(&mut inner, head)) {
            Ok(answer) => answer,
            Err(error) => {
                error!("the HTTP server gave no answer: {error}");
                drop(inner);
                self.inner.probe();
                let sentence = "internal error; see the log of the daemon";
                self.refuse(500, sentence, head.is_head)?;
                return Ok(false);
            }
        };
        let keep = head.keep_alive && !self.place.is_stopping();
        let mut piece = answer.outer_head(head, keep);
        piece.extend(answer.body_start);
        let (mut filled, mut left) = (piece.len(), answer.body_left);
        while left > 0 {
            self.stream.write_all(piece.get(..filled).unwrap_or_default())?;
            let limit = left.min(4 * PIECE);
            // It grows once: zeros for each piece would be more work than the piece.
            piece.resize(piece.len().max(limit), 0);
            filled = inner.read(piece.get_mut(..limit).unwrap_or_default())?;
            if filled == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= filled;
        }
        // Over the rest the client may take its time.
        self.inner.give_back(inner);
        self.stream.write_all(piece.get(..filled).unwrap_or_default())?;
        self.stream.flush()?;
        Ok(keep)
    }

    fn stream_body(&mut self, inner: &mut UnixStream, mut left: usize) -> io::Result<()> {
        let mut piece = vec![0; 4 * PIECE];
        while left > 0 {
            let limit = left.min(piece.len());
            let count = self.stream.read(piece.get_mut(..limit).unwrap_or_default())?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            inner.write_all(piece.get(..count).unwrap_or_default())?;
            left -= count;
        }
        Ok(())
    }

    /// Answers with an error and ends the connection; what else the client sends is thrown away.
    fn refuse(&mut self, status: u16, sentence: &str, is_head: bool) -> io::Result<()> {
        let body = error_body(sentence);
        let reason = tiny_http::StatusCode(status).default_reason_phrase();
        let mut answer = format!(
            "HTTP/1.1 {status} {reason}\r\nServer: vpn-daemon\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n",
            body.len()
        );
        if !is_head {
            answer.push_str(&body);
        }
        self.enter(Phase::Arriving, FAREWELL_TIME)?;
        self.stream.write_all(answer.as_bytes())?;
        self.stream.flush()?;
        self.leave()
    }

    /// Closes the connection once the client has read its answer, or at once where its place is
    /// lost.
    fn leave(&mut self) -> io::Result<()> {
        match self.enter(Phase::Arriving, FAREWELL_TIME) {
            Ok(()) => farewell(self.stream),
            Err(_) => self.stream.finish_at_once(),
        }
        Ok(())
    }
}

/// Closing a socket with unread bytes resets it, and the client may lose what it was told: reads
/// on until the client closes or its place in the table is taken back.
pub(super) fn farewell(stream: &mut impl Stream) {
    stream.finish();
    let mut piece = [0; 4096];
    while matches!(stream.read(&mut piece), Ok(count) if count > 0) {}
}

/// The head of an answer from tiny_http, and what came with it of the body.
struct AnswerHead {
    text: String,
    body_start: Vec<u8>,
    /// Bytes of the body that are still to be read.
    body_left: usize,
}

impl AnswerHead {
    /// Reads the answer to `head`.
    fn read(inner: &mut UnixStream, head: &Head) -> io::Result<Self> {
        let mut bytes = Vec::with_capacity(1024);
        let mut piece = [0; 4096];
        while bytes.len() <= MAX_ANSWER_HEAD {
            let count = inner.read(&mut piece)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let searched = bytes.len().saturating_sub(3);
            bytes.extend_from_slice(piece.get(..count).unwrap_or_default());
            let end = bytes.windows(4).skip(searched).position(|window| window == b"\r\n\r\n");
            if let Some(end) = end {
                let body_start = bytes.split_off(searched + end + 4);
                bytes.truncate(searched + end + 2);
                let text = String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData)?;
                let mut answer = Self { text, body_start, body_left: 0 };
                // More than its length would be taken for the beginning of the next answer.
                let left = answer.body_length(head).checked_sub(answer.body_start.len());
                answer.body_left = left.ok_or(io::ErrorKind::InvalidData)?;
                return Ok(answer);
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    fn has_no_content(&self) -> bool {
        self.text.get(9..12) == Some("204")
    }

    /// Bytes of the body that follow. The handlers always give a length.
    fn body_length(&self, head: &Head) -> usize {
        if head.is_head || self.has_no_content() {
            return 0;
        }
        let length = self.text.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        length.and_then(|length| length.parse().ok()).unwrap_or(0)
    }

    /// The head as the client gets it: 204 has no length (RFC 9110, 8.6), and what becomes of
    /// the connection is said where the client would not expect it.
    fn outer_head(&self, head: &Head, keep: bool) -> Vec<u8> {
        let mut outer = String::with_capacity(self.text.len() + 32);
        for line in self.text.split_inclusive("\r\n") {
            if !(self.has_no_content() && line.starts_with("Content-Length:")) {
                outer.push_str(line);
            }
        }
        match (keep, head.http10) {
            (false, _) => outer.push_str("Connection: close\r\n"),
            (true, true) => outer.push_str("Connection: keep-alive\r\n"),
            (true, false) => {}
        }
        outer.push_str("\r\n");
        outer.into_bytes()
    }
}

fn usize_of(length: u64) -> usize {
    // The front door lets at most 32 MiB through.
    usize::try_from(length).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::{inner::InnerDirectory, table::Table};
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;

    /// A client that asks once, and how long it may take over the answer when that comes.
    struct Asker<'a> {
        request: &'a [u8],
        place: &'a Place,
        time: Option<Duration>,
    }

    impl Read for Asker<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.request.read(buffer)
        }
    }

    impl Write for Asker<'_> {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            let left = self.place.deadline().saturating_duration_since(Instant::now());
            self.time.get_or_insert(left);
            Ok(buffer.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Stream for Asker<'_> {
        fn finish(&mut self) {}

        fn finish_at_once(&mut self) {}
    }

    #[test]
    fn an_answer_is_to_be_taken_within_20_s_of_the_request() {
        let directory = InnerDirectory::below(&std::env::temp_dir()).unwrap();
        let (inner, listener) = Inner::open(&directory, |_| {}).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            while matches!(stream.read(&mut request), Ok(1..)) {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
            }
        });
        let outer = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(outer.local_addr().unwrap()).unwrap();
        let place = Table::new(1).admit(Arc::new(socket), Instant::now() + IDLE_TIME);
        let request = b"GET / HTTP/1.1\r\nHost: node\r\n\r\n";
        let mut asker = Asker { request, place: &place, time: None };
        let client = Client { address: String::new(), name: None };
        let mut relay = Relay {
            stream: &mut asker,
            place: &place,
            inner: &inner,
            client: &client,
            buffer: vec![],
        };
        relay.run().unwrap();
        assert!(asker.time.unwrap() <= Duration::from_secs(20), "{:?}", asker.time);
    }
}
