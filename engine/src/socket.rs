//! The socket of a connection: TCP, the near end of a bridge, or none at all.
//!
//! Owned by one shard. Non-blocking; sends small messages at once and leaves little unsent data to the kernel,
//! so that a backlog stays in the outbox, where the policy applies to it. Knows bytes. Does not know frames.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;

use mio::event::Source;
use mio::{Interest, Registry, Token};
use rustix::net::{RecvFlags, SendFlags};

use crate::outq;

/// Unsent bytes above which the kernel refuses more: a client that stops reading costs the kernel some 36 KB
/// instead of 4 MB.
#[cfg(any(target_os = "linux", target_os = "android"))]
const NOTSENT_LOWAT_BYTES: u32 = 16 << 10;

/// A write to a closed connection must be an error, not a signal. On systems without this flag, Rust's
/// programs ignore the signal.
#[cfg(not(target_vendor = "apple"))]
const NO_SIGNAL: SendFlags = SendFlags::NOSIGNAL;
#[cfg(target_vendor = "apple")]
const NO_SIGNAL: SendFlags = SendFlags::empty();

/// A connected stream socket that an engine can own: TCP, or a Unix socket whose other end forwards the bytes
/// (TLS, HTTP/2). For measurements also a [sink](Self::sink).
#[derive(Debug)]
pub struct Socket(Kind);

#[derive(Debug)]
enum Kind {
    Tcp(mio::net::TcpStream),
    Unix(mio::net::UnixStream),
    /// The other end is a task that forwards the bytes.
    Bridge(mio::net::UnixStream),
    Sink,
}

impl From<std::net::TcpStream> for Socket {
    fn from(stream: std::net::TcpStream) -> Self {
        Self(Kind::Tcp(mio::net::TcpStream::from_std(stream)))
    }
}

impl From<std::os::unix::net::UnixStream> for Socket {
    fn from(stream: std::os::unix::net::UnixStream) -> Self {
        Self(Kind::Unix(mio::net::UnixStream::from_std(stream)))
    }
}

impl Socket {
    /// The near end of a bridge: a task at the other end forwards the bytes to and from the client. What was
    /// written here counts as delivered only when the other end has ended the stream.
    pub fn bridge(stream: std::os::unix::net::UnixStream) -> Self {
        Self(Kind::Bridge(mio::net::UnixStream::from_std(stream)))
    }

    /// A client that takes everything at once and sends nothing, without a file descriptor: the cost of a
    /// fan-out by itself can be measured with a million of them. It answers no pings, so its connection ends
    /// after `heartbeat_interval` and `pong_timeout`.
    pub fn sink() -> Self {
        Self(Kind::Sink)
    }

    /// Sets the options that the engine relies on.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        match &self.0 {
            Kind::Tcp(stream) => {
                socket2::SockRef::from(stream).set_nonblocking(true)?;
                prepare_tcp(stream)
            }
            Kind::Unix(stream) | Kind::Bridge(stream) => socket2::SockRef::from(stream).set_nonblocking(true),
            Kind::Sink => Ok(()),
        }
    }

    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        // Both, once: with edge triggering, WRITABLE costs nothing until a write was refused.
        let interest = Interest::READABLE | Interest::WRITABLE;
        match &mut self.0 {
            Kind::Tcp(stream) => stream.register(registry, token, interest),
            Kind::Unix(stream) | Kind::Bridge(stream) => stream.register(registry, token, interest),
            Kind::Sink => Ok(()),
        }
    }

    #[inline]
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Tcp(stream) => receive(stream, buffer),
            Kind::Unix(stream) | Kind::Bridge(stream) => receive(stream, buffer),
            Kind::Sink => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    #[inline]
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Tcp(stream) => send(stream, bytes),
            Kind::Unix(stream) | Kind::Bridge(stream) => send(stream, bytes),
            Kind::Sink => Ok(bytes.len()),
        }
    }

    /// Bytes passed to the kernel that the client has not taken. None where the system does not report it.
    pub(crate) fn unacknowledged(&self) -> Option<u32> {
        match &self.0 {
            Kind::Tcp(stream) => outq::unacknowledged(stream),
            Kind::Unix(stream) | Kind::Bridge(stream) => outq::unacknowledged(stream),
            Kind::Sink => Some(0),
        }
    }

    /// Whether the other end is the client itself.
    pub(crate) fn is_direct(&self) -> bool {
        !matches!(self.0, Kind::Bridge(_))
    }

    /// Ends the stream: nothing more will be written, and the client can read what was.
    pub(crate) fn finish(&self) {
        // Fails only if the client has disconnected, which the next read reports.
        let _ = match &self.0 {
            Kind::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Kind::Unix(stream) | Kind::Bridge(stream) => stream.shutdown(Shutdown::Write),
            Kind::Sink => Ok(()),
        };
    }
}

/// Sets the options of a TCP socket that an engine relies on: small messages are sent at once
/// (`TCP_NODELAY`), and the kernel takes no more than 16 KiB that it cannot send yet (`TCP_NOTSENT_LOWAT`, on
/// Linux), so that a client that stops reading is noticed. An engine does this for sockets that it owns. For
/// a socket inside another stream, such as TLS, the code that accepts it must do it.
///
/// # Errors
/// The system's error, for instance for a descriptor that is not a TCP socket.
pub fn prepare_tcp(socket: impl AsFd) -> io::Result<()> {
    let socket = socket2::SockRef::from(&socket);
    socket.set_tcp_nodelay(true)?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_notsent_lowat(NOTSENT_LOWAT_BYTES)?;
    Ok(())
}

/// Not by the standard library: libc prepares each call for the cancellation of its thread, which never
/// happens here, at a cost that is visible beside a send.
#[inline]
fn send(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    Ok(rustix::net::send(socket, bytes, NO_SIGNAL)?)
}

#[inline]
fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let (_, count) = rustix::net::recv(socket, buffer, RecvFlags::empty())?;
    Ok(count)
}
