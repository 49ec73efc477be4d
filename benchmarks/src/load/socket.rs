//! A client's socket: plain, or with a TLS session.
//!
//! Reads and writes what the WebSocket consists of, without blocking. Does not know WebSocket.

use std::{
    io::{self, Read, Write},
    net::SocketAddr,
    sync::Arc,
};

use mio::{Interest, Registry, Token, net::TcpStream};
use rustls::ClientConfig;

use super::tls_socket::TlsSocket;

#[derive(Debug)]
pub(super) enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsSocket>),
}

impl Socket {
    /// Registers a socket that is being connected to `server`; with TLS if there is a configuration.
    pub(super) fn register(
        mut stream: TcpStream,
        registry: &Registry,
        token: Token,
        server: SocketAddr,
        tls: Option<&Arc<ClientConfig>>,
    ) -> io::Result<Self> {
        registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(match tls {
            Some(config) => Self::Tls(Box::new(TlsSocket::new(stream, server.ip(), config)?)),
            None => Self::Plain(stream),
        })
    }

    /// Registers it at another poll than before.
    pub(super) fn move_to(&mut self, registry: &Registry, from: &Registry, token: Token) -> io::Result<()> {
        let stream = match self {
            Self::Plain(stream) => stream,
            Self::Tls(socket) => socket.stream_mut(),
        };
        from.deregister(stream)?;
        registry.register(stream, token, Interest::READABLE | Interest::WRITABLE)
    }

    pub(super) fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(socket) => socket.stream(),
        }
    }

    /// Continues to connect; true when everything below the WebSocket is ready.
    pub(super) fn connect(&mut self) -> io::Result<bool> {
        if self.tcp().peer_addr().is_err() {
            return Ok(false);
        }
        match self {
            Self::Plain(stream) => stream.set_nodelay(true).map(|()| true),
            Self::Tls(socket) => {
                socket.stream().set_nodelay(true)?;
                socket.shake_hands()
            }
        }
    }

    /// Whether a read of `read` bytes into a buffer of `room` may have left something in the socket. A short read has
    /// emptied a stream socket; a later byte raises a new edge (epoll(7)).
    #[inline]
    pub(super) fn may_have_more(&self, read: usize, room: usize) -> bool {
        match self {
            Self::Plain(_) => read == room,
            Self::Tls(socket) => socket.has_more(),
        }
    }
}

impl Read for Socket {
    #[inline]
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(socket) => socket.read(buffer),
        }
    }
}

impl Write for Socket {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(socket) => socket.write(bytes),
        }
    }

    #[inline]
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(socket) => socket.flush(),
        }
    }
}
