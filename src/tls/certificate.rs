//! What webpki keeps to itself about certificates and revocation lists: names, dates, signatures.
//!
//! Layouts: RFC 5280, sections 4.1 (certificate) and 5.1 (list). Nothing here decides about trust.

use std::time::{Duration, SystemTime};

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, Error, KeyUsage};

const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
/// 2.5.4.3, `id-at-commonName`.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// Longest common name that is kept, in characters.
const MAX_NAME: usize = 128;

/// When a certificate may be used, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Validity {
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

impl Validity {
    pub(super) fn holds(self, now: UnixTime) -> bool {
        unix_time(self.not_before) <= now && now <= unix_time(self.not_after)
    }
}

/// A certificate's validity, or `None` where it cannot be read.
pub(crate) fn validity(certificate: &CertificateDer) -> Option<Validity> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    let time = |time: UnixTime| SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs());
    // webpki looks at the dates before anything else, and tells them in its errors.
    let ask = |time| as_client(&certificate, UnixTime::since_unix_epoch(time));
    let Err(Error::CertExpired { not_after, .. }) = ask(Duration::MAX) else { return None };
    let not_before = match ask(Duration::ZERO) {
        Err(Error::CertNotValidYet { not_before, .. }) => time(not_before),
        _ => SystemTime::UNIX_EPOCH,
    };
    Some(Validity { not_before, not_after: time(not_after) })
}

/// Times before 1970 do not occur: [`Validity`] has none.
pub(super) fn unix_time(time: SystemTime) -> UnixTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    UnixTime::since_unix_epoch(since.unwrap_or_default())
}

/// Whether a certificate is a CA's. webpki takes any for one that it is told to trust; used as a
/// client's, it refuses a CA's.
pub(super) fn is_authority(certificate: &EndEntityCert, validity: Validity) -> bool {
    let time = unix_time(validity.not_after);
    matches!(as_client(certificate, time), Err(Error::CaUsedAsEndEntity))
}

/// What webpki says about a client's certificate of an unknown CA.
fn as_client(certificate: &EndEntityCert, time: UnixTime) -> Result<(), Error> {
    let usage = KeyUsage::client_auth();
    certificate.verify_for_usage(&[], &[], &[], time, usage, None, None).map(drop)
}

/// The common name in a certificate's subject, as it stands there. Of several it is the last, the
/// most specific one; of a long one its beginning.
pub(crate) fn common_name(certificate: &CertificateDer) -> Option<String> {
    let mut fields = Reader(certificate).enter()?.enter()?;
    let (tag, _) = fields.next()?;
    // Serial number, algorithm, issuer, validity; the version stands first, but for version 1.
    for _ in 0..if tag == VERSION { 4 } else { 3 } {
        fields.next()?;
    }
    let (mut found, mut sets) = (None, fields.enter()?);
    while let Some(mut set) = sets.enter() {
        while let Some(mut attribute) = set.enter() {
            if attribute.next()?.1 == COMMON_NAME {
                found = Some(String::from_utf8_lossy(attribute.next()?.1));
            }
        }
    }
    Some(found?.chars().take(MAX_NAME).collect())
}

/// What is read from a revocation list that webpki has parsed.
pub(super) struct List<'a> {
    pub(super) der: &'a [u8],
    /// Contents of the name's SEQUENCE, as webpki compares it.
    pub(super) issuer: &'a [u8],
    signed: &'a [u8],
    algorithm: &'a [u8],
    signature: &'a [u8],
    /// When the next one is due, in RFC 3339.
    pub(super) next_update: String,
}

impl<'a> List<'a> {
    pub(super) fn read(der: &'a [u8]) -> Option<Self> {
        let whole = Reader(der).enter()?;
        let mut parts = Reader(whole.0);
        let mut fields = parts.enter()?;
        let signed = whole.0.strip_suffix(parts.0)?;
        let (_version, _algorithm) = (fields.next()?, fields.next()?);
        let (_, issuer) = fields.next()?;
        let _this_update = fields.next()?;
        let (tag, next_update) = fields.next()?;
        let (_, algorithm) = parts.next()?;
        // A BIT STRING's first byte counts its unused bits; a signature has none.
        let signature = parts.next()?.1.strip_prefix(&[0])?;
        let next_update = rfc3339(tag, next_update)?;
        Some(Self { der, issuer, signed, algorithm, signature, next_update })
    }

    pub(super) fn is_signed_by(
        &self,
        signer: &CertificateDer,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> bool {
        let Ok(signer) = EndEntityCert::try_from(signer) else { return false };
        algorithms.all.iter().any(|algorithm| {
            algorithm.signature_alg_id().as_ref() == self.algorithm
                && signer.verify_signature(*algorithm, self.signed, self.signature).is_ok()
        })
    }
}

/// From `YYMMDDHHMMSSZ` (years 1950 to 2049) or `YYYYMMDDHHMMSSZ`.
fn rfc3339(tag: u8, time: &[u8]) -> Option<String> {
    let time = std::str::from_utf8(time).ok()?;
    let century = match tag {
        UTC_TIME if time < "50" => "20",
        UTC_TIME => "19",
        _ => "",
    };
    let digits = format!("{century}{time}");
    let parts = [0..4, 4..6, 6..8, 8..10, 10..12, 12..15].map(|part| digits.get(part));
    let [Some(year), Some(month), Some(day), Some(hour), Some(minute), Some(second)] = parts else {
        return None;
    };
    Some(format!("{year}-{month}-{day}T{hour}:{minute}:{second}"))
}

/// Walks the DER elements that stand one after another in some bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The next element's tag and content.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&[tag, first], mut rest) = self.0.split_first_chunk()?;
        let mut length = usize::from(first & 0x7f);
        if first & 0x80 != 0 {
            let (bytes, after) = rest.split_at_checked(length).filter(|(b, _)| b.len() <= 4)?;
            length = bytes.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
            rest = after;
        }
        let (content, after) = rest.split_at_checked(length)?;
        self.0 = after;
        Some((tag, content))
    }

    /// Steps into the next element.
    fn enter(&mut self) -> Option<Reader<'a>> {
        Some(Reader(self.next()?.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_lists() {
        for (tag, content, expected) in [
            (UTC_TIME, "491231235959Z", Some("2049-12-31T23:59:59Z")),
            (UTC_TIME, "500101000000Z", Some("1950-01-01T00:00:00Z")),
            (0x18, "21000101000000Z", Some("2100-01-01T00:00:00Z")),
            (UTC_TIME, "7001", None),
            (UTC_TIME, "", None),
            (0x18, "\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}", None),
        ] {
            assert_eq!(rfc3339(tag, content.as_bytes()).as_deref(), expected, "{content}");
        }
    }

    #[test]
    fn elements_end_where_the_bytes_end() {
        for malformed in [
            &[][..],
            &[0x30],
            &[0x30, 1],
            &[0x30, 0x81],
            &[0x30, 0x82, 0xff],
            &[0x30, 0x82, 0xff, 0xff, 0],
            &[0x30, 0x85, 0, 0, 0, 0, 0],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
        ] {
            assert_eq!(Reader(malformed).next(), None, "{malformed:x?}");
            assert_eq!(common_name(&malformed.into()), None);
            assert!(List::read(malformed).is_none());
        }
    }
}
