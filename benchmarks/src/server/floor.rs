//! The floor: a server that does nothing but fan out.
//!
//! One thread, one epoll, one send(2) for each delivery, over TLS one record and one write(2); nothing is coalesced, and nothing is queued while the socket
//! accepts it. Others are measured relative to this, so it must stay simple: a server that coalesces should cost less.
//! It is still correct: what a socket does not accept at once is kept for it. Has no policies or timers.

use std::{
    collections::HashMap,
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use mio::{Events, Interest, Poll, Token, event::Event, net::TcpListener};
use rustls::ServerConfig;

use super::floor_socket::Socket;
use crate::{
    cpu::{self, PinError},
    frame::{self, FrameError, Opcode},
    handshake::{self, HandshakeError},
    nonblocking,
    tls::{self, TlsError},
};

const LISTENER: Token = Token(usize::MAX);
const SCRATCH_BYTES: usize = 64 * 1024;
/// A client that lags by more has stopped reading.
const BACKLOG_BYTES_MAX: usize = 8 << 20;

/// The command line of the floor.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    port: u16,
    /// The core to run on.
    #[arg(long)]
    cpu: Option<usize>,
    /// Serve over TLS, with the certificate and the private key in this PEM file.
    #[arg(long)]
    tls: Option<PathBuf>,
}

/// Why the floor stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FloorError {
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the floor's loop failed")]
    Io(#[from] io::Error),
}

/// Why one connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the client disconnected")]
    Disconnected,
    #[error("the client does not read")]
    Stalled,
    #[error("a frame from the client is not masked")]
    NotMasked,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Route {
    Handshake,
    /// To the members of this group.
    FanOut(usize),
    Echo,
}

#[derive(Debug)]
struct Connection {
    socket: Socket,
    route: Route,
    /// The beginning of an incomplete frame or head; nothing is allocated while it is empty.
    partial: Vec<u8>,
    /// What the socket did not accept.
    backlog: Vec<u8>,
}

/// Who gets a message: `/ws` is one group, and each `/group/NAME` another.
#[derive(Debug, Default)]
struct Groups {
    by_path: HashMap<String, usize>,
    /// Indexes of connections, by group.
    members: Vec<Vec<usize>>,
}

#[derive(Debug)]
struct Floor {
    poll: Poll,
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    /// The index is the token.
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    groups: Groups,
    scratch: Vec<u8>,
    outgoing: Vec<u8>,
}

/// Serves until it is killed.
pub(crate) fn run(options: &Options) -> Result<(), FloorError> {
    cpu::pin(options.cpu)?;
    let mut listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, options.port)))?;
    let tls = options.tls.as_deref().map(tls::server_config).transpose()?;
    let poll = Poll::new()?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut floor = Floor {
        poll,
        listener,
        tls,
        connections: Vec::new(),
        free: Vec::new(),
        groups: Groups::default(),
        scratch: vec![0; SCRATCH_BYTES],
        outgoing: Vec::new(),
    };
    println!("{}", super::READY);
    floor.serve()
}

impl Floor {
    fn serve(&mut self) -> Result<(), FloorError> {
        let mut events = Events::with_capacity(1024);
        loop {
            nonblocking::poll(&mut self.poll, &mut events, None)?;
            for event in &events {
                match event.token() {
                    LISTENER => self.accept()?,
                    Token(index) => {
                        if self.on_event(index, event).is_err() {
                            self.remove(index);
                        }
                    }
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            stream.set_nodelay(true)?;
            let index = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, Token(index), interest)?;
            let socket = Socket::new(stream, self.tls.as_ref())?;
            let (partial, backlog) = (Vec::new(), Vec::new());
            self.connections[index] = Some(Connection { socket, route: Route::Handshake, partial, backlog });
        }
    }

    fn remove(&mut self, index: usize) {
        if let Some(connection) = self.connections[index].take() {
            if let Route::FanOut(group) = connection.route {
                self.groups.members[group].retain(|member| *member != index);
            }
            self.free.push(index);
        }
    }

    fn on_event(&mut self, index: usize, event: &Event) -> Result<(), Ended> {
        let Some(connection) = &mut self.connections[index] else { return Ok(()) };
        if event.is_writable() {
            connection.drain()?;
        }
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            self.read(index)?;
        }
        Ok(())
    }

    /// Reads until the socket is empty, which a short read shows without another system call.
    fn read(&mut self, index: usize) -> Result<(), Ended> {
        // Taken out so that the frames in it can be borrowed while the connections are written to.
        let mut scratch = std::mem::take(&mut self.scratch);
        let outcome = self.read_into(index, &mut scratch);
        self.scratch = scratch;
        outcome
    }

    fn read_into(&mut self, index: usize, scratch: &mut Vec<u8>) -> Result<(), Ended> {
        loop {
            let Some(connection) = &mut self.connections[index] else { return Ok(()) };
            let kept = connection.partial.len();
            if scratch.len() < kept + SCRATCH_BYTES {
                scratch.resize(kept + SCRATCH_BYTES, 0);
            }
            let read = match nonblocking::read(&mut connection.socket, &mut scratch[kept..])? {
                Some(0) => return Err(Ended::Disconnected),
                Some(read) => read,
                None => return Ok(()),
            };
            scratch[..kept].copy_from_slice(&std::mem::take(&mut connection.partial));
            let drained = kept + read < scratch.len();
            let filled = &mut scratch[..kept + read];
            let handled = self.handle_frames(index, filled)?;
            if handled < filled.len()
                && let Some(connection) = &mut self.connections[index]
            {
                connection.partial = filled[handled..].to_vec();
            }
            if drained {
                return Ok(());
            }
        }
    }

    /// Handles every whole frame in `bytes`; returns how many bytes they have.
    fn handle_frames(&mut self, index: usize, bytes: &mut [u8]) -> Result<usize, Ended> {
        let mut handled = 0;
        if let Some(connection) = &mut self.connections[index]
            && connection.route == Route::Handshake
        {
            let Some(head) = handshake::head_bytes(bytes)? else { return Ok(0) };
            let request = handshake::parse_request(&bytes[..head])?;
            connection.route = match request.path.starts_with("/echo") {
                true => Route::Echo,
                false => Route::FanOut(self.groups.join(request.path, index)),
            };
            connection.send(&handshake::response(&request.accept))?;
            handled = head;
        }
        while let Some(frame) = frame::parse(&bytes[handled..])? {
            let mask = frame.mask.ok_or(Ended::NotMasked)?;
            let end = handled + frame.payload.end;
            let payload = &mut bytes[handled + frame.payload.start..end];
            handled = end;
            frame::apply_mask(mask, payload);
            self.outgoing.clear();
            match frame.opcode {
                Opcode::Text | Opcode::Binary => {
                    frame::write(&mut self.outgoing, frame.opcode, None, payload);
                    self.deliver(index)?;
                }
                Opcode::Ping => {
                    frame::write(&mut self.outgoing, Opcode::Pong, None, payload);
                    self.answer(index)?;
                }
                Opcode::Pong => {}
                Opcode::Close => {
                    frame::write(&mut self.outgoing, Opcode::Close, None, payload);
                    self.answer(index)?;
                    return Err(Ended::Disconnected);
                }
            }
        }
        Ok(handled)
    }

    fn deliver(&mut self, from: usize) -> Result<(), Ended> {
        match self.connections[from].as_ref().map(|sender| sender.route) {
            Some(Route::FanOut(group)) => {
                for &index in &self.groups.members[group] {
                    if let Some(connection) = &mut self.connections[index] {
                        // A failure concerns only this receiver: its next event removes it.
                        let _ = connection.send(&self.outgoing);
                    }
                }
                Ok(())
            }
            _ => self.answer(from),
        }
    }

    fn answer(&mut self, index: usize) -> Result<(), Ended> {
        match &mut self.connections[index] {
            Some(connection) => connection.send(&self.outgoing),
            None => Ok(()),
        }
    }
}

impl Groups {
    /// Adds a connection to the group of a path; returns the group.
    fn join(&mut self, path: String, index: usize) -> usize {
        let group = *self.by_path.entry(path).or_insert(self.members.len());
        if group == self.members.len() {
            self.members.push(Vec::new());
        }
        self.members[group].push(index);
        group
    }
}

impl Connection {
    fn send(&mut self, bytes: &[u8]) -> Result<(), Ended> {
        if !self.backlog.is_empty() {
            if self.backlog.len() + bytes.len() > BACKLOG_BYTES_MAX {
                return Err(Ended::Stalled);
            }
            self.backlog.extend_from_slice(bytes);
            return Ok(());
        }
        let sent = match self.socket.write(bytes) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error.into()),
        };
        self.backlog.extend_from_slice(&bytes[sent..]);
        Ok(())
    }

    fn drain(&mut self) -> Result<(), Ended> {
        self.socket.flush()?;
        let backlog = std::mem::take(&mut self.backlog);
        if backlog.is_empty() { Ok(()) } else { self.send(&backlog) }
    }
}
