//! tiny_http behind the front door: one thread takes its requests, others answer those that take time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use tiny_http::{Header, Request, Response, StatusCode};

use crate::api::Error;
use crate::front::head;
use crate::logging::warn_seldom;
use crate::metrics::{self, OTHER};
use crate::routes::{self, Answer, Node};
use crate::threads::Threads;
use crate::unix;

/// Serves the inner socket. `failed` is called if tiny_http ever gives up.
///
/// # Errors
/// There are no threads for it.
pub(crate) fn start(
    inner: UnixListener,
    node: Node,
    failed: impl FnOnce(&io::Error) + Send + 'static,
) -> io::Result<()> {
    let http = tiny_http::Server::from_listener(inner, None).map_err(io::Error::other)?;
    let node = Arc::new(node);
    let shared = Arc::clone(&node);
    let answers = Threads::new("request", move |(http, request): (Request, routes::Request)| {
        respond(http, request, &shared);
    });
    // Started now: when it is needed there is none to be had.
    let (refusals, refused) = mpsc::channel();
    let refuse_all = move || refused.into_iter().for_each(refuse);
    thread::Builder::new().name("refusals".to_owned()).spawn(refuse_all)?;
    let receive = move || loop {
        let http = match http.recv() {
            Ok(http) => http,
            Err(error) => return failed(&error),
        };
        let request = view(&http);
        if request.is_immediate() {
            respond(http, request, &node);
        } else if let Err(((http, _), error)) = answers.run((http, request)) {
            warn_seldom("request thread", format_args!("no thread for a request: {error}"));
            match http.body_length() {
                // It is still coming. The front door has the whole of a shorter one already.
                Some(length) if length > head::MAX_FORM => drop(refusals.send(http)),
                _ => refuse(http),
            }
        }
    };
    thread::Builder::new().name("receive".to_owned()).spawn(receive).map(drop)
}

/// Asks the HTTP server on the inner socket for `/i/node`.
///
/// # Errors
/// It does not answer 200 by `deadline`.
pub(crate) fn probe(socket: &Path, deadline: Instant) -> io::Result<()> {
    let mut stream = unix::Stream::connect(socket, deadline)?;
    stream.write_all(b"GET /i/node HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut status = [0; 12];
    stream.read_exact(&mut status)?;
    match &status == b"HTTP/1.1 200" {
        true => Ok(()),
        false => Err(io::Error::other("the HTTP server fails")),
    }
}

fn view(http: &Request) -> routes::Request {
    let header = |name| {
        let found = http.headers().iter().find(|header| header.field.equiv(name));
        found.map(|header| header.value.to_string())
    };
    // As the front door has written it: a form with one name.
    let own = |name| {
        let value = header(name)?;
        form_urlencoded::parse(value.as_bytes()).next().map(|(value, _)| value.into_owned())
    };
    let name = own(head::CLIENT_NAME).unwrap_or_default();
    let caller = own(head::CLIENT_ADDRESS).map(|ip| format!("asked_by={name:?} address={ip}"));
    routes::Request {
        method: http.method().to_string(),
        target: http.url().to_owned(),
        content_type: header("Content-Type"),
        body_length: http.body_length().unwrap_or(0),
        forbidden: own(head::FORBIDDEN),
        caller: caller.unwrap_or_default(),
        fields: String::new(),
    }
}

fn refuse(mut http: Request) {
    pass_over(http.as_reader());
    metrics::add("requests_total", &[("call", OTHER), ("status", "503")], 1.0);
    send(http, Error::new(503, "the daemon has run out of threads; try again").into());
}

fn respond(mut http: Request, mut request: routes::Request, node: &Node) {
    let started = Instant::now();
    let answer = AssertUnwindSafe(|| routes::answer(node, &mut request, http.as_reader()));
    let sentence = "internal error; see the log of the daemon";
    let answer: Answer = catch_unwind(answer).unwrap_or_else(|_| Error::new(500, sentence).into());
    routes::record(&request, answer.status, started.elapsed());
    pass_over(http.as_reader());
    send(http, answer);
}

/// tiny_http would read what is left of a body into a buffer of that size.
fn pass_over(body: &mut dyn Read) {
    // An error means that the client has gone.
    let _ = io::copy(body, &mut io::sink());
}

fn send(http: Request, answer: Answer) {
    let Answer { status, body, media_type, allow } = answer;
    let mut headers = vec![("Server", "vpn-daemon"), ("Cache-Control", "no-store")];
    headers.extend((!body.is_empty()).then_some(("Content-Type", media_type)));
    headers.extend(allow.map(|methods| ("Allow", methods)));
    // The names and values above are ASCII, which is all that a header can be refused for.
    let headers = headers.iter().filter_map(|(name, value)| Header::from_bytes(*name, *value).ok());
    let (length, body) = (body.len(), io::Cursor::new(body));
    // The front door needs a length, whatever the size of the answer.
    let response = Response::new(StatusCode(status), headers.collect(), body, Some(length), None)
        .with_chunked_threshold(usize::MAX);
    // An error means that the front door has dropped the client.
    let _ = http.respond(response);
}
