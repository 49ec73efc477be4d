//! One client connection: a socket, the beginning of an incomplete frame, and the bytes to send.
//!
//! Closes as RFC 6455, section 7, requires: answers a Close frame with the same code, and then waits for the server to
//! close TCP. Does not know other connections or what messages mean.

use std::io::{self, Write};

use socket2::SockRef;

use mio::{Registry, Token};

use super::socket::Socket;

use crate::{
    dialect,
    frame::{self, FrameError, Opcode},
    message, nonblocking,
};

pub(crate) const SCRATCH_BYTES: usize = 256 * 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error("the server closed the socket without a Close frame")]
    Disconnected,
    /// The socket remains until the server closes it.
    #[error("the server sent close code {0}")]
    Closed(u16),
    /// After the Close frames of both sides.
    #[error("the server closed the socket after the closing handshake")]
    ClosedByBoth,
    #[error("the server masked a frame")]
    Masked,
    #[error("a message without a sequence number")]
    Unnumbered,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Debug)]
pub(crate) struct Connection {
    socket: Socket,
    /// The beginning of an incomplete frame.
    partial: Vec<u8>,
    outgoing: Vec<u8>,
    /// Whether `outgoing` contains an answer to the server, such as a pong.
    has_answer: bool,
    /// Both Close frames are sent: only the end of TCP is awaited.
    is_closing: bool,
}

impl Connection {
    /// Takes over an open WebSocket, with the bytes that followed its handshake.
    pub(super) fn new(socket: Socket, partial: Vec<u8>) -> Self {
        Self { socket, partial, outgoing: Vec::new(), has_answer: false, is_closing: false }
    }

    /// Registers its socket at another poll than before.
    pub(super) fn move_to(&mut self, registry: &Registry, from: &Registry, token: Token) -> io::Result<()> {
        self.socket.move_to(registry, from, token)
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.is_closing
    }

    pub(crate) fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// The bytes to send; whole frames may be appended.
    pub(crate) fn outgoing(&mut self) -> &mut Vec<u8> {
        &mut self.outgoing
    }

    /// Reads everything that has arrived, or at most `limit` bytes.
    pub(crate) fn read(
        &mut self,
        scratch: &mut Vec<u8>,
        limit: Option<usize>,
        mut on_message: impl FnMut(u64),
    ) -> Result<(), Ended> {
        if self.is_closing {
            return self.await_end(scratch);
        }
        if let Some(limit) = limit {
            return self.read_once(scratch, limit.min(SCRATCH_BYTES), &mut on_message).map(drop);
        }
        while self.read_once(scratch, SCRATCH_BYTES, &mut on_message)? {}
        Ok(())
    }

    /// Reads once and handles the frames; returns whether there may be more to read.
    #[inline]
    fn read_once(
        &mut self,
        scratch: &mut Vec<u8>,
        limit: usize,
        on_message: &mut impl FnMut(u64),
    ) -> Result<bool, Ended> {
        let kept = self.partial.len();
        if scratch.len() < kept + SCRATCH_BYTES {
            scratch.resize(kept + SCRATCH_BYTES, 0);
        }
        let read = match nonblocking::read(&mut self.socket, &mut scratch[kept..kept + limit])? {
            Some(0) => return Err(Ended::Disconnected),
            read => read.unwrap_or(0),
        };
        scratch[..kept].copy_from_slice(&self.partial);
        self.partial.clear();
        let filled = &scratch[..kept + read];
        let before = self.outgoing.len();
        let handled = handle_frames(filled, &mut self.outgoing, on_message);
        self.has_answer |= self.outgoing.len() > before;
        match handled {
            Ok(handled) => {
                self.partial.extend_from_slice(&filled[handled..]);
                Ok(self.socket.may_have_more(read, limit))
            }
            Err(Ended::Closed(code)) => {
                message::write_close(&mut self.outgoing, code);
                self.flush();
                self.is_closing = true;
                Err(Ended::Closed(code))
            }
            Err(error) => Err(error),
        }
    }

    /// Discards what follows the closing handshake.
    fn await_end(&mut self, scratch: &mut [u8]) -> Result<(), Ended> {
        loop {
            match nonblocking::read(&mut self.socket, scratch) {
                Ok(None) => return Ok(()),
                // A server that has not read everything from us closes TCP with a reset.
                Ok(Some(0)) | Err(_) => return Err(Ended::ClosedByBoth),
                Ok(Some(_)) => {}
            }
        }
    }

    pub(crate) fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            match self.socket.write(&self.outgoing) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Full: the next writable edge continues. Broken: the next read returns the error.
                Err(_) => return,
            }
        }
        // As above.
        let _ = self.socket.flush();
        if std::mem::take(&mut self.has_answer) {
            self.acknowledge_at_once();
        }
    }

    /// After an answer the kernel considers the connection interactive and delays its acknowledgements until there is
    /// something to send or a timer expires. On the loopback that timer runs on the server's core.
    fn acknowledge_at_once(&self) {
        // A kernel without this option does not delay them either.
        #[cfg(target_os = "linux")]
        let _ = SockRef::from(self.socket.tcp()).set_tcp_quickack(true);
    }
}

/// Handles every whole frame in `bytes`; returns how many bytes they have.
#[inline]
fn handle_frames(
    bytes: &[u8],
    outgoing: &mut Vec<u8>,
    on_message: &mut impl FnMut(u64),
) -> Result<usize, Ended> {
    let mut handled = 0;
    while let Some(frame) = frame::parse(&bytes[handled..])? {
        if frame.mask.is_some() {
            return Err(Ended::Masked);
        }
        let payload = &bytes[handled + frame.payload.start..handled + frame.payload.end];
        handled += frame.payload.end;
        match frame.opcode {
            Opcode::Text | Opcode::Binary => match message::seq(payload) {
                Some(seq) => on_message(seq),
                None if dialect::handle_control(payload, outgoing) => {}
                None => return Err(Ended::Unnumbered),
            },
            Opcode::Ping => message::write_pong(outgoing, payload),
            Opcode::Pong => {}
            Opcode::Close => {
                let code = payload.first_chunk().map_or(message::NO_CODE, |code| u16::from_be_bytes(*code));
                return Err(Ended::Closed(code));
            }
        }
    }
    Ok(handled)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream as StdStream},
        time::Duration,
    };

    use mio::net::TcpStream;

    use super::*;

    fn received(bytes: &[u8], cut: usize) -> (Vec<u64>, Vec<u8>) {
        let (mut seqs, mut outgoing) = (Vec::new(), Vec::new());
        let handled = handle_frames(&bytes[..cut], &mut outgoing, &mut |seq| seqs.push(seq)).unwrap();
        handle_frames(&bytes[handled..], &mut outgoing, &mut |seq| seqs.push(seq)).unwrap();
        (seqs, outgoing)
    }

    #[test]
    fn messages_are_found_wherever_the_stream_is_cut() {
        let mut bytes = Vec::new();
        for text in [r#"{"t":1,"p":""}"#, r#"{"t":2,"p":""}"#] {
            frame::write(&mut bytes, Opcode::Text, None, text.as_bytes());
            frame::write(&mut bytes, Opcode::Ping, None, b"nonce");
        }
        for cut in 0..=bytes.len() {
            let (seqs, outgoing) = received(&bytes, cut);
            assert_eq!(seqs, [1, 2]);
            let pong = frame::parse(&outgoing).unwrap().unwrap();
            assert_eq!((pong.opcode, pong.payload.len()), (Opcode::Pong, 5));
            assert_eq!(outgoing.len(), 2 * pong.payload.end);
        }
    }

    fn pair() -> (Connection, StdStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let client = StdStream::connect(listener.local_addr().unwrap()).unwrap();
        client.set_nonblocking(true).unwrap();
        let server = listener.accept().unwrap().0;
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        (Connection::new(Socket::Plain(TcpStream::from_std(client)), Vec::new()), server)
    }

    /// Reads until the connection ends.
    fn end(connection: &mut Connection) -> Ended {
        loop {
            if let Err(ended) = connection.read(&mut Vec::new(), None, |_| ()) {
                return ended;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_close_frame_is_answered_masked_with_its_code_and_the_server_closes_tcp() {
        let (mut connection, mut server) = pair();
        let mut close = Vec::new();
        frame::write(&mut close, Opcode::Close, None, &1001_u16.to_be_bytes());
        server.write_all(&close).unwrap();
        assert!(matches!(end(&mut connection), Ended::Closed(1001)));
        let mut answer = [0; 8];
        server.read_exact(&mut answer).unwrap();
        let frame = frame::parse(&answer).unwrap().unwrap();
        frame::apply_mask(frame.mask.unwrap(), &mut answer[frame.payload.clone()]);
        assert_eq!((frame.opcode, &answer[frame.payload]), (Opcode::Close, &1001_u16.to_be_bytes()[..]));
        assert!(connection.read(&mut vec![0; 64], None, |_| ()).is_ok());
        drop(server);
        assert!(matches!(
            std::iter::repeat_with(|| connection.read(&mut vec![0; 64], None, |_| ())).find(Result::is_err),
            Some(Err(Ended::ClosedByBoth))
        ));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_kernel_acknowledges_at_once_after_answered_pings() {
        let (mut connection, mut server) = pair();
        let mut ping = Vec::new();
        frame::write(&mut ping, Opcode::Ping, None, b"nonce");
        for _ in 0..8 {
            server.write_all(&ping).unwrap();
            while !connection.has_outgoing() {
                connection.read(&mut Vec::new(), None, |_| ()).unwrap();
            }
            connection.flush();
            server.read_exact(&mut [0; 11]).unwrap();
        }
        assert!(SockRef::from(connection.socket.tcp()).tcp_quickack().unwrap());
    }

    #[test]
    fn the_end_of_tcp_without_a_close_frame_is_a_disconnection() {
        let (mut connection, server) = pair();
        drop(server);
        assert!(matches!(end(&mut connection), Ended::Disconnected));
    }
}
