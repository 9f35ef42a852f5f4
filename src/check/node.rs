//! What the node itself must grant: open files, and whether it is in maintenance.

use nix::sys::resource::{Resource, getrlimit};

use super::Entry;
use crate::node::{MAINTENANCE_FLAG, maintenance_mode};

pub(super) fn look(max_connections: usize) -> Vec<Entry> {
    let maintenance = match maintenance_mode() {
        false => Entry::ok("maintenance", "the node is in service"),
        true => {
            let seen = format!("the node is in maintenance: {MAINTENANCE_FLAG} exists");
            Entry::warning("maintenance", seen, format!("rm {MAINTENANCE_FLAG}"))
        }
    };
    // The daemon raises the soft limit itself.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    let (needed, served) = crate::open_files(max_connections, hard);
    let enough = format!("{needed} needed for {max_connections} connections");
    let open_files = if served == max_connections {
        Entry::ok("open files", format!("{hard} allowed, {enough}"))
    } else {
        let seen = format!("only {hard} allowed, {enough}: {served} are served at a time");
        let remedy = format!("LimitNOFILE={needed} in the unit (systemctl edit vpn-daemon)");
        Entry::warning("open files", seen, remedy)
    };
    vec![maintenance, open_files]
}
