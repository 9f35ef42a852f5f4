//! One visible match on method and path: reads the parameters, calls the backends.

use std::fmt::Display;
use std::io::{self, Read};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use log::info;

use crate::agent::Failure;
use crate::api::{self, Error};
use crate::front::Waiting;
use crate::logging::{AUDIT, warn_seldom};
use crate::metrics::{self, OTHER};
use crate::node;
use crate::openvpn::{CommonName, OpenVpn};
use crate::tls::Tls;
use crate::wireguard::{self, AllowedIp, PublicKey, WireGuard};

/// What the backends of one request may take in all: the client waits for 4 s.
const BACKEND_BUDGET: Duration = Duration::from_millis(2500);
/// A peer is online when its last handshake is at most this old.
const ONLINE: Duration = Duration::from_secs(3 * 60);
/// Bytes of peer lists that may be in memory at a time: two of the longest.
const MAX_LISTS: usize = 64 << 20;
/// Most allowed IPs of a change, and characters of an error, in the log: journald cuts at 48 KiB.
const MAX_LOGGED: usize = 800;

const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the calls need of the node.
pub(crate) struct Node {
    pub(crate) wireguard: WireGuard,
    pub(crate) openvpn: OpenVpn,
    /// CPUs that the process may run on, read at start.
    pub(crate) cpu_count: u64,
    /// Bytes of the peer lists that are arriving or being applied.
    pub(crate) lists: AtomicUsize,
    pub(crate) tls: Option<Arc<Tls>>,
    /// Whether there is the call `/metrics`.
    pub(crate) metrics: bool,
    /// The clients that wait for an answer.
    pub(crate) waiting: Arc<Waiting>,
}

/// A request whose head is complete and checked.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path and query as sent.
    pub(crate) target: String,
    pub(crate) content_type: Option<String>,
    /// Bytes of the body; one that is cut short ends early.
    pub(crate) body_length: usize,
    /// Why the answer is to be 403, where it is.
    pub(crate) forbidden: Option<String>,
    /// Who asks, for the log: `asked_by="COMMON NAME" address=ADDRESS`. Empty: the daemon itself.
    pub(crate) caller: String,
    /// What the log says of a change, as it becomes known: ` NAME=VALUE` each. Text that others
    /// have chosen goes through `{:?}`: it quotes, and escapes whatever ends the quotes, is not
    /// printable or turns the direction of writing.
    pub(crate) fields: String,
}

/// What the client is told.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// In pieces, which answers may share; empty where the status is 204.
    pub(crate) body: Vec<Arc<Vec<u8>>>,
    pub(crate) media_type: &'static str,
    /// The methods that a call takes, where the status is 405.
    pub(crate) allow: Option<&'static str>,
}

impl From<Error> for Answer {
    fn from(error: Error) -> Self {
        let body = api::error_body(&error.sentence).into_bytes();
        Self { status: error.status, ..ok(vec![Arc::new(body)]) }
    }
}

impl Request {
    fn path(&self) -> &str {
        self.target.split_once('?').map_or(self.target.as_str(), |(path, _)| path)
    }

    fn query(&self) -> Parameters {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        Parameters::parse(query.as_bytes())
    }

    /// Whether the answer is there at once: it asks no backend.
    pub(crate) fn is_immediate(&self) -> bool {
        self.target == "/i/node"
    }
}

/// Answers one request. `body` is read only by calls that take one; it yields at most as many
/// bytes as the front door lets through for the call.
pub(crate) fn answer(node: &Node, request: &mut Request, body: &mut dyn Read) -> Answer {
    let (methods, call): (_, Call) = match request.path() {
        "/i/node" => ("GET, HEAD", node_info),
        "/metrics" if node.metrics => ("GET, HEAD", figures),
        "/w/peer_list" => ("GET, HEAD", peer_list),
        "/w/add_peer" => ("POST", add_peer),
        "/w/remove_peer" => ("POST", remove_peer),
        "/w/sync_peers" => ("POST", sync_peers),
        "/o/connection_list" => ("GET, HEAD", connection_list),
        "/o/disconnect_client" => ("POST", disconnect),
        path => return Error::new(404, format!("there is no call {path}")).into(),
    };
    if !methods.split(", ").any(|method| method == request.method) {
        let sentence = format!("{} takes only {}", request.path(), methods.replace(", ", " or "));
        return Answer { allow: Some(methods), ..Error::new(405, sentence).into() };
    }
    let answer = match request.forbidden.take() {
        Some(sentence) => Err(Error::new(403, sentence)),
        None => call(node, request, body),
    };
    answer.unwrap_or_else(|error| {
        let shown: String = error.sentence.chars().take(MAX_LOGGED).collect();
        request.fields += &format!(" error={shown:?}");
        error.into()
    })
}

/// Counts the answer to a client, and writes the one line for a change, whatever became of it.
pub(crate) fn record(request: &Request, status: u16, time: Duration) {
    let Request { method, caller, fields, .. } = request;
    if caller.is_empty() {
        return;
    }
    let (call, ms) = (request.path(), time.as_millis());
    // An unknown path can be anything, and a label has few values.
    metrics::answered(if status == 404 { OTHER } else { call }, status, time);
    if method == "POST" && !matches!(status, 404 | 405) {
        let action = call.rsplit('/').next().unwrap_or_default();
        info!(target: AUDIT, "audit action={action}{fields} {caller} result={status} ms={ms}");
    }
}

type Call = fn(&Node, &mut Request, &mut dyn Read) -> Result<Answer, Error>;

/// When the backends have to be done that are asked now.
fn deadline() -> Instant {
    Instant::now() + BACKEND_BUDGET
}

fn node_info(node: &Node, request: &mut Request, _: &mut dyn Read) -> Result<Answer, Error> {
    let with_counts = request.query().yes_or_no("include_client_peer_count")?;
    let load = node::load_average();
    let mut info = api::Node {
        cpu_count: node.cpu_count,
        load_average: load.iter().map(|load| f64::from(*load) / 100.0).collect(),
        maintenance_mode: node::maintenance_mode(),
        node_uptime: node::uptime(),
        o_client_count: None,
        rel_load_average: load.iter().map(|load| u64::from(*load) / node.cpu_count).collect(),
        v: env!("CARGO_PKG_VERSION"),
        w_peer_count: None,
    };
    if with_counts {
        let (clients, peers) = both(node, deadline(), |deadline| count_clients(node, deadline));
        let now = SystemTime::now();
        let online = |peer: &&_| is_online(peer, now);
        info.o_client_count = clients;
        info.w_peer_count = peers.map(|peers| peers.iter().filter(online).count());
    }
    json(&info)
}

/// Asks both backends at once, each until the deadline. The call does not fail with one of them: what
/// cannot be had is `None`, and the log says why.
pub(crate) fn both<A>(
    node: &Node,
    deadline: Instant,
    openvpn: impl FnOnce(Instant) -> Result<A, Failure>,
) -> (Option<A>, Option<Arc<Vec<wireguard::Peer>>>) {
    fn known<T>(of_what: &str, list: Result<T, Failure>) -> Option<T> {
        let log = |why: &_| warn_seldom(of_what, format_args!("no count of {of_what}: {why}"));
        list.inspect_err(log).ok()
    }
    let peers = node.wireguard.begin_list(deadline);
    let clients = known("OpenVPN clients", openvpn(deadline));
    (clients, known("WireGuard peers", peers.and_then(|answer| answer.wait(deadline))))
}

fn figures(node: &Node, _: &mut Request, _: &mut dyn Read) -> Result<Answer, Error> {
    let body = metrics::text(node, deadline()).into_bytes();
    Ok(Answer { media_type: TEXT, ..ok(vec![Arc::new(body)]) })
}

fn count_clients(node: &Node, deadline: Instant) -> Result<usize, Failure> {
    let listing = node.openvpn.clients(deadline)?;
    match listing.failed.as_slice() {
        [] => Ok(listing.processes.iter().map(|clients| clients.count).sum()),
        failed => Err(node.openvpn.failure(failed)),
    }
}

fn peer_list(node: &Node, request: &mut Request, _: &mut dyn Read) -> Result<Answer, Error> {
    let show_all = request.query().yes_or_no("show_all")?;
    let (peers, now) = (node.wireguard.peers(deadline())?, SystemTime::now());
    let listed: Vec<_> = peers.iter().filter(|peer| show_all || is_online(peer, now)).collect();
    json(&api::PeerList { peer_list: &listed })
}

fn add_peer(node: &Node, request: &mut Request, body: &mut dyn Read) -> Result<Answer, Error> {
    let form = read_form(request, body)?;
    let public_key: PublicKey = form.once("public_key")?;
    request.fields += &format!(" peer={public_key}");
    let allowed_ips: Vec<AllowedIp> = form.at_least_once("ip_net")?;
    let shown: Vec<_> = allowed_ips.iter().take(MAX_LOGGED).map(ToString::to_string).collect();
    let (shown, count) = (shown.join(","), allowed_ips.len());
    request.fields += &format!(" allowed_ips={shown} count={count}");
    node.wireguard.add_peer(public_key, allowed_ips, &request.caller, deadline())?;
    Ok(NO_CONTENT)
}

fn remove_peer(node: &Node, request: &mut Request, body: &mut dyn Read) -> Result<Answer, Error> {
    let form = read_form(request, body)?;
    let public_key: PublicKey = form.once("public_key")?;
    request.fields += &format!(" peer={public_key}");
    match node.wireguard.remove_peer(public_key, &request.caller, deadline())? {
        Some(peer) => {
            request.fields += &format!(" bytes_in={} bytes_out={}", peer.rx_bytes, peer.tx_bytes);
            json(&api::Peer::from(&peer))
        }
        None => Ok(NO_CONTENT),
    }
}

fn sync_peers(node: &Node, request: &mut Request, body: &mut dyn Read) -> Result<Answer, Error> {
    require_type(request, JSON)?;
    let dry_run = request.query().yes_or_no("dry_run")?;
    request.fields += if dry_run { " dry_run=yes" } else { " dry_run=no" };
    let mut room = Room { all: &node.lists, taken: 0 };
    let wanted = api::read_wanted(&read_list(request, body, &mut room)?)?;
    let synced = node.wireguard.sync_peers(wanted, dry_run, &request.caller, deadline())?;
    let wireguard::Synced { added, updated, removed, unchanged } = &synced;
    let [new, set, gone] = [added.len(), updated.len(), removed.len()];
    request.fields += &format!(" added={new} updated={set} removed={gone} unchanged={unchanged}");
    json(&api::Synced {
        added: added.iter().map(ToString::to_string).collect(),
        updated: updated.iter().map(ToString::to_string).collect(),
        removed: &removed.iter().collect::<Vec<_>>(),
        unchanged: *unchanged,
    })
}

/// Bytes of a peer list, counted for as long as it is there.
struct Room<'a> {
    all: &'a AtomicUsize,
    taken: usize,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.taken, Ordering::Relaxed);
    }
}

/// Reads a peer list; 503 where others take all the room there is.
fn read_list(request: &Request, body: &mut dyn Read, room: &mut Room) -> Result<Vec<u8>, Error> {
    let (mut text, mut piece) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        let count = body.read(&mut piece).map_err(unreadable)?;
        if count == 0 {
            return whole(request, text);
        }
        room.taken += count;
        if room.all.fetch_add(count, Ordering::Relaxed) + count > MAX_LISTS {
            // Given back before the text is freed: that takes a while, and others would be refused.
            *room = Room { all: room.all, taken: 0 };
            return Err(Error::new(503, "too many peer lists are being read; try again"));
        }
        text.extend_from_slice(&piece[..count]);
    }
}

fn connection_list(node: &Node, _: &mut Request, _: &mut dyn Read) -> Result<Answer, Error> {
    api::connection_list(&node.openvpn.clients(deadline())?).map(ok).map_err(unwritable)
}

fn disconnect(node: &Node, request: &mut Request, body: &mut dyn Read) -> Result<Answer, Error> {
    let form = read_form(request, body)?;
    let name: CommonName = form.once("common_name")?;
    request.fields += &format!(" common_name={:?}", name.as_str());
    let done = node.openvpn.disconnect(&name, &request.caller, deadline())?;
    for (socket, count) in &done.disconnected {
        request.fields += &format!(" socket={socket:?} disconnected={count}");
    }
    match done.failed.is_empty() {
        true => Ok(NO_CONTENT),
        false => Err(node.openvpn.failure(&done.failed).into()),
    }
}

pub(crate) fn is_online(peer: &wireguard::Peer, now: SystemTime) -> bool {
    // A handshake in the future was before the clock was set back: the peer counts as online.
    peer.last_handshake.is_some_and(|seen| now.duration_since(seen).unwrap_or_default() <= ONLINE)
}

const NO_CONTENT: Answer = Answer { status: 204, body: Vec::new(), media_type: JSON, allow: None };

fn json(value: &impl serde::Serialize) -> Result<Answer, Error> {
    serde_json::to_vec(value).map(|body| ok(vec![Arc::new(body)])).map_err(unwritable)
}

fn unwritable(error: serde_json::Error) -> Error {
    Error::new(500, format!("the answer could not be written: {error}"))
}

fn ok(body: Vec<Arc<Vec<u8>>>) -> Answer {
    Answer { status: 200, body, media_type: JSON, allow: None }
}

fn require_type(request: &Request, expected: &str) -> Result<(), Error> {
    let media_type = request.content_type.as_deref().and_then(|value| value.split(';').next());
    if !media_type.is_some_and(|sent| sent.trim().eq_ignore_ascii_case(expected)) {
        return Err(Error::new(415, format!("{} takes a body of type {expected}", request.path())));
    }
    Ok(())
}

fn read_form(request: &Request, body: &mut dyn Read) -> Result<Parameters, Error> {
    require_type(request, FORM)?;
    let mut bytes = Vec::new();
    body.read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(Parameters::parse(&whole(request, bytes)?))
}

fn whole(request: &Request, body: Vec<u8>) -> Result<Vec<u8>, Error> {
    match body.len() < request.body_length {
        true => Err(unreadable(io::ErrorKind::UnexpectedEof.into())),
        false => Ok(body),
    }
}

fn unreadable(error: io::Error) -> Error {
    bad(format!("the body could not be read: {error}"))
}

/// Names and values of a query or form, in order.
pub struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Whatever it is: nothing is malformed, and U+FFFD stands for what is not UTF-8.
    pub fn parse(text: &[u8]) -> Self {
        Self(form_urlencoded::parse(text).into_owned().collect())
    }

    fn values(&self, name: &str) -> Vec<&str> {
        self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str()).collect()
    }

    /// `no` where it is missing.
    pub fn yes_or_no(&self, name: &str) -> Result<bool, Error> {
        match self.values(name)[..] {
            [] | ["no"] => Ok(false),
            ["yes"] => Ok(true),
            [_] => Err(bad(format!("`{name}` must be `yes` or `no`"))),
            _ => Err(bad(format!("`{name}` must not be repeated"))),
        }
    }

    /// The one value of that name.
    pub fn once<T: FromStr<Err: Display>>(&self, name: &str) -> Result<T, Error> {
        match self.values(name)[..] {
            [] => Err(bad(format!("`{name}` is missing"))),
            [value] => api::checked(name, value).map_err(bad),
            _ => Err(bad(format!("`{name}` must not be repeated"))),
        }
    }

    /// All values of that name, in order.
    pub fn at_least_once<T: FromStr<Err: Display>>(&self, name: &str) -> Result<Vec<T>, Error> {
        let values = self.values(name);
        if values.is_empty() {
            return Err(bad(format!("`{name}` is missing")));
        }
        values.into_iter().map(|value| api::checked(name, value).map_err(bad)).collect()
    }
}

fn bad(sentence: String) -> Error {
    Error::new(400, sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(text: &str) -> Parameters {
        Parameters(form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    #[test]
    fn online_is_who_has_shaken_hands_in_the_last_three_minutes() {
        let now = SystemTime::now();
        let mut peer = wireguard::Peer {
            public_key: [1; 32].into(),
            allowed_ips: Vec::new(),
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        assert!(!is_online(&peer, now));
        for (seconds, online) in [(-60, true), (0, true), (180, true), (181, false), (9999, false)]
        {
            let ago = Duration::from_secs(i64::unsigned_abs(seconds));
            peer.last_handshake = Some(if seconds < 0 { now + ago } else { now - ago });
            assert_eq!(is_online(&peer, now), online, "{seconds} s ago");
        }
    }

    fn request(body_length: usize) -> Request {
        Request {
            method: "POST".to_owned(),
            target: "/x".to_owned(),
            content_type: Some(FORM.to_owned()),
            body_length,
            forbidden: None,
            caller: String::new(),
            fields: String::new(),
        }
    }

    #[test]
    fn a_body_that_is_cut_short_is_none() {
        let mut room = Room { all: &AtomicUsize::new(0), taken: 0 };
        for (sent, whole) in [("a=1", true), ("a=", false), ("", false)] {
            assert_eq!(read_form(&request(3), &mut sent.as_bytes()).is_ok(), whole, "{sent}");
            let list = read_list(&request(3), &mut sent.as_bytes(), &mut room);
            assert_eq!(list.is_ok(), whole, "{sent}");
        }
    }

    #[test]
    fn two_of_the_longest_lists_have_room() {
        let all = AtomicUsize::new(MAX_LISTS - 3);
        for (body, status) in [("123", None), ("1234", Some(503)), ("123", None)] {
            let mut room = Room { all: &all, taken: 0 };
            let list = read_list(&request(body.len()), &mut body.as_bytes(), &mut room);
            assert_eq!(list.err().map(|error| error.status), status, "{body}");
        }
        assert_eq!(all.into_inner(), MAX_LISTS - 3);
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
}
