//! The wire: the socket of a test's client, which can be made slow or cut.
//!
//! Owned by the client's task. In memory it tells the driver of each read and write, so that no time passes while
//! something is on its way. Knows sockets. Does not know frames.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Sleep, sleep_until};

use super::driver::Driver;

const CHUNK_BYTES: usize = 4096;
/// How often a throttled client reads.
const READS_PER_SECOND: u32 = 50;

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

#[derive(Debug)]
pub(super) struct Wire {
    socket: Socket,
    driver: Option<Driver>,
    pace: Option<Pace>,
    is_cut: bool,
}

/// So many bytes in a second.
#[derive(Debug)]
struct Pace {
    bytes_per_second: u32,
    /// Until when nothing is read.
    pause: Pin<Box<Sleep>>,
}

impl Wire {
    pub(super) fn new(socket: Socket, driver: Option<Driver>) -> Self {
        Self { socket, driver, pace: None, is_cut: false }
    }

    /// Reads at most so many bytes in a second from now on; 0 is no limit.
    pub(super) fn throttle(&mut self, bytes_per_second: u32) {
        let pause = Box::pin(sleep_until(Instant::now()));
        self.pace = (bytes_per_second > 0).then_some(Pace { bytes_per_second, pause });
    }

    /// Neither reads nor writes any more, and does not end.
    pub(super) fn cut(&mut self) {
        self.is_cut = true;
    }

    /// Makes the end of the socket a reset, where there is such a thing.
    pub(super) fn reset_at_end(&self) {
        if let Socket::Tcp(stream) = &self.socket {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO)); // fails if it has ended already
        }
    }

    fn note<T>(&self, polled: Poll<T>) -> Poll<T> {
        if let (Some(driver), true) = (&self.driver, polled.is_ready()) {
            driver.kick();
        }
        polled
    }

    fn poll_read_socket(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }

    fn poll_paced(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
        mut pace: Pace,
    ) -> (Poll<io::Result<()>>, Pace) {
        if pace.pause.as_mut().poll(cx).is_pending() {
            return (Poll::Pending, pace);
        }
        let allowed = (pace.bytes_per_second / READS_PER_SECOND).max(1) as usize;
        let mut chunk = [0; CHUNK_BYTES];
        let length = allowed.min(buffer.remaining()).min(CHUNK_BYTES);
        let mut part = ReadBuf::new(&mut chunk[..length]);
        let polled = self.poll_read_socket(cx, &mut part);
        let read = part.filled();
        if !read.is_empty() {
            buffer.put_slice(read);
            let time = Duration::from_secs(1) * read.len() as u32 / pace.bytes_per_second;
            let begins = pace.pause.deadline().max(Instant::now() - Duration::from_millis(20));
            pace.pause.as_mut().reset(begins + time);
        }
        (polled, pace)
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_cut {
            return Poll::Pending;
        }
        let polled = match self.pace.take() {
            None => self.poll_read_socket(cx, buffer),
            Some(pace) => {
                let (polled, pace) = self.poll_paced(cx, buffer, pace);
                self.pace = Some(pace);
                polled
            }
        };
        self.note(polled)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_cut {
            return Poll::Pending;
        }
        let polled = match &mut self.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        };
        self.note(polled)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // a socket has nothing to flush
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_cut {
            return Poll::Pending;
        }
        let ended = ready!(match &mut self.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        });
        self.note(Poll::Ready(ended))
    }
}
