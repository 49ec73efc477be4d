//! The crowd: all client connections, on one epoll.
//!
//! Owns the sockets, cuts what arrives into frames, answers pings, and hands the sequence number of each message to
//! whoever reads. One scratch buffer serves everybody: it is large, because a server that coalesces deserves a client
//! that takes it all in one read, and a connection keeps bytes of its own only while a frame is incomplete.
//! Does not know what was sent, what is expected, or the time.

use std::{
    io::{self, Read, Write},
    time::Duration,
};

use mio::{Events, Poll, Token, net::TcpStream};

use crate::{
    dialect,
    frame::{self, FrameError, Opcode},
    message,
};

const SCRATCH_BYTES: usize = 256 * 1024;
const EVENTS: usize = 1024;

/// Why a connection ended before the run did.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    #[error("the server closed the socket without a close frame")]
    Gone,
    #[error("the server sent close code {0}")]
    Closed(u16),
    #[error("the server masked a frame")]
    Masked,
    #[error("a message without a sequence number")]
    Unnumbered,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One client.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    /// The beginning of a frame whose end has not come.
    partial: Vec<u8>,
    /// What is to be sent.
    outgoing: Vec<u8>,
}

/// All clients; the index is the token.
#[derive(Debug)]
pub(crate) struct Crowd {
    poll: Poll,
    events: Events,
    connections: Vec<Option<Connection>>,
    /// Who may have something to read, last first.
    ready: Vec<usize>,
    /// Who may have something to send.
    dirty: Vec<usize>,
    scratch: Vec<u8>,
}

impl Crowd {
    /// Takes over open WebSockets, with the bytes that came after their handshakes, registered at `poll` by index.
    pub(crate) fn new(poll: Poll, open: Vec<(TcpStream, Vec<u8>)>) -> Self {
        // Readiness is edge-triggered and may have been used up while others connected.
        let ready = (0..open.len()).collect();
        let connection = |(stream, partial)| Some(Connection { stream, partial, outgoing: Vec::new() });
        Self {
            poll,
            events: Events::with_capacity(EVENTS),
            connections: open.into_iter().map(connection).collect(),
            ready,
            dirty: Vec::new(),
            scratch: vec![0; SCRATCH_BYTES],
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    pub(crate) fn is_present(&self, index: usize) -> bool {
        self.connections[index].is_some()
    }

    /// Waits for readiness; true when there was any.
    pub(crate) fn wait(&mut self, timeout: Duration) -> io::Result<bool> {
        if !self.ready.is_empty() {
            return Ok(true);
        }
        match self.poll.poll(&mut self.events, Some(timeout)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(false),
            outcome => outcome?,
        }
        for event in &self.events {
            let Token(index) = event.token();
            if event.is_writable() {
                self.dirty.push(index);
            }
            if event.is_readable() || event.is_read_closed() || event.is_error() {
                self.ready.push(index);
            }
        }
        self.flush();
        self.ready.reverse();
        Ok(!self.events.is_empty())
    }

    /// The next connection to read.
    pub(crate) fn next_ready(&mut self) -> Option<usize> {
        self.ready.pop()
    }

    /// Reads one connection empty, telling every message's number. An error is the end of the connection.
    pub(crate) fn read(&mut self, index: usize, on_message: impl FnMut(u64)) -> Result<(), Ended> {
        let Some(connection) = &mut self.connections[index] else { return Ok(()) };
        let outcome = connection.read(&mut self.scratch, on_message);
        if outcome.is_err() {
            self.connections[index] = None;
        } else if !connection.outgoing.is_empty() {
            self.dirty.push(index);
        }
        outcome
    }

    /// Lets `write` append frames to what a connection sends at the next flush.
    pub(crate) fn queue(&mut self, index: usize, write: impl FnOnce(&mut Vec<u8>)) {
        if let Some(connection) = &mut self.connections[index] {
            write(&mut connection.outgoing);
            self.dirty.push(index);
        }
    }

    /// Sends what is queued, with one write per connection.
    pub(crate) fn flush(&mut self) {
        for index in self.dirty.drain(..) {
            if let Some(connection) = &mut self.connections[index] {
                connection.flush();
            }
        }
    }
}

impl Connection {
    fn read(&mut self, scratch: &mut Vec<u8>, mut on_message: impl FnMut(u64)) -> Result<(), Ended> {
        loop {
            let kept = self.partial.len();
            if scratch.len() < kept + SCRATCH_BYTES {
                scratch.resize(kept + SCRATCH_BYTES, 0);
            }
            let read = match self.stream.read(&mut scratch[kept..]) {
                Ok(0) => return Err(Ended::Gone),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            // A short read has emptied a stream socket; a later byte raises a new edge (epoll(7)).
            let drained = kept + read < scratch.len();
            scratch[..kept].copy_from_slice(&self.partial);
            self.partial.clear();
            let filled = &scratch[..kept + read];
            let taken = take(filled, &mut self.outgoing, &mut on_message)?;
            self.partial.extend_from_slice(&filled[taken..]);
            if drained {
                return Ok(());
            }
        }
    }

    fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Full: the next writable edge continues. Broken: the next read says why.
                Err(_) => return,
            }
        }
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
            // 1005 stands for a close frame without a code (RFC 6455, 7.1.5).
            Opcode::Close => {
                let code = payload.first_chunk().map_or(1005, |code| u16::from_be_bytes(*code));
                return Err(Ended::Closed(code));
            }
        }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
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
}
