//! A client on a bare stream, plain or TLS: it does what no client library would do, and nothing by itself.
//!
//! It stalls, reads little at a time, answers pings when it is told to, resets, floods. Knows the handshake. Reads whole
//! frames only, by [`FrameReader`]. Every wait has a bound.

use std::io::ErrorKind;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};
use testkit::frames::{CLOSE, FrameReader, PING, TEXT, close_code};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use crate::server::Endpoint;
use crate::transport::Stream;
use crate::wait::within_timeout;

/// How many bytes the kernel keeps for a client that does not read; Linux doubles it.
const RECEIVE_BUFFER_BYTES: usize = 4096;
/// No test sends a longer payload.
const PAYLOAD_BYTES_MAX: usize = 1 << 30;

/// A connection whose handshake is done, on which anything can be written and nothing is read unless asked for.
#[derive(Debug)]
pub struct RawClient {
    /// For what the methods do not do.
    pub stream: Stream,
    reader: FrameReader,
    /// The stream has ended, and the TLS session on it has not.
    is_truncated: bool,
}

impl RawClient {
    /// Connects to a WebSocket at the path `/ws`.
    pub async fn connect(to: impl Into<Endpoint>) -> Self {
        let Endpoint { transport, address } = to.into();
        Self::shake_hands(transport.connect(address).await.unwrap()).await
    }

    /// Connects such that the kernel keeps few bytes for it.
    pub async fn connect_narrow(to: impl Into<Endpoint>) -> Self {
        let Endpoint { transport, address } = to.into();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES).unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = TcpSocket::from_std_stream(socket.into());
        let stream = within_timeout(socket.connect(address)).await.unwrap();
        Self::shake_hands(transport.connect_on(stream).await.unwrap()).await
    }

    async fn shake_hands(mut stream: Stream) -> Self {
        let handshake = "GET /ws HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
            sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(handshake.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within_timeout(stream.read_u8()).await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        Self { stream, reader: FrameReader::new(PAYLOAD_BYTES_MAX), is_truncated: false }
    }

    /// Sends any bytes.
    pub async fn send(&mut self, bytes: &[u8]) {
        within_timeout(self.stream.write_all(bytes)).await.unwrap();
        within_timeout(self.stream.flush()).await.unwrap();
    }

    /// Reads at most so many bytes from the kernel, if it has any.
    pub fn read_at_most(&mut self, bytes: usize) {
        let taken = self.stream.take_at_most(bytes);
        self.reader.feed(&taken);
    }

    /// The next frame of those that were read, without waiting.
    pub fn frame_if_any(&mut self) -> Option<(u8, Vec<u8>)> {
        self.reader.next_frame()
    }

    /// Waits for bytes and reads them; false at the end of the stream, whatever ends it.
    async fn read_available(&mut self) -> bool {
        let mut buffer = vec![0; 16 << 10];
        let count = within_timeout(self.stream.read(&mut buffer)).await.unwrap_or_else(|error| {
            self.is_truncated = error.kind() == ErrorKind::UnexpectedEof;
            0
        });
        self.reader.feed(&buffer[..count]);
        count > 0
    }

    /// The next frame, opcode and payload, pings included; none at the end of the stream, which must not be within a
    /// frame.
    pub async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if let Some(frame) = self.reader.next_frame() {
                return Some(frame);
            }
            if !self.read_available().await {
                assert_eq!(self.reader.unread_bytes(), 0, "the stream ends within a frame");
                return None;
            }
        }
    }

    /// The next frame that is no ping: opcode and payload.
    pub async fn recv(&mut self) -> (u8, Vec<u8>) {
        loop {
            let frame = self.frame().await.expect("the stream goes on");
            if frame.0 != PING {
                return frame;
            }
        }
    }

    /// The text of the next frame that is no ping.
    pub async fn recv_text(&mut self) -> String {
        let (opcode, payload) = self.recv().await;
        assert_eq!(opcode, TEXT, "{payload:?}");
        String::from_utf8(payload).unwrap()
    }

    /// Waits for a ping, before which nothing else may come; its payload.
    pub async fn is_pinged(&mut self) -> Vec<u8> {
        let (opcode, payload) = self.frame().await.expect("the stream goes on");
        assert_eq!(opcode, PING, "{payload:?}");
        payload
    }

    /// The code of the Close frame that must come next, with the end of the stream behind it.
    pub async fn close_code(&mut self) -> Option<u16> {
        let (opcode, payload) = self.recv().await;
        assert_eq!(opcode, CLOSE);
        assert_eq!(self.frame().await, None, "the Close is the last word");
        assert!(!self.is_truncated, "over TLS, a `close_notify` follows the Close");
        close_code(&payload)
    }

    /// Reads to the end of the stream: all texts, and the code of the Close frame if one came (1005 if it had none).
    pub async fn rest(&mut self) -> (Vec<String>, Option<u16>) {
        let (mut texts, mut code) = (Vec::new(), None);
        while let Some((opcode, payload)) = self.frame().await {
            assert!(code.is_none(), "the Close is the last word");
            match opcode {
                TEXT => texts.push(String::from_utf8(payload).unwrap()),
                CLOSE => code = close_code(&payload).or(Some(1005)),
                _ => {}
            }
        }
        assert!(code.is_none() || !self.is_truncated, "over TLS, a `close_notify` follows the Close");
        (texts, code)
    }

    /// The same of a stream that may end anywhere, even within a frame.
    pub async fn rest_if_cut_off(&mut self) -> (Vec<String>, Option<u16>) {
        let (mut texts, mut code) = (Vec::new(), None);
        loop {
            match self.reader.next_frame() {
                Some((TEXT, payload)) => texts.push(String::from_utf8(payload).unwrap()),
                Some((CLOSE, payload)) => code = close_code(&payload).or(Some(1005)),
                Some(_) => {}
                None if self.read_available().await => {}
                None => return (texts, code),
            }
        }
    }

    /// Closes the socket with a reset instead of an end of the stream.
    pub fn reset(self) {
        SockRef::from(self.stream.tcp()).set_linger(Some(Duration::ZERO)).unwrap();
    }
}
