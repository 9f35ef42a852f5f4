//! Why a handshake was refused, and how often the log says so.

use std::fmt;
use std::io;
use std::time::{Duration, Instant, SystemTime};

use rustls::{AlertDescription, CertificateError, Error as E, PeerIncompatible};

use super::error::explain;
use crate::rfc3339;

/// How long the log is quiet about a reason it has just named.
const QUIET: Duration = Duration::from_secs(1);
/// Longest detail, in characters.
const MAX_DETAIL: usize = 200;

/// Why a handshake was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the sentences are in as_str")]
pub enum Reason {
    NoCertificate,
    UnknownIssuer,
    Expired,
    NotYetValid,
    Revoked,
    Usage,
    NameConstraint,
    BadCertificate,
    OldProtocol,
    NothingInCommon,
    NotTls,
    ServerRefused,
    Closed,
    TimedOut,
    Other,
}

/// A refused handshake, to be logged as "refused handshake of ADDRESS: …".
#[derive(Debug)]
pub struct Refusal {
    /// The reason, the same for everything alike.
    pub reason: Reason,
    /// More about this one; may be empty. Holds no control characters.
    pub detail: String,
}

/// Lets a refusal through to the log once a second per reason.
#[derive(Debug)]
pub struct Throttle {
    slots: [Slot; Reason::COUNT],
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    logged: Option<Instant>,
    suppressed: u64,
}

impl Reason {
    const COUNT: usize = Self::Other as usize + 1;

    /// The reason in words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoCertificate => "the client sent no certificate",
            Self::UnknownIssuer => "the client's certificate is not issued by a CA in ca.crt",
            Self::Expired => "the client's certificate or its CA's has expired",
            Self::NotYetValid => "the client's certificate or its CA's is not valid yet",
            Self::Revoked => "the client's certificate is revoked",
            Self::Usage => "the client's certificate is not for client authentication",
            Self::NameConstraint => "the client's certificate violates its CA's name constraint",
            Self::BadCertificate => "the client's certificate cannot be used",
            Self::OldProtocol => "the client does not speak TLS 1.3",
            Self::NothingInCommon => "the client supports none of our algorithms",
            Self::NotTls => "the client does not speak TLS",
            Self::ServerRefused => "the client refused the server's certificate or the connection",
            Self::Closed => "the client closed the connection",
            Self::TimedOut => "the handshake took too long",
            Self::Other => "the handshake failed",
        }
    }
}

impl Refusal {
    fn new(reason: Reason, detail: impl fmt::Display) -> Self {
        let detail = detail.to_string();
        let detail = detail.chars().take(MAX_DETAIL).map(|c| if c.is_control() { '?' } else { c });
        Self { reason, detail: detail.collect() }
    }
}

impl From<&E> for Refusal {
    fn from(error: &E) -> Self {
        let reason = match error {
            E::NoCertificatesPresented => Reason::NoCertificate,
            E::InvalidCertificate(error) => return Self::from(error),
            E::PeerIncompatible(
                PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
                | PeerIncompatible::ServerDoesNotSupportTls12Or13,
            ) => Reason::OldProtocol,
            E::PeerIncompatible(detail) => {
                return Self::new(Reason::NothingInCommon, format_args!("{detail:?}"));
            }
            E::InvalidMessage(detail) => {
                return Self::new(Reason::NotTls, format_args!("{detail:?}"));
            }
            E::AlertReceived(AlertDescription::CloseNotify | AlertDescription::UserCanceled) => {
                Reason::Closed
            }
            E::AlertReceived(alert) => {
                return Self::new(Reason::ServerRefused, format_args!("alert {alert:?}"));
            }
            other => return Self::new(Reason::Other, other),
        };
        Self::new(reason, "")
    }
}

impl From<&CertificateError> for Refusal {
    fn from(error: &CertificateError) -> Self {
        use CertificateError as C;
        let time = |time: &rustls::pki_types::UnixTime| {
            rfc3339::format(SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs()))
        };
        match error {
            C::ExpiredContext { not_after, .. } => {
                Self::new(Reason::Expired, format_args!("on {}", time(not_after)))
            }
            C::NotValidYetContext { not_before, .. } => {
                Self::new(Reason::NotYetValid, format_args!("before {}", time(not_before)))
            }
            C::UnknownIssuer => Self::new(Reason::UnknownIssuer, ""),
            // The issuer's name is in ca.crt, with another key.
            C::BadSignature => Self::new(Reason::UnknownIssuer, "a CA there has the same name"),
            C::Revoked => Self::new(Reason::Revoked, ""),
            C::InvalidPurpose => Self::new(Reason::Usage, ""),
            C::Other(other) => match other.0.downcast_ref() {
                Some(webpki::Error::NameConstraintViolation) => {
                    Self::new(Reason::NameConstraint, "")
                }
                Some(error) => Self::new(Reason::BadCertificate, explain(error)),
                None => Self::new(Reason::BadCertificate, &other.0),
            },
            other => Self::new(Reason::BadCertificate, format_args!("{other:?}")),
        }
    }
}

impl From<&io::Error> for Refusal {
    /// Takes what reading and writing during a handshake returns; rustls' own errors come
    /// inside of it.
    fn from(error: &io::Error) -> Self {
        if let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<E>()) {
            return Self::from(error);
        }
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::new(Reason::TimedOut, ""),
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => Self::new(Reason::Closed, ""),
            _ => Self::new(Reason::Other, error),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason.as_str())?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        Ok(())
    }
}

impl Throttle {
    /// Has logged nothing yet.
    pub const fn new() -> Self {
        Self { slots: [Slot { logged: None, suppressed: 0 }; Reason::COUNT] }
    }

    /// `None`: not now. `Some(n)`: log it; `n` like it were kept back since the last one logged.
    pub fn admit(&mut self, reason: Reason, now: Instant) -> Option<u64> {
        let slot = self.slots.get_mut(reason as usize)?;
        if slot.logged.is_some_and(|logged| now.saturating_duration_since(logged) < QUIET) {
            slot.suppressed += 1;
            return None;
        }
        slot.logged = Some(now);
        Some(std::mem::take(&mut slot.suppressed))
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_second_per_reason() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut throttle = Throttle::new();
        for (time, reason, expected) in [
            (0, Reason::NotTls, Some(0)),
            (0, Reason::Other, Some(0)),
            (1, Reason::NotTls, None),
            (999, Reason::NotTls, None),
            (999, Reason::Other, None),
            (1000, Reason::NotTls, Some(2)),
            (1500, Reason::NotTls, None),
            // A clock that seems to go back (another thread took its time earlier).
            (900, Reason::NotTls, None),
            (5000, Reason::NotTls, Some(2)),
            (5000, Reason::Other, Some(1)),
            (9000, Reason::NotTls, Some(0)),
        ] {
            assert_eq!(throttle.admit(reason, at(time)), expected, "{reason:?} at {time} ms");
        }
    }

    #[test]
    fn details_are_bounded_and_printable() {
        let refusal = Refusal::new(Reason::Other, "a\nb\x1b[2J".repeat(100));
        assert!(refusal.detail.starts_with("a?b?[2J"));
        assert_eq!(refusal.detail.chars().count(), MAX_DETAIL);
    }

    #[test]
    fn system_errors() {
        for (kind, expected) in [
            (io::ErrorKind::WouldBlock, Reason::TimedOut),
            (io::ErrorKind::TimedOut, Reason::TimedOut),
            (io::ErrorKind::UnexpectedEof, Reason::Closed),
            (io::ErrorKind::ConnectionReset, Reason::Closed),
            (io::ErrorKind::PermissionDenied, Reason::Other),
        ] {
            assert_eq!(Refusal::from(&io::Error::from(kind)).reason, expected);
        }
        let wrapped = io::Error::new(io::ErrorKind::InvalidData, E::NoCertificatesPresented);
        assert_eq!(Refusal::from(&wrapped).reason, Reason::NoCertificate);
    }
}
