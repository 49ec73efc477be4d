//! A TCP socket with its TLS session: what the shard reads is decrypted, what it writes is encrypted.
//!
//! Owned by a [`Socket`](super::Socket). The handshake is over: somebody else has made it. The session encrypts what one
//! write has gathered into as few records as possible, and they go out in one system call. What the kernel refuses of
//! them is kept here, because it cannot be encrypted again; nothing more is encrypted until it has been sent, so a
//! backlog stays in the outbox. Reads decrypt within the shard's buffer. rustls is known only here. Does not know frames.

use std::io::{self, ErrorKind, IoSlice, Read as _, Write};
use std::net::Shutdown;

use mio::net::TcpStream;
use rustls::ServerConnection;

use super::{Written, receive, send};
use crate::close_code::CloseCode;
use crate::frame::ControlFrame;

/// Bytes that are encrypted for one write, so that a long message is not in memory twice.
const WRITE_BYTES_MAX: usize = 64 << 10;

#[derive(Debug)]
pub(super) struct Tls {
    pub(super) stream: TcpStream,
    session: ServerConnection,
    /// Encrypted bytes that the kernel has refused.
    refused: Vec<u8>,
    /// The kernel may have more to read.
    has_more: bool,
    /// The session has decrypted more than the last read had room for.
    has_plaintext: bool,
    /// The client has ended the session, or broken its rules: no more is read.
    end: Option<End>,
    /// Our end of the session is over.
    is_finished: bool,
    /// A shard has it.
    is_adopted: bool,
}

#[derive(Debug, Clone, Copy)]
enum End {
    /// By a `close_notify`.
    Closed,
    Failed,
}

impl Tls {
    pub(super) fn new(stream: std::net::TcpStream, mut session: ServerConnection) -> Self {
        session.set_buffer_limit(None); // an outbox has a limit, and one write of it is encrypted at a time
        Self {
            stream: TcpStream::from_std(stream),
            session,
            refused: Vec::new(),
            has_more: false,
            has_plaintext: false,
            end: None,
            is_finished: false,
            is_adopted: false,
        }
    }

    pub(super) fn adopted(&mut self) {
        self.is_adopted = true;
    }

    /// Encrypted bytes that the kernel has not accepted yet.
    pub(super) fn refused_bytes(&self) -> usize {
        self.refused.len()
    }

    /// Whether another read may bring something.
    pub(super) fn has_more(&self) -> bool {
        self.has_more || self.has_plaintext || self.end.is_some()
    }

    /// Decrypts what the kernel has, at most as much as the buffer takes.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.has_plaintext {
            match self.session.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.has_plaintext = false,
                count => {
                    self.has_plaintext = count.as_ref().is_ok_and(|count| *count == buffer.len());
                    return count;
                }
            }
        }
        match self.end {
            Some(End::Closed) => return Ok(0),
            Some(End::Failed) => return Err(ErrorKind::InvalidData.into()),
            None => {}
        }
        let received = match receive(&self.stream, buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.has_more = false;
                return Err(error);
            }
            received => received?,
        };
        if received == 0 {
            return Ok(0); // without a `close_notify`: WebSocket has a Close frame of its own
        }
        self.has_more = received == buffer.len();
        let plaintext = self.decrypt(buffer, received)?;
        self.send_records()?; // answers of the session itself: a key update, an alert
        match plaintext {
            0 if self.end.is_none() => {
                // A part of a record. An end of the stream that has arrived with it is announced only once.
                self.has_more = true;
                Err(ErrorKind::WouldBlock.into())
            }
            0 => self.read(&mut []),
            count => Ok(count),
        }
    }

    /// Decrypts the first `received` bytes of the buffer to its beginning, and returns how many that became.
    fn decrypt(&mut self, buffer: &mut [u8], received: usize) -> io::Result<usize> {
        let (mut consumed, mut plaintext) = (0, 0);
        while consumed < received && self.end.is_none() {
            consumed += self.session.read_tls(&mut &buffer[consumed..received])?;
            match self.session.process_new_packets() {
                Ok(state) => {
                    if state.peer_has_closed() {
                        self.end = Some(End::Closed);
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "a TLS session failed");
                    self.end = Some(End::Failed);
                }
            }
            // Room is what has been consumed: what is encrypted is longer than what it becomes, but for the beginning
            // of a record that came earlier.
            let room = if consumed == received { buffer.len() } else { consumed };
            let target = &mut buffer[plaintext..room];
            match self.session.reader().read(target) {
                Ok(count) => {
                    plaintext += count;
                    self.has_plaintext = count == target.len();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.has_plaintext = false,
                Err(error) => return Err(error),
            }
        }
        Ok(plaintext)
    }

    /// Encrypts and sends the first bytes, at most [`WRITE_BYTES_MAX`]; called only while nothing is refused.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<Written> {
        debug_assert!(self.refused.is_empty(), "what was refused goes out first");
        let taken = self.session.writer().write(&bytes[..bytes.len().min(WRITE_BYTES_MAX)])?;
        let sent = self.send_records()?;
        Ok(Written { taken, sent })
    }

    /// Sends what the session has encrypted; what the kernel refuses is kept. Returns how many bytes that was.
    fn send_records(&mut self) -> io::Result<usize> {
        let mut count = 0;
        while self.session.wants_write() {
            count +=
                self.session.write_tls(&mut Wire { stream: &self.stream, refused: &mut self.refused })?;
        }
        match self.send_refused() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(count),
        }
    }

    /// Sends what was refused, until the kernel refuses again: only then it announces room.
    pub(super) fn send_refused(&mut self) -> io::Result<()> {
        while !self.refused.is_empty() {
            match send(&self.stream, &self.refused) {
                Ok(count) => drop(self.refused.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.refused = Vec::new(); // most clients never need it again
        Ok(())
    }

    /// Sends a Close frame, as far as the kernel takes it at once, and ends the session and the stream.
    pub(super) fn refuse(&mut self, code: CloseCode, reason: &str) {
        if !self.is_finished {
            let _ = self.write(ControlFrame::close(code, reason).as_bytes());
            self.finish();
        }
    }

    /// Ends the session and the stream; false if something must be sent before.
    pub(super) fn finish(&mut self) -> bool {
        if !std::mem::replace(&mut self.is_finished, true) {
            self.session.send_close_notify();
            if self.send_records().is_err() {
                return true; // the client has disconnected, which the next read reports
            }
        }
        if !self.refused.is_empty() {
            return false;
        }
        let _ = self.stream.shutdown(Shutdown::Write);
        true
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        if !self.is_adopted {
            self.refuse(CloseCode::TRY_AGAIN_LATER, "the connection was not served");
        } else if !self.is_finished {
            // A client that has ended only its side still reads, and must not take this end for a lost connection.
            self.session.send_close_notify();
            let _ = self.send_records();
        }
    }
}

/// The socket as the session sees it: it takes everything, and keeps what the kernel refuses.
struct Wire<'a> {
    stream: &'a TcpStream,
    refused: &'a mut Vec<u8>,
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, records: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut sent = 0;
        if self.refused.is_empty() {
            let result = match records {
                [record] => send(self.stream, record),
                records => (&mut &*self.stream).write_vectored(records),
            };
            sent = match result {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
                result => result?,
            };
        }
        let mut before = 0;
        for record in records {
            self.refused.extend_from_slice(&record[sent.saturating_sub(before).min(record.len())..]);
            before += record.len();
        }
        Ok(before)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
