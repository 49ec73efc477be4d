//! What clients and server talk over, plain TCP or TLS, and the client's end of either.
//!
//! A test that takes a [`Transport`] is run over each of them by [`on_each_transport!`](crate::on_each_transport). Over TLS
//! the server is what an application would have, a `TlsListener` with nothing set, and clients trust its certificate. A
//! [`Stream`] does for both what no library would: it reads a part of what the kernel has, and sends a part of what it is
//! given. Does not know WebSockets.

use std::io::{self, ErrorKind, Read as _, Write};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};

use axum::Router;
use axum::extract::connect_info::IntoMakeServiceWithConnectInfo;
use shardcast::tls::{PeerAddr, TlsConfig, TlsListener};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::client::TlsStream;

use crate::tls::TlsPair;
use crate::wait::within_timeout;

/// What a client and its server talk over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Plain,
    /// TLS over TCP, with HTTP/1.1.
    Tls,
}

/// One certificate for all servers of the process.
static PAIR: LazyLock<TlsPair> = LazyLock::new(|| TlsPair::new(&["http/1.1"]));

/// Makes two tests of an `async fn(Transport)`: `NAME::plain` and `NAME::over_tls`. With `workers = N` on a runtime of so
/// many threads.
#[macro_export]
macro_rules! on_each_transport {
    ($name:ident) => {
        $crate::on_each_transport!(
            #[tokio::test]
            $name
        );
    };
    (workers = $workers:literal, $name:ident) => {
        $crate::on_each_transport!(
            #[tokio::test(flavor = "multi_thread", worker_threads = $workers)]
            $name
        );
    };
    (#[$test:meta] $name:ident) => {
        mod $name {
            #[$test]
            async fn plain() {
                super::$name($crate::Transport::Plain).await;
            }

            #[$test]
            async fn over_tls() {
                super::$name($crate::Transport::Tls).await;
            }
        }
    };
}

impl Transport {
    /// The scheme of a WebSocket's URL.
    pub fn scheme(self) -> &'static str {
        match self {
            Self::Plain => "ws",
            Self::Tls => "wss",
        }
    }

    /// Serves an application until it is told to end and its requests are over.
    pub async fn serve(
        self,
        listener: TcpListener,
        app: Router,
        end: impl Future<Output = ()> + Send + 'static,
    ) {
        match self {
            Self::Plain => axum::serve(listener, app).with_graceful_shutdown(end).await.unwrap(),
            Self::Tls => axum::serve(tls(listener), app).with_graceful_shutdown(end).await.unwrap(),
        }
    }

    /// Serves an application that wants to know the addresses of its clients.
    pub async fn serve_with_addresses(self, listener: TcpListener, app: Router) {
        match self {
            Self::Plain => {
                let app: IntoMakeServiceWithConnectInfo<_, SocketAddr> =
                    app.into_make_service_with_connect_info();
                axum::serve(listener, app).await.unwrap();
            }
            Self::Tls => {
                let app: IntoMakeServiceWithConnectInfo<_, PeerAddr> =
                    app.into_make_service_with_connect_info();
                axum::serve(tls(listener), app).await.unwrap();
            }
        }
    }

    /// Connects to a server of this process.
    pub async fn connect(self, address: SocketAddr) -> io::Result<Stream> {
        self.connect_on(TcpStream::connect(address).await?).await
    }

    /// On a TCP connection to a server of this process.
    pub async fn connect_on(self, stream: TcpStream) -> io::Result<Stream> {
        stream.set_nodelay(true)?;
        Ok(match self {
            Self::Plain => Stream::Plain(stream),
            Self::Tls => Stream::Tls(Box::new(within_timeout(PAIR.connect(stream)).await?)),
        })
    }
}

fn tls(listener: TcpListener) -> TlsListener {
    let config = TlsConfig::from_pem(PAIR.certificate_pem().as_bytes(), PAIR.key_pem().as_bytes());
    TlsListener::new(listener, config.unwrap())
}

/// The client's end of a connection. Dropped without a word: over TLS no `close_notify` is sent.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Plain(TcpStream),
    /// TLS over TCP, after its handshake.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// The TCP connection itself.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }

    /// The TCP connection itself. Panics over TLS.
    pub fn into_tcp(self) -> TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(_) => panic!("a session goes with it"),
        }
    }

    /// Sends as much as is taken now. Over TLS the last record may be sent in part; its rest follows with whatever is
    /// sent, read or tried next.
    ///
    /// # Errors
    /// `WouldBlock` if nothing is taken; the system's error if the connection is lost.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.try_write(bytes),
            Self::Tls(stream) => {
                let (stream, session) = stream.get_mut();
                let mut socket = Unready(stream);
                while session.wants_write() {
                    session.write_tls(&mut socket)?;
                }
                let count = session.writer().write(bytes)?;
                while session.wants_write() {
                    match session.write_tls(&mut socket) {
                        Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                        sent => drop(sent?),
                    }
                }
                Ok(count)
            }
        }
    }

    /// Takes at most `max` bytes from the kernel, if it has any; returns what they are, which over TLS is nothing unless
    /// they complete a record.
    pub fn take_at_most(&mut self, max: usize) -> Vec<u8> {
        let mut received = vec![0; max];
        match (&*SockRef::from(self.tcp())).read(&mut received) {
            Ok(count) => received.truncate(count),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                received.clear();
            }
        }
        let Self::Tls(stream) = self else { return received };
        let session = stream.get_mut().1;
        let (mut rest, mut plaintext) = (&received[..], Vec::new());
        while !rest.is_empty() {
            session.read_tls(&mut rest).unwrap();
            session.process_new_packets().unwrap();
            match session.reader().read_to_end(&mut plaintext) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => drop(result.unwrap()),
            }
        }
        plaintext
    }
}

/// A socket of tokio's, written without tokio's knowledge of whether it has room.
struct Unready<'a>(&'a TcpStream);

impl Write for Unready<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*SockRef::from(self.0)).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => {
                // What `try_send` has left. An error of it is found by reading, too.
                let _ = Pin::new(&mut *stream).poll_flush(cx);
                Pin::new(stream).poll_read(cx, buffer)
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
