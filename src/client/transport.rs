//! The transport: TCP, optional TLS, the handshake, and the detection of a silent server.
//!
//! Owned by the connection's task. A tap between TCP and the layers above records that bytes were received: any byte
//! shows that the server is alive, since a whole message may take longer than the silence timeout on a slow network.
//! Knows tungstenite and settings. Does not know messages, codecs or callbacks.

use std::{
    future::pending,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{HeaderValue, Response, header};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::sleep,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{client::IntoClientRequest, protocol::WebSocketConfig},
};

use super::{builder::Config, error::ClientError};

/// tungstenite allocates this for each connection at once; its default of 128 KiB makes load tests expensive.
const READ_BUFFER_BYTES: usize = 16 * 1024;

/// The timeout is checked in this many parts, so that silence is noticed after 1 to 1.25 silence timeouts.
const SILENCE_PARTS: u32 = 4;

pub(super) type Socket = WebSocketStream<MaybeTlsStream<Tap>>;

/// Connects and performs the handshake. The caller must limit the time.
pub(super) async fn open(config: &Config) -> Result<(Socket, Life, Response<Option<Vec<u8>>>), ClientError> {
    let invalid = |what: &str| ClientError::InvalidRequest(what.into());
    if let Some(what) = &config.malformed {
        return Err(invalid(what));
    }
    let mut request = config.url.as_str().into_client_request()?;
    let default_port = match request.uri().scheme_str() {
        Some("ws") => 80,
        Some("wss") if cfg!(feature = "client-tls") => 443,
        Some("wss") => return Err(invalid("wss needs the feature `client-tls`: enable it in Cargo.toml")),
        _ => return Err(invalid("the URL's scheme is neither ws nor wss: write `ws://…` or `wss://…`")),
    };
    for (name, value) in &config.headers {
        if name == header::HOST {
            request.headers_mut().insert(name, value.clone());
        } else {
            request.headers_mut().append(name, value.clone());
        }
    }
    if !config.protocols.is_empty() {
        let protocols = HeaderValue::try_from(config.protocols.join(", "))
            .map_err(|error| ClientError::InvalidRequest(error.into()))?;
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocols);
    }
    let host = request.uri().host().ok_or_else(|| invalid("the URL has no host"))?;
    // An IPv6 address has brackets in a URL, but not where it is resolved.
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = request.uri().port_u16().unwrap_or(default_port);

    let stream = TcpStream::connect((host, port)).await.map_err(ClientError::Unreachable)?;
    stream.set_nodelay(true).map_err(ClientError::Unreachable)?;
    let life = Life::default();
    let tap = Tap { stream, life: life.clone() };
    let limits = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .max_message_size(Some(config.message_bytes_max))
        .max_frame_size(Some(config.message_bytes_max));
    #[cfg(not(feature = "client-tls"))]
    let (socket, response) =
        tokio_tungstenite::client_async_with_config(request, MaybeTlsStream::Plain(tap), Some(limits))
            .await?;
    #[cfg(feature = "client-tls")]
    let (socket, response) = {
        let tls = config.tls.clone().map_or_else(public_roots, Ok)?;
        let connector = if default_port == 443 {
            tokio_tungstenite::Connector::Rustls(tls)
        } else {
            tokio_tungstenite::Connector::Plain
        };
        tokio_tungstenite::client_async_tls_with_config(request, tap, Some(limits), Some(connector)).await?
    };
    Ok((socket, life, response))
}

/// Names the crypto provider, because without one rustls panics in programs that contain two providers or none.
#[cfg(feature = "client-tls")]
fn public_roots() -> Result<Arc<rustls::ClientConfig>, ClientError> {
    let roots = rustls::RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let config = rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .map_err(|error| ClientError::Handshake(error.into()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Whether bytes were received since the last check.
#[derive(Clone, Default)]
pub(super) struct Life(Arc<AtomicBool>);

impl Life {
    /// Returns when nothing was received for `timeout`, never for `None`. Must be polled after the reading, which a
    /// callback may have blocked: bytes that wait in the kernel are not silence.
    pub(super) async fn silence(&self, timeout: Option<Duration>) -> Duration {
        let Some(timeout) = timeout else { return pending().await };
        let mut silent_parts = 0;
        while silent_parts < SILENCE_PARTS {
            sleep(timeout / SILENCE_PARTS).await;
            // Relaxed: written and read by the same task.
            let has_received = self.0.swap(false, Ordering::Relaxed);
            silent_parts = if has_received { 0 } else { silent_parts + 1 };
        }
        timeout
    }
}

/// A TCP stream that records that bytes were received.
pub(super) struct Tap {
    stream: TcpStream,
    life: Life,
}

impl AsyncRead for Tap {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.life.0.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tap {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
