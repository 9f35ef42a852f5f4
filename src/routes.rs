//! One visible match on method and path: reads the parameters, calls the backends.

use std::io::{self, Read};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use log::{info, warn};

use crate::api::{self, Error};
use crate::node;
use crate::openvpn::{CommonName, OpenVpn};
use crate::uploads::{Upload, Uploads};
use crate::wireguard::{self, AllowedIp, PublicKey, Synced, Wanted, WireGuard};

/// What the backends of one request may take in all: the client waits for 4 s.
const BACKEND_BUDGET: Duration = Duration::from_millis(2500);

/// A peer is online when its last handshake is at most this old.
const ONLINE: Duration = Duration::from_secs(3 * 60);

const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";

/// The node: what requests are answered from.
pub struct Node {
    /// The WireGuard device.
    pub wireguard: WireGuard,
    /// The OpenVPN processes.
    pub openvpn: OpenVpn,
    /// CPUs that the process may run on, read at start.
    pub cpu_count: u64,
    /// Peer lists that are being read.
    pub uploads: Uploads,
}

/// A request whose head is complete and checked.
#[derive(Debug)]
pub struct Request {
    /// `GET`, `POST`, …
    pub method: String,
    /// Path and query as sent.
    pub target: String,
    /// Value of the `Content-Type` header.
    pub content_type: Option<String>,
    /// Whether there is an `Origin` header: a browser page is calling.
    pub has_origin: bool,
    /// Who asks, for the log.
    pub caller: String,
}

/// What the client is told.
#[derive(Debug)]
pub enum Answer {
    /// 200 with a JSON body.
    Json(Vec<u8>),
    /// 200 with a JSON body that may be long.
    Stream(api::Stream),
    /// 204.
    NoContent,
    /// A failure of the contract.
    Failure(Error),
    /// 405, with the value of its header `Allow`.
    MethodNotAllowed(Error, &'static str),
}

impl Request {
    fn path(&self) -> &str {
        self.target.split_once('?').map_or(self.target.as_str(), |(path, _)| path)
    }

    fn query(&self) -> Parameters {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        Parameters(form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    /// Whether the answer needs neither a body nor a backend, so that it is there at once.
    pub fn is_immediate(&self) -> bool {
        match (self.method.as_str(), self.path()) {
            ("GET" | "HEAD", "/i/node") => {
                !matches!(self.query().yes_or_no("include_client_peer_count"), Ok(true))
            }
            ("GET" | "HEAD", _) => !self.path().ends_with("_list"),
            _ => false,
        }
    }
}

/// Answers one request. `body` is read only by calls that take one; it yields at most as many
/// bytes as the front door lets through for the call.
pub fn answer(node: &Node, request: &Request, body: &mut dyn Read) -> Answer {
    if request.has_origin {
        let sentence = "the request carries an Origin header: this API is not for browser pages";
        return Answer::Failure(Error::new(403, sentence));
    }
    let deadline = Instant::now() + BACKEND_BUDGET;
    let answer = match (request.method.as_str(), request.path()) {
        ("GET" | "HEAD", "/i/node") => node_info(node, request, deadline),
        ("GET" | "HEAD", "/w/peer_list") => peer_list(node, request, deadline),
        ("GET" | "HEAD", "/o/connection_list") => connection_list(node, deadline),
        ("POST", "/w/add_peer") => add_peer(node, request, body),
        ("POST", "/w/remove_peer") => remove_peer(node, request, body),
        ("POST", "/w/sync_peers") => sync_peers(node, request, body),
        ("POST", "/o/disconnect_client") => disconnect_client(node, request, body),
        (_, "/i/node" | "/w/peer_list" | "/o/connection_list") => {
            return method_not_allowed(request, "GET, HEAD");
        }
        (_, "/w/add_peer" | "/w/remove_peer" | "/w/sync_peers" | "/o/disconnect_client") => {
            return method_not_allowed(request, "POST");
        }
        (_, path) => Err(Error::new(404, format!("there is no call {path}"))),
    };
    answer.unwrap_or_else(Answer::Failure)
}

fn method_not_allowed(request: &Request, allow: &'static str) -> Answer {
    let methods = allow.replace(", ", " or ");
    let error = Error::new(405, format!("{} takes only {methods}", request.path()));
    Answer::MethodNotAllowed(error, allow)
}

fn node_info(node: &Node, request: &Request, deadline: Instant) -> Result<Answer, Error> {
    let with_counts = request.query().yes_or_no("include_client_peer_count")?;
    let mut info = api::Node::new(node.cpu_count, node::load_average());
    if with_counts {
        // Both at once: what one of them takes is not the other's.
        let (clients, peers) = thread::scope(|scope| {
            let ask = || node.openvpn.clients(deadline);
            let clients = thread::Builder::new().spawn_scoped(scope, ask);
            let peers = node.wireguard.peers(deadline);
            (clients.map(|thread| thread.join()), peers)
        });
        match clients {
            Ok(Ok(Ok(listing))) if listing.failed.is_empty() => {
                info.o_client_count = Some(listing.clients().count());
            }
            Ok(Ok(Ok(listing))) => {
                for failure in &listing.failed {
                    warn!("no count of OpenVPN clients: {}: {}", failure.socket, failure.error);
                }
            }
            Ok(Ok(Err(error))) => warn!("no count of OpenVPN clients: {error}"),
            Ok(Err(_)) => warn!("no count of OpenVPN clients: internal error"),
            Err(error) => warn!("no count of OpenVPN clients: no thread to ask with: {error}"),
        }
        match peers {
            Ok(peers) => {
                let now = SystemTime::now();
                info.w_peer_count = Some(peers.iter().filter(|peer| online(peer, now)).count());
            }
            Err(error) => warn!("no count of WireGuard peers: {error}"),
        }
    }
    json(&info)
}

fn peer_list(node: &Node, request: &Request, deadline: Instant) -> Result<Answer, Error> {
    let show_all = request.query().yes_or_no("show_all")?;
    let peers = node.wireguard.peers(deadline)?;
    if show_all {
        return stream(api::Stream::peer_list(peers));
    }
    let now = SystemTime::now();
    stream(api::Stream::peer_list(peers.iter().filter(|peer| online(peer, now)).collect()))
}

fn add_peer(node: &Node, request: &Request, body: &mut dyn Read) -> Result<Answer, Error> {
    let form = read_form(request, body)?;
    let public_key: PublicKey = form.once("public_key")?;
    let allowed_ips: Vec<AllowedIp> = form.at_least_once("ip_net")?;
    let wireguard = node.wireguard.asked_by(&request.caller);
    wireguard.add_peer(&public_key, &allowed_ips, Instant::now() + BACKEND_BUDGET)?;
    let texts: Vec<_> = allowed_ips.iter().map(ToString::to_string).collect();
    info!(
        "peer {public_key} on {}: set to allowed IPs {}, asked by {}",
        node.wireguard.device(),
        texts.join(", "),
        request.caller
    );
    Ok(Answer::NoContent)
}

fn remove_peer(node: &Node, request: &Request, body: &mut dyn Read) -> Result<Answer, Error> {
    let form = read_form(request, body)?;
    let public_key: PublicKey = form.once("public_key")?;
    let wireguard = node.wireguard.asked_by(&request.caller);
    let removed = wireguard.remove_peer(&public_key, Instant::now() + BACKEND_BUDGET)?;
    let Some(peer) = removed else {
        return Ok(Answer::NoContent);
    };
    info!(
        "peer {public_key} on {}: removed after {} bytes in, {} bytes out, asked by {}",
        node.wireguard.device(),
        peer.rx_bytes,
        peer.tx_bytes,
        request.caller
    );
    json(&api::Peer::from(&peer))
}

fn sync_peers(node: &Node, request: &Request, body: &mut dyn Read) -> Result<Answer, Error> {
    let result = read_sync(node, request, body);
    // tiny_http would take as much memory as is left of the body.
    let _ = io::copy(body, &mut io::sink());
    let (upload, wanted, dry_run) = result?;
    let deadline = Instant::now() + BACKEND_BUDGET;
    let result = node.wireguard.asked_by(&request.caller).sync_peers(wanted, dry_run, deadline);
    drop(upload);
    match result {
        Ok(synced) => {
            if !dry_run {
                log_synced(node, request, &synced);
            }
            stream(api::Stream::synced(synced))
        }
        Err(error) => {
            let done = &error.done;
            if !(done.added.is_empty() && done.updated.is_empty() && done.removed.is_empty()) {
                log_synced(node, request, done);
            }
            Err(error.into())
        }
    }
}

/// What the caller wants, checked whole; what it takes stays counted with the upload.
fn read_sync<'a>(
    node: &'a Node,
    request: &Request,
    body: &mut dyn Read,
) -> Result<(Upload<'a>, Wanted, bool), Error> {
    require_type(request, JSON)?;
    let dry_run = request.query().yes_or_no("dry_run")?;
    let upload = node.uploads.begin();
    let wanted = api::read_wanted(body, &upload)?;
    Ok((upload, wanted, dry_run))
}

/// A line for each would be more than the journal takes, 10,000 in 30 s, and a third of the work.
const KEYS_A_LINE: usize = 20;

fn log_synced(node: &Node, request: &Request, synced: &Synced) {
    let (device, caller) = (node.wireguard.device(), &request.caller);
    for peer in synced.removed.iter() {
        info!(
            "peer {} on {device}: removed after {} bytes in, {} bytes out, asked by {caller}",
            peer.public_key, peer.rx_bytes, peer.tx_bytes
        );
    }
    for (keys, what) in [(&synced.updated, "set to other allowed IPs"), (&synced.added, "added")] {
        for keys in keys.chunks(KEYS_A_LINE) {
            let texts: Vec<_> = keys.iter().map(ToString::to_string).collect();
            let (peers, keys) = (if keys.len() == 1 { "peer" } else { "peers" }, texts.join(" "));
            info!("{peers} {keys} on {device}: {what}, asked by {caller}");
        }
    }
    info!(
        "{device}: {} peers added, {} updated, {} removed, {} left as they are, asked by {caller}",
        synced.added.len(),
        synced.updated.len(),
        synced.removed.len(),
        synced.unchanged
    );
}

fn connection_list(node: &Node, deadline: Instant) -> Result<Answer, Error> {
    json(&api::ConnectionList::from(&node.openvpn.clients(deadline)?))
}

fn disconnect_client(node: &Node, request: &Request, body: &mut dyn Read) -> Result<Answer, Error> {
    let form = read_form(request, body)?;
    let name: CommonName = form.once("common_name")?;
    let deadline = Instant::now() + BACKEND_BUDGET;
    let done = node.openvpn.disconnect(&name, &request.caller, deadline)?;
    if !done.disconnected.is_empty() {
        let counts = done.disconnected.iter().map(|(socket, count)| format!("{count} at {socket}"));
        let counts = counts.collect::<Vec<_>>().join(", ");
        info!("client {:?}: disconnected {counts}, asked by {}", name.as_str(), request.caller);
    }
    match done.failed.is_empty() {
        true => Ok(Answer::NoContent),
        false => Err(node.openvpn.failure(&done.failed).into()),
    }
}

fn online(peer: &wireguard::Peer, now: SystemTime) -> bool {
    // A handshake in the future is one from before the clock was set back.
    peer.last_handshake.is_some_and(|seen| now.duration_since(seen).unwrap_or_default() <= ONLINE)
}

fn json(value: &impl serde::Serialize) -> Result<Answer, Error> {
    match serde_json::to_vec(value) {
        Ok(body) => Ok(Answer::Json(body)),
        Err(error) => Err(Error::new(500, format!("the answer could not be written: {error}"))),
    }
}

fn stream(stream: io::Result<api::Stream>) -> Result<Answer, Error> {
    match stream {
        Ok(stream) => Ok(Answer::Stream(stream)),
        Err(error) => Err(Error::new(500, format!("the answer could not be written: {error}"))),
    }
}

fn require_type(request: &Request, expected: &str) -> Result<(), Error> {
    let media_type = request.content_type.as_deref().and_then(|value| value.split(';').next());
    let media_type = media_type.map(str::trim);
    match media_type.is_some_and(|media_type| media_type.eq_ignore_ascii_case(expected)) {
        true => Ok(()),
        false => {
            Err(Error::new(415, format!("{} takes a body of type {expected}", request.path())))
        }
    }
}

fn read_form(request: &Request, body: &mut dyn Read) -> Result<Parameters, Error> {
    require_type(request, FORM)?;
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes)
        .map_err(|error| Error::new(400, format!("the body could not be read: {error}")))?;
    Ok(Parameters(form_urlencoded::parse(&bytes).into_owned().collect()))
}

/// Names and values of a query or form, in order.
struct Parameters(Vec<(String, String)>);

impl Parameters {
    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn at_most_once(&self, name: &'static str) -> Result<Option<&str>, Error> {
        let mut values = self.all(name);
        let value = values.next();
        match values.next() {
            None => Ok(value),
            Some(_) => Err(Error::new(400, format!("`{name}` must not be repeated"))),
        }
    }

    fn yes_or_no(&self, name: &'static str) -> Result<bool, Error> {
        match self.at_most_once(name)? {
            Some("yes") => Ok(true),
            Some("no") | None => Ok(false),
            Some(_) => Err(Error::new(400, format!("`{name}` must be `yes` or `no`"))),
        }
    }

    fn once<T: Parameter>(&self, name: &'static str) -> Result<T, Error> {
        match self.at_most_once(name)? {
            Some(value) => checked(name, value),
            None => Err(Error::new(400, format!("`{name}` is missing"))),
        }
    }

    fn at_least_once<T: Parameter>(&self, name: &'static str) -> Result<Vec<T>, Error> {
        let values: Vec<T> =
            self.all(name).map(|value| checked(name, value)).collect::<Result<_, _>>()?;
        match values.is_empty() {
            false => Ok(values),
            true => Err(Error::new(400, format!("`{name}` is missing"))),
        }
    }
}

/// What a parameter may be parsed into: its error completes the sentence "`name` …".
trait Parameter: std::str::FromStr<Err: std::fmt::Display> {}
impl<T: std::str::FromStr<Err: std::fmt::Display>> Parameter for T {}

fn checked<T: Parameter>(name: &str, value: &str) -> Result<T, Error> {
    value.parse().map_err(|error| {
        let shown: String = value.chars().take(64).collect();
        Error::new(400, format!("`{name}` {error}: {shown:?}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(text: &str) -> Parameters {
        Parameters(form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    #[test]
    fn yes_or_no_is_exact() {
        for (query, expected) in [
            ("", Ok(false)),
            ("a=no", Ok(false)),
            ("a=yes", Ok(true)),
            ("b=maybe&a=yes", Ok(true)),
            ("a=YES", Err("`a` must be `yes` or `no`")),
            ("a=1", Err("`a` must be `yes` or `no`")),
            ("a=", Err("`a` must be `yes` or `no`")),
            ("a", Err("`a` must be `yes` or `no`")),
            ("a=yes&a=yes", Err("`a` must not be repeated")),
        ] {
            let result = parameters(query).yes_or_no("a");
            match expected {
                Ok(value) => assert_eq!(result, Ok(value), "{query}"),
                Err(sentence) => assert_eq!(result, Err(Error::new(400, sentence)), "{query}"),
            }
        }
    }

    #[test]
    fn errors_name_the_parameter() {
        let form = parameters("n=1&n=2&m=x");
        assert_eq!(form.once::<u8>("n").unwrap_err().sentence, "`n` must not be repeated");
        assert_eq!(form.once::<u8>("o").unwrap_err().sentence, "`o` is missing");
        assert_eq!(form.at_least_once::<u8>("o").unwrap_err().sentence, "`o` is missing");
        assert_eq!(form.at_least_once::<u8>("n").unwrap(), [1, 2]);
        let error = form.once::<u8>("m").unwrap_err();
        assert_eq!(error, Error::new(400, "`m` invalid digit found in string: \"x\""));
        let long = parameters(&format!("n={}", "x".repeat(60_000)));
        assert!(long.once::<u8>("n").unwrap_err().sentence.len() < 200);
    }

    #[test]
    fn only_answers_without_backend_or_body_are_immediate() {
        for (method, target, expected) in [
            ("GET", "/i/node", true),
            ("HEAD", "/i/node?include_client_peer_count=no", true),
            ("GET", "/i/node?include_client_peer_count=yes", false),
            ("GET", "/i/node?include_client_peer_count=maybe", true),
            ("GET", "/w/peer_list", false),
            ("GET", "/o/connection_list?x", false),
            ("POST", "/i/node", false),
            ("GET", "/nothing", true),
        ] {
            let request = Request {
                method: method.to_owned(),
                target: target.to_owned(),
                content_type: None,
                has_origin: false,
                caller: String::new(),
            };
            assert_eq!(request.is_immediate(), expected, "{method} {target}");
        }
    }
}
