//! One connection, from the end of the handshake until the socket is closed.
//!
//! Reads and writes concurrently within the client's task, hands on the messages, decides how the connection ended, and
//! sends the server a Close if the client ended it. Every wait after the end has a timeout. Neither half can starve the
//! other, or the timeouts, however much there is to read or to write. A message leaves the send queue only when the
//! socket's own buffer can accept it. Knows codecs, callbacks and tungstenite. Does not know the handle, or whether
//! another connection follows.

use std::{
    future::{pending, poll_fn},
    panic::AssertUnwindSafe,
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use futures_util::{
    FutureExt, Sink, SinkExt, Stream, StreamExt,
    stream::{SplitSink, SplitStream},
};
use shardcast_engine::MessageKind;
use tokio::{
    io::AsyncReadExt,
    sync::Notify,
    task::{unconstrained, yield_now},
    time::{sleep, timeout},
};
use tokio_tungstenite::tungstenite::{
    self, Bytes, Message, Utf8Bytes,
    error::{CapacityError, ProtocolError},
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use super::{
    builder::Config,
    core::Core,
    error::ClientClose,
    liveness::Life,
    queue::Queue,
    transport::{Opened, Socket},
};
use crate::codec::{CodecError, Decode};

/// The code for a Close frame that has none (RFC 6455, section 7.1.5).
const NO_CODE: u16 = 1005;

/// Messages that one half reads or writes before it yields to the other.
const MESSAGES_PER_TURN: u32 = 32;

/// How a connection ended.
struct Ending {
    close: ClientClose,
    /// The Close frame to send, if the client ends the connection.
    close_frame: Option<(CloseCode, Utf8Bytes)>,
}

impl From<ClientClose> for Ending {
    fn from(close: ClientClose) -> Self {
        Self { close, close_frame: None }
    }
}

impl Ending {
    /// Reading failed. tungstenite reports an error of the server, but does not send a Close for it.
    fn failed(error: tungstenite::Error) -> Self {
        let (close_code, cause) = match error {
            tungstenite::Error::Capacity(CapacityError::MessageTooLong { size, max_size }) => {
                return Self {
                    close: ClientClose::TooLong { bytes: size, bytes_max: max_size },
                    close_frame: Some((CloseCode::Size, format!("message over {max_size} bytes").into())),
                };
            }
            tungstenite::Error::Utf8(_) => (CloseCode::Invalid, error),
            tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
                return ClientClose::lost(error).into();
            }
            tungstenite::Error::Protocol(_) => (CloseCode::Protocol, error),
            error => return ClientClose::lost(error).into(),
        };
        let close = ClientClose::ProtocolViolation(std::sync::Arc::new(cause));
        Self { close, close_frame: Some((close_code, Utf8Bytes::default())) }
    }

    fn panicked() -> Self {
        Self {
            close: ClientClose::CallbackPanicked,
            close_frame: Some((CloseCode::Error, Utf8Bytes::default())),
        }
    }
}

/// A connection that has ended, with its socket, on which a Close may still have to be sent.
pub(super) struct Ended {
    pub(super) close: ClientClose,
    close_frame: Option<(CloseCode, Utf8Bytes)>,
    is_close_sent: bool,
    sink: SplitSink<Socket, Message>,
    stream: SplitStream<Socket>,
}

impl Ended {
    /// Sends the Close frame that the end requires.
    pub(super) async fn send_close(&mut self, config: &Config) {
        if let Some((code, reason)) = self.close_frame.take() {
            self.is_close_sent = true;
            // If nothing is received, sending may not work either, and the application must not wait for it.
            let is_silent = matches!(self.close, ClientClose::Silent { .. });
            let within = if is_silent { Duration::ZERO } else { config.disconnect_timeout };
            let _ = timeout(within, self.sink.send(Message::Close(Some(CloseFrame { code, reason })))).await;
        } else if let ClientClose::ByServer { .. } = self.close {
            // tungstenite has queued our Close in answer; a flush sends it.
            let _ = timeout(config.disconnect_timeout, self.sink.flush()).await;
        }
    }

    /// Waits, where that matters, for the server to close the socket, and closes it.
    pub(super) async fn hang_up(mut self, config: &Config) {
        let hang_up = async {
            match &self.close {
                // RFC 6455 requires the server to close the TCP connection first. Only this task waits for that.
                ClientClose::ByClient | ClientClose::ByServer { .. } => {
                    while let Some(Ok(_)) = self.stream.next().await {}
                }
                _ if self.is_close_sent && !matches!(self.close, ClientClose::Silent { .. }) => {
                    // Closing a socket with unread bytes resets the connection and destroys our Close in flight. After
                    // an error tungstenite reads no more, so the rest is read from the socket itself.
                    let Ok(mut socket) = self.sink.reunite(self.stream) else { return };
                    let mut rest = [0; 4096];
                    while let Ok(1..) = socket.get_mut().read(&mut rest).await {}
                }
                _ => {}
            }
        };
        let _ = timeout(config.disconnect_timeout, hang_up).await;
    }
}

/// Reads and writes until the connection has ended.
pub(super) async fn run<R, C>(opened: Opened, core: &Core<R>) -> Ended
where
    R: Send + 'static,
    C: Decode<R>,
{
    let Opened { socket, life, .. } = opened;
    let (mut sink, mut stream) = socket.split();
    let talk = AssertUnwindSafe(talk::<R, C>(&mut sink, &mut stream, core, &life)).catch_unwind();
    let Ending { close, close_frame } = talk.await.unwrap_or_else(|_| Ending::panicked());
    Ended { close, close_frame, is_close_sent: false, sink, stream }
}

/// Reads and writes concurrently until the server has sent a Close, or can send none any more.
///
/// The branches are ordered by how much they reveal: what was read takes precedence over a failed write or a timeout.
/// This starves no branch, because each half yields after [`MESSAGES_PER_TURN`]. Only reading is subject to tokio's
/// cooperative budget: a long message can use up the whole budget in every turn, and the other branches would then be
/// pending although they are ready.
async fn talk<R, C>(
    sink: &mut (impl Sink<Message, Error = tungstenite::Error> + Unpin),
    stream: &mut (impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin),
    core: &Core<R>,
    life: &Life,
) -> Ending
where
    R: Send + 'static,
    C: Decode<R>,
{
    let first = core.callbacks.open.call(()).unwrap_or_default();
    let first = first.into_iter().filter_map(|encoded| {
        let report = |error: CodecError| {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, "a message of `on_open` was not sent: it cannot be encoded");
        };
        encoded.map_err(report).ok()
    });
    let (close_sent, ping_due) = (AtomicBool::new(false), Notify::new());
    let disconnect_timeout = core.config.disconnect_timeout;
    let mut reading = pin!(read::<R, C>(stream, core, life, &close_sent));
    let mut writing = pin!(unconstrained(write(sink, first.collect(), &core.queue, &ping_due, &close_sent)));
    let mut too_late = pin!(unconstrained(async {
        core.queue.closed().await;
        sleep(disconnect_timeout).await;
    }));
    let silence = pin!(unconstrained(life.silence(core.config.heartbeat, &ping_due)));
    tokio::select! {
        biased;
        ending = &mut reading => ending,
        error = &mut writing => tokio::select! {
            biased;
            // What the server sent before it disconnected is a better reason than the failed write.
            ending = reading => match ending.close {
                ClientClose::Lost(_) => ClientClose::lost(error).into(),
                _ => ending,
            },
            () = too_late => ClientClose::Unanswered.into(),
            () = unconstrained(sleep(disconnect_timeout)) => ClientClose::lost(error).into(),
        },
        () = &mut too_late => ClientClose::Unanswered.into(),
        timeout = silence => Ending {
            close: ClientClose::Silent { timeout },
            close_frame: Some((CloseCode::Error, "nothing was received for the silence timeout".into())),
        },
    }
}

/// Hands on each message until the server closes or the connection is lost.
async fn read<R, C>(
    stream: &mut (impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin),
    core: &Core<R>,
    life: &Life,
    close_sent: &AtomicBool,
) -> Ending
where
    C: Decode<R>,
{
    let mut read_in_turn = 0;
    let error = loop {
        if read_in_turn == MESSAGES_PER_TURN {
            read_in_turn = 0;
            yield_now().await;
        }
        read_in_turn += 1;
        match stream.next().await {
            Some(Ok(Message::Text(text))) => {
                deliver::<R, C>(core, life, MessageKind::Text, text.as_bytes()).await;
            }
            Some(Ok(Message::Binary(bytes))) => {
                deliver::<R, C>(core, life, MessageKind::Binary, &bytes).await;
            }
            // Relaxed: written and read by the same task.
            Some(Ok(Message::Close(_))) if close_sent.load(Ordering::Relaxed) => {
                return ClientClose::ByClient.into();
            }
            Some(Ok(Message::Close(frame))) => {
                let (code, reason) = frame
                    .map_or((NO_CODE, String::new()), |frame| (frame.code.into(), frame.reason.to_string()));
                return ClientClose::ByServer { code, reason }.into();
            }
            // tungstenite answers pings itself, at the next read.
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => break tungstenite::Error::ConnectionClosed,
        }
    };
    if close_sent.load(Ordering::Relaxed) { ClientClose::Unanswered.into() } else { Ending::failed(error) }
}

/// To the callback, if there is one, and to the inbox otherwise, which may have to be waited for.
async fn deliver<R, C: Decode<R>>(core: &Core<R>, life: &Life, kind: MessageKind, payload: &[u8]) {
    let item = match C::decode(kind, payload) {
        Ok(message) => match core.callbacks.message.call(message) {
            Ok(()) => return,
            Err(message) => Ok(message),
        },
        Err(error) => match core.callbacks.error.call(error) {
            Ok(()) => return,
            Err(error) if core.callbacks.message.is_set() => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a message was discarded: it cannot be decoded"
                );
                return;
            }
            Err(error) => Err(error),
        },
    };
    let Err(item) = core.inbox.try_push(item, payload.len()) else { return };
    life.hold(true);
    tokio::select! {
        biased;
        () = core.inbox.push(item, payload.len()) => {}
        // The server's answer to the Close comes after all messages.
        () = core.queue.closed() => tracing::debug!("a message was discarded: the client disconnects, and its inbox is full"),
    }
    life.hold(false);
}

/// Writes the messages of `on_open`, then queued messages and pings, and, once the queue has been closed, a Close. Returns
/// only with an error: after the Close the reading half determines how the connection ended.
async fn write(
    sink: &mut (impl Sink<Message, Error = tungstenite::Error> + Unpin),
    first: Vec<Message>,
    queue: &Queue,
    ping_due: &Notify,
    close_sent: &AtomicBool,
) -> tungstenite::Error {
    for message in first {
        if let Err(error) = sink.feed(message).await {
            return error;
        }
    }
    loop {
        // At first for those of `on_open`.
        if let Err(error) = sink.flush().await {
            return error;
        }
        let has_message = tokio::select! {
            biased;
            // First: the queue may never be empty.
            () = ping_due.notified() => match sink.send(Message::Ping(Bytes::new())).await {
                Ok(()) => continue,
                Err(error) => return error,
            },
            has_message = queue.has_message() => has_message,
        };
        if !has_message {
            break;
        }
        match write_queued(sink, queue).await {
            Ok(MESSAGES_PER_TURN) => yield_now().await,
            Ok(_) => {}
            Err(error) => return error,
        }
    }
    close_sent.store(true, Ordering::Relaxed);
    let close_frame = CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() };
    match sink.send(Message::Close(Some(close_frame))).await {
        Ok(()) => pending().await,
        Err(error) => error,
    }
}

/// Feeds queued messages to the sink, which batches them into the next flush; their number.
async fn write_queued(
    sink: &mut (impl Sink<Message, Error = tungstenite::Error> + Unpin),
    queue: &Queue,
) -> Result<u32, tungstenite::Error> {
    for written in 0..MESSAGES_PER_TURN {
        // Before it leaves the queue, so that a message for which the socket has no room is sent on the next connection.
        poll_fn(|context| sink.poll_ready_unpin(context)).await?;
        let Some(message) = queue.pop() else { return Ok(written) };
        sink.start_send_unpin(message)?;
    }
    Ok(MESSAGES_PER_TURN)
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        pin::Pin,
        sync::Arc,
        task::{Context, Poll},
        time::Instant,
    };

    use futures_util::{sink, stream};

    use super::*;
    use crate::codec::RawCodec;

    /// More messages than any turn may read.
    const MANY: u32 = 100_000;
    const TEST_TIMEOUT: Duration = Duration::from_secs(60);

    /// A stream that always has another message, which consumes the budget of `reads` socket reads, until `is_over`.
    fn flood(
        reads: u32,
        mut is_over: impl FnMut() -> bool,
    ) -> impl Stream<Item = Result<Message, tungstenite::Error>> {
        Box::pin(stream::unfold((), move |()| {
            let is_over = is_over();
            async move {
                for _ in 0..reads {
                    tokio::task::consume_budget().await;
                }
                (!is_over).then(|| (Ok(Message::text("flood")), ()))
            }
        }))
    }

    /// What a client has whose callback ignores the messages.
    fn core() -> Arc<Core<String>> {
        let mut config = Config::new("ws://localhost/".into());
        config.disconnect_timeout = Duration::from_millis(1);
        let (core, _) = Core::new(config);
        core.callbacks.message.set(drop);
        core.queue.open();
        core
    }

    fn send(core: &Core<String>) {
        let _ = core.queue.send::<String, RawCodec>("out".into());
    }

    async fn talk_with(
        sink: &mut (impl Sink<Message, Error = tungstenite::Error> + Unpin),
        mut stream: impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
        core: &Core<String>,
    ) -> ClientClose {
        talk::<String, RawCodec>(sink, &mut stream, core, &Life::default()).await.close
    }

    /// Messages that consume none of a turn's budget, some of it, and more than all of it.
    const READS: [u32; 3] = [0, 1, 500];

    #[tokio::test]
    async fn a_flood_of_messages_keeps_nothing_from_being_written() {
        for reads in READS {
            let core = core();
            let mut written = 0;
            let mut sink = Box::pin(sink::unfold((), |(), _| {
                written += 1;
                async { Ok(()) }
            }));
            let mut read = 0;
            let flood = flood(reads, || {
                read += 1;
                send(&core);
                read > MANY / reads.max(1)
            });
            // Ends when the flood ends, after all writes.
            let _ = talk_with(&mut sink, flood, &core).await;
            drop(sink);
            assert!(written > 50, "{reads} reads each: {written}");
        }
    }

    #[tokio::test]
    async fn a_flood_of_messages_does_not_prolong_the_closing_handshake() {
        for reads in READS {
            let core = core();
            core.queue.close();
            let mut sink = sink::drain().sink_map_err(|never| match never {});
            let started = Instant::now();
            let flood = flood(reads, || {
                assert!(started.elapsed() < TEST_TIMEOUT, "{reads} reads each: it goes on");
                false
            });
            let close = talk_with(&mut sink, flood, &core).await;
            assert!(matches!(close, ClientClose::Unanswered), "{reads} reads each: {close:?}");
        }
    }

    #[tokio::test]
    async fn an_endless_queue_keeps_nothing_from_being_read() {
        let core = core();
        let (read, read_meanwhile) = (Cell::new(0), Cell::new(0));
        let mut sink = Box::pin(sink::unfold(0, |written, _| {
            send(&core);
            let is_over = written == MANY;
            if is_over {
                read_meanwhile.set(read.get());
            }
            async move { if is_over { Err(tungstenite::Error::ConnectionClosed) } else { Ok(written + 1) } }
        }));
        send(&core);
        let messages = stream::repeat_with(|| read.set(read.get() + 1));
        // One message per turn, like a slow server.
        let messages = Box::pin(messages.then(async |()| {
            yield_now().await;
            Ok(Message::text("in"))
        }));
        let _ = tokio::time::timeout(TEST_TIMEOUT, talk_with(&mut sink, messages, &core)).await;
        assert!(read_meanwhile.get() > 100, "{read_meanwhile:?}");
    }

    /// A sink that accepts `room` messages and then is full for ever.
    struct Stalled {
        room: usize,
    }

    impl Sink<Message> for Stalled {
        type Error = tungstenite::Error;

        fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            if self.room == 0 { Poll::Pending } else { Poll::Ready(Ok(())) }
        }

        fn start_send(mut self: Pin<&mut Self>, _: Message) -> Result<(), Self::Error> {
            self.room -= 1;
            Ok(())
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_message_for_which_the_socket_has_no_room_stays_in_the_queue() {
        let core = core();
        for _ in 0..5 {
            send(&core);
        }
        // The connection is lost after many turns.
        let silent = Box::pin(stream::once(async {
            for _ in 0..100 {
                yield_now().await;
            }
            Err(tungstenite::Error::ConnectionClosed)
        }));
        let close = talk_with(&mut Stalled { room: 2 }, silent, &core).await;
        assert!(matches!(close, ClientClose::Lost(_)), "{close:?}");
        assert_eq!(core.queue.discard(), 3);
    }
}
