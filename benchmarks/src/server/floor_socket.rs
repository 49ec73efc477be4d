//! The floor's socket: plain, or with a TLS session of rustls.
//!
//! Everything written is one record and one write(2), as long as the socket accepts it. What has arrived is received by
//! one system call as far as it fits into the session's buffer. Does not know WebSocket.

use std::{
    io::{self, Read, Write},
    sync::Arc,
};

use mio::net::TcpStream;
use rustls::{ServerConfig, ServerConnection};

use crate::nonblocking;

#[derive(Debug)]
pub(super) enum Socket {
    Plain(TcpStream),
    Tls(Box<TlsSocket>),
}

#[derive(Debug)]
pub(super) struct TlsSocket {
    stream: TcpStream,
    session: ServerConnection,
}

/// Notes whether a read has emptied the socket, which a short one shows.
struct Tap<'a> {
    stream: &'a mut TcpStream,
    is_empty: bool,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, tls: Option<&Arc<ServerConfig>>) -> io::Result<Self> {
        let Some(config) = tls else { return Ok(Self::Plain(stream)) };
        let session = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        Ok(Self::Tls(Box::new(TlsSocket { stream, session })))
    }
}

impl Read for Socket {
    /// Over TLS everything that has arrived, as far as it fits.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(socket) => socket.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(socket) => socket.write(bytes),
        }
    }

    /// Sends what the session holds and the socket accepts.
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(socket) => socket.flush(),
        }
    }
}

impl TlsSocket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (mut filled, mut is_empty) = (0, false);
        loop {
            match nonblocking::read(&mut self.session.reader(), &mut buffer[filled..])? {
                Some(0) => return Ok(filled),
                Some(read) => filled += read,
                None if is_empty && filled > 0 => return Ok(filled),
                None if is_empty => return Err(io::ErrorKind::WouldBlock.into()),
                None => {
                    let mut tap = Tap { stream: &mut self.stream, is_empty: false };
                    let received = self.session.read_tls(&mut tap);
                    is_empty = tap.is_empty;
                    match received {
                        Ok(0) => return Ok(filled),
                        Ok(_) => {
                            self.session.process_new_packets().map_err(io::Error::other)?;
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => is_empty = true,
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                    // The handshake, and answers to key updates.
                    self.flush()?;
                }
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush()?;
        if self.session.wants_write() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let accepted = self.session.writer().write(bytes)?;
        self.flush()?;
        Ok(accepted)
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut self.stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                sent => drop(sent?),
            }
        }
        Ok(())
    }
}

impl Read for Tap<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.is_empty = read < buffer.len();
        Ok(read)
    }
}
