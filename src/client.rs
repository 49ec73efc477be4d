//! The client of a hub, with the hub's message types and codec.
//!
//! The application owns a handle, and one task owns the socket from the first open connection on, through all reconnects
//! (`client/task.rs`). Between them are two bounded queues: encoded messages to send, and decoded messages that were
//! received. To close, the handle closes the first queue, so that the messages sent before are written before the Close.
//! Knows codecs and tungstenite. Does not know hubs, the engine or the server half of this crate.

mod builder;
mod callback;
mod connection;
mod core;
mod dial;
mod error;
mod inbox;
mod liveness;
mod queue;
mod reconnect;
mod request;
mod state;
mod task;
#[cfg(feature = "client-tls")]
mod tls;
mod transport;

use std::{fmt, marker::PhantomData, sync::Arc};

use http::HeaderValue;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::oneshot,
};

use self::{builder::Config, core::Core, queue::Queue, reconnect::Attempts, transport::BoxIo};
pub use self::{
    builder::HubClientBuilder,
    error::{ClientClose, ClientError, SendError},
    inbox::Messages,
    queue::WhenFull,
    reconnect::ReconnectPolicy,
    state::{ClientState, ClientStates},
};
use crate::codec::{CodecError, Decode, Encode, JsonCodec};

/// A client of a hub: sends `S` (the hub's `InMessage`) and receives `R` (its `OutMessage`), both in codec `C`.
///
/// ```no_run
/// use serde::{Deserialize, Serialize};
/// use shardcast::{HubClient, JsonCodec};
///
/// #[derive(Serialize)]
/// struct Hello {
///     text: String,
/// }
///
/// #[derive(Deserialize, Debug)]
/// enum Reply {
///     Ok(String),
///     Err(String),
/// }
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let mut client = HubClient::builder("ws://localhost:3000/ws")
///     .with_in_message::<Hello>()
///     .with_out_message::<Reply>()
///     .with_codec::<JsonCodec>()
///     .build();
///
/// client.connect().await?;
/// client.send(Hello { text: "hello".into() })?;
/// while let Some(reply) = client.recv().await {
///     println!("{:?}", reply?);
/// }
/// println!("{}", client.state()); // for example: closed by the server with 1001
/// # Ok(())
/// # }
/// ```
///
/// # Receiving
/// Messages go to the callback of [`on_message`](Self::on_message) if one is set, and otherwise into a bounded queue, from
/// which [`recv`](Self::recv) takes them, or the [`Stream`](futures_util::Stream) of
/// [`take_messages`](Self::take_messages) in another task. When that queue is full (256 messages by default), the client
/// stops reading until the application takes one. TCP then slows the server down, pings are not answered, the server's
/// Close is not seen, and a hub disconnects the client as a slow consumer in the end. So a client that is not interested
/// in messages should say so: `client.on_message(drop)`.
///
/// A message that cannot be decoded is an `Err` in the queue, and the next ones follow; with callbacks it goes to
/// [`on_error`](Self::on_error).
///
/// # Callbacks
/// Callbacks run in the client's task, one at a time and in the order of arrival; while one runs, nothing is read. They
/// must not block: give long work to a task. To answer from a callback, move a [`sender`](Self::sender) into it. Each
/// event has one callback, the last that was set. Set callbacks before [`connect`](Self::connect): messages that arrive
/// earlier go into the queue. A callback that panics ends the connection as [`ClientClose::CallbackPanicked`]; a panic in
/// the callbacks of [`on_close`](Self::on_close) and [`on_state`](Self::on_state) is logged and changes nothing.
///
/// # Reconnecting
/// With [`with_reconnect`](HubClientBuilder::with_reconnect) the client comes back by itself after a lost connection:
///
/// ```no_run
/// use shardcast::HubClient;
/// use shardcast::client::ReconnectPolicy;
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let mut client = HubClient::builder("ws://localhost:3000/ws")
///     .with_in_message::<String>()
///     .with_out_message::<String>()
///     .with_reconnect(ReconnectPolicy::new().with_first_connect(true))
///     .build();
/// client.on_open(|| ["join lobby".to_owned()]); // first on each connection
/// client.on_state(|state| println!("{state}"));
/// client.connect().await?;
/// # Ok(())
/// # }
/// ```
///
/// To the hub, each connection is a new client: it is in no group, and nothing that was published meanwhile reaches it.
/// What it must say first, such as which rooms it joins, belongs into [`on_open`](Self::on_open).
///
/// What the application sends meanwhile is queued within the queue's bounds
/// ([messages](HubClientBuilder::with_queue_messages), [bytes](HubClientBuilder::with_queue_bytes)), and is written once
/// and in order on the next connection. A message can still be lost, never doubled: one that the socket had accepted when
/// the connection broke (up to some megabytes, which the kernel or the network held) may not have arrived, and no
/// client can know. An application that needs certainty must acknowledge messages itself. When the client is closed for
/// good, the messages that are still queued are lost: [`ClientClose::Abandoned`] counts them.
///
/// # Dropping
/// A dropped client writes its queued messages and sends a Close, in the background and only while the runtime exists.
/// [`disconnect`](Self::disconnect) waits for that and for the server's Close.
pub struct HubClient<S, R, C = JsonCodec> {
    core: Arc<Core<R>>,
    /// Until the application takes it.
    messages: Option<Messages<R>>,
    /// The task's report. It is awaited before the next connection, so that there is one task at a time.
    closed: Option<oneshot::Receiver<ClientClose>>,
    types: PhantomData<fn(S, C)>,
}

impl HubClient<Unset, Unset, JsonCodec> {
    /// A builder for a client of the hub at `url`, for example `ws://localhost:3000/ws`.
    pub fn builder(url: impl Into<String>) -> HubClientBuilder<Unset, Unset, JsonCodec> {
        HubClientBuilder::new(url.into())
    }
}

impl<S, R, C> HubClient<S, R, C>
where
    R: Send + 'static,
    C: Encode<S> + Decode<R>,
{
    fn new(config: Config) -> Self {
        let (core, messages) = Core::new(config);
        Self { core, messages: Some(messages), closed: None, types: PhantomData }
    }

    /// Calls `callback` with every message, which is then not queued for [`recv`](Self::recv).
    pub fn on_message(&mut self, callback: impl FnMut(R) + Send + 'static) {
        self.core.callbacks.message.set(callback);
    }

    /// Calls `callback` for every message that cannot be decoded. By default that is an `Err` for [`recv`](Self::recv) or,
    /// if there is a callback for messages, logged as a warning. The connection stays open.
    pub fn on_error(&mut self, callback: impl FnMut(CodecError) + Send + 'static) {
        self.core.callbacks.error.set(callback);
    }

    /// Calls `callback` whenever a connection is open, the first one included, and writes the messages that it returns
    /// before all that are queued: who the client is, the rooms that it joins. They do not count towards the queue's
    /// limits. One that cannot be encoded is logged as an error and left out.
    pub fn on_open<I>(&mut self, mut callback: impl FnMut() -> I + Send + 'static)
    where
        I: IntoIterator<Item = S>,
    {
        self.core
            .callbacks
            .open
            .set(move |()| callback().into_iter().map(|message| queue::encode::<S, C>(&message)).collect());
    }

    /// Calls `callback` at every change of the state; see [`states`](Self::states) to await changes. During
    /// [`connect`](Self::connect) it runs in the caller's task.
    pub fn on_state(&mut self, callback: impl FnMut(ClientState) + Send + 'static) {
        self.core.callbacks.state.set(callback);
    }

    /// Calls `callback` once for each successful [`connect`](Self::connect), when the connection has ended and the client
    /// does not reconnect, with the reason. Interruptions that it recovers from are [states](Self::on_state).
    pub fn on_close(&mut self, callback: impl FnMut(ClientClose) + Send + 'static) {
        self.core.callbacks.close.set(callback);
    }

    /// Opens the connection. After it has ended for good, for any reason, `connect` opens a new one; it waits for the end
    /// of an earlier one that is still closing.
    ///
    /// With a [`ReconnectPolicy`] that is meant [for the first connect, too](ReconnectPolicy::with_first_connect), it
    /// retries. Otherwise, it is one attempt. When the future is dropped, the attempt is abandoned.
    ///
    /// # Errors
    /// [`ClientError`]; no connection remains open, and `connect` can be called again.
    pub async fn connect(&mut self) -> Result<(), ClientError> {
        let reconnect = self.core.config.reconnect.clone();
        self.start(None, Attempts::new(reconnect)).await
    }

    /// Opens the connection over a stream of the application's own: through a proxy, a Unix socket, or memory. The URL
    /// gives the request's path and host, and `wss` puts TLS on the stream. The client cannot reconnect, since there is no
    /// second stream; for that, see [`with_connector`](HubClientBuilder::with_connector).
    ///
    /// # Errors
    /// As for [`connect`](Self::connect).
    pub async fn connect_over<T>(&mut self, stream: T) -> Result<(), ClientError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.start(Some(Box::new(stream)), Attempts::new(None)).await
    }

    async fn start(&mut self, stream: Option<BoxIo>, mut attempts: Attempts) -> Result<(), ClientError> {
        if self.core.queue.is_open() {
            return Err(ClientError::AlreadyConnected);
        }
        self.ended().await;
        let retries = self.core.config.reconnect.as_ref().is_some_and(ReconnectPolicy::is_for_first_connect);
        let starting = Starting(Some(&self.core));
        self.core.inbox.open();
        if retries && stream.is_none() {
            self.core.queue.open();
        }
        let opened = match self.core.open(stream).await {
            Ok(opened) => Ok(opened),
            Err(error) => {
                let cause = ClientClose::ConnectFailed { attempts: 0, error };
                match if retries { attempts.next(&cause) } else { None } {
                    Some(attempt) => self.core.reopen(&mut attempts, attempt, cause).await,
                    None => Err(cause),
                }
            }
        };
        starting.finish();
        match opened {
            Ok(opened) => {
                self.core.queue.open();
                self.core.enter_open(&opened);
                let (report, closed) = oneshot::channel();
                self.closed = Some(closed);
                tokio::spawn(task::run::<R, C>(Arc::clone(&self.core), opened, attempts, report));
                Ok(())
            }
            Err(close) => {
                self.core.close(&close);
                match close {
                    ClientClose::ConnectFailed { error, .. } => Err(error),
                    // Only an attempt that failed ends attempts, since nobody else can close the queue now.
                    _ => Err(ClientError::TimedOut),
                }
            }
        }
    }

    /// The end of the current or the last connection, which is reported once.
    async fn ended(&mut self) -> Option<ClientClose> {
        let close = self.closed.as_mut()?.await;
        self.closed = None;
        Some(close.unwrap_or_else(|_| ClientClose::lost("the runtime has shut down")))
    }

    /// Whether the connection is open: true from a successful [`connect`](Self::connect) until either side closes or the
    /// connection is lost, and again after a reconnect. A server that disappears without closing is noticed when it is
    /// silent for longer than the silence timeout (45 s by default); see
    /// [`with_silence_timeout`](HubClientBuilder::with_silence_timeout).
    pub fn is_connected(&self) -> bool {
        self.core.queue.is_open() && self.core.states.is_open()
    }

    /// What the client is doing.
    pub fn state(&self) -> ClientState {
        self.core.states.current()
    }

    /// Watches the state: as a future, as a stream, in any task. See [`on_state`](Self::on_state) for a callback.
    pub fn states(&self) -> ClientStates {
        self.core.states.watch()
    }

    /// The subprotocol that the server selected at the last handshake, if any.
    pub fn selected_protocol(&self) -> Option<HeaderValue> {
        self.core.states.protocol()
    }

    /// Queues a message. It is encoded at once and written later by the client's task; `Ok` does not mean that it has
    /// arrived. Never blocks. While the client reconnects, the message waits in the queue.
    ///
    /// # Errors
    /// [`SendError`], which returns the message: the queue is full (backpressure: the server reads more slowly than the
    /// client sends, or the client has been reconnecting for long), there is no connection, or the codec refuses the
    /// message.
    pub fn send(&self, message: S) -> Result<(), SendError<S>> {
        self.core.queue.send::<S, C>(message)
    }

    /// How many messages were dropped, since the client was built, to make room in the send queue: only with
    /// [`WhenFull::DropOldest`].
    pub fn dropped_messages(&self) -> u64 {
        self.core.queue.dropped()
    }

    /// A handle that can only send. It can be cloned and moved into callbacks and tasks.
    pub fn sender(&self) -> HubSender<S, C> {
        HubSender { queue: Arc::clone(&self.core.queue), states: self.states(), types: PhantomData }
    }

    /// The next message, in order, if there is no callback for messages; see [Receiving](Self#receiving). An `Err` is a
    /// message that cannot be decoded, and the next ones follow. Cancel-safe: no message is lost when the future is
    /// dropped.
    ///
    /// `None` when the connection has ended for good and no message is left ([`state`](Self::state) says why), or before
    /// [`connect`](Self::connect), or if [`take_messages`](Self::take_messages) took the messages.
    pub async fn recv(&mut self) -> Option<Result<R, CodecError>> {
        self.messages.as_mut()?.recv().await
    }

    /// Takes the receiving half, to receive in another task or as a [`Stream`](futures_util::Stream). `None` if it was
    /// taken before.
    pub fn take_messages(&mut self) -> Option<Messages<R>> {
        self.messages.take()
    }

    /// Closes the connection: writes the queued messages, sends a Close and waits for the server's Close. While the client
    /// reconnects, it stops that; messages that are queued then are lost ([`ClientClose::Abandoned`]).
    ///
    /// Returns how the connection ended, which may have been earlier and by the server, or `None` if the client was not
    /// connected. Takes no longer than the disconnect timeout (5 s by default), unless a callback blocks.
    pub async fn disconnect(&mut self) -> Option<ClientClose> {
        self.core.queue.close();
        self.ended().await
    }
}

/// Undoes a `connect` whose future is dropped.
struct Starting<'a, R>(Option<&'a Core<R>>);

impl<R> Starting<'_, R> {
    fn finish(mut self) {
        self.0 = None;
    }
}

impl<R> Drop for Starting<'_, R> {
    fn drop(&mut self) {
        if let Some(core) = self.0 {
            let unsent = core.queue.discard();
            core.close(&ClientClose::Abandoned { unsent });
        }
    }
}

impl<S, R, C> Drop for HubClient<S, R, C> {
    fn drop(&mut self) {
        // Senders may outlive the client. The connection does not.
        self.core.queue.close();
    }
}

impl<S, R, C> fmt::Debug for HubClient<S, R, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("HubClient")
            .field("url", &self.core.config.url)
            // As text: a server's refusal contains headers, which must not be logged.
            .field("state", &format_args!("{}", self.core.states.current()))
            .finish_non_exhaustive()
    }
}

/// Sends messages on a [`HubClient`]'s connection, the current one and each later one. It does not keep the connection
/// open: the connection closes when the client is dropped.
pub struct HubSender<S, C> {
    queue: Arc<Queue>,
    states: ClientStates,
    types: PhantomData<fn(S, C)>,
}

impl<S, C: Encode<S>> HubSender<S, C> {
    /// Queues a message; see [`HubClient::send`].
    ///
    /// # Errors
    /// As for [`HubClient::send`].
    pub fn send(&self, message: S) -> Result<(), SendError<S>> {
        self.queue.send::<S, C>(message)
    }

    /// Whether the connection is open; see [`HubClient::is_connected`].
    pub fn is_connected(&self) -> bool {
        self.queue.is_open() && self.states.is_open()
    }
}

impl<S, C> Clone for HubSender<S, C> {
    fn clone(&self) -> Self {
        Self { queue: Arc::clone(&self.queue), states: self.states.clone(), types: PhantomData }
    }
}

impl<S, C> fmt::Debug for HubSender<S, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("HubSender").field("connected", &self.states.is_open()).finish()
    }
}

/// Placeholder for a message type that has not been set on a [`HubClientBuilder`]. No codec supports it, so a forgotten
/// type is a compile error.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Unset;
