//! A client's TLS session on its socket.
//!
//! Built on rustls' unbuffered interface: everything that has arrived is received by one system call into the caller's
//! buffer and decrypted there, so that the client is not the limit. It keeps the beginning of an incomplete record, and
//! what the socket did not accept. Does not know what is sent.

use std::{
    fmt,
    io::{self, Read, Write},
    net::IpAddr,
    sync::Arc,
};

use mio::net::TcpStream;
use rustls::{
    ClientConfig,
    client::UnbufferedClientConnection,
    pki_types::ServerName,
    unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus},
};

use crate::nonblocking;

/// A buffer to read into must be longer than the longest record with its header and tag.
pub(super) const BUFFER_BYTES_MIN: usize = 20 * 1024;
/// How much is read at a time until the handshake is done.
const CHUNK_BYTES: usize = 4 * 1024;

pub(super) struct TlsSocket {
    stream: TcpStream,
    session: UnbufferedClientConnection,
    /// Received and not decrypted: an incomplete record, and after the handshake also whole ones.
    incoming: Vec<u8>,
    /// Encrypted, and not accepted by the socket.
    outgoing: Vec<u8>,
    /// Whether the last read left something in the socket.
    has_more: bool,
}

/// What the session needs to continue.
enum Need {
    Nothing,
    /// Something from the server.
    Input,
    End,
}

impl TlsSocket {
    pub(super) fn new(stream: TcpStream, server: IpAddr, config: &Arc<ClientConfig>) -> io::Result<Self> {
        let name = ServerName::IpAddress(server.into());
        let session = UnbufferedClientConnection::new(config.clone(), name).map_err(io::Error::other)?;
        Ok(Self { stream, session, incoming: Vec::new(), outgoing: Vec::new(), has_more: false })
    }

    pub(super) fn stream_mut(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub(super) fn has_more(&self) -> bool {
        self.has_more
    }

    /// Continues the handshake; true when it is done.
    pub(super) fn shake_hands(&mut self) -> io::Result<bool> {
        loop {
            let status = self.session.process_tls_records(&mut self.incoming);
            let (discard, need) = advance(status, &mut self.outgoing, |_| ())?;
            self.incoming.drain(..discard);
            match need {
                Some(Need::Nothing) => {
                    self.flush()?;
                    return Ok(true);
                }
                Some(Need::Input) => {
                    self.flush()?;
                    let mut chunk = [0; CHUNK_BYTES];
                    match nonblocking::read(&mut self.stream, &mut chunk)? {
                        Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Some(read) => self.incoming.extend_from_slice(&chunk[..read]),
                        None => return Ok(false),
                    }
                }
                Some(Need::End) => return Err(io::ErrorKind::UnexpectedEof.into()),
                None => {}
            }
        }
    }

    /// Decrypts the records at the beginning of `buffer` in place; returns the bytes of plaintext, which are then at its
    /// beginning, and whether the server has ended the stream.
    fn decrypt(&mut self, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
        let (mut start, mut plain) = (0, 0);
        let mut payloads = Vec::new();
        loop {
            let status = self.session.process_tls_records(&mut buffer[start..]);
            payloads.clear();
            let (discard, need) =
                advance(status, &mut self.outgoing, |payload| payloads.extend_from_slice(payload))?;
            start += discard;
            // A record is longer than its payload, so this never overwrites what follows.
            buffer[plain..plain + payloads.len()].copy_from_slice(&payloads);
            plain += payloads.len();
            if let Some(need) = need {
                self.incoming.extend_from_slice(&buffer[start..]);
                return Ok((plain, matches!(need, Need::End)));
            }
        }
    }
}

// rustls' session has no Debug.
impl fmt::Debug for TlsSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (incoming, outgoing) = (self.incoming.len(), self.outgoing.len());
        f.debug_struct("TlsSocket")
            .field("stream", &self.stream)
            .field("incoming_bytes", &incoming)
            .field("outgoing_bytes", &outgoing)
            .finish_non_exhaustive()
    }
}

impl Read for TlsSocket {
    /// Everything that has arrived, as far as it fits; see [`TlsSocket::has_more`].
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let kept = self.incoming.len();
        if buffer.len() < kept.max(BUFFER_BYTES_MIN) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no record fits into the buffer"));
        }
        buffer[..kept].copy_from_slice(&self.incoming);
        let (read, is_at_end) = match nonblocking::read(&mut self.stream, &mut buffer[kept..])? {
            Some(0) => (0, true),
            Some(read) => (read, false),
            None => (0, false),
        };
        self.has_more = kept + read == buffer.len();
        self.incoming.clear();
        let (plain, has_ended) = self.decrypt(&mut buffer[..kept + read])?;
        if !self.outgoing.is_empty() {
            self.flush()?;
        }
        match plain {
            0 if is_at_end || has_ended => Ok(0),
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => {
                // The end is found again by the next read.
                self.has_more |= is_at_end || has_ended;
                Ok(plain)
            }
        }
    }
}

impl Write for TlsSocket {
    /// Accepts all of `plain`, or nothing while the socket is full.
    fn write(&mut self, plain: &[u8]) -> io::Result<usize> {
        self.flush()?;
        if !self.outgoing.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        loop {
            let status = self.session.process_tls_records(&mut []);
            match status.state.map_err(io::Error::other)? {
                ConnectionState::WriteTraffic(mut traffic) => {
                    append(&mut self.outgoing, |out| {
                        traffic.encrypt(plain, out).map_err(|error| match error {
                            EncryptError::InsufficientSize(size) => Ok(size),
                            error => Err(io::Error::other(error)),
                        })
                    })?;
                    self.flush()?;
                    return Ok(plain.len());
                }
                ConnectionState::EncodeTlsData(mut data) => encode(&mut self.outgoing, &mut data)?,
                ConnectionState::TransmitTlsData(data) => data.done(),
                _ => return Err(io::ErrorKind::NotConnected.into()),
            }
        }
    }

    /// Sends what the socket accepts.
    fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// One step of the session: what it wants to send is appended to `outgoing`, what it has received is passed on. Returns
/// how many bytes it has used, and what it needs when it cannot continue by itself.
fn advance<T>(
    status: UnbufferedStatus<'_, '_, T>,
    outgoing: &mut Vec<u8>,
    mut on_payload: impl FnMut(&[u8]),
) -> io::Result<(usize, Option<Need>)> {
    let UnbufferedStatus { mut discard, state, .. } = status;
    let need = match state.map_err(io::Error::other)? {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record.map_err(io::Error::other)?;
                discard += record.discard;
                on_payload(record.payload);
            }
            None
        }
        ConnectionState::EncodeTlsData(mut data) => {
            encode(outgoing, &mut data)?;
            None
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            None
        }
        ConnectionState::BlockedHandshake => Some(Need::Input),
        ConnectionState::WriteTraffic(_) => Some(Need::Nothing),
        _ => Some(Need::End),
    };
    Ok((discard, need))
}

fn encode<T>(outgoing: &mut Vec<u8>, data: &mut rustls::unbuffered::EncodeTlsData<'_, T>) -> io::Result<()> {
    append(outgoing, |out| {
        data.encode(out).map_err(|error| match error {
            EncodeError::InsufficientSize(size) => Ok(size),
            error => Err(io::Error::other(error)),
        })
    })
}

/// Appends what `write` writes; it is called again when it says that it needs more room.
fn append(
    outgoing: &mut Vec<u8>,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Result<InsufficientSizeError, io::Error>>,
) -> io::Result<()> {
    let before = outgoing.len();
    let mut room = 256;
    loop {
        outgoing.resize(before + room, 0);
        match write(&mut outgoing[before..]) {
            Ok(written) => {
                outgoing.truncate(before + written);
                return Ok(());
            }
            Err(Ok(InsufficientSizeError { required_size })) => room = required_size,
            Err(Err(error)) => {
                outgoing.truncate(before);
                return Err(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use rustls::ServerConnection;

    use super::*;
    use crate::tls;

    /// Accepts one client, returns what it sends to it `times` over, and ends the stream.
    fn serve(listener: &TcpListener, config: &Arc<rustls::ServerConfig>, times: usize) -> io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut session = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        let mut question = [0; 5];
        rustls::Stream::new(&mut session, &mut stream).read_exact(&mut question)?;
        let mut records = Vec::new();
        for _ in 0..times {
            session.writer().write_all(&question)?;
            session.write_tls(&mut records)?;
        }
        session.send_close_notify();
        session.write_tls(&mut records)?;
        // In pieces that cut records anywhere.
        records.chunks(997).try_for_each(|piece| stream.write_all(piece))
    }

    #[test]
    fn everything_arrives_wherever_the_records_are_cut_and_then_the_end() {
        let path = std::env::temp_dir().join(format!("benchmarks-{}.pem", std::process::id()));
        tls::make_certificate(&path).unwrap();
        let config = tls::server_config(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || serve(&listener, &config, 20_000));

        let stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_nonblocking(true).unwrap();
        let stream = TcpStream::from_std(stream);
        let mut socket = TlsSocket::new(stream, address.ip(), &tls::client_config().unwrap()).unwrap();
        while !socket.shake_hands().unwrap() {
            thread::yield_now();
        }
        assert_eq!(socket.write(b"quest").unwrap(), 5);
        let (mut buffer, mut received) = (vec![0; BUFFER_BYTES_MIN], Vec::new());
        loop {
            match nonblocking::read(&mut socket, &mut buffer).unwrap() {
                Some(0) => break,
                Some(read) => received.extend_from_slice(&buffer[..read]),
                None => thread::yield_now(),
            }
        }
        assert_eq!(received, b"quest".repeat(20_000));
        server.join().unwrap().unwrap();
    }
}
