//! The transport: from a URL, or a stream of the application's own, to an open WebSocket.
//!
//! Layers from below: a byte stream (TCP, or what the application's connector returns), the tap that notices signs of
//! life, TLS for `wss://`, the WebSocket. Used by the handle and by the client's task, one attempt at a time. Knows
//! tungstenite and settings. Does not know messages, codecs or callbacks.

use std::{future::Future, io, pin::Pin, sync::Arc};

use http::{HeaderValue, header};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::WebSocketConfig};

use super::{
    builder::Config,
    dial,
    error::ClientError,
    liveness::{Life, Tap},
    request::{self, Target},
};

/// tungstenite allocates this for each connection at once; its default of 128 KiB makes load tests expensive.
const READ_BUFFER_BYTES: usize = 16 * 1024;

/// A byte stream, whatever it is.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

pub(super) type BoxIo = Box<dyn Io>;

/// Makes the byte stream of each attempt.
#[derive(Clone)]
pub(super) struct Connector(Arc<dyn Fn() -> Connecting + Send + Sync>);

type Connecting = Pin<Box<dyn Future<Output = io::Result<BoxIo>> + Send>>;

impl Connector {
    pub(super) fn new<F, T>(connect: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<T>> + Send + 'static,
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Self(Arc::new(move || {
            let connecting = connect();
            Box::pin(async move { Ok(Box::new(connecting.await?) as BoxIo) })
        }))
    }
}

pub(super) type Socket = WebSocketStream<BoxIo>;

/// An open connection.
pub(super) struct Opened {
    pub(super) socket: Socket,
    pub(super) life: Life,
    /// The subprotocol that the server selected.
    pub(super) protocol: Option<HeaderValue>,
}

/// Connects, over `stream` if there is one, and performs the handshake. The caller must limit the time.
pub(super) async fn open(config: &Config, stream: Option<BoxIo>) -> Result<Opened, ClientError> {
    let (request, target) = request::make(config).await?;
    let stream = match (stream, &config.connector) {
        (Some(stream), _) => stream,
        (None, Some(Connector(connect))) => connect().await?,
        (None, None) => Box::new(dial::connect(&target.host, target.port, &config.addresses).await?),
    };
    let life = Life::default();
    let stream = secure(config, &target, Tap::new(stream, life.clone())).await?;
    let limits = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .max_message_size(Some(config.message_bytes_max))
        .max_frame_size(Some(config.message_bytes_max));
    let (socket, response) =
        tokio_tungstenite::client_async_with_config(request, stream, Some(limits)).await?;
    let protocol = response.headers().get(header::SEC_WEBSOCKET_PROTOCOL).cloned();
    Ok(Opened { socket, life, protocol })
}

#[cfg(feature = "client-tls")]
async fn secure(config: &Config, target: &Target, stream: Tap<BoxIo>) -> Result<BoxIo, ClientError> {
    match target.is_tls {
        true => Ok(Box::new(config.tls.connect(&target.host, stream).await?)),
        false => Ok(Box::new(stream)),
    }
}

/// Without TLS, the request has been refused if it asked for it.
#[cfg(not(feature = "client-tls"))]
async fn secure(_: &Config, _: &Target, stream: Tap<BoxIo>) -> Result<BoxIo, ClientError> {
    Ok(Box::new(stream))
}
