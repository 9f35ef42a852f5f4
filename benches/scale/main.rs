//! `make bench`: what the daemon costs, each work beside a floor that is measured in the same run.
//!
//! `ONLY=front|openvpn|wireguard` measures a part. The exit status is 1 if a limit is exceeded by
//! more than noise explains: see [`row::Row::verdict`].

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
#![allow(clippy::cast_precision_loss, missing_docs, unreachable_pub)]

#[path = "../../tests/common/mod.rs"]
mod common;
mod drawing;
mod front;
mod openvpn;
#[path = "../../tests/common/pki.rs"]
mod pki;
mod row;
#[path = "../../tests/vm/mod.rs"]
mod vm;
mod wireguard;

use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use common::Daemon;
use row::Row;

/// What takes each row as soon as it is measured.
type Say<'a> = &'a mut dyn FnMut(Row);

fn main() -> ExitCode {
    if std::env::var_os(wireguard::GUEST).is_some() {
        wireguard::measure_in_guest();
        return ExitCode::SUCCESS;
    }
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut rows = Vec::new();
    println!("{}", row::HEAD);
    let mut say = |row: Row| {
        println!("{row}");
        rows.push(row);
    };
    let measures: [fn(Say); 3] = [front::measure, openvpn::measure, wireguard::measure];
    for (part, measure) in ["front", "openvpn", "wireguard"].into_iter().zip(measures) {
        if part.contains(&only) {
            measure(&mut say);
        }
    }
    let drawing = vm::target_dir().join("scale.svg");
    std::fs::write(&drawing, drawing::svg(&rows)).unwrap();
    println!("\nThe drawing is {}.", drawing.display());
    ExitCode::from(u8::from(rows.iter().any(|row| row.verdict() == row::OVER)))
}

/// A process that ends with the value, by SIGTERM, so that it leaves nothing behind.
struct Process(Child);

impl Process {
    /// Starts it, and waits until it is `ready`.
    fn start(command: &mut Command, ready: impl Fn() -> bool) -> Self {
        let (input, silent) = (Stdio::piped(), Stdio::null);
        let process = Self(command.stdin(input).stdout(silent()).stderr(silent()).spawn().unwrap());
        let end = Instant::now() + common::PATIENCE;
        while !ready() {
            assert!(Instant::now() < end, "{command:?} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        process
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// A request on a connection of its own, as the portal makes them; the body of the answer.
fn get(daemon: &Daemon, target: &str) -> String {
    let answer = daemon.get(target);
    assert_eq!(answer.status, 200, "{target}: {}", answer.body);
    answer.body
}
