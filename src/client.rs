//! The client of a hub, with the hub's message types and codec.
//!
//! The application owns a handle, and one task per connection owns the socket (`client/connection.rs`). Between them is
//! one bounded queue of encoded messages. To close, the handle drops the queue's sending end, so that the messages sent
//! before are written before the Close.
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
/// Callbacks run in the connection's task, one at a time and in the order of arrival; while one runs, nothing is read.
/// They must not block: give long work to a task. To answer from a callback, move a [`sender`](Self::sender) into it.
/// Each event has one callback, the last that was set. Messages that arrive before a callback is set are lost, so set
/// callbacks before [`connect`](Self::connect). A callback that panics ends the connection as [`ClientClose::Lost`]; a
/// panic in the callback of [`on_close`](Self::on_close) is logged and does not change the reason.
///
/// # Dropping
/// A dropped client writes its queued messages and sends a Close, in the background and only while the runtime exists.
/// [`disconnect`](Self::disconnect) waits for that and for the server's Close.
pub struct HubClient<S, R, C> {
    config: Config,
    callbacks: Arc<Callbacks<R>>,
    outlet: Arc<Outlet>,
    connection: Option<Connection>,
    selected_protocol: Option<HeaderValue>,
    types: PhantomData<fn(S, C)>,
}

/// The handle's part of a connection.
struct Connection {
    /// Dropped to notify the task that the outlet is closed and that the disconnect timeout starts.
    closing: oneshot::Sender<()>,
    closed: oneshot::Receiver<ClientClose>,
}

impl HubClient<Unset, Unset, JsonCodec> {
    /// A builder for a client of the hub at `url`, for example `ws://localhost:3000/ws`.
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
    /// The connection stays open.
    pub fn on_error(&mut self, callback: impl FnMut(CodecError) + Send + 'static) {
        self.callbacks.error.set(callback);
    }

    /// Calls `callback` once per connection, when it has ended, with the reason.
    pub fn on_close(&mut self, callback: impl FnMut(ClientClose) + Send + 'static) {
        self.callbacks.close.set(callback);
    }

    /// Opens the connection. After it has ended, for any reason, `connect` opens a new one.
    ///
    /// # Errors
    /// [`ClientError`]; no connection remains open, and `connect` can be called again.
    pub async fn connect(&mut self) -> Result<(), ClientError> {
        if self.is_connected() {
            return Err(ClientError::AlreadyConnected);
        }
        let opening = transport::open(&self.config);
        let (socket, life, response) =
            timeout(self.config.connect_timeout, opening).await.map_err(|_| ClientError::TimedOut)??;

        let (outgoing, queue) = mpsc::channel(self.config.queue_messages);
        let (closing, is_closing) = oneshot::channel();
        let (report_closed, closed) = oneshot::channel();
        let timeouts =
            Timeouts { disconnect: self.config.disconnect_timeout, silence: self.config.silence_timeout };
        tokio::spawn(connection::run::<R, C>(
            (socket, life),
            queue,
            is_closing,
            report_closed,
            Arc::clone(&self.callbacks),
            timeouts,
        ));
        self.selected_protocol = response.headers().get(header::SEC_WEBSOCKET_PROTOCOL).cloned();
        self.connection = Some(Connection { closing, closed });
        self.outlet.open(outgoing);
        Ok(())
    }

    /// Whether messages can be sent: true from a successful [`connect`](Self::connect) until either side closes or
    /// the connection is lost. A server that disappears without closing is noticed when it is silent for longer than
    /// the silence timeout (45 s by default); see [`with_silence_timeout`](HubClientBuilder::with_silence_timeout).
    pub fn is_connected(&self) -> bool {
        self.outlet.is_open()
    }

    /// The subprotocol that the server selected at the last [`connect`](Self::connect), if any.
    pub fn selected_protocol(&self) -> Option<&HeaderValue> {
        self.selected_protocol.as_ref()
    }

    /// Queues a message. It is encoded at once and written later by the connection's task; `Ok` does not mean that it
    /// has arrived. Never blocks.
    ///
    /// # Errors
    /// [`SendError`], which returns the message: the queue is full (backpressure: the server reads more slowly than the
    /// client sends), there is no connection, or the codec refuses the message.
    pub fn send(&self, message: S) -> Result<(), SendError<S>> {
        self.outlet.send::<S, C>(message)
    }

    /// A handle that can only send. It can be cloned and moved into callbacks and tasks.
    pub fn sender(&self) -> HubSender<S, C> {
        HubSender { outlet: Arc::clone(&self.outlet), types: PhantomData }
    }

    /// Closes the connection: writes the queued messages, sends a Close and waits for the server's Close.
    ///
    /// Returns how the connection ended, which may have been earlier and by the server, or `None` if the client was not
    /// connected. Takes no longer than the disconnect timeout (5 s by default), unless a callback blocks.
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

/// Sends messages on a [`HubClient`]'s connection, the current one and each later one. It does not keep the connection
/// open: the connection closes when the client is dropped.
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

/// Placeholder for a message type that has not been set on a [`HubClientBuilder`]. No codec supports it, so a forgotten
/// type is a compile error.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Unset;
