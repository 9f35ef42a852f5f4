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
mod kernel;
#[path = "../common/programs.rs"]
mod programs;
#[path = "../vm/mod.rs"]
mod vm;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use devices::Kind;
use programs::Namespace;

/// A name, and what panics if it does not hold. Each case runs in a network namespace of its own.
type Case = (&'static str, fn(Kind));

#[test]
fn wireguard_go() {
    run(Kind::WireguardGo, &[cases::COMMON, cases::PROCESS]);
}

#[test]
fn boringtun() {
    run(Kind::Boringtun, &[cases::COMMON, cases::PROCESS]);
}

/// Boots a machine that runs this very test; in the machine it is the cases.
#[test]
fn kernel() {
    if vm::is_inside() {
        return run(Kind::Kernel, &[cases::COMMON, kernel::CASES]);
    }
    let case = format!("CASE='{}'", std::env::var("CASE").unwrap_or_default());
    vm::run_inside(vm::USUAL, [&case, "--exact kernel"], |line| {
        if line.starts_with("Kernel: ") {
            say(line);
        }
    });
}

/// Runs all cases, says how each went, and fails in the end if one did.
fn run(kind: Kind, lists: &[&[Case]]) {
    let only = std::env::var("CASE").unwrap_or_default();
    let (mut passed, mut failed) = (0, Vec::new());
    for (name, case) in lists.iter().copied().flatten().filter(|(name, _)| name.contains(&only)) {
        let started = Instant::now();
        let result = Namespace::new().enter(|| catch_unwind(AssertUnwindSafe(|| case(kind))));
        let seconds = started.elapsed().as_secs_f32();
        match result {
            Ok(()) => passed += 1,
            Err(_) => failed.push(*name),
        }
        let verdict = if result.is_ok() { "ok" } else { "FAILED" };
        say(&format!("{kind:?}: {verdict} {name} ({seconds:.1} s)"));
    }
    assert!(failed.is_empty(), "{kind:?}: failed: {}", failed.join(", "));
    assert!(passed > 0, "{kind:?}: no case is called {only}");
}

/// Prints a line past libtest, which would hold it back until the test fails.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
