//! The node daemon of a VPN service; `run` is the whole program.

use std::process::ExitCode;

pub mod openvpn;
pub mod tls;
pub mod wireguard;

/// Runs the daemon until a signal ends it; the result is the exit status.
pub fn run() -> ExitCode {
    ExitCode::SUCCESS
}
