//! The listener of all servers on tokio: TCP_NODELAY, and TLS if wanted.
//!
//! Without TCP_NODELAY Nagle's algorithm would be measured. TLS is rustls by tokio-rustls, as most programs have it, with
//! each handshake in a task of its own. Does not know WebSocket.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::either::Either;

/// Pause after an error of the system, such as a lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Listener {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    handshakes: JoinSet<io::Result<(TlsStream<TcpStream>, SocketAddr)>>,
}

impl Listener {
    pub(super) fn new(listener: TcpListener, tls: Option<Arc<ServerConfig>>) -> Self {
        Self { listener, tls: tls.map(TlsAcceptor::from), handshakes: JoinSet::new() }
    }

    /// The next connection, with TLS after its handshake.
    pub(super) async fn accept(&mut self) -> io::Result<(Stream, SocketAddr)> {
        loop {
            tokio::select! {
                Some(shaken) = self.handshakes.join_next() => {
                    // The load generator reports what fails.
                    if let Ok(Ok((stream, address))) = shaken {
                        return Ok((Stream::Right(Box::new(stream)), address));
                    }
                }
                accepted = self.listener.accept() => {
                    let (stream, address) = accepted?;
                    stream.set_nodelay(true)?;
                    let Some(acceptor) = self.tls.clone() else {
                        return Ok((Stream::Left(stream), address));
                    };
                    self.handshakes.spawn(async move { Ok((acceptor.accept(stream).await?, address)) });
                }
            }
        }
    }
}

impl axum::serve::Listener for Listener {
    type Io = Stream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Stream, SocketAddr) {
        loop {
            match Self::accept(self).await {
                Ok(connection) => return connection,
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection: plain, or TLS after its handshake.
pub(super) type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;
