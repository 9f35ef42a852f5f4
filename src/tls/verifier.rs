//! Which clients are let in, and why the others are not.
//!
//! A client is let in when its chain leads to a certificate in `ca.crt`, every certificate of the
//! chain is valid now (the CA's too), names client authentication as a usage or no usage at all
//! (RFC 5280, section 4.2.1.12), keeps to its CA's name constraints, and is in no list in `ca.crl`.
//! All of that is rustls's work. What is added here: a bound on what a client may make it compute,
//! and the CA's own dates, which it leaves to who trusts it.
//!
//! Nobody looks at keyUsage: like browsers, webpki takes the extended usage for what a certificate
//! is for. One that lacks digitalSignature gives nobody more than its CA meant to give.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{self, CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, InvalidMessage, OtherError,
    PeerIncompatible, RootCertStore, SignatureScheme,
};
use webpki::EndEntityCert;

use super::certificate::{self, Validity};
use super::list::List;

/// More certificates than any client needs.
const MAX_CERTIFICATES: usize = 8;
/// Longest chain that is looked at, in bytes.
const MAX_CHAIN: usize = 32 * 1024;
/// Longest sentence for the log, in characters: some of what it quotes comes from the client.
const MAX_SENTENCE: usize = 300;

/// A certificate in `ca.crt`.
pub(super) struct Authority {
    pub(super) validity: Validity,
    pub(super) anchor: TrustAnchor<'static>,
}

/// Asks the verifier of each CA.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) authorities: Vec<(Validity, Arc<dyn ClientCertVerifier>)>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl Authority {
    pub(super) fn new(certificate: &CertificateDer) -> Result<Self, String> {
        let parsed = EndEntityCert::try_from(certificate).map_err(|error| error.to_string())?;
        let validity = certificate::validity(certificate).ok_or("its dates are malformed")?;
        if !certificate::is_authority(&parsed, validity) {
            return Err("it is not a CA's (basicConstraints CA:TRUE): take it out".to_owned());
        }
        let anchor = webpki::anchor_from_trusted_cert(certificate);
        let anchor = anchor.map_err(|error| error.to_string())?.to_owned();
        Ok(Self { validity, anchor })
    }

    /// For this CA's clients, and those of the CAs below it.
    pub(super) fn verifier(
        &self,
        lists: &[List],
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, String> {
        let Self { anchor, .. } = self;
        let is_own = |list: &List| {
            list.issuer.subject == anchor.subject
                && list.issuer.subject_public_key_info == anchor.subject_public_key_info
        };
        if lists.iter().filter(|list| is_own(list)).count() > 1 {
            return Err("holds two lists of one CA: leave only the newer one".to_owned());
        }
        // webpki asks the first list of an issuer's name: another CA of that name has its own.
        let lists = lists.iter();
        let lists = lists.filter(|list| is_own(list) || list.issuer.subject != anchor.subject);
        let lists = lists.map(|list| CertificateRevocationListDer::from(list.der.clone()));
        let roots = Arc::new(RootCertStore { roots: vec![anchor.clone()] });
        WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(provider))
            .with_crls(lists)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| format!("cannot be used: {error}"))
    }
}

impl ClientCertVerifier for ClientVerifier {
    /// Empty: the client chooses. Naming the CAs would keep clients whose CA is an intermediate
    /// from sending their certificate, and would tell every scanner whose node this is.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        check_effort(end_entity, intermediates)?;
        let mut refusals = Vec::new();
        for (validity, verifier) in &self.authorities {
            match verifier.verify_client_cert(end_entity, intermediates, now) {
                Ok(verified) if validity.holds(now) => return Ok(verified),
                Ok(_) => refusals.push(refused("its CA has expired or is not valid yet")),
                Err(error) => refusals.push(error),
            }
        }
        // What its own CA says of a client tells most.
        let refusal = refusals.into_iter().max_by_key(|error| match error {
            Error::InvalidCertificate(CertificateError::UnknownIssuer) => 0,
            Error::InvalidCertificate(error) if is_of_another_key(error) => 1,
            _ => 2,
        });
        Err(refusal.unwrap_or(CertificateError::UnknownIssuer.into()))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let verdict =
            crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms);
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

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// webpki tries every order of the certificates that a client sends, up to 200,000 of them, and a
/// signature for each: seconds of work. With a name each there is but one order.
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

/// A CA of the same name has issued it; its key may be of another kind.
fn is_of_another_key(error: &CertificateError) -> bool {
    use CertificateError::{BadSignature, UnsupportedSignatureAlgorithmForPublicKeyContext};
    matches!(error, BadSignature | UnsupportedSignatureAlgorithmForPublicKeyContext { .. })
}

fn refused(sentence: &str) -> Error {
    let sentence = Box::<dyn std::error::Error + Send + Sync>::from(sentence);
    CertificateError::Other(OtherError(sentence.into())).into()
}

/// Why a handshake failed: a kind, one of a few dozen whatever clients send, and the sentence for
/// the log, in rustls's words where they say what it is.
pub(crate) fn refusal(error: &io::Error) -> (String, String) {
    use CertificateError as C;
    let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return match error.kind() {
            io::ErrorKind::TimedOut => {
                ("late".to_owned(), "the handshake took too long".to_owned())
            }
            kind => (word(&format!("{kind:?}")), error.to_string()),
        };
    };
    let kind = match error {
        Error::InvalidCertificate(C::Other(other)) => word(&other.to_string()),
        Error::InvalidCertificate(error) => word(&format!("{error:?}")),
        error => word(&format!("{error:?}")),
    };
    let sentence = match error {
        Error::InvalidCertificate(C::Other(other)) => format!("invalid peer certificate: {other}"),
        Error::InvalidCertificate(error) if is_of_another_key(error) => {
            "invalid peer certificate: a CA in ca.crt has its issuer's name, and has not signed it \
             or has an RSA key of less than 2048 bits"
                .to_owned()
        }
        Error::PeerIncompatible(PeerIncompatible::SupportedVersionsExtensionRequired) => {
            "the client does not speak TLS 1.3".to_owned()
        }
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "the client does not speak TLS".to_owned()
        }
        error => error.to_string(),
    };
    (kind, sentence.chars().take(MAX_SENTENCE).collect())
}

/// The beginning, in which an error says what it is, without what a client can choose.
fn word(error: &str) -> String {
    error.chars().take_while(|c| c.is_ascii_alphabetic() || *c == ' ').collect()
}
