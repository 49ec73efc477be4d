//! TLS as all servers and the client use it: one certificate, and AES-256-GCM in TLS 1.3.
//!
//! The client decides on the version and the cipher, so that the libraries are compared and not their preferences. It
//! never resumes a session, as if each connection were another user's, and accepts any certificate. Everything else is
//! rustls' default, session tickets included. Does not know sockets.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, PrivateKeyDer, ServerName, UnixTime,
        pem::{self, PemObject},
    },
};

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("no certificate could be made")]
    Make(#[from] rcgen::Error),
    #[error("{path} does not contain a certificate and its private key in PEM")]
    Pem { path: PathBuf, source: pem::Error },
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// Writes a new certificate and its private key to `path`, unless there is one.
pub(crate) fn make_certificate(path: &Path) -> Result<(), TlsError> {
    if path.exists() {
        return Ok(());
    }
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    // Renamed, so that another run never finds a part of it.
    let part = path.with_extension(std::process::id().to_string());
    fs::write(&part, made.cert.pem() + &made.signing_key.serialize_pem())
        .and_then(|()| fs::rename(&part, path))
        .map_err(|source| TlsError::Write { path: path.to_owned(), source })
}

/// What a server needs, from a file with its certificate and private key.
pub(crate) fn server_config(path: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let malformed = |source| TlsError::Pem { path: path.to_owned(), source };
    let chain = CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(malformed)?;
    let key = PrivateKeyDer::from_pem_file(path).map_err(malformed)?;
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?;
    Ok(Arc::new(builder.with_no_client_auth().with_single_cert(chain, key)?))
}

/// What the client needs.
pub(crate) fn client_config() -> Result<Arc<ClientConfig>, TlsError> {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![ring::cipher_suite::TLS13_AES_256_GCM_SHA384];
    let provider = Arc::new(provider);
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Checks that the server has the certificate's key, and nothing of the certificate itself.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Only TLS 1.3 is offered.
        Err(CertificateError::BadSignature.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
