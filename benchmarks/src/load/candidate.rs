//! A connection on its way: connecting, then shaking hands.
//!
//! Shared by those who open a crowd, replace a member or storm a server. Owns its socket until the WebSocket is
//! open. Does not know which connection it will be, or what it is opened for.

use std::{
    io::{self, Read, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use mio::{Interest, Registry, Token, net::TcpStream};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    dialect::Dialect,
    handshake::{self, HandshakeError},
};

/// How a connection that is not to block says that it has begun (errno(3)).
const EINPROGRESS: i32 = 115;

/// Why a candidate did not become a WebSocket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CandidateError {
    #[error("the socket failed")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("the server closed the socket during the handshake")]
    Closed,
}

/// A socket that is not yet a WebSocket.
#[derive(Debug)]
pub(crate) struct Candidate {
    stream: TcpStream,
    requested: bool,
    received: Vec<u8>,
    started: Instant,
}

impl Candidate {
    /// Begins to connect. `receive_buffer` is a socket buffer's size in bytes, in place of the kernel's choice; it
    /// has to be set before the handshake of TCP, which offers it to the server.
    pub(crate) fn start(
        address: SocketAddr,
        registry: &Registry,
        token: Token,
        receive_buffer: Option<usize>,
    ) -> io::Result<Self> {
        let mut stream = match receive_buffer {
            Some(bytes) => connect_with_buffer(address, bytes)?,
            None => TcpStream::connect(address)?,
        };
        registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { stream, requested: false, received: Vec::new(), started: Instant::now() })
    }

    /// How long ago it was started.
    pub(crate) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Goes on as far as the socket allows; true when the WebSocket is open.
    pub(crate) fn advance(&mut self, request: &[u8]) -> Result<bool, CandidateError> {
        let end = self.exchange(request)?;
        if let Some(head) = handshake::head_bytes(&self.received)? {
            handshake::check_response(&self.received[..head])?;
            if Dialect::of(request).is_open(&self.received[head..]) {
                self.received.drain(..head);
                return Ok(true);
            }
        }
        if end { Err(CandidateError::Closed) } else { Ok(false) }
    }

    /// The socket, and what came after the handshake.
    pub(crate) fn into_parts(self) -> (TcpStream, Vec<u8>) {
        (self.stream, self.received)
    }

    /// Sends the request once, and reads; true at the end of the stream.
    fn exchange(&mut self, request: &[u8]) -> Result<bool, CandidateError> {
        if let Some(error) = self.stream.take_error()? {
            return Err(error.into());
        }
        if !self.requested {
            if self.stream.peer_addr().is_err() {
                return Ok(false);
            }
            self.stream.set_nodelay(true)?;
            // A fresh socket takes a request whole.
            self.stream.write_all(request)?;
            self.requested = true;
        }
        let mut chunk = [0; 1024];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(true),
                Ok(read) => self.received.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn connect_with_buffer(address: SocketAddr, bytes: usize) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_recv_buffer_size(bytes)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(EINPROGRESS) => Err(error),
        _ => Ok(TcpStream::from_std(socket.into())),
    }
}
