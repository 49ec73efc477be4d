//! A TCP socket with its TLS session: what the shard reads is decrypted, what it writes is encrypted.
//!
//! Owned by a [`Socket`](super::Socket). The handshake is over: somebody else has made it. The session encrypts what one
//! write has gathered into as few records as possible, and they go out in one system call. What the kernel refuses of
//! them is kept here, because it cannot be encrypted again; nothing more is encrypted until it has been sent, so a
//! backlog stays in the outbox. A [`TlsSession`] has no memory of its own for reads and writes; rustls'
//! `ServerConnection`, which other servers make the handshake with, keeps 4 KB. Does not know frames.

use std::cell::Cell;
use std::io::{self, ErrorKind, IoSlice, Read as _, Write};
use std::net::Shutdown;

use mio::net::TcpStream;
use rustls::ServerConnection;

use super::{Written, receive, send};
use crate::close_code::CloseCode;
use crate::frame::ControlFrame;
use crate::tls_session::{TlsEnd, TlsSession};

/// Bytes that are encrypted for one write, so that a long message is not in memory twice.
const WRITE_BYTES_MAX: usize = 64 << 10;
/// The largest buffer that a thread keeps for the next call, in bytes: enough for the records of the longest write.
const KEPT_BYTES_MAX: usize = WRITE_BYTES_MAX + (4 << 10);

thread_local! {
    /// Where the bytes of one read are decrypted, and those of one write encrypted.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

#[derive(Debug)]
pub(super) struct Tls {
    pub(super) stream: TcpStream,
    session: Session,
    /// Encrypted bytes that the kernel has refused.
    refused: Vec<u8>,
    /// The kernel may have more to read.
    has_more: bool,
    /// The session has decrypted more than the last read had room for.
    has_plaintext: bool,
    /// The client has ended the session, or broken its rules: no more is read.
    end: Option<TlsEnd>,
    /// Our end of the session is over.
    is_finished: bool,
    /// A shard has it.
    is_adopted: bool,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "the large one is the usual one, and a box would cost it more")]
enum Session {
    Unbuffered {
        session: TlsSession,
        /// What was decrypted and had no room in the buffer of a read: at most a record that had begun before.
        plaintext: Vec<u8>,
    },
    Buffered(Box<ServerConnection>),
}

impl Tls {
    pub(super) fn unbuffered(stream: std::net::TcpStream, session: TlsSession, unsent: Vec<u8>) -> Self {
        let end = session.end();
        let session = Session::Unbuffered { session, plaintext: Vec::new() };
        Self::new(stream, session, unsent, end)
    }

    pub(super) fn buffered(stream: std::net::TcpStream, mut session: ServerConnection) -> Self {
        session.set_buffer_limit(None); // an outbox has a limit, and one write of it is encrypted at a time
        Self::new(stream, Session::Buffered(Box::new(session)), Vec::new(), None)
    }

    fn new(stream: std::net::TcpStream, session: Session, refused: Vec<u8>, end: Option<TlsEnd>) -> Self {
        Self {
            stream: TcpStream::from_std(stream),
            session,
            refused,
            has_more: false,
            has_plaintext: false,
            end,
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

    pub(super) fn becomes_readable(&mut self) {
        self.has_more = true;
    }

    /// Whether another read may bring something.
    pub(super) fn has_more(&self) -> bool {
        self.has_more || self.has_plaintext || self.end.is_some()
    }

    /// Decrypts what the kernel has, at most as much as the buffer takes.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.has_plaintext
            && let Some(count) = self.read_plaintext(buffer)?
        {
            return Ok(count);
        }
        match self.end {
            Some(TlsEnd::Closed) => return Ok(0),
            Some(TlsEnd::Failed) => return Err(ErrorKind::InvalidData.into()),
            None => {}
        }
        let received = match &self.session {
            Session::Unbuffered { .. } => self.receive_and_decrypt(buffer),
            Session::Buffered(_) => self.receive_and_decrypt_buffered(buffer),
        };
        let plaintext = match received {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.has_more = false;
                return Err(error);
            }
            Ok(None) => return Ok(0), // without a `close_notify`: WebSocket has a Close frame of its own
            received => received?.unwrap_or(0),
        };
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

    /// What has been decrypted already, if anything.
    fn read_plaintext(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match &mut self.session {
            Session::Unbuffered { plaintext, .. } => {
                let count = plaintext.len().min(buffer.len());
                buffer[..count].copy_from_slice(&plaintext[..count]);
                plaintext.drain(..count);
                self.has_plaintext = !plaintext.is_empty();
                if !self.has_plaintext {
                    *plaintext = Vec::new();
                }
                Ok(Some(count))
            }
            Session::Buffered(session) => match session.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.has_plaintext = false;
                    Ok(None)
                }
                count => {
                    self.has_plaintext = count.as_ref().is_ok_and(|count| *count == buffer.len());
                    count.map(Some)
                }
            },
        }
    }

    /// Decrypts what the kernel has into the buffer, and returns how many bytes that became; none at the end of the
    /// stream.
    fn receive_and_decrypt(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Session::Unbuffered { session, plaintext } = &mut self.session else { return Ok(None) };
        let received = receive(&self.stream, buffer)?;
        if received == 0 {
            return Ok(None);
        }
        self.has_more = received == buffer.len();
        let mut answer = Vec::new();
        let fits = with_buffer(|decrypted| {
            session.decrypt(&mut buffer[..received], &mut answer, |piece| decrypted.extend_from_slice(piece));
            let fits = decrypted.len().min(buffer.len());
            buffer[..fits].copy_from_slice(&decrypted[..fits]);
            plaintext.extend_from_slice(&decrypted[fits..]);
            fits
        });
        self.has_plaintext = !plaintext.is_empty();
        self.end = session.end();
        if !answer.is_empty() {
            send_records(&self.stream, &mut self.refused, &answer)?;
        }
        Ok(Some(fits))
    }

    /// The same within the buffer.
    fn receive_and_decrypt_buffered(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let received = receive(&self.stream, buffer)?;
        if received == 0 {
            return Ok(None);
        }
        self.has_more = received == buffer.len();
        let plaintext = self.decrypt_buffered(buffer, received)?;
        self.send_buffered()?; // answers of the session itself: a key update, an alert
        Ok(Some(plaintext))
    }

    /// Decrypts the first `received` bytes of the buffer to its beginning, and returns how many that became.
    fn decrypt_buffered(&mut self, buffer: &mut [u8], received: usize) -> io::Result<usize> {
        let Session::Buffered(session) = &mut self.session else { return Ok(0) };
        let (mut consumed, mut plaintext) = (0, 0);
        while consumed < received && self.end.is_none() {
            consumed += session.read_tls(&mut &buffer[consumed..received])?;
            match session.process_new_packets() {
                Ok(state) => {
                    if state.peer_has_closed() {
                        self.end = Some(TlsEnd::Closed);
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "a TLS session failed");
                    self.end = Some(TlsEnd::Failed);
                }
            }
            // Room is what has been consumed: what is encrypted is longer than what it becomes, but for the beginning
            // of a record that came earlier.
            let room = if consumed == received { buffer.len() } else { consumed };
            let target = &mut buffer[plaintext..room];
            match session.reader().read(target) {
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

    /// Encrypts and sends the first bytes, at most [`WRITE_BYTES_MAX`]; none while something is refused.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<Written> {
        if !self.refused.is_empty() {
            return Err(ErrorKind::WouldBlock.into()); // the refused bytes must be sent first
        }
        let bytes = &bytes[..bytes.len().min(WRITE_BYTES_MAX)];
        match &mut self.session {
            Session::Unbuffered { session, .. } => with_buffer(|to_send| {
                session.encrypt(bytes, to_send)?;
                send_records(&self.stream, &mut self.refused, to_send)?;
                Ok(Written { taken: bytes.len(), sent: to_send.len() })
            }),
            Session::Buffered(session) => {
                let taken = session.writer().write(bytes)?;
                let sent = self.send_buffered()?;
                Ok(Written { taken, sent })
            }
        }
    }

    /// Sends what a buffered session has encrypted; what the kernel refuses is kept. Returns how many bytes that was.
    fn send_buffered(&mut self) -> io::Result<usize> {
        let Session::Buffered(session) = &mut self.session else { return Ok(0) };
        let mut count = 0;
        while session.wants_write() {
            count += session.write_tls(&mut Wire { stream: &self.stream, refused: &mut self.refused })?;
        }
        match self.send_refused() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(count),
        }
    }

    /// Sends what was refused, until the kernel refuses again: only then it announces room.
    pub(super) fn send_refused(&mut self) -> io::Result<()> {
        send_refused(&self.stream, &mut self.refused)
    }

    /// Sends a Close frame, as far as the kernel takes it at once, and ends the session and the stream.
    pub(super) fn refuse(&mut self, code: CloseCode, reason: &str) {
        if !self.is_finished {
            let _ = self.send_refused();
            let _ = self.write(ControlFrame::close(code, reason).as_bytes());
            self.finish();
        }
    }

    /// Sends our `close_notify`.
    fn close_session(&mut self) -> io::Result<()> {
        match &mut self.session {
            Session::Unbuffered { session, .. } => {
                let mut to_send = Vec::new();
                session.close(&mut to_send)?;
                send_records(&self.stream, &mut self.refused, &to_send)
            }
            Session::Buffered(session) => {
                session.send_close_notify();
                self.send_buffered().map(drop)
            }
        }
    }

    /// Ends the session and the stream; false if something must be sent before.
    pub(super) fn finish(&mut self) -> bool {
        if !std::mem::replace(&mut self.is_finished, true) {
            let sent = self.close_session();
            // The client has broken the session, and earlier bytes are still sent; or it has disconnected, which the next
            // read reports.
            if sent.is_err() && self.end.is_none() {
                return true;
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
            let _ = self.close_session();
        }
    }
}

/// Calls `work` with an empty buffer that the thread's next call uses again.
fn with_buffer<T>(work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    let mut buffer = BUFFER.try_with(Cell::take).unwrap_or_default(); // none at the end of a thread
    let result = work(&mut buffer);
    if buffer.capacity() <= KEPT_BYTES_MAX {
        buffer.clear();
        let _ = BUFFER.try_with(|kept| kept.set(buffer));
    }
    result
}

/// Sends records after what was refused, and keeps what the kernel refuses.
fn send_records(stream: &TcpStream, refused: &mut Vec<u8>, records: &[u8]) -> io::Result<()> {
    let mut sent = 0;
    if refused.is_empty() {
        sent = match send(stream, records) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            sent => sent?,
        };
        if sent == records.len() {
            return Ok(());
        }
    }
    refused.extend_from_slice(&records[sent..]);
    match send_refused(stream, refused) {
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}

fn send_refused(stream: &TcpStream, refused: &mut Vec<u8>) -> io::Result<()> {
    while !refused.is_empty() {
        match send(stream, refused) {
            Ok(count) => drop(refused.drain(..count)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    *refused = Vec::new(); // most clients never need it again
    Ok(())
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
