//! Whatever an OpenVPN process sends, in whatever pieces: the daemon understands the same, sends only
//! commands that it may send, and comes to an end.
//!
//! An input is a byte that says how to cut, a line with the common name to disconnect (empty: to list),
//! and what the process sends before it hangs up. With the byte 255 it hangs instead, with 254 it
//! repeats its last line without end.
#![no_main]

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use std::{net::Shutdown, thread};

use libfuzzer_sys::fuzz_target;
use vpn_daemon::openvpn::management::{disconnect, list};
use vpn_daemon::openvpn::{Client, CommonName};

/// So much is in the socket's buffers at once, whoever reads.
const MOST_SENT: usize = 4096;
/// More than the daemon reads of a conversation, and what is in the socket's buffers.
const ENDLESS: usize = 4 << 20;

// How much of what was sent is not read yet (SIOCOUTQ of unix(7)).
nix::ioctl_read_bad!(unread, 0x5411, i32);

#[derive(PartialEq, Debug)]
struct Outcome {
    /// Name and addresses of each client of a list, or what it says of its failure.
    result: Result<Vec<[String; 3]>, String>,
    timed_out: bool,
    disconnected: usize,
    commands: String,
}

fuzz_target!(|input: &[u8]| {
    let Some((seed, input)) = input[..input.len().min(MOST_SENT)].split_first() else { return };
    let line = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let (name, sent) = (&input[..line], input.get(line + 1..).unwrap_or_default());
    let name = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
    let whole = talk(name.as_ref(), &[sent], 0);
    assert!(!whole.timed_out, "{whole:?}");
    judge(name.as_ref(), sent, &whole);
    let other = talk(name.as_ref(), &common::pieces(sent, *seed, 8), *seed);
    match *seed {
        255 if other.timed_out => {}
        254 => assert!(!other.timed_out, "{other:?}"),
        _ => assert_eq!(other, whole),
    }
});

fn talk(name: Option<&CommonName>, pieces: &[&[u8]], seed: u8) -> Outcome {
    let path = std::env::temp_dir().join(format!("vpn-daemon-fuzz-{}.sock", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let time = if seed == 255 { Duration::from_millis(30) } else { Duration::from_secs(60) };
    let (deadline, count) = (Instant::now() + time, AtomicUsize::new(0));
    thread::scope(|scope| {
        let process = scope.spawn(|| process(&listener, pieces, seed));
        let result = match name {
            Some(name) => disconnect(&path, name, deadline, &count).map(|()| Vec::new()),
            None => {
                let mut clients = Vec::new();
                list(&path, deadline, |client| clients.push(kept(client))).map(|()| clients)
            }
        };
        std::fs::remove_file(&path).unwrap();
        let commands = process.join().unwrap();
        let timed_out =
            result.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::TimedOut);
        let result = result.map_err(|error| error.to_string());
        Outcome { result, timed_out, disconnected: count.load(Relaxed), commands }
    })
}

fn kept(client: &Client) -> [String; 3] {
    [client.common_name, client.ipv4, client.ipv6].map(str::to_owned)
}

/// Sends each piece when the one before is read; gives what was sent to it.
fn process(listener: &UnixListener, pieces: &[&[u8]], seed: u8) -> String {
    let mut stream = listener.accept().unwrap().0;
    for piece in pieces {
        let (written, fd, mut left) = (stream.write_all(piece), stream.as_raw_fd(), 1);
        while written.is_ok() && left > 0 {
            // SAFETY: the descriptor is open, and the kernel writes a number.
            unsafe { unread(fd, &raw mut left) }.unwrap();
            thread::yield_now();
        }
    }
    let (sent, mut written) = (pieces.concat(), 0);
    let last_line = sent.split_inclusive(|byte| *byte == b'\n').next_back().unwrap_or_default();
    let again = last_line.repeat(1 + MOST_SENT / last_line.len().max(1));
    while seed == 254 && !again.is_empty() && stream.write_all(&again).is_ok() {
        written += again.len();
        assert!(written < ENDLESS, "read without end");
    }
    if seed != 255 {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut commands = Vec::new();
    // The daemon resets a connection that it has not read to the end.
    let _ = stream.read_to_end(&mut commands);
    String::from_utf8(commands).unwrap()
}

/// What was understood and sent is what a slow reader would have.
fn judge(name: Option<&CommonName>, sent: &[u8], outcome: &Outcome) {
    let commands: Vec<_> = outcome
        .commands
        .split_inclusive('\n')
        .map(|line| line.strip_suffix('\n').unwrap())
        .collect();
    let (is_ok, count) = (outcome.result.is_ok(), outcome.disconnected);
    let Some(replies) = replies(sent) else {
        return assert!(commands.is_empty() && !is_ok);
    };
    let report = replies.iter().map(String::as_str).take_while(|line| !line.starts_with("ERROR:"));
    let clients = common::status(report);
    let Some(name) = name.map(CommonName::as_str) else {
        assert_eq!(commands, ["status 3"]);
        let has_address = |client: &Client| !client.ipv4.is_empty() || !client.ipv6.is_empty();
        let expected = clients
            .map(|clients| clients.iter().filter(|client| has_address(client)).map(kept).collect());
        return assert_eq!(outcome.result.as_ref().ok(), expected.as_ref());
    };
    if name.len() < 128 && !name.contains([':', '\u{fffd}']) {
        let [command] = commands[..] else { panic!("{commands:?}") };
        assert_eq!(unquoted(command.strip_prefix("kill ").unwrap()).as_deref(), Some(name));
        let Some(reply) = replies.first().filter(|_| is_ok) else { return assert!(!is_ok) };
        let killed = reply.starts_with("SUCCESS: ") && reply.contains(&count.to_string());
        return assert!(killed || count == 0 && reply.ends_with("' not found"), "{reply}");
    }
    let of_name = clients.iter().flatten().filter(|client| client.common_name == name);
    let ids: Option<Vec<_>> = of_name.map(|client| client.id).collect();
    let Some(ids) = ids.filter(|_| clients.is_some()) else {
        assert_eq!(commands, ["status 3"]);
        return assert!(!is_ok);
    };
    let replies = replies.iter().skip_while(|line| *line != "END").skip(1).take(ids.len());
    let good = replies.take_while(|reply| {
        reply.starts_with("SUCCESS:") || *reply == "ERROR: client-kill command failed"
    });
    let good: Vec<_> = good.collect();
    assert_eq!(
        (is_ok, count),
        (good.len() == ids.len(), good.iter().filter(|reply| reply.starts_with('S')).count())
    );
    let kills = ids.iter().take(good.len() + 1).map(|id| format!("client-kill {id}"));
    assert_eq!(commands, [vec!["status 3".to_owned()], kills.collect()].concat());
}

/// The lines behind the greeting that are no news; `None` without a greeting.
fn replies(sent: &[u8]) -> Option<Vec<String>> {
    let end = sent.iter().rposition(|byte| *byte == b'\n')?;
    let mut lines = sent[..end]
        .split(|byte| *byte == b'\n')
        .map(|line| String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line)).into_owned());
    let first = lines.find(|line| !line.starts_with('>') || line.starts_with(">INFO:"))?;
    first.starts_with('>').then(|| lines.filter(|line| !line.starts_with('>')).collect())
}

/// The one parameter that OpenVPN's `parse_line` finds.
fn unquoted(text: &str) -> Option<String> {
    let (mut chars, mut parameter) = (text.strip_prefix('"')?.chars(), String::new());
    loop {
        match chars.next()? {
            '\\' => parameter.push(chars.next().filter(|c| ['\\', '"', ' '].contains(c))?),
            '"' => return chars.next().is_none().then_some(parameter),
            c => parameter.push(c),
        }
    }
}
