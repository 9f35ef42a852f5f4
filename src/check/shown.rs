//! Which certificate a TLS server shows: the handshake ends there, before a client certificate
//! would be needed. So the daemon's log has a line of a refused handshake.

use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme,
};

/// `None` where no TLS server answers by `deadline`.
pub(super) fn certificate(
    address: &SocketAddr,
    deadline: Instant,
) -> Option<CertificateDer<'static>> {
    let witness = Arc::new(Witness::default());
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .ok()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&witness) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").ok()?;
    let mut tls = ClientConnection::new(Arc::new(config), name).ok()?;
    let left = || Some(deadline.duration_since(Instant::now())).filter(|left| !left.is_zero());
    let mut stream = TcpStream::connect_timeout(address, left()?).ok()?;
    while tls.is_handshaking() {
        stream.set_read_timeout(Some(left()?)).ok()?;
        stream.set_write_timeout(Some(left()?)).ok()?;
        // The witness refuses every certificate, once it has seen it.
        if tls.complete_io(&mut stream).is_err() {
            break;
        }
    }
    witness.0.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Keeps the server's certificate and trusts nobody.
#[derive(Debug, Default)]
struct Witness(Mutex<Option<CertificateDer<'static>>>);

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = Some(certificate.clone().into_owned());
        Err(refused())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(refused())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(refused())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

fn refused() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}
