//! Runs a test of this binary in a virtual machine with the kernel's WireGuard.

use std::path::Path;
use std::time::Duration;

use crate::say;
use crate::vm::{Initramfs, Kernel, Machine, which};

/// The value of `ROLE` in the machine.
pub const ROLE: &str = "guest";

/// Emulation on a busy machine is slow: this bounds a hang, it is no measure.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// Boots a machine that runs the test of this name in this executable, and shows its results.
pub fn run(executable: &Path, test: &str) {
    let kernel = Kernel::find();
    let case = std::env::var("CASE").unwrap_or_default();
    let command = format!("ROLE={ROLE} CASE={case} {} --exact {test}", executable.display());
    let mut initramfs = Initramfs::new(&kernel, &["wireguard", "veth"], &command);
    initramfs.program(executable);
    initramfs.program(Path::new(env!("CARGO_BIN_EXE_vpn-daemon")));
    for program in ["wg", "ip"] {
        initramfs.program(&which(program));
    }
    let image = initramfs.write();
    let machine = Machine::boot(&kernel, &image, 1024, LIMIT);
    let mut console = String::new();
    let status = machine.wait(|line| {
        if line.starts_with("kernel: ") {
            say(line);
        }
        console += line;
        console.push('\n');
    });
    assert!(status == 0, "failed in the machine:\n{console}");
}
