//! Scripted OpenVPN management sockets: like OpenVPN they serve one connection, let two wait,
//! drop output when they are sent input too early, and take quoted parameters; or they misbehave.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, connect, listen,
    shutdown, socket,
};

/// A directory for sockets, removed at the end.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vd-{}-{count}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
    pub fn path(&self) -> &Path {
        &self.0
    }
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A client as the process reports it.
#[derive(Clone, Debug)]
pub struct FakeClient {
    pub name: Vec<u8>,
    pub ipv4: String,
    pub ipv6: String,
    pub id: u64,
}

impl FakeClient {
    pub fn new(name: &str, ipv4: &str, ipv6: &str, id: u64) -> Self {
        Self { name: name.as_bytes().to_vec(), ipv4: ipv4.to_owned(), ipv6: ipv6.to_owned(), id }
    }
}

/// How a process behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mood {
    Healthy,
    /// Healthy, with news before, between and inside replies.
    Chatty,
    /// Healthy, but its replies take this many milliseconds.
    Slow(u64),
    /// Healthy, but greets only when the next connection comes (OpenVPN 2.6 on TCP, after a
    /// connection in its backlog has turned out to be dead).
    Stalled,
    /// Accepts and says nothing.
    Silent,
    /// Accepts nothing, and others wait already.
    Full,
    /// Accepts nothing, but has room for those who wait.
    Deaf,
    CloseAtOnce,
    CloseAfterGreeting,
    CloseInReply,
    GarbageGreeting,
    Garbage,
    /// One endless line in place of the greeting.
    FloodLine,
    /// Endless news in place of the greeting.
    FloodNews,
    /// Endless clients.
    FloodRows,
    /// A byte every 30 ms.
    Drip,
    Password,
    /// Answers every command with this.
    Reply(&'static str),
    /// Leaves out the last line.
    NoEnd,
    /// Takes the command and says nothing.
    Mute,
}

/// One process. Dropping it ends it, and fails the test if it was sent what OpenVPN would not take.
pub struct FakeOpenVpn {
    pub path: PathBuf,
    shared: Arc<Shared>,
    listener: OwnedFd,
    thread: Option<JoinHandle<()>>,
    /// Those who wait at a full socket.
    crowd: Vec<OwnedFd>,
}

#[derive(Default)]
struct Shared {
    clients: Mutex<Vec<FakeClient>>,
    commands: Mutex<Vec<String>>,
    faults: Mutex<Vec<String>>,
    current: Mutex<Option<UnixStream>>,
    stopping: AtomicBool,
    knocked: AtomicBool,
}

impl FakeOpenVpn {
    pub fn start(path: PathBuf, mood: Mood, clients: Vec<FakeClient>) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let shared = Arc::new(Shared { clients: Mutex::new(clients), ..Shared::default() });
        let crowd = match mood {
            Mood::Full => crowd(&path),
            _ => Vec::new(),
        };
        let thread = (!matches!(mood, Mood::Full | Mood::Deaf)).then(|| {
            let listener = UnixListener::from(listener.try_clone().unwrap());
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    *shared.current.lock().unwrap() = Some(stream.try_clone().unwrap());
                    if shared.stopping.load(Ordering::SeqCst) {
                        break;
                    }
                    if mood == Mood::Stalled && !shared.knocked.swap(true, Ordering::SeqCst) {
                        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
                        poll(&mut ready, PollTimeout::NONE).unwrap();
                    }
                    serve(&shared, mood, stream);
                    *shared.current.lock().unwrap() = None;
                }
            })
        });
        Self { path, shared, listener, thread, crowd }
    }

    /// What it was told, in order.
    pub fn commands(&self) -> Vec<String> {
        self.shared.commands.lock().unwrap().clone()
    }

    /// Who is connected now.
    pub fn names(&self) -> Vec<String> {
        let clients = self.shared.clients.lock().unwrap();
        clients.iter().map(|client| String::from_utf8_lossy(&client.name).into_owned()).collect()
    }
}

impl Drop for FakeOpenVpn {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(stream) = &*self.shared.current.lock().unwrap() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
        let faults = self.shared.faults.lock().unwrap();
        if !thread::panicking() {
            assert!(faults.is_empty(), "OpenVPN would not take {faults:?}");
        }
    }
}

/// Fills the backlog.
pub fn crowd(path: &Path) -> Vec<OwnedFd> {
    let mut crowd = Vec::new();
    loop {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        if connect(stream.as_raw_fd(), &UnixAddr::new(path).unwrap()).is_err() {
            return crowd;
        }
        crowd.push(stream);
    }
}

const GREETING: &str =
    ">INFO:OpenVPN Management Interface Version 5 -- type 'help' for more info\r\n";
const NEWS: &str = ">LOG:1700000000,I,END\r\n>BYTECOUNT_CLI:3,1,2\r\n";

fn serve(shared: &Shared, mood: Mood, mut stream: UnixStream) {
    let flood = |stream: &mut UnixStream, what: &str| {
        let block = what.repeat(1 + 4096 / what.len());
        while stream.write_all(block.as_bytes()).is_ok() {}
    };
    match mood {
        Mood::Silent => return wait_for_end(&mut stream),
        Mood::CloseAtOnce => return,
        Mood::GarbageGreeting => {
            let _ = stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n");
            return wait_for_end(&mut stream);
        }
        Mood::FloodLine => return flood(&mut stream, "x"),
        Mood::FloodNews => return flood(&mut stream, ">LOG:1700000000,I,hello\r\n"),
        Mood::Password => {
            let _ = stream.write_all(b"ENTER PASSWORD:");
            return wait_for_end(&mut stream);
        }
        Mood::Chatty => drop(stream.write_all(NEWS.as_bytes())),
        _ => {}
    }
    if stream.write_all(GREETING.as_bytes()).is_err() || mood == Mood::CloseAfterGreeting {
        return;
    }
    if mood == Mood::Chatty {
        let _ = stream.write_all(NEWS.as_bytes());
    }
    let mut input: Vec<u8> = Vec::new();
    let mut buffer = [0; 256];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        input.extend_from_slice(&buffer[..length]);
        while let Some(end) = input.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = input.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]).into_owned();
            shared.commands.lock().unwrap().push(line.clone());
            let reply = shared.run(&line);
            match mood {
                Mood::Slow(ms) => thread::sleep(Duration::from_millis(ms)),
                Mood::FloodRows => {
                    let routes = b"HEADER\tROUTING";
                    let rows = reply.windows(routes.len()).position(|w| w == routes).unwrap();
                    let _ = stream.write_all(&reply[..rows]);
                    return flood(
                        &mut stream,
                        "CLIENT_LIST\tx\tr\t10.0.0.1\t\t0\t0\t\t0\t\t1\t1\t\r\n",
                    );
                }
                Mood::CloseInReply => {
                    let _ = stream.write_all(&reply[..reply.len() / 2]);
                    return;
                }
                Mood::NoEnd => {
                    let _ = stream.write_all(reply.strip_suffix(b"END\r\n").unwrap());
                    return wait_for_end(&mut stream);
                }
                Mood::Mute => return wait_for_end(&mut stream),
                Mood::Garbage => {
                    let _ = stream.write_all(b"\x00\xff\xfe nonsense \x1b[2J\r\nmore\r\n");
                    return wait_for_end(&mut stream);
                }
                Mood::Reply(text) => {
                    let _ = stream.write_all(text.as_bytes());
                    return wait_for_end(&mut stream);
                }
                Mood::Drip => {
                    for byte in &reply {
                        if stream.write_all(&[*byte]).is_err() {
                            return;
                        }
                        thread::sleep(Duration::from_millis(30));
                    }
                }
                _ => {}
            }
            let reply = match mood {
                Mood::Chatty => reply
                    .split_inclusive(|&byte| byte == b'\n')
                    .flat_map(|line| [line, NEWS.as_bytes()].concat())
                    .collect(),
                _ => reply,
            };
            if !send(&mut stream, &reply) {
                let fault = format!("input before the reply to {line:?} was read");
                shared.faults.lock().unwrap().push(fault);
            }
        }
    }
}

/// Sends in blocks as OpenVPN does; `false` if input came before all was sent.
fn send(stream: &mut UnixStream, reply: &[u8]) -> bool {
    for block in reply.chunks(1024) {
        let mut ready = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        poll(&mut ready, PollTimeout::ZERO).unwrap();
        let events = ready[0].revents().unwrap();
        if events.contains(PollFlags::POLLIN) && !events.contains(PollFlags::POLLHUP) {
            return false;
        }
        match stream.write_all(block) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return true,
            result => result.unwrap(),
        }
    }
    true
}

fn wait_for_end(stream: &mut UnixStream) {
    let mut buffer = [0; 256];
    while let Ok(1..) = stream.read(&mut buffer) {}
}

impl Shared {
    fn run(&self, line: &str) -> Vec<u8> {
        let mut clients = self.clients.lock().unwrap();
        let before = clients.len();
        match parameters(line).as_deref() {
            Some([command, version]) if command == "status" && version == "3" => status(&clients),
            Some([command, name]) if command == "kill" => {
                if name.contains(':') || name.len() > 127 {
                    self.faults.lock().unwrap().push(line.to_owned());
                    return format!("ERROR: error parsing IP address: {name}\r\n").into_bytes();
                }
                clients.retain(|client| client.name != name.as_bytes());
                match before - clients.len() {
                    0 => format!("ERROR: common name '{name}' not found\r\n").into_bytes(),
                    n => format!("SUCCESS: common name '{name}' found, {n} client(s) killed\r\n")
                        .into_bytes(),
                }
            }
            Some([command, id]) if command == "client-kill" => {
                let id: u64 = id.parse().unwrap();
                clients.retain(|client| client.id != id);
                match before - clients.len() {
                    0 => "ERROR: client-kill command failed\r\n".into(),
                    _ => "SUCCESS: client-kill command succeeded\r\n".into(),
                }
            }
            _ => {
                self.faults.lock().unwrap().push(line.to_owned());
                "ERROR: unknown command, enter 'help' for more options\r\n".into()
            }
        }
    }
}

/// Splits a command as OpenVPN does; `None` for what it does not take.
fn parameters(line: &str) -> Option<Vec<String>> {
    let mut parameters = Vec::new();
    let mut chars = line.chars().peekable();
    while let Some(first) = chars.next() {
        let mut word = String::new();
        match first {
            ' ' => continue,
            '"' => loop {
                match chars.next()? {
                    '"' => break,
                    '\\' => match chars.next()? {
                        c @ ('"' | '\\' | ' ') => word.push(c),
                        _ => return None,
                    },
                    c => word.push(c),
                }
            },
            first => {
                word.push(first);
                while let Some(c) = chars.next_if(|c| *c != ' ') {
                    word.push(c);
                }
                if word.contains(['\\', '"']) {
                    return None;
                }
            }
        }
        if word.len() > 255 {
            return None;
        }
        parameters.push(word);
    }
    Some(parameters)
}

/// The report of OpenVPN 2.6.
fn status(clients: &[FakeClient]) -> Vec<u8> {
    let mut report = "TITLE\tOpenVPN 2.6.14 x86_64-pc-linux-gnu\r\n\
        TIME\t2025-01-01 00:00:00\t1735689600\r\n\
        HEADER\tCLIENT_LIST\tCommon Name\tReal Address\tVirtual Address\tVirtual IPv6 Address\t\
        Bytes Received\tBytes Sent\tConnected Since\tConnected Since (time_t)\tUsername\t\
        Client ID\tPeer ID\tData Channel Cipher\r\n"
        .as_bytes()
        .to_vec();
    for FakeClient { name, ipv4, ipv6, id } in clients {
        report.extend_from_slice(b"CLIENT_LIST\t");
        report.extend_from_slice(name);
        let rest = format!(
            "\t192.0.2.1:1194\t{ipv4}\t{ipv6}\t1\t2\t2025-01-01 00:00:00\t1735689600\tUNDEF\t\
             {id}\t{id}\tAES-256-GCM\r\n"
        );
        report.extend_from_slice(rest.as_bytes());
    }
    report.extend_from_slice(
        b"HEADER\tROUTING_TABLE\tVirtual Address\tCommon Name\tReal Address\tLast Ref\t\
          Last Ref (time_t)\r\n",
    );
    for FakeClient { name, ipv4, .. } in clients {
        report.extend_from_slice(format!("ROUTING_TABLE\t{ipv4}\t").as_bytes());
        report.extend_from_slice(name);
        report.extend_from_slice(b"\t192.0.2.1:1194\t2025-01-01 00:00:00\t1735689600\r\n");
    }
    report.extend_from_slice(b"GLOBAL_STATS\tMax bcast/mcast queue length\t0\r\nEND\r\n");
    report
}
