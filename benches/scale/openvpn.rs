//! `GET /o/connection_list` over many management sockets, beside a bare reader of the same ones.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use crate::common::{Daemon, TempDir};
use crate::row::{Row, Unit, seconds, turns};
use crate::{Say, get};

const ROUNDS: usize = 21;
/// Connected clients of each process.
const CLIENTS: usize = 64;
const CALLERS: usize = 8;

const GREETING: &[u8] =
    b">INFO:OpenVPN Management Interface Version 5 -- type 'help' for more info\r\n";

pub fn measure(say: Say) {
    for count in [16, 64, 256] {
        let directory = TempDir::new("openvpn");
        let reply: Arc<[u8]> = reply().into();
        let sockets: Vec<PathBuf> =
            (0..count).map(|number| serve(directory.path(), number, Arc::clone(&reply))).collect();
        let daemon = Daemon::start(&["-openvpn-dir", directory.path().to_str().unwrap()]);
        let list = || get(&daemon, "/o/connection_list");
        let answer = list();
        assert_eq!(answer.matches("\"common_name\"").count(), count * CLIENTS);
        assert!(!answer.contains("\"failed\""), "{answer}");

        let rounds =
            turns(ROUNDS, || seconds(list), || seconds(|| read_all(&sockets, reply.len())));
        let (work, clients) = (format!("connection list, {count} processes"), count * CLIENTS);
        say(Row::new(Unit::Time, &work, clients, "a bare reader", 2.5, rounds));
        let at_once = || {
            thread::scope(|scope| (0..CALLERS).for_each(|_| drop(scope.spawn(list))));
        };
        let rounds = turns(ROUNDS, || seconds(at_once), || seconds(list));
        let work = format!("the same by {CALLERS} callers at once");
        say(Row::new(Unit::Time, &work, clients, "by one caller", 2.0, rounds));
    }
}

/// The floor: one thread, all sockets at the same time, and nothing done with what they say.
fn read_all(sockets: &[PathBuf], reply_length: usize) {
    let mut greeting = [0; GREETING.len()];
    let mut reply = vec![0; reply_length];
    let mut streams: Vec<_> =
        sockets.iter().map(|path| UnixStream::connect(path).unwrap()).collect();
    for stream in &mut streams {
        stream.read_exact(&mut greeting).unwrap();
        stream.write_all(b"status 3\n").unwrap();
    }
    for stream in &mut streams {
        stream.read_exact(&mut reply).unwrap();
        assert!(reply.ends_with(b"END\r\n"));
    }
}

/// An OpenVPN process as far as its management socket is concerned, one connection at a time; it
/// lasts as long as the bench.
fn serve(directory: &Path, number: usize, reply: Arc<[u8]>) -> PathBuf {
    let path = directory.join(format!("server-{number}.sock"));
    let listener = UnixListener::bind(&path).unwrap();
    let serve = move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // Who hangs up early is not served any further.
            let _ = stream.write_all(GREETING);
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            while let Some(Ok(line)) = lines.next() {
                assert_eq!(line.trim_end(), "status 3");
                let _ = stream.write_all(&reply);
            }
        }
    };
    thread::Builder::new().stack_size(64 * 1024).spawn(serve).unwrap();
    path
}

/// What OpenVPN 2.6 replies to `status 3`.
fn reply() -> Vec<u8> {
    let mut reply = String::from(
        "TITLE\tOpenVPN 2.6.14 x86_64-pc-linux-gnu [SSL (OpenSSL)] [LZO] [LZ4] [EPOLL]\r\n\
         TIME\t2026-01-01 12:00:00\t1767268800\r\n\
         HEADER\tCLIENT_LIST\tCommon Name\tReal Address\tVirtual Address\t\
         Virtual IPv6 Address\tBytes Received\tBytes Sent\tConnected Since\t\
         Connected Since (time_t)\tUsername\tClient ID\tPeer ID\tData Channel Cipher\r\n",
    );
    let name = |n| format!("YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkL{n:03}=");
    let client = |n| {
        format!(
            "CLIENT_LIST\t{}\t192.0.2.{n}:49152\t10.66.21.{n}\tfde6:76bd:ad97:ac5e::{n:x}\t\
             1048576\t16777216\t2026-01-01 11:00:00\t1767265200\tUNDEF\t{n}\t{n}\tAES-256-GCM\r\n",
            name(n)
        )
    };
    let route = |n| {
        let name = name(n);
        format!(
            "ROUTING_TABLE\t10.66.21.{n}\t{name}\t192.0.2.{n}:49152\t2026-01-01 12:00:00\t1767268800\r\n"
        )
    };
    reply.extend((0..CLIENTS).map(client));
    reply += "HEADER\tROUTING_TABLE\tVirtual Address\tCommon Name\tReal Address\tLast Ref\t\
              Last Ref (time_t)\r\n";
    reply.extend((0..CLIENTS).map(route));
    reply += "GLOBAL_STATS\tMax bcast/mcast queue length\t0\r\nEND\r\n";
    reply.into_bytes()
}
