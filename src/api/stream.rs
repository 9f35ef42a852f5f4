//! Long JSON answers, written piece by piece while they are read: their text never stands in memory
//! as a whole.

use std::io::{self, Read, Write};

use super::Peer;
use crate::wireguard::{Peers, PublicKey, Synced};

/// How much is written at a time.
const PIECE: usize = 16 * 1024;

/// A JSON text as a reader that knows its length.
#[derive(Debug)]
pub struct Stream {
    length: usize,
    parts: Vec<Part>,
    /// What is written next: the place of the part, and of the item in it.
    next: (usize, usize),
    piece: Vec<u8>,
    /// How much of the piece has been read.
    read: usize,
}

/// Items follow each other with commas between them.
#[derive(Debug)]
enum Part {
    Text(String),
    Keys(Vec<PublicKey>),
    Peers(Peers),
}

impl Part {
    /// Writes an item; whether there was one.
    fn write(&self, item: usize, mut to: impl Write) -> io::Result<bool> {
        if let Self::Text(text) = self {
            to.write_all(if item == 0 { text.as_bytes() } else { b"" })?;
            return Ok(item == 0);
        }
        let comma: &[u8] = if item == 0 { b"" } else { b"," };
        match self {
            Self::Keys(keys) => match keys.get(item) {
                Some(key) => {
                    to.write_all(comma)?;
                    write!(to, "\"{key}\"")?;
                }
                None => return Ok(false),
            },
            Self::Peers(peers) => match peers.get(item) {
                Some(peer) => {
                    to.write_all(comma)?;
                    serde_json::to_writer(to, &Peer::from(&peer))?;
                }
                None => return Ok(false),
            },
            Self::Text(_) => {}
        }
        Ok(true)
    }
}

impl Stream {
    /// `GET /w/peer_list`, in the device's order.
    pub fn peer_list(peers: Peers) -> io::Result<Self> {
        Self::new(vec![
            Part::Text(r#"{"peer_list":["#.to_owned()),
            Part::Peers(peers),
            Part::Text("]}".to_owned()),
        ])
    }

    /// `POST /w/sync_peers`.
    pub fn synced(synced: Synced) -> io::Result<Self> {
        Self::new(vec![
            Part::Text(r#"{"added":["#.to_owned()),
            Part::Keys(synced.added),
            Part::Text(r#"],"updated":["#.to_owned()),
            Part::Keys(synced.updated),
            Part::Text(r#"],"removed":["#.to_owned()),
            Part::Peers(synced.removed),
            Part::Text(format!(r#"],"unchanged":{}}}"#, synced.unchanged)),
        ])
    }

    /// Writes everything once, to know the length.
    fn new(parts: Vec<Part>) -> io::Result<Self> {
        let mut count = Count(0);
        for part in &parts {
            let mut item = 0;
            while part.write(item, &mut count)? {
                item += 1;
            }
        }
        Ok(Self { length: count.0, parts, next: (0, 0), piece: Vec::new(), read: 0 })
    }

    /// Bytes of the whole text.
    pub fn length(&self) -> usize {
        self.length
    }

    fn next_piece(&mut self) -> io::Result<()> {
        self.piece.clear();
        self.read = 0;
        while let Some(part) = self.parts.get(self.next.0) {
            let more = part.write(self.next.1, &mut self.piece)?;
            self.next = if more { (self.next.0, self.next.1 + 1) } else { (self.next.0 + 1, 0) };
            if self.piece.len() >= PIECE {
                break;
            }
        }
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.read == self.piece.len() {
            self.next_piece()?;
        }
        let count = self.piece.get(self.read..).unwrap_or_default().read(buffer)?;
        self.read += count;
        Ok(count)
    }
}

/// Counts what is written.
struct Count(usize);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    use crate::wireguard;

    fn peers(count: u32) -> Peers {
        let peer = |number: u32| wireguard::Peer {
            public_key: [number.to_le_bytes(); 8]
                .concat()
                .try_into()
                .map(<[u8; 32]>::into)
                .unwrap(),
            allowed_ips: (0..number % 4)
                .map(|n| format!("fd00:{n}::{number:x}/{}", 128 - n).parse().unwrap())
                .collect(),
            last_handshake: (!number.is_multiple_of(3))
                .then(|| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(number) << 20)),
            rx_bytes: u64::MAX >> (number % 64),
            tx_bytes: 10_u64.pow(number % 20),
        };
        (0..count).map(peer).collect()
    }

    fn text(mut stream: Stream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text.len(), stream.length());
        text
    }

    #[test]
    fn lists() {
        for count in [0, 1, 2, 1000] {
            let peers = peers(count);
            let listed: Vec<_> = peers.iter().collect();
            let plain: Vec<_> = listed.iter().map(Peer::from).collect();
            let plain = serde_json::to_string(&serde_json::json!({ "peer_list": plain })).unwrap();
            assert_eq!(text(Stream::peer_list(peers).unwrap()), plain);
        }
    }

    #[test]
    fn results() {
        let empty =
            Synced { added: vec![], updated: vec![], removed: Peers::default(), unchanged: 0 };
        assert_eq!(
            text(Stream::synced(empty).unwrap()),
            r#"{"added":[],"updated":[],"removed":[],"unchanged":0}"#
        );
        let keys: Vec<PublicKey> = peers(700).iter().map(|peer| peer.public_key).collect();
        let synced = Synced {
            added: keys.clone(),
            updated: keys[..1].to_vec(),
            removed: peers(2),
            unchanged: 1_234_567,
        };
        let value: serde_json::Value =
            serde_json::from_str(&text(Stream::synced(synced).unwrap())).unwrap();
        let texts: Vec<_> = keys.iter().map(ToString::to_string).collect();
        assert_eq!(value["added"], serde_json::json!(texts));
        assert_eq!(value["updated"], serde_json::json!(texts[..1]));
        assert_eq!(value["removed"][1]["public_key"], texts[1]);
        assert_eq!(value["unchanged"], 1_234_567);
    }
}
