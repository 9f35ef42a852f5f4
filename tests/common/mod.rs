//! Starts the real daemon, speaks HTTP to it, and cleans up behind a test.
#![allow(dead_code, unreachable_pub)] // each test target uses its part
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stderr)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What nothing in a test takes on the slowest machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub const DAEMON: &str = env!("CARGO_BIN_EXE_vpn-daemon");

/// A directory of the test's own, removed when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new(purpose: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vd-{purpose}-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The lines that the daemon has logged.
#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    ended: AtomicBool,
    /// Whether no more are read.
    stalled: AtomicBool,
}

/// A running daemon on a port of its own; killed when dropped.
pub struct Daemon {
    child: Child,
    pub address: SocketAddr,
    log: Arc<Log>,
    directory: TempDir,
}

impl Daemon {
    /// With an empty OpenVPN directory and a device that does not exist, unless `arguments` say
    /// otherwise.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, |_| {})
    }

    /// `prepare` may change the command, its environment above all.
    pub fn start_with(arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        Self::start_as(Command::new(DAEMON), arguments, prepare)
    }

    /// The words of `wrapper` run it.
    pub fn start_by(wrapper: &[&str], arguments: &[&str]) -> Self {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(DAEMON);
        Self::start_as(command, arguments, |_| {})
    }

    /// By way of `command`, which ends by becoming the daemon.
    pub fn start_as(
        mut command: Command,
        arguments: &[&str],
        prepare: impl FnOnce(&mut Command),
    ) -> Self {
        let directory = TempDir::new("daemon");
        command.args(["-listen", "127.0.0.1:0", "-wg-device", "vd-none", "-openvpn-dir"]);
        command.arg(directory.path().join("openvpn")).args(arguments);
        command.env_remove("CREDENTIALS_DIRECTORY").env_remove("RUST_LOG");
        command.env("RUNTIME_DIRECTORY", directory.path());
        // As the unit does.
        let tunables = "glibc.malloc.trim_threshold=131072:glibc.malloc.mxfast=0";
        command.env("GLIBC_TUNABLES", tunables);
        prepare(&mut command);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let (stderr, kept) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                kept.lines.lock().unwrap().push(line);
                while kept.stalled.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            kept.ended.store(true, Ordering::Relaxed);
        });
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut daemon = Self { child, address, log, directory };
        let line = daemon.wait_for_log("listening on http");
        daemon.address = line.rsplit("//").next().unwrap().parse().unwrap();
        daemon
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its private directory, with the inner socket's below.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The first line with this text; waits for it.
    pub fn wait_for_log(&self, text: &str) -> String {
        let what = format!("a log line with {text:?}");
        let find = || self.log().into_iter().find(|line| line.contains(text));
        wait_until(&what, || find().is_some() || self.log.ended.load(Ordering::Relaxed));
        find().expect(&what)
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lines.lock().unwrap().clone()
    }

    /// Reads no more than a line from now on.
    pub fn stall_log(&self) {
        self.log.stalled.store(true, Ordering::Relaxed);
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.pid().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the end of the daemon", || self.child.try_wait().unwrap())
    }

    /// A number of `/proc/PID/status`, e.g. `VmRSS` in KiB or `Threads`.
    pub fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
        line.unwrap().split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Ids and names of its threads.
    fn threads(&self) -> impl Iterator<Item = (i32, String)> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        tasks.map(|task| {
            let task = task.unwrap();
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            (task.file_name().to_str().unwrap().parse().unwrap(), name.trim().to_owned())
        })
    }

    pub fn thread_names(&self) -> Vec<String> {
        self.threads().map(|(_, name)| name).collect()
    }

    /// All threads of that name.
    pub fn threads_of(&self, name: &str) -> Vec<nix::unistd::Pid> {
        let found = self.threads().filter(|(_, found)| found == name);
        found.map(|(id, _)| nix::unistd::Pid::from_raw(id)).collect()
    }

    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// `SOFT:HARD`, from now on; what is left out stays as it is.
    pub fn limit_open_files(&self, limit: &str) {
        let arguments = [format!("--pid={}", self.pid()), format!("--nofile={limit}")];
        assert!(Command::new("prlimit").args(arguments).status().unwrap().success());
    }

    pub fn connect(&self) -> TcpStream {
        connect(self.address)
    }

    pub fn get(&self, target: &str) -> Answer {
        self.call("GET", target, &[], b"")
    }

    /// The portal's way: a form on a connection of its own.
    pub fn post(&self, target: &str, parameters: &[(&str, &str)]) -> Answer {
        let mut form = form_urlencoded::Serializer::new(String::new());
        let form = form.extend_pairs(parameters).finish();
        let headers = ["Content-Type: application/x-www-form-urlencoded"];
        self.call("POST", target, &headers, form.as_bytes())
    }

    pub fn call(&self, method: &str, target: &str, headers: &[&str], body: &[u8]) -> Answer {
        call(self.address, method, target, headers, body)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let end = &log[log.len().saturating_sub(1000)..];
            eprintln!("the end of the daemon's log:\n{}", end.join("\n"));
        }
    }
}

/// What is found in the end; panics after a time that is only there to end a hang.
pub fn wait_for<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + 2 * PATIENCE;
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    wait_for(what, || done().then_some(()));
}

pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Any request, with `Content-Length` where there is a body or the method is POST.
pub fn call(to: SocketAddr, method: &str, target: &str, headers: &[&str], body: &[u8]) -> Answer {
    let mut request = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n");
    for header in headers {
        request += &format!("{header}\r\n");
    }
    if method == "POST" || !body.is_empty() {
        request += &format!("Content-Length: {}\r\n", body.len());
    }
    request += "Connection: close\r\n\r\n";
    let mut stream = connect(to);
    stream.write_all(&[request.as_bytes(), body].concat()).unwrap();
    let mut stream = BufReader::new(stream);
    let answer = Answer::read(&mut stream, method == "HEAD").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the connection ends after the answer");
    answer
}

/// An HTTP answer, read to its end and no further.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn read(stream: &mut (impl Read + ?Sized), is_head: bool) -> std::io::Result<Self> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut answer = Self { status, head, body: String::new() };
        assert_eq!(answer.header("Transfer-Encoding"), None);
        let length = answer.header("Content-Length").map(|value| value.parse().unwrap());
        if !is_head && status != 204 && status >= 200 {
            let mut body = vec![0; length.expect("a length")];
            stream.read_exact(&mut body)?;
            answer.body = String::from_utf8(body).unwrap();
        }
        Ok(answer)
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (field, value) = line.split_once(": ")?;
            field.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The sentence of an answer that reports a failure.
    pub fn error(&self) -> String {
        assert!(self.status >= 400, "{self:?}");
        assert_eq!(self.header("Content-Type"), Some("application/json"));
        self.json()["error"].as_str().unwrap().to_owned()
    }
}
