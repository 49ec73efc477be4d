//! A client on a bare stream: it sends what it is told to and answers nothing by itself.
//!
//! Blocking, over one end of a socket pair or a TCP connection whose handshake is done. Reads whole frames only, by
//! [`FrameReader`]. Does not know the engine.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use crate::frames::{self, FIN, FrameReader, client_frame, client_text, close_code};
use crate::stream::Stream;

/// No test sends a longer payload.
const PAYLOAD_BYTES_MAX: usize = 1 << 30;

/// What a client receives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// A text or binary message; all that tests send is UTF-8.
    Data(String),
    /// A ping, and its payload.
    Ping(Vec<u8>),
    /// A pong, and its payload.
    Pong(Vec<u8>),
    /// A Close frame, and its code if it has one.
    Close(Option<u16>),
    /// The end of the stream, or a reset.
    End,
}

/// The other side of a connection.
#[derive(Debug)]
pub struct RawClient {
    /// For what the methods do not do: shutting down, writing single bytes.
    pub stream: Stream,
    reader: FrameReader,
    /// What follows the code in the Close frame that it received.
    pub close_text: String,
}

impl RawClient {
    /// On a stream whose handshake is done.
    pub fn new(stream: impl Into<Stream>) -> Self {
        Self { stream: stream.into(), reader: FrameReader::new(PAYLOAD_BYTES_MAX), close_text: String::new() }
    }

    /// The same on a TCP connection.
    pub fn new_tcp(stream: TcpStream) -> Self {
        Self::new(UnixStream::from(OwnedFd::from(stream))) // is only read, written and shut down
    }

    /// Sends one frame; the kernel must take all of it.
    pub fn send_frame(&mut self, first_byte: u8, payload: &[u8]) {
        self.stream.write_all(&client_frame(first_byte, payload)).expect("the socket takes it");
    }

    /// Sends a text message.
    pub fn text(&mut self, text: &str) {
        self.stream.write_all(&client_text(text)).expect("the socket takes it");
    }

    /// Sends a Close frame.
    pub fn close(&mut self, code: u16) {
        self.send_frame(FIN | frames::CLOSE, &code.to_be_bytes());
    }

    /// Everything that has arrived, without waiting.
    pub fn receive(&mut self) -> Vec<Received> {
        self.stream.set_nonblocking(true).expect("a socket");
        let mut buffer = [0; 4096];
        let is_over = loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => break true,
                Ok(count) => self.reader.feed(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break false,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break true,
                Err(error) => panic!("{error}"),
            }
        };
        let mut received: Vec<_> = std::iter::from_fn(|| self.next_whole()).collect();
        received.extend(is_over.then_some(Received::End));
        received
    }

    /// Everything that has arrived except pings, which are answered.
    pub fn receive_and_answer(&mut self) -> Vec<Received> {
        let mut received = self.receive();
        for received in &received {
            if let Received::Ping(nonce) = received {
                // Where the stream has ended, nobody waits for the answer.
                let _ = self.stream.write_all(&client_frame(FIN | frames::PONG, nonce));
            }
        }
        received.retain(|received| !matches!(received, Received::Ping(_)));
        received
    }

    /// Sends as much of the bytes as the kernel takes now; returns how many that were.
    pub fn send_some(&mut self, bytes: &[u8]) -> usize {
        self.stream.set_nonblocking(true).expect("a socket");
        let mut sent = 0;
        while let Ok(count @ 1..) = self.stream.write(&bytes[sent..]) {
            sent += count;
        }
        sent
    }

    /// The frames that are complete after at most `max` more bytes were read.
    pub fn receive_some(&mut self, max: usize) -> Vec<Received> {
        self.stream.set_nonblocking(true).expect("a socket");
        if let Ok(received) = self.stream.take_at_most(max) {
            self.reader.feed(&received);
        }
        std::iter::from_fn(|| self.next_whole()).collect()
    }

    /// The messages in everything that has arrived.
    pub fn receive_data(&mut self) -> Vec<String> {
        let data = |received| if let Received::Data(text) = received { Some(text) } else { None };
        self.receive().into_iter().filter_map(data).collect()
    }

    /// Waits for the next frame or the end of the stream.
    pub fn wait(&mut self) -> Received {
        self.stream.set_nonblocking(false).expect("a socket");
        let mut buffer = [0; 4096];
        loop {
            if let Some(received) = self.next_whole() {
                return received;
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return Received::End,
                Ok(count) => self.reader.feed(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Received::End,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Waits for the message for which `is_last` holds, and answers pings; returns the messages before it.
    pub fn wait_data_until(&mut self, is_last: impl Fn(&str) -> bool) -> Vec<String> {
        let mut data = Vec::new();
        loop {
            match self.wait() {
                Received::Data(text) if is_last(&text) => return data,
                Received::Data(text) => data.push(text),
                Received::Ping(payload) => self.send_frame(FIN | frames::PONG, &payload),
                other => panic!("{other:?} after {} messages", data.len()),
            }
        }
    }

    fn next_whole(&mut self) -> Option<Received> {
        let (opcode, payload) = self.reader.next_frame()?;
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        Some(match opcode {
            frames::TEXT | frames::BINARY => Received::Data(text(payload)),
            frames::CLOSE => {
                let code = close_code(&payload);
                self.close_text = text(payload.get(2..).unwrap_or_default().to_vec());
                Received::Close(code)
            }
            frames::PING => Received::Ping(payload),
            frames::PONG => Received::Pong(payload),
            opcode => panic!("opcode {opcode}"),
        })
    }
}
