//! HTTPS through the daemon: who is let in, what is logged, and new credentials.

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::common::{Answer, Daemon};
use super::pki::Profile;
use super::pki::{CA, CLIENT, Pki, SERVER};
use super::{Connection, NODE, client, shake_hands, start_tls};

/// TLS 1.3 tells a client of its refusal only after the client's last flight.
fn is_served(pki: &Pki, daemon: &Daemon, name: Option<&str>) -> bool {
    let Ok(mut tunnel) = shake_hands(&client(pki, name), daemon.connect()) else { return false };
    tunnel.write_all(NODE.as_bytes()).and_then(|()| tunnel.flush()).is_ok()
        && Answer::read(&mut tunnel, false).is_ok_and(|answer| answer.status == 200)
}

#[test]
fn only_clients_of_the_ca_are_served() {
    let pki = Pki::usual();
    pki.authority("other", None, CA);
    pki.issue("stranger", "other", CLIENT);
    pki.issue("expired", "ca", Profile { not_after: "20210101000000Z", ..CLIENT });
    let daemon = start_tls(&pki, &[]);
    assert!(is_served(&pki, &daemon, Some("portal")));
    for (name, reason) in [
        (None, "sent no certificate"),
        (Some("stranger"), "UnknownIssuer"),
        (Some("expired"), "certificate expired"),
        (Some("server"), "does not allow extended key usage for client authentication"),
    ] {
        assert!(!is_served(&pki, &daemon, name), "{name:?}");
        let line = daemon.wait_for_log(reason);
        assert!(line.contains("refused handshake of 127.0.0.1:"), "{line}");
    }
    assert!(is_served(&pki, &daemon, Some("portal")));
}

#[test]
fn what_is_not_tls_is_refused_and_logged_once_a_second() {
    let pki = Pki::usual();
    let daemon = start_tls(&pki, &[]);
    let started = Instant::now();
    for _ in 0..50 {
        let mut plain = daemon.connect();
        plain.write_all(NODE.as_bytes()).unwrap();
        let mut alert = Vec::new();
        plain.read_to_end(&mut alert).unwrap();
        // RFC 8446, 6: a record of type 21 with a fatal (2) alert.
        assert_eq!((alert[0], alert[5]), (21, 2), "{alert:?}");
    }
    let seconds = started.elapsed().as_secs() + 1;
    let line = daemon.wait_for_log("does not speak TLS");
    assert!(line.contains("refused handshake of 127.0.0.1:"), "{line}");
    let lines = daemon.log().iter().filter(|line| line.contains("speak TLS")).count();
    assert!(lines as u64 <= seconds, "{lines} lines in {seconds} s");
    assert!(is_served(&pki, &daemon, Some("portal")));
}

#[test]
fn a_handshake_has_five_seconds() {
    let pki = Pki::usual();
    let daemon = start_tls(&pki, &[]);
    let started = Instant::now();
    let mut silent = daemon.connect();
    let mut half = daemon.connect();
    // The beginning of a ClientHello of 512 bytes.
    half.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]).unwrap();
    assert!(is_served(&pki, &daemon, Some("portal")), "they delay nobody");
    for stream in [&mut silent, &mut half] {
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let taken = started.elapsed();
    assert!(taken >= Duration::from_secs(5) && taken < Duration::from_secs(9), "{taken:?}");
    daemon.wait_for_log("the handshake took too long");
}

#[test]
fn the_end_of_a_connection_is_told_in_tls() {
    let pki = Pki::usual();
    let daemon = start_tls(&pki, &[]);
    let mut tunnel = shake_hands(&client(&pki, Some("portal")), daemon.connect()).unwrap();
    assert_eq!(tunnel.ask(&NODE.replace("Host", "Connection: close\r\nHost")).status, 200);
    // rustls reports an end without close_notify as an error.
    tunnel.ends();
    // And the client may say so first.
    let mut tunnel = shake_hands(&client(&pki, Some("portal")), daemon.connect()).unwrap();
    assert_eq!(tunnel.ask(NODE).status, 200);
    tunnel.half_close();
    tunnel.ends();
}

#[test]
fn large_answers_and_requests_span_records() {
    let pki = Pki::usual();
    let daemon = start_tls(&pki, &[]);
    let mut tunnel = shake_hands(&client(&pki, Some("portal")), daemon.connect()).unwrap();
    for length in [16_000, 16_384, 40_000, 65_536] {
        let answer = tunnel.ask(&super::post("/none", &"a".repeat(length)));
        assert_eq!(answer.status, 404, "{length}");
    }
    let target = format!("/{}", "x".repeat(15_000));
    let answer = tunnel.ask(&NODE.replace("/i/node", &target));
    assert!(answer.status == 404 && answer.error().ends_with(&target));
}

#[test]
fn sighup_puts_new_credentials_in_force() {
    let pki = Pki::usual();
    pki.authority("next", None, CA);
    pki.issue("next-server", "next", SERVER);
    pki.issue("next-portal", "next", CLIENT);
    let daemon = start_tls(&pki, &[]);
    // Broken files change nothing, and the log names the file.
    fs::write(pki.credential("ca.crt"), "nonsense\n").unwrap();
    daemon.signal("HUP");
    let line = daemon.wait_for_log("the old credentials stay in force");
    assert!(line.contains("ca.crt"), "{line}");
    assert!(is_served(&pki, &daemon, Some("portal")));

    // The old server certificate with the new CA alone.
    pki.credentials(&["next.crt"], &["server.crt"], "server.key");
    daemon.signal("HUP");
    daemon.wait_for_log("new connections use the credentials as they are now");
    assert!(is_served(&pki, &daemon, Some("next-portal")));
    assert!(!is_served(&pki, &daemon, Some("portal")));
}

#[test]
fn without_its_credentials_the_daemon_does_not_start() {
    let start = |directory: &std::path::Path| {
        // A daemon that starts where it should not is ended.
        let mut command = Command::new("timeout");
        command.args([
            "-s",
            "KILL",
            "20",
            env!("CARGO_BIN_EXE_vpn-daemon"),
            "-listen",
            "127.0.0.1:0",
        ]);
        command.env("CREDENTIALS_DIRECTORY", directory).env_remove("RUNTIME_DIRECTORY");
        let output = command.stdin(Stdio::null()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for file in ["ca.crt", "server.crt", "server.key"] {
        for content in [None, Some(""), Some("nonsense\n")] {
            let pki = Pki::usual();
            match content {
                None => fs::remove_file(pki.credential(file)).unwrap(),
                Some(content) => fs::write(pki.credential(file), content).unwrap(),
            }
            let (code, stderr) = start(&pki.credentials_directory());
            assert_eq!(code, Some(1), "{file} {content:?}: {stderr}");
            assert_eq!(stderr.lines().count(), 1, "{stderr}");
            assert!(stderr.contains(file), "{file} {content:?}: {stderr}");
        }
    }
    let pki = Pki::usual();
    pki.key("other", super::pki::Kind::Ed25519);
    pki.credentials(&["ca.crt"], &["server.crt"], "other.key");
    let (code, stderr) = start(&pki.credentials_directory());
    assert!(code == Some(1) && stderr.lines().count() == 1, "{stderr}");
    // Set but empty: never plain HTTP.
    let (code, stderr) = start(std::path::Path::new(""));
    assert!(code == Some(1) || code == Some(2), "{stderr}");
    assert!(stderr.contains("CREDENTIALS_DIRECTORY"), "{stderr}");
}
