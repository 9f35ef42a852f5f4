//! The address: whether it can be bound, and who answers there if not.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};

use super::{Entry, setting};
use crate::cli::ListenAddress;

/// For each byte of the answer of a daemon that runs.
const TIME: Duration = Duration::from_millis(1500);

/// Any answer to it is far shorter than what is read.
const REQUEST: &[u8] = b"GET /i/node HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
const MAX_ANSWER: u64 = 16 * 1024;

const SUBJECT: &str = "address";

pub(super) fn look(listen: &ListenAddress) -> Vec<Entry> {
    let addresses = match resolve(listen) {
        Ok(addresses) => addresses,
        Err(error) => {
            let seen = format!("{listen} cannot be resolved: {error}");
            return vec![Entry::problem(SUBJECT, seen, setting("LISTEN", "ADDRESS:PORT"))];
        }
    };
    let mut failed = Errno::EADDRNOTAVAIL;
    for address in &addresses {
        match can_bind(address) {
            Ok(()) => return vec![Entry::ok(SUBJECT, format!("{listen} is free"))],
            Err(Errno::EADDRINUSE) => return vec![in_use(listen, address)],
            Err(error) => failed = error,
        }
    }
    let (seen, value) = match failed {
        Errno::EADDRNOTAVAIL => ("is no address of this host", format!(":{}", listen.port)),
        Errno::EACCES => ("may not be bound: ports below 1024 take a privilege", ":41194".into()),
        error => (error.desc(), "ADDRESS:PORT".into()),
    };
    vec![Entry::problem(SUBJECT, format!("{listen} {seen}"), setting("LISTEN", &value))]
}

/// Whether only this host reaches the address.
pub(super) fn is_local(listen: &ListenAddress) -> bool {
    resolve(listen)
        .is_ok_and(|addresses| addresses.iter().all(|address| address.ip().is_loopback()))
}

fn resolve(listen: &ListenAddress) -> io::Result<Vec<SocketAddr>> {
    match &listen.host {
        Some(host) => Ok((host.as_str(), listen.port).to_socket_addrs()?.collect()),
        None => {
            let every: [IpAddr; 2] = [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()];
            Ok(every.map(|address| SocketAddr::new(address, listen.port)).to_vec())
        }
    }
}

/// Binds and does not listen: so a daemon that starts at this moment is not disturbed.
fn can_bind(address: &SocketAddr) -> nix::Result<()> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(*address))
}

/// Asks in plain HTTP. Who speaks TLS refuses that with an alert, a record of type 21.
fn in_use(listen: &ListenAddress, address: &SocketAddr) -> Entry {
    let mut near = *address;
    if address.ip().is_unspecified() {
        // A socket for every address takes IPv4, and the host may have no ::1.
        near.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    // However it ends: what has come by then says who it is.
    let mut answer = Vec::new();
    let _ = TcpStream::connect_timeout(&near, TIME).and_then(|mut stream| {
        stream.set_read_timeout(Some(TIME))?;
        stream.write_all(REQUEST)?;
        stream.take(MAX_ANSWER).read_to_end(&mut answer)
    });
    let answer = String::from_utf8_lossy(&answer);
    if let Some(version) = version(&answer) {
        return Entry::ok(SUBJECT, format!("{listen} is served by vpn-daemon {version}"));
    }
    if answer.starts_with('\x15') {
        return Entry::ok(SUBJECT, format!("{listen} is served by a program that speaks TLS"));
    }
    let seen = format!("{listen} is in use by a program that does not answer like vpn-daemon");
    Entry::problem(SUBJECT, seen, format!("ss -ltnp 'sport = :{}'", address.port()))
}

/// The version of the daemon that has answered; `None` where another program has.
fn version(answer: &str) -> Option<String> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    if !head.starts_with("HTTP/1.1 200 ") {
        return None;
    }
    let node: serde_json::Value = serde_json::from_str(body).ok()?;
    node.get("node_uptime")?.as_u64()?;
    let version = node.get("v").and_then(serde_json::Value::as_str).unwrap_or("of another kind");
    Some(version.chars().take(40).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_daemon_answers_like_a_daemon() {
        let good = "HTTP/1.1 200 OK\r\nServer: vpn-daemon\r\n\r\n";
        for (head, body, expected) in [
            (good, r#"{"node_uptime":7,"v":"1.2.3"}"#, Some("1.2.3")),
            (good, r#"{"node_uptime":7}"#, Some("of another kind")),
            (good, r#"{"v":"1.2.3"}"#, None),
            (good, "<html>", None),
            ("HTTP/1.1 503 Busy\r\n\r\n", r#"{"node_uptime":7}"#, None),
            ("200 200 200\r\n\r\n", r#"{"node_uptime":7}"#, None),
            ("SSH-2.0-OpenSSH\r\n", "", None),
        ] {
            let answer = format!("{head}{body}");
            assert_eq!(version(&answer).as_deref(), expected, "{answer}");
        }
    }

    #[test]
    fn only_loopback_is_local() {
        for (listen, expected) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("localhost:1", true),
            (":1", false),
            ("0.0.0.0:1", false),
            ("192.0.2.1:1", false),
        ] {
            assert_eq!(is_local(&listen.parse().unwrap()), expected, "{listen}");
        }
    }
}
