//! tiny_http behind the front door: its requests, the threads that answer them, and its end.

use std::io::{self, Read};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;

use log::error;
use tiny_http::{Header, Request, Response, StatusCode};

use crate::api::Error;
use crate::head;
use crate::routes::{self, Answer, Node};

/// Threads that wait for requests when there are none. More are started as these are taken by
/// requests to the backends, one ahead of need, so that no backend that hangs ever keeps `/i/node`
/// waiting.
const WAITING: usize = 2;

const STACK: usize = 512 * 1024;

/// The HTTP server on the inner socket.
pub struct Server(Arc<Pool>);

/// The threads that take requests from tiny_http and answer them.
struct Pool {
    http: tiny_http::Server,
    node: Node,
    failed: Box<dyn Fn(&io::Error) + Send + Sync>,
    /// Threads that wait for a request, or will in a moment.
    waiting: AtomicUsize,
    stopping: AtomicBool,
    /// Takes requests that there is no thread for and whose bodies are still coming: one for each
    /// connection of the front door at the most.
    refusals: Sender<Request>,
}

impl Server {
    /// Serves the inner socket. `failed` is called if tiny_http ever gives up.
    pub fn start(
        inner: UnixListener,
        node: Node,
        failed: impl Fn(&io::Error) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let http = tiny_http::Server::from_listener(inner, None).map_err(io::Error::other)?;
        let (refusals, requests) = mpsc::channel();
        thread::Builder::new()
            .name("refusals".to_owned())
            .stack_size(STACK)
            .spawn(move || requests.into_iter().for_each(refuse))?;
        let pool = Arc::new(Pool {
            http,
            node,
            failed: Box::new(failed),
            waiting: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            refusals,
        });
        for _ in 0..WAITING {
            Pool::grow(&pool)?;
        }
        Ok(Self(pool))
    }

    /// Ends the threads that wait, and the others when they have answered.
    pub fn stop(self) {
        self.0.stopping.store(true, Ordering::Release);
        self.0.http.unblock();
    }
}

impl Pool {
    /// Starts a thread; it counts as waiting from now on.
    fn grow(pool: &Arc<Self>) -> io::Result<()> {
        let shared = Arc::clone(pool);
        pool.waiting.fetch_add(1, Ordering::AcqRel);
        let spawned = thread::Builder::new()
            .name("request".to_owned())
            .stack_size(STACK)
            .spawn(move || Self::receive(&shared));
        spawned.map(drop).inspect_err(|_| {
            pool.waiting.fetch_sub(1, Ordering::AcqRel);
        })
    }

    fn receive(pool: &Arc<Self>) {
        loop {
            let http = match pool.http.recv() {
                Ok(http) => http,
                // One wakes the next.
                Err(_) if pool.stopping.load(Ordering::Acquire) => return pool.http.unblock(),
                Err(error) => return (pool.failed)(&error),
            };
            let request = view(&http);
            if request.is_immediate() {
                respond(http, &request, &pool.node);
                continue;
            }
            let was_last = pool.waiting.fetch_sub(1, Ordering::AcqRel) == 1;
            match if was_last { Self::grow(pool) } else { Ok(()) } {
                Ok(()) => respond(http, &request, &pool.node),
                // This thread has to be back at once.
                Err(error) => {
                    error!("no thread for a request: {error}");
                    pool.refuse(http);
                }
            }
            let enough = |waiting| (waiting < WAITING).then_some(waiting + 1);
            if pool.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, enough).is_err() {
                return;
            }
        }
    }

    /// Says that there is no thread, without waiting for the client.
    fn refuse(&self, http: Request) {
        // The front door has the whole of a shorter body before it passes its request on.
        match http.body_length() {
            Some(length) if length as u64 > head::MAX_FORM => drop(self.refusals.send(http)),
            _ => refuse(http),
        }
    }
}

fn refuse(mut http: Request) {
    // tiny_http reads a body to its end, whatever the answer, into a buffer of that size.
    let _ = io::copy(http.as_reader(), &mut io::sink());
    let sentence = "the daemon has run out of threads; try again";
    send(http, Answer::Failure(Error::new(503, sentence)));
}

fn view(http: &Request) -> routes::Request {
    let header = |name| {
        let found = http.headers().iter().find(|header| header.field.equiv(name));
        found.map(|header| header.value.to_string())
    };
    let address = header(head::CLIENT_ADDRESS).unwrap_or_default();
    routes::Request {
        method: http.method().to_string(),
        target: http.url().to_owned(),
        content_type: header("Content-Type"),
        has_origin: header("Origin").is_some(),
        caller: match header(head::CLIENT_NAME) {
            Some(name) if !name.is_empty() => format!("{name} at {address}"),
            _ => address,
        },
    }
}

fn respond(mut http: Request, request: &routes::Request, node: &Node) {
    let left = http.body_length().unwrap_or(0);
    let mut body = Body { reader: http.as_reader(), left };
    let answer = catch_unwind(AssertUnwindSafe(|| routes::answer(node, request, &mut body)))
        .unwrap_or_else(|_| {
            Answer::Failure(Error::new(500, "internal error; see the log of the daemon"))
        });
    // tiny_http reads what is left of a body into a buffer of that size.
    let _ = io::copy(&mut body, &mut io::sink());
    send(http, answer);
}

/// The body of a request. To tiny_http a body that is cut short looks complete.
struct Body<'a> {
    reader: &'a mut dyn Read,
    left: usize,
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        if count == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left = self.left.saturating_sub(count);
        Ok(count)
    }
}

fn send(http: Request, answer: Answer) {
    let bytes = |bytes: Vec<u8>| (bytes.len(), Box::new(io::Cursor::new(bytes)) as Box<dyn Read>);
    let (status, body, allow) = match answer {
        Answer::Json(body) => (200, Some(bytes(body)), None),
        Answer::Stream(body) => (200, Some((body.length(), Box::new(body) as _)), None),
        Answer::NoContent => (204, None, None),
        Answer::Failure(error) => (error.status, Some(bytes(error.body().into_bytes())), None),
        Answer::MethodNotAllowed(error, allow) => {
            (error.status, Some(bytes(error.body().into_bytes())), Some(allow))
        }
    };
    let mut headers = vec![("Server", "vpn-daemon")];
    headers.extend(body.is_some().then_some(("Content-Type", "application/json")));
    headers.extend(allow.map(|methods| ("Allow", methods)));
    // The names and values above are ASCII, which is all that a header can be refused for.
    let headers = headers.iter().filter_map(|(name, value)| Header::from_bytes(*name, *value).ok());
    let (length, body) = body.unwrap_or_else(|| bytes(Vec::new()));
    // The front door needs a length, whatever the size of the answer.
    let response = Response::new(StatusCode(status), headers.collect(), body, Some(length), None)
        .with_chunked_threshold(usize::MAX);
    // An error means that the front door has dropped the client.
    let _ = http.respond(response);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use crate::{openvpn::OpenVpn, uploads::Uploads, wireguard::WireGuard};

    #[test]
    fn a_body_that_comes_slowly_is_waited_for_elsewhere() {
        let path = std::env::temp_dir().join(format!("server-{}.sock", std::process::id()));
        let node = Node {
            wireguard: WireGuard::new("wg0".parse().unwrap()),
            openvpn: OpenVpn::new("/nonexistent".into()),
            cpu_count: 1,
            uploads: Uploads::default(),
        };
        let empty = UnixListener::bind(path.with_extension("empty")).unwrap();
        let server = Server::start(empty, node, |_| {}).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        let http = tiny_http::Server::from_listener(listener, None).unwrap();
        for length in [0, 100_000] {
            let mut client = UnixStream::connect(&path).unwrap();
            write!(client, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n")
                .unwrap();
            client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let request = http.recv().unwrap();
            let (go_on, refused) = mpsc::channel();
            let late = thread::spawn(move || {
                // Much later than any refusal that does not wait for the body.
                let in_time = refused.recv_timeout(Duration::from_secs(20)).is_ok();
                client.write_all(&vec![b' '; length]).unwrap();
                let mut answer = [0; 12];
                client.read_exact(&mut answer).unwrap();
                assert!(in_time, "it waited for {length} bytes");
                answer
            });
            server.0.refuse(request);
            let _ = go_on.send(());
            assert_eq!(&late.join().unwrap(), b"HTTP/1.1 503");
        }
        server.stop();
        for path in [path.with_extension("empty"), path] {
            std::fs::remove_file(path).unwrap();
        }
    }
}
