//! Scripted OpenVPN management sockets: like OpenVPN they serve one connection, let two wait,
//! drop output when they are sent input too early, and take quoted parameters; or they misbehave.

#![allow(dead_code, unreachable_pub)] // each test target uses its part
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Result, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, connect, listen, shutdown,
    socket,
};

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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mood {
    #[default]
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
    /// Answers this many commands and closes.
    Close(usize),
    GarbageGreeting,
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
}

/// One process. Dropping it ends it, and fails the test if it was sent what OpenVPN would not take.
pub struct FakeOpenVpn {
    pub path: PathBuf,
    shared: Arc<Shared>,
    listener: UnixListener,
    thread: Option<JoinHandle<()>>,
    /// Those who wait at a full socket.
    crowd: Vec<OwnedFd>,
}

#[derive(Default)]
struct Shared {
    mood: Mutex<Mood>,
    clients: Mutex<Vec<FakeClient>>,
    commands: Mutex<Vec<String>>,
    faults: Mutex<Vec<String>>,
    current: Mutex<Option<UnixStream>>,
    stopping: AtomicBool,
    knocked: AtomicBool,
}

impl FakeOpenVpn {
    pub fn start(path: PathBuf, mood: Mood, clients: Vec<FakeClient>) -> Self {
        let listener = UnixListener::bind(&path).unwrap();
        listen(&listener, Backlog::new(1).unwrap()).unwrap();
        let (now, clients) = (Mutex::new(mood), Mutex::new(clients));
        let shared = Arc::new(Shared { mood: now, clients, ..Shared::default() });
        let crowd = if mood == Mood::Full { crowd(&path) } else { Vec::new() };
        let thread = (!matches!(mood, Mood::Full | Mood::Deaf)).then(|| {
            let listener = listener.try_clone().unwrap();
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    *shared.current.lock().unwrap() = Some(stream.try_clone().unwrap());
                    if shared.stopping.load(Ordering::SeqCst) {
                        break;
                    }
                    let mood = *shared.mood.lock().unwrap();
                    if mood == Mood::Stalled && !shared.knocked.swap(true, Ordering::SeqCst) {
                        let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
                        poll(&mut ready, PollTimeout::NONE).unwrap();
                    }
                    // It fails when the daemon hangs up.
                    let _ = shared.serve(mood, &stream);
                    *shared.current.lock().unwrap() = None;
                }
            })
        });
        Self { path, shared, listener, thread, crowd }
    }

    /// Serves those who come from now on like this; one that accepts nothing stays so.
    pub fn turn(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    /// Now these are connected; what it was told is forgotten.
    pub fn restart(&self, clients: Vec<FakeClient>) {
        *self.shared.clients.lock().unwrap() = clients;
        self.shared.commands.lock().unwrap().clear();
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
        assert!(thread::panicking() || faults.is_empty(), "OpenVPN would not take {faults:?}");
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

pub const GREETING: &str =
    ">INFO:OpenVPN Management Interface Version 5 -- type 'help' for more info\r\n";
const NEWS: &str = ">LOG:1700000000,I,END\r\n>BYTECOUNT_CLI:3,1,2\r\n";

/// Sends this and then nothing, until the other end hangs up.
fn hold(mut stream: &UnixStream, text: &[u8]) -> Result<()> {
    stream.write_all(text)?;
    stream.read_to_end(&mut Vec::new()).map(drop)
}

fn flood(mut stream: &UnixStream, text: &str) -> Result<()> {
    let block = text.repeat(1 + 4096 / text.len());
    loop {
        stream.write_all(block.as_bytes())?;
    }
}

impl Shared {
    fn serve(&self, mood: Mood, mut stream: &UnixStream) -> Result<()> {
        match mood {
            Mood::Silent => return hold(stream, b""),
            Mood::CloseAtOnce => return Ok(()),
            Mood::GarbageGreeting => return hold(stream, b"HTTP/1.0 400 Bad Request\r\n\r\n"),
            Mood::FloodLine => return flood(stream, "x"),
            Mood::FloodNews => return flood(stream, NEWS),
            Mood::Password => return hold(stream, b"ENTER PASSWORD:"),
            Mood::Chatty => stream.write_all([NEWS, GREETING, NEWS].concat().as_bytes())?,
            _ => stream.write_all(GREETING.as_bytes())?,
        }
        for (number, line) in BufReader::new(stream).split(b'\n').enumerate() {
            if mood == Mood::Close(number) {
                return Ok(());
            }
            let line = String::from_utf8_lossy(&line?).into_owned();
            self.commands.lock().unwrap().push(line.clone());
            let mut reply = self.run(&line);
            match mood {
                Mood::Slow(ms) => thread::sleep(Duration::from_millis(ms)),
                Mood::FloodRows => {
                    stream.write_all(reply.strip_suffix(b"END\r\n").unwrap_or_default())?;
                    let row = "CLIENT_LIST\tx\tr\t10.0.0.1\t\t0\t0\t\t0\t\t1\t1\t\r\n";
                    return flood(stream, row);
                }
                Mood::NoEnd => {
                    return hold(stream, reply.strip_suffix(b"END\r\n").unwrap_or_default());
                }
                Mood::Reply(text) => return hold(stream, text.as_bytes()),
                Mood::Drip => {
                    for byte in &reply {
                        stream.write_all(&[*byte])?;
                        thread::sleep(Duration::from_millis(30));
                    }
                }
                Mood::Chatty => {
                    let lines = reply.split_inclusive(|&byte| byte == b'\n');
                    reply = lines.flat_map(|line| [line, NEWS.as_bytes()].concat()).collect();
                }
                _ => {}
            }
            // In blocks, as OpenVPN does; it drops what it has not sent when input comes.
            for block in reply.chunks(1024) {
                let mut ready = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
                poll(&mut ready, PollTimeout::ZERO)?;
                if ready[0].revents().unwrap() == PollFlags::POLLIN {
                    let fault = format!("input before the reply to {line:?} was read");
                    self.faults.lock().unwrap().push(fault);
                    break;
                }
                stream.write_all(block)?;
            }
        }
        Ok(())
    }

    fn run(&self, line: &str) -> Vec<u8> {
        let mut clients = self.clients.lock().unwrap();
        let before = clients.len();
        let quoted = line.strip_prefix("kill \"").and_then(|rest| rest.strip_suffix('"'));
        let reply = if line == "status 3" {
            return status(&clients);
        } else if let Some(name) = quoted.and_then(unquoted) {
            clients.retain(|client| client.name != name.as_bytes());
            match before - clients.len() {
                0 => format!("ERROR: common name '{name}' not found"),
                n => format!("SUCCESS: common name '{name}' found, {n} client(s) killed"),
            }
        } else if let Some(id) = line.strip_prefix("client-kill ") {
            clients.retain(|client| client.id.to_string() != id);
            match before - clients.len() {
                0 => "ERROR: client-kill command failed".to_owned(),
                _ => "SUCCESS: client-kill command succeeded".to_owned(),
            }
        } else {
            self.faults.lock().unwrap().push(line.to_owned());
            "ERROR: unknown command, enter 'help' for more options".to_owned()
        };
        format!("{reply}\r\n").into_bytes()
    }
}

/// A name as OpenVPN reads it in quotes; `None` for one that it does not take, or takes for an address.
fn unquoted(text: &str) -> Option<String> {
    let (mut name, mut chars) = (String::new(), text.chars());
    while let Some(c) = chars.next() {
        name.push(match c {
            '"' | ':' => return None,
            '\\' => chars.next().filter(|c| "\"\\ ".contains(*c))?,
            c => c,
        });
    }
    Some(name).filter(|name| name.len() < 128)
}

/// The report of OpenVPN 2.6.
pub fn status(clients: &[FakeClient]) -> Vec<u8> {
    let mut report = b"TITLE\tOpenVPN 2.6.14 x86_64-pc-linux-gnu\r\n\
        TIME\t2025-01-01 00:00:00\t1735689600\r\n\
        HEADER\tCLIENT_LIST\tCommon Name\tReal Address\tVirtual Address\tVirtual IPv6 Address\t\
        Bytes Received\tBytes Sent\tConnected Since\tConnected Since (time_t)\tUsername\t\
        Client ID\tPeer ID\tData Channel Cipher\r\n\
        HEADER\tROUTING_TABLE\tVirtual Address\tCommon Name\tReal Address\tLast Ref\t\
        Last Ref (time_t)\r\n"
        .to_vec();
    for FakeClient { name, ipv4, ipv6, id } in clients {
        let row = format!(
            "\t192.0.2.1:1194\t{ipv4}\t{ipv6}\t1\t2\t2025-01-01 00:00:00\t1735689600\tUNDEF\t\
             {id}\t{id}\tAES-256-GCM\r\nROUTING_TABLE\t{ipv4}\t"
        );
        let route = b"\t192.0.2.1:1194\t2025-01-01 00:00:00\t1735689600\r\n";
        report.extend([b"CLIENT_LIST\t", &name[..], row.as_bytes(), name, route].concat());
    }
    report.extend_from_slice(b"GLOBAL_STATS\tMax bcast/mcast queue length\t0\r\nEND\r\n");
    report
}
