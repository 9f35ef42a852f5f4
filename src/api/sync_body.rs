//! The body of `POST /w/sync_peers`, read as it arrives into a compact list.
//!
//! Nothing is kept but keys and allowed IPs. Other fields are skipped, however deep or long.

use std::fmt;
use std::io::{BufReader, Read};
use std::marker::PhantomData;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::Error;
use crate::uploads::Upload;
use crate::wireguard::{AllowedIp, PublicKey, Wanted};

const PIECE: usize = 32 * 1024;

/// Characters of what is wrong that a sentence shows.
const SHOWN: usize = 64;

/// Reads and checks the whole list: 400 where it is not what the call takes, 503 where it had to
/// make room for others.
pub fn read_wanted(body: &mut dyn Read, upload: &Upload) -> Result<Wanted, Error> {
    let mut json = serde_json::Deserializer::from_reader(BufReader::with_capacity(
        PIECE,
        upload.metered(body),
    ));
    let read = Body(upload).deserialize(&mut json).and_then(|()| json.end());
    drop(json);
    let Some(list) = upload.finish() else {
        let sentence = "too many peer lists are being read at a time; try again";
        return Err(Error::new(503, sentence));
    };
    if let Err(error) = read {
        let what = if error.is_io() { "could not be read" } else { "is not as the call takes it" };
        return Err(Error::new(400, format!("the body {what}: {}", Short::of(&error))));
    }
    list.build().map_err(|conflict| Error::new(400, conflict.to_string()))
}

/// The beginning of a text, whose end may be as long as the body.
struct Short(String);

impl Short {
    const LIMIT: usize = 300;

    fn of(text: &impl fmt::Display) -> String {
        let mut short = Self(String::new());
        // The error says that the limit is reached.
        let _ = fmt::write(&mut short, format_args!("{text}"));
        short.0
    }
}

impl fmt::Write for Short {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let left = Self::LIMIT.saturating_sub(self.0.len());
        let end = text.char_indices().map(|(start, c)| start + c.len_utf8());
        let end = end.take_while(|end| *end <= left).last().unwrap_or(0);
        self.0.push_str(text.get(..end).unwrap_or_default());
        if end == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum BodyField {
    PeerList,
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "snake_case")]
enum PeerField {
    PublicKey,
    IpNet,
    #[serde(other)]
    Other,
}

/// The whole body.
struct Body<'a>(&'a Upload<'a>);
/// What `peer_list` holds.
struct PeerList<'a>(&'a Upload<'a>);
/// A peer.
struct Peer<'a>(&'a Upload<'a>);
/// What `ip_net` holds.
struct IpNet<'a>(&'a Upload<'a>);
/// A string that is a `T`.
struct Text<T>(&'static str, PhantomData<T>);

impl<'de> DeserializeSeed<'de> for Body<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}
impl<'de> Visitor<'de> for Body<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `peer_list`")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut is_there = false;
        while let Some(field) = map.next_key()? {
            match field {
                BodyField::PeerList if is_there => {
                    return Err(A::Error::custom("`peer_list` must not be repeated"));
                }
                BodyField::PeerList => {
                    is_there = true;
                    map.next_value_seed(PeerList(self.0))?;
                }
                BodyField::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        if is_there { Ok(()) } else { Err(A::Error::custom("`peer_list` is missing")) }
    }
}

impl<'de> DeserializeSeed<'de> for PeerList<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}
impl<'de> Visitor<'de> for PeerList<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of peers in `peer_list`")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Peer(self.0))?.is_some() {}
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Peer<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}
impl<'de> Visitor<'de> for Peer<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a peer, an object with `public_key` and `ip_net`")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut public_key, mut has_ip_net) = (None, false);
        while let Some(field) = map.next_key()? {
            match field {
                PeerField::PublicKey if public_key.is_some() => {
                    return Err(A::Error::custom("`public_key` must not be repeated in a peer"));
                }
                PeerField::PublicKey => {
                    public_key = Some(map.next_value_seed(Text("public_key", PhantomData))?);
                }
                PeerField::IpNet if has_ip_net => {
                    return Err(A::Error::custom("`ip_net` must not be repeated in a peer"));
                }
                PeerField::IpNet => {
                    has_ip_net = true;
                    map.next_value_seed(IpNet(self.0))?;
                }
                PeerField::Other => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        let key: PublicKey =
            public_key.ok_or_else(|| A::Error::custom("`public_key` is missing in a peer"))?;
        if !has_ip_net {
            return Err(A::Error::custom(format!("`ip_net` is missing in the peer {key}")));
        }
        self.0.peer(key);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for IpNet<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}
impl<'de> Visitor<'de> for IpNet<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of addresses with prefix length in `ip_net`")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(ip) = list.next_element_seed(Text::<AllowedIp>("ip_net", PhantomData))? {
            self.0.allowed_ip(ip);
        }
        Ok(())
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> DeserializeSeed<'de> for Text<T> {
    type Value = T;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}
impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for Text<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a string in `{}`", self.0)
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(|error| {
            let shown: String = text.chars().take(SHOWN).collect();
            E::custom(format!("`{}` {error}: {shown:?}", self.0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uploads::Uploads;

    const KEY: &str = "0WFDZZRTFxbDjJRqZFuPabfh0pv6ZL9aG7i3Q47QXkQ=";
    const OTHER: &str = "YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkLN0E=";

    fn read(body: &str) -> Result<Wanted, Error> {
        let uploads = Uploads::default();
        read_wanted(&mut body.as_bytes(), &uploads.begin())
    }

    #[test]
    fn good() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        let number = "9".repeat(100_000);
        for (body, has_peer) in [
            (r#"{"peer_list":[]}"#.to_owned(), false),
            (
                format!(
                    r#" {{"x":1,"peer_list":[{{"public_key":"{KEY}","ip_net":[]}}],"y":null}} "#
                ),
                true,
            ),
            (
                format!(
                    r#"{{"peer_list":[{{"bytes_in":1,"bytes_out":2,"ip_net":["10.0.0.1/32","10.0.0.1/32"],"last_handshake_time":null,"public_key":"{KEY}"}}]}}"#
                ),
                true,
            ),
            (
                format!(
                    r#"{{"peer_list":[{{"a":{deep},"public_key":"{KEY}","ip_net":["::/0"],"b":{number},"c":-{number}e{number}}}]}}"#
                ),
                true,
            ),
            // JSON may write any character of a string as an escape.
            (
                format!(
                    r#"{{"\u0070eer_list":[{{"public_key":"\u0030{}","ip_net":["10.0.0.0\/8"]}}]}}"#,
                    &KEY[1..]
                ),
                true,
            ),
        ] {
            let list = read(&body).unwrap();
            assert_eq!(list.contains(&KEY.parse().unwrap()), has_peer);
            assert!(!list.contains(&OTHER.parse().unwrap()));
        }
    }

    #[test]
    fn bad() {
        let long = "x".repeat(100_000);
        let peer = |key: &str, ips: &str| format!(r#"{{"public_key":"{key}","ip_net":[{ips}]}}"#);
        let list = |peers: &[String]| format!(r#"{{"peer_list":[{}]}}"#, peers.join(","));
        for (body, part) in [
            (String::new(), "EOF while parsing"),
            ("{".into(), "EOF while parsing"),
            ("{}".into(), "`peer_list` is missing"),
            ("[]".into(), "expected an object with `peer_list`"),
            (r#"{"peer_list":null}"#.into(), "expected a list of peers in `peer_list`"),
            (r#"{"peer_list":{}}"#.into(), "expected a list of peers in `peer_list`"),
            (r#"{"peer_list":[],"peer_list":[]}"#.into(), "`peer_list` must not be repeated"),
            (r#"{"peer_list":[]}{"#.into(), "trailing characters"),
            (r#"{"peer_list":[1]}"#.into(), "expected a peer"),
            (r#"{"peer_list":[],}"#.into(), "trailing comma"),
            (r#"{"peer_list":[{"ip_net":[]}]}"#.into(), "`public_key` is missing"),
            (format!(r#"{{"peer_list":[{{"public_key":"{KEY}"}}]}}"#), KEY),
            (r#"{"peer_list":[{"public_key":1,"ip_net":[]}]}"#.into(), "a string in `public_key`"),
            (
                list(&[peer("abc", "")]),
                "`public_key` must be 32 bytes in base64 (44 characters, the last one `=`): \"abc\" at line 1",
            ),
            (list(&[peer(&long, "")]), "`public_key` must be"),
            (list(&[peer(KEY, "\"10.0.0.1\"")]), "`ip_net` must be an address and a prefix length"),
            (list(&[peer(KEY, &format!("\"{long}\""))]), "`ip_net` must be"),
            (list(&[peer(KEY, "1")]), "a string in `ip_net`"),
            (list(&[peer(KEY, ""), peer(KEY, "")]), KEY),
            (list(&[peer(KEY, "\"10.1.0.0/16\""), peer(OTHER, "\"10.1.0.1/16\"")]), "10.1.0.0/16"),
            (
                list(&[format!(r#"{{"public_key":"{KEY}","public_key":"{KEY}","ip_net":[]}}"#)]),
                "repeated",
            ),
            (list(&[format!(r#"{{"public_key":"{KEY}","ip_net":[],"ip_net":[]}}"#)]), "repeated"),
            (format!("{{\"peer_list\":\"{long}\"}}"), "expected"),
            ("{\"peer_list\":[],\"a\":\"\u{1}\"}".into(), "control character"),
        ] {
            let error = read(&body).unwrap_err();
            assert_eq!(error.status, 400, "{error:?}");
            assert!(error.sentence.len() < 400, "{error:?}");
            // The end of what is as long as the body is cut off.
            if body.len() < 10_000 || part != "expected" {
                assert!(error.sentence.contains(part), "{part}: {error:?}");
            }
        }
    }

    #[test]
    fn a_body_that_ends_early_is_told() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::UnexpectedEof.into())
            }
        }
        let error = read_wanted(&mut Broken, &Uploads::default().begin()).unwrap_err();
        assert_eq!(error.status, 400);
        assert!(error.sentence.starts_with("the body could not be read: "), "{error:?}");
    }
}
