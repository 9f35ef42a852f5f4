//! The wire: what the portal reads, under the portal's names; errors become a status and a
//! sentence.

mod stream;
mod sync_body;

use std::fmt::Display;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Serialize, Serializer};

pub use stream::Stream;
pub use sync_body::read_wanted;

use crate::agent::{Failure, FailureKind};
use crate::node::Load;
use crate::{openvpn, rfc3339, wireguard};

/// `GET /i/node`.
#[derive(Serialize)]
pub struct Node {
    /// CPUs that the process may run on.
    pub cpu_count: u64,
    /// Over 1, 5 and 15 minutes; empty where unknown.
    pub load_average: Vec<f64>,
    /// Whether the operator has taken the node out of service.
    pub maintenance_mode: bool,
    /// Seconds since boot.
    pub node_uptime: u64,
    /// Connected OpenVPN clients; left out when not asked for or not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub o_client_count: Option<usize>,
    /// Percent of the CPUs, rounded down; empty where unknown.
    pub rel_load_average: Vec<u64>,
    /// Version of the daemon.
    pub v: &'static str,
    /// WireGuard peers that are online; left out when not asked for or not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub w_peer_count: Option<usize>,
}

impl Node {
    /// The node as it is now, without counts.
    pub fn new(cpu_count: u64, load: Option<[Load; 3]>) -> Self {
        let load = load.as_ref().map_or(&[][..], |load| load);
        Self {
            cpu_count,
            load_average: load.iter().map(|load| load.value()).collect(),
            maintenance_mode: crate::node::maintenance_mode(),
            node_uptime: crate::node::uptime(),
            o_client_count: None,
            rel_load_average: load.iter().map(|load| load.relative(cpu_count)).collect(),
            v: env!("CARGO_PKG_VERSION"),
            w_peer_count: None,
        }
    }
}

/// A WireGuard peer, in lists and as the answer to its removal.
#[derive(Serialize)]
pub struct Peer<'a> {
    bytes_in: u64,
    bytes_out: u64,
    #[serde(serialize_with = "as_texts")]
    ip_net: &'a [wireguard::AllowedIp],
    last_handshake_time: Option<String>,
    #[serde(serialize_with = "as_text")]
    public_key: &'a wireguard::PublicKey,
}

impl<'a> From<&'a wireguard::Peer<'_>> for Peer<'a> {
    fn from(peer: &'a wireguard::Peer<'_>) -> Self {
        Self {
            bytes_in: peer.rx_bytes,
            bytes_out: peer.tx_bytes,
            ip_net: &peer.allowed_ips,
            last_handshake_time: peer.last_handshake.map(rfc3339::format),
            public_key: &peer.public_key,
        }
    }
}

/// `GET /o/connection_list`.
#[derive(Serialize)]
pub(crate) struct ConnectionList<'a> {
    connection_list: Vec<Connection<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failed: Vec<FailedSocket<'a>>,
}

/// A connected OpenVPN client.
#[derive(Serialize)]
struct Connection<'a> {
    common_name: &'a str,
    #[serde(serialize_with = "as_text_or_empty")]
    ip_four: Option<Ipv4Addr>,
    #[serde(serialize_with = "as_text_or_empty")]
    ip_six: Option<Ipv6Addr>,
}

/// An OpenVPN process that could not be asked.
#[derive(Serialize)]
struct FailedSocket<'a> {
    socket: &'a str,
    error: &'a str,
}

impl<'a> From<&'a openvpn::Listing> for ConnectionList<'a> {
    fn from(listing: &'a openvpn::Listing) -> Self {
        let connection = |client: &'a openvpn::Client| Connection {
            common_name: &client.common_name,
            ip_four: client.ipv4,
            ip_six: client.ipv6,
        };
        let failed = |failure: &'a openvpn::SocketFailure| FailedSocket {
            socket: &failure.socket,
            error: &failure.error,
        };
        Self {
            connection_list: listing.clients().map(connection).collect(),
            failed: listing.failed.iter().map(failed).collect(),
        }
    }
}

/// Why a call failed: a status of the contract and one sentence for people.
#[derive(Debug, PartialEq, Eq)]
pub struct Error {
    /// HTTP status.
    pub status: u16,
    /// Names the parameter, socket or device and what is wrong with it.
    pub sentence: String,
}

impl Error {
    /// An error of the caller's or the daemon's own making.
    pub fn new(status: u16, sentence: impl Into<String>) -> Self {
        Self { status, sentence: sentence.into() }
    }

    /// The body of the answer: `{"error":"…"}`.
    pub fn body(&self) -> String {
        error_body(&self.sentence)
    }
}

/// `{"error":"…"}`, the body of every answer that reports a failure.
pub fn error_body(sentence: &str) -> String {
    serde_json::json!({ "error": sentence }).to_string()
}

impl From<wireguard::Error> for Error {
    fn from(error: wireguard::Error) -> Self {
        Self::new(status(&error), error.to_string())
    }
}

fn status(error: &wireguard::Error) -> u16 {
    match error {
        wireguard::Error::OwnKey(..) => 400,
        error if error.is_timeout() => 504,
        _ => 502,
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let status = match failure.kind {
            FailureKind::Invalid => 400,
            FailureKind::Failed => 502,
            FailureKind::Timeout => 504,
        };
        Self::new(status, failure.sentence)
    }
}

impl From<wireguard::SyncError> for Error {
    fn from(error: wireguard::SyncError) -> Self {
        Self::new(status(&error.cause), error.to_string())
    }
}

fn as_text<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn as_text_or_empty<S: Serializer>(
    value: &Option<impl Display>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.collect_str(value),
        None => serializer.serialize_str(""),
    }
}

fn as_texts<S: Serializer>(values: &[impl Display], serializer: S) -> Result<S::Ok, S::Error> {
    struct Text<'a, T>(&'a T);
    impl<T: Display> Serialize for Text<'_, T> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_str(self.0)
        }
    }
    serializer.collect_seq(values.iter().map(Text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    fn json(value: &impl Serialize) -> String {
        serde_json::to_string(value).unwrap()
    }

    #[test]
    fn a_peer_is_as_in_the_contract() {
        let peer = wireguard::Peer {
            public_key: "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=".parse().unwrap(),
            allowed_ips: ["10.43.43.2/32", "fd43::2/128"]
                .map(|ip| ip.parse().unwrap())
                .to_vec()
                .into(),
            last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_640_698_264)),
            rx_bytes: 19732,
            tx_bytes: 32364,
        };
        assert_eq!(
            json(&Peer::from(&peer)),
            r#"{"bytes_in":19732,"bytes_out":32364,"ip_net":["10.43.43.2/32","fd43::2/128"],"last_handshake_time":"2021-12-28T13:31:04Z","public_key":"0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ="}"#
        );
        let never_seen =
            wireguard::Peer { last_handshake: None, allowed_ips: vec![].into(), ..peer };
        let text = json(&Peer::from(&never_seen));
        assert!(text.contains(r#""ip_net":[],"last_handshake_time":null,"#), "{text}");
    }

    #[test]
    fn a_node_without_load_has_empty_lists() {
        let mut node = Node::new(2, None);
        (node.maintenance_mode, node.node_uptime, node.v) = (false, 3828, "1.0.0");
        let bare = r#"{"cpu_count":2,"load_average":[],"maintenance_mode":false,"node_uptime":3828,"rel_load_average":[],"v":"1.0.0"}"#;
        assert_eq!(json(&node), bare);
        (node.load_average, node.rel_load_average) = (vec![0.55, 0.76, 0.75], vec![27, 38, 37]);
        (node.o_client_count, node.w_peer_count) = (Some(1), Some(5));
        assert_eq!(
            json(&node),
            r#"{"cpu_count":2,"load_average":[0.55,0.76,0.75],"maintenance_mode":false,"node_uptime":3828,"o_client_count":1,"rel_load_average":[27,38,37],"v":"1.0.0","w_peer_count":5}"#
        );
    }

    #[test]
    fn an_error_is_one_sentence_in_json() {
        assert_eq!(error_body("`x\"y` is \\ wrong"), r#"{"error":"`x\"y` is \\ wrong"}"#);
    }
}
