//! `GET /o/connection_list` over many management sockets, beside a bare reader of the same ones.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use crate::common::{Daemon, TempDir};
use crate::management::{FakeClient, GREETING, status};
use crate::row::{Row, Unit, seconds, turns};
use crate::{Say, get};

const ROUNDS: usize = 21;
/// Connected clients of each process.
const CLIENTS: u64 = 64;
const CALLERS: usize = 8;

pub fn measure(say: Say) {
    let client = |n| {
        let name = format!("YrAoH/x5dIyS2EiWOtRldUTg2WV9q9zV5evkaNkL{n:03}=");
        let (ipv4, ipv6) = (format!("10.66.21.{n}"), format!("fde6:76bd:ad97:ac5e::{n:x}"));
        FakeClient::new(&name, &ipv4, &ipv6, n)
    };
    let reply: Arc<[u8]> = status(&(0..CLIENTS).map(client).collect::<Vec<_>>()).into();
    for count in [16, 64, 256] {
        let directory = TempDir::new("openvpn");
        let sockets: Vec<PathBuf> =
            (0..count).map(|number| serve(directory.path(), number, Arc::clone(&reply))).collect();
        let daemon = Daemon::start(&["-openvpn-dir", directory.path().to_str().unwrap()]);
        let list = || get(&daemon, "/o/connection_list");
        let (answer, clients) = (list(), count * CLIENTS as usize);
        assert_eq!(answer.matches("\"common_name\"").count(), clients);
        assert!(!answer.contains("\"failed\""), "{answer}");

        let rounds =
            turns(ROUNDS, || seconds(list), || seconds(|| read_all(&sockets, reply.len())));
        let work = format!("connection list, {count} processes");
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
            let _ = stream.write_all(GREETING.as_bytes());
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
