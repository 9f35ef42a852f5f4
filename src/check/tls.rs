//! The TLS files, or that there are none and who can reach the plain port.

use std::path::Path;
use std::time::SystemTime;

use super::settings::OF_THE_SERVICE;
use super::{Entry, Level, address, setting};
use crate::cli::ListenAddress;
use crate::rfc3339;
use crate::tls::Tls;

const SUBJECT: &str = "TLS";

pub(super) fn look(listen: &ListenAddress, directory: Option<&Path>) -> Vec<Entry> {
    let Some(directory) = directory else { return vec![plain(listen)] };
    let tls = match Tls::open(directory) {
        Ok(tls) => tls,
        Err(error) => return vec![Entry::new(Level::Problem, SUBJECT, error)],
    };
    let until = rfc3339::format(tls.expire().0);
    let seen = format!("certificate and key belong together, valid until {until}");
    let findings = tls.findings(SystemTime::now()).into_iter().map(|(severity, text)| {
        let level = match severity {
            log::Level::Error => Level::Problem,
            log::Level::Warn => Level::Warning,
            _ => Level::Ok,
        };
        Entry::new(level, SUBJECT, text)
    });
    std::iter::once(Entry::ok(SUBJECT, seen)).chain(findings).collect()
}

fn plain(listen: &ListenAddress) -> Entry {
    if Path::new(OF_THE_SERVICE).exists() {
        let seen = format!(
            "the service has credentials that may not be read here, and were not looked at: \
             {OF_THE_SERVICE}"
        );
        return Entry::warning(SUBJECT, seen, "sudo vpn-daemon check");
    }
    if address::is_local(listen) {
        return Entry::ok(SUBJECT, "plain HTTP, reachable only from this host");
    }
    let seen =
        format!("plain HTTP on {listen}: everybody who reaches this address may remove peers");
    let local = setting("LISTEN", "127.0.0.1:41194");
    let drop_in = "/etc/systemd/system/vpn-daemon.service.d/credentials.conf";
    Entry::warning(SUBJECT, seen, format!("LoadCredential= in {drop_in}, or {local}"))
}
