//! A TLS stream whose session a shard can take over: handshake, HTTP, and what is not read yet.
//!
//! Owned by the server until an upgrade. A session of tokio-rustls' stream keeps its buffers for the life of the
//! connection. Here the buffers belong to the stream, so a shard takes the session without them. Does not know HTTP.

use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::{CommonState, ServerConfig};
use shardcast_engine::{Socket, TlsEnd, TlsSession};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;

/// Bytes that are read at once: a record.
const READ_BYTES: usize = 16 << 10;
/// Bytes that are encrypted at once, when nothing else waits to be sent.
const WRITE_BYTES_MAX: usize = 64 << 10;

/// A connection of a [`TlsListener`](super::TlsListener), after its handshake.
#[derive(Debug)]
pub struct TlsStream {
    stream: TcpStream,
    session: TlsSession,
    /// Decrypted, and not read yet.
    plaintext: Vec<u8>,
    /// Encrypted, and not sent yet.
    to_send: Vec<u8>,
    is_closed: bool,
}

impl TlsStream {
    /// Makes the handshake.
    pub(super) async fn accept(stream: TcpStream, config: Arc<ServerConfig>) -> io::Result<Self> {
        let session = TlsSession::new(config).map_err(io::Error::other)?;
        let mut stream =
            Self { stream, session, plaintext: Vec::new(), to_send: Vec::new(), is_closed: false };
        let mut received = vec![0; READ_BYTES];
        while stream.session.is_handshaking() {
            let count = stream.stream.read(&mut received).await?;
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            stream.decrypt(&mut received[..count]);
            stream.stream.write_all(&std::mem::take(&mut stream.to_send)).await?; // also an alert
            if stream.session.end().is_some() {
                return Err(ErrorKind::InvalidData.into());
            }
        }
        Ok(stream)
    }

    /// The socket.
    pub fn get_ref(&self) -> &TcpStream {
        &self.stream
    }

    /// What rustls knows of the session: the version, the protocol by ALPN, the client's certificates.
    pub fn state(&self) -> &CommonState {
        self.session.state()
    }

    /// The socket for an engine, and what was decrypted and not read.
    pub(crate) fn into_socket(mut self) -> io::Result<(Socket, Vec<u8>)> {
        self.send_what_fits();
        Ok((Socket::tls(self.stream.into_std()?, self.session, self.to_send), self.plaintext))
    }

    fn decrypt(&mut self, received: &mut [u8]) {
        let plaintext = &mut self.plaintext;
        self.session.decrypt(received, &mut self.to_send, |piece| plaintext.extend_from_slice(piece));
    }

    /// Sends without waiting. A task that reads must not wait for room instead of the one that writes.
    fn send_what_fits(&mut self) {
        while !self.to_send.is_empty() {
            match self.stream.try_write(&self.to_send) {
                Ok(count) => drop(self.to_send.drain(..count)),
                Err(_) => return, // the next write sends the rest, or reports the error
            }
        }
    }

    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.to_send.is_empty() {
            let count = ready!(Pin::new(&mut self.stream).poll_write(context, &self.to_send))?;
            if count == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            self.to_send.drain(..count);
        }
        self.to_send = Vec::new(); // an idle connection needs no memory for it
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.plaintext.is_empty() {
            match self.session.end() {
                Some(TlsEnd::Closed) => return Poll::Ready(Ok(())),
                Some(TlsEnd::Failed) => return Poll::Ready(Err(ErrorKind::InvalidData.into())),
                None => {}
            }
            let mut received = [0; READ_BYTES];
            let mut received = ReadBuf::new(&mut received);
            ready!(Pin::new(&mut self.stream).poll_read(context, &mut received))?;
            if received.filled().is_empty() {
                return Poll::Ready(Err(ErrorKind::UnexpectedEof.into())); // without a `close_notify`
            }
            self.decrypt(received.filled_mut());
            self.send_what_fits();
        }
        let count = self.plaintext.len().min(buffer.remaining());
        buffer.put_slice(&self.plaintext[..count]);
        self.plaintext.drain(..count);
        if self.plaintext.is_empty() {
            self.plaintext = Vec::new(); // an idle connection needs no memory for it
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_send(context))?;
        let count = bytes.len().min(WRITE_BYTES_MAX);
        let this = &mut *self;
        this.session.encrypt(&bytes[..count], &mut this.to_send)?;
        // What does not fit is sent by the next write or flush.
        match self.poll_send(context) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(count)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(context))?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !std::mem::replace(&mut self.is_closed, true) {
            let this = &mut *self;
            // A session that the client has broken ends without.
            let _ = this.session.close(&mut this.to_send);
        }
        ready!(self.poll_send(context))?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
