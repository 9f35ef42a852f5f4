//! The few fields of certificates and revocation lists that webpki keeps to itself, read from DER.
//!
//! Layouts: RFC 5280 sections 4.1 (certificate) and 5.1 (list). Nothing here decides about trust:
//! webpki has parsed the same bytes before.

use std::time::{Duration, SystemTime};

const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const VERSION: u8 = 0xa0;
/// 2.5.4.3, `id-at-commonName`.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];

/// When a certificate may be used, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Validity {
    /// Not valid before this time.
    pub not_before: SystemTime,
    /// Not valid after this time.
    pub not_after: SystemTime,
}

/// What is read from a certificate.
pub(super) struct Certificate<'a> {
    pub(super) validity: Validity,
    /// Contents of the subject's `RDNSequence`.
    subject: &'a [u8],
}

/// What is read from a revocation list.
pub(super) struct List<'a> {
    /// The signed bytes, with tag and length.
    pub(super) signed: &'a [u8],
    /// Contents of the `AlgorithmIdentifier`.
    pub(super) algorithm: &'a [u8],
    pub(super) signature: &'a [u8],
    pub(super) next_update: SystemTime,
}

struct Element<'a> {
    tag: u8,
    content: &'a [u8],
    /// Tag, length and content.
    whole: &'a [u8],
}

/// Walks the elements that stand one after another in some bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn next(&mut self) -> Option<Element<'a>> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, mut rest) = rest.split_first()?;
        let mut length = usize::from(first & 0x7f);
        if first & 0x80 != 0 {
            let (bytes, after) = rest.split_at_checked(length).filter(|(b, _)| b.len() <= 4)?;
            length = bytes.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
            rest = after;
        }
        let (content, after) = rest.split_at_checked(length)?;
        let (whole, _) = self.0.split_at_checked(self.0.len() - after.len())?;
        self.0 = after;
        Some(Element { tag, content, whole })
    }

    /// Steps into the next element.
    fn enter(&mut self) -> Option<Reader<'a>> {
        Some(Reader(self.next()?.content))
    }
}

impl<'a> Certificate<'a> {
    pub(super) fn read(der: &'a [u8]) -> Option<Self> {
        let mut fields = Reader(der).enter()?.enter()?;
        let serial_or_version = fields.next()?;
        if serial_or_version.tag == VERSION {
            fields.next()?;
        }
        let (_algorithm, _issuer) = (fields.next()?, fields.next()?);
        let mut validity = fields.enter()?;
        Some(Self {
            validity: Validity {
                not_before: time(&validity.next()?)?,
                not_after: time(&validity.next()?)?,
            },
            subject: fields.next()?.content,
        })
    }

    /// The subject's common name; of several the last, which is the most specific one.
    pub(super) fn common_name(&self) -> Option<String> {
        let mut found = None;
        let mut sets = Reader(self.subject);
        while let Some(mut set) = sets.enter() {
            while let Some(mut attribute) = set.enter() {
                if attribute.next()?.content == COMMON_NAME {
                    found = text(&attribute.next()?);
                }
            }
        }
        found
    }
}

impl<'a> List<'a> {
    pub(super) fn read(der: &'a [u8]) -> Option<Self> {
        let mut parts = Reader(der).enter()?;
        let signed = parts.next()?;
        let algorithm = parts.next()?.content;
        // A BIT STRING's first byte counts its unused bits; a signature has none.
        let signature = parts.next()?.content.strip_prefix(&[0])?;
        let mut fields = Reader(signed.content);
        let algorithm_or_version = fields.next()?;
        if algorithm_or_version.tag == INTEGER {
            fields.next()?;
        }
        let (_issuer, _this_update) = (fields.next()?, fields.next()?);
        Some(Self {
            signed: signed.whole,
            algorithm,
            signature,
            next_update: time(&fields.next()?)?,
        })
    }
}

fn text(value: &Element) -> Option<String> {
    match value.tag {
        // UTF8String, PrintableString, IA5String.
        0x0c | 0x13 | 0x16 => String::from_utf8(value.content.to_vec()).ok(),
        // T61String, in practice Latin-1.
        0x14 => Some(value.content.iter().map(|byte| char::from(*byte)).collect()),
        // BMPString: UTF-16, big end first.
        0x1e => {
            let units = value
                .content
                .chunks_exact(2)
                .map(|pair| pair.iter().fold(0_u16, |unit, byte| unit << 8 | u16::from(*byte)));
            String::from_utf16(&units.collect::<Vec<_>>()).ok()
        }
        _ => None,
    }
}

/// `YYMMDDHHMMSSZ` (years 1950 to 2049) or `YYYYMMDDHHMMSSZ`. What lies before 1970 reads as 1970.
fn time(value: &Element) -> Option<SystemTime> {
    let digits = std::str::from_utf8(value.content).ok()?.strip_suffix('Z')?;
    let (year, rest) = match value.tag {
        UTC_TIME => {
            let (year, rest) = digits.split_at_checked(2)?;
            let year = number(year)?;
            (year + if year < 50 { 2000 } else { 1900 }, rest)
        }
        GENERALIZED_TIME => {
            let (year, rest) = digits.split_at_checked(4)?;
            (number(year)?, rest)
        }
        _ => return None,
    };
    let mut pairs = rest.as_bytes().chunks(2);
    let mut pair = || number(std::str::from_utf8(pairs.next()?).ok()?);
    let (month, day, hour, minute, second) = (pair()?, pair()?, pair()?, pair()?, pair()?);
    if rest.len() != 10 || !(1..=12).contains(&month) {
        return None;
    }
    // Days since 0000-03-01 of the proleptic Gregorian calendar, where a year begins in March.
    let (year, month) =
        if month > 2 { (year, month - 3) } else { (year.checked_sub(1)?, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day;
    let days = days.saturating_sub(719_469);
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

fn number(digits: &str) -> Option<u64> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(tag: u8, content: &str) -> Option<u64> {
        let content = content.as_bytes();
        time(&Element { tag, content, whole: &[] })
            .map(|time| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs())
    }

    #[test]
    fn times() {
        for (tag, content, expected) in [
            (UTC_TIME, "700101000000Z", Some(0)),
            (UTC_TIME, "700102000001Z", Some(86_401)),
            (UTC_TIME, "000229120000Z", Some(951_825_600)),
            (UTC_TIME, "491231235959Z", Some(2_524_607_999)),
            (UTC_TIME, "500101000000Z", Some(0)),
            (GENERALIZED_TIME, "20261122135813Z", Some(1_795_355_893)),
            (GENERALIZED_TIME, "99991231235959Z", Some(253_402_300_799)),
            (GENERALIZED_TIME, "00000101000000Z", None),
            (UTC_TIME, "7001010000Z", None),
            (UTC_TIME, "700101000000", None),
            (UTC_TIME, "70010100000+Z", None),
            (UTC_TIME, "701301000000Z", None),
            (UTC_TIME, "700001000000Z", None),
            (UTC_TIME, "", None),
            (UTC_TIME, "é01010000000Z", None),
            (INTEGER, "700101000000Z", None),
        ] {
            assert_eq!(seconds(tag, content), expected, "{content}");
        }
    }

    #[test]
    fn elements_end_where_the_bytes_end() {
        for malformed in [
            &[][..],
            &[0x30],
            &[0x30, 1],
            &[0x30, 0x80],
            &[0x30, 0x81],
            &[0x30, 0x82, 0xff],
            &[0x30, 0x82, 0xff, 0xff, 0],
            &[0x30, 0x85, 0, 0, 0, 0, 0],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
        ] {
            let element = Reader(malformed).next();
            assert!(element.is_none_or(|element| element.content.is_empty()), "{malformed:x?}");
            assert!(Certificate::read(malformed).is_none());
            assert!(List::read(malformed).is_none());
        }
    }

    #[test]
    fn strings() {
        for (tag, content, expected) in [
            (0x0c, &b"portal"[..], Some("portal")),
            (0x13, b"portal", Some("portal")),
            (0x0c, "p\u{f6}rtal".as_bytes(), Some("p\u{f6}rtal")),
            (0x0c, b"\xff", None),
            (0x14, b"p\xf6", Some("p\u{f6}")),
            (0x1e, b"\0p\0\xf6", Some("p\u{f6}")),
            (0x04, b"octets", None),
        ] {
            let value = Element { tag, content, whole: &[] };
            assert_eq!(text(&value).as_deref(), expected);
        }
    }
}
