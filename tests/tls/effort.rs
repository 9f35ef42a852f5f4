//! What a client may make the daemon compute, and what it must prove.

use std::fs;
use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::ring::{self, sign::any_supported_type};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::Site;
use super::pki::{CA, CLIENT, Kind, Pki, Profile, SERVER_NAME};

type Chain = Vec<CertificateDer<'static>>;

fn certificate(pki: &Pki, name: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(pki.path(&format!("{name}.crt"))).unwrap()
}

/// A client that sends this chain and signs with the key of `key`, whoever's they are.
fn client(pki: &Pki, chain: Chain, key: &str) -> Arc<ClientConfig> {
    let key = PrivateKeyDer::from_pem_file(pki.path(&format!("{key}.key"))).unwrap();
    let key = CertifiedKey::new(chain, any_supported_type(&key).unwrap());
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate(pki, "ca")).unwrap();
    let resolver = Arc::new(SingleCertAndKey::from(key));
    Arc::new(builder.with_root_certificates(roots).with_client_cert_resolver(resolver))
}

/// Whether the daemon has answered.
fn is_served(site: &Site, client: &Arc<ClientConfig>) -> bool {
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    let connection = ClientConnection::new(Arc::clone(client), name).unwrap();
    let mut tunnel = StreamOwned::new(connection, site.daemon.connect());
    let request = b"GET /i/node HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
    let mut answer = Vec::new();
    let asked = tunnel.write_all(request).and_then(|()| tunnel.flush());
    asked.and_then(|()| tunnel.read_to_end(&mut answer)).is_ok()
        && answer.starts_with(b"HTTP/1.1 200")
}

/// CPU time of the daemon for handshakes, each in hundredths of a second.
fn cost(site: &Site, client: &Arc<ClientConfig>, handshakes: u32) -> f64 {
    let spent = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", site.daemon.pid())).unwrap();
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ');
        // proc_pid_stat(5): utime and stime.
        fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>()
    };
    let before = spent();
    for _ in 0..handshakes {
        is_served(site, client);
    }
    // What a client no longer waits for is work, too.
    let mut after = spent();
    loop {
        std::thread::sleep(Duration::from_millis(200));
        if std::mem::replace(&mut after, spent()) == after {
            break;
        }
    }
    (spent() - before) / f64::from(handshakes)
}

/// Certificates of one name and different keys, which claim to be issued by a CA of that name.
fn look_alikes(pki: &Pki, name: &str, count: u16) -> Chain {
    let original = certificate(pki, name);
    // A BIT STRING without unused bits: an Ed25519 key, or one of P-384.
    let is_key = |bytes: &[u8]| bytes == [3, 33, 0] || bytes == [3, 98, 0];
    let key = original.windows(3).position(is_key).unwrap() + 4;
    let look_alike = |number: u16| {
        let mut der = original.to_vec();
        der[key..key + 2].copy_from_slice(&number.to_be_bytes());
        CertificateDer::from(der)
    };
    [vec![certificate(pki, "attacker")], (0..count).map(look_alike).collect()].concat()
}

#[test]
fn a_chain_costs_little_whatever_is_in_it() {
    let pki = Pki::usual();
    let profile = Profile { kind: Kind::P384, extensions: "basicConstraints=CA:TRUE\n", ..CA };
    pki.authority("root", None, profile);
    pki.issue("client", "root", CLIENT);
    pki.credentials(&["root.crt"], &["server.crt"], "server.key");
    let site = Site::start(pki);
    let pki = &site.pki;
    let ordinary = client(pki, vec![certificate(pki, "client")], "client");
    assert!(is_served(&site, &ordinary));
    let floor = cost(&site, &ordinary, 100);
    for (name, kind, subject, count, sentence) in [
        // Of these, any order could be the way to the CA.
        ("many", Kind::Ed25519, "/CN=x", 200, "the client sent 201 certificates of "),
        // Of these, each claims to be issued by it: a signature to check.
        ("same", Kind::P384, "/CN=root", 7, "the client sent several issuers of one name"),
    ] {
        pki.authority(name, None, Profile { kind, subject, ..profile });
        pki.issue("attacker", name, CLIENT);
        let crafted = client(pki, look_alikes(pki, name, count), "attacker");
        let line = site.logs(sentence, || assert!(!is_served(&site, &crafted)));
        assert!(line.contains("refused handshake of 127.0.0.1:"), "{line}");
        let cost = cost(&site, &crafted, 100);
        assert!(cost < 5.0 * floor, "{name}: {cost} instead of {floor} for an ordinary one");
    }
}

#[test]
fn long_chains_are_let_in_up_to_a_limit() {
    let pki = Pki::usual();
    for (name, issuer) in [("a", "ca"), ("b", "a"), ("c", "b"), ("d", "c"), ("e", "d"), ("f", "e")]
    {
        pki.authority(name, Some(issuer), CA);
    }
    pki.issue("deep", "f", CLIENT);
    let site = Site::start(pki);
    let pki = &site.pki;
    let mut chain: Chain =
        ["deep", "f", "e", "d", "c", "b", "a", "ca"].map(|name| certificate(pki, name)).to_vec();
    assert!(is_served(&site, &client(pki, chain.clone(), "deep")));
    chain.push(certificate(pki, "server"));
    let sentence = "the client sent 9 certificates";
    site.logs(sentence, || assert!(!is_served(&site, &client(pki, chain.clone(), "deep"))));
    // One that is larger than all of them may be.
    let name = format!("{}subjectAltName=DNS:{}", CLIENT.extensions, "x.".repeat(20_000) + "y");
    pki.issue("large", "ca", Profile { extensions: &name, ..CLIENT });
    let large = client(pki, vec![certificate(pki, "large")], "large");
    site.logs("the client sent 1 certificates of 4", || assert!(!is_served(&site, &large)));
}

#[test]
fn a_stolen_certificate_is_no_use_without_its_key() {
    let site = Site::start(Pki::usual());
    let thief = client(&site.pki, vec![certificate(&site.pki, "portal")], "server");
    let sentence = "the client does not have its private key";
    let line = site.logs(sentence, || assert!(!is_served(&site, &thief)));
    assert!(line.contains("refused handshake of 127.0.0.1:"), "{line}");
}
