//! What a userspace device answers: its text protocol as the crate's parser can take it.
//!
//! The protocol is that of <https://www.wireguard.com/xplatform/>.

use std::io::{self, BufRead, Read};
use std::time::{Duration, SystemTime};

use wireguard_uapi::get;
use wireguard_uapi::xplatform::parser::{ParseGetResponseError, parse};

use super::{AllowedIp, Peer, Peers, PublicKey, Snapshot};

/// The longest line and the longest answer that are read. A line holds a key or an address; a
/// peer takes some 400 bytes.
const LINE_LIMIT: u64 = 1024;
const REPLY_LIMIT: u64 = 64 << 20;

/// The peers that the crate's parser gets at a time.
const PARSED_PEERS: usize = 256;

/// The lines of an answer as the crate's parser can take them: only the keys that are needed (it
/// refuses unknown ones), after a `listen_port` (it panics without), with the handshake times
/// reset at each peer (it keeps those of the peer before), up to the empty line at the end, and not
/// too many peers at a time (it takes some 250 bytes for each).
struct Lines<R> {
    reader: R,
    read: u64,
    /// Lines to give before the next one is read, the last one first.
    inserted: Vec<&'static str>,
    /// Peers since the parser began.
    peers: usize,
    /// The first line of a peer that the parser has to begin anew for.
    next_peer: Option<String>,
    own_key: Option<PublicKey>,
    has_status: bool,
    /// Whether the peers' secrets and settings are needed as well.
    with_settings: bool,
}

impl<R: BufRead> Lines<R> {
    fn new(reader: R, with_settings: bool) -> Self {
        Self {
            reader,
            read: 0,
            inserted: vec![],
            peers: 0,
            next_peer: None,
            own_key: None,
            has_status: false,
            with_settings,
        }
    }

    /// Parses the whole answer; `take` gets the peers as they come, not too many at a time.
    fn parse(
        &mut self,
        mut take: impl FnMut(Vec<get::Peer>) -> Result<(), ParseGetResponseError>,
    ) -> Result<(), ParseGetResponseError> {
        loop {
            self.inserted = vec!["listen_port=0"];
            self.peers = 0;
            take(parse(&mut *self)?.peers)?;
            if self.next_peer.is_none() {
                return Ok(());
            }
        }
    }

    fn read_line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        let length = (&mut self.reader).take(LINE_LIMIT).read_until(b'\n', &mut line)?;
        self.read += u64::try_from(length).unwrap_or(u64::MAX);
        let bad = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        match line.pop() {
            Some(b'\n') if self.read > REPLY_LIMIT => Err(bad("its answer is too long")),
            Some(b'\n') => String::from_utf8(line).map_err(|_| bad("its answer is not text")),
            _ if length as u64 == LINE_LIMIT => Err(bad("its answer has a line that is too long")),
            _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "its answer ends early")),
        }
    }

    fn next_line(&mut self) -> io::Result<String> {
        if let Some(line) = self.inserted.pop() {
            return Ok(line.to_owned());
        }
        if let Some(line) = self.next_peer.take() {
            return Ok(self.begin_peer(line));
        }
        let bad = |what| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        loop {
            let line = self.read_line()?;
            let (key, value) = line.split_once('=').unwrap_or((&line, ""));
            match key {
                "" if line.is_empty() && !self.has_status => return bad("its answer has no errno"),
                "" if line.is_empty() => return Ok(line),
                "public_key" if self.peers == PARSED_PEERS => {
                    self.next_peer = Some(line);
                    self.inserted = vec![""];
                    return Ok("errno=0".to_owned());
                }
                "public_key" => return Ok(self.begin_peer(line)),
                "own_public_key" => match parse_hex_key(value) {
                    Some(key) => self.own_key = Some(key),
                    None => return bad("its own public key is malformed"),
                },
                "errno" => {
                    self.has_status = true;
                    return Ok(line);
                }
                // The crate panics on a time that `Duration` cannot hold.
                "last_handshake_time_sec"
                    if value.parse().is_ok_and(|seconds: u64| seconds >> 63 > 0) =>
                {
                    return bad("a handshake time is impossible");
                }
                "allowed_ip"
                | "rx_bytes"
                | "tx_bytes"
                | "last_handshake_time_sec"
                | "last_handshake_time_nsec" => return Ok(line),
                "preshared_key" | "endpoint" | "persistent_keepalive_interval"
                    if self.with_settings =>
                {
                    return Ok(line);
                }
                _ => {}
            }
        }
    }
}

impl<R> Lines<R> {
    fn begin_peer(&mut self, line: String) -> String {
        self.peers += 1;
        self.inserted = vec!["last_handshake_time_sec=0", "last_handshake_time_nsec=0"];
        line
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = io::Result<String>;
    fn next(&mut self) -> Option<Self::Item> {
        Some(self.next_line())
    }
}

fn parse_hex_key(text: &str) -> Option<PublicKey> {
    let mut key = [0; 32];
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in key.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(key.into())
}

/// Takes what is needed from the crate's peer and leaves its preshared key behind; `None` where an
/// allowed IP is impossible.
fn from_crate(peer: get::Peer) -> Option<Peer<'static>> {
    let allowed_ips = peer.allowed_ips.iter().map(|ip| AllowedIp::new(ip.ipaddr, ip.cidr_mask));
    let allowed_ips: Vec<_> = allowed_ips.collect::<Option<_>>()?;
    Some(Peer {
        public_key: peer.public_key.into(),
        allowed_ips: allowed_ips.into(),
        last_handshake: Some(peer.last_handshake_time)
            .filter(|time| *time != Duration::ZERO)
            .and_then(|time| SystemTime::UNIX_EPOCH.checked_add(time)),
        rx_bytes: peer.rx_bytes,
        tx_bytes: peer.tx_bytes,
    })
}

/// Parses the answer to `get=1`. boringtun alone tells its own key.
pub(super) fn parse_device(
    reader: impl BufRead,
    now: SystemTime,
) -> Result<Snapshot, ParseGetResponseError> {
    let mut lines = Lines::new(reader, false);
    let mut peers = Peers::default();
    lines.parse(|some| {
        for peer in some {
            peers.push(&from_crate(peer).ok_or_else(|| {
                let what = "it has an impossible allowed IP";
                let error = io::Error::new(io::ErrorKind::InvalidData, what);
                ParseGetResponseError::ReadLineIoError(error)
            })?);
        }
        Ok(())
    })?;
    if lines.own_key.is_some() {
        // boringtun tells how long ago the handshake was, not when.
        for time in peers.handshakes_mut() {
            let age = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            *time = now.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
        }
    }
    Ok(Snapshot { own_key: lines.own_key, peers })
}

/// Parses the answer to `get=1`, the peers' preshared keys, endpoints and keepalives included: what
/// is needed to add a peer again as it was. Not to be logged.
pub(super) fn parse_settings(
    reader: impl BufRead,
) -> Result<Vec<get::Peer>, ParseGetResponseError> {
    let mut peers = Vec::new();
    Lines::new(reader, true).parse(|some| {
        peers.extend(some);
        Ok(())
    })?;
    Ok(peers)
}

/// Parses the answer to `set=1`.
pub(super) fn parse_status(reader: impl BufRead) -> Result<(), ParseGetResponseError> {
    Lines::new(reader, false).parse(|_| Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;

    const KEYS: [&str; 3] = [
        "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33",
        "58402e695ba1772b1cc9309755f043251ea77fdcf10fbe63989ceb7e19321376",
        "662E14FD594556F522604703340351258903B64F35553763F19426AB2A515C58",
    ];

    fn parse_text(text: &str) -> Result<Snapshot, ParseGetResponseError> {
        parse_device(text.as_bytes(), SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000))
    }

    fn seconds(peer: Peer) -> Option<u64> {
        let time = peer.last_handshake?;
        Some(time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs())
    }

    #[test]
    fn wireguard_go() {
        let [first, second, third] = KEYS;
        let zeros = "0".repeat(64);
        let device = parse_text(&format!(
            "private_key={zeros}\nlisten_port=12912\nfwmark=1\n\
             public_key={first}\npreshared_key={zeros}\nprotocol_version=1\n\
             endpoint=[fe80::1%eth0]:51820\nlast_handshake_time_sec=1600000000\n\
             last_handshake_time_nsec=5\ntx_bytes=38333\nrx_bytes=2224\n\
             persistent_keepalive_interval=111\nallowed_ip=192.168.4.4/32\nallowed_ip=fd00::/64\n\
             public_key={second}\nprotocol_version=1\nlast_handshake_time_sec=0\n\
             last_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=18446744073709551615\n\
             public_key={third}\nnews_of_the_day=none\n\
             errno=0\n\npublic_key=what comes after the end"
        ))
        .unwrap();
        assert_eq!(device.own_key, None);
        let keys: Vec<_> = device.peers.iter().map(|peer| peer.public_key).collect();
        assert_eq!(keys, KEYS.map(|key| parse_hex_key(key).unwrap()));
        assert_eq!(
            device.peers.iter().map(seconds).collect::<Vec<_>>(),
            [Some(1_600_000_000), None, None]
        );
        let [one, two] = [0, 1].map(|place| device.peers.get(place).unwrap());
        assert_eq!((one.rx_bytes, one.tx_bytes), (2224, 38333));
        assert_eq!((two.rx_bytes, two.allowed_ips.len()), (u64::MAX, 0));
        let ips: Vec<_> = one.allowed_ips.iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["192.168.4.4/32", "fd00::/64"]);
    }

    #[test]
    fn boringtun() {
        // It leaves out what is zero, and tells the age of a handshake in place of its time.
        let [own, first, second] = KEYS;
        let device = parse_text(&format!(
            "own_public_key={own}\npublic_key={first}\nendpoint=10.0.0.1:5\n\
             allowed_ip=10.0.0.0/8\nlast_handshake_time_sec=100\nlast_handshake_time_nsec=1\n\
             rx_bytes=1\ntx_bytes=2\npublic_key={second}\nrx_bytes=0\ntx_bytes=0\nerrno=0\n\n"
        ))
        .unwrap();
        assert_eq!(device.own_key, parse_hex_key(own));
        assert_eq!(
            device.peers.iter().map(seconds).collect::<Vec<_>>(),
            [Some(1_699_999_899), None]
        );
    }

    #[test]
    fn more_peers_than_are_parsed_at_a_time() {
        for count in [PARSED_PEERS - 1, PARSED_PEERS, PARSED_PEERS + 1, 3 * PARSED_PEERS] {
            let peer = |number| {
                let seen = if number % 2 == 0 { "last_handshake_time_sec=5\n" } else { "" };
                format!(
                    "public_key={number:064x}\n{seen}allowed_ip=10.0.0.0/8\nrx_bytes={number}\n"
                )
            };
            let peers: String = (0..count).map(peer).collect();
            let device = parse_text(&format!("{peers}errno=0\n\n")).unwrap();
            assert!(device.peers.iter().map(|peer| peer.rx_bytes).eq(0..count as u64));
            for (peer, number) in device.peers.iter().zip(0..) {
                assert_eq!(peer.public_key, parse_hex_key(&format!("{number:064x}")).unwrap());
                assert_eq!(peer.allowed_ips.len(), 1);
                assert_eq!(peer.last_handshake.is_some(), number % 2 == 0);
            }
            // What is wrong at the end counts, and is that of the device.
            for (end, what) in [("errno=-5\n\n", "5"), ("", "ends early"), ("\n", "no errno")] {
                let error = parse_text(&format!("{peers}{end}")).map(drop).unwrap_err();
                assert!(error.to_string().contains(what), "{count} {end:?}: {error}");
            }
        }
    }

    #[test]
    fn no_peers() {
        assert_eq!(parse_text("errno=0\n\n").unwrap().peers.len(), 0);
        assert_eq!(parse_text("listen_port=1\nerrno=0\n\n").unwrap().peers.len(), 0);
        assert!(parse_status(&b"errno=0\n\n"[..]).is_ok());
    }

    #[test]
    fn malformed() {
        let key = KEYS[0];
        for text in [
            "",
            "\n",
            "errno=0",
            "errno=0\n",
            "errno\n\n",
            "errno=1\n\n",
            "errno=-22\n\n",
            "errno=zero\n\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "allowed_ip=10.0.0.0/8\nerrno=0\n\n",
            "rx_bytes=1\nerrno=0\n\n",
            "public_key=\nerrno=0\n\n",
            "public_key\nerrno=0\n\n",
            "public_key=b8\nerrno=0\n\n",
            "own_public_key=b8\nerrno=0\n\n",
            &format!("public_key={key}\n\n"),
            &format!("public_key={key}\nerrno=5\n\n"),
            &format!("public_key={key}\nerrno=0\n"),
            &format!("public_key={key}\nallowed_ip=10.0.0.0\nerrno=0\n\n"),
            &format!("public_key={key}\nallowed_ip=10.0.0.0/33\nerrno=0\n\n"),
            &format!("public_key={key}\nrx_bytes=-1\nerrno=0\n\n"),
            &format!("public_key={key}\nrx_bytes=18446744073709551616\nerrno=0\n\n"),
            &format!("public_key={key}\nlast_handshake_time_nsec=4294967296\nerrno=0\n\n"),
            &format!(
                "public_key={key}\nlast_handshake_time_sec={}\nlast_handshake_time_nsec={}\nerrno=0\n\n",
                u64::MAX,
                u32::MAX
            ),
            &format!("x={}\nerrno=0\n\n", "x".repeat(2000)),
        ] {
            assert!(parse_text(text).is_err(), "{text:?}");
        }
        assert!(parse_device(&b"\xff\xfe\nerrno=0\n\n"[..], SystemTime::now()).is_err());
        let endless = BufReader::new(io::repeat(b'x'));
        assert!(parse_device(endless, SystemTime::now()).is_err());
    }

    /// Sends the same line for ever.
    struct Flood;
    impl Read for Flood {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = buffer.len().min(1000);
            buffer[..length].fill(b'1');
            buffer[length - 1] = b'\n';
            Ok(length)
        }
    }

    #[test]
    fn floods_end() {
        let error = parse_device(BufReader::new(Flood), SystemTime::now()).err().unwrap();
        assert!(matches!(error, ParseGetResponseError::ReadLineIoError(_)), "{error}");
    }

    #[test]
    fn peers_from_the_crate() {
        let peer = get::Peer {
            public_key: [1; 32],
            preshared_key: [2; 32],
            endpoint: None,
            persistent_keepalive_interval: 0,
            last_handshake_time: Duration::from_secs(7),
            rx_bytes: 3,
            tx_bytes: 4,
            allowed_ips: vec!["10.0.0.1/8".parse().unwrap()],
            protocol_version: 1,
        };
        let mut never_seen = peer.clone();
        never_seen.last_handshake_time = Duration::ZERO;
        assert_eq!(from_crate(never_seen).unwrap().last_handshake, None);
        let mut impossible = peer.clone();
        impossible.allowed_ips[0].cidr_mask = 33;
        assert_eq!(from_crate(impossible), None);
        let expected = Peer {
            public_key: [1; 32].into(),
            allowed_ips: vec!["10.0.0.0/8".parse().unwrap()].into(),
            last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(7)),
            rx_bytes: 3,
            tx_bytes: 4,
        };
        assert_eq!(from_crate(peer), Some(expected));
    }
}
