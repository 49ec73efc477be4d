//! The socket of a connection: TCP, TCP with a TLS session, the near end of a bridge, or none at all.
//!
//! Owned by one shard. No call waits; sends small messages at once and leaves little unsent data to the kernel,
//! so that a backlog stays in the outbox, where the policy applies to it. Knows bytes. Does not know frames.

mod bridge;
#[cfg(feature = "tls")]
mod tls;

use std::io;
use std::net::Shutdown;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
#[cfg(all(feature = "io-uring", target_os = "linux"))]
use std::sync::Arc;

use mio::event::Source;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::net::{RecvFlags, SendFlags};

use crate::close_code::CloseCode;
use crate::outq;
#[cfg(feature = "tls")]
use crate::tls_session::TlsSession;
use bridge::Bridge;
pub use bridge::BridgeProgress;
pub(crate) use bridge::InTransit;
#[cfg(feature = "tls")]
use tls::Tls;

/// Unsent bytes above which the kernel refuses more: a client that stops reading costs the kernel some 36 KB
/// instead of 4 MB.
#[cfg(any(target_os = "linux", target_os = "android"))]
const NOTSENT_LOWAT_BYTES: u32 = 16 << 10;

/// No call waits, whatever mode the descriptor is in: setting the mode would be a system call for each adoption (only
/// a TLS session, which writes by itself, needs it). And a write to a closed connection must be an error, not a signal;
/// on systems without that flag, Rust's programs ignore the signal.
#[cfg(not(target_vendor = "apple"))]
const SEND_FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);
#[cfg(target_vendor = "apple")]
const SEND_FLAGS: SendFlags = SendFlags::DONTWAIT;

/// A connected stream socket that an engine can own: TCP, TCP with a TLS session (feature `tls`), or a Unix socket whose
/// other end forwards the bytes (HTTP/2, other TLS). For measurements also a [sink](Self::sink).
#[derive(Debug)]
pub struct Socket(Kind);

/// A socket that a send under way shares with its connection.
#[cfg(all(feature = "io-uring", target_os = "linux"))]
#[derive(Debug)]
pub(crate) enum SharedSocket {
    Tcp(Arc<mio::net::TcpStream>),
    Unix(Arc<mio::net::UnixStream>),
}

/// A stream, shared with the sends under way where there are some.
#[derive(Debug)]
enum Stream<T> {
    Own(T),
    #[cfg(all(feature = "io-uring", target_os = "linux"))]
    Shared(Arc<T>),
}

impl<T> Deref for Stream<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        match self {
            Self::Own(stream) => stream,
            #[cfg(all(feature = "io-uring", target_os = "linux"))]
            Self::Shared(stream) => stream,
        }
    }
}

impl<T: AsFd> AsFd for Stream<T> {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
    }
}

#[cfg(all(feature = "io-uring", target_os = "linux"))]
impl<T> Stream<T> {
    fn into_shared(self) -> Self {
        match self {
            Self::Own(stream) => Self::Shared(Arc::new(stream)),
            shared @ Self::Shared(_) => shared,
        }
    }

    #[inline]
    fn share(&self) -> Option<Arc<T>> {
        match self {
            Self::Own(_) => None,
            Self::Shared(stream) => Some(stream.clone()),
        }
    }

    fn has_shares(&self) -> bool {
        matches!(self, Self::Shared(stream) if Arc::strong_count(stream) > 1)
    }
}

#[derive(Debug)]
enum Kind {
    Tcp(Stream<mio::net::TcpStream>),
    #[cfg(feature = "tls")]
    Tls(Box<Tls>),
    Unix(Stream<mio::net::UnixStream>),
    Bridge(Box<Bridge>),
    Sink,
}

/// What a write has done.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// Bytes that were written.
    pub(crate) taken: usize,
    /// What they have become for the client's kernel: more than that if they were encrypted.
    pub(crate) sent: usize,
}

/// What has left this side: it is with the client's kernel, on its way there, or, on a bridge, was passed on.
#[must_use]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reached {
    /// Frames that are complete with it.
    pub(crate) frames: u64,
    pub(crate) bytes: u64,
}

impl Written {
    pub(crate) fn plain(count: usize) -> Self {
        Self { taken: count, sent: count }
    }
}

impl From<std::net::TcpStream> for Socket {
    fn from(stream: std::net::TcpStream) -> Self {
        Self(Kind::Tcp(Stream::Own(mio::net::TcpStream::from_std(stream))))
    }
}

impl From<std::os::unix::net::UnixStream> for Socket {
    fn from(stream: std::os::unix::net::UnixStream) -> Self {
        Self(Kind::Unix(Stream::Own(mio::net::UnixStream::from_std(stream))))
    }
}

impl Socket {
    /// TCP with a TLS session whose handshake is over, and the encrypted bytes that have not been sent yet. What was
    /// decrypted already must be given to the engine as [`received`](crate::NewConnection::received).
    ///
    /// If no shard takes the connection, its client gets a Close frame (1013).
    #[cfg(feature = "tls")]
    pub fn tls(stream: std::net::TcpStream, session: TlsSession, unsent: Vec<u8>) -> Self {
        Self(Kind::Tls(Box::new(Tls::unbuffered(stream, session, unsent))))
    }

    /// The same with a session of rustls that has buffers of its own, some 4 KB for each connection. What it has
    /// decrypted already must be taken out of it before.
    #[cfg(feature = "tls")]
    pub fn tls_buffered(stream: std::net::TcpStream, session: rustls::ServerConnection) -> Self {
        Self(Kind::Tls(Box::new(Tls::buffered(stream, session))))
    }

    /// The near end of a bridge: a task at the other end forwards the bytes to and from the client. What was written
    /// here counts as written when that task has [passed it on](BridgeProgress::passed_on), and as pending until then.
    /// It counts as delivered only when the client has ended the stream as well.
    pub fn bridge(stream: std::os::unix::net::UnixStream, progress: BridgeProgress) -> Self {
        Self(Kind::Bridge(Box::new(Bridge::new(stream, progress))))
    }

    /// A client that takes everything at once and sends nothing, without a file descriptor: the cost of a
    /// fan-out by itself can be measured with a million of them. It answers no pings, so its connection ends
    /// after `heartbeat_interval` and `pong_timeout`.
    pub fn sink() -> Self {
        Self(Kind::Sink)
    }

    /// Tells the client of a TLS session, which nobody else can tell, why no shard takes its connection.
    pub(crate) fn refuse(&mut self, code: CloseCode, reason: &'static str) {
        #[cfg(feature = "tls")]
        if let Kind::Tls(tls) = &mut self.0 {
            tls.refuse(code, reason);
        }
        #[cfg(not(feature = "tls"))]
        let _ = (code, reason);
    }

    /// Sets the options that the engine relies on.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        match &self.0 {
            Kind::Tcp(stream) => prepare_tcp(stream),
            // The session writes to the stream itself.
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => {
                socket2::SockRef::from(&tls.stream).set_nonblocking(true)?;
                prepare_tcp(&tls.stream)
            }
            Kind::Unix(_) | Kind::Bridge(_) | Kind::Sink => Ok(()),
        }
    }

    pub(crate) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        // Both, once: with edge triggering, WRITABLE costs nothing until a write was refused.
        let interest = Interest::READABLE | Interest::WRITABLE;
        match &mut self.0 {
            Kind::Tcp(stream) => SourceFd(&stream.as_raw_fd()).register(registry, token, interest),
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => {
                tls.adopted();
                tls.stream.register(registry, token, interest)
            }
            Kind::Unix(stream) => SourceFd(&stream.as_raw_fd()).register(registry, token, interest),
            Kind::Bridge(bridge) => bridge.stream.register(registry, token, interest),
            Kind::Sink => Ok(()),
        }
    }

    #[inline]
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Tcp(stream) => receive(stream, buffer),
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => tls.read(buffer),
            Kind::Unix(stream) => receive(stream, buffer),
            Kind::Bridge(bridge) => receive(&bridge.stream, buffer),
            Kind::Sink => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    #[inline]
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<Written> {
        match &mut self.0 {
            Kind::Tcp(stream) => send(stream, bytes).map(Written::plain),
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => tls.write(bytes),
            Kind::Unix(stream) => send(stream, bytes).map(Written::plain),
            Kind::Bridge(bridge) => send(&bridge.stream, bytes).map(Written::plain),
            Kind::Sink => Ok(Written::plain(bytes.len())),
        }
    }

    /// The kernel may have bytes to read: it announces that once, and the next read may be of what a session has kept.
    #[inline]
    pub(crate) fn becomes_readable(&mut self) {
        #[cfg(feature = "tls")]
        if let Kind::Tls(tls) = &mut self.0 {
            tls.becomes_readable();
        }
    }

    /// Whether there may be more to read after a read of `count` bytes into a buffer of `room` bytes.
    #[inline]
    pub(crate) fn has_more(&self, count: usize, room: usize) -> bool {
        match &self.0 {
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => tls.has_more(),
            // Edge-triggered: a short read means that the kernel's buffer is empty.
            _ => count == room,
        }
    }

    /// Whether the kernel has refused bytes that were written, so that nothing more can be written before
    /// [`send_refused`](Self::send_refused).
    #[inline]
    pub(crate) fn has_refused(&self) -> bool {
        match &self.0 {
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => tls.refused_bytes() > 0,
            _ => false,
        }
    }

    /// Sends the bytes that were refused; `WouldBlock` if some are left.
    pub(crate) fn send_refused(&mut self) -> io::Result<()> {
        match &mut self.0 {
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => tls.send_refused(),
            _ => Ok(()),
        }
    }

    /// Notes a write that has completed so many frames; returns what of it has left this side already.
    #[inline]
    pub(crate) fn note_write(&mut self, written: Written, frames: u64, is_control: bool) -> Reached {
        if let Kind::Bridge(bridge) = &mut self.0 {
            bridge.note(written, frames, is_control);
            return Reached::default();
        }
        Reached { frames, bytes: written.sent as u64 }
    }

    /// What has left this side since it was written or since the last call.
    pub(crate) fn take_reached(&mut self) -> Reached {
        match &mut self.0 {
            Kind::Bridge(bridge) => bridge.take_reached(),
            _ => Reached::default(),
        }
    }

    /// Forgets what is in transit, and returns it.
    pub(crate) fn give_up_in_transit(&mut self) -> InTransit {
        match &mut self.0 {
            Kind::Bridge(bridge) => bridge.give_up_in_transit(),
            _ => InTransit::default(),
        }
    }

    /// What is in transit on a bridge, as of the last [`take_reached`](Self::take_reached).
    #[inline]
    pub(crate) fn in_transit(&self) -> InTransit {
        match &self.0 {
            Kind::Bridge(bridge) => bridge.in_transit(),
            _ => InTransit::default(),
        }
    }

    /// Bytes that were [sent](Written::sent) and that the client has not taken; on a bridge, those that were not passed
    /// on. None where the system does not report it.
    pub(crate) fn unacknowledged(&self) -> Option<u32> {
        match &self.0 {
            Kind::Tcp(stream) => outq::unacknowledged(stream),
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => outq::unacknowledged(&tls.stream)
                .map(|bytes| bytes.saturating_add(tls.refused_bytes() as u32)),
            Kind::Unix(stream) => outq::unacknowledged(stream),
            Kind::Bridge(bridge) => Some(bridge.unacknowledged()),
            Kind::Sink => Some(0),
        }
    }

    /// The same socket, in the form that sends can [share](Self::share). Called by the shard, so that its allocator has the
    /// memory.
    #[cfg(all(feature = "io-uring", target_os = "linux"))]
    pub(crate) fn into_shared(self) -> Self {
        Self(match self.0 {
            Kind::Tcp(stream) => Kind::Tcp(stream.into_shared()),
            Kind::Unix(stream) => Kind::Unix(stream.into_shared()),
            other => other,
        })
    }

    /// A share of it, if its bytes go to the kernel as they are.
    #[cfg(all(feature = "io-uring", target_os = "linux"))]
    #[inline]
    pub(crate) fn share(&self) -> Option<SharedSocket> {
        match &self.0 {
            Kind::Tcp(stream) => stream.share().map(SharedSocket::Tcp),
            Kind::Unix(stream) => stream.share().map(SharedSocket::Unix),
            _ => None,
        }
    }

    /// Closes it, also where a send that was never made shares it: the driver of a ring that has failed keeps those.
    pub(crate) fn close(self) {
        #[cfg(all(feature = "io-uring", target_os = "linux"))]
        let _ = match &self.0 {
            Kind::Tcp(stream) if stream.has_shares() => stream.shutdown(Shutdown::Both),
            Kind::Unix(stream) if stream.has_shares() => stream.shutdown(Shutdown::Both),
            _ => Ok(()),
        };
    }

    /// Whether the other end is the client itself.
    pub(crate) fn is_direct(&self) -> bool {
        !matches!(self.0, Kind::Bridge(_))
    }

    /// Ends the stream: nothing more will be written, and the client can read what was. False if that cannot be done
    /// yet, because the kernel has [refused](Self::has_refused) what must be sent before.
    pub(crate) fn finish(&mut self) -> bool {
        // Fails only if the client has disconnected, which the next read reports.
        let _ = match &mut self.0 {
            Kind::Tcp(stream) => stream.shutdown(Shutdown::Write),
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => return tls.finish(),
            Kind::Unix(stream) => stream.shutdown(Shutdown::Write),
            Kind::Bridge(bridge) => bridge.stream.shutdown(Shutdown::Write),
            Kind::Sink => Ok(()),
        };
        true
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
    Ok(rustix::net::send(socket, bytes, SEND_FLAGS)?)
}

#[inline]
fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let (_, count) = rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT)?;
    Ok(count)
}
