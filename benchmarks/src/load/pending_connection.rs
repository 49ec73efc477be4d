//! A connection before it is open: TCP, TLS if wanted, then the WebSocket handshake.
//!
//! Owns its socket until the WebSocket is open. Does not know which connection it will be.

use std::{
    io::{self, Write},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use mio::{Registry, Token, net::TcpStream};
use rustls::ClientConfig;
use socket2::{Domain, Protocol, Type};

use super::{socket::Socket, tls_socket::BUFFER_BYTES_MIN};
use crate::{
    dialect::Dialect,
    handshake::{self, HandshakeError},
    nonblocking,
};

/// What a non-blocking connect returns while it is in progress (errno(3)).
const EINPROGRESS: i32 = 115;

/// Why a connection did not become a WebSocket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PendingError {
    #[error("the socket failed")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("the server closed the socket during the handshake")]
    Closed,
}

/// A socket that is not yet a WebSocket.
#[derive(Debug)]
pub(crate) struct PendingConnection {
    socket: Socket,
    requested: bool,
    received: Vec<u8>,
    started: Instant,
}

impl PendingConnection {
    /// Starts to connect. `receive_buffer` is the size of the socket's receive buffer in bytes, or `None` for the
    /// kernel's choice; it must be set before TCP's handshake, which announces it to the server. TLS follows if there is a
    /// configuration for it.
    pub(crate) fn start(
        address: SocketAddr,
        registry: &Registry,
        token: Token,
        receive_buffer: Option<usize>,
        tls: Option<&Arc<ClientConfig>>,
    ) -> io::Result<Self> {
        let stream = match receive_buffer {
            Some(bytes) => connect_with_buffer(address, bytes)?,
            None => TcpStream::connect(address)?,
        };
        let socket = Socket::register(stream, registry, token, address, tls)?;
        Ok(Self { socket, requested: false, received: Vec::new(), started: Instant::now() })
    }

    /// The time since it was started.
    pub(crate) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Continues as far as the socket allows; true when the WebSocket is open.
    pub(crate) fn advance(&mut self, request: &[u8]) -> Result<bool, PendingError> {
        let is_at_end = self.exchange(request)?;
        if let Some(head) = handshake::head_bytes(&self.received)? {
            handshake::check_response(&self.received[..head])?;
            if Dialect::of(request).is_open(&self.received[head..]) {
                self.received.drain(..head);
                return Ok(true);
            }
        }
        if is_at_end { Err(PendingError::Closed) } else { Ok(false) }
    }

    /// The socket, and the bytes that followed the handshake.
    pub(crate) fn into_parts(self) -> (Socket, Vec<u8>) {
        (self.socket, self.received)
    }

    /// Sends the request once, and reads; true at the end of the stream.
    fn exchange(&mut self, request: &[u8]) -> Result<bool, PendingError> {
        if let Some(error) = self.socket.tcp().take_error()? {
            return Err(error.into());
        }
        if !self.requested {
            if !self.socket.connect()? {
                return Ok(false);
            }
            // The send buffer of a new socket holds a whole request.
            self.socket.write_all(request)?;
            self.requested = true;
        }
        let mut chunk = [0; BUFFER_BYTES_MIN];
        while let Some(read) = nonblocking::read(&mut self.socket, &mut chunk)? {
            if read == 0 {
                return Ok(true);
            }
            self.received.extend_from_slice(&chunk[..read]);
        }
        Ok(false)
    }
}

fn connect_with_buffer(address: SocketAddr, bytes: usize) -> io::Result<TcpStream> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_recv_buffer_size(bytes)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(EINPROGRESS) => Err(error),
        _ => Ok(TcpStream::from_std(socket.into())),
    }
}
