//! What a client may make the daemon compute, and what it must prove.

use std::fs;
use std::io::Read as _;

use super::Site;
use super::pki::{self, CA, CLIENT, ED25519, P384, Pki, Profile};

/// CPU time of the daemon for forty handshakes, in hundredths of a second.
fn cost(site: &Site, client: &str) -> u64 {
    let spent = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", site.daemon.pid())).unwrap();
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ');
        // proc_pid_stat(5): utime and stime.
        fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>()
    };
    let before = spent();
    for _ in 0..40 {
        site.curl(Some(client), &[]);
    }
    spent() - before
}

#[test]
fn a_chain_costs_little_whatever_is_in_it() {
    let pki = Pki::usual();
    let profile = Profile { key: P384, extensions: "basicConstraints=CA:TRUE", ..CA };
    pki.issue("root", "root", profile);
    pki.issue("client", "root", CLIENT);
    pki.credentials(&["root"], &["server"]);
    let site = Site::start(pki);
    let pki = &site.pki;
    site.accepts("client");
    let floor = cost(&site, "client");
    for (name, key, common_name, count, sentence) in [
        // Of these, any order could be the way to the CA.
        ("many", ED25519, "x", 200, "the client sent 201 certificates of "),
        // Of these, each claims to be issued by it: a signature to check.
        ("same", P384, "root", 7, "the client sent several issuers of one name"),
    ] {
        pki.issue(name, name, Profile { key, common_name, ..profile });
        pki.issue("attacker", name, CLIENT);
        // Certificates of one name and different keys, which claim to be issued by a CA of that name.
        let look_alike = format!(
            "req -x509 -subj /CN={common_name} -nodes -keyout other.key -newkey {key} \
             -addext {}",
            profile.extensions
        );
        let look_alikes = (0..count).map(|_| pki.openssl(&look_alike)).collect::<String>();
        fs::write(pki.path("look-alikes.crt"), look_alikes).unwrap();
        pki.bundle("attacker", &["look-alikes"]);
        site.refuses(Some("attacker"), &[], sentence);
        let cost = cost(&site, "attacker");
        assert!(cost < 5 * floor, "{name}: {cost} instead of {floor} for an ordinary one");
    }
}

#[test]
fn long_chains_are_let_in_up_to_a_limit() {
    let pki = Pki::usual();
    ["ca", "a", "b", "c", "d", "e", "f"].windows(2).for_each(|two| pki.issue(two[1], two[0], CA));
    pki.issue("deep", "f", CLIENT);
    pki.bundle("deep", &["f", "e", "d", "c", "b", "a", "ca"]);
    let site = Site::start(pki);
    site.accepts("deep");
    site.pki.bundle("deep", &["server"]);
    site.refuses(Some("deep"), &[], "the client sent 9 certificates");
    // One that is larger than all of them may be.
    let name = format!("{} subjectAltName=DNS:{}y", CLIENT.extensions, "x.".repeat(20_000));
    site.pki.issue("large", "ca", Profile { extensions: &name, ..CLIENT });
    site.refuses(Some("large"), &[], "the client sent 2 certificates of 4");
}

#[test]
fn a_stolen_certificate_is_no_use_without_its_key() {
    let site = Site::start(Pki::usual());
    let thief = site.pki.client("portal", "server");
    let line = site.logs("the client does not have its private key", || {
        // It is told in the end.
        let tunnel = pki::connect(&thief, site.daemon.connect());
        assert!(tunnel.and_then(|mut tunnel| tunnel.read(&mut [0])).is_err());
    });
    assert!(line.contains("refused handshake of 127.0.0.1:"), "{line}");
}
