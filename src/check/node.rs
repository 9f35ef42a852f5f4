//! What the node itself must grant: open files, and whether it is in maintenance.

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
    vec![maintenance, open_files(max_connections)]
}

fn open_files(max_connections: usize) -> Entry {
    let subject = "open files";
    // The daemon raises the soft limit itself.
    let (_, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => {
            let seen = format!("the limit cannot be read: {}", error.desc());
            return Entry::warning(subject, seen, "ulimit -Hn");
        }
    };
    let (needed, served) = crate::open_files(max_connections, hard);
    if served == max_connections {
        let seen = format!("{hard} allowed, {needed} needed for {max_connections} connections");
        return Entry::ok(subject, seen);
    }
    Entry::warning(
        subject,
        format!(
            "only {hard} allowed, {needed} needed for {max_connections} connections: {served} \
             are served at a time"
        ),
        format!("LimitNOFILE={needed} in the unit (systemctl edit vpn-daemon)"),
    )
}
