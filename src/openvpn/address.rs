//! Is this text an address? The same answers as from `std`, which builds the address as well and
//! takes many times as long: there are two in each client's row.

use std::net::Ipv6Addr;

/// Whether the text is an IPv4 address: four numbers up to 255 without leading zeros.
pub(super) fn is_ipv4(text: &str) -> bool {
    let (mut dots, mut number) = (0, None);
    for byte in text.bytes() {
        number = match (byte, number) {
            (b'0'..=b'9', None) => Some(u32::from(byte - b'0')),
            (b'0'..=b'9', Some(high @ 1..=25)) => Some(high * 10 + u32::from(byte - b'0')),
            (b'.', Some(..=255)) => {
                dots += 1;
                None
            }
            _ => return false,
        };
    }
    dots == 3 && number.is_some_and(|number| number <= 255)
}

/// Whether the text is an IPv6 address (RFC 4291, 2.2).
pub(super) fn is_ipv6(text: &str) -> bool {
    let (mut groups, mut digits, mut gap, mut last) = (0, 0, false, 0);
    for byte in text.bytes() {
        match byte {
            b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F' if digits < 4 => {
                groups += u32::from(digits == 0);
                digits += 1;
            }
            b':' if last == b':' && gap => return false,
            b':' => {
                gap |= last == b':';
                digits = 0;
            }
            // With an IPv4 address at its end, perhaps; such addresses are rare.
            b'.' => return text.parse::<Ipv6Addr>().is_ok(),
            _ => return false,
        }
        last = byte;
    }
    let lone_colon = text.starts_with(':') && !text.starts_with("::")
        || text.ends_with(':') && !text.ends_with("::");
    !lone_colon && if gap { groups < 8 } else { groups == 8 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn check(text: &str) {
        assert_eq!(is_ipv4(text), text.parse::<Ipv4Addr>().is_ok(), "{text:?}");
        assert_eq!(is_ipv6(text), text.parse::<Ipv6Addr>().is_ok(), "{text:?}");
    }

    #[test]
    fn numbers() {
        for number in 0..=1100 {
            check(&format!("10.{number}.0.1"));
            check(&format!("10.0.0.0{number}"));
            check(&format!("fd00:{number}::1"));
        }
    }

    #[test]
    fn every_short_text() {
        let alphabet = [':', '0', 'f', 'G', '.', '2', '/'];
        let mut texts = vec![String::new()];
        for _ in 0..6 {
            let longer = texts.iter().flat_map(|text| alphabet.map(|c| format!("{text}{c}")));
            texts = longer.collect();
            texts.iter().for_each(|text| check(text));
        }
    }

    #[test]
    fn every_address_of_few_pieces() {
        // Groups, gaps and stray colons in every order, up to one more than an address holds.
        for pieces in 0..=9 {
            for kinds in 0..3_u32.pow(pieces) {
                let piece = |at: u32| ["1:", "abcd:", ":"][(kinds / 3_u32.pow(at) % 3) as usize];
                let text: String = (0..pieces).map(piece).collect();
                check(&text);
                check(text.trim_end_matches(':'));
                check(&format!("{text}5"));
                check(&format!("{text}1.2.3.4"));
            }
        }
    }

    #[test]
    fn changed_addresses() {
        for address in
            ["10.66.21.3", "255.255.255.255", "fde6:76bd:ad97:ac5e::3", "1:2:3:4:5:6:7:8"]
        {
            check(address);
            for at in 0..address.len() {
                for c in ["", "0", "9", "a", "F", "g", ":", "::", ".", "é", " ", "%", "-", "+"] {
                    check(&format!("{}{c}{}", &address[..at], &address[at..]));
                    check(&format!("{}{c}{}", &address[..at], &address[at + 1..]));
                }
            }
        }
    }
}
