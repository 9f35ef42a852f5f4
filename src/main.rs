//! The program: [`vpn_daemon::run`] is all of it.

use std::process::ExitCode;

fn main() -> ExitCode {
    vpn_daemon::run()
}
