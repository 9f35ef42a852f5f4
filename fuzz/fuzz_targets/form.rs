//! Whatever a query or form says: its names and values are those that a slow decoder finds, and they
//! are taken or refused as the contract has it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vpn_daemon::api::Error;
use vpn_daemon::openvpn::CommonName;
use vpn_daemon::routes::Parameters;
use vpn_daemon::wireguard::{AllowedIp, PublicKey};

/// The only value, if all is well with it.
fn only<'a, T>(values: &[&'a str], read: impl Fn(&'a str) -> Option<T>) -> Option<T> {
    match values {
        [value] => read(value),
        _ => None,
    }
}

fuzz_target!(|text: &[u8]| {
    let pairs = decoded(text);
    let theirs: Vec<_> = form_urlencoded::parse(text).into_owned().collect();
    assert_eq!(pairs, theirs);
    let values = |name: &str| -> Vec<&str> {
        pairs.iter().filter(|(key, _)| key == name).map(|(_, value)| value.as_str()).collect()
    };
    let form = Parameters::parse(text);

    for name in ["show_all", "dry_run", "include_client_peer_count"] {
        let expected = match values(name)[..] {
            [] | ["no"] => Some(false),
            ["yes"] => Some(true),
            _ => None,
        };
        assert_eq!(taken(name, form.yes_or_no(name)), expected);
    }

    let key: Option<PublicKey> = taken("public_key", form.once("public_key"));
    let sent = values("public_key");
    assert_eq!(key, only(&sent, common::public_key).map(PublicKey::from));
    if let Some(key) = key {
        assert_eq!(key.to_string(), sent[0]);
    }

    let name: Option<CommonName> = taken("common_name", form.once("common_name"));
    let is_good = |name: &&str| {
        let count = name.chars().count();
        (1..=64).contains(&count)
            && !name.chars().any(|c| c < ' ' || ('\x7f'..='\u{9f}').contains(&c))
    };
    let expected = only(&values("common_name"), |name| Some(name).filter(is_good));
    assert_eq!(name.as_ref().map(CommonName::as_str), expected);

    let ips: Option<Vec<AllowedIp>> = taken("ip_net", form.at_least_once("ip_net"));
    let expected: Option<Vec<_>> = values("ip_net").into_iter().map(common::allowed_ip).collect();
    let shown = ips.as_ref().map(|ips| ips.iter().map(ToString::to_string).collect());
    assert_eq!(shown, expected.filter(|ips: &Vec<_>| !ips.is_empty()));
    for ip in ips.iter().flatten() {
        assert_eq!(ip.to_string().parse(), Ok(*ip));
    }
});

/// What is taken. A refusal is 400 and one short sentence that names the parameter.
fn taken<T>(name: &str, result: Result<T, Error>) -> Option<T> {
    if let Err(Error { status, sentence }) = &result {
        assert_eq!(*status, 400);
        assert!(sentence.starts_with(&format!("`{name}` ")), "{sentence}");
        assert!(
            sentence.chars().count() < 800 && !sentence.contains(char::is_control),
            "{sentence}"
        );
    }
    result.ok()
}

/// The parser of <https://url.spec.whatwg.org/#urlencoded-parsing>, step by step.
fn decoded(text: &[u8]) -> Vec<(String, String)> {
    let sequences = text.split(|byte| *byte == b'&').filter(|sequence| !sequence.is_empty());
    let pair = |sequence: &[u8]| {
        let end = sequence.iter().position(|byte| *byte == b'=');
        let (name, value) = sequence.split_at(end.unwrap_or(sequence.len()));
        (percent_decoded(name), percent_decoded(value.strip_prefix(b"=").unwrap_or_default()))
    };
    sequences.map(pair).collect()
}

fn percent_decoded(text: &[u8]) -> String {
    let (mut decoded, mut at) = (Vec::new(), 0);
    while at < text.len() {
        let hex = text.get(at + 1..at + 3).filter(|hex| hex.iter().all(u8::is_ascii_hexdigit));
        match (text[at], hex) {
            (b'%', Some(hex)) => {
                let hex = std::str::from_utf8(hex).unwrap();
                decoded.push(u8::from_str_radix(hex, 16).unwrap());
                at += 2;
            }
            (b'+', _) => decoded.push(b' '),
            (byte, _) => decoded.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}
