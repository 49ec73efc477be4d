//! The crowd: all client connections, on one epoll.
//!
//! Owns the sockets and hands the sequence number of each message to whoever reads. One scratch buffer serves
//! everybody: it is large, because a server that coalesces deserves a client that takes it all in one read, and a
//! connection keeps bytes of its own only while a frame is incomplete. A slot whose connection has ended may be taken
//! by another one. Does not know what was sent, what is expected, or the time.

use std::{io, time::Duration};

use mio::{Events, Poll, Registry, Token, net::TcpStream};

use super::connection::{Connection, Ended, SCRATCH_BYTES};

const EVENTS: usize = 1024;

/// All clients; the index is the token.
#[derive(Debug)]
pub(crate) struct Crowd {
    poll: Poll,
    events: Events,
    connections: Vec<Option<Connection>>,
    sockets: usize,
    /// Who may have something to read, last first.
    ready: Vec<usize>,
    /// Who may have something to send.
    dirty: Vec<usize>,
    scratch: Vec<u8>,
}

impl Crowd {
    /// Takes over open WebSockets, with the bytes that came after their handshakes, registered at `poll` by index.
    pub(crate) fn new(poll: Poll, open: Vec<(TcpStream, Vec<u8>)>) -> Self {
        Self::sparse(poll, open.into_iter().map(Some).collect())
    }

    /// Takes over those of the WebSockets that are open.
    pub(crate) fn sparse(poll: Poll, open: Vec<Option<(TcpStream, Vec<u8>)>>) -> Self {
        // Readiness is edge-triggered and may have been used up while others connected.
        let ready = (0..open.len()).collect();
        let connection = |slot: Option<_>| slot.map(|(stream, partial)| Connection::new(stream, partial));
        let connections: Vec<_> = open.into_iter().map(connection).collect();
        Self {
            poll,
            events: Events::with_capacity(EVENTS),
            sockets: connections.iter().flatten().count(),
            connections,
            ready,
            dirty: Vec::new(),
            scratch: vec![0; SCRATCH_BYTES],
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// How many sockets there are, the closing ones among them.
    pub(crate) fn sockets(&self) -> usize {
        self.sockets
    }

    /// Connected, and neither side closing.
    pub(crate) fn is_present(&self, index: usize) -> bool {
        self.connections[index].as_ref().is_some_and(Connection::is_open)
    }

    /// Where a newcomer registers, under the index it is to have.
    pub(crate) fn registry(&self) -> &Registry {
        self.poll.registry()
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
            } else if self.connections[index].is_none() {
                // A newcomer that is connected now and has to send its request.
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

    /// Reads one connection empty, telling every message's number. After `Ended::Closed` the socket waits for the
    /// server to end it, which is `Ended::Parted`; any other error is the end of the connection.
    pub(crate) fn read(&mut self, index: usize, on_message: impl FnMut(u64)) -> Result<(), Ended> {
        let Some(connection) = &mut self.connections[index] else { return Ok(()) };
        let outcome = connection.read(&mut self.scratch, on_message);
        self.conclude(index, outcome)
    }

    /// Reads at most `limit` bytes from one connection.
    pub(crate) fn read_some(
        &mut self,
        index: usize,
        limit: usize,
        on_message: impl FnMut(u64),
    ) -> Result<(), Ended> {
        let Some(connection) = &mut self.connections[index] else { return Ok(()) };
        let outcome = connection.read_some(&mut self.scratch, limit.min(SCRATCH_BYTES), on_message);
        self.conclude(index, outcome)
    }

    fn conclude(&mut self, index: usize, outcome: Result<(), Ended>) -> Result<(), Ended> {
        match &outcome {
            Ok(()) => {
                if self.connections[index].as_ref().is_some_and(Connection::has_outgoing) {
                    self.dirty.push(index);
                }
            }
            // The end may have come already, and its edge been used up.
            Err(Ended::Closed(_)) => self.ready.push(index),
            Err(_) => self.vacate(index),
        }
        outcome
    }

    /// Lets `write` append frames to what an open connection sends at the next flush.
    pub(crate) fn queue(&mut self, index: usize, write: impl FnOnce(&mut Vec<u8>)) {
        if let Some(connection) = self.connections[index].as_mut().filter(|connection| connection.is_open()) {
            write(connection.outgoing());
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

    /// Begins the closing handshake; its end is that of the reading.
    pub(crate) fn close(&mut self, index: usize, code: u16) {
        if let Some(connection) = &mut self.connections[index] {
            connection.say_farewell(code);
        }
    }

    /// Ends a connection at once and without a word, by a reset or by the kernel's closing of TCP.
    pub(crate) fn abort(&mut self, index: usize, reset: bool) -> io::Result<()> {
        if let Some(connection) = &self.connections[index] {
            if reset {
                connection.reset_at_drop()?;
            }
            self.vacate(index);
        }
        Ok(())
    }

    /// Gives an open WebSocket, registered under `index`, the vacant place there.
    pub(crate) fn adopt(&mut self, index: usize, stream: TcpStream, received: Vec<u8>) {
        if self.connections[index].replace(Connection::new(stream, received)).is_none() {
            self.sockets += 1;
        }
        self.ready.push(index);
    }

    fn vacate(&mut self, index: usize) {
        if self.connections[index].take().is_some() {
            self.sockets -= 1;
        }
    }
}
