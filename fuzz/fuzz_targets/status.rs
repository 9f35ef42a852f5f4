//! Whatever a status report says: it is read as a slow parser reads it, and what is kept of it is no
//! longer than it is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vpn_daemon::openvpn::status::Report;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let mut report = Report::default();
    let mut complete =
        text.split('\n').map(|line| report.line(line)).find(|read| *read != Ok(false));
    if let Some(Err(sentence)) = complete {
        assert!(!sentence.is_empty());
        complete = None;
    }
    let kept = |client: &vpn_daemon::openvpn::Client| {
        // "CLIENT_LIST", and a tab before each.
        11 + 3 + client.common_name.len() + client.ipv4.len() + client.ipv6.len()
    };
    assert!(report.clients.iter().map(kept).sum::<usize>() <= text.len());
    assert_eq!(complete.map(|_| report.clients), common::status(text.split('\n')));
});
