//! Whatever a status report says: it is read as a slow parser reads it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vpn_daemon::openvpn::status::Report;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let (mut report, mut clients) = (Report::default(), Vec::new());
    let mut lines = text.split('\n');
    while !report.is_complete
        && let Some(line) = lines.next()
    {
        match report.line(line) {
            Ok(client) => clients.extend(client),
            Err(sentence) => {
                assert!(!sentence.is_empty());
                break;
            }
        }
    }
    assert_eq!(report.is_complete.then_some(clients), common::status(text.split('\n')));
});
