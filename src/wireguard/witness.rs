//! The witness of a kernel dump: a second dump of the same device, begun before the first and read
//! after it, which tells whether the device changed meanwhile.
//!
//! A dump comes in pages. The kernel fills page 1 when the dump is asked for, and each further page
//! when the one before it is received; a page before which the device was changed carries
//! `NLM_F_DUMP_INTR` (`drivers/net/wireguard/netlink.c`, `nl_dump_check_consistent`). So a witness
//! whose page 2 comes without the flag proves that nothing changed between its [`Witness::begin`]
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
    /// Makes ready; the dump begins with [`Witness::begin`]. `ENOENT` means that the kernel has no
    /// WireGuard module.
    pub(super) fn open(deadline: Instant) -> Result<Self, Errno> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )?;
        let mut witness = Self { socket, family: GENL_ID_CTRL, deadline };
        let name = (CTRL_ATTR_FAMILY_NAME, "wireguard");
        witness.send(&request(GENL_ID_CTRL, NLM_F_REQUEST, CTRL_CMD_GETFAMILY, name))?;
        witness.family = parse_family(&witness.receive()?)?;
        Ok(witness)
    }

    /// Begins the dump. What is wrong with the device is told by the first page.
    pub(super) fn begin(&self, device: &DeviceName) -> Result<(), Errno> {
        let name = (WGDEVICE_A_IFNAME, device.as_str());
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        self.send(&request(self.family, flags, WG_CMD_GET_DEVICE, name))
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
        setsockopt(&self.socket, sockopt::ReceiveTimeout, &TimeVal::microseconds(left))?;
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
    <[u8; 32]>::try_from(bytes).map(PublicKey::from).map_err(|_| MALFORMED)
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

#[cfg(test)]
mod tests {
    use super::*;

    const FAMILY: u16 = 0x1d;

    fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + payload.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut bytes = Vec::from(length.to_ne_bytes());
        bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        bytes.extend([0; 8]);
        bytes.extend(body);
        bytes
    }

    fn device(flags: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
        message(FAMILY, flags, &[&[0, 1, 0, 0], attributes.concat().as_slice()].concat())
    }

    fn peer(key: u8, allowed_ips: usize) -> Vec<u8> {
        let ips = attribute(1, &[0; 2]).repeat(allowed_ips);
        let ips = attribute(WGPEER_A_ALLOWEDIPS | 0x8000, &ips);
        attribute(0x8000, &[attribute(WGPEER_A_PUBLIC_KEY, &[key; 32]), ips].concat())
    }

    fn full_page() -> Vec<u8> {
        let peers = [peer(1, 0), peer(2, 3)].concat();
        let device = device(
            2,
            &[
                attribute(WGDEVICE_A_IFINDEX, &7_u32.to_ne_bytes()),
                attribute(WGDEVICE_A_IFNAME, b"wg0\0"),
                attribute(3, &[9; 32]),
                attribute(WGDEVICE_A_PUBLIC_KEY, &[8; 32]),
                attribute(WGDEVICE_A_PEERS | 0x8000, &peers),
            ],
        );
        [device, message(NLMSG_DONE, 2, &[0; 4])].concat()
    }

    #[test]
    fn pages() {
        let page = parse_page(&full_page(), FAMILY).unwrap();
        let expected = Page {
            ifindex: Some(7),
            own_key: Some([8; 32].into()),
            peers: vec![([1; 32].into(), 0), ([2; 32].into(), 3)],
            has_device: true,
            interrupted: false,
            last: true,
        };
        assert_eq!(page, expected);

        // Disturbed; without peers, because the one at the cursor was removed.
        let page = parse_page(&device(2 | NLM_F_DUMP_INTR, &[]), FAMILY).unwrap();
        assert!(page.interrupted && page.has_device && !page.last);
        let page = parse_page(&message(NLMSG_DONE, 2, &[0; 4]), FAMILY).unwrap();
        assert!(page.last && !page.has_device && !page.interrupted);
        // Other families' messages say nothing.
        assert_eq!(parse_page(&message(FAMILY + 1, 2, &[1; 3]), FAMILY), Ok(Page::default()));
        assert_eq!(parse_page(&[], FAMILY), Ok(Page::default()));
    }

    #[test]
    fn refusals() {
        for errno in [Errno::ENODEV, Errno::EPERM, Errno::EOPNOTSUPP] {
            let status = (-(errno as i32)).to_ne_bytes();
            for kind in [NLMSG_ERROR, NLMSG_DONE] {
                let refusal = message(kind, 0, &[&status[..], &[0; 20]].concat());
                assert_eq!(parse_page(&refusal, FAMILY), Err(errno));
                assert_eq!(parse_family(&refusal), Err(errno));
            }
        }
    }

    #[test]
    fn families() {
        let family = |id: &[u8]| {
            let name = attribute(CTRL_ATTR_FAMILY_NAME, b"wireguard\0");
            let body = [vec![1, 2, 0, 0], name, attribute(CTRL_ATTR_FAMILY_ID, id)].concat();
            parse_family(&message(GENL_ID_CTRL, 0, &body))
        };
        assert_eq!(family(&FAMILY.to_ne_bytes()), Ok(FAMILY));
        assert_eq!(family(&[1]), Err(MALFORMED));
        assert_eq!(parse_family(&message(GENL_ID_CTRL, 0, &[1, 2, 0, 0])), Err(MALFORMED));
        assert_eq!(parse_family(&[]), Err(MALFORMED));
    }

    #[test]
    fn requests() {
        let bytes = request(FAMILY, NLM_F_REQUEST, 3, (2, "wg-15-bytes-xyz"));
        let (kind, flags, body) = messages(&bytes).next().unwrap().unwrap();
        assert_eq!((bytes.len() % 4, kind, flags, &body[..4]), (0, FAMILY, 1, &[3, 1, 0, 0][..]));
        let attributes: Vec<_> = attributes(&body[4..]).collect();
        assert_eq!(attributes, [Ok((2, &b"wg-15-bytes-xyz\0"[..]))]);
    }

    #[test]
    fn malformed() {
        let short = [
            device(0, &[attribute(WGDEVICE_A_IFINDEX, &[0; 3])]),
            device(0, &[attribute(WGDEVICE_A_PUBLIC_KEY, &[0; 31])]),
            device(0, &[attribute(WGDEVICE_A_PEERS, &attribute(0, &attribute(1, &[0; 33])))]),
            device(0, &[attribute(WGDEVICE_A_PEERS, &attribute(0, &[]))]),
            device(0, &[vec![3, 0, 8, 0]]), // shorter than its header
            device(0, &[vec![0, 0, 0, 0]]), // would go on for ever
            device(0, &[vec![255, 255, 8, 0]]), // longer than the message
            device(0, &[vec![4, 0]]),
            message(FAMILY, 0, &[0; 3]),
            message(NLMSG_DONE, 0, &[0; 3]),
            message(NLMSG_ERROR, 0, &1_i32.to_ne_bytes()),
            vec![0; 15],
            vec![0; 16],
            [15_u32.to_ne_bytes(), [0; 4], [0; 4], [0; 4]].concat(),
            [u32::MAX.to_ne_bytes(), [0; 4], [0; 4], [0; 4]].concat(),
        ];
        for bytes in short {
            assert_eq!(parse_page(&bytes, FAMILY), Err(MALFORMED), "{bytes:?}");
        }
        // Cut anywhere, or with any byte changed, it is parsed or refused, and never a panic.
        let full = full_page();
        for end in 0..full.len() {
            let _ = parse_page(&full[..end], FAMILY);
            let _ = parse_family(&full[..end]);
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = full.clone();
                changed[end] = value;
                let _ = parse_page(&changed, FAMILY);
            }
        }
    }
}
