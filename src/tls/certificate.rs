//! What webpki keeps to itself: the common name and the validity of a certificate, who has signed a
//! revocation list and when the next one is due.

use std::time::{Duration, SystemTime};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, Error, KeyUsage, OwnedCertRevocationList,
    RawPublicKeyEntity, spki_for_anchor,
};

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

/// A time of [`Validity`], which has none before 1970.
pub(super) fn unix_time(time: SystemTime) -> UnixTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    UnixTime::since_unix_epoch(since.unwrap_or_default())
}

/// Whether a certificate is a CA's. webpki does not look at that where it is told to trust one, but it
/// refuses a CA's certificate as a client's.
pub(super) fn is_authority(certificate: &EndEntityCert, validity: Validity) -> bool {
    let verdict = as_client(certificate, unix_time(validity.not_after));
    matches!(verdict, Err(Error::CaUsedAsEndEntity))
}

/// What webpki says about a client's certificate of an unknown CA.
fn as_client(certificate: &EndEntityCert, time: UnixTime) -> Result<(), Error> {
    let usage = KeyUsage::client_auth();
    certificate.verify_for_usage(&[], &[], &[], time, usage, None, None).map(drop)
}

/// The common name in a certificate's subject, as it stands there. Of several it is the last, the
/// most specific one; of a long one its beginning. (RFC 5280, section 4.1)
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

/// A list that a CA of `ca.crt` has signed.
#[derive(Clone, PartialEq)]
pub(super) struct List {
    pub(super) der: Vec<u8>,
    /// When the next one is due, in RFC 3339.
    pub(super) next_update: String,
}

impl List {
    /// What is wrong with a list shows here, once, rather than at each client's handshake.
    pub(super) fn new<'a>(
        der: Vec<u8>,
        mut authorities: impl Iterator<Item = &'a TrustAnchor<'static>>,
        provider: &CryptoProvider,
    ) -> Result<Self, String> {
        let parsed = OwnedCertRevocationList::from_der(&der).map_err(|error| error.to_string())?;
        let parsed = CertRevocationList::from(parsed);
        // webpki would let in whom it takes for a client of another distribution point.
        if parsed.issuing_distribution_point().is_some() {
            return Err("it speaks for some of its CA's clients: issue one for all".to_owned());
        }
        let ([signed, algorithm, signature], next_update) =
            signed_fields(&der).ok_or("it is malformed")?;
        let signer = authorities.find(|authority: &&TrustAnchor| {
            let key = spki_for_anchor(authority);
            let is_signed = RawPublicKeyEntity::try_from(&key).is_ok_and(|key| {
                provider.signature_verification_algorithms.all.iter().any(|known| {
                    known.signature_alg_id().as_ref() == algorithm
                        && key.verify_signature(*known, signed, signature).is_ok()
                })
            });
            is_signed && authority.subject.as_ref() == parsed.issuer()
        });
        signer.ok_or("no CA in ca.crt has signed it: add its issuer there")?;
        Ok(Self { der, next_update })
    }
}

/// What webpki keeps to itself of a list: what is signed, the algorithm, the signature, and when the next
/// one is due. (RFC 5280, section 5.1)
fn signed_fields(der: &[u8]) -> Option<([&[u8]; 3], String)> {
    let Reader(whole) = Reader(der).enter()?;
    let mut parts = Reader(whole);
    let mut fields = parts.enter()?;
    let signed = whole.strip_suffix(parts.0)?;
    let (_, algorithm) = parts.next()?;
    // A BIT STRING's first byte counts its unused bits; a signature has none.
    let signature = parts.next()?.1.strip_prefix(&[0])?;
    let (_version, _algorithm, _issuer) = (fields.next()?, fields.next()?, fields.next()?);
    let (_this_update, (tag, next_update)) = (fields.next()?, fields.next()?);
    let next_update = rfc3339(tag, std::str::from_utf8(next_update).ok()?)?;
    Some(([signed, algorithm, signature], next_update))
}

/// From `YYMMDDHHMMSSZ` (years 1950 to 2049) or `YYYYMMDDHHMMSSZ`.
fn rfc3339(tag: u8, time: &str) -> Option<String> {
    let century = match tag {
        UTC_TIME if time < "50" => "20",
        UTC_TIME => "19",
        _ => "",
    };
    let digits = format!("{century}{time}");
    let part = |range| digits.get(range);
    let date = format!("{}-{}-{}", part(0..4)?, part(4..6)?, part(6..8)?);
    Some(format!("{date}T{}:{}:{}Z", part(8..10)?, part(10..12)?, part(12..14)?))
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

    fn der(tag: u8, parts: &[Vec<u8>]) -> Vec<u8> {
        let content = parts.concat();
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        [vec![tag, 0x82, length[0], length[1]], content].concat()
    }

    fn certificate(version: bool, names: &[&[u8]]) -> Vec<u8> {
        let name = |name: &&[u8]| {
            let attribute = [der(0x06, &[COMMON_NAME.to_vec()]), der(0x0c, &[name.to_vec()])];
            der(0x31, &[der(0x30, &attribute)])
        };
        let subject = der(0x30, &names.iter().map(name).collect::<Vec<_>>());
        let mut fields = vec![der(VERSION, &[vec![2, 1, 2]])];
        fields.extend([2, 0x30, 0x30, 0x30].map(|tag| der(tag, &[])));
        fields.push(subject);
        der(0x30, &[der(0x30, &fields[usize::from(!version)..])])
    }

    #[test]
    fn common_names() {
        for (names, expected) in [
            (&[&b"portal"[..]][..], Some("portal")),
            (&[b"outer", b"inner"], Some("inner")),
            (&["p\u{f6}rtal \"x\"\r\n".as_bytes()], Some("p\u{f6}rtal \"x\"\r\n")),
            (&[b"p\xf6rtal"], Some("p\u{fffd}rtal")),
            (&[&[b'x'; 1000]], Some(&"x".repeat(MAX_NAME))),
            (&[b""], Some("")),
            (&[], None),
        ] {
            for version in [true, false] {
                let certificate = CertificateDer::from(certificate(version, names));
                assert_eq!(common_name(&certificate).as_deref(), expected);
            }
        }
        // Whatever the bytes are, reading ends.
        let whole = certificate(true, &[b"outer", b"inner"]);
        for (index, bit) in (0..whole.len()).flat_map(|index| (0..8).map(move |bit| (index, bit))) {
            let mut changed = whole.clone();
            changed[index] ^= 1 << bit;
            let _ = common_name(&changed.into());
            assert_eq!(common_name(&whole[..index].into()), None);
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
        }
    }

    #[test]
    fn times() {
        for (tag, time, expected) in [
            (UTC_TIME, "491231235959Z", Some("2049-12-31T23:59:59Z")),
            (UTC_TIME, "500101000000Z", Some("1950-01-01T00:00:00Z")),
            (0x18, "21000101000000Z", Some("2100-01-01T00:00:00Z")),
            (UTC_TIME, "7001", None),
            (0x18, "\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}", None),
        ] {
            assert_eq!(rfc3339(tag, time).as_deref(), expected, "{time}");
        }
    }
}
