//! `vpn-daemon check`: looks at everything that the daemon needs and says how to mend what is
//! wrong. It changes nothing, and every look has an end.

mod address;
mod backends;
mod settings;

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;

use crate::agent::Agent;
use crate::cli::{Given, Options};
use crate::logging::one_line;
use crate::node::{MAINTENANCE_FLAG, maintenance_mode};

/// For everything: what has not come by then is a problem of its own.
const PATIENCE: Duration = Duration::from_secs(9);

/// How good or bad what was seen is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// The daemon works, but perhaps not as its operator wants.
    Warning,
    /// Some call fails, or the daemon does not start.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Entry {
    /// How it is.
    level: Level,
    /// What was looked at, in a word or two.
    subject: String,
    /// What was seen.
    seen: String,
    /// The command, file or line that mends it, where there is one.
    remedy: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug)]
pub(crate) struct Report(Vec<Entry>);

impl Entry {
    fn new(level: Level, subject: &str, seen: impl Into<String>) -> Self {
        Self { level, subject: subject.to_owned(), seen: seen.into(), remedy: None }
    }

    fn ok(subject: &str, seen: impl Into<String>) -> Self {
        Self::new(Level::Ok, subject, seen)
    }

    fn warning(subject: &str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(Level::Warning, subject, seen) }
    }

    fn problem(subject: &str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(Level::Problem, subject, seen) }
    }
}

/// Looks at what a daemon with these options and this environment needs, within ten seconds. Options
/// that were not `given` are replaced by those of the service.
pub(crate) fn run(mut options: Options, given: Given) -> Report {
    type Look = fn(&Options, Option<&Path>) -> Vec<Entry>;
    let looks: [(&str, Look); 5] = [
        ("address", |options, _| vec![address::look(&options.listen)]),
        ("TLS", |options, credentials| address::tls(&options.listen, credentials)),
        ("WireGuard", |options, _| backends::wireguard(&options.wg_device)),
        ("OpenVPN", |options, _| backends::openvpn(&options.openvpn_dir)),
        ("node", |options, _| node(options.max_connections)),
    ];
    let mut entries = settings::apply(&mut options, given);
    let (credentials, found) = settings::credentials();
    entries.extend(found);
    let end = Instant::now() + PATIENCE;
    let looks = looks.map(|(subject, look)| {
        let (options, credentials) = (options.clone(), credentials.clone());
        let look = move |_| Ok(look(&options, credentials.as_deref()));
        (subject, Agent::<()>::new(subject).change(end, subject.to_owned(), look))
    });
    for (subject, answer) in looks {
        entries.extend(answer.and_then(|answer| answer.wait(end)).unwrap_or_else(|failure| {
            let hint = "perhaps a name server, a file system or the kernel hangs";
            vec![Entry::problem(subject, format!("{failure} ({hint})"), "journalctl -k")]
        }));
    }
    Report(entries)
}

impl Report {
    /// The status of the process: 0, 1 where there are warnings, 2 where there are problems.
    pub(crate) fn exit_status(&self) -> u8 {
        self.0.iter().map(|entry| entry.level as u8).max().unwrap_or(0)
    }

    /// An array of objects with `level` (`ok`, `warning`, `problem`), `subject`, `seen` and
    /// `remedy` (text or null), and a line feed.
    pub(crate) fn json(&self) -> String {
        // Only strings: nothing in them can fail to be written.
        serde_json::to_string_pretty(&self.0).unwrap_or_default() + "\n"
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|entry| entry.subject.chars().count()).max().unwrap_or(0);
        for Entry { level, subject, seen, remedy } in &self.0 {
            let level = format!("{level:?}").to_lowercase();
            writeln!(f, "{level:<8} {:<width$}  {}", one_line(subject), one_line(seen))?;
            if let Some(remedy) = remedy {
                writeln!(f, "{:8} {:width$}  mend: {}", "", "", one_line(remedy))?;
            }
        }
        let count = |level| self.0.iter().filter(|entry| entry.level == level).count();
        match (count(Level::Problem), count(Level::Warning)) {
            (0, 0) => writeln!(f, "\nAll is well."),
            (problems, warnings) => writeln!(f, "\nproblems: {problems}, warnings: {warnings}"),
        }
    }
}

/// What the node itself must grant: open files, and whether it is in maintenance.
fn node(max_connections: usize) -> Vec<Entry> {
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

/// The setting that becomes a flag of the daemon, and the file in which it is set.
fn setting(variable: &str, value: &str) -> String {
    let fedora = Path::new("/etc/sysconfig").exists();
    let file = if fedora { "/etc/sysconfig/vpn-daemon" } else { "/etc/default/vpn-daemon" };
    format!("{variable}={value} in {file}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_aligned_and_counts() {
        let report = Report(vec![
            Entry::ok("address", "127.0.0.1:41194 is free"),
            Entry::problem("a.sock", "asks for a\x1b[2J password", "take it away"),
        ]);
        let expected = "\
ok       address  127.0.0.1:41194 is free
problem  a.sock   asks for a\\u{1b}[2J password
                  mend: take it away

problems: 1, warnings: 0
";
        assert_eq!((report.to_string().as_str(), report.exit_status()), (expected, 2));
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!(json[0]["level"], "ok");
        assert_eq!(json[0]["remedy"], serde_json::Value::Null);
        assert_eq!(json[1]["remedy"], "take it away");
        let report = Report(vec![Entry::ok("a", "b"), Entry::warning("a", "b", "c")]);
        assert!(report.to_string().ends_with("\nproblems: 0, warnings: 1\n"));
        assert_eq!(report.exit_status(), 1);
        let report = Report(vec![Entry::ok("a", "b")]);
        assert!(report.to_string().ends_with("\nAll is well.\n"));
        assert_eq!(report.exit_status(), 0);
    }
}
