//! HTTPS through the daemon: handshakes, what is logged, and the end of a connection.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::common::Daemon;
use super::pki::Pki;
use super::{Connection, NODE, client, shake_hands, start_tls};

fn is_served(pki: &Pki, daemon: &Daemon) -> bool {
    let tunnel = shake_hands(&client(pki, "portal"), daemon.connect());
    tunnel.is_ok_and(|mut tunnel| tunnel.ask(NODE).status == 200)
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
    assert!(is_served(&pki, &daemon));
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
    assert!(is_served(&pki, &daemon), "they delay nobody");
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
    let mut tunnel = shake_hands(&client(&pki, "portal"), daemon.connect()).unwrap();
    assert_eq!(tunnel.ask(&NODE.replace("Host", "Connection: close\r\nHost")).status, 200);
    // rustls reports an end without close_notify as an error.
    tunnel.ends();
    // And the client may say so first.
    let mut tunnel = shake_hands(&client(&pki, "portal"), daemon.connect()).unwrap();
    assert_eq!(tunnel.ask(NODE).status, 200);
    tunnel.half_close();
    tunnel.ends();
}

#[test]
fn large_answers_and_requests_span_records() {
    let pki = Pki::usual();
    let daemon = start_tls(&pki, &[]);
    let mut tunnel = shake_hands(&client(&pki, "portal"), daemon.connect()).unwrap();
    for length in [16_000, 16_384, 40_000, 65_536] {
        let answer = tunnel.ask(&super::post("/none", &"a".repeat(length)));
        assert_eq!(answer.status, 404, "{length}");
    }
    let target = format!("/{}", "x".repeat(15_000));
    let answer = tunnel.ask(&NODE.replace("/i/node", &target));
    assert!(answer.status == 404 && answer.error().ends_with(&target));
}

#[test]
fn without_its_credentials_the_daemon_does_not_start() {
    for (directory, expected) in [
        ("/nowhere", "vpn-daemon: /nowhere/ca.crt does not exist: put it there\n"),
        // Set but empty: never plain HTTP.
        (
            "",
            "vpn-daemon: CREDENTIALS_DIRECTORY is empty: set it to the directory with ca.crt, \
              server.crt and server.key, or unset it for plain HTTP\n",
        ),
    ] {
        // A daemon that starts where it should not is ended.
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", "20", env!("CARGO_BIN_EXE_vpn-daemon")]);
        command.args(["-listen", "127.0.0.1:0"]).env("CREDENTIALS_DIRECTORY", directory);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), expected);
    }
}
