//! The witness of a kernel dump: a second dump of the same device, begun before the first and read
//! after it, which tells whether the device changed meanwhile.
//!
//! A dump comes in pages. The kernel fills page 1 when the dump is asked for, and each further page
//! when the one before it is received; a page before which the device was changed carries
//! `NLM_F_DUMP_INTR` (`drivers/net/wireguard/netlink.c`, `nl_dump_check_consistent`). So a witness
//! whose page 2 comes without the flag proves that nothing changed between its [`Witness::open`]
//! and the reception of its page 1. A device small enough for one page has no page 2: there the
//! page itself, which is filled at one go, says what the dump must hold.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::{DeviceName, PublicKey};

/// A malformed answer; the kernel does not send any.
const MALFORMED: Errno = Errno::EBADMSG;

/// Netlink: message types and flags (`linux/netlink.h`).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLA_TYPE_MASK: u16 = 0x3fff;

/// Generic netlink's controller (`linux/genetlink.h`).
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// WireGuard's family (`linux/wireguard.h`).
const WG_CMD_GET_DEVICE: u8 = 0;
const WGDEVICE_A_IFINDEX: u16 = 1;
const WGDEVICE_A_IFNAME: u16 = 2;
const WGDEVICE_A_PUBLIC_KEY: u16 = 4;
const WGDEVICE_A_PEERS: u16 = 8;
const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_ALLOWEDIPS: u16 = 9;

/// A page is at most 8 KiB where the reader's buffer is not larger.
const PAGE: usize = 8192;

/// A dump held open.
pub(super) struct Witness {
    socket: OwnedFd,
    family: u16,
    deadline: Instant,
}

/// What one page of a dump says.
#[derive(Default, PartialEq, Eq, Debug)]
pub(super) struct Page {
    /// Index of the device's interface (page 1 only).
    pub(super) ifindex: Option<u32>,
    /// Public key of the device, if it has one (page 1 only).
    pub(super) own_key: Option<PublicKey>,
    /// The peers on this page, each with the number of its allowed IPs on this page.
    pub(super) peers: Vec<(PublicKey, usize)>,
    /// The page holds a part of the device, not only the end of the dump.
    pub(super) has_device: bool,
    /// The device was changed since the page before.
    pub(super) interrupted: bool,
    /// The dump ends with this page.
    pub(super) last: bool,
}

impl Witness {
    /// Begins a dump of the device. `ENOENT` means that the kernel has no WireGuard module; what
    /// is wrong with the device itself is told by its first page.
    pub(super) fn open(device: &DeviceName, deadline: Instant) -> Result<Self, Errno> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )?;
        let mut witness = Self {
            socket,
            family: GENL_ID_CTRL,
            deadline,
        };
        let name = (CTRL_ATTR_FAMILY_NAME, "wireguard");
        witness.send(&request(
            GENL_ID_CTRL,
            NLM_F_REQUEST,
            CTRL_CMD_GETFAMILY,
            name,
        ))?;
        witness.family = parse_family(&witness.receive()?)?;
        let name = (WGDEVICE_A_IFNAME, device.as_str());
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        witness.send(&request(witness.family, flags, WG_CMD_GET_DEVICE, name))?;
        Ok(witness)
    }

    /// The next page. `ENODEV`: no such device, `EOPNOTSUPP`: it is not WireGuard, `EPERM`: no
    /// privilege, `EAGAIN`: the deadline has passed.
    pub(super) fn page(&self) -> Result<Page, Errno> {
        parse_page(&self.receive()?, self.family)
    }

    fn send(&self, request: &[u8]) -> Result<(), Errno> {
        send(self.socket.as_raw_fd(), request, MsgFlags::empty()).map(drop)
    }

    fn receive(&self) -> Result<Vec<u8>, Errno> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // A time-out of zero would mean none.
        let left = i64::try_from(left.as_micros()).unwrap_or(i64::MAX).max(1);
        setsockopt(
            &self.socket,
            sockopt::ReceiveTimeout,
            &TimeVal::microseconds(left),
        )?;
        let mut page = vec![0; PAGE];
        let length = loop {
            // With this flag the length is that of the datagram, were it larger than the buffer.
            match recv(self.socket.as_raw_fd(), &mut page, MsgFlags::MSG_TRUNC) {
                Err(Errno::EINTR) => {}
                result => break result?,
            }
        };
        if length > PAGE {
            return Err(MALFORMED);
        }
        page.truncate(length);
        Ok(page)
    }
}

/// A generic netlink request with one attribute, a name.
fn request(family: u16, flags: u16, command: u8, (attribute, name): (u16, &str)) -> Vec<u8> {
    let mut body = vec![command, 1, 0, 0];
    let length = u16::try_from(4 + name.len() + 1).unwrap_or(u16::MAX);
    body.extend(length.to_ne_bytes());
    body.extend(attribute.to_ne_bytes());
    body.extend(name.bytes());
    body.push(0);
    body.resize(body.len().next_multiple_of(4), 0);
    let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::from(length.to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]); // sequence and port: one request at a time, the kernel fills the port
    message.extend(body);
    message
}

/// The number of the family from the controller's answer.
fn parse_family(datagram: &[u8]) -> Result<u16, Errno> {
    for message in messages(datagram) {
        let (kind, _, body) = message?;
        if kind == NLMSG_ERROR || kind == NLMSG_DONE {
            check_status(body)?;
            continue;
        }
        for attribute in attributes(body.get(4..).ok_or(MALFORMED)?) {
            if let (CTRL_ATTR_FAMILY_ID, id) = attribute? {
                return id.try_into().map(u16::from_ne_bytes).map_err(|_| MALFORMED);
            }
        }
    }
    Err(MALFORMED)
}

fn parse_page(datagram: &[u8], family: u16) -> Result<Page, Errno> {
    let mut page = Page::default();
    for message in messages(datagram) {
        let (kind, flags, body) = message?;
        page.interrupted |= flags & NLM_F_DUMP_INTR != 0;
        match kind {
            NLMSG_ERROR | NLMSG_DONE => {
                check_status(body)?;
                page.last = true;
            }
            kind if kind == family => {
                page.has_device = true;
                for attribute in attributes(body.get(4..).ok_or(MALFORMED)?) {
                    match attribute? {
                        (WGDEVICE_A_IFINDEX, index) => {
                            let index = index.try_into().map_err(|_| MALFORMED)?;
                            page.ifindex = Some(u32::from_ne_bytes(index));
                        }
                        (WGDEVICE_A_PUBLIC_KEY, key) => page.own_key = Some(parse_key(key)?),
                        (WGDEVICE_A_PEERS, peers) => {
                            for peer in attributes(peers) {
                                page.peers.push(parse_peer(peer?.1)?);
                            }
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(page)
}

fn parse_peer(peer: &[u8]) -> Result<(PublicKey, usize), Errno> {
    let (mut key, mut allowed_ips) = (None, 0);
    for attribute in attributes(peer) {
        match attribute? {
            (WGPEER_A_PUBLIC_KEY, bytes) => key = Some(parse_key(bytes)?),
            (WGPEER_A_ALLOWEDIPS, nested) => allowed_ips += attributes(nested).count(),
            _ => {}
        }
    }
    Ok((key.ok_or(MALFORMED)?, allowed_ips))
}

fn parse_key(bytes: &[u8]) -> Result<PublicKey, Errno> {
    <[u8; 32]>::try_from(bytes)
        .map(PublicKey::from)
        .map_err(|_| MALFORMED)
}

/// `NLMSG_ERROR` and `NLMSG_DONE` begin with a status: zero, or a negative error number.
fn check_status(body: &[u8]) -> Result<(), Errno> {
    match body.first_chunk().map(|status| i32::from_ne_bytes(*status)) {
        Some(0) => Ok(()),
        Some(status) if status < 0 => Err(Errno::from_raw(status.saturating_neg())),
        _ => Err(MALFORMED),
    }
}

/// The messages of a datagram: type, flags, body.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<(u16, u16, &[u8]), Errno>> {
    records(datagram, |bytes| {
        let header = bytes.first_chunk::<16>()?;
        let [l0, l1, l2, l3, k0, k1, f0, f1, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let (kind, flags) = (u16::from_ne_bytes([k0, k1]), u16::from_ne_bytes([f0, f1]));
        Some((length, (kind, flags, bytes.get(16..length)?)))
    })
}

/// The attributes of a message, or those nested in an attribute: type, payload.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), Errno>> {
    records(bytes, |bytes| {
        let [l0, l1, k0, k1] = *bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let kind = u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK;
        Some((length, (kind, bytes.get(4..length)?)))
    })
}

/// Cuts records off `bytes`, each padded to 4 bytes. `split` gives the length of the first record,
/// header included, and what is in it; `None`, and with it the end, where it is malformed.
fn records<'a, T>(
    mut bytes: &'a [u8],
    split: impl Fn(&'a [u8]) -> Option<(usize, T)>,
) -> impl Iterator<Item = Result<T, Errno>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let record = split(bytes);
        let length = record.as_ref().map_or(bytes.len(), |(length, _)| *length);
        // The last record may lack its padding.
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(record.map(|(_, content)| content).ok_or(MALFORMED))
    })
}
