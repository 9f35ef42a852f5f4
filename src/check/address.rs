//! The address: whether the daemon could listen there, and who answers there if not. TLS: its files, or
//! who can reach the port where there are none.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::settings::OF_THE_SERVICE;
use super::{Entry, Level, setting};
use crate::cli::ListenAddress;
use crate::tls::Tls;
use crate::{front, rfc3339};

/// For each part of the conversation with whoever listens there.
const TIME: Duration = Duration::from_millis(1500);

/// Any answer to it is far shorter than what is read.
const REQUEST: &[u8] = b"GET /i/node HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
const MAX_ANSWER: u64 = 16 * 1024;

pub(super) fn look(listen: &ListenAddress) -> Entry {
    let Err(error) = front::bind_tcp(listen) else {
        return Entry::ok("address", format!("{listen} is free"));
    };
    let Some(answer) = ask(listen) else {
        return Entry::problem("address", error.to_string(), setting("LISTEN", "ADDRESS:PORT"));
    };
    if let Some(version) = version(&answer) {
        return Entry::ok("address", format!("{listen} is served by vpn-daemon {version}"));
    }
    // An alert, in a record of type 21, is how TLS refuses plain HTTP.
    if answer.starts_with('\x15') {
        return Entry::ok("address", format!("{listen} is served by a program that speaks TLS"));
    }
    let seen = format!("{error}, and does not answer like vpn-daemon");
    Entry::problem("address", seen, format!("ss -ltnp 'sport = :{}'", listen.port))
}

pub(super) fn tls(listen: &ListenAddress, directory: Option<&Path>) -> Vec<Entry> {
    let Some(directory) = directory else { return vec![plain(listen)] };
    let tls = match Tls::open(directory) {
        Ok(tls) => tls,
        Err(error) => return vec![Entry::new(Level::Problem, "TLS", error)],
    };
    let until = rfc3339::format(tls.expire().0);
    let seen = format!("certificate and key belong together, valid until {until}");
    let findings = tls.findings(SystemTime::now()).into_iter().map(|(severity, text)| {
        let level = match severity {
            log::Level::Error => Level::Problem,
            log::Level::Warn => Level::Warning,
            _ => Level::Ok,
        };
        Entry::new(level, "TLS", text)
    });
    std::iter::once(Entry::ok("TLS", seen)).chain(findings).collect()
}

fn plain(listen: &ListenAddress) -> Entry {
    if Path::new(OF_THE_SERVICE).exists() {
        let seen = format!(
            "the service has credentials that may not be read here, and were not looked at: \
             {OF_THE_SERVICE}"
        );
        return Entry::warning("TLS", seen, "sudo vpn-daemon check");
    }
    if is_local(listen) {
        return Entry::ok("TLS", "plain HTTP, reachable only from this host");
    }
    let seen =
        format!("plain HTTP on {listen}: everybody who reaches this address may remove peers");
    let local = setting("LISTEN", "127.0.0.1:41194");
    let drop_in = "/etc/systemd/system/vpn-daemon.service.d/credentials.conf";
    Entry::warning("TLS", seen, format!("LoadCredential= in {drop_in}, or {local}"))
}

/// Whether only this host reaches the address.
fn is_local(listen: &ListenAddress) -> bool {
    resolve(listen)
        .is_ok_and(|addresses| addresses.iter().all(|address| address.ip().is_loopback()))
}

fn resolve(listen: &ListenAddress) -> io::Result<Vec<SocketAddr>> {
    let port = listen.port;
    match &listen.host {
        Some(host) => Ok((host.as_str(), port).to_socket_addrs()?.collect()),
        None => {
            Ok(vec![(Ipv6Addr::UNSPECIFIED, port).into(), (Ipv4Addr::UNSPECIFIED, port).into()])
        }
    }
}

/// What is answered to a request in plain HTTP; `None` where nobody listens. (Connecting to `::` or
/// `0.0.0.0` leads to this host.)
fn ask(listen: &ListenAddress) -> Option<String> {
    let addresses = resolve(listen).ok()?;
    let connect = |address: &SocketAddr| TcpStream::connect_timeout(address, TIME).ok();
    let mut stream = addresses.iter().find_map(connect)?;
    let mut answer = Vec::new();
    // However it ends: what has come by then says who it is.
    let _ = stream.set_read_timeout(Some(TIME));
    let _ = stream.write_all(REQUEST);
    let _ = stream.take(MAX_ANSWER).read_to_end(&mut answer);
    Some(String::from_utf8_lossy(&answer).into_owned())
}

/// The version of the daemon that has answered; `None` where another program has.
fn version(answer: &str) -> Option<String> {
    let (_, body) = answer.strip_prefix("HTTP/1.1 200 ")?.split_once("\r\n\r\n")?;
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
