//! `make bench`: what the daemon costs beside a floor that is measured in the same run.
//!
//! Each figure is a ratio. The daemon and its floor take turns, several rounds each, so that a
//! busy machine slows both; tables and drawing are left in `target/bench`. `ROLE` turns this
//! executable into one of the bench's own processes; `ONLY=front|openvpn|wireguard` measures a part.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
#![allow(clippy::cast_precision_loss, missing_docs, unreachable_pub)]

#[path = "../../tests/common/mod.rs"]
mod common;
mod drawing;
mod front;
mod guest;
mod measure;
mod openvpn;
#[path = "../../tests/common/pki.rs"]
mod pki;
mod table;
#[path = "../../tests/vm/mod.rs"]
mod vm;
mod wireguard;

use std::fs;
use std::path::Path;

/// The variable that names what a process of the bench is.
const ROLE: &str = "ROLE";

fn main() {
    match std::env::var(ROLE).as_deref() {
        Ok(front::ALONE) => front::serve_alone(),
        Ok(openvpn::PROCESSES) => openvpn::serve(),
        Ok(guest::ROLE) => guest::measure(),
        Ok(role) => panic!("there is no {ROLE} {role}"),
        Err(_) => bench(),
    }
}

fn bench() {
    let only = std::env::var("ONLY").unwrap_or_default();
    let directory = vm::target_dir().join("bench");
    fs::create_dir_all(&directory).unwrap();
    for (name, measure) in [
        ("front", front::measure as fn(&Path) -> Vec<table::Table>),
        ("openvpn", openvpn::measure),
        ("wireguard", wireguard::measure),
    ] {
        if !name.contains(&only) {
            continue;
        }
        let tables = measure(&directory);
        let text: Vec<_> = tables.iter().map(ToString::to_string).collect();
        let text = text.join("\n");
        println!("\n{text}");
        fs::write(directory.join(format!("{name}.md")), text).unwrap();
    }
    println!("The tables and the drawing are in {}.", directory.display());
}
