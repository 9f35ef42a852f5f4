//! The kernel's list of a device's peers, over generic netlink (netlink(7)): whole, or not at all.
//!
//! A dump comes in pages, split between peers and between the allowed IPs of one peer. The kernel
//! fills a page when the one before is received; where the device was changed meanwhile, the page
//! carries `NLM_F_DUMP_INTR` (`drivers/net/wireguard/netlink.c`, `genl_dump_check_consistent`): the
//! dump then may lack peers or allowed IPs and has to be started again. So a dump is whole when its
//! end has come and none of its messages carries the flag.
//!
//! The pages also hold the device's private key and the peers' preshared keys. These are never looked
//! at: they leave the buffer for nowhere.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    setsockopt, socket, sockopt,
};

use super::{AllowedIp, DeviceName, Peer, PublicKey, Snapshot};

/// `linux/netlink.h`: types and flags of messages, and of attributes.
const NLM_F_REQUEST: u16 = 0x01;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x100 | 0x200; // NLM_F_ROOT | NLM_F_MATCH
const NLMSG_ERROR: u16 = 0x2;
const NLMSG_DONE: u16 = 0x3;
const NLA_TYPE_MASK: u16 = !(1 << 15 | 1 << 14); // without the flags for nested and byte order

/// `linux/genetlink.h`: the controller, which knows the numbers of the families.
const GENL_ID_CTRL: u16 = 0x10; // NLMSG_MIN_TYPE
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// `linux/wireguard.h`
const WG_GENL_NAME: &str = "wireguard";
const WG_CMD_GET_DEVICE: u8 = 0;
const WGDEVICE_A_IFNAME: u16 = 2;
const WGDEVICE_A_PUBLIC_KEY: u16 = 4;
const WGDEVICE_A_PEERS: u16 = 8;
const WGPEER_A_PUBLIC_KEY: u16 = 1;
const WGPEER_A_LAST_HANDSHAKE_TIME: u16 = 6;
const WGPEER_A_RX_BYTES: u16 = 7;
const WGPEER_A_TX_BYTES: u16 = 8;
const WGPEER_A_ALLOWEDIPS: u16 = 9;
const WGALLOWEDIP_A_IPADDR: u16 = 2;
const WGALLOWEDIP_A_CIDR_MASK: u16 = 3;

/// A malformed answer; the kernel does not send any.
const MALFORMED: Errno = Errno::EBADMSG;

/// The kernel fills the pages of a dump as far as the reader's buffer goes, up to this
/// (`netlink_dump`).
const PAGE: usize = 32 * 1024;

/// Holds the smallest page that the kernel makes (`NLMSG_GOODSIZE`).
const SMALL_PAGE: usize = 8 * 1024;

/// The device and all its peers; `None` where the dump was disturbed. Fails as [`own_key`], and with
/// `EAGAIN` when the deadline has passed.
pub(super) fn snapshot(device: &DeviceName, deadline: Instant) -> Result<Option<Snapshot>, Errno> {
    let mut dump = Dump::open(PAGE)?;
    dump.start(device)?;
    let mut report = Report::default();
    while !report.complete {
        // The kernel has the next page ready: without this, a long dump would not end here.
        if Instant::now() >= deadline {
            return Err(Errno::EAGAIN);
        }
        report.read_page(dump.receive(MsgFlags::empty())?)?;
        if report.interrupted {
            return Ok(None);
        }
    }
    Ok(Some(report.snapshot))
}

/// The public key of the device, if it has one. That costs only the first page of a dump, as small as the
/// kernel makes it: the kernel fills the next page when one is received, so this one is looked at with
/// `MSG_PEEK`, in a receive buffer that has no room for a second. `ENOENT`: the kernel has no WireGuard
/// module, `ENODEV`: no such device, `EOPNOTSUPP`: it is not WireGuard, `EPERM`: no privilege.
pub(super) fn own_key(device: &DeviceName) -> Result<Option<PublicKey>, Errno> {
    let mut dump = Dump::open(SMALL_PAGE)?;
    setsockopt(&dump.socket, sockopt::RcvBuf, &0)?;
    dump.start(device)?;
    let key = first(dump.receive(MsgFlags::MSG_PEEK)?, WGDEVICE_A_PUBLIC_KEY)?;
    key.map(|key| array(key).map(PublicKey::from)).transpose()
}

/// A dump under way, on a socket of its own: on a shared one, what is left of a dump that was given up would
/// be taken for the beginning of the next.
struct Dump {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Dump {
    fn open(page: usize) -> Result<Self, Errno> {
        let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
        let socket = socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkGeneric)?;
        // Connected to the kernel, it takes nothing from other processes (`netlink_getsockbyportid`).
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket, buffer: vec![0; page] })
    }

    fn start(&mut self, device: &DeviceName) -> Result<(), Errno> {
        let name = (CTRL_ATTR_FAMILY_NAME, WG_GENL_NAME);
        self.send(GENL_ID_CTRL, NLM_F_REQUEST, CTRL_CMD_GETFAMILY, name)?;
        let family = first(self.receive(MsgFlags::empty())?, CTRL_ATTR_FAMILY_ID)?;
        let family = u16::from_ne_bytes(array(family.ok_or(MALFORMED)?)?);
        let name = (WGDEVICE_A_IFNAME, device.0.as_str());
        self.send(family, NLM_F_REQUEST | NLM_F_DUMP, WG_CMD_GET_DEVICE, name)
    }

    fn send(&self, kind: u16, flags: u16, command: u8, name: (u16, &str)) -> Result<(), Errno> {
        let bytes = request(kind, flags, command, name);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::empty()).map(drop)
    }

    /// The next page. The kernel has it ready: it does what it is asked while it is sent the request.
    fn receive(&mut self, flags: MsgFlags) -> Result<&[u8], Errno> {
        // With MSG_TRUNC the length is that of the datagram, were it larger than the buffer.
        let flags = flags | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let length = recv(self.socket.as_raw_fd(), &mut self.buffer, flags)?;
        self.buffer.get(..length).ok_or(MALFORMED)
    }
}

impl Drop for Dump {
    /// Keys should not stay in freed memory. `black_box` keeps the compiler from leaving the work out;
    /// it does not promise to.
    fn drop(&mut self) {
        self.buffer.fill(0);
        std::hint::black_box(&mut self.buffer);
    }
}

/// A request with one attribute, a text, which ends with a zero. Sequence number and port stay zero.
fn request(kind: u16, flags: u16, command: u8, (attribute, text): (u16, &str)) -> Vec<u8> {
    // Texts are names of at most 15 bytes.
    let length = u16::try_from(4 + text.len() + 1).unwrap_or(u16::MAX);
    let mut bytes = Vec::from(u32::from((16 + 4 + length).next_multiple_of(4)).to_ne_bytes());
    bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].as_flattened());
    bytes.extend([0; 8]);
    bytes.extend([command, 1, 0, 0]);
    bytes.extend([length.to_ne_bytes(), attribute.to_ne_bytes()].as_flattened());
    bytes.extend(text.bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An attribute of the first message of an answer, unless that is a refusal.
fn first(datagram: &[u8], attribute: u16) -> Result<Option<&[u8]>, Errno> {
    let (kind, _, body) = messages(datagram).next().ok_or(MALFORMED)??;
    if kind == NLMSG_ERROR || kind == NLMSG_DONE {
        check_status(body)?;
    }
    let mut attributes = attributes(body.get(4..).ok_or(MALFORMED)?).flatten();
    Ok(attributes.find(|(kind, _)| *kind == attribute).map(|(_, content)| content))
}

/// What the pages say so far.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Report {
    /// The device and the peers of the pages so far.
    pub snapshot: Snapshot,
    /// The device was changed between two pages.
    pub interrupted: bool,
    /// The dump has come to its end.
    pub complete: bool,
}

impl Report {
    /// Takes the next page.
    ///
    /// # Errors
    /// The kernel's refusal, or `EBADMSG` where the page is malformed.
    pub fn read_page(&mut self, datagram: &[u8]) -> Result<(), Errno> {
        for message in messages(datagram) {
            let (kind, flags, body) = message?;
            self.interrupted |= flags & NLM_F_DUMP_INTR != 0;
            match kind {
                NLMSG_DONE => {
                    check_status(body)?;
                    self.complete = true;
                }
                // A refusal; an acknowledgement was not asked for.
                NLMSG_ERROR => return check_status(body).and(Err(MALFORMED)),
                _ => self.read_device(body.get(4..).ok_or(MALFORMED)?)?,
            }
        }
        Ok(())
    }

    fn read_device(&mut self, device: &[u8]) -> Result<(), Errno> {
        for attribute in attributes(device) {
            match attribute? {
                (WGDEVICE_A_PUBLIC_KEY, key) => self.snapshot.own_key = Some(array(key)?.into()),
                (WGDEVICE_A_PEERS, peers) => {
                    for peer in attributes(peers) {
                        self.add(parse_peer(peer?.1)?);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A peer whose allowed IPs go on in another message has nothing else there but its key.
    fn add(&mut self, peer: Peer) {
        match self.snapshot.peers.last_mut() {
            Some(last) if last.public_key == peer.public_key => {
                last.allowed_ips.extend(peer.allowed_ips);
            }
            _ => self.snapshot.peers.push(peer),
        }
    }
}

fn parse_peer(peer: &[u8]) -> Result<Peer, Errno> {
    let mut public_key = None;
    let (mut rx_bytes, mut tx_bytes, mut last_handshake) = (0, 0, None);
    let mut allowed_ips = Vec::new();
    for attribute in attributes(peer) {
        match attribute? {
            (WGPEER_A_PUBLIC_KEY, bytes) => public_key = Some(array(bytes)?.into()),
            (WGPEER_A_LAST_HANDSHAKE_TIME, bytes) => last_handshake = parse_time(bytes)?,
            (WGPEER_A_RX_BYTES, bytes) => rx_bytes = u64::from_ne_bytes(array(bytes)?),
            (WGPEER_A_TX_BYTES, bytes) => tx_bytes = u64::from_ne_bytes(array(bytes)?),
            (WGPEER_A_ALLOWEDIPS, nested) => {
                // A vector that grows has room for four: too much for a hundred thousand peers.
                allowed_ips.reserve_exact(attributes(nested).count());
                for allowed_ip in attributes(nested) {
                    allowed_ips.push(parse_allowed_ip(allowed_ip?.1)?);
                }
            }
            _ => {}
        }
    }
    let public_key = public_key.ok_or(MALFORMED)?;
    Ok(Peer { public_key, allowed_ips, last_handshake, rx_bytes, tx_bytes })
}

fn parse_allowed_ip(allowed_ip: &[u8]) -> Result<AllowedIp, Errno> {
    let (mut address, mut prefix_len) = (None, None);
    for attribute in attributes(allowed_ip) {
        match attribute? {
            (WGALLOWEDIP_A_IPADDR, bytes) => address = parse_address(bytes),
            (WGALLOWEDIP_A_CIDR_MASK, &[bits]) => prefix_len = Some(bits),
            _ => {}
        }
    }
    AllowedIp::new(address.ok_or(MALFORMED)?, prefix_len.ok_or(MALFORMED)?).ok_or(MALFORMED)
}

fn parse_address(bytes: &[u8]) -> Option<IpAddr> {
    array::<4>(bytes).map(IpAddr::from).or_else(|_| array::<16>(bytes).map(IpAddr::from)).ok()
}

/// Seconds and nanoseconds since 1970; zero for never.
fn parse_time(bytes: &[u8]) -> Result<Option<SystemTime>, Errno> {
    let (seconds, nanoseconds) = bytes.split_at_checked(8).ok_or(MALFORMED)?;
    let seconds = Duration::from_secs(u64::from_ne_bytes(array(seconds)?));
    let nanoseconds = Duration::from_nanos(u64::from_ne_bytes(array(nanoseconds)?));
    let since = seconds.checked_add(nanoseconds).ok_or(MALFORMED)?;
    Ok(SystemTime::UNIX_EPOCH.checked_add(since).filter(|_| !since.is_zero()))
}

fn array<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Errno> {
    bytes.try_into().map_err(|_| MALFORMED)
}

/// `NLMSG_ERROR` and `NLMSG_DONE` begin with a status: zero, or a negative error number.
fn check_status(body: &[u8]) -> Result<(), Errno> {
    match body.first_chunk().map(|status| i32::from_ne_bytes(*status)) {
        Some(0) => Ok(()),
        Some(status) if status < 0 => Err(Errno::from_raw(status.saturating_neg())),
        _ => Err(MALFORMED),
    }
}

/// The messages of a datagram: type, flags, payload.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<(u16, u16, &[u8]), Errno>> {
    records(datagram, |bytes| {
        let [l0, l1, l2, l3, k0, k1, f0, f1, ..] = *bytes.first_chunk::<16>()?;
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
        Some((length, (u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, bytes.get(4..length)?)))
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
    use nix::sys::socket::{getsockname, sendto};
    use std::os::unix::fs::FileExt;

    fn parse_family(datagram: &[u8]) -> Result<u16, Errno> {
        let family = first(datagram, CTRL_ATTR_FAMILY_ID)?.ok_or(MALFORMED)?;
        array(family).map(u16::from_ne_bytes)
    }

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

    /// With both flags that an attribute's type may have.
    fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
        attribute(kind | 0xc000, &attributes.concat())
    }

    fn allowed_ip(address: &[u8], prefix_len: u8) -> Vec<u8> {
        let family = if address.len() == 4 { 2_u16 } else { 10 };
        nested(
            0,
            &[
                attribute(WGALLOWEDIP_A_CIDR_MASK, &[prefix_len]),
                attribute(1, &family.to_ne_bytes()),
                attribute(WGALLOWEDIP_A_IPADDR, address),
            ],
        )
    }

    fn peer(key: u8, times: [u64; 4], allowed_ips: &[Vec<u8>]) -> Vec<u8> {
        let [seconds, nanoseconds, rx, tx] = times.map(u64::to_ne_bytes);
        nested(
            0,
            &[
                attribute(WGPEER_A_PUBLIC_KEY, &[key; 32]),
                attribute(2, &[0; 32]),
                attribute(WGPEER_A_LAST_HANDSHAKE_TIME, &[seconds, nanoseconds].concat()),
                attribute(WGPEER_A_TX_BYTES, &tx),
                attribute(WGPEER_A_RX_BYTES, &rx),
                nested(WGPEER_A_ALLOWEDIPS, allowed_ips),
            ],
        )
    }

    fn first_page() -> Vec<u8> {
        let peers = [
            peer(1, [0; 4], &[]),
            peer(2, [1_640_698_264, 5, 7, 9], &[allowed_ip(&[10, 0, 0, 0], 8)]),
        ];
        device(
            2,
            &[
                attribute(1, &7_u32.to_ne_bytes()),
                attribute(WGDEVICE_A_IFNAME, b"wg0\0"),
                attribute(3, &[9; 32]),
                attribute(WGDEVICE_A_PUBLIC_KEY, &[8; 32]),
                nested(WGDEVICE_A_PEERS, &peers),
            ],
        )
    }

    /// A later message for a peer has its key and more allowed IPs.
    fn last_page() -> Vec<u8> {
        let ips = nested(WGPEER_A_ALLOWEDIPS, &[allowed_ip(&[0xfd; 16], 128)]);
        let rest = nested(0, &[attribute(WGPEER_A_PUBLIC_KEY, &[2; 32]), ips]);
        let device = device(2, &[nested(WGDEVICE_A_PEERS, &[rest, peer(3, [0; 4], &[])])]);
        [device, message(NLMSG_DONE, 2, &[0; 4])].concat()
    }

    fn read(pages: &[Vec<u8>]) -> Result<Report, Errno> {
        let mut report = Report::default();
        pages.iter().try_for_each(|page| report.read_page(page))?;
        Ok(report)
    }

    #[test]
    fn a_dump_in_two_pages() {
        let report = read(&[first_page(), last_page()]).unwrap();
        let nobody = |key| Peer {
            public_key: [key; 32].into(),
            allowed_ips: vec![],
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        let fd = "fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd/128";
        let second = Peer {
            allowed_ips: ["10.0.0.0/8", fd].map(|ip| ip.parse().unwrap()).to_vec(),
            last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::new(1_640_698_264, 5)),
            rx_bytes: 7,
            tx_bytes: 9,
            ..nobody(2)
        };
        let expected = Report {
            snapshot: Snapshot {
                own_key: Some([8; 32].into()),
                peers: vec![nobody(1), second, nobody(3)],
            },
            interrupted: false,
            complete: true,
        };
        assert_eq!(report, expected);
        // Where only the own key is wanted, the first page has it.
        assert_eq!(read(&[first_page()]).unwrap().snapshot.own_key, Some([8; 32].into()));
        assert!(!read(&[first_page()]).unwrap().complete);
    }

    #[test]
    fn disturbed_and_foreign_messages() {
        // Disturbed, and without peers, because the one at the cursor was removed.
        let report = read(&[device(2 | NLM_F_DUMP_INTR, &[])]).unwrap();
        assert!(report.interrupted && !report.complete);
        let report = read(&[message(NLMSG_DONE, 2 | NLM_F_DUMP_INTR, &[0; 4])]).unwrap();
        assert!(report.interrupted && report.complete);
        // An acknowledgement is no end.
        assert_eq!(read(&[first_page(), message(NLMSG_ERROR, 0, &[0; 4])]), Err(MALFORMED));
        assert_eq!(read(&[vec![]]), Ok(Report::default()));
    }

    /// What Linux 6.1 on a little-endian machine tells of a device with two peers: one with a preshared
    /// key (here 0xdd…), an endpoint and a keepalive. The device's private key is 0xee….
    const REAL: &str = "\
         1002000020000200020000006b000000000100000600060032c40000080007000000000008000100030000000b00\
         0200743130377831000024000300eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee\
         240004004afaab286258b534ba645ab4a718b8592265466fd3a8fca300e9205e48d7952e90010880e40000802400\
         0100010000000707070707070707070707070707070707070707070707070707070724000200dddddddddddddddd\
         dddddddddddddddddddddddddddddddddddddddddddddddd14000600000000000000000000000000000000000600\
         0500190000000c00080094000000000000000c000700000000000000000008000a00010000001400040002000009\
         7f0000010000000000000000480009801c00008005000300080000000600010002000000080002000a0000002800\
         00800500030040000000060001000a00000014000200fd000000000000000000000000000000a800008024000100\
         02000000070707070707070707070707070707070707070707070707070707072400020000000000000000000000\
         00000000000000000000000000000000000000000000140006000000000000000000000000000000000006000500\
         000000000c00080000000000000000000c000700000000000000000008000a0001000000200009801c0000800500\
         0300200000000600010002000000080002000a0100021400000003000200020000006b00000000000000";

    #[cfg(target_endian = "little")]
    #[test]
    fn a_dump_of_a_real_device() {
        let digit_pairs = REAL.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
        let page: Vec<u8> = digit_pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect();
        let mut report = Report::default();
        report.read_page(&page).unwrap();
        let own_key = "SvqrKGJYtTS6ZFq0pxi4WSJlRm/TqPyjAOkgXkjXlS4=".parse().unwrap();
        let peer = |number, tx_bytes, allowed_ips: &[&str]| {
            let mut key = [7; 32];
            key[..4].copy_from_slice(&[number, 0, 0, 0]);
            let allowed_ips = allowed_ips.iter().map(|ip| ip.parse().unwrap()).collect();
            Peer {
                public_key: key.into(),
                allowed_ips,
                last_handshake: None,
                rx_bytes: 0,
                tx_bytes,
            }
        };
        let peers = [peer(1, 148, &["10.0.0.0/8", "fd00::/64"]), peer(2, 0, &["10.1.0.2/32"])];
        let snapshot = Snapshot { own_key: Some(own_key), peers: peers.into() };
        let expected = Report { snapshot, interrupted: false, complete: true };
        assert_eq!(report, expected);
        assert!(!format!("{report:?}").contains("238, 238"), "the private key");
        cut_and_changed(&page);
    }

    /// Cut anywhere, or with any byte changed, it is parsed or refused, and never a panic.
    fn cut_and_changed(page: &[u8]) {
        for end in 0..page.len() {
            let _ = Report::default().read_page(&page[..end]);
            for value in [0, 1, 0x7f, 0x80, 0xff, !page[end]] {
                let mut changed = page.to_vec();
                changed[end] = value;
                let _ = Report::default().read_page(&changed);
            }
        }
    }

    #[test]
    fn refusals() {
        for errno in [Errno::ENODEV, Errno::EPERM, Errno::EOPNOTSUPP] {
            let status = (-(errno as i32)).to_ne_bytes();
            for kind in [NLMSG_ERROR, NLMSG_DONE] {
                let refusal = message(kind, 0, &[&status[..], &[0; 20]].concat());
                assert_eq!(read(std::slice::from_ref(&refusal)), Err(errno));
                assert!(kind == NLMSG_DONE || parse_family(&refusal) == Err(errno));
            }
        }
    }

    #[test]
    fn malformed() {
        let peers = |attributes: &[Vec<u8>]| {
            device(0, &[nested(WGDEVICE_A_PEERS, &[nested(0, attributes)])])
        };
        let key = || attribute(WGPEER_A_PUBLIC_KEY, &[1; 32]);
        let ip = |ip: Vec<u8>| peers(&[key(), nested(WGPEER_A_ALLOWEDIPS, &[ip])]);
        let short = [
            device(0, &[attribute(WGDEVICE_A_PUBLIC_KEY, &[0; 31])]),
            peers(&[]),
            peers(&[attribute(WGPEER_A_PUBLIC_KEY, &[0; 33])]),
            peers(&[key(), attribute(WGPEER_A_RX_BYTES, &[0; 4])]),
            peers(&[key(), attribute(WGPEER_A_LAST_HANDSHAKE_TIME, &[1; 15])]),
            peers(&[key(), attribute(WGPEER_A_LAST_HANDSHAKE_TIME, &[0xff; 16])]),
            ip(allowed_ip(&[10, 0, 0, 1], 33)),
            ip(allowed_ip(&[10, 0, 0], 8)),
            ip(nested(0, &[attribute(WGALLOWEDIP_A_IPADDR, &[0; 4])])),
            ip(nested(0, &[attribute(WGALLOWEDIP_A_CIDR_MASK, &[0])])),
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
            assert_eq!(read(std::slice::from_ref(&bytes)), Err(MALFORMED), "{bytes:?}");
        }
        for page in [first_page(), last_page()] {
            cut_and_changed(&page);
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
        let attributes: Vec<_> = attributes(&body[4..]).map(Result::unwrap).collect();
        assert_eq!(attributes, [(2, &b"wg-15-bytes-xyz\0"[..])]);
    }

    #[test]
    fn keys_do_not_stay_in_freed_memory() {
        let mut dump = Dump::open(PAGE).unwrap();
        dump.buffer.fill(0xee);
        let middle = dump.buffer[PAGE / 2..].as_ptr().addr() as u64;
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        let read = || {
            let mut bytes = [0; 32];
            memory.read_exact_at(&mut bytes, middle).map(|()| bytes)
        };
        assert_eq!(read().unwrap(), [0xee; 32]);
        drop(dump);
        // It may be used for something else by now, or be nobody's.
        assert!(!read().is_ok_and(|bytes| bytes == [0xee; 32]));
    }

    /// The controller, which every kernel has, answers; a page that does not fit is refused.
    #[test]
    fn this_kernel() {
        let mut dump = Dump::open(1024).unwrap();
        for (name, expected) in [("nlctrl", Ok(GENL_ID_CTRL)), ("nobody", Err(Errno::ENOENT))] {
            let name = (CTRL_ATTR_FAMILY_NAME, name);
            dump.send(GENL_ID_CTRL, NLM_F_REQUEST, CTRL_CMD_GETFAMILY, name).unwrap();
            assert_eq!(parse_family(dump.receive(MsgFlags::empty()).unwrap()), expected);
        }
        assert_eq!(dump.receive(MsgFlags::empty()), Err(Errno::EAGAIN));
        dump.buffer.truncate(40);
        let name = (CTRL_ATTR_FAMILY_NAME, "nlctrl");
        dump.send(GENL_ID_CTRL, NLM_F_REQUEST, CTRL_CMD_GETFAMILY, name).unwrap();
        assert_eq!(dump.receive(MsgFlags::empty()), Err(MALFORMED));
        // Nobody else is listened to.
        let address = getsockname::<NetlinkAddr>(dump.socket.as_raw_fd()).unwrap();
        let forged = request(FAMILY, 0, CTRL_CMD_GETFAMILY, name);
        let other = Dump::open(0).unwrap();
        let sent = sendto(other.socket.as_raw_fd(), &forged, &address, MsgFlags::empty());
        // EPERM: not even allowed to try, without CAP_NET_ADMIN.
        assert!(matches!(sent, Err(Errno::ECONNREFUSED | Errno::EPERM)), "{sent:?}");
        assert_eq!(dump.receive(MsgFlags::empty()), Err(Errno::EAGAIN));
    }
}
