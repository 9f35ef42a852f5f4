//! Asks a daemon for `/i/node` over TCP, as its portal does.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Any answer to `/i/node` is far shorter.
const MAX_ANSWER: u64 = 16 * 1024;

/// The body of the answer.
///
/// # Errors
/// Nobody listens or answers by `deadline`, or the answer is not 200.
pub(crate) fn tcp(address: &SocketAddr, deadline: Instant) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(address, left(deadline)?)?;
    stream.write_all(b"GET /i/node HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut piece)? {
            0 => break,
            count => answer.extend_from_slice(&piece[..count]),
        }
        if answer.len() as u64 > MAX_ANSWER {
            return Err(io::Error::other("the answer has no end"));
        }
    }
    body(&String::from_utf8_lossy(&answer)).map(str::to_owned)
}

fn body(answer: &str) -> io::Result<&str> {
    let (head, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other("the answer is not HTTP"))?;
    match head.split(' ').nth(1) {
        Some("200") if head.starts_with("HTTP/1.") => Ok(body),
        _ => {
            let line: String = head.lines().next().unwrap_or_default().chars().take(80).collect();
            Err(io::Error::other(format!("the answer is {line:?}")))
        }
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    #[test]
    fn only_200_counts() {
        for (answer, expected) in [
            ("HTTP/1.1 200 OK\r\nServer: vpn-daemon\r\n\r\n{}", Ok("{}")),
            ("HTTP/1.0 200 OK\r\n\r\n", Ok("")),
            ("HTTP/1.1 503 Busy\r\n\r\n{}", Err("the answer is \"HTTP/1.1 503 Busy\"")),
            ("200 200 200\r\n\r\n", Err("the answer is \"200 200 200\"")),
            ("HTTP/1.1 200 OK\r\n", Err("the answer is not HTTP")),
            ("SSH-2.0-OpenSSH\r\n", Err("the answer is not HTTP")),
            ("", Err("the answer is not HTTP")),
        ] {
            let body = body(answer).map_err(|error| error.to_string());
            assert_eq!(body.as_ref().map(|body| &**body).map_err(|error| &**error), expected);
        }
    }

    #[test]
    fn every_wait_has_an_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let soon = || Instant::now() + Duration::from_millis(50);
        assert!(tcp(&address, soon()).is_err());
        let _silent = listener.accept().unwrap();
        let dripping = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(b"x").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        assert_eq!(tcp(&address, soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        dripping.join().unwrap();
    }
}
