//! Whatever the body of a peer sync says: it is taken or refused as a slow reader of its JSON has it,
//! what is taken is the same when it is written and read again, and a list that contradicts itself is
//! refused.
#![no_main]

use std::collections::BTreeSet;
use std::fmt;

use libfuzzer_sys::fuzz_target;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use vpn_daemon::api::read_wanted;
use vpn_daemon::wireguard::{WantedPeer, sync};

/// JSON with repeated names still in it, which `serde_json::Value` loses.
#[derive(Deserialize)]
#[serde(untagged)]
enum Json {
    Object(Fields),
    List(Vec<Json>),
    Text(String),
    Other(IgnoredAny),
}

struct Fields(Vec<(String, Json)>);

fuzz_target!(|body: &[u8]| {
    let read = read_wanted(body);
    match serde_json::from_slice(body) {
        Ok(json) => assert_eq!(read.as_ref().ok(), wanted(&json).as_ref()),
        // What is passed over is not looked at so closely.
        Err(error) if read.is_ok() => assert!(
            [
                "number out of range",
                "recursion limit",
                "surrogate",
                "hex escape",
                "unicode code point"
            ]
            .iter()
            .any(|reason| error.to_string().contains(reason)),
            "{error}"
        ),
        Err(_) => {}
    }
    match read {
        Ok(mut peers) => {
            assert_eq!(read_wanted(&written(&peers)), Ok(peers.clone()));
            let consistent = is_consistent(&peers);
            assert_eq!(sync::check(&mut peers).is_ok(), consistent);
            assert!(!consistent || peers.iter().all(|peer| peer.allowed_ips.is_sorted()));
        }
        Err(error) => {
            assert_eq!(error.status, 400);
            assert!(error.sentence.chars().count() < 400, "{}", error.sentence);
        }
    }
});

/// The peers of `{"peer_list":[{"public_key":…,"ip_net":[…]},…]}`.
fn wanted(json: &Json) -> Option<Vec<WantedPeer>> {
    let Json::Object(_) = json else { return None };
    list(field(json, "peer_list", 0)?)?.iter().map(peer).collect()
}

fn peer(json: &Json) -> Option<WantedPeer> {
    let key = common::public_key(text(field(json, "public_key", 0)?)?)?;
    let ips = list(field(json, "ip_net", 1)?)?.iter();
    let ips: Option<Vec<_>> = ips.map(|ip| common::allowed_ip(text(ip)?)).collect();
    let allowed_ips = ips?.iter().map(|ip| ip.parse().unwrap()).collect();
    Some(WantedPeer { public_key: key.into(), allowed_ips })
}

/// The one field of that name. A peer may also be the list of the values of its two fields.
fn field<'a>(json: &'a Json, name: &str, place: usize) -> Option<&'a Json> {
    let fields = match json {
        Json::Object(Fields(fields)) => fields,
        Json::List(values) if values.len() == 2 => return values.get(place),
        _ => return None,
    };
    let mut found = fields.iter().filter(|(field, _)| field == name);
    found.next().filter(|_| found.next().is_none()).map(|(_, value)| value)
}

fn list(json: &Json) -> Option<&[Json]> {
    if let Json::List(list) = json { Some(list) } else { None }
}

fn text(json: &Json) -> Option<&str> {
    if let Json::Text(text) = json { Some(text) } else { None }
}

fn written(peers: &[WantedPeer]) -> Vec<u8> {
    let peer = |WantedPeer { public_key, allowed_ips }: &WantedPeer| {
        let ips: Vec<_> = allowed_ips.iter().map(ToString::to_string).collect();
        serde_json::json!({ "ip_net": ips, "bytes_in": 1, "public_key": public_key.to_string() })
    };
    let peers: Vec<_> = peers.iter().map(peer).collect();
    serde_json::json!({ "peer_list": peers }).to_string().into()
}

/// Whether no key and no allowed IP belongs to two.
fn is_consistent(peers: &[WantedPeer]) -> bool {
    let sets = peers.iter().map(|peer| peer.allowed_ips.iter().collect::<BTreeSet<_>>());
    let (mut keys, mut ips) = (BTreeSet::new(), BTreeSet::new());
    peers.iter().all(|peer| keys.insert(peer.public_key)) && sets.flatten().all(|ip| ips.insert(ip))
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Fields;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        from.deserialize_map(Map)
    }
}
