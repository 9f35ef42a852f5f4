//! What the node itself must grant: `/proc`, open files, and whether it is in maintenance.

use std::fs;

use nix::sys::resource::{Resource, getrlimit};

use super::Entry;
use crate::node;

pub(super) fn look(max_connections: usize) -> Vec<Entry> {
    let maintenance = match node::maintenance_mode() {
        false => Entry::ok("maintenance", "the node is in service"),
        true => Entry::warning(
            "maintenance",
            format!("the node is in maintenance: {} exists", node::MAINTENANCE_FLAG),
            format!("rm {}", node::MAINTENANCE_FLAG),
        ),
    };
    let mut entries = vec![maintenance];
    entries.extend(["/proc/loadavg", "/proc/uptime"].map(readable));
    entries.push(open_files(max_connections));
    entries
}

fn readable(path: &str) -> Entry {
    match fs::read_to_string(path) {
        Ok(_) => Entry::ok(path, "can be read"),
        Err(error) => Entry::warning(
            path,
            format!("cannot be read ({error}): portals are not told the load or the uptime"),
            "ProcSubset=all in the unit (systemctl edit vpn-daemon)",
        ),
    }
}

fn open_files(max_connections: usize) -> Entry {
    let subject = "open files";
    let needed = crate::needed_files(max_connections);
    // The daemon raises the soft limit itself.
    let (_, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => {
            let seen = format!("the limit cannot be read: {}", error.desc());
            return Entry::warning(subject, seen, "ulimit -Hn");
        }
    };
    if hard >= needed {
        let seen = format!("{hard} allowed, {needed} needed for {max_connections} connections");
        return Entry::ok(subject, seen);
    }
    Entry::warning(
        subject,
        format!(
            "only {hard} allowed, {needed} needed for {max_connections} connections: {} are \
             served at a time",
            crate::affordable_connections(hard).min(max_connections)
        ),
        format!("LimitNOFILE={needed} in the unit (systemctl edit vpn-daemon)"),
    )
}
