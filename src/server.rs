//! tiny_http behind the front door: its requests, the threads that answer them, and its end.

use std::io::{self, Read};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use log::error;
use tiny_http::{Header, Request, Response, StatusCode};

use crate::api::Error;
use crate::head;
use crate::routes::{self, Answer, Node};

/// Threads that take requests from tiny_http. They answer what needs no backend and hand the
/// rest on, so that no backend that hangs ever keeps `/i/node` waiting.
const RECEIVERS: usize = 2;

const STACK: usize = 512 * 1024;

/// The HTTP server on the inner socket.
pub struct Server {
    http: Arc<tiny_http::Server>,
    stopping: Arc<AtomicBool>,
}

impl Server {
    /// Serves the inner socket. `failed` is called if tiny_http ever gives up.
    pub fn start(
        inner: UnixListener,
        node: Node,
        failed: impl Fn(&io::Error) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let http = tiny_http::Server::from_listener(inner, None).map_err(io::Error::other)?;
        let server = Self { http: Arc::new(http), stopping: Arc::default() };
        let (node, failed) = (Arc::new(node), Arc::new(failed));
        for _ in 0..RECEIVERS {
            let (http, stopping) = (Arc::clone(&server.http), Arc::clone(&server.stopping));
            let (node, failed) = (Arc::clone(&node), Arc::clone(&failed));
            thread::Builder::new().name("receive".to_owned()).stack_size(STACK).spawn(
                move || {
                    loop {
                        match http.recv() {
                            Ok(request) => dispatch(request, &node),
                            Err(_) if stopping.load(Ordering::Acquire) => return,
                            Err(error) => return failed(&error),
                        }
                    }
                },
            )?;
        }
        Ok(server)
    }

    /// Ends the receiving threads.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::Release);
        (0..RECEIVERS).for_each(|_| self.http.unblock());
    }
}

fn dispatch(http: Request, node: &Arc<Node>) {
    let request = view(&http);
    if request.is_immediate() {
        return respond(http, &request, node);
    }
    // A closure that could not be spawned is lost, and what it owns with it.
    let handed_over = Arc::new(Mutex::new(Some(http)));
    let (taken, node) = (Arc::clone(&handed_over), Arc::clone(node));
    let work = move || {
        if let Some(http) = take(&taken) {
            respond(http, &request, &node);
        }
    };
    let spawned = thread::Builder::new().name("request".to_owned()).stack_size(STACK).spawn(work);
    if let Err(error) = spawned {
        error!("no thread for a request: {error}");
        let sentence = "the daemon has run out of threads; try again";
        if let Some(http) = take(&handed_over) {
            send(http, Answer::Failure(Error::new(503, sentence)));
        }
    }
}

fn take<T>(from: &Mutex<Option<T>>) -> Option<T> {
    from.lock().unwrap_or_else(PoisonError::into_inner).take()
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
