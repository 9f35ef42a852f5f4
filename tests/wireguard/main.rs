//! WireGuard for real: one list of cases on the kernel's module (in a virtual machine),
//! wireguard-go and boringtun. Needs root and what `tests/install-deps` installs.
//!
//! `CASE=word cargo test --test wireguard` runs the cases whose name contains the word.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(missing_docs, unreachable_pub)]

mod cases;
#[path = "../common/mod.rs"]
mod common;
mod devices;
mod guest;
mod kernel;
mod sync_cases;
#[path = "../vm/mod.rs"]
mod vm;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::Instant;

use devices::{Kind, Namespace};

/// A name, and what panics if it does not hold. Each case runs in a network namespace of its own.
type Case = (&'static str, fn(Kind));

#[test]
fn wireguard_go() {
    run(Kind::WireguardGo, &[cases::COMMON, sync_cases::COMMON, cases::SESSION, cases::PROCESS]);
}

#[test]
fn boringtun() {
    run(Kind::Boringtun, &[cases::COMMON, sync_cases::COMMON, cases::PROCESS]);
}

/// On the host this boots a machine that runs this very test; in the machine it is the cases.
#[test]
fn kernel() {
    match std::env::var("ROLE").as_deref() {
        Ok(guest::ROLE) => {
            run(Kind::Kernel, &[cases::COMMON, sync_cases::COMMON, cases::SESSION, kernel::CASES])
        }
        Ok(kernel::UNPRIVILEGED) => kernel::unprivileged(),
        Ok(role) => panic!("unknown ROLE {role}"),
        Err(_) => guest::run(&std::env::current_exe().unwrap(), "kernel"),
    }
}

/// Runs all cases, says how each went, and fails in the end if one did.
fn run(kind: Kind, lists: &[&[Case]]) {
    let only = std::env::var("CASE").unwrap_or_default();
    let (mut passed, mut failed) = (0, Vec::new());
    // A second logger is refused: the tests share the first.
    if log::set_logger(&LOG).is_ok() {
        log::set_max_level(log::LevelFilter::Debug);
    }
    for (name, case) in lists.iter().copied().flatten().filter(|(name, _)| name.contains(&only)) {
        let started = Instant::now();
        let namespace = Namespace::new();
        let result = namespace.enter(|| catch_unwind(AssertUnwindSafe(|| case(kind))));
        let seconds = started.elapsed().as_secs_f32();
        match result {
            Ok(()) => passed += 1,
            Err(_) => failed.push(*name),
        }
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        say(&format!("{kind}: {verdict} {name} ({seconds:.1} s)"));
    }
    assert!(failed.is_empty(), "{kind}: failed: {}", failed.join(", "));
    assert!(passed > 0, "{kind}: no case is called {only}");
}

/// Prints a line past libtest, which would hold it back until the test fails.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// All that the daemon's library logged. neli, with which the cases disturb dumps, logs whole
/// messages, keys and all: this is deaf to it.
static LOG: Log = Log(Mutex::new(String::new()));

/// The log so far.
fn logged() -> String {
    LOG.0.lock().unwrap().clone()
}

struct Log(Mutex<String>);

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("vpn_daemon")
    }
    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format!("{} {}\n", record.level(), record.args());
            self.0.lock().unwrap().push_str(&line);
        }
    }
    fn flush(&self) {}
}
