//! tiny_http behind the front door: a few threads take its requests, others answer those that take time.

use std::io::{self, Read};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use tiny_http::{Request, Response};

use crate::api::Error;
use crate::front::{Connection, head};
use crate::lock;
use crate::logging::warn_seldom;
use crate::metrics::{self, OTHER};
use crate::routes::{self, Answer, Node};
use crate::threads::Threads;

/// Threads that take requests: a single one would have to be woken up for nearly each.
const RECEIVERS: usize = 3;

/// Serves the inner socket. `failed` is called if tiny_http ever gives up.
///
/// # Errors
/// There are no threads for it.
pub(crate) fn start(
    inner: UnixListener,
    node: Node,
    failed: impl Fn(&io::Error) + Send + Sync + 'static,
) -> io::Result<()> {
    let http = tiny_http::Server::from_listener(inner, None).map_err(io::Error::other)?;
    let node = Arc::new(node);
    let shared = Arc::clone(&node);
    let answers = Threads::new("request", move |(http, request): (Request, routes::Request)| {
        drop(respond(http, request, &shared));
    });
    let rests = Threads::new("answer", Connection::go_on);
    // Started now: when it is needed there is none to be had.
    let (refusals, refused) = mpsc::channel();
    let shared = Arc::clone(&node);
    let refuse_all = move || refused.into_iter().for_each(|http| refuse(http, &shared));
    thread::Builder::new().name("refusals".to_owned()).spawn(refuse_all)?;
    // What a thread does that takes requests: it waits for no client.
    let take = move |http: Request| {
        let request = view(&http);
        if request.is_immediate() {
            if let Some(client) = respond(http, request, &node)
                && let Err((_cut, error)) = rests.run(client)
            {
                let text = format_args!("no thread for the rest of an answer: {error}");
                warn_seldom("answer thread", text);
            }
        } else if let Err(((http, _), error)) = answers.run((http, request)) {
            warn_seldom("request thread", format_args!("no thread for a request: {error}"));
            match http.body_length() {
                // It is still coming. The front door has the whole of a shorter one already.
                Some(length) if length > head::MAX_FORM => drop(refusals.send(http)),
                _ => refuse(http, &node),
            }
        }
    };
    let receive = Arc::new(move || {
        loop {
            match http.recv() {
                // The panic is in the log; it ends one request, not the thread.
                Ok(http) => drop(catch_unwind(AssertUnwindSafe(|| take(http)))),
                Err(error) => return failed(&error),
            }
        }
    });
    for _ in 0..RECEIVERS {
        let receive = Arc::clone(&receive);
        thread::Builder::new().name("receive".to_owned()).spawn(move || receive())?;
    }
    Ok(())
}

/// The value of a header.
fn header<'a>(http: &'a Request, name: &'static str) -> Option<&'a str> {
    let found = http.headers().iter().find(|header| header.field.equiv(name));
    found.map(|header| header.value.as_str())
}

/// The number of the connection that waits for the answer; `None`: the daemon itself asks.
fn connection(http: &Request) -> Option<u64> {
    header(http, head::CONNECTION)?.parse().ok()
}

fn view(http: &Request) -> routes::Request {
    // The front door encodes these values as in a form.
    let own = |name| {
        let value = header(http, name)?.as_bytes();
        form_urlencoded::parse(value).next().map(|(value, _)| value.into_owned())
    };
    routes::Request {
        method: http.method().to_string(),
        target: http.url().to_owned(),
        content_type: header(http, "Content-Type").map(str::to_owned),
        body_length: http.body_length().unwrap_or(0),
        forbidden: own(head::FORBIDDEN),
        caller: own(head::CALLER).unwrap_or_default(),
        fields: String::new(),
    }
}

/// Does not wait for the client: the next one is refused by the same thread.
fn refuse(mut http: Request, node: &Node) {
    pass_over(http.as_reader());
    metrics::add("requests_total", &[("call", OTHER), ("status", "503")], 1.0);
    let answer = Error::new(503, "the daemon has run out of threads; try again").into();
    let _ = send(http, answer, node, false);
}

/// The client comes back if it has not taken all of an immediate answer yet.
fn respond(mut http: Request, mut request: routes::Request, node: &Node) -> Option<Connection> {
    let (started, patient) = (Instant::now(), !request.is_immediate());
    let answer = AssertUnwindSafe(|| routes::answer(node, &mut request, http.as_reader()));
    let sentence = "internal error; see the log of the daemon";
    let answer: Answer = catch_unwind(answer).unwrap_or_else(|_| Error::new(500, sentence).into());
    routes::record(&request, answer.status, started.elapsed());
    pass_over(http.as_reader());
    send(http, answer, node, patient)
}

/// Without patience, the client comes back if it has not taken all of the answer yet.
fn send(http: Request, answer: Answer, node: &Node, patient: bool) -> Option<Connection> {
    let Some(id) = connection(&http) else {
        // One of the daemon's own, which reads no more than the status.
        let _ = http.respond(Response::empty(answer.status));
        return None;
    };
    // tiny_http reads the next request, and writes nothing.
    drop(http.into_writer());
    let client = lock(&node.waiting).remove(&id)?;
    // The panic is in the log; it ends this connection, not a thread that takes requests.
    catch_unwind(AssertUnwindSafe(|| client.answer(answer, patient))).unwrap_or_default()
}

/// tiny_http would read what is left of a body into a buffer of that size.
fn pass_over(body: &mut dyn Read) {
    // An error means that the client has gone.
    let _ = io::copy(body, &mut io::sink());
}
