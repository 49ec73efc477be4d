//! A TLS session without buffers of its own: bytes in, bytes out.
//!
//! Owned by the socket's owner: the stream that makes the handshake, then a [`Socket`](crate::Socket). rustls'
//! `ServerConnection` keeps a read buffer of 4 KB for the life of the connection. Its unbuffered interface works in the
//! caller's memory, which a shard's connections share or free at once. Only an incomplete record is kept here. Does not
//! know sockets.

use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, InsufficientSizeError, UnbufferedStatus,
    WriteTraffic,
};
use rustls::{CommonState, ServerConfig};

/// The longest beginning that is kept: as long as a message of a handshake may be, and a record. rustls limits the message
/// (64 KiB), but not the records that it is split into, which it needs until the message is complete: with a byte in
/// each they are 6 to 23 times as long.
const PARTIAL_BYTES_MAX: usize = 80 << 10;

/// The server's side of a TLS session, which reads and writes nothing by itself.
///
/// A stream makes the handshake with it; then an engine takes it with its socket ([`Socket::tls`](crate::Socket::tls)).
pub struct TlsSession {
    session: UnbufferedServerConnection,
    /// The beginning of a record.
    partial: Vec<u8>,
    end: Option<TlsEnd>,
}

/// How the client has ended a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsEnd {
    /// By a `close_notify`.
    Closed,
    /// The client has violated the protocol, and the server must send an alert.
    Failed,
}

impl TlsSession {
    /// A session whose handshake the client begins. The configuration must accept no early data, which could be
    /// replayed.
    ///
    /// # Errors
    /// rustls' error, for a configuration that is inconsistent or accepts early data.
    pub fn new(config: Arc<ServerConfig>) -> Result<Self, rustls::Error> {
        if config.max_early_data_size > 0 {
            return Err(rustls::Error::General("early data is not supported".to_owned()));
        }
        Ok(Self { session: UnbufferedServerConnection::new(config)?, partial: Vec::new(), end: None })
    }

    /// What rustls knows of the session: the version, the protocol by ALPN, the client's certificates.
    pub fn state(&self) -> &CommonState {
        &self.session
    }

    /// Whether nothing of the application can be sent yet.
    pub fn is_handshaking(&self) -> bool {
        self.session.is_handshaking()
    }

    /// Whether and how the client has ended the session: nothing more is decrypted.
    pub fn end(&self) -> Option<TlsEnd> {
        self.end
    }

    /// Bytes that are kept until their record is complete.
    pub fn partial_bytes(&self) -> usize {
        self.partial.len()
    }

    /// Decrypts what has arrived, in place, and gives what it contains to `take`, a record at a time. Adds what the
    /// session itself says to `answer`: its part of a handshake, an alert.
    pub fn decrypt(&mut self, received: &mut [u8], answer: &mut Vec<u8>, mut take: impl FnMut(&[u8])) {
        if self.end.is_some() {
            return;
        }
        if self.partial.is_empty() {
            let consumed = self.process(received, answer, &mut take);
            if self.end.is_none() {
                self.partial.extend_from_slice(&received[consumed..]);
            }
        } else {
            let mut all = std::mem::take(&mut self.partial);
            all.extend_from_slice(received);
            let consumed = self.process(&mut all, answer, &mut take);
            if self.end.is_none() && consumed < all.len() {
                // As it is while a record arrives in small pieces, but without the room of a whole read.
                let is_tight = all.capacity() <= 2 * all.len();
                self.partial = if consumed == 0 && is_tight { all } else { all[consumed..].to_vec() };
            }
        }
        if self.partial.len() > PARTIAL_BYTES_MAX {
            self.partial = Vec::new();
            self.end = Some(TlsEnd::Failed);
        }
    }

    /// Decrypts all complete records of `bytes`, and returns how many bytes need not be kept.
    fn process(&mut self, bytes: &mut [u8], answer: &mut Vec<u8>, take: &mut impl FnMut(&[u8])) -> usize {
        let mut consumed = 0;
        loop {
            let UnbufferedStatus { discard, state } =
                self.session.process_tls_records(&mut bytes[consumed..]);
            let mut may_be_all = false;
            let goes_on = match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(Ok(record)) = traffic.next_record() {
                        take(record.payload);
                    }
                    may_be_all = true;
                    true
                }
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, answer).is_ok(),
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    true
                }
                Ok(ConnectionState::PeerClosed) => {
                    self.end = Some(TlsEnd::Closed);
                    true
                }
                Ok(_) => false,
                Err(error) => {
                    tracing::debug!(%error, "a TLS session failed");
                    self.end = Some(TlsEnd::Failed);
                    false
                }
            };
            consumed += discard;
            // The usual case: one record, after which another call would find nothing.
            let is_all = may_be_all && consumed == bytes.len() && !self.session.wants_write();
            if !goes_on || is_all {
                break;
            }
        }
        if self.end == Some(TlsEnd::Failed) {
            // The alert. The session offers what it must send before it reads, so no input is needed.
            while self.session.wants_write() {
                let Ok(ConnectionState::EncodeTlsData(data)) =
                    self.session.process_tls_records(&mut []).state
                else {
                    break;
                };
                let _ = encode(data, answer);
            }
        }
        consumed
    }

    /// Encrypts bytes of the application, and adds their records to `to_send`.
    ///
    /// # Errors
    /// `InvalidData` if the client has broken the session, `BrokenPipe` if it is over or has not begun.
    pub fn encrypt(&mut self, bytes: &[u8], to_send: &mut Vec<u8>) -> io::Result<()> {
        self.with_writer(to_send, |writer, to_send| {
            append(to_send, bytes.len() + bytes.len() / 64 + 256, |room| {
                writer.encrypt(bytes, room).map_err(insufficient)
            })
        })
    }

    /// Ends our side of the session: adds a `close_notify` to `to_send`.
    ///
    /// # Errors
    /// As for [`encrypt`](Self::encrypt).
    pub fn close(&mut self, to_send: &mut Vec<u8>) -> io::Result<()> {
        self.with_writer(to_send, |writer, to_send| {
            append(to_send, 256, |room| writer.queue_close_notify(room).map_err(insufficient))
        })
    }

    fn with_writer(
        &mut self,
        to_send: &mut Vec<u8>,
        write: impl FnOnce(&mut Writer<'_>, &mut Vec<u8>) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.end == Some(TlsEnd::Failed) {
            return Err(ErrorKind::InvalidData.into());
        }
        loop {
            // With what is kept, which the session has seen: it expects that again.
            match self.session.process_tls_records(&mut self.partial).state {
                Ok(ConnectionState::WriteTraffic(mut writer)) => return write(&mut writer, to_send),
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, to_send)?,
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(_) => return Err(ErrorKind::BrokenPipe.into()),
                Err(error) => return Err(io::Error::new(ErrorKind::InvalidData, error)),
            }
        }
    }
}

impl fmt::Debug for TlsSession {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let partial_bytes = self.partial.len();
        formatter
            .debug_struct("TlsSession")
            .field("partial_bytes", &partial_bytes)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

type Writer<'a> = WriteTraffic<'a, ServerConnectionData>;

/// What the session itself says.
fn encode(mut data: EncodeTlsData<'_, ServerConnectionData>, to_send: &mut Vec<u8>) -> io::Result<()> {
    append(to_send, 0, |room| {
        data.encode(room).map_err(|error| match error {
            EncodeError::InsufficientSize(size) => Some(size),
            EncodeError::AlreadyEncoded => None,
        })
    })
}

fn insufficient(error: EncryptError) -> Option<InsufficientSizeError> {
    match error {
        EncryptError::InsufficientSize(size) => Some(size),
        EncryptError::EncryptExhausted => None,
    }
}

/// Lets `write` add to the vector: with room for `bytes`, and once more with as much as it says that it needs.
fn append(
    to: &mut Vec<u8>,
    bytes: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<InsufficientSizeError>>,
) -> io::Result<()> {
    let before = to.len();
    to.resize(before + bytes, 0);
    let written = match write(&mut to[before..]) {
        Err(Some(InsufficientSizeError { required_size })) => {
            to.resize(before + required_size, 0);
            write(&mut to[before..])
        }
        written => written,
    };
    to.truncate(before + *written.as_ref().unwrap_or(&0));
    written.map(drop).map_err(|_| ErrorKind::BrokenPipe.into())
}
