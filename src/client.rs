//! The client: the other end of a hub, with the hub's message types and codec.
//!
//! A handle owned by the application, and per connection one task that owns the socket (`client/connection.rs`).
//! Between them is one bounded queue of encoded messages: dropping its sending end is how the handle asks for a Close,
//! so that what was sent before is written before.
//! Knows codecs and tungstenite. Does not know hubs, the engine or the server half of this crate.

mod builder;
mod callback;
mod connection;
mod error;
mod outlet;
mod transport;

use std::{fmt, marker::PhantomData, sync::Arc};

use callback::Callbacks;
use http::{HeaderValue, header};
use outlet::Outlet;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use self::{builder::Config, connection::Timeouts};
pub use self::{
    builder::HubClientBuilder,
    error::{ClientClose, ClientError, SendError},
};
use crate::codec::{CodecError, Decode, Encode, JsonCodec};

/// A client for a hub: sends `S` (the hub's `InMessage`), receives `R` (its `OutMessage`), both in codec `C`.
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
/// client.on_message(|reply: Reply| println!("{reply:?}"));
/// client.on_close(|close| println!("closed: {close}"));
///
/// client.connect().await?;
/// client.send(Hello { text: "hello".into() })?;
/// client.disconnect().await;
/// # Ok(())
/// # }
/// ```
///
/// # Callbacks
/// They run one after the other in the connection's task, in the order of arrival; while one runs, nothing is read.
/// They must not block: hand long work to a task. To answer from a callback, move a [`sender`](Self::sender) into
/// it. Each kind has one callback, the last that was set; what arrives before one is set is lost, so set them before
/// [`connect`](Self::connect). A callback that panics ends the connection as [`ClientClose::Lost`]; one that panics in
/// [`on_close`](Self::on_close) changes nothing about how it has ended.
///
/// # Dropping
/// A dropped client writes what it has queued and sends a Close, in the background and only as long as the runtime
/// lives. [`disconnect`](Self::disconnect) waits for that and for the server's answer.
pub struct HubClient<S, R, C> {
    config: Config,
    callbacks: Arc<Callbacks<R>>,
    outlet: Arc<Outlet>,
    connection: Option<Connection>,
    selected_protocol: Option<HeaderValue>,
    types: PhantomData<fn(S, C)>,
}

/// What the handle keeps of a connection.
struct Connection {
    /// Dropped to tell the task that the outlet is closed and that time is running.
    closing: oneshot::Sender<()>,
    closed: oneshot::Receiver<ClientClose>,
}

impl HubClient<Unset, Unset, JsonCodec> {
    /// Starts to describe a client for the hub at `url`, for example `ws://localhost:3000/ws`.
    pub fn builder(url: impl Into<String>) -> HubClientBuilder<Unset, Unset, JsonCodec> {
        HubClientBuilder::new(url.into())
    }
}

impl<S, R, C> HubClient<S, R, C>
where
    R: 'static,
    C: Encode<S> + Decode<R>,
{
    /// Calls `callback` with every message.
    pub fn on_message(&mut self, callback: impl FnMut(R) + Send + 'static) {
        self.callbacks.message.set(callback);
    }

    /// Calls `callback` for every message that cannot be decoded; by default that is logged as a warning.
    /// The connection goes on.
    pub fn on_error(&mut self, callback: impl FnMut(CodecError) + Send + 'static) {
        self.callbacks.error.set(callback);
    }

    /// Calls `callback` once per connection, when it has ended, with the reason.
    pub fn on_close(&mut self, callback: impl FnMut(ClientClose) + Send + 'static) {
        self.callbacks.close.set(callback);
    }

    /// Opens the connection. After it has ended, for whatever reason, `connect` opens a new one.
    ///
    /// # Errors
    /// [`ClientError`]; no connection is left behind, and `connect` can be tried again.
    pub async fn connect(&mut self) -> Result<(), ClientError> {
        if self.is_connected() {
            return Err(ClientError::AlreadyConnected);
        }
        let opening = transport::open(&self.config);
        let (socket, life, response) =
            timeout(self.config.connect_timeout, opening).await.map_err(|_| ClientError::TimedOut)??;

        let (outgoing, queue) = mpsc::channel(self.config.queue_messages);
        let (closing, closing_told) = oneshot::channel();
        let (closed_told, closed) = oneshot::channel();
        let timeouts =
            Timeouts { disconnect: self.config.disconnect_timeout, silence: self.config.silence_timeout };
        tokio::spawn(connection::run::<R, C>(
            (socket, life),
            queue,
            closing_told,
            closed_told,
            Arc::clone(&self.callbacks),
            timeouts,
        ));
        self.selected_protocol = response.headers().get(header::SEC_WEBSOCKET_PROTOCOL).cloned();
        self.connection = Some(Connection { closing, closed });
        self.outlet.open(outgoing);
        Ok(())
    }

    /// Whether messages can be sent: true from a successful [`connect`](Self::connect) until either side closes or
    /// the connection is lost. A server that is gone without a word is noticed by its silence, within 45 s by
    /// default; see [`with_silence_timeout`](HubClientBuilder::with_silence_timeout).
    pub fn is_connected(&self) -> bool {
        self.outlet.is_open()
    }

    /// The subprotocol that the server selected at the last [`connect`](Self::connect), if any.
    pub fn selected_protocol(&self) -> Option<&HeaderValue> {
        self.selected_protocol.as_ref()
    }

    /// Queues a message. It is encoded at once and written soon; `Ok` does not mean that it has arrived.
    ///
    /// # Errors
    /// [`SendError`], which gives the message back: the queue is full (the server reads more slowly than the client
    /// sends), there is no connection, or the codec refuses the message.
    pub fn send(&self, message: S) -> Result<(), SendError<S>> {
        self.outlet.send::<S, C>(message)
    }

    /// A handle that can only send, to be cloned and moved into callbacks and tasks.
    pub fn sender(&self) -> HubSender<S, C> {
        HubSender { outlet: Arc::clone(&self.outlet), types: PhantomData }
    }

    /// Closes the connection: writes what is queued, sends a Close and waits for the server's Close.
    ///
    /// Returns how the connection ended, which may have been earlier and by the server; `None` when it has not been
    /// connected. Takes no longer than the disconnect timeout (5 s by default), except for a callback that blocks.
    pub async fn disconnect(&mut self) -> Option<ClientClose> {
        self.outlet.close();
        let Connection { closing, closed } = self.connection.take()?;
        drop(closing);
        Some(closed.await.unwrap_or_else(|_| ClientClose::lost("the runtime has shut down")))
    }
}

impl<S, R, C> Drop for HubClient<S, R, C> {
    fn drop(&mut self) {
        // Senders may outlive the client. The connection does not.
        self.outlet.close();
    }
}

impl<S, R, C> fmt::Debug for HubClient<S, R, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("HubClient")
            .field("url", &self.config.url)
            .field("connected", &self.outlet.is_open())
            .finish_non_exhaustive()
    }
}

/// Sends messages on a [`HubClient`]'s connection, the present one and those after a reconnect. Does not keep the
/// connection open: it ends with the client.
pub struct HubSender<S, C> {
    outlet: Arc<Outlet>,
    types: PhantomData<fn(S, C)>,
}

impl<S, C: Encode<S>> HubSender<S, C> {
    /// Queues a message; see [`HubClient::send`].
    ///
    /// # Errors
    /// As for [`HubClient::send`].
    pub fn send(&self, message: S) -> Result<(), SendError<S>> {
        self.outlet.send::<S, C>(message)
    }

    /// Whether messages can be sent; see [`HubClient::is_connected`].
    pub fn is_connected(&self) -> bool {
        self.outlet.is_open()
    }
}

impl<S, C> Clone for HubSender<S, C> {
    fn clone(&self) -> Self {
        Self { outlet: Arc::clone(&self.outlet), types: PhantomData }
    }
}

impl<S, C> fmt::Debug for HubSender<S, C> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("HubSender").field("connected", &self.outlet.is_open()).finish()
    }
}

/// Stands for a message type that a [`HubClientBuilder`] has not been told. No codec can do anything with it, so
/// that what was forgotten does not compile.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Unset;
