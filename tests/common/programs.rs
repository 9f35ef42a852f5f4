//! Programs that the tests run, and network namespaces for them.
#![allow(dead_code, unreachable_pub)] // each test target uses its part
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace without a name; it is gone when this and its users are.
pub struct Namespace(File);

impl Namespace {
    pub fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace needs root");
            command("ip", &["link", "set", "lo", "up"]);
            Self(File::open("/proc/thread-self/ns/net").unwrap())
        };
        std::thread::scope(|scope| scope.spawn(make).join().unwrap())
    }

    /// Runs `f`, and what it starts, in the namespace.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let enter = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
            f()
        };
        std::thread::scope(|scope| scope.spawn(enter).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// The argument of `ip link … netns` for this namespace.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Runs a program that has to succeed; its output.
pub fn command(program: &str, arguments: &[&str]) -> String {
    input(program, arguments, "")
}

/// Runs a program that reads `stdin` and has to succeed; its output.
pub fn input(program: &str, arguments: &[&str], stdin: &str) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}; run tests/install-deps"));
    // A program that does not read its input may have ended by now.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    let (line, stderr) = (arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {line} failed: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// A process; killed when dropped.
pub struct Process(pub Child);

impl Process {
    pub fn start(command: &mut Command) -> Self {
        let child = command.spawn();
        Self(child.unwrap_or_else(|e| panic!("{command:?}: {e}; run tests/install-deps")))
    }

    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
