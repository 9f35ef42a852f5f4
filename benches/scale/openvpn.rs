//! `GET /o/connection_list` over many management sockets, beside a bare reader of the same ones.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};

use crate::ROLE;
use crate::common::{Answer, Daemon, TempDir, connect};
use crate::measure::{Turns, seconds, time};
use crate::table::{self, Table};

/// The value of `ROLE` for the OpenVPN processes.
pub const PROCESSES: &str = "openvpn";

const ROUNDS: usize = 21;
/// Connected clients of each process.
const CLIENTS: usize = 64;
const LIMIT: f64 = 1.5;

const GREETING: &[u8] =
    b">INFO:OpenVPN Management Interface Version 5 -- type 'help' for more info\r\n";

pub fn measure(_: &Path) -> Vec<Table> {
    let rows = [16, 64, 256].into_iter().map(|count| {
        let processes = Processes::start(count);
        let daemon = Daemon::start(&["-openvpn-dir", processes.directory.path().to_str().unwrap()]);
        let answer = list(&daemon);
        assert_eq!(answer.body.matches("\"common_name\"").count(), count * CLIENTS);
        assert!(!answer.body.contains("\"failed\""), "{}", answer.body);
        let sockets = processes.sockets();
        assert_eq!(read_all(&sockets), count * processes.reply_length);
        let turns = Turns::take(
            ROUNDS,
            || seconds(|| drop(list(&daemon))),
            || seconds(|| assert!(read_all(&sockets) > 0)),
        );
        let mut row = vec![count.to_string(), time(turns.daemon()), time(turns.floor())];
        row.extend(table::ratio(turns.ratio(), LIMIT));
        row
    });
    vec![Table {
        title: "`GET /o/connection_list`, 64 clients a process",
        columns: &["processes", "the daemon", "bare reader", "ratio", "at most"],
        rows: rows.collect(),
    }]
}

fn list(daemon: &Daemon) -> Answer {
    let mut stream = connect(daemon.address);
    stream.write_all(b"GET /o/connection_list HTTP/1.1\r\nHost: node\r\n\r\n").unwrap();
    Answer::read(&mut BufReader::new(stream), false).unwrap()
}

/// The floor: all sockets at once, one thread, nothing done with what they say. The bytes that
/// came after the greetings.
fn read_all(sockets: &[PathBuf]) -> usize {
    let mut streams: Vec<(UnixStream, bool, [u8; 5])> = sockets
        .iter()
        .map(|path| {
            let stream = UnixStream::connect(path).unwrap();
            stream.set_nonblocking(true).unwrap();
            (stream, false, [0; 5])
        })
        .collect();
    let (mut buffer, mut total) = (vec![0; 64 * 1024], 0);
    while !streams.is_empty() {
        let mut polled: Vec<_> = streams
            .iter()
            .map(|(stream, ..)| PollFd::new(stream.as_fd(), PollFlags::POLLIN))
            .collect();
        poll(&mut polled, PollTimeout::from(10_000_u16)).unwrap();
        let mut ready = polled.iter().map(|polled| polled.any().unwrap()).collect::<Vec<_>>();
        drop(polled);
        let mut ready = ready.drain(..);
        streams.retain_mut(|(stream, greeted, tail)| {
            if ready.next() != Some(true) {
                return true;
            }
            let count = stream.read(&mut buffer).unwrap();
            let read = &buffer[..count];
            if !*greeted {
                *greeted = read.ends_with(b"\n");
                if *greeted {
                    stream.write_all(b"status 3\n").unwrap();
                }
                return true;
            }
            total += count;
            let mut last = [&tail[..], &read[count.saturating_sub(5)..]].concat();
            last.drain(..last.len() - 5);
            tail.copy_from_slice(&last);
            *tail != *b"END\r\n"
        });
    }
    total
}

/// As many OpenVPN processes as management sockets are concerned, in one process.
struct Processes {
    process: Child,
    directory: TempDir,
    reply_length: usize,
}

impl Processes {
    fn start(count: usize) -> Self {
        let directory = TempDir::new("openvpn");
        let mut process = Command::new(std::env::current_exe().unwrap())
            .arg(directory.path())
            .arg(count.to_string())
            .env(ROLE, PROCESSES)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { process, directory, reply_length: line.trim().parse().unwrap() }
    }

    fn sockets(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process of [`Processes`]; its arguments are the directory and the number of sockets. Prints
/// the length of a reply when all sockets are there.
pub fn serve() {
    let arguments: Vec<_> = std::env::args().collect();
    let (directory, count) = (Path::new(&arguments[1]), arguments[2].parse::<usize>().unwrap());
    let reply = reply();
    let threads: Vec<_> = (0..count)
        .map(|number| {
            let listener = bind_as_openvpn(&directory.join(format!("server-{number}.sock")));
            let reply = reply.clone();
            std::thread::Builder::new()
                .stack_size(64 * 1024)
                .spawn(move || serve_one(&listener, &reply))
                .unwrap()
        })
        .collect();
    println!("{}", reply.len());
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// OpenVPN lets one connection wait while it serves another.
fn bind_as_openvpn(path: &Path) -> UnixListener {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket: OwnedFd =
        socket(AddressFamily::Unix, SockType::Stream, flags, None).expect("a socket");
    bind(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&socket, Backlog::new(1).unwrap()).unwrap();
    socket.into()
}

fn serve_one(listener: &UnixListener, reply: &[u8]) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        // Who hangs up early is not served any further.
        let _ = stream.write_all(GREETING);
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        while let Some(Ok(line)) = lines.next() {
            assert_eq!(line.trim_end(), "status 3");
            let _ = stream.write_all(reply);
        }
    }
}

/// What OpenVPN 2.6 replies to `status 3`.
fn reply() -> Vec<u8> {
    let mut reply = BufWriter::new(Vec::new());
    let mut line = |fields: &[&str]| write!(reply, "{}\r\n", fields.join("\t")).unwrap();
    line(&["TITLE", "OpenVPN 2.6.14 x86_64-pc-linux-gnu [SSL (OpenSSL)] [LZO] [LZ4] [EPOLL]"]);
    line(&["TIME", "2026-01-01 12:00:00", "1767268800"]);
    line(&[
        "HEADER",
        "CLIENT_LIST",
        "Common Name",
        "Real Address",
        "Virtual Address",
        "Virtual IPv6 Address",
        "Bytes Received",
        "Bytes Sent",
        "Connected Since",
        "Connected Since (time_t)",
        "Username",
        "Client ID",
        "Peer ID",
        "Data Channel Cipher",
    ]);
    for number in 0..CLIENTS {
        line(&[
            "CLIENT_LIST",
            &format!("YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkL{number:03}="),
            &format!("192.0.2.{number}:49152"),
            &format!("10.66.21.{number}"),
            &format!("fde6:76bd:ad97:ac5e::{number:x}"),
            "1048576",
            "16777216",
            "2026-01-01 11:00:00",
            "1767265200",
            "UNDEF",
            &number.to_string(),
            &number.to_string(),
            "AES-256-GCM",
        ]);
    }
    line(&[
        "HEADER",
        "ROUTING_TABLE",
        "Virtual Address",
        "Common Name",
        "Real Address",
        "Last Ref",
        "Last Ref (time_t)",
    ]);
    for number in 0..CLIENTS {
        line(&[
            "ROUTING_TABLE",
            &format!("10.66.21.{number}"),
            &format!("YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkL{number:03}="),
            &format!("192.0.2.{number}:49152"),
            "2026-01-01 12:00:00",
            "1767268800",
        ]);
    }
    line(&["GLOBAL_STATS", "Max bcast/mcast queue length", "0"]);
    line(&["END"]);
    reply.into_inner().unwrap()
}
