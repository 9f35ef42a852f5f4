//! The TLS files, or that there are none and who can reach the plain port.

use std::path::Path;
use std::time::SystemTime;

use super::{Entry, address};
use crate::cli::ListenAddress;
use crate::rfc3339;
use crate::tls::{self, CA_CERTIFICATES, Error, Finding, Problem, SERVER_KEY, Severity};

use super::settings::OF_THE_SERVICE;

const SUBJECT: &str = "TLS";

pub(super) fn look(listen: &ListenAddress, directory: Option<&Path>) -> Vec<Entry> {
    let Some(directory) = directory else {
        return vec![plain(listen)];
    };
    let errors = tls::errors(directory);
    if !errors.is_empty() {
        return errors.iter().map(problem).collect();
    }
    match tls::load(directory) {
        Ok(credentials) => {
            let now = SystemTime::now();
            let names: Vec<_> = credentials
                .authorities()
                .map(|(name, _)| {
                    name.map_or_else(|| "an unnamed CA".to_owned(), |name| name.to_string())
                })
                .collect();
            let seen = format!(
                "certificate and key belong together, valid until {}; clients need a certificate \
                 of {}",
                rfc3339::format(credentials.expires()),
                names.join(", ")
            );
            let mut entries = vec![Entry::ok(SUBJECT, seen)];
            let findings = credentials.findings(now);
            entries.extend(findings.iter().map(|finding| noteworthy(finding, directory)));
            entries
        }
        // Changed since a moment ago.
        Err(error) => vec![problem(&error)],
    }
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
    Entry::warning(
        SUBJECT,
        format!("plain HTTP on {listen}: everybody who reaches this address may remove peers"),
        format!(
            "LoadCredential= in /etc/systemd/system/vpn-daemon.service.d/credentials.conf, or {}",
            super::setting("LISTEN", "127.0.0.1:41194")
        ),
    )
}

fn problem(error: &Error) -> Entry {
    let text = error.to_string();
    // The sentences end with what to do.
    let (seen, advice) = text.rsplit_once(": ").unwrap_or((&text, "put another file there"));
    let Error::File { path, problem } = error else {
        return Entry::problem(SUBJECT, seen, advice);
    };
    let shown = path.display();
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let remedy = match problem {
        Problem::Missing => {
            let below = if name == SERVER_KEY { "private/" } else { "" };
            format!("LoadCredential={name}:/etc/ssl/vpn-daemon/{below}{name} in the unit")
        }
        Problem::Unreadable(_) => format!("let the daemon's user read it: {shown}"),
        Problem::Nothing { what } => format!("write a {what} in PEM into {shown}"),
        Problem::KeyMismatch => format!("{advice}: {shown}"),
        Problem::NotCa { .. } => format!("take it out of {shown}, or issue it with CA:TRUE"),
        Problem::Key => "openssl genpkey -algorithm ed25519, and a new certificate".to_owned(),
        _ => advice.to_owned(),
    };
    Entry::problem(SUBJECT, seen, remedy)
}

fn noteworthy(finding: &Finding, directory: &Path) -> Entry {
    let text = finding.to_string();
    let cause = text.rsplit_once(": ").map_or(text.as_str(), |(cause, _)| cause);
    let (seen, remedy) = match finding {
        Finding::Expires { .. } | Finding::Expired { .. } => {
            (cause, "put a renewed one in its place, then: systemctl reload vpn-daemon".to_owned())
        }
        Finding::NotYetValid { .. } => {
            (cause, "set the clock (timedatectl), or issue it again".to_owned())
        }
        Finding::Usage => (cause, "issue it again with extendedKeyUsage=serverAuth".to_owned()),
        Finding::NoName => (
            text.as_str(),
            "issue it again with subjectAltName=DNS:NAME, the name that the portal calls"
                .to_owned(),
        ),
        Finding::NameConstraint => (
            text.as_str(),
            format!(
                "issue it again for a name that its CA allows: openssl x509 -noout -ext \
                 nameConstraints -in {}",
                directory.join(CA_CERTIFICATES).display()
            ),
        ),
        Finding::Chain(_) => {
            (cause, "cat server's-own.crt intermediate.crt >server.crt, in this order".to_owned())
        }
        Finding::OtherIssuer => return Entry::ok(SUBJECT, text),
        Finding::ListOverdue { .. } => {
            (text.as_str(), "openssl ca -gencrl, then: systemctl reload vpn-daemon".to_owned())
        }
        Finding::KeyOpen { .. } => {
            (cause, format!("chmod o= {}", directory.join(SERVER_KEY).display()))
        }
    };
    match finding.severity() {
        Severity::Note => Entry::ok(SUBJECT, seen),
        Severity::Warning => Entry::warning(SUBJECT, seen, remedy),
        Severity::Problem => Entry::problem(SUBJECT, seen, remedy),
    }
}
