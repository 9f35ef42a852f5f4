//! Asks a daemon for `/i/node`, as its portal does: over TCP, or over the inner socket.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

/// Any answer to `/i/node` is far shorter.
const MAX_ANSWER: u64 = 16 * 1024;

const REQUEST: &[u8] = b"GET /i/node HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// The body of the answer, over TCP without TLS.
///
/// # Errors
/// Nobody listens or answers by `deadline`, or the answer is not 200.
pub(crate) fn tcp(address: &SocketAddr, deadline: Instant) -> io::Result<String> {
    let stream = TcpStream::connect_timeout(address, left(deadline)?)?;
    converse(&stream, &stream, deadline)
}

/// The body of the answer, over a Unix socket.
///
/// # Errors
/// Nobody listens or answers by `deadline`, or the answer is not 200.
pub(crate) fn unix(path: &Path, deadline: Instant) -> io::Result<String> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Without it, connecting waits for as long as the backlog is full.
    limit(&fd, deadline)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(fd);
    converse(&stream, &stream, deadline)
}

fn converse<S: AsFd>(
    mut stream: impl Read + Write,
    socket: &S,
    deadline: Instant,
) -> io::Result<String> {
    limit(socket, deadline)?;
    stream.write_all(REQUEST)?;
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    loop {
        limit(socket, deadline)?;
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(timed_out()),
            Err(error) => return Err(error),
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

/// Makes the next call on the socket give up at the deadline.
fn limit(socket: &impl AsFd, deadline: Instant) -> io::Result<()> {
    let left = left(deadline)?;
    let seconds = i64::try_from(left.as_secs()).unwrap_or(i64::MAX);
    // All zeros would mean no limit.
    let time = TimeVal::new(seconds, i64::from(left.subsec_micros()).max(1));
    setsockopt(socket, sockopt::SendTimeout, &time)?;
    setsockopt(socket, sockopt::ReceiveTimeout, &time)?;
    Ok(())
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(timed_out()) } else { Ok(left) }
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no answer in time")
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
        assert_eq!(tcp(&address, soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
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
