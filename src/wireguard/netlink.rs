//! Generic netlink with the kernel's WireGuard: requests out, answers in (netlink(7)). Pure but for
//! [`Socket`].

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    setsockopt, socket, sockopt,
};

use super::uapi::{
    CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME, CTRL_CMD_GETFAMILY, GENL_ID_CTRL, NLA_F_NESTED,
    NLA_TYPE_MASK, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, WG_GENL_NAME,
};

/// A malformed answer; the kernel does not send any.
pub(super) const MALFORMED: Errno = Errno::EBADMSG;

/// The kernel fills the pages of a dump as far as the reader's buffer goes, up to 32 KiB
/// (`netlink_dump`); its refusal of a change repeats the request, which is to be smaller, therefore.
const BUFFER: usize = 32 * 1024;

/// Holds the smallest page that the kernel makes (`NLMSG_GOODSIZE`).
const SMALL_PAGE: usize = 8 * 1024;

/// Holds what the controller tells of a family. The kernel takes it for the reader's buffer: were it
/// larger, so were the smallest page.
const FAMILY_ANSWER: usize = 2 * 1024;

/// A socket for one operation: what were left of one would be taken for the answer to the next.
pub(super) struct Socket {
    fd: OwnedFd,
    family: u16,
    deadline: Instant,
    /// That of the last request; its answers have it, too.
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Makes ready. `ENOENT`: the kernel has no WireGuard module.
    pub(super) fn open(deadline: Instant) -> Result<Self, Errno> {
        let (fd, buffer) = (connect_to_kernel()?, vec![0; FAMILY_ANSWER]);
        let mut socket = Self { fd, family: GENL_ID_CTRL, deadline, sequence: 0, buffer };
        let mut request = Request::new(CTRL_CMD_GETFAMILY);
        request.text(CTRL_ATTR_FAMILY_NAME, WG_GENL_NAME);
        socket.send(request, 0)?;
        socket.family = parse_family(socket.receive()?)?;
        Ok(socket)
    }

    /// The number by which the kernel knows WireGuard's messages.
    pub(super) fn family(&self) -> u16 {
        self.family
    }

    /// Asks for a dump, which [`Socket::receive`] returns page by page.
    pub(super) fn dump(&mut self, request: Request) -> Result<(), Errno> {
        self.buffer.resize(BUFFER, 0);
        self.send(request, NLM_F_DUMP)
    }

    /// The first page of a dump whose others are not wanted, and as small as the kernel makes it. The
    /// kernel fills the second when the first is taken, unless the socket's receive buffer is full:
    /// so that is made small, and only looked into.
    pub(super) fn first_page(&mut self, request: Request) -> Result<&[u8], Errno> {
        setsockopt(&self.fd, sockopt::RcvBuf, &0)?;
        self.buffer.resize(SMALL_PAGE, 0);
        self.send(request, NLM_F_DUMP)?;
        self.receive_with(MsgFlags::MSG_PEEK)
    }

    /// Has the request done: its refusal is the error.
    pub(super) fn execute(&mut self, request: Request) -> Result<(), Errno> {
        self.buffer.resize(BUFFER, 0);
        self.send(request, NLM_F_ACK)?;
        for message in messages(self.receive()?) {
            let Message { kind, body, .. } = message?;
            if kind == NLMSG_ERROR {
                return check_status(body);
            }
        }
        Err(MALFORMED)
    }

    /// The kernel does what is asked before this returns, and waits for no room in a buffer.
    fn send(&mut self, request: Request, flags: u16) -> Result<(), Errno> {
        self.sequence += 1;
        let bytes = request.finish(self.family, NLM_F_REQUEST | flags, self.sequence);
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty()).map(drop)
    }

    /// The next datagram, all of it an answer to the last request. `EAGAIN`: there was none before
    /// the deadline.
    pub(super) fn receive(&mut self) -> Result<&[u8], Errno> {
        self.receive_with(MsgFlags::empty())
    }

    fn receive_with(&mut self, flags: MsgFlags) -> Result<&[u8], Errno> {
        // With MSG_TRUNC the length is that of the datagram, were it larger than the buffer.
        let flags = flags | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
        let length = loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, flags) {
                Err(Errno::EAGAIN) => self.wait()?,
                Err(Errno::EINTR) => {}
                result => break result?,
            }
        };
        let datagram = self.buffer.get(..length).ok_or(MALFORMED)?;
        for message in messages(datagram) {
            if message?.sequence != self.sequence {
                return Err(MALFORMED);
            }
        }
        Ok(datagram)
    }

    /// Waits until there is something to receive.
    fn wait(&self) -> Result<(), Errno> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::EAGAIN);
        }
        let left = PollTimeout::try_from(left + Duration::from_millis(1));
        let left = left.unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], left) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }
}

impl Drop for Socket {
    /// The pages of a dump hold the device's private key and the peers' preshared keys, which should
    /// not stay in freed memory. `black_box` keeps the compiler from leaving the work out; it does not
    /// promise to.
    fn drop(&mut self) {
        self.buffer.fill(0);
        std::hint::black_box(&mut self.buffer);
    }
}

/// Connected to the kernel, a socket takes nothing from other processes (`netlink_getsockbyportid`).
fn connect_to_kernel() -> Result<OwnedFd, Errno> {
    let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
    let fd = socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkGeneric)?;
    connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(fd)
}

/// A generic netlink request in the making.
pub(super) struct Request(Vec<u8>);

impl Request {
    /// The header (`nlmsghdr`) stays empty until the end, then the command and the family's version.
    pub(super) fn new(command: u8) -> Self {
        let mut bytes = vec![0; 16];
        bytes.extend([command, 1, 0, 0]);
        Self(bytes)
    }

    /// Adds an attribute.
    pub(super) fn attribute(&mut self, kind: u16, payload: &[u8]) {
        self.record(kind, |request| request.0.extend_from_slice(payload));
    }

    /// Adds an attribute of text, which ends with a zero.
    pub(super) fn text(&mut self, kind: u16, text: &str) {
        self.record(kind, |request| {
            request.0.extend_from_slice(text.as_bytes());
            request.0.push(0);
        });
    }

    /// Adds an attribute of attributes.
    pub(super) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        self.record(kind | NLA_F_NESTED, fill);
    }

    fn record(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0, 0]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        fill(self);
        // One that is too long for its length is refused by the kernel.
        let length = u16::try_from(self.0.len() - start).unwrap_or(0);
        self.put(start, &length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (place, byte) in self.0.iter_mut().skip(at).zip(bytes) {
            *place = *byte;
        }
    }

    /// The port in the header stays zero: the kernel answers the port that asked.
    pub(super) fn finish(mut self, family: u16, flags: u16, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(0);
        self.put(0, &length.to_ne_bytes());
        self.put(4, &family.to_ne_bytes());
        self.put(6, &flags.to_ne_bytes());
        self.put(8, &sequence.to_ne_bytes());
        self.0
    }
}

/// The number of the family from the controller's answer.
fn parse_family(datagram: &[u8]) -> Result<u16, Errno> {
    for message in messages(datagram) {
        let Message { kind, body, .. } = message?;
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

/// `NLMSG_ERROR` and `NLMSG_DONE` begin with a status: zero, or a negative error number.
pub(super) fn check_status(body: &[u8]) -> Result<(), Errno> {
    match body.first_chunk().map(|status| i32::from_ne_bytes(*status)) {
        Some(0) => Ok(()),
        Some(status) if status < 0 => Err(Errno::from_raw(status.saturating_neg())),
        _ => Err(MALFORMED),
    }
}

/// A message of the kernel's.
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    sequence: u32,
    pub(super) body: &'a [u8],
}

/// The messages of a datagram.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Errno>> {
    records(datagram, |bytes| {
        let header = bytes.first_chunk::<16>()?;
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let message = Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            body: bytes.get(16..length)?,
        };
        Some((length, message))
    })
}

/// The attributes of a message, or those nested in an attribute: type, payload.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), Errno>> {
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
pub(super) mod tests {
    use super::*;
    use nix::sys::socket::{getsockname, sendto};

    pub(in super::super) const FAMILY: u16 = 0x1d;

    pub(in super::super) fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + payload.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    pub(in super::super) fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut bytes = Vec::from(length.to_ne_bytes());
        bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        bytes.extend([0; 8]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn refusals() {
        for errno in [Errno::ENODEV, Errno::EPERM, Errno::EOPNOTSUPP] {
            let status = (-(errno as i32)).to_ne_bytes();
            for kind in [NLMSG_ERROR, NLMSG_DONE] {
                let refusal = message(kind, 0, &[&status[..], &[0; 20]].concat());
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
        let mut request = Request::new(3);
        request.text(2, "wg-15-bytes-xyz");
        request.nested(8, |request| {
            request.attribute(1, &[7; 5]);
            request.nested(9, |_| {});
        });
        let bytes = request.finish(FAMILY, NLM_F_REQUEST, 5);
        let Message { kind, flags, sequence, body } = messages(&bytes).next().unwrap().unwrap();
        assert_eq!((bytes.len() % 4, kind, flags, sequence), (0, FAMILY, 1, 5));
        assert_eq!(body[..4], [3, 1, 0, 0]);
        let outer: Vec<_> = attributes(&body[4..]).map(Result::unwrap).collect();
        assert_eq!(outer[0], (2, &b"wg-15-bytes-xyz\0"[..]));
        let inner: Vec<_> = attributes(outer[1].1).collect();
        assert_eq!((outer[1].0, inner), (8, vec![Ok((1, &[7; 5][..])), Ok((9, &[][..]))]));
    }

    /// A socket to the controller, which every kernel has, with nothing asked yet.
    fn controller(time: Duration) -> Socket {
        Socket {
            fd: connect_to_kernel().unwrap(),
            family: GENL_ID_CTRL,
            deadline: Instant::now() + time,
            sequence: 0,
            buffer: vec![0; BUFFER],
        }
    }

    fn ask(name: &str) -> Request {
        let mut request = Request::new(CTRL_CMD_GETFAMILY);
        request.text(CTRL_ATTR_FAMILY_NAME, name);
        request
    }

    #[test]
    fn answers_of_this_kernel() {
        let mut socket = controller(Duration::from_secs(10));
        socket.send(ask("nlctrl"), 0).unwrap();
        assert_eq!(parse_family(socket.receive().unwrap()), Ok(GENL_ID_CTRL));
        socket.send(ask("no-such-family"), 0).unwrap();
        assert_eq!(parse_family(socket.receive().unwrap()), Err(Errno::ENOENT));
        assert_eq!(socket.execute(ask("no-such-family")), Err(Errno::ENOENT));

        // Not an answer to the last request.
        socket.send(ask("nlctrl"), 0).unwrap();
        socket.sequence += 1;
        assert_eq!(socket.receive(), Err(MALFORMED));
        // Cut off, because the buffer is too small.
        socket.send(ask("nlctrl"), 0).unwrap();
        socket.buffer.truncate(40);
        assert_eq!(socket.receive(), Err(MALFORMED));
    }

    #[test]
    fn nobody_but_the_kernel_answers() {
        let mut socket = controller(Duration::from_millis(50));
        let address = getsockname::<NetlinkAddr>(socket.fd.as_raw_fd()).unwrap();
        let forged = ask("nlctrl").finish(FAMILY, 0, 0);
        let other = connect_to_kernel().unwrap();
        let sent = sendto(other.as_raw_fd(), &forged, &address, MsgFlags::empty());
        // EPERM: not even allowed to try, without CAP_NET_ADMIN.
        assert!(matches!(sent, Err(Errno::ECONNREFUSED | Errno::EPERM)), "{sent:?}");
        assert_eq!(socket.receive(), Err(Errno::EAGAIN));
    }

    #[test]
    fn a_wait_ends_at_the_deadline() {
        let start = Instant::now();
        let mut socket = controller(Duration::from_millis(50));
        assert_eq!(socket.receive(), Err(Errno::EAGAIN));
        assert_eq!(socket.receive(), Err(Errno::EAGAIN));
        let elapsed = start.elapsed();
        assert!((50..2000).contains(&elapsed.as_millis()), "{elapsed:?}");
        // What is there already comes after the deadline, too.
        socket.send(ask("nlctrl"), 0).unwrap();
        assert_eq!(parse_family(socket.receive().unwrap()), Ok(GENL_ID_CTRL));
    }
}
