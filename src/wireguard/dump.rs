//! The kernel's dump of a WireGuard device, over generic netlink: asked for, read to its end, judged.
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
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;

use super::netlink::{MALFORMED, Message, Request, Socket, attributes, check_status, messages};
use super::uapi::{
    NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, WG_CMD_GET_DEVICE, WGALLOWEDIP_A_CIDR_MASK,
    WGALLOWEDIP_A_IPADDR, WGDEVICE_A_IFNAME, WGDEVICE_A_PEERS, WGDEVICE_A_PUBLIC_KEY,
    WGPEER_A_ALLOWEDIPS, WGPEER_A_LAST_HANDSHAKE_TIME, WGPEER_A_PUBLIC_KEY, WGPEER_A_RX_BYTES,
    WGPEER_A_TX_BYTES,
};
use super::{AllowedIp, DeviceName, Peer, Peers, PublicKey, Snapshot};

/// What the pages say so far.
#[derive(Default, PartialEq, Eq, Debug)]
struct Report {
    own_key: Option<PublicKey>,
    peers: Peers,
    /// The device was changed between two pages.
    interrupted: bool,
    /// The dump has come to its end.
    complete: bool,
}

/// The device and all its peers; `None` where the dump was disturbed. `ENOENT`: the kernel has no
/// WireGuard module, `ENODEV`: no such device, `EOPNOTSUPP`: it is not WireGuard, `EPERM`: no
/// privilege, `EAGAIN`: the deadline has passed.
pub(super) fn snapshot(device: &DeviceName, deadline: Instant) -> Result<Option<Snapshot>, Errno> {
    let mut socket = Socket::open(deadline)?;
    socket.dump(request(device))?;
    let family = socket.family();
    let mut report = Report::default();
    while !report.complete {
        // The kernel has the next page ready: without this, a long dump would not end here.
        if Instant::now() >= deadline {
            return Err(Errno::EAGAIN);
        }
        report.read_page(socket.receive()?, family)?;
        if report.interrupted {
            return Ok(None);
        }
    }
    Ok(Some(Snapshot { own_key: report.own_key, peers: report.peers }))
}

/// Public key of the device, if it has one. Fails as [`snapshot`].
pub(super) fn own_key(device: &DeviceName, deadline: Instant) -> Result<Option<PublicKey>, Errno> {
    let mut socket = Socket::open(deadline)?;
    let family = socket.family();
    let mut report = Report::default();
    report.read_page(socket.first_page(request(device))?, family)?;
    Ok(report.own_key)
}

fn request(device: &DeviceName) -> Request {
    let mut request = Request::new(WG_CMD_GET_DEVICE);
    request.text(WGDEVICE_A_IFNAME, device.as_str());
    request
}

impl Report {
    fn read_page(&mut self, datagram: &[u8], family: u16) -> Result<(), Errno> {
        for message in messages(datagram) {
            let Message { kind, flags, body, .. } = message?;
            self.interrupted |= flags & NLM_F_DUMP_INTR != 0;
            match kind {
                NLMSG_DONE => {
                    check_status(body)?;
                    self.complete = true;
                }
                // A refusal; an acknowledgement was not asked for.
                NLMSG_ERROR => return check_status(body).and(Err(MALFORMED)),
                kind if kind == family => {
                    for attribute in attributes(body.get(4..).ok_or(MALFORMED)?) {
                        match attribute? {
                            (WGDEVICE_A_PUBLIC_KEY, key) => self.own_key = Some(parse_key(key)?),
                            (WGDEVICE_A_PEERS, peers) => {
                                for peer in attributes(peers) {
                                    self.add(&parse_peer(peer?.1)?);
                                }
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A peer whose allowed IPs go on in another message has nothing else there but its key.
    fn add(&mut self, peer: &Peer) {
        if !self.peers.extend_last(&peer.public_key, &peer.allowed_ips) {
            self.peers.push(peer);
        }
    }
}

fn parse_peer(peer: &[u8]) -> Result<Peer<'static>, Errno> {
    let mut public_key = None;
    let (mut rx_bytes, mut tx_bytes, mut last_handshake) = (0, 0, None);
    let mut allowed_ips = Vec::new();
    for attribute in attributes(peer) {
        match attribute? {
            (WGPEER_A_PUBLIC_KEY, bytes) => public_key = Some(parse_key(bytes)?),
            (WGPEER_A_LAST_HANDSHAKE_TIME, bytes) => last_handshake = parse_time(bytes)?,
            (WGPEER_A_RX_BYTES, bytes) => rx_bytes = parse_u64(bytes)?,
            (WGPEER_A_TX_BYTES, bytes) => tx_bytes = parse_u64(bytes)?,
            (WGPEER_A_ALLOWEDIPS, nested) => {
                for allowed_ip in attributes(nested) {
                    allowed_ips.push(parse_allowed_ip(allowed_ip?.1)?);
                }
            }
            _ => {}
        }
    }
    let public_key = public_key.ok_or(MALFORMED)?;
    Ok(Peer { public_key, allowed_ips: allowed_ips.into(), last_handshake, rx_bytes, tx_bytes })
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
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// Seconds and nanoseconds since 1970; zero for never.
fn parse_time(bytes: &[u8]) -> Result<Option<SystemTime>, Errno> {
    let (seconds, nanoseconds) = bytes.split_at_checked(8).ok_or(MALFORMED)?;
    let (seconds, nanoseconds) = (parse_u64(seconds)?, parse_u64(nanoseconds)?);
    if (seconds, nanoseconds) == (0, 0) {
        return Ok(None);
    }
    let nanoseconds = u32::try_from(nanoseconds).map_err(|_| MALFORMED)?;
    let since = Duration::from_secs(seconds).checked_add(Duration::from_nanos(nanoseconds.into()));
    Ok(SystemTime::UNIX_EPOCH.checked_add(since.ok_or(MALFORMED)?))
}

fn parse_u64(bytes: &[u8]) -> Result<u64, Errno> {
    bytes.try_into().map(u64::from_ne_bytes).map_err(|_| MALFORMED)
}

fn parse_key(bytes: &[u8]) -> Result<PublicKey, Errno> {
    <[u8; 32]>::try_from(bytes).map(PublicKey::from).map_err(|_| MALFORMED)
}

#[cfg(test)]
mod tests {
    use super::super::netlink::tests::{FAMILY, attribute, message};
    use super::*;

    fn device(flags: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
        message(FAMILY, flags, &[&[0, 1, 0, 0], attributes.concat().as_slice()].concat())
    }

    fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
        attribute(kind | 0x8000, &attributes.concat())
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
        pages.iter().try_for_each(|page| report.read_page(page, FAMILY))?;
        Ok(report)
    }

    #[test]
    fn a_dump_in_two_pages() {
        let report = read(&[first_page(), last_page()]).unwrap();
        let nobody = |key| Peer {
            public_key: [key; 32].into(),
            allowed_ips: vec![].into(),
            last_handshake: None,
            rx_bytes: 0,
            tx_bytes: 0,
        };
        let fd = "fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd/128";
        let second = Peer {
            allowed_ips: ["10.0.0.0/8", fd].map(|ip| ip.parse().unwrap()).to_vec().into(),
            last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::new(1_640_698_264, 5)),
            rx_bytes: 7,
            tx_bytes: 9,
            ..nobody(2)
        };
        let expected = Report {
            own_key: Some([8; 32].into()),
            peers: [nobody(1), second, nobody(3)].into_iter().collect(),
            interrupted: false,
            complete: true,
        };
        assert_eq!(report, expected);
        // Where only the own key is wanted, the first page has it.
        assert_eq!(read(&[first_page()]).unwrap().own_key, Some([8; 32].into()));
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
        // Other families' messages say nothing.
        assert_eq!(read(&[message(FAMILY + 1, 2, &[1; 3])]), Ok(Report::default()));
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
        report.read_page(&page, 0x20).unwrap();
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
        let peers = peers.into_iter().collect();
        let expected = Report { own_key: Some(own_key), peers, interrupted: false, complete: true };
        assert_eq!(report, expected);
        assert!(!format!("{report:?}").contains("238, 238"), "the private key");
        cut_and_changed(&page, 0x20);
    }

    /// Cut anywhere, or with any byte changed, it is parsed or refused, and never a panic.
    fn cut_and_changed(page: &[u8], family: u16) {
        for end in 0..page.len() {
            let _ = Report::default().read_page(&page[..end], family);
            for value in [0, 1, 0x7f, 0x80, 0xff, !page[end]] {
                let mut changed = page.to_vec();
                changed[end] = value;
                let _ = Report::default().read_page(&changed, family);
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
            cut_and_changed(&page, FAMILY);
        }
    }
}
