//! Decides whether a client's certificate lets it in.
//!
//! rustls' own verifier is not used, for three reasons: it accepts clients of a CA whose
//! certificate has expired; it looks at one revocation list per issuer name, so that the list of
//! a CA that was renewed with a new key and the same name refuses the other key's clients; and it
//! checks the signature of the whole list at every handshake. Chains, signatures, usage and name
//! constraints are webpki's work in both.

use std::time::{Duration, SystemTime};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{self, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme,
};
use std::sync::Arc;
use webpki::{CertRevocationList, EndEntityCert, KeyUsage, OwnedCertRevocationList, VerifiedPath};

use super::der::{self, Validity};
use super::error::Problem;

/// A certificate in `ca.crt`.
#[derive(Debug)]
pub(super) struct Authority {
    pub(super) name: Option<String>,
    pub(super) validity: Validity,
    anchor: TrustAnchor<'static>,
    certificate: CertificateDer<'static>,
}

/// A list in `ca.crl` and the public key that has signed it.
#[derive(Debug)]
pub(super) struct RevocationList {
    pub(super) next_update: SystemTime,
    list: CertRevocationList<'static>,
    signer: Vec<u8>,
}

/// Accepts clients with a certificate of one of the authorities that none of the lists revokes.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    anchors: Vec<TrustAnchor<'static>>,
    validities: Vec<Validity>,
    lists: Vec<RevocationList>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Authority {
    /// Takes the `number`-th certificate of `ca.crt`.
    pub(super) fn new(der: Vec<u8>, number: usize) -> Result<Self, Problem> {
        let certificate = CertificateDer::from(der);
        let malformed = |error| Problem::Certificate { number, error };
        let fields = der::Certificate::read(&certificate);
        let fields = fields.ok_or(malformed(webpki::Error::BadDer))?;
        let parsed = EndEntityCert::try_from(&certificate).map_err(malformed)?;
        // webpki does not look at basicConstraints of what it is told to trust: anybody's
        // certificate in this file would become a CA. Used as a client's, a CA's is refused.
        let as_client = parsed.verify_for_usage(
            &[],
            &[],
            &[],
            unix_time(fields.validity.not_after),
            KeyUsage::client_auth(),
            None,
            None,
        );
        if !matches!(as_client, Err(webpki::Error::CaUsedAsEndEntity)) {
            return Err(Problem::NotCa { number });
        }
        Ok(Self {
            name: fields.common_name(),
            validity: fields.validity,
            anchor: webpki::anchor_from_trusted_cert(&certificate).map_err(malformed)?.to_owned(),
            certificate: certificate.clone(),
        })
    }

    pub(super) fn anchor(&self) -> TrustAnchor<'static> {
        self.anchor.clone()
    }

    fn has_signed(&self, list: &der::List, algorithms: &WebPkiSupportedAlgorithms) -> bool {
        let Ok(certificate) = EndEntityCert::try_from(&self.certificate) else {
            return false;
        };
        algorithms
            .all
            .iter()
            .filter(|algorithm| algorithm.signature_alg_id().as_ref() == list.algorithm)
            .any(|algorithm| {
                certificate.verify_signature(*algorithm, list.signed, list.signature).is_ok()
            })
    }
}

impl RevocationList {
    /// Takes the `number`-th list of `ca.crl`, which one of the authorities must have signed.
    pub(super) fn new(
        der: &[u8],
        number: usize,
        authorities: &[Authority],
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<Self, Problem> {
        let malformed = |error| Problem::List { number, error };
        let list =
            CertRevocationList::from(OwnedCertRevocationList::from_der(der).map_err(malformed)?);
        let fields = der::List::read(der).ok_or(malformed(webpki::Error::BadDer))?;
        let signer = authorities
            .iter()
            .filter(|authority| authority.anchor.subject.as_ref() == list.issuer())
            .find(|authority| authority.has_signed(&fields, algorithms))
            .ok_or(Problem::ListSigner { number })?;
        Ok(Self {
            next_update: fields.next_update,
            list,
            signer: webpki::spki_for_anchor(&signer.anchor).to_vec(),
        })
    }

    /// Whether this list, if it is the issuer's, names the certificate. A list stays in force
    /// when its next update is overdue: who is revoked stays out, everybody else stays in.
    fn revokes(&self, certificate: &webpki::Cert, issuer: &[u8]) -> bool {
        self.signer == issuer
            && self.list.issuer() == certificate.issuer()
            && !matches!(self.list.find_serial(certificate.serial()), Ok(None))
    }
}

impl ClientVerifier {
    pub(super) fn new(
        authorities: &[Authority],
        lists: Vec<RevocationList>,
        algorithms: WebPkiSupportedAlgorithms,
    ) -> Self {
        Self {
            anchors: authorities.iter().map(Authority::anchor).collect(),
            validities: authorities.iter().map(|authority| authority.validity).collect(),
            lists,
            algorithms,
        }
    }

    pub(super) fn lists(&self) -> &[RevocationList] {
        &self.lists
    }

    /// What webpki leaves open about a chain that it has verified.
    fn check_path(&self, path: &VerifiedPath, time: UnixTime) -> Result<(), webpki::Error> {
        // A renewed CA may stand in the file twice with one name and key.
        let mut verdict = Err(webpki::Error::UnknownIssuer);
        for (anchor, validity) in self.anchors.iter().zip(&self.validities) {
            if verdict.is_err() && anchor == path.anchor() {
                verdict = validity.check(time);
            }
        }
        verdict?;
        if self.lists.is_empty() {
            return Ok(());
        }
        let mut issuers = path
            .intermediate_certificates()
            .map(|certificate| certificate.subject_public_key_info())
            .chain([webpki::spki_for_anchor(path.anchor())]);
        let mut chain = std::iter::once::<&webpki::Cert>(path.end_entity())
            .chain(path.intermediate_certificates());
        let revoked = chain.any(|certificate| {
            let issuer = issuers.next();
            let issuer = issuer.as_ref().map_or(&[][..], |issuer| issuer.as_ref());
            self.lists.iter().any(|list| list.revokes(certificate, issuer))
        });
        if revoked { Err(webpki::Error::CertRevoked) } else { Ok(()) }
    }
}

impl Validity {
    fn check(&self, time: UnixTime) -> Result<(), webpki::Error> {
        let (not_before, not_after) = (unix_time(self.not_before), unix_time(self.not_after));
        if time < not_before {
            return Err(webpki::Error::CertNotValidYet { time, not_before });
        }
        if time > not_after {
            return Err(webpki::Error::CertExpired { time, not_after });
        }
        Ok(())
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
    ) -> Result<ClientCertVerified, rustls::Error> {
        EndEntityCert::try_from(end_entity)
            .and_then(|certificate| {
                certificate.verify_for_usage(
                    self.algorithms.all,
                    &self.anchors,
                    intermediates,
                    now,
                    KeyUsage::client_auth(),
                    None,
                    Some(&|path| self.check_path(path, now)),
                )?;
                Ok(ClientCertVerified::assertion())
            })
            .map_err(|error| certificate_error(error).into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// webpki's error as the one that makes rustls send the right alert.
fn certificate_error(error: webpki::Error) -> CertificateError {
    use webpki::Error as E;
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }
        }
        E::CertRevoked => CertificateError::Revoked,
        E::UnknownIssuer => CertificateError::UnknownIssuer,
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        E::RequiredEkuNotFoundContext(_) | E::EmptyEkuExtension => CertificateError::InvalidPurpose,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    }
}

/// Times before 1970 do not occur: [`Validity`] has none.
pub(super) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(
        time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO),
    )
}
