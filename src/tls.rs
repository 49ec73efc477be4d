//! TLS in front of `axum::serve`: a listener whose connections a shard can own, session and all.
//!
//! Owned by the application. Each handshake is made in a task of its own with a timeout, and there is a limit on how many
//! at once, so that a client that says nothing holds up nobody. Which certificate is used is asked for each
//! handshake, so it can be replaced while the server runs. Does not know HTTP, WebSockets or engines: the upgrade
//! recognizes the streams ([`crate::WebSocketUpgrade`]).

mod stream;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

pub use stream::TlsStream;

use crate::listen::listen;

/// How long a client may take for its handshake, unless [`TlsListener::handshake_timeout`] says otherwise.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at once, unless [`TlsListener::max_handshakes`] says otherwise. Each holds some 20 KB.
const HANDSHAKES_MAX: usize = 1024;
/// Pause after an error of the system, such as a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// The certificates of a [`TlsListener`], which can be replaced while it listens. Cloneable; clones share them. Early
/// data (0-RTT) is not accepted, whatever a `rustls::ServerConfig` says.
///
/// ```
/// # fn main() -> Result<(), shardcast::tls::TlsError> {
/// # let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
/// # let (chain, key) = (made.cert.pem(), made.signing_key.serialize_pem());
/// let config = shardcast::tls::TlsConfig::from_pem(chain.as_bytes(), key.as_bytes())?;
/// // In a task that watches the files, or upon SIGHUP:
/// config.replace_pem(chain.as_bytes(), key.as_bytes())?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct TlsConfig(watch::Sender<Arc<ServerConfig>>);

impl TlsConfig {
    /// With a chain of certificates, the server's first, and its private key, both in PEM. Offers HTTP/2 and HTTP/1.1,
    /// TLS 1.3 and 1.2, and asks clients for no certificate; for anything else make a `rustls::ServerConfig`.
    ///
    /// # Errors
    /// [`TlsError`]: no certificate or no key in the text, or a key that does not fit the certificate.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        Ok(server_config(chain, key)?.into())
    }

    /// Uses another chain of certificates and key from the next handshake on. Open connections are not affected.
    ///
    /// # Errors
    /// As for [`from_pem`](Self::from_pem); the old ones remain in use then.
    pub fn replace_pem(&self, chain: &[u8], key: &[u8]) -> Result<(), TlsError> {
        self.replace(server_config(chain, key)?);
        Ok(())
    }

    /// Uses another configuration from the next handshake on.
    pub fn replace(&self, config: impl Into<Arc<ServerConfig>>) {
        self.0.send_replace(without_early_data(config.into()));
    }
}

impl<C: Into<Arc<ServerConfig>>> From<C> for TlsConfig {
    fn from(config: C) -> Self {
        Self(watch::Sender::new(without_early_data(config.into())))
    }
}

/// Early data can be replayed, and a handler cannot be told that a request arrived in it.
fn without_early_data(mut config: Arc<ServerConfig>) -> Arc<ServerConfig> {
    if config.max_early_data_size > 0 {
        Arc::make_mut(&mut config).max_early_data_size = 0;
    }
    config
}

fn server_config(chain: &[u8], key: &[u8]) -> Result<ServerConfig, TlsError> {
    let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(TlsError::Certificate)?;
    if chain.is_empty() {
        return Err(TlsError::Certificate(pem::Error::NoItemsFound));
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(TlsError::Key)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(TlsError::Rustls)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Certificates or a key cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The text of the certificates has none, or is not PEM.
    #[error("no certificates: the chain must be PEM, with the server's certificate first")]
    Certificate(#[source] pem::Error),
    /// The text of the key has none, or is not PEM.
    #[error("no private key: it must be PEM, as PKCS#8, PKCS#1 or SEC1")]
    Key(#[source] pem::Error),
    /// The key does not fit the certificate, or its kind is not supported.
    #[error("the certificate and its key cannot be used together")]
    Rustls(#[source] rustls::Error),
}

/// Accepts TLS connections for `axum::serve`.
///
/// WebSockets over HTTP/1.1 from here belong to a shard with their TLS session, as plain ones do: no task, no second
/// descriptor. Streams of HTTP/2 are bridged.
///
/// ```no_run
/// # async fn serve(app: axum::Router, chain: &[u8], key: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
/// use shardcast::tls::{PeerAddr, TlsConfig, TlsListener};
///
/// let listener = TlsListener::bind("[::]:443", TlsConfig::from_pem(chain, key)?).await?;
/// axum::serve(listener, app.into_make_service_with_connect_info::<PeerAddr>()).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct TlsListener {
    listener: TcpListener,
    config: watch::Receiver<Arc<ServerConfig>>,
    handshakes: JoinSet<Option<(TlsStream, SocketAddr)>>,
    timeout: Duration,
    handshakes_max: usize,
    /// Connections have the socket options of the listener, which has those that an engine relies on.
    inherits: bool,
}

impl TlsListener {
    /// Listens on an address, with room for many clients that connect at once: see [`listen`](crate::listen()).
    ///
    /// # Errors
    /// As for `listen`.
    pub async fn bind(address: impl ToSocketAddrs, config: impl Into<TlsConfig>) -> io::Result<Self> {
        Ok(Self::new(listen(address).await?, config))
    }

    /// Accepts the connections of `listener`.
    pub fn new(listener: TcpListener, config: impl Into<TlsConfig>) -> Self {
        Self {
            inherits: cfg!(target_os = "linux") && shardcast_engine::prepare_tcp(&listener).is_ok(),
            listener,
            config: config.into().0.subscribe(),
            handshakes: JoinSet::new(),
            timeout: HANDSHAKE_TIMEOUT,
            handshakes_max: HANDSHAKES_MAX,
        }
    }

    /// How long a client may take for its handshake before it is disconnected: 10 s by default.
    pub fn handshake_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// How many handshakes are made at once: 1,024 by default, at least 1. Above it further connections wait in the
    /// kernel's queue, whose length is that of the `TcpListener`: 4,096 with [`bind`](Self::bind).
    pub fn max_handshakes(self, max: usize) -> Self {
        Self { handshakes_max: max.max(1), ..self }
    }

    fn shake_hands(&mut self, stream: TcpStream, address: SocketAddr) {
        let config = self.config.borrow().clone();
        let (limit, inherits) = (self.timeout, self.inherits);
        self.handshakes.spawn(async move {
            // Before the handshake, which would wait for delayed acknowledgements without it.
            let prepared = if inherits { Ok(()) } else { shardcast_engine::prepare_tcp(&stream) };
            let shaken = match prepared {
                Ok(()) => timeout(limit, TlsStream::accept(stream, config))
                    .await
                    .unwrap_or_else(|late| Err(late.into())),
                Err(error) => Err(error),
            };
            match shaken {
                Ok(stream) => Some((stream, address)),
                Err(error) => {
                    tracing::debug!(%address, %error, "a TLS handshake failed");
                    None
                }
            }
        });
    }
}

impl Listener for TlsListener {
    type Io = TlsStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            tokio::select! {
                Some(shaken) = self.handshakes.join_next() => {
                    if let Ok(Some(connection)) = shaken {
                        return connection;
                    }
                }
                accepted = self.listener.accept(), if self.handshakes.len() < self.handshakes_max => {
                    match accepted {
                        Ok((stream, address)) => self.shake_hands(stream, address),
                        Err(error) if is_of_one_client(&error) => {}
                        Err(error) => {
                            tracing::error!(%error, "no connection can be accepted: trying again in a second");
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                        }
                    }
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Whether the client has disconnected before it was accepted.
fn is_of_one_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// The remote address of a connection, as connect info of a [`TlsListener`]: what limits for each address count by.
///
/// `app.into_make_service_with_connect_info::<PeerAddr>()`, and `ConnectInfo<PeerAddr>` in a handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerAddr(pub SocketAddr);

impl Connected<IncomingStream<'_, TlsListener>> for PeerAddr {
    fn connect_info(stream: IncomingStream<'_, TlsListener>) -> Self {
        Self(*stream.remote_addr())
    }
}
