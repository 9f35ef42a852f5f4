//! A revocation list in `ca.crl`: who has signed it, and when the next one is due.

use rustls::crypto::CryptoProvider;
use rustls::pki_types::TrustAnchor;
use webpki::{CertRevocationList, OwnedCertRevocationList, RawPublicKeyEntity, spki_for_anchor};

use super::certificate::Reader;

const UTC_TIME: u8 = 0x17;

/// A list that a CA of `ca.crt` has signed.
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
        let fields = Fields::read(&der).ok_or("it is malformed")?;
        let signer = authorities.find(|authority: &&TrustAnchor| {
            let key = spki_for_anchor(authority);
            let is_signed = RawPublicKeyEntity::try_from(&key).is_ok_and(|key| {
                provider.signature_verification_algorithms.all.iter().any(|algorithm| {
                    algorithm.signature_alg_id().as_ref() == fields.algorithm
                        && key.verify_signature(*algorithm, fields.signed, fields.signature).is_ok()
                })
            });
            is_signed && authority.subject.as_ref() == parsed.issuer()
        });
        signer.ok_or("no CA in ca.crt has signed it: add its issuer there")?;
        let next_update = fields.next_update;
        Ok(Self { der, next_update })
    }
}

/// What webpki keeps to itself (RFC 5280, section 5.1).
struct Fields<'a> {
    signed: &'a [u8],
    algorithm: &'a [u8],
    signature: &'a [u8],
    next_update: String,
}

impl<'a> Fields<'a> {
    fn read(der: &'a [u8]) -> Option<Self> {
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
        Some(Self { signed, algorithm, signature, next_update })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
