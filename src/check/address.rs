//! The address: whether it can be bound, and who holds it if not.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};

use super::{Entry, setting};
use crate::cli::ListenAddress;
use crate::probe;

/// For the answer of a daemon that runs.
const TIME: Duration = Duration::from_millis(1500);

const SUBJECT: &str = "address";

pub(super) fn look(listen: &ListenAddress, credentials: Option<&Path>) -> Vec<Entry> {
    let addresses = match resolve(listen) {
        Ok(addresses) => addresses,
        Err(error) => {
            let remedy = setting("LISTEN", "ADDRESS:PORT");
            let seen = format!("{listen} cannot be resolved: {error}");
            return vec![Entry::problem(SUBJECT, seen, remedy)];
        }
    };
    let mut failed = None;
    for address in &addresses {
        match can_bind(address) {
            Ok(()) => return vec![Entry::ok(SUBJECT, format!("{listen} is free"))],
            Err(Errno::EADDRINUSE) => return vec![in_use(listen, address, credentials)],
            Err(error) => failed = Some(error),
        }
    }
    let every = format!(":{}", listen.port);
    let (seen, remedy) = match failed {
        Some(Errno::EADDRNOTAVAIL) => (
            format!("{listen} is no address of this host"),
            format!("{}, or an address of `ip address`", setting("LISTEN", &every)),
        ),
        Some(Errno::EACCES) => (
            format!("{listen} may not be bound: ports below 1024 take a privilege"),
            setting("LISTEN", "127.0.0.1:41194"),
        ),
        error => (
            format!("{listen} cannot be bound: {}", error.map_or("no address", Errno::desc)),
            setting("LISTEN", "ADDRESS:PORT"),
        ),
    };
    vec![Entry::problem(SUBJECT, seen, remedy)]
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

fn in_use(listen: &ListenAddress, address: &SocketAddr, credentials: Option<&Path>) -> Entry {
    let mut near = *address;
    if address.ip().is_unspecified() {
        // A socket for every address takes IPv4, and the host may have no ::1.
        near.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    let deadline = Instant::now() + TIME;
    if credentials.is_some() {
        // What speaks TLS there is told by who holds the port.
    } else if let Ok(body) = probe::tcp(&near, deadline)
        && let Some(version) = version(&body)
    {
        return Entry::ok(SUBJECT, format!("{listen} is served by vpn-daemon {version}"));
    }
    let port = address.port();
    let show = format!("ss -ltnp 'sport = :{port}'");
    match holder(port) {
        Some(Holder::Process { name, pid }) if name == "vpn-daemon" => {
            Entry::ok(SUBJECT, format!("{listen} is held by vpn-daemon (process {pid})"))
        }
        Some(Holder::Process { name, pid: 1 }) => {
            Entry::ok(SUBJECT, format!("{listen} is held by {name} for a socket unit"))
        }
        Some(Holder::Process { name, pid }) => Entry::problem(
            SUBJECT,
            format!("{listen} is in use by {name} (process {pid})"),
            format!("end it (kill {pid}), or {}", setting("LISTEN", "ADDRESS:PORT")),
        ),
        Some(Holder::User(0)) | None => {
            let seen = format!("{listen} is in use, perhaps by this daemon or another program");
            Entry::warning(SUBJECT, seen, show)
        }
        Some(Holder::User(uid)) => {
            let seen = format!("{listen} is in use by a process of user {uid}, perhaps the daemon");
            Entry::warning(SUBJECT, seen, show)
        }
    }
}

/// The version of the daemon that has answered; `None` where another program has.
fn version(node: &str) -> Option<String> {
    let node: serde_json::Value = serde_json::from_str(node).ok()?;
    node.get("node_uptime")?.as_u64()?;
    let version = node.get("v").and_then(serde_json::Value::as_str).unwrap_or("of another kind");
    Some(version.chars().take(40).collect())
}

/// Who listens on a port, as far as this process may see.
#[derive(PartialEq, Eq, Debug)]
enum Holder {
    Process { name: String, pid: u32 },
    User(u32),
}

fn holder(port: u16) -> Option<Holder> {
    let (uid, inode) = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .find_map(|table| listening(&fs::read_to_string(table).ok()?, port))?;
    let socket = format!("socket:[{inode}]");
    // The lowest number is the first that has it: systemd before what it has passed it to.
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let holds = |pid: &u32| {
        fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|fds| {
            let mut targets = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
            targets.any(|target| target.as_os_str() == socket.as_str())
        })
    };
    let Some(pid) = pids.into_iter().find(holds) else { return Some(Holder::User(uid)) };
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(Holder::Process { name: name.trim_end().to_owned(), pid })
}

/// User and inode of the socket that listens on a port, from a table of proc_net_tcp(5).
fn listening(table: &str, port: u16) -> Option<(u32, u64)> {
    const LISTEN: &str = "0A";
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
        if u16::from_str_radix(local_port, 16) != Ok(port) || *fields.get(3)? != LISTEN {
            return None;
        }
        Some((fields.get(7)?.parse().ok()?, fields.get(9)?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_of_sockets() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:A0EA 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 7 1 0
   1: 0100007F:A0EA 00000000:0000 0A 00000000:00000000 00:00000000 00000000   998        0 34567 1 0
";
        assert_eq!(listening(table, 41194), Some((998, 34567)));
        assert_eq!(listening(table, 8080), None);
        assert_eq!(listening("", 1), None);
        assert_eq!(listening("x\n: :A0EA\n", 41194), None);
    }

    #[test]
    fn only_a_daemon_answers_like_a_daemon() {
        for (body, expected) in [
            (r#"{"node_uptime":7,"v":"1.2.3"}"#, Some("1.2.3")),
            (r#"{"node_uptime":7}"#, Some("of another kind")),
            (r#"{"v":"1.2.3"}"#, None),
            ("[]", None),
            ("<html>", None),
        ] {
            assert_eq!(version(body).as_deref(), expected, "{body}");
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
