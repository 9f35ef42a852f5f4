//! Which clients are let in, and why the others are not.
//!
//! A client is let in when its chain leads to a certificate in `ca.crt`, every certificate of the
//! chain is valid now (the CA's too), names client authentication as a usage or no usage at all
//! (RFC 5280, section 4.2.1.12), keeps to its CA's name constraints, and is in no list in `ca.crl`.
//! All of that is rustls's work. What is added here is a bound on what a client may make it compute.
//!
//! Nobody looks at keyUsage: like browsers, webpki takes the extended usage for what a certificate
//! is for. One that lacks digitalSignature gives nobody more than its CA meant to give.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, InvalidMessage, OtherError,
    PeerIncompatible, SignatureScheme,
};
use webpki::EndEntityCert;

/// More certificates than any client needs.
const MAX_CERTIFICATES: usize = 8;
/// Longest chain that is looked at, in bytes.
const MAX_CHAIN: usize = 32 * 1024;
/// Longest sentence for the log, in characters: some of what it quotes comes from the client.
const MAX_SENTENCE: usize = 300;

/// rustls's verifier behind a bound.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) inner: Arc<dyn ClientCertVerifier>,
    /// When the last CA expires.
    pub(super) until: UnixTime,
}

impl ClientCertVerifier for ClientVerifier {
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        check_effort(end_entity, intermediates)?;
        if now > self.until {
            return Err(refused("every CA in ca.crt has expired"));
        }
        self.inner.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let verdict = self.inner.verify_tls13_signature(message, certificate, signature);
        verdict.map_err(|error| match error {
            Error::InvalidCertificate(CertificateError::BadSignature) => {
                // An RSA signature is as long as its key.
                let short = signature.signature().len() < 256;
                refused(match format!("{:?}", signature.scheme).starts_with("RSA") && short {
                    true => "its key is RSA of less than 2048 bits",
                    false => "the client does not have its private key",
                })
            }
            error => error,
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// webpki tries every order of the certificates that a client sends, up to 200,000 of them, and a
/// signature for each: seconds of work. Where each has a name of its own, there is only one order.
fn check_effort(end_entity: &CertificateDer, others: &[CertificateDer]) -> Result<(), Error> {
    let count = 1 + others.len();
    let size = end_entity.len() + others.iter().map(|other| other.len()).sum::<usize>();
    if count > MAX_CERTIFICATES || size > MAX_CHAIN {
        return Err(refused(&format!(
            "the client sent {count} certificates of {size} bytes, at most {MAX_CERTIFICATES} and \
             {MAX_CHAIN} bytes are looked at"
        )));
    }
    let mut names = BTreeSet::new();
    let mut parsed = others.iter().filter_map(|other| EndEntityCert::try_from(other).ok());
    match parsed.all(|other| names.insert(other.subject().to_vec())) {
        true => Ok(()),
        false => Err(refused("the client sent several issuers of one name: leave one in its file")),
    }
}

fn refused(sentence: &str) -> Error {
    let sentence = Box::<dyn std::error::Error + Send + Sync>::from(sentence);
    CertificateError::Other(OtherError(sentence.into())).into()
}

/// Why a handshake failed: a kind, one of a few dozen whatever clients send, and the sentence for
/// the log, in rustls's words where they say what it is.
pub(crate) fn refusal(error: &io::Error) -> (String, String) {
    use CertificateError::{BadSignature, Other};
    let rustls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    let (debug, sentence) = match rustls {
        None if error.kind() == io::ErrorKind::TimedOut => {
            ("late".to_owned(), "the handshake took too long".to_owned())
        }
        None => (format!("{:?}", error.kind()), error.to_string()),
        Some(Error::InvalidCertificate(Other(other))) => {
            (other.to_string(), format!("invalid peer certificate: {other}"))
        }
        Some(error) => {
            let sentence = match error {
                Error::InvalidCertificate(BadSignature) => {
                    "invalid peer certificate: a CA in ca.crt has its issuer's name, but another key"
                }
                Error::PeerIncompatible(PeerIncompatible::SupportedVersionsExtensionRequired) => {
                    "the client does not speak TLS 1.3"
                }
                Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
                    "the client does not speak TLS"
                }
                error => &error.to_string(),
            };
            (format!("{error:?}").replacen("InvalidCertificate(", "", 1), sentence.to_owned())
        }
    };
    // The beginning, in which an error says what it is, without what a client can choose.
    let kind = debug.chars().take_while(|c| c.is_ascii_alphabetic() || *c == ' ').collect();
    (kind, sentence.chars().take(MAX_SENTENCE).collect())
}
