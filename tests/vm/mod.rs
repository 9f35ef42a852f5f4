//! A throw-away Linux machine in QEMU: see `tests/vm/boot`.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Two CPUs.
#[allow(dead_code, reason = "the bench counts")]
pub const USUAL: &str = "-accel tcg,thread=multi -smp 2 -m 1024";
/// One CPU whose clock counts instructions, one to the nanosecond, and stands still while the host
/// does something else: what is timed in the machine is the work alone.
#[allow(dead_code, reason = "the tests do not count")]
pub const COUNTING: &str = "-accel tcg,thread=single -icount shift=0,sleep=off -smp 1 -m 2048";

/// The directory that cargo builds into.
pub fn target_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().to_owned()
}

/// Whether this is running in the machine.
pub fn is_inside() -> bool {
    std::env::var_os("IN_THE_MACHINE").is_some()
}

/// Boots a machine that runs this very executable, after the words `before` and with those `after`;
/// hands each line of its console to `each`. Panics unless it succeeds.
pub fn run_inside(qemu: &str, [before, after]: [&str; 2], mut each: impl FnMut(&str)) {
    let executable = std::env::current_exe().unwrap();
    let command = format!("{before} {} {after}", executable.display());
    let mut machine = Command::new("setpriv")
        .args(["--pdeathsig", "TERM", "tests/vm/boot", qemu, &command])
        .args([&executable, Path::new(env!("CARGO_BIN_EXE_vpn-daemon"))])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut console, mut succeeded) = (String::new(), false);
    for line in BufReader::new(machine.stdout.take().unwrap()).split(b'\n') {
        let line = String::from_utf8_lossy(&line.unwrap()).trim_end().to_owned();
        succeeded |= line.ends_with("the command ended with status 0");
        each(&line);
        console += &format!("{line}\n");
    }
    machine.wait().unwrap();
    assert!(succeeded, "failed in the machine:\n{console}");
}
