//! The bridge: a Unix socket pair between a shard and a stream that is not a socket.
//!
//! A shard can own only sockets. HTTP/2 streams, other TLS and other streams that a server may use need tokio, so one
//! task per connection copies bytes in both directions. The task owns the stream and one end of the pair; the shard
//! owns the other end.
//!
//! Towards the client the bridge holds nothing: bytes stay in the pair until the client's stream has taken and flushed
//! them. They are peeked at until then, counted as passed on, and taken out only after that, which wakes the shard. So
//! the shard knows what has not left the bridge yet. The kernel's buffer between the two ends is kept small, or the
//! shard would not notice a client that stops reading. From the client a busy bridge holds at most one chunk.
//! Knows bytes and ends of streams. Does not know frames, HTTP, TLS or hubs.

use std::{
    future::Future,
    io,
    mem::MaybeUninit,
    os::unix,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::net::RecvFlags;
use shardcast_engine::BridgeProgress;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
    time::{Sleep, sleep},
};

/// Size of one read, on the stack, the most that is buffered for a shard whose socket is full, and the most that the
/// client's stream has taken without having flushed it.
const CHUNK_BYTES: usize = 8 * 1024;

/// Send buffer of each end: how much the kernel accepts before a write would block (Linux doubles it for its
/// bookkeeping). The default is about 200 KiB, which no delivery policy could see.
const KERNEL_BUFFER_BYTES: usize = 16 * 1024;

/// Chunks per poll, so that a busy bridge does not starve the thread's other tasks.
const CHUNKS_PER_TURN: usize = 16;

/// How long a client may take to end its side after the shard has ended its own, before it is disconnected.
const LINGER: Duration = Duration::from_secs(10);

/// Connects `client` to a new Unix socket pair and returns the shard's end, non-blocking, and the count of what was
/// passed on to the client. If the system cannot create the pair, returns the error and the client.
///
/// Must be called within a tokio runtime; the copying task runs there until both sides have ended.
pub(crate) fn bridge<C>(client: C) -> Result<(unix::net::UnixStream, BridgeProgress), (io::Error, C)>
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (shard_end, shard) = match ends() {
        Ok(ends) => ends,
        Err(error) => return Err((error, client)),
    };
    let progress = BridgeProgress::default();
    let outbound = Outbound::new(progress.clone());
    tokio::spawn(Bridge { client, shard, inbound: Inbound::new(), outbound, linger: None });
    Ok((shard_end, progress))
}

/// The shard's and the bridge's end of a new socket pair.
fn ends() -> io::Result<(unix::net::UnixStream, UnixStream)> {
    let (shard_end, bridge_end) = unix::net::UnixStream::pair()?;
    for end in [&shard_end, &bridge_end] {
        end.set_nonblocking(true)?;
        SockRef::from(end).set_send_buffer_size(KERNEL_BUFFER_BYTES)?;
    }
    Ok((shard_end, UnixStream::from_std(bridge_end)?))
}

/// The copying task. The two directions are independent, from the end of one stream to the shutdown of the other:
///
/// - When a side stops sending, the other side is shut down for writing once everything before has been copied. A read
///   error counts as the end of the stream, since TLS clients commonly disconnect without a `close_notify`.
/// - If writing to the client fails, the client is lost and the bridge ends.
/// - If writing to the shard fails, the shard has closed its socket. Its last bytes may still be in flight to the
///   client and an early end would destroy them, so the client's further bytes are read and discarded.
struct Bridge<C> {
    client: C,
    shard: UnixStream,
    inbound: Inbound,
    outbound: Outbound,
    /// Runs while the bridge waits for the client; see [`Bridge::poll_linger`].
    linger: Option<Pin<Box<Sleep>>>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Future for Bridge<C> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let bridge = self.get_mut();
        if let Poll::Ready(Err(error)) = bridge.outbound.poll(cx, &bridge.shard, &mut bridge.client) {
            tracing::debug!(%error, "writing to a bridged client failed: its connection is lost");
            return Poll::Ready(());
        }
        if let Poll::Ready(Err(_)) = bridge.inbound.poll(cx, &mut bridge.client, &mut bridge.shard) {
            bridge.inbound.discard();
            // The poll returned an error, so it registered no waker.
            cx.waker().wake_by_ref();
        }
        if bridge.outbound.has_ended() && bridge.inbound.has_ended() {
            return Poll::Ready(());
        }
        bridge.poll_linger(cx)
    }
}

impl<C> Bridge<C> {
    /// Ready when the client has to be disconnected: [`LINGER`] has passed and the shard has closed, so only this task
    /// can notice that the client neither reads nor closes.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.outbound.is_blocked_or_ending() {
            self.linger = None;
            return Poll::Pending;
        }
        loop {
            let linger = self.linger.get_or_insert_with(|| Box::pin(sleep(LINGER)));
            ready!(linger.as_mut().poll(cx));
            if self.shard_has_ended(cx) {
                tracing::debug!("a bridged client was disconnected: it neither reads nor closes");
                return Poll::Ready(());
            }
            self.linger = None;
        }
    }

    /// Whether the shard has ended its side, even if bytes before the end have not been read yet.
    fn shard_has_ended(&self, cx: &mut Context<'_>) -> bool {
        self.outbound.stage != Stage::Copying
            || match pin!(self.shard.ready(Interest::READABLE)).poll(cx) {
                Poll::Ready(Ok(readiness)) => readiness.is_read_closed(),
                Poll::Ready(Err(_)) => true,
                Poll::Pending => false,
            }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Copying,
    /// The reading side has ended; the writing side is being shut down.
    ShuttingDown,
    /// The writing side is closed; the reading side is drained.
    Discarding,
    Ended,
}

/// From the shard to the client: Copying → ShuttingDown → Ended.
struct Outbound {
    stage: Stage,
    progress: BridgeProgress,
    /// Bytes that were peeked at and are still in the pair.
    peeked: usize,
    /// The first of them, which the client's stream has taken and not flushed.
    unflushed: usize,
}

impl Outbound {
    fn new(progress: BridgeProgress) -> Self {
        Self { stage: Stage::Copying, progress, peeked: 0, unflushed: 0 }
    }

    fn has_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// Whether the client's stream does not take what there is, or the shard has ended its side.
    fn is_blocked_or_ending(&self) -> bool {
        self.peeked > 0 || self.stage != Stage::Copying
    }

    /// Ready when the flow has ended, or with the error of a write.
    fn poll<W>(&mut self, cx: &mut Context<'_>, shard: &UnixStream, client: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        for _ in 0..CHUNKS_PER_TURN {
            match self.stage {
                Stage::Copying => ready!(self.poll_copy_chunk(cx, shard, client))?,
                Stage::ShuttingDown => {
                    // An error does not matter: nothing more is written to that side.
                    let _ = ready!(Pin::new(&mut *client).poll_shutdown(cx));
                    self.stage = Stage::Ended;
                }
                Stage::Discarding | Stage::Ended => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_copy_chunk<W>(
        &mut self,
        cx: &mut Context<'_>,
        shard: &UnixStream,
        client: &mut W,
    ) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        let mut scratch = [0; CHUNK_BYTES];
        if self.unflushed == 0 {
            self.peeked = ready!(self.poll_peek(cx, shard, &mut scratch)).unwrap_or(0);
            if self.peeked == 0 {
                self.stage = Stage::ShuttingDown;
                return Poll::Ready(Ok(()));
            }
            while self.unflushed < self.peeked {
                match poll_write(cx, client, &scratch[self.unflushed..self.peeked])? {
                    Poll::Ready(written) => self.unflushed += written,
                    Poll::Pending if self.unflushed == 0 => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
        }
        // A TLS stream may keep encrypted bytes until it is flushed.
        ready!(Pin::new(client).poll_flush(cx))?;
        // Before they are taken out, which tells the shard to look.
        self.progress.passed_on(self.unflushed);
        while self.unflushed > 0 {
            let taken = receive(shard, &mut scratch[..self.unflushed], RecvFlags::empty())?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())); // not while it still holds these bytes
            }
            self.unflushed -= taken;
            self.peeked -= taken;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads the bytes at the front of the pair and leaves them there; returns their number, 0 at the end.
    fn poll_peek(
        &self,
        cx: &mut Context<'_>,
        shard: &UnixStream,
        scratch: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if self.peeked > 0 {
            return Poll::Ready(receive(shard, scratch, RecvFlags::PEEK));
        }
        loop {
            ready!(shard.poll_read_ready(cx))?;
            let mut peeked = Err(io::ErrorKind::WouldBlock.into());
            let _ = shard.try_io(Interest::READABLE, || {
                peeked = receive(shard, scratch, RecvFlags::PEEK);
                match peeked {
                    Ok(count) if count == 0 || count == scratch.len() => Ok(()),
                    // The socket is empty: the runtime reports when more arrives.
                    _ => Err(io::ErrorKind::WouldBlock.into()),
                }
            });
            match peeked {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                peeked => return Poll::Ready(peeked),
            }
        }
    }
}

/// Reads from the pair without waiting; 0 at its end.
fn receive(shard: &UnixStream, buffer: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
    loop {
        match rustix::net::recv(shard, &mut *buffer, flags) {
            Ok((_, count)) => return Ok(count),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn poll_write<W>(cx: &mut Context<'_>, to: &mut W, bytes: &[u8]) -> Poll<io::Result<usize>>
where
    W: AsyncWrite + Unpin,
{
    let written = ready!(Pin::new(to).poll_write(cx, bytes))?;
    if written == 0 {
        return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
    }
    Poll::Ready(Ok(written))
}

/// From the client to the shard: Copying → ShuttingDown → Ended, or Copying → Discarding → Ended.
struct Inbound {
    stage: Stage,
    /// Bytes that were read and that the shard has not taken yet; nearly always empty, without an allocation.
    held: Vec<u8>,
}

impl Inbound {
    fn new() -> Self {
        Self { stage: Stage::Copying, held: Vec::new() }
    }

    fn discard(&mut self) {
        self.stage = Stage::Discarding;
        self.held = Vec::new();
    }

    fn has_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// Ready when the flow has ended, or with the error of a write.
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        for _ in 0..CHUNKS_PER_TURN {
            match self.stage {
                Stage::Copying => {
                    ready!(self.poll_write_held(cx, to))?;
                    ready!(self.poll_copy_chunk(cx, from, to))?;
                }
                Stage::ShuttingDown => {
                    // An error does not matter: nothing more is written to that side.
                    let _ = ready!(Pin::new(&mut *to).poll_shutdown(cx));
                    self.stage = Stage::Ended;
                }
                Stage::Discarding => {
                    let mut scratch = [MaybeUninit::uninit(); CHUNK_BYTES];
                    let mut chunk = ReadBuf::uninit(&mut scratch);
                    let read = ready!(Pin::new(&mut *from).poll_read(cx, &mut chunk));
                    if read.is_err() || chunk.filled().is_empty() {
                        self.stage = Stage::Ended;
                    }
                }
                Stage::Ended => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_copy_chunk<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut scratch = [MaybeUninit::uninit(); CHUNK_BYTES];
        let mut chunk = ReadBuf::uninit(&mut scratch);
        let read = ready!(Pin::new(from).poll_read(cx, &mut chunk));
        let mut bytes = chunk.filled();
        if read.is_err() || bytes.is_empty() {
            self.stage = Stage::ShuttingDown;
            return Poll::Ready(Ok(()));
        }
        while !bytes.is_empty() {
            match poll_write(cx, to, bytes)? {
                Poll::Ready(written) => bytes = &bytes[written..],
                Poll::Pending => {
                    self.held = bytes.to_vec();
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write_held<W>(&mut self, cx: &mut Context<'_>, to: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        while !self.held.is_empty() {
            let written = ready!(poll_write(cx, to, &self.held))?;
            self.held.drain(..written);
        }
        self.held = Vec::new();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Shutdown;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, BufStream, DuplexStream, duplex};

    use super::*;

    /// The client's end of the bridged stream, and the shard's socket, wrapped for tokio because a test has no shard.
    fn bridged(client_buffer_bytes: usize) -> (DuplexStream, UnixStream) {
        let (client, stream) = duplex(client_buffer_bytes);
        let (shard, _) = bridged_stream(stream);
        (client, shard)
    }

    /// The shard's socket of a bridge in front of `stream`, and what the bridge has passed on.
    fn bridged_stream<S>(stream: S) -> (UnixStream, BridgeProgress)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (shard, progress) = bridge(stream).map_err(|(error, _)| error).unwrap();
        (UnixStream::from_std(shard).unwrap(), progress)
    }

    /// Waits until nothing moves any more.
    async fn rests(progress: &BridgeProgress) -> u64 {
        let (mut before, mut quiet) = (progress.bytes(), 0);
        while quiet < 100 {
            tokio::task::yield_now().await;
            let now = progress.bytes();
            quiet = if now == before { quiet + 1 } else { 0 };
            before = now;
        }
        before
    }

    /// Waits until the bridge's task has ended.
    async fn bridge_ends() {
        while tokio::runtime::Handle::current().metrics().num_alive_tasks() > 0 {
            tokio::task::yield_now().await;
        }
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|index| (index * 31 % 251) as u8).collect()
    }

    #[tokio::test]
    async fn megabytes_pass_unchanged_both_ways_at_once() {
        let (client, shard) = bridged(1000);
        let sent = pattern(3_000_000);
        let exchange = |stream: Box<dyn Socket>| {
            let sent = &sent;
            async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                let write = async {
                    writer.write_all(sent).await.unwrap();
                    writer.shutdown().await.unwrap();
                };
                let mut received = Vec::new();
                let ((), read) = tokio::join!(write, reader.read_to_end(&mut received));
                read.unwrap();
                received
            }
        };
        let (at_client, at_shard) = tokio::join!(exchange(Box::new(client)), exchange(Box::new(shard)));
        assert!(at_client == sent && at_shard == sent);
        bridge_ends().await;
    }

    trait Socket: AsyncRead + AsyncWrite + Unpin {}
    impl<T: AsyncRead + AsyncWrite + Unpin> Socket for T {}

    #[tokio::test]
    async fn a_client_that_stops_sending_still_receives() {
        let (mut client, mut shard) = bridged(1000);
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();

        let mut question = Vec::new();
        shard.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");

        shard.write_all(b"answer").await.unwrap();
        drop(shard);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        bridge_ends().await;
    }

    #[tokio::test]
    async fn a_shard_that_stops_sending_still_receives() {
        let (mut client, mut shard) = bridged(1000);
        shard.write_all(b"close").await.unwrap();
        shard.shutdown().await.unwrap();

        let mut close = Vec::new();
        client.read_to_end(&mut close).await.unwrap();
        assert_eq!(close, b"close");

        client.write_all(b"close too").await.unwrap();
        drop(client);
        let mut answer = Vec::new();
        shard.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"close too");
        bridge_ends().await;
    }

    #[tokio::test]
    async fn the_last_words_of_a_closed_socket_arrive_although_the_client_keeps_talking() {
        let (mut client, mut shard) = bridged(100);
        // More than the client's stream buffers, so that most of it is still in the bridge when the shard has closed.
        let last_words = pattern(10_000);
        shard.write_all(&last_words).await.unwrap();
        drop(shard);
        let (mut reader, mut writer) = tokio::io::split(&mut client);
        let mut received = Vec::new();
        let talk = async {
            for _ in 0..100 {
                writer.write_all(&[0; 50]).await.unwrap();
            }
        };
        let ((), read) = tokio::join!(talk, reader.read_to_end(&mut received));
        read.unwrap();
        assert!(received == last_words);
        drop(client);
        bridge_ends().await;
    }

    #[tokio::test]
    async fn a_client_that_vanishes_is_an_end_of_stream_for_the_shard() {
        let (client, mut shard) = bridged(1000);
        drop(client);
        assert_eq!(shard.read(&mut [0; 8]).await.unwrap(), 0);
        let _ = shard.write_all(b"into the void").await;
        bridge_ends().await;
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_the_shard_up_after_little_memory() {
        let (_client, shard) = bridged(1000);
        let mut taken = 0;
        let mut turns_without_progress = 0;
        while turns_without_progress < 100 {
            match shard.try_write(&[0; 512]) {
                Ok(bytes) => (taken, turns_without_progress) = (taken + bytes, 0),
                Err(_) => turns_without_progress += 1,
            }
            tokio::task::yield_now().await;
        }
        assert!(taken >= CHUNK_BYTES, "{taken}");
        assert!(taken <= 3 * KERNEL_BUFFER_BYTES, "{taken}");
    }

    #[tokio::test]
    async fn only_what_the_client_s_stream_has_taken_is_passed_on() {
        let (mut client, stream) = duplex(1000);
        let (mut shard, progress) = bridged_stream(stream);
        shard.write_all(&pattern(5000)).await.unwrap();
        assert_eq!(rests(&progress).await, 1000);
        client.read_exact(&mut [0; 700]).await.unwrap();
        assert_eq!(rests(&progress).await, 1700);
        client.read_exact(&mut [0; 4300]).await.unwrap();
        assert_eq!(rests(&progress).await, 5000);
    }

    #[tokio::test]
    async fn what_the_client_s_stream_has_not_flushed_is_not_passed_on() {
        let (mut client, stream) = duplex(100);
        let (mut shard, progress) = bridged_stream(BufStream::new(stream));
        shard.write_all(&pattern(2000)).await.unwrap();
        client.read_exact(&mut [0; 1000]).await.unwrap();
        assert_eq!(rests(&progress).await, 0, "the rest is in the stream's buffer");
        client.read_exact(&mut [0; 1000]).await.unwrap();
        assert_eq!(rests(&progress).await, 2000);
    }

    #[tokio::test]
    async fn a_shard_is_told_that_the_client_has_not_got_everything() {
        let (client, stream) = duplex(1000);
        let (mut shard, progress) = bridged_stream(stream);
        shard.write_all(&pattern(5000)).await.unwrap();
        rests(&progress).await;
        drop(client);
        bridge_ends().await;
        let told = shard.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!((told.kind(), progress.bytes()), (io::ErrorKind::ConnectionReset, 1000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_neither_reads_nor_hangs_up_is_cut_off_once_the_shard_has_closed() {
        let (_client, mut shard) = bridged(100);
        shard.write_all(&[0; 10_000]).await.unwrap();
        let started = tokio::time::Instant::now();
        sleep(LINGER * 5).await;
        assert_eq!(
            tokio::runtime::Handle::current().metrics().num_alive_tasks(),
            1,
            "the shard is still open"
        );
        drop(shard);
        while tokio::runtime::Handle::current().metrics().num_alive_tasks() > 0 {
            sleep(Duration::from_millis(100)).await;
        }
        assert!(started.elapsed() <= LINGER * 7, "{:?}", started.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_answer_a_closed_shard_is_cut_off() {
        let (mut client, shard) = bridged(100);
        let shard = shard.into_std().unwrap();
        shard.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
        let started = tokio::time::Instant::now();
        while client.write_all(b"x").await.is_ok() {
            sleep(Duration::from_millis(100)).await;
        }
        assert!(started.elapsed() <= LINGER * 2, "{:?}", started.elapsed());
    }

    #[tokio::test]
    async fn an_idle_flow_holds_no_buffer() {
        let (mut client, mut stream) = duplex(64);
        let (mut peer, mut shard) = UnixStream::pair().unwrap();
        let mut inbound = Inbound::new();
        let mut poll = std::future::poll_fn(|cx| {
            let _ = inbound.poll(cx, &mut shard, &mut stream);
            Poll::Ready(inbound.held.capacity())
        });
        peer.write_all(&[7; 200]).await.unwrap();
        // The runtime learns of the socket's readiness at some later time.
        while (&mut poll).await == 0 {
            tokio::task::yield_now().await;
        }
        let mut received = vec![0; 200];
        let read = client.read_exact(&mut received);
        let ((), read) = tokio::join!(
            async {
                while (&mut poll).await > 0 {
                    tokio::task::yield_now().await;
                }
            },
            read
        );
        read.unwrap();
        assert_eq!(received, [7; 200]);
    }
}
