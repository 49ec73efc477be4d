//! All client connections, on one epoll.
//!
//! Owns the sockets and passes the sequence number of each received message to the reader. All connections share one
//! scratch buffer; it is large, because a server that coalesces should meet a client that reads everything at once. A
//! connection has a buffer of its own only while a frame is incomplete. Does not know what was sent, what is expected,
//! or the time.

use std::{io, time::Duration};

use mio::{Events, Poll, Token};

use super::{
    alarm::{ALARM, Alarm},
    connection::{Connection, Ended, SCRATCH_BYTES},
    socket::Socket,
};
use crate::nonblocking;

const EVENTS: usize = 1024;

/// All clients; the index is the token.
#[derive(Debug)]
pub(crate) struct ClientPool {
    poll: Poll,
    events: Events,
    /// `None` where the connection has ended.
    connections: Vec<Option<Connection>>,
    /// Connections that may have something to read, last first.
    ready: Vec<usize>,
    /// Connections that may have something to send.
    dirty: Vec<usize>,
    scratch: Vec<u8>,
}

impl ClientPool {
    /// Takes over open WebSockets, with the bytes that followed their handshakes, registered at `poll` by index.
    pub(super) fn new(poll: Poll, open: Vec<(Socket, Vec<u8>)>) -> Self {
        Self {
            poll,
            events: Events::with_capacity(EVENTS),
            // Readiness is edge-triggered and may have been consumed while others connected.
            ready: (0..open.len()).collect(),
            connections: open.into_iter().map(|(socket, rest)| Some(Connection::new(socket, rest))).collect(),
            dirty: Vec::new(),
            scratch: vec![0; SCRATCH_BYTES],
        }
    }

    /// Takes over all connections of another pool; returns the index of the first.
    pub(crate) fn absorb(&mut self, other: Self) -> io::Result<usize> {
        let first = self.connections.len();
        for mut connection in other.connections {
            let index = self.connections.len();
            if let Some(connection) = &mut connection {
                connection.move_to(self.poll.registry(), other.poll.registry(), Token(index))?;
            }
            self.connections.push(connection);
            self.ready.push(index); // its edge may have been consumed
        }
        Ok(first)
    }

    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Connected, and without a Close frame of the server.
    pub(crate) fn is_open(&self, index: usize) -> bool {
        self.connections[index].as_ref().is_some_and(Connection::is_open)
    }

    /// An alarm that ends the waiting.
    pub(crate) fn alarm(&self) -> io::Result<Alarm> {
        Alarm::register(self.poll.registry())
    }

    /// Waits for readiness; true when there was any.
    pub(crate) fn wait(&mut self, timeout: Duration) -> io::Result<bool> {
        if !self.ready.is_empty() {
            return Ok(true);
        }
        nonblocking::poll(&mut self.poll, &mut self.events, Some(timeout))?;
        for event in self.events.iter().filter(|event| event.token() != ALARM) {
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

    /// Reads everything that one connection has received, or at most `limit` bytes, and passes on every message's number.
    /// After `Ended::Closed` the socket remains until the server closes it, which is `Ended::ClosedByBoth`; any other
    /// error ends the connection.
    #[inline]
    pub(crate) fn read(
        &mut self,
        index: usize,
        limit: Option<usize>,
        on_message: impl FnMut(u64),
    ) -> Result<(), Ended> {
        let Some(connection) = &mut self.connections[index] else { return Ok(()) };
        let outcome = connection.read(&mut self.scratch, limit, on_message);
        match &outcome {
            Ok(()) => {
                if connection.has_outgoing() {
                    self.dirty.push(index);
                }
            }
            // The end of the stream may already be there, and its edge consumed.
            Err(Ended::Closed(_)) => self.ready.push(index),
            Err(_) => self.connections[index] = None,
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

    /// Sends what is queued, with one write for each connection.
    pub(crate) fn flush(&mut self) {
        for index in self.dirty.drain(..) {
            if let Some(connection) = &mut self.connections[index] {
                connection.flush();
            }
        }
    }
}
