//! What is noteworthy about credentials that can be used: expiry, usage, chain, names, permissions.

use std::fmt;
use std::time::{Duration, SystemTime};

use super::der::Validity;
use super::error::{CA_CERTIFICATES, REVOCATION_LISTS, SERVER_CERTIFICATE, SERVER_KEY, explain};
use crate::rfc3339;

/// How long before its end a certificate is to be renewed.
const RENEWAL: Duration = Duration::from_secs(30 * 24 * 3600);

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Good to know, nothing to mend.
    Note,
    /// Works now; mend it.
    Warning,
    /// Some or all clients cannot connect.
    Problem,
}

/// Which certificate a [`Finding`] is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Whose {
    /// The server's own.
    Server,
    /// A CA's.
    Authority {
        /// As it stands in `ca.crt`, from 1.
        number: usize,
    },
}

/// Something noteworthy about credentials that can be used; its text names the file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Finding {
    /// A certificate ends within 30 days.
    Expires {
        /// Which certificate.
        whose: Whose,
        /// Its end.
        not_after: SystemTime,
        /// Whole days until then.
        days: u64,
    },
    /// A certificate is past its end.
    Expired {
        /// Which certificate.
        whose: Whose,
        /// Its end.
        not_after: SystemTime,
    },
    /// A certificate's time has not come, or the clock is wrong.
    NotYetValid {
        /// Which certificate.
        whose: Whose,
        /// Its beginning.
        not_before: SystemTime,
    },
    /// The server's certificate is for something else: clients refuse it.
    Usage,
    /// The server's certificate has no alternative name: clients find no name to compare.
    NoName,
    /// The server's certificate has a name that its CA must not certify.
    NameConstraint,
    /// The chain in `server.crt` does not hold.
    Chain(webpki::Error),
    /// The server's certificate comes from a CA that is not in `ca.crt`, which is legal.
    OtherIssuer,
    /// The time of a list's next update is past: later revocations are unknown.
    ListOverdue {
        /// As it stands in `ca.crl`, from 1.
        number: usize,
        /// When the next list was due.
        next_update: SystemTime,
    },
    /// Everybody on the machine may read the private key.
    KeyOpen {
        /// The file's permission bits.
        mode: u32,
    },
}

impl Finding {
    /// What a certificate's validity has to say at a time.
    pub fn of_validity(whose: Whose, validity: Validity, now: SystemTime) -> Option<Self> {
        let Validity { not_before, not_after } = validity;
        if now < not_before {
            return Some(Self::NotYetValid { whose, not_before });
        }
        match not_after.duration_since(now) {
            Err(_) => Some(Self::Expired { whose, not_after }),
            Ok(left) if left <= RENEWAL => {
                let days = left.as_secs() / (24 * 3600);
                Some(Self::Expires { whose, not_after, days })
            }
            Ok(_) => None,
        }
    }

    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            Self::OtherIssuer => Severity::Note,
            Self::Expires { .. } | Self::ListOverdue { .. } | Self::KeyOpen { .. } => {
                Severity::Warning
            }
            Self::NoName | Self::Chain(_) => Severity::Warning,
            Self::Expired { .. }
            | Self::NotYetValid { .. }
            | Self::Usage
            | Self::NameConstraint => Severity::Problem,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expires { whose, not_after, days } => write!(
                f,
                "{whose} expires in {days} days, on {}: renew it and reload the daemon",
                rfc3339::format(*not_after)
            ),
            Self::Expired { whose, not_after } => write!(
                f,
                "{whose} has expired on {}: renew it and reload the daemon",
                rfc3339::format(*not_after)
            ),
            Self::NotYetValid { whose, not_before } => write!(
                f,
                "{whose} is not valid before {}: check the clock, or issue it again",
                rfc3339::format(*not_before)
            ),
            Self::Usage => write!(
                f,
                "{SERVER_CERTIFICATE} is not for server authentication: issue it again with \
                 extendedKeyUsage serverAuth"
            ),
            Self::NoName => write!(
                f,
                "{SERVER_CERTIFICATE} has no subjectAltName: clients that check the server's \
                 name refuse it"
            ),
            Self::NameConstraint => write!(
                f,
                "{SERVER_CERTIFICATE} has a name outside of its CA's name constraint: clients \
                 refuse it"
            ),
            Self::Chain(error) => write!(
                f,
                "{SERVER_CERTIFICATE} does not hold a good chain: {}: put the server's \
                 certificate first, then its intermediate certificates",
                explain(error)
            ),
            Self::OtherIssuer => write!(
                f,
                "{SERVER_CERTIFICATE} is not issued by a CA in {CA_CERTIFICATES}: clients must \
                 trust its CA"
            ),
            Self::ListOverdue { number, next_update } => write!(
                f,
                "{REVOCATION_LISTS}: a newer version of list {number} was due on {}: what it \
                 revokes stays revoked; later revocations are unknown",
                rfc3339::format(*next_update)
            ),
            Self::KeyOpen { mode } => {
                write!(f, "{SERVER_KEY} may be read by everybody (mode {mode:04o}): chmod o= it")
            }
        }
    }
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server => f.write_str(SERVER_CERTIFICATE),
            Self::Authority { number } => write!(f, "{CA_CERTIFICATES}: certificate {number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn renewal_is_due_thirty_days_before_the_end() {
        const DAY: u64 = 24 * 3600;
        let validity = Validity { not_before: at(1000 * DAY), not_after: at(2000 * DAY) };
        let finding = |now| Finding::of_validity(Whose::Server, validity, at(now));
        assert!(matches!(finding(1000 * DAY - 1), Some(Finding::NotYetValid { .. })));
        assert_eq!(finding(1000 * DAY), None);
        assert_eq!(finding(1970 * DAY - 1), None);
        assert!(matches!(finding(1970 * DAY), Some(Finding::Expires { days: 30, .. })));
        assert!(matches!(finding(2000 * DAY - 1), Some(Finding::Expires { days: 0, .. })));
        assert!(matches!(finding(2000 * DAY), Some(Finding::Expires { days: 0, .. })));
        assert!(matches!(finding(2000 * DAY + 1), Some(Finding::Expired { .. })));
        assert_eq!(
            finding(1990 * DAY).unwrap().to_string(),
            "server.crt expires in 10 days, on 1975-06-24T00:00:00Z: renew it and reload the daemon"
        );
    }
}
