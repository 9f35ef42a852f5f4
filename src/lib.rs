//! The node daemon of a VPN service; `run` is the whole program.

use std::process::ExitCode;

pub mod api;
pub mod cli;
pub mod head;
pub mod logging;
pub mod node;
pub mod openvpn;
pub mod rfc3339;
pub mod routes;
pub mod wireguard;

/// Runs the daemon until a signal ends it; the result is the exit status.
pub fn run() -> ExitCode {
    ExitCode::SUCCESS
}
