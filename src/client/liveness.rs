//! Whether the server is alive: any byte that it sends is a sign of life, and a silent server is asked by a ping.
//!
//! A tap on the byte stream records that bytes were received, since a whole message may take longer than the silence
//! timeout on a slow network. For the same reason, a full socket that accepts bytes again is a sign of life: the server
//! has acknowledged earlier ones. While the client itself does not read, because the application takes no messages,
//! nothing counts as silence. Knows byte streams and time. Does not know WebSockets.

use std::{
    future::pending,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::sleep,
};

/// The shorter of the two times is checked in this many parts, so that it ends at most a quarter late.
const PARTS: u32 = 4;

/// When a silent server is asked, and when it is given up. The ping interval is the shorter of the two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heartbeat {
    pub(super) ping_interval: Option<Duration>,
    pub(super) silence_timeout: Option<Duration>,
}

/// Whether there was a sign of life since the last check. Relaxed: written and read by the same task.
#[derive(Clone, Debug, Default)]
pub(super) struct Life(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    is_alive: AtomicBool,
    is_held: AtomicBool,
}

impl Life {
    /// The client stops or resumes reading.
    pub(super) fn hold(&self, is_held: bool) {
        self.0.is_held.store(is_held, Relaxed);
        self.0.is_alive.store(true, Relaxed);
    }

    /// Asks for a ping whenever nothing was received for the ping interval, and returns when nothing was received for the
    /// silence timeout. Must be polled after the reading, which a callback may have blocked: bytes that wait in the
    /// kernel are not silence.
    pub(super) async fn silence(&self, heartbeat: Heartbeat, ping_due: &Notify) -> Duration {
        let Some(part) = heartbeat.ping_interval.or(heartbeat.silence_timeout).map(|time| time / PARTS)
        else {
            return pending().await;
        };
        let part = part.max(Duration::from_nanos(1));
        let mut silent_parts: u32 = 0;
        loop {
            sleep(part).await;
            if self.0.is_alive.swap(false, Relaxed) || self.0.is_held.load(Relaxed) {
                silent_parts = 0;
                continue;
            }
            silent_parts = silent_parts.saturating_add(1);
            if let Some(timeout) = heartbeat.silence_timeout
                && part.saturating_mul(silent_parts) >= timeout
            {
                return timeout;
            }
            if heartbeat.ping_interval.is_some() && silent_parts.is_multiple_of(PARTS) {
                ping_due.notify_one();
            }
        }
    }
}

/// A byte stream that records signs of life.
pub(super) struct Tap<T> {
    stream: T,
    life: Life,
    /// A write is waiting for the socket.
    is_full: bool,
}

impl<T> Tap<T> {
    pub(super) fn new(stream: T, life: Life) -> Self {
        Self { stream, life, is_full: false }
    }

    fn note_write(&mut self, written: &Poll<io::Result<usize>>) {
        let was_full = std::mem::replace(&mut self.is_full, written.is_pending());
        if was_full && matches!(written, Poll::Ready(Ok(1..))) {
            self.life.0.is_alive.store(true, Relaxed);
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Tap<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.life.0.is_alive.store(true, Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Tap<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note_write(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note_write(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use futures_util::FutureExt as _;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
        time::Instant,
    };

    use super::*;

    const BEAT: Heartbeat = Heartbeat {
        ping_interval: Some(Duration::from_secs(20)),
        silence_timeout: Some(Duration::from_secs(45)),
    };

    /// The seconds of the pings and of the end, if there was one within 200 s.
    async fn beats(heartbeat: Heartbeat, life: &Life) -> (Vec<u64>, Option<u64>) {
        let (started, ping_due, pings) = (Instant::now(), Notify::new(), RefCell::new(Vec::new()));
        let ended = tokio::select! {
            biased;
            _ = life.silence(heartbeat, &ping_due) => Some(started.elapsed().as_secs()),
            () = async { loop {
                ping_due.notified().await;
                pings.borrow_mut().push(started.elapsed().as_secs());
            } } => None,
            () = sleep(Duration::from_secs(200)) => None,
        };
        (pings.into_inner(), ended)
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_asked_and_given_up_at_its_times() {
        let life = Life::default();
        assert_eq!(beats(BEAT, &life).await, (vec![20, 40], Some(45)));
        let no_pings = Heartbeat { ping_interval: None, ..BEAT };
        assert_eq!(beats(no_pings, &life).await, (vec![], Some(45)));
        let no_timeout = Heartbeat { silence_timeout: None, ..BEAT };
        assert_eq!(beats(no_timeout, &life).await.0, (1..=10).map(|ping| ping * 20).collect::<Vec<u64>>());
        let neither = Heartbeat { ping_interval: None, silence_timeout: None };
        assert_eq!(beats(neither, &life).await, (vec![], None));
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_postpone_both_and_while_the_client_does_not_read_there_is_no_silence() {
        let life = Life::default();
        let (near, mut far) = duplex(16);
        let mut near = Tap::new(near, life.clone());
        let reading = tokio::spawn(async move { while let Ok(1..) = near.read(&mut [0; 16]).await {} });
        tokio::spawn(async move {
            sleep(Duration::from_secs(19)).await;
            far.write_all(b"x").await.unwrap();
            reading.await.unwrap();
        });
        // The part that ends at 20 s had a byte in it.
        assert_eq!(beats(BEAT, &life).await, (vec![40, 60], Some(65)));
        life.hold(true);
        assert_eq!(beats(BEAT, &life).await, (vec![], None));
        life.hold(false);
        assert_eq!(beats(BEAT, &life).await, (vec![25, 45], Some(50)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_stream_that_accepts_bytes_again_is_alive_and_one_with_room_proves_nothing() {
        let life = Life::default();
        let is_alive = || life.0.is_alive.swap(false, Relaxed);
        let (near, mut far) = duplex(4);
        let mut near = Tap::new(near, life.clone());
        near.write_all(b"1234").await.unwrap();
        assert!(!is_alive(), "the stream had room");
        let mut writing = std::pin::pin!(near.write_all(b"5"));
        assert!((&mut writing).now_or_never().is_none());
        assert!(!is_alive(), "nothing was accepted");
        far.read_exact(&mut [0; 1]).await.unwrap();
        writing.await.unwrap();
        assert!(is_alive());
    }
}
