//! The client of a test: a WebSocket that behaves as a browser's, until it is told to misbehave.
//!
//! One task owns the socket: it writes what the handle sends, answers pings, and records what arrives, whatever the test
//! waits for meanwhile. Framing is tungstenite's, so that the engine's own frame code does not judge itself. Knows
//! codecs. Does not know how the socket was opened.

use std::collections::VecDeque;
use std::fmt::{self, Debug};
use std::marker::PhantomData;
use std::panic::Location;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderValue, header, response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use shardcast_engine::{CloseCode, MessageKind};
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::transcript::{Closed, Record, Shown, Transcript};
use super::waiting::Waiting;
use super::wire::Wire;
use crate::codec::{Decode, Encode, JsonCodec, RawCodec, RawMessage};
use crate::hub::WsHub;

/// Small, so that a client that reads little has taken little.
const READ_BUFFER_BYTES: usize = 4096;

/// A client in a test, which sends `S` and receives `R` in codec `C`; raw messages unless it was
/// [typed](Self::typed).
///
/// It behaves as a browser does: a task of its own reads whatever arrives and answers pings, also while the test is busy
/// with something else, and what is sent is written in order. It never reconnects. It can be told to
/// [stall](Self::stall), [throttle](Self::throttle), [vanish](Self::vanish) or [reset](Self::reset).
///
/// Its assertions wait for up to 10 s of the system's clock ([`timeout`](Self::timeout)). When one fails, it panics with
/// the line of the test that called it, and with all messages that have arrived so far and how the connection ended.
///
/// Messages are asserted in the order of their arrival, each once: [`recv`](Self::recv), [`expect`](Self::expect) and its
/// kin take the next one; [`expect_where`](Self::expect_where) takes all up to the one that it looks for.
///
/// Dropping it ends the stream without a Close frame, as a process that is killed.
pub struct TestClient<S = RawMessage, R = RawMessage, C = RawCodec> {
    transcript: Arc<Transcript>,
    /// How many messages have been asserted.
    read: usize,
    commands: mpsc::UnboundedSender<Command>,
    waiting: Waiting,
    response: response::Parts,
    /// Set while no answer can arrive: what it was told to do.
    silent: Option<&'static str>,
    types: PhantomData<fn(S, C) -> R>,
}

impl<S, R, C> Debug for TestClient<S, R, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestClient").field("name", &self.transcript.name()).finish_non_exhaustive()
    }
}

/// What a client's task is told to do, and who is told when it has done it.
#[derive(Debug)]
enum Command {
    Send(Message),
    Do(Action, oneshot::Sender<()>),
}

#[derive(Debug, Clone, Copy)]
enum Action {
    Stall,
    Resume,
    Throttle(u32),
    Vanish,
    Reset,
}

impl TestClient {
    /// On a socket whose handshake is done; `received` came with the handshake.
    pub(super) async fn open(
        wire: Wire,
        received: Vec<u8>,
        response: response::Parts,
        transcript: Arc<Transcript>,
        waiting: Waiting,
    ) -> Self {
        let limits = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .max_message_size(None)
            .max_frame_size(None);
        let socket = WebSocketStream::from_partially_read(wire, received, Role::Client, Some(limits)).await;
        let (commands, received) = mpsc::unbounded_channel();
        tokio::spawn(Task {
            socket,
            commands: received,
            outgoing: VecDeque::new(),
            is_writable: true,
            reading: Reading::Goes,
            transcript: transcript.clone(),
        });
        Self { transcript, read: 0, commands, waiting, response, silent: None, types: PhantomData }
    }
}

impl<S, R, C> TestClient<S, R, C> {
    /// The same client with the message types and the codec of a hub: it sends what the hub receives. That needs types
    /// that the codec can write and read, for JSON `Serialize` and `Deserialize` on both. A hub whose types have only what
    /// the server needs is tested by [`send_json`](Self::send_json) and [`expect_json`](Self::expect_json).
    pub fn typed<H: WsHub>(self) -> TestClient<H::InMessage, H::OutMessage, H::Codec> {
        self.typed_as()
    }

    /// The same client with these message types and this codec, of which the hub need not know.
    pub fn typed_as<S2, R2, C2>(self) -> TestClient<S2, R2, C2> {
        let Self { transcript, read, commands, waiting, response, silent, types: _ } = self;
        TestClient { transcript, read, commands, waiting, response, silent, types: PhantomData }
    }

    /// How long assertions of this client wait from now on. Default: that of the server, 10 s. By the system's clock,
    /// also where the test's clock is paused.
    pub fn timeout(&mut self, timeout: Duration) {
        self.waiting.timeout = timeout;
    }

    /// The head of the response that has opened the connection (101).
    pub fn response(&self) -> &response::Parts {
        &self.response
    }

    /// The subprotocol that the server has selected.
    pub fn protocol(&self) -> Option<&HeaderValue> {
        self.response.headers.get(header::SEC_WEBSOCKET_PROTOCOL)
    }

    /// All messages that have arrived so far, whether asserted or not. In memory, call
    /// [`settle`](super::TestServer::settle) before.
    pub fn received(&self) -> Vec<RawMessage> {
        self.transcript.record().messages.clone()
    }

    /// Messages that have arrived and were not asserted yet, which are asserted by this.
    pub fn take_received(&mut self) -> Vec<RawMessage> {
        let messages = self.transcript.record().messages[self.read..].to_vec();
        self.read += messages.len();
        messages
    }

    /// Sends a text message. It is queued without a limit and written in order; after the end it is discarded, as in a
    /// browser.
    pub fn send_text(&mut self, text: impl Into<String>) {
        self.write(Message::text(text.into()));
    }

    /// Sends a binary message; see [`send_text`](Self::send_text).
    pub fn send_binary(&mut self, bytes: impl Into<bytes::Bytes>) {
        self.write(Message::binary(bytes.into()));
    }

    /// Sends a value as JSON, in a text message; see [`send_text`](Self::send_text).
    ///
    /// # Panics
    /// If the value cannot be encoded.
    #[track_caller]
    pub fn send_json<T: Serialize + ?Sized>(&mut self, value: &T) {
        let text = serde_json::to_string(value).expect("the value can be encoded as JSON");
        self.send_text(text);
    }

    fn write(&mut self, message: Message) {
        let _ = self.commands.send(Command::Send(message)); // fails after the end
        if let Some(driver) = &self.waiting.driver {
            driver.kick();
        }
    }

    /// The next message as it arrived. Panics if none arrives in time, or the connection has ended.
    #[track_caller]
    pub fn recv_raw(&mut self) -> impl Future<Output = RawMessage> {
        self.next_of(Location::caller(), "a message".to_owned())
    }

    /// The next message must be this text.
    #[track_caller]
    pub fn expect_text(&mut self, text: impl Into<String>) -> impl Future<Output = ()> {
        let (caller, text) = (Location::caller(), RawMessage::Text(text.into()));
        async move {
            let expected = Shown(&text).to_string();
            if self.next_of(caller, expected.clone()).await != text {
                self.fail(caller, &format!("the next message must be {expected}"), 1);
            }
        }
    }

    /// The next message must be JSON with this value; the order of fields does not matter.
    ///
    /// # Panics
    /// Also if the value cannot be encoded.
    #[track_caller]
    pub fn expect_json<T: Serialize + ?Sized>(&mut self, value: &T) -> impl Future<Output = ()> {
        let caller = Location::caller();
        let value = serde_json::to_value(value).expect("the value can be encoded as JSON");
        async move {
            let expected = format!("JSON {value}");
            let message = self.next_of(caller, expected.clone()).await;
            let found: Option<serde_json::Value> = decode::<_, JsonCodec>(&message).ok();
            if found.as_ref() != Some(&value) {
                self.fail(caller, &format!("the next message must be {expected}"), 1);
            }
        }
    }

    /// The next message, which must be JSON of this type.
    #[track_caller]
    pub fn recv_json<T: DeserializeOwned>(&mut self) -> impl Future<Output = T> {
        let caller = Location::caller();
        async move {
            let message = self.next_of(caller, "a JSON message".to_owned()).await;
            decode::<T, JsonCodec>(&message).unwrap_or_else(|error| {
                let wanted = std::any::type_name::<T>();
                self.fail(caller, &format!("the next message must be JSON of {wanted}, but: {error}"), 1)
            })
        }
    }

    /// Nothing must have arrived that was not asserted yet, and the connection must be open.
    ///
    /// Deterministic: in memory all that can happen without time has happened then. Over sockets the client sends a ping
    /// twice and waits for the answer (which counts for
    /// [`control_frames_per_second`](crate::WsHubConfig::control_frames_per_second)), so everything has arrived that was published to it before this call (whose
    /// `publish` had returned); what a hub's method has not sent yet at that time cannot be known.
    ///
    /// # Panics
    /// Also for a client that reads nothing, and if its pings are not answered in time.
    #[track_caller]
    pub fn expect_nothing(&mut self) -> impl Future<Output = ()> {
        let caller = Location::caller();
        async move {
            if let Some(told) = self.silent {
                self.fail(caller, &format!("nothing can arrive: the client was told to {told}"), 0);
            }
            match &self.waiting.driver {
                Some(driver) => driver.settle().await,
                None => {
                    for _ in 0..2 {
                        self.ping(caller).await;
                    }
                }
            }
            let (count, has_ended) = {
                let record = self.transcript.record();
                (record.messages.len(), record.end.is_some())
            };
            if count > self.read || has_ended {
                self.fail(caller, "nothing must have arrived, and the connection must be open", 0);
            }
        }
    }

    async fn ping(&mut self, caller: &Location<'_>) {
        let before = self.transcript.record().pongs;
        self.write(Message::Ping(bytes::Bytes::new()));
        let answered = |record: &Record| (record.pongs > before || record.end.is_some()).then_some(());
        if self.waiting.within(self.transcript.find(answered)).await.is_none() {
            self.fail(caller, "a ping must be answered", 0);
        }
    }

    /// Waits for the end of the connection, whoever ends it: the server's close code and reason. Messages that arrived
    /// before and were not asserted can still be.
    #[track_caller]
    pub fn closed(&mut self) -> impl Future<Output = Closed> {
        let caller = Location::caller();
        async move {
            let ended = self.transcript.find(|record| record.end.clone());
            match self.waiting.within(ended).await {
                Some(closed) => closed,
                None => self.fail(caller, "the connection must end", 0),
            }
        }
    }

    /// Waits for the end of the connection, which must be a Close frame with this code; its reason.
    #[track_caller]
    pub fn expect_closed(&mut self, code: CloseCode) -> impl Future<Output = String> {
        let caller = Location::caller();
        async move {
            let expected = format!("the server must close the connection with {code}");
            let ended = self.transcript.find(|record| record.end.clone());
            match self.waiting.within(ended).await {
                Some(closed) if closed.code == Some(code) => closed.reason,
                _ => self.fail(caller, &expected, 0),
            }
        }
    }

    /// Begins the closing handshake, after what was sent before: [`closed`](Self::closed) waits for the server's answer.
    pub fn close(&mut self, code: CloseCode, reason: &str) {
        let frame = CloseFrame { code: code.0.into(), reason: reason.to_owned().into() };
        self.write(Message::Close(Some(frame)));
    }

    /// Stops reading, as a process that hangs, from when this has returned. It still sends, and answers no pings. Kernel
    /// buffers are small, so that the server notices after some 10 to 40 KiB: then its outbox fills.
    pub async fn stall(&mut self) {
        self.silent = Some("stall");
        self.tell(Action::Stall).await;
    }

    /// Reads again, after [`stall`](Self::stall).
    pub async fn resume(&mut self) {
        self.silent = self.silent.filter(|told| *told != "stall");
        self.tell(Action::Resume).await;
    }

    /// Reads at most so many bytes in a second from now on, as over a slow link; 0 is no limit. Pings are answered when
    /// they are read. In memory the seconds are those of the paused clock.
    pub async fn throttle(&mut self, bytes_per_second: u32) {
        self.tell(Action::Throttle(bytes_per_second)).await;
    }

    /// Vanishes, as a device that loses its network: from when this has returned the client neither reads nor writes nor
    /// ends the stream, and cannot come back. The server sees it end when the client is dropped.
    pub async fn vanish(&mut self) {
        self.silent = Some("vanish");
        self.tell(Action::Vanish).await;
    }

    /// Ends the stream with a reset, without a Close frame: the hub gets
    /// [`CloseReason::Transport`](crate::CloseReason::Transport). In memory there is no reset: the stream ends
    /// ([`Disconnected`](crate::CloseReason::Disconnected)), and only if the client has left something unread, the server's
    /// socket fails, too.
    pub async fn reset(&mut self) {
        self.tell(Action::Reset).await;
    }

    async fn tell(&mut self, action: Action) {
        let (done, is_done) = oneshot::channel();
        if self.commands.send(Command::Do(action, done)).is_ok() {
            let _ = is_done.await; // the connection may have ended
        }
        if let Some(driver) = &self.waiting.driver {
            driver.kick();
        }
    }

    async fn next_of(&mut self, caller: &Location<'_>, expected: String) -> RawMessage {
        let read = self.read;
        let next = self.transcript.find(|record| match record.messages.get(read) {
            Some(message) => Some(Some(message.clone())),
            None => record.end.is_some().then_some(None),
        });
        match self.waiting.within(next).await {
            Some(Some(message)) => {
                self.read += 1;
                message
            }
            Some(None) => self.fail(caller, &format!("{expected} must arrive before the end"), 0),
            None => {
                let timeout = self.waiting.timeout;
                self.fail(caller, &format!("{expected} must arrive within {timeout:?}"), 0)
            }
        }
    }

    /// Fails the test. The last `taken` messages are the ones in question.
    fn fail(&self, caller: &Location<'_>, expected: &str, taken: usize) -> ! {
        panic!("at {caller}: {expected}\n  {}", self.transcript.text(self.read - taken));
    }
}

impl<S, R, C: Encode<S>> TestClient<S, R, C> {
    /// Sends a message; see [`send_text`](Self::send_text). An untyped client sends text (`"hello"`) or bytes
    /// (`vec![1, 2]`).
    ///
    /// # Panics
    /// If the message cannot be encoded.
    #[track_caller]
    pub fn send(&mut self, message: impl Into<S>) {
        let mut payload = Vec::new();
        let kind = C::encode(&message.into(), &mut payload).expect("the codec can encode the message");
        self.write(match kind {
            MessageKind::Text => Message::text(String::from_utf8(payload).expect("a text message is UTF-8")),
            MessageKind::Binary => Message::binary(payload),
        });
    }
}

impl<S, R, C: Decode<R>> TestClient<S, R, C> {
    /// The next message. Panics if none arrives in time, if the connection has ended, or if the codec cannot decode it.
    #[track_caller]
    pub fn recv(&mut self) -> impl Future<Output = R> {
        let caller = Location::caller();
        async move {
            let message = self.next_of(caller, "a message".to_owned()).await;
            self.decoded(caller, &message)
        }
    }

    /// The next message must be this one.
    #[track_caller]
    pub fn expect(&mut self, message: impl Into<R>) -> impl Future<Output = ()>
    where
        R: Debug + PartialEq,
    {
        let (caller, expected) = (Location::caller(), message.into());
        async move {
            let next = self.next_of(caller, format!("{expected:?}")).await;
            let found = self.decoded(caller, &next);
            if found != expected {
                self.fail(caller, &format!("the next message must be {expected:?}, and is {found:?}"), 1);
            }
        }
    }

    /// Waits for a message for which the condition holds, and returns it. Those before it count as asserted.
    #[track_caller]
    pub fn expect_where(&mut self, mut is_it: impl FnMut(&R) -> bool) -> impl Future<Output = R> {
        let caller = Location::caller();
        let first = self.read;
        async move {
            let deadline = std::time::Instant::now() + self.waiting.timeout;
            loop {
                let waiting = self.waiting.until_deadline(deadline);
                let read = self.read;
                let next = self.transcript.find(|record| match record.messages.get(read) {
                    Some(message) => Some(Some(message.clone())),
                    None => record.end.is_some().then_some(None),
                });
                let Some(Some(message)) = waiting.within(next).await else {
                    let skipped = self.read - first;
                    let expected = "a message must arrive for which the condition holds";
                    self.fail(caller, expected, skipped);
                };
                self.read += 1;
                let message = self.decoded(caller, &message);
                if is_it(&message) {
                    return message;
                }
            }
        }
    }

    fn decoded(&self, caller: &Location<'_>, message: &RawMessage) -> R {
        decode::<R, C>(message).unwrap_or_else(|error| {
            let (codec, source) = (std::any::type_name::<C>(), std::error::Error::source(&error));
            let source = source.map(|source| format!(" ({source})")).unwrap_or_default();
            self.fail(caller, &format!("the next message must be one of {codec}, but: {error}{source}"), 1)
        })
    }
}

fn decode<T, C: Decode<T>>(message: &RawMessage) -> Result<T, crate::codec::CodecError> {
    match message {
        RawMessage::Text(text) => C::decode(MessageKind::Text, text.as_bytes()),
        RawMessage::Binary(bytes) => C::decode(MessageKind::Binary, bytes),
    }
}

/// Owns the socket, until it ends or the handle is dropped.
struct Task {
    socket: WebSocketStream<Wire>,
    commands: mpsc::UnboundedReceiver<Command>,
    outgoing: VecDeque<Message>,
    /// False after a failed write. What the server sent before can still be read.
    is_writable: bool,
    reading: Reading,
    transcript: Arc<Transcript>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    Goes,
    Stalls,
    /// Neither does writing go on.
    Cut,
}

impl Future for Task {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            // First, so that a client that is told to stall reads nothing more.
            while let Poll::Ready(command) = self.commands.poll_recv(cx) {
                match command {
                    None => return Poll::Ready(()), // dropped
                    Some(Command::Send(message)) => self.outgoing.push_back(message),
                    Some(Command::Do(action, done)) => {
                        if self.carry_out(action) {
                            self.transcript.write(|record| {
                                record.end.get_or_insert_with(|| no_frame("reset by the client"));
                            });
                            return Poll::Ready(());
                        }
                        let _ = done.send(()); // the test may not wait for it
                    }
                }
            }
            if self.reading == Reading::Cut {
                return Poll::Pending;
            }
            if self.is_writable && self.poll_write(cx).is_err() {
                self.is_writable = false;
            }
            if self.reading == Reading::Stalls {
                return Poll::Pending;
            }
            match ready!(self.socket.poll_next_unpin(cx)) {
                Some(Ok(message)) => self.record(message),
                Some(Err(Error::ConnectionClosed)) | None => {
                    self.end(no_frame("the end of the stream"));
                    return Poll::Ready(());
                }
                Some(Err(error)) => {
                    self.end(no_frame(&error.to_string()));
                    return Poll::Ready(());
                }
            }
        }
    }
}

fn no_frame(why: &str) -> Closed {
    Closed { code: None, reason: why.to_owned() }
}

impl Task {
    /// Whether the connection ends with it.
    fn carry_out(&mut self, action: Action) -> bool {
        match action {
            Action::Stall => self.reading = Reading::Stalls,
            Action::Resume if self.reading == Reading::Stalls => self.reading = Reading::Goes,
            Action::Resume => {}
            Action::Throttle(bytes_per_second) => self.socket.get_mut().throttle(bytes_per_second),
            Action::Vanish => {
                self.reading = Reading::Cut;
                self.socket.get_mut().cut();
            }
            Action::Reset => {
                self.socket.get_mut().reset_at_end();
                return true;
            }
        }
        false
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        while !self.outgoing.is_empty() && self.socket.poll_ready_unpin(cx)?.is_ready() {
            if let Some(message) = self.outgoing.pop_front() {
                self.socket.start_send_unpin(message)?;
            }
        }
        let _ = self.socket.poll_flush_unpin(cx)?; // woken when there is room
        Ok(())
    }

    fn record(&mut self, message: Message) {
        match message {
            Message::Text(text) => self.receive(RawMessage::Text(text.to_string())),
            Message::Binary(bytes) => self.receive(RawMessage::Binary(bytes)),
            Message::Pong(_) => self.transcript.write(|record| record.pongs += 1),
            Message::Close(frame) => self.end(match frame {
                Some(frame) => {
                    let (code, reason) = (CloseCode(frame.code.into()), frame.reason.to_string());
                    Closed { code: Some(code), reason }
                }
                None => Closed { code: Some(CloseCode::NO_STATUS), reason: String::new() },
            }),
            Message::Ping(_) | Message::Frame(_) => {} // tungstenite answers pings itself
        }
    }

    fn receive(&mut self, message: RawMessage) {
        self.transcript.write(|record| record.messages.push(message));
    }

    /// Only the first end counts: that of the stream follows the Close frame.
    fn end(&mut self, closed: Closed) {
        self.transcript.write(|record| {
            record.end.get_or_insert(closed);
        });
    }
}
