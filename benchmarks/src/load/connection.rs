//! One client: a socket, the beginning of a frame, what is to be sent, and how far its closing has come.
//!
//! Closing is as RFC 6455, section 7, has it: a close frame is answered with its own code, and after both have been
//! seen the server is the one that ends TCP. Does not know its place in the crowd or what messages mean.

use std::io::{self, Read, Write};

use mio::net::TcpStream;
use socket2::SockRef;

use crate::{
    dialect,
    frame::{self, FrameError, Opcode},
    message,
};

pub(crate) const SCRATCH_BYTES: usize = 256 * 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error("the server closed the socket without a close frame")]
    Gone,
    /// The socket stays until the server ends it.
    #[error("the server sent close code {0}")]
    Closed(u16),
    /// After the close frames of both sides.
    #[error("the server closed the socket after the closing handshake")]
    Parted,
    #[error("the server masked a frame")]
    Masked,
    #[error("a message without a sequence number")]
    Unnumbered,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// How far the closing handshake is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Farewell {
    None,
    /// We have sent our close frame.
    Said,
    /// Both have: nothing is read any more but the end.
    Answered,
}

/// One client.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    /// The beginning of a frame whose end has not come.
    partial: Vec<u8>,
    /// What is to be sent.
    outgoing: Vec<u8>,
    /// It answers something, such as a ping.
    answers: bool,
    farewell: Farewell,
}

impl Connection {
    /// Takes over an open WebSocket, with the bytes that came after its handshake.
    pub(crate) fn new(stream: TcpStream, partial: Vec<u8>) -> Self {
        Self { stream, partial, outgoing: Vec::new(), answers: false, farewell: Farewell::None }
    }

    /// Neither side has begun to close.
    pub(crate) fn is_open(&self) -> bool {
        self.farewell == Farewell::None
    }

    pub(crate) fn has_outgoing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Where frames to be sent are appended.
    pub(crate) fn outgoing(&mut self) -> &mut Vec<u8> {
        &mut self.outgoing
    }

    /// Reads the socket empty.
    pub(crate) fn read(
        &mut self,
        scratch: &mut Vec<u8>,
        mut on_message: impl FnMut(u64),
    ) -> Result<(), Ended> {
        if self.farewell == Farewell::Answered {
            return self.read_out(scratch);
        }
        // A short read has emptied a stream socket; a later byte raises a new edge (epoll(7)).
        while self.read_once(scratch, SCRATCH_BYTES, &mut on_message)? == SCRATCH_BYTES {}
        Ok(())
    }

    /// Reads at most `limit` bytes, which are at most `SCRATCH_BYTES`.
    pub(crate) fn read_some(
        &mut self,
        scratch: &mut Vec<u8>,
        limit: usize,
        mut on_message: impl FnMut(u64),
    ) -> Result<(), Ended> {
        if self.farewell == Farewell::Answered {
            return self.read_out(scratch);
        }
        self.read_once(scratch, limit, &mut on_message).map(|_| ())
    }

    /// Returns how many bytes were read.
    #[inline]
    fn read_once(
        &mut self,
        scratch: &mut Vec<u8>,
        limit: usize,
        on_message: &mut impl FnMut(u64),
    ) -> Result<usize, Ended> {
        let kept = self.partial.len();
        if scratch.len() < kept + SCRATCH_BYTES {
            scratch.resize(kept + SCRATCH_BYTES, 0);
        }
        let read = loop {
            match self.stream.read(&mut scratch[kept..kept + limit]) {
                Ok(0) => return Err(Ended::Gone),
                Ok(read) => break read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break 0,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        };
        scratch[..kept].copy_from_slice(&self.partial);
        self.partial.clear();
        let filled = &scratch[..kept + read];
        let before = self.outgoing.len();
        let taken = take(filled, &mut self.outgoing, on_message);
        self.answers |= self.outgoing.len() > before;
        match taken {
            Ok(taken) => self.partial.extend_from_slice(&filled[taken..]),
            Err(Ended::Closed(code)) => {
                self.answer(code);
                return Err(Ended::Closed(code));
            }
            Err(broken) => return Err(broken),
        }
        Ok(read)
    }

    /// Discards what comes after the closing handshake, to its end.
    fn read_out(&mut self, scratch: &mut [u8]) -> Result<(), Ended> {
        loop {
            match self.stream.read(scratch) {
                Ok(0) => return Err(Ended::Parted),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A server that had not read everything from us ends TCP with a reset.
                Err(_) => return Err(Ended::Parted),
            }
        }
    }

    /// Sends our close frame; the server is to answer it.
    pub(crate) fn say_farewell(&mut self, code: u16) {
        if self.farewell == Farewell::None {
            message::write_close(&mut self.outgoing, code);
            self.farewell = Farewell::Said;
            self.flush();
        }
    }

    fn answer(&mut self, code: u16) {
        if self.farewell == Farewell::None {
            message::write_close(&mut self.outgoing, code);
            self.flush();
        }
        self.farewell = Farewell::Answered;
    }

    /// Makes the end of the socket a reset in place of an orderly end.
    pub(crate) fn reset_at_drop(&self) -> io::Result<()> {
        SockRef::from(&self.stream).set_linger(Some(std::time::Duration::ZERO))
    }

    pub(crate) fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Full: the next writable edge continues. Broken: the next read says why.
                Err(_) => return,
            }
        }
        if std::mem::take(&mut self.answers) {
            self.acknowledge_at_once();
        }
    }

    /// After an answer the kernel takes this for a conversation: it no longer acknowledges what is read, but waits
    /// for something to send, and then lets a timer do it. On the loopback that timer runs on the server's core.
    fn acknowledge_at_once(&self) {
        // A kernel that does not know the option has none of this to be told.
        #[cfg(target_os = "linux")]
        let _ = SockRef::from(&self.stream).set_tcp_quickack(true);
    }
}

/// Handles every whole frame in `bytes`; returns how many bytes they were.
#[inline]
fn take(bytes: &[u8], outgoing: &mut Vec<u8>, on_message: &mut impl FnMut(u64)) -> Result<usize, Ended> {
    let mut taken = 0;
    while let Some(frame) = frame::parse(&bytes[taken..])? {
        if frame.mask.is_some() {
            return Err(Ended::Masked);
        }
        let payload = &bytes[taken + frame.payload.start..taken + frame.payload.end];
        taken += frame.payload.end;
        match frame.opcode {
            Opcode::Text | Opcode::Binary => match message::seq(payload) {
                Some(seq) => on_message(seq),
                None if dialect::follow(payload, outgoing) => {}
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
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream as StdStream},
        time::Duration,
    };

    use super::*;

    fn received(bytes: &[u8], cut: usize) -> (Vec<u64>, Vec<u8>) {
        let (mut seqs, mut outgoing) = (Vec::new(), Vec::new());
        let taken = take(&bytes[..cut], &mut outgoing, &mut |seq| seqs.push(seq)).unwrap();
        take(&bytes[taken..], &mut outgoing, &mut |seq| seqs.push(seq)).unwrap();
        (seqs, outgoing)
    }

    #[test]
    fn messages_are_counted_alike_wherever_the_stream_is_cut() {
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

    #[test]
    fn a_close_frame_ends_the_connection_with_its_code() {
        let mut bytes = Vec::new();
        frame::write(&mut bytes, Opcode::Close, None, &1013_u16.to_be_bytes());
        assert!(matches!(take(&bytes, &mut Vec::new(), &mut |_| ()), Err(Ended::Closed(1013))));
    }

    fn pair() -> (Connection, StdStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let client = StdStream::connect(listener.local_addr().unwrap()).unwrap();
        client.set_nonblocking(true).unwrap();
        let server = listener.accept().unwrap().0;
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        (Connection::new(TcpStream::from_std(client), Vec::new()), server)
    }

    /// Reads until something other than nothing comes.
    fn end(connection: &mut Connection) -> Ended {
        loop {
            if let Err(ended) = connection.read(&mut Vec::new(), |_| ()) {
                return ended;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_close_frame_is_answered_masked_with_its_code_and_the_server_ends_tcp() {
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
        assert!(connection.read(&mut vec![0; 64], |_| ()).is_ok());
        drop(server);
        assert!(matches!(
            std::iter::repeat_with(|| connection.read(&mut vec![0; 64], |_| ())).find(Result::is_err),
            Some(Err(Ended::Parted))
        ));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn answering_pings_does_not_make_the_kernel_hold_back_acknowledgements() {
        let (mut connection, mut server) = pair();
        let mut ping = Vec::new();
        frame::write(&mut ping, Opcode::Ping, None, b"nonce");
        for _ in 0..8 {
            server.write_all(&ping).unwrap();
            while !connection.has_outgoing() {
                connection.read(&mut Vec::new(), |_| ()).unwrap();
            }
            connection.flush();
            server.read_exact(&mut [0; 11]).unwrap();
        }
        assert!(SockRef::from(&connection.stream).tcp_quickack().unwrap());
    }

    #[test]
    fn a_farewell_that_is_not_answered_is_told_from_one_that_is() {
        let (mut connection, server) = pair();
        connection.say_farewell(1000);
        // Read first, or the end would be a reset.
        (&server).read_exact(&mut [0; 8]).unwrap();
        drop(server);
        assert!(matches!(end(&mut connection), Ended::Gone));
    }
}
