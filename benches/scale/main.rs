//! `make bench`: what the daemon costs, each work beside a floor that is measured in the same run.
//!
//! `ONLY=front|openvpn|wireguard` measures a part. The exit status is 1 if a limit is exceeded by
//! more than noise explains: see [`row::Row::verdict`].

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
#![allow(clippy::cast_precision_loss, missing_docs, unreachable_pub)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/wireguard/devices.rs"]
mod devices;
mod drawing;
mod front;
#[path = "../../tests/common/management.rs"]
mod management;
mod openvpn;
#[path = "../../tests/common/pki.rs"]
mod pki;
#[path = "../../tests/common/programs.rs"]
mod programs;
mod row;
#[path = "../../tests/vm/mod.rs"]
mod vm;
mod wireguard;

use std::process::ExitCode;

use common::Daemon;
use row::Row;

/// What takes each row as soon as it is measured.
type Say<'a> = &'a mut dyn FnMut(Row);

fn main() -> ExitCode {
    if vm::is_inside() {
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
    let parts: [fn(Say); 3] = [front::measure, openvpn::measure, wireguard::measure];
    for (name, measure) in ["front", "openvpn", "wireguard"].into_iter().zip(parts) {
        if name.contains(&only) {
            measure(&mut say);
        }
    }
    let drawing = vm::target_dir().join("scale.svg");
    std::fs::write(&drawing, drawing::svg(&rows)).unwrap();
    println!("\nThe drawing is {}.", drawing.display());
    ExitCode::from(u8::from(rows.iter().any(|row| row.verdict() == row::OVER)))
}

/// A request on a connection of its own, as the portal makes them; the body of the answer.
fn get(daemon: &Daemon, target: &str) -> String {
    let answer = daemon.get(target);
    assert_eq!(answer.status, 200, "{target}: {}", answer.body);
    answer.body
}
