//! The JSON of the API, under the portal's names; and of a call that failed, status and sentence.

use std::fmt::Display;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::agent::Failure;
use crate::openvpn::SocketFailure;
use crate::wireguard::{AllowedIp, PublicKey, WantedPeer};
use crate::{openvpn, rfc3339, wireguard};

/// `GET /i/node`.
#[derive(Serialize)]
pub(crate) struct Node {
    pub(crate) cpu_count: u64,
    pub(crate) load_average: Vec<f64>,
    pub(crate) maintenance_mode: bool,
    pub(crate) node_uptime: u64,
    /// Left out when not asked for or not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) o_client_count: Option<usize>,
    pub(crate) rel_load_average: Vec<u64>,
    pub(crate) v: &'static str,
    /// Left out when not asked for or not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) w_peer_count: Option<usize>,
}

/// `GET /w/peer_list`.
#[derive(Serialize)]
pub(crate) struct PeerList<'a> {
    #[serde(serialize_with = "peers")]
    pub(crate) peer_list: &'a [&'a wireguard::Peer],
}

/// A peer in a list, and the answer to its removal.
#[derive(Serialize)]
pub(crate) struct Peer {
    bytes_in: u64,
    bytes_out: u64,
    ip_net: Vec<String>,
    last_handshake_time: Option<String>,
    public_key: String,
}

impl From<&wireguard::Peer> for Peer {
    fn from(peer: &wireguard::Peer) -> Self {
        Self {
            bytes_in: peer.rx_bytes,
            bytes_out: peer.tx_bytes,
            ip_net: peer.allowed_ips.iter().map(ToString::to_string).collect(),
            last_handshake_time: peer.last_handshake.map(rfc3339::format),
            public_key: peer.public_key.to_string(),
        }
    }
}

/// One peer after the other: a list of them all would take as much memory again.
fn peers<S: Serializer>(peers: &[&wireguard::Peer], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(peers.iter().map(|peer| Peer::from(*peer)))
}

/// `POST /w/sync_peers`.
#[derive(Serialize)]
pub(crate) struct Synced<'a> {
    pub(crate) added: Vec<String>,
    pub(crate) updated: Vec<String>,
    #[serde(serialize_with = "peers")]
    pub(crate) removed: &'a [&'a wireguard::Peer],
    pub(crate) unchanged: usize,
}

/// A connected client; `""` for an address that it does not have.
#[derive(Serialize)]
struct Connection<'a> {
    common_name: &'a str,
    ip_four: &'a str,
    ip_six: &'a str,
}

/// Writes a client as it stands in the connection list, behind others.
pub(crate) fn connection(client: &openvpn::Client, text: &mut Vec<u8>) {
    let openvpn::Client { common_name, ipv4: ip_four, ipv6: ip_six, .. } = *client;
    if !text.is_empty() {
        text.push(b',');
    }
    // Strings are always fit for JSON, and memory takes all of it.
    let _ = serde_json::to_writer(text, &Connection { common_name, ip_four, ip_six });
}

/// An OpenVPN process that could not be asked.
#[derive(Serialize)]
struct Failed<'a> {
    socket: &'a str,
    error: &'a str,
}

/// `GET /o/connection_list`, in pieces: most are what [`connection`] has written.
pub(crate) fn connection_list(listing: &openvpn::Listing) -> serde_json::Result<Vec<Arc<Vec<u8>>>> {
    let piece = |text: &str| Arc::new(text.as_bytes().to_vec());
    let (mut pieces, comma) = (vec![piece(r#"{"connection_list":["#)], piece(","));
    for clients in listing.processes.iter().filter(|clients| clients.count > 0) {
        if pieces.len() > 1 {
            pieces.push(Arc::clone(&comma));
        }
        pieces.push(Arc::clone(&clients.text));
    }
    let failed = listing.failed.iter();
    let failed = failed.map(|SocketFailure { socket, error, .. }| Failed { socket, error });
    let failed = serde_json::to_string(&failed.collect::<Vec<_>>())?;
    pieces.push(match listing.failed.is_empty() {
        true => piece("]}"),
        false => piece(&format!(r#"],"failed":{failed}}}"#)),
    });
    Ok(pieces)
}

/// Why a call failed: a status of the contract and one sentence for people.
#[derive(Debug, PartialEq, Eq)]
pub struct Error {
    /// One of the contract's.
    pub status: u16,
    /// Names the parameter, socket or device and what is wrong with it.
    pub sentence: String,
}

impl Error {
    pub(crate) fn new(status: u16, sentence: impl Into<String>) -> Self {
        Self { status, sentence: sentence.into() }
    }
}

/// `{"error":"…"}`, the body of every answer that reports a failure.
pub(crate) fn error_body(sentence: &str) -> String {
    serde_json::json!({ "error": sentence }).to_string()
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Invalid(sentence) => Self::new(400, sentence),
            Failure::Failed(sentence) => Self::new(502, sentence),
            Failure::Timeout(sentence) => Self::new(504, sentence),
        }
    }
}

/// The body of `POST /w/sync_peers`.
#[derive(Deserialize)]
#[serde(expecting = "an object with `peer_list`")]
struct SyncBody {
    peer_list: Vec<ListedPeer>,
}

/// Other fields are ignored: the peer list can be sent back as it is.
#[derive(Deserialize)]
#[serde(expecting = "an object with `public_key` and `ip_net`")]
struct ListedPeer {
    #[serde(deserialize_with = "public_key")]
    public_key: PublicKey,
    /// Without the room to grow that a `Vec` keeps: there may be a million of these.
    ip_net: Box<[IpNet]>,
}

fn public_key<'de, D: Deserializer<'de>>(from: D) -> Result<PublicKey, D::Error> {
    checked("public_key", &String::deserialize(from)?).map_err(serde::de::Error::custom)
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct IpNet(AllowedIp);

impl TryFrom<String> for IpNet {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        checked("ip_net", &text).map(Self)
    }
}

/// Reads the whole list; 400 where it is not what the call takes.
pub fn read_wanted(body: &[u8]) -> Result<Vec<WantedPeer>, Error> {
    let bad = |why: String| {
        // What is wrong may be as long as the body.
        let shown: String = why.chars().take(300).collect();
        Error::new(400, format!("the body is not as the call takes it: {shown}"))
    };
    // A derive takes a list of the fields' values as well: `[[]]` is not to remove every peer.
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(bad("a list, expected an object with `peer_list`".to_owned()));
    }
    let SyncBody { peer_list } =
        serde_json::from_slice(body).map_err(|error| bad(error.to_string()))?;
    let peers = peer_list.into_iter().map(|ListedPeer { public_key, ip_net }| WantedPeer {
        public_key,
        allowed_ips: ip_net.into_iter().map(|IpNet(allowed_ip)| allowed_ip).collect(),
    });
    Ok(peers.collect())
}

/// What the text of a parameter or field means.
///
/// # Errors
/// A sentence that names it and shows the beginning of the text.
pub(crate) fn checked<T: FromStr<Err: Display>>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|error| {
        let shown: String = text.chars().take(64).collect();
        format!("`{name}` {error}: {shown:?}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    const KEY: &str = "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=";

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn answers_are_as_in_the_contract() {
        let mut node = Node {
            cpu_count: 2,
            load_average: vec![],
            maintenance_mode: false,
            node_uptime: 3828,
            o_client_count: None,
            rel_load_average: vec![],
            v: "1.0.0",
            w_peer_count: None,
        };
        let bare = r#"{"cpu_count":2,"load_average":[],"maintenance_mode":false,"node_uptime":3828,"rel_load_average":[],"v":"1.0.0"}"#;
        assert_eq!(json(&node), bare);
        (node.load_average, node.rel_load_average) = (vec![0.55, 0.76, 0.75], vec![27, 38, 37]);
        (node.o_client_count, node.w_peer_count) = (Some(1), Some(5));
        let whole = r#"{"cpu_count":2,"load_average":[0.55,0.76,0.75],"maintenance_mode":false,"node_uptime":3828,"o_client_count":1,"rel_load_average":[27,38,37],"v":"1.0.0","w_peer_count":5}"#;
        assert_eq!(json(&node), whole);

        let peer = wireguard::Peer {
            public_key: KEY.parse().unwrap(),
            allowed_ips: ["10.43.43.2/32", "fd43::2/128"].map(|ip| ip.parse().unwrap()).to_vec(),
            last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_640_698_264)),
            rx_bytes: 19732,
            tx_bytes: 32364,
        };
        let never_seen =
            wireguard::Peer { last_handshake: None, allowed_ips: vec![], ..peer.clone() };
        let seen = format!(
            r#"{{"bytes_in":19732,"bytes_out":32364,"ip_net":["10.43.43.2/32","fd43::2/128"],"last_handshake_time":"2021-12-28T13:31:04Z","public_key":"{KEY}"}}"#
        );
        let unseen = format!(
            r#"{{"bytes_in":19732,"bytes_out":32364,"ip_net":[],"last_handshake_time":null,"public_key":"{KEY}"}}"#
        );
        let list = PeerList { peer_list: &[&peer, &never_seen] };
        assert_eq!(json(&list), format!(r#"{{"peer_list":[{seen},{unseen}]}}"#));
        let synced = Synced {
            added: vec!["a".to_owned()],
            updated: vec![],
            removed: &[&never_seen],
            unchanged: 3,
        };
        assert_eq!(
            json(&synced),
            format!(r#"{{"added":["a"],"updated":[],"removed":[{unseen}],"unchanged":3}}"#)
        );

        let of = |names: &[&str]| {
            let mut text = Vec::new();
            for common_name in names {
                let client =
                    openvpn::Client { common_name, ipv4: "10.66.21.4", ipv6: "", id: None };
                connection(&client, &mut text);
            }
            openvpn::Clients { count: names.len(), text: Arc::new(text) }
        };
        let mut list = openvpn::Listing { processes: vec![of(&[])], failed: vec![] };
        let json = |list: &_| {
            let pieces = connection_list(list).unwrap();
            pieces.iter().map(|piece| str::from_utf8(piece).unwrap()).collect::<String>()
        };
        assert_eq!(json(&list), r#"{"connection_list":[]}"#);
        list.processes.extend([of(&["\"é\"", "\"é\""]), of(&[]), of(&["\"é\""])]);
        let client = r#"{"common_name":"\"é\"","ip_four":"10.66.21.4","ip_six":""}"#;
        let clients = format!(r#""connection_list":[{client},{client},{client}]"#);
        assert_eq!(json(&list), format!("{{{clients}}}"));
        let (socket, error) = ("a.sock".to_owned(), "x".to_owned());
        list.failed.push(SocketFailure { socket, timed_out: false, error });
        let failed = r#""failed":[{"socket":"a.sock","error":"x"}]"#;
        assert_eq!(json(&list), format!("{{{clients},{failed}}}"));
        assert_eq!(error_body("`x\"y` is \\ wrong"), r#"{"error":"`x\"y` is \\ wrong"}"#);
    }

    #[test]
    fn peers_to_be() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        let number = "9".repeat(100_000);
        let list = |peer: &str| format!(r#" {{"x":1,"peer_list":[{peer}],"y":null}} "#);
        for (peer, ips) in [
            (format!(r#"{{"public_key":"{KEY}","ip_net":[]}}"#), &[][..]),
            (
                format!(
                    r#"{{"bytes_in":1,"ip_net":["10.0.0.1/32","::/0"],"last_handshake_time":null,"public_key":"{KEY}"}}"#
                ),
                &["10.0.0.1/32", "::/0"],
            ),
            (
                format!(
                    r#"{{"a":{deep},"public_key":"{KEY}","ip_net":[],"b":{number},"c":-{number}e{number}}}"#
                ),
                &[],
            ),
            // JSON may write any character of a string as an escape.
            (
                format!(r#"{{"\u0070ublic_key":"\u0030{}","ip_net":["10.0.0.0\/8"]}}"#, &KEY[1..]),
                &["10.0.0.0/8"],
            ),
        ] {
            let allowed_ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
            let wanted = WantedPeer { public_key: KEY.parse().unwrap(), allowed_ips };
            assert_eq!(read_wanted(list(&peer).as_bytes()), Ok(vec![wanted]));
        }
        assert_eq!(read_wanted(list("").as_bytes()), Ok(vec![]));
    }

    #[test]
    fn bodies_that_are_no_peer_list() {
        let long = "x".repeat(100_000);
        let peer = |key: &str, ips: &str| {
            format!(r#"{{"peer_list":[{{"public_key":"{key}","ip_net":[{ips}]}}]}}"#)
        };
        for (body, part) in [
            (String::new(), "EOF while parsing"),
            ("{".into(), "EOF while parsing"),
            ("{}".into(), "missing field `peer_list`"),
            ("[]".into(), "expected an object with `peer_list`"),
            ("[[]]".into(), "expected an object with `peer_list`"),
            (r#"{"peer_list":null}"#.into(), "expected a sequence"),
            (r#"{"peer_list":[],"peer_list":[]}"#.into(), "duplicate field `peer_list`"),
            (r#"{"peer_list":[]}{"#.into(), "trailing characters"),
            (r#"{"peer_list":[1]}"#.into(), "1`, expected an object with `public_key`"),
            (r#"{"peer_list":[],}"#.into(), "trailing comma"),
            (r#"{"peer_list":[{"ip_net":[]}]}"#.into(), "missing field `public_key`"),
            (format!(r#"{{"peer_list":[{{"public_key":"{KEY}"}}]}}"#), "missing field `ip_net`"),
            (r#"{"peer_list":[{"public_key":1,"ip_net":[]}]}"#.into(), "1`, expected a string"),
            (
                peer("abc", ""),
                "`public_key` must be 32 bytes in base64 (44 characters, the last one `=`): \"abc\" at line 1 column 33",
            ),
            (peer(&long, ""), "`public_key` must be"),
            (peer(KEY, "\"10.0.0.1\""), "`ip_net` must be an address and a prefix length"),
            (peer(KEY, &format!("\"{long}\"")), "`ip_net` must be"),
            (peer(KEY, "1"), "expected a string"),
            (format!("{{\"peer_list\":\"{long}\"}}"), "invalid type: string \"xxx"),
            ("{\"peer_list\":[],\"a\":\"\u{1}\"}".into(), "control character"),
        ] {
            let error = read_wanted(body.as_bytes()).unwrap_err();
            assert_eq!(error.status, 400, "{error:?}");
            assert!(error.sentence.contains(part), "{part}: {error:?}");
            assert!(error.sentence.len() < 400, "{error:?}");
        }
    }
}
