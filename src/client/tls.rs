//! TLS for `wss://`: whom the client trusts, and the TLS handshake.
//!
//! The configuration is made once per client and kept, so that a reconnect resumes the TLS session. Knows rustls. Does
//! not know WebSockets or TCP.

use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::OnceCell,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::error::ClientError;

#[derive(Clone, Default)]
pub(super) struct Tls {
    custom: Option<Arc<ClientConfig>>,
    #[cfg(feature = "client-tls-native")]
    has_native_roots: bool,
    made: Arc<OnceCell<Arc<ClientConfig>>>,
}

impl Tls {
    pub(super) fn custom(config: Arc<ClientConfig>) -> Self {
        Self { custom: Some(config), ..Self::default() }
    }

    #[cfg(feature = "client-tls-native")]
    pub(super) fn native_roots() -> Self {
        Self { has_native_roots: true, ..Self::default() }
    }

    pub(super) async fn connect<T>(&self, host: &str, stream: T) -> Result<TlsStream<T>, ClientError>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(host.to_owned()).map_err(ClientError::invalid)?;
        let config = match &self.custom {
            Some(config) => config,
            None => self.made.get_or_try_init(|| self.make()).await?,
        };
        Ok(TlsConnector::from(Arc::clone(config)).connect(name, stream).await?)
    }

    async fn make(&self) -> Result<Arc<ClientConfig>, ClientError> {
        #[cfg(feature = "client-tls-native")]
        if self.has_native_roots {
            // It reads files.
            let roots = tokio::task::spawn_blocking(native_roots).await.map_err(ClientError::handshake)??;
            return with_roots(roots);
        }
        with_roots(RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()))
    }
}

/// Names the crypto provider, because without one rustls panics in programs that contain two providers or none.
fn with_roots(roots: RootCertStore) -> Result<Arc<ClientConfig>, ClientError> {
    let config = ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .map_err(ClientError::handshake)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(feature = "client-tls-native")]
fn native_roots() -> Result<RootCertStore, ClientError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let causes: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        let what = format!("this system has no root certificates: install them ({})", causes.join("; "));
        return Err(ClientError::handshake(what));
    }
    Ok(roots)
}
