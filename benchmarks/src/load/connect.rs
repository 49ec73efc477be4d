//! Opens the crowd: connects and shakes hands, a bounded number at a time.
//!
//! Bounded, because a listen backlog that overflows costs a second per lost SYN and would be mistaken for a slow
//! server. Returns only when every handshake is done, so that nothing of it is measured.

use std::{
    io::{self, Read, Write},
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token, net::TcpStream};

use super::{crowd::Crowd, target::Target};
use crate::{
    dialect::Dialect,
    handshake::{self, HandshakeError},
};

const AT_ONCE: usize = 100;
const STALLED_AFTER: Duration = Duration::from_secs(10);

/// Why not everybody is connected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("connection {index} failed")]
    Socket { index: usize, source: io::Error },
    #[error("connection {index} is no WebSocket")]
    Handshake { index: usize, source: HandshakeError },
    #[error("connection {index} was closed during the handshake")]
    Closed { index: usize },
    #[error("{open} of {wanted} connections are open, and no more for {}s", STALLED_AFTER.as_secs())]
    Stalled { open: usize, wanted: usize },
    #[error("epoll failed")]
    Poll(#[from] io::Error),
}

/// A connection on its way.
#[derive(Debug)]
struct Candidate {
    stream: TcpStream,
    requested: bool,
    received: Vec<u8>,
    open: bool,
}

/// Opens `wanted` WebSockets.
pub(crate) fn connect(target: &Target, wanted: usize) -> Result<Crowd, ConnectError> {
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(2 * AT_ONCE);
    let request = handshake::request(&target.address.to_string(), &target.path);
    let mut candidates: Vec<Candidate> = Vec::with_capacity(wanted);
    let mut open = 0;
    let mut progress = Instant::now();
    while open < wanted {
        while candidates.len() < wanted && candidates.len() < open + AT_ONCE {
            let index = candidates.len();
            let candidate = Candidate::start(target, &poll, index)
                .map_err(|source| ConnectError::Socket { index, source })?;
            candidates.push(candidate);
        }
        match poll.poll(&mut events, Some(Duration::from_millis(100))) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            outcome => outcome?,
        }
        for event in &events {
            let Token(index) = event.token();
            let candidate = &mut candidates[index];
            if !candidate.open && candidate.advance(index, &request)? {
                open += 1;
                progress = Instant::now();
            }
        }
        if progress.elapsed() > STALLED_AFTER {
            return Err(ConnectError::Stalled { open, wanted });
        }
    }
    Ok(Crowd::new(
        poll,
        candidates.into_iter().map(|candidate| (candidate.stream, candidate.received)).collect(),
    ))
}

impl Candidate {
    fn start(target: &Target, poll: &Poll, index: usize) -> io::Result<Self> {
        let mut stream = TcpStream::connect(target.address)?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        poll.registry().register(&mut stream, Token(index), interest)?;
        Ok(Self { stream, requested: false, received: Vec::new(), open: false })
    }

    /// Goes on as far as the socket allows; true when the WebSocket is open.
    fn advance(&mut self, index: usize, request: &[u8]) -> Result<bool, ConnectError> {
        self.exchange(index, request)?;
        let failed = |source| ConnectError::Handshake { index, source };
        if let Some(head) = handshake::head_bytes(&self.received).map_err(failed)? {
            handshake::check_response(&self.received[..head]).map_err(failed)?;
            if !Dialect::of(request).is_open(&self.received[head..]) {
                return Ok(false);
            }
            self.received = self.received.split_off(head);
            self.open = true;
        }
        Ok(self.open)
    }

    fn exchange(&mut self, index: usize, request: &[u8]) -> Result<(), ConnectError> {
        let failed = |source| ConnectError::Socket { index, source };
        if let Some(source) = self.stream.take_error().map_err(failed)? {
            return Err(failed(source));
        }
        if !self.requested {
            if self.stream.peer_addr().is_err() {
                return Ok(());
            }
            self.stream.set_nodelay(true).map_err(failed)?;
            // A fresh socket takes a request whole.
            self.stream.write_all(request).map_err(failed)?;
            self.requested = true;
        }
        let mut chunk = [0; 1024];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ConnectError::Closed { index }),
                Ok(read) => self.received.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(failed(error)),
            }
        }
    }
}
