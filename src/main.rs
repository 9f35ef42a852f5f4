//! Calls [`vpn_daemon::run`], prints its error and sets the exit status.

use std::process::ExitCode;

fn main() -> ExitCode {
    vpn_daemon::run()
}
