//! The connection's task, from the end of the handshake until the socket is closed. It owns the socket.
//!
//! Reads and writes concurrently, calls the callbacks, decides how the connection ended, sends the server a Close if
//! the client ended it, and reports the reason. Every wait after the end has a timeout, and no panic in a callback
//! prevents the report. Neither half of the task can starve the other, or the timeouts, however much there is to read
//! or to write. Knows codecs, callbacks and tungstenite. Does not know the handle.

use std::{
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, Sink, SinkExt, Stream, StreamExt};
use shardcast_engine::MessageKind;
use tokio::{
    io::AsyncReadExt,
    sync::{mpsc, oneshot},
    task::{unconstrained, yield_now},
    time::{sleep, timeout},
};
use tokio_tungstenite::tungstenite::{
    self, Message, Utf8Bytes,
    error::{CapacityError, ProtocolError},
    protocol::{CloseFrame, frame::coding::CloseCode},
};

use super::{
    callback::Callbacks,
    error::ClientClose,
    transport::{Life, Socket},
};
use crate::codec::Decode;

/// The code for a Close frame that has none (RFC 6455, section 7.1.5).
const NO_CODE: u16 = 1005;

/// Messages that one half reads or writes before it yields to the other.
const MESSAGES_PER_TURN: u32 = 32;

/// The task's settings.
#[derive(Clone, Copy)]
pub(super) struct Timeouts {
    pub(super) disconnect: Duration,
    pub(super) silence: Option<Duration>,
}

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
        if let tungstenite::Error::Capacity(CapacityError::MessageTooLong { size, max_size }) = error {
            return Self {
                close: ClientClose::TooLong { bytes: size, bytes_max: max_size },
                close_frame: Some((CloseCode::Size, format!("message over {max_size} bytes").into())),
            };
        }
        let code = match &error {
            tungstenite::Error::Utf8(_) => Some(CloseCode::Invalid),
            tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
            tungstenite::Error::Protocol(_) => Some(CloseCode::Protocol),
            _ => None,
        };
        Self { close: ClientClose::lost(error), close_frame: code.map(|code| (code, Utf8Bytes::default())) }
    }

    fn panicked() -> Self {
        Self {
            close: ClientClose::lost("a callback panicked"),
            close_frame: Some((CloseCode::Error, Utf8Bytes::default())),
        }
    }
}

pub(super) async fn run<R, C>(
    (socket, life): (Socket, Life),
    queue: mpsc::Receiver<Message>,
    closing: oneshot::Receiver<()>,
    closed: oneshot::Sender<ClientClose>,
    callbacks: Arc<Callbacks<R>>,
    timeouts: Timeouts,
) where
    R: 'static,
    C: Decode<R>,
{
    let (mut sink, mut stream) = socket.split();
    let talk = talk::<R, C>(&mut sink, &mut stream, queue, closing, &callbacks, &life, timeouts);
    let Ending { close, close_frame } =
        AssertUnwindSafe(talk).catch_unwind().await.unwrap_or_else(|_| Ending::panicked());
    let is_close_sent = close_frame.is_some();
    if let Some((code, reason)) = close_frame {
        // If nothing is received, sending may not work either, and the application must not wait for it.
        let is_silent = matches!(close, ClientClose::Silent { .. });
        let within = if is_silent { Duration::ZERO } else { timeouts.disconnect };
        let _ = timeout(within, sink.send(Message::Close(Some(CloseFrame { code, reason })))).await;
    } else if let ClientClose::ByServer { .. } = close {
        // tungstenite has queued our Close in answer; a flush sends it.
        let _ = timeout(timeouts.disconnect, sink.flush()).await;
    }
    if catch_unwind(AssertUnwindSafe(|| callbacks.close.call(close.clone()))).is_err() {
        tracing::error!(%close, "the callback `on_close` panicked");
    }
    let hang_up = async {
        match &close {
            // RFC 6455 requires the server to close the TCP connection first. Only this task waits for that.
            ClientClose::ByClient | ClientClose::ByServer { .. } => {
                while let Some(Ok(_)) = stream.next().await {}
            }
            ClientClose::TooLong { .. } | ClientClose::Lost(_) if is_close_sent => {
                // Closing a socket with unread bytes resets the connection and destroys our Close in flight. After an
                // error tungstenite reads no more, so the rest is read from the socket itself.
                let Ok(mut socket) = sink.reunite(stream) else { return };
                let mut rest = [0; 4096];
                while let Ok(1..) = socket.get_mut().read(&mut rest).await {}
            }
            _ => {}
        }
    };
    let hang_up = timeout(timeouts.disconnect, hang_up);
    let _ = closed.send(close.clone());
    let _ = hang_up.await;
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
    queue: mpsc::Receiver<Message>,
    closing: oneshot::Receiver<()>,
    callbacks: &Callbacks<R>,
    life: &Life,
    timeouts: Timeouts,
) -> Ending
where
    R: 'static,
    C: Decode<R>,
{
    let close_sent = AtomicBool::new(false);
    let mut reading = pin!(read::<R, C>(stream, callbacks, &close_sent));
    let mut writing = pin!(unconstrained(write(sink, queue, &close_sent)));
    let mut too_late = pin!(unconstrained(async {
        // Never sent, only dropped.
        let _ = closing.await;
        sleep(timeouts.disconnect).await;
    }));
    let silence = pin!(unconstrained(life.silence(timeouts.silence)));
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
            () = unconstrained(sleep(timeouts.disconnect)) => ClientClose::lost(error).into(),
        },
        () = &mut too_late => ClientClose::Unanswered.into(),
        timeout = silence => Ending {
            close: ClientClose::Silent { timeout },
            close_frame: Some((CloseCode::Error, "nothing was received for the silence timeout".into())),
        },
    }
}

/// Calls the callbacks with each message until the server closes or the connection is lost.
async fn read<R, C>(
    stream: &mut (impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin),
    callbacks: &Callbacks<R>,
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
            Some(Ok(Message::Text(text))) => deliver::<R, C>(callbacks, MessageKind::Text, text.as_bytes()),
            Some(Ok(Message::Binary(bytes))) => deliver::<R, C>(callbacks, MessageKind::Binary, &bytes),
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

fn deliver<R, C: Decode<R>>(callbacks: &Callbacks<R>, kind: MessageKind, payload: &[u8]) {
    match C::decode(kind, payload) {
        Ok(message) => {
            if callbacks.message.call(message).is_err() {
                tracing::debug!("a message was discarded: no callback is set (`on_message`)");
            }
        }
        Err(error) => {
            if let Err(error) = callbacks.error.call(error) {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a message was discarded: it cannot be decoded"
                );
            }
        }
    }
}

/// Writes the queued messages and, once the queue has been closed, a Close. Returns only with an error: after the Close
/// the reading half determines how the connection ended.
async fn write(
    sink: &mut (impl Sink<Message, Error = tungstenite::Error> + Unpin),
    mut queue: mpsc::Receiver<Message>,
    close_sent: &AtomicBool,
) -> tungstenite::Error {
    while let Some(message) = queue.recv().await {
        let written = async {
            sink.feed(message).await?;
            // Further queued messages are batched into the same write.
            for _ in 1..MESSAGES_PER_TURN {
                let Ok(message) = queue.try_recv() else { return sink.flush().await.map(|()| false) };
                sink.feed(message).await?;
            }
            sink.flush().await.map(|()| true)
        };
        match written.await {
            Ok(true) => yield_now().await,
            Ok(false) => {}
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

#[cfg(test)]
mod tests {
    use std::{cell::Cell, time::Instant};

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

    async fn talk_with(
        sink: &mut (impl Sink<Message, Error = tungstenite::Error> + Unpin),
        mut stream: impl Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
        queue: mpsc::Receiver<Message>,
        closing: oneshot::Receiver<()>,
    ) -> ClientClose {
        let timeouts = Timeouts { disconnect: Duration::from_millis(1), silence: None };
        let (callbacks, life) = (Callbacks::<String>::default(), Life::default());
        talk::<String, RawCodec>(sink, &mut stream, queue, closing, &callbacks, &life, timeouts).await.close
    }

    /// Messages that consume none of a turn's budget, some of it, and more than all of it.
    const READS: [u32; 3] = [0, 1, 500];

    #[tokio::test]
    async fn a_flood_of_messages_keeps_nothing_from_being_written() {
        for reads in READS {
            let (outgoing, queue) = mpsc::channel(4);
            let (_open, closing) = oneshot::channel();
            let mut written = 0;
            let mut sink = Box::pin(sink::unfold((), |(), _| {
                written += 1;
                async { Ok(()) }
            }));
            let mut read = 0;
            let flood = flood(reads, || {
                read += 1;
                let _ = outgoing.try_send(Message::text("out"));
                read > MANY / reads.max(1)
            });
            // Ends when the flood ends, after all writes.
            let _ = talk_with(&mut sink, flood, queue, closing).await;
            drop(sink);
            assert!(written > 50, "{reads} reads each: {written}");
        }
    }

    #[tokio::test]
    async fn a_flood_of_messages_does_not_prolong_the_closing_handshake() {
        for reads in READS {
            let (outgoing, queue) = mpsc::channel(4);
            let (close, closing) = oneshot::channel();
            drop((outgoing, close));
            let mut sink = sink::drain().sink_map_err(|never| match never {});
            let started = Instant::now();
            let flood = flood(reads, || {
                assert!(started.elapsed() < TEST_TIMEOUT, "{reads} reads each: it goes on");
                false
            });
            let close = talk_with(&mut sink, flood, queue, closing).await;
            assert!(matches!(close, ClientClose::Unanswered), "{reads} reads each: {close:?}");
        }
    }

    #[tokio::test]
    async fn an_endless_queue_keeps_nothing_from_being_read() {
        let (outgoing, queue) = mpsc::channel(1000);
        let (_open, closing) = oneshot::channel();
        let (read, read_meanwhile) = (Cell::new(0), Cell::new(0));
        let mut sink = Box::pin(sink::unfold(0, |written, _| {
            let _ = outgoing.try_send(Message::text("out"));
            let is_over = written == MANY;
            if is_over {
                read_meanwhile.set(read.get());
            }
            async move { if is_over { Err(tungstenite::Error::ConnectionClosed) } else { Ok(written + 1) } }
        }));
        outgoing.try_send(Message::text("out")).unwrap();
        let messages = stream::repeat_with(|| read.set(read.get() + 1));
        // One message per turn, like a slow server.
        let messages = Box::pin(messages.then(async |()| {
            yield_now().await;
            Ok(Message::text("in"))
        }));
        let _ = tokio::time::timeout(TEST_TIMEOUT, talk_with(&mut sink, messages, queue, closing)).await;
        assert!(read_meanwhile.get() > 100, "{read_meanwhile:?}");
    }
}
