//! The socket: a connection's messages, read and written by the application's own task.
//!
//! Two ends of one bounded queue: the engine's handler puts what arrives into it, on the connection's shard, and
//! `WebSocket` takes it out, in any task. What is sent goes through the engine like every message to one client, so it
//! has its place in the order. Does not know the upgrade, hubs or groups.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use axum::Error;
use bytes::Bytes;
use futures_util::{Sink, Stream, future, stream::FusedStream};
use http::HeaderValue;
use shardcast_backplane::NodeId;
use shardcast_engine::{
    Address, CloseCode, CloseReason, ConnectionId, Context as HandlerContext, Control, Handler,
    Message as Incoming, MessageKind, Namespace, Payload, Publication,
};

use super::message::{CloseFrame, Message, Utf8Bytes};
use crate::clients::PublishError;

/// Bytes and messages that wait for `recv`. At either limit the handler is busy, and the shard reads only what it may
/// hold for a busy handler.
const WAITING_BYTES_MAX: usize = 16 << 10;
const WAITING_MESSAGES_MAX: usize = 64;

/// A WebSocket that the application's task reads and writes; see [the module](crate::ws).
///
/// It is a `Stream` and a `Sink` of [`Message`]s, so it can be [split](futures_util::StreamExt::split) into two halves
/// for two tasks.
///
/// Dropped, it closes the connection with 1000, or with 1011 in a panic, after what was sent before.
pub struct WebSocket {
    link: Arc<Link>,
    namespace: Namespace,
    id: crate::ConnectionId,
    protocol: Option<HeaderValue>,
    /// What a `Sink` was given last, until the connection has accepted it.
    sending: Option<Sending>,
    /// A Close frame was sent: no message may follow.
    is_closed: bool,
    /// Everything has been read.
    is_over: bool,
}

type Sending = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

/// What the shard and the application's task share. Locked by these two only, and by each for one push or pop.
#[derive(Default)]
pub(super) struct Link {
    inbox: Mutex<Inbox>,
}

#[derive(Default)]
struct Inbox {
    messages: VecDeque<Message>,
    bytes: usize,
    /// The task that waits for a message.
    reader: Option<Waker>,
    /// The handler, while it waits for room.
    handler: Option<Waker>,
    /// Why the connection ended; nothing is pushed after it.
    end: Option<CloseReason>,
    /// `end` is still to be read as an error.
    ends_with_error: bool,
    /// The socket was dropped: nothing is read any more.
    is_dropped: bool,
}

impl Link {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    fn has_room(&self) -> bool {
        self.is_dropped || (self.bytes < WAITING_BYTES_MAX && self.messages.len() < WAITING_MESSAGES_MAX)
    }

    fn push(&mut self, message: Message) {
        if !self.is_dropped {
            self.bytes += weight(&message);
            self.messages.push_back(message);
            self.wake_reader();
        }
    }

    fn pop(&mut self) -> Option<Message> {
        let message = self.messages.pop_front()?;
        self.bytes -= weight(&message);
        if self.messages.is_empty() {
            self.messages = VecDeque::new(); // a waiting connection keeps no buffer
        }
        if self.has_room()
            && let Some(handler) = self.handler.take()
        {
            handler.wake();
        }
        Some(message)
    }

    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

fn weight(message: &Message) -> usize {
    match message {
        Message::Text(text) => text.as_ref().len(),
        Message::Binary(bytes) | Message::Ping(bytes) | Message::Pong(bytes) => bytes.len(),
        Message::Close(_) => 0,
    }
}

/// The engine's side: puts what arrives into the queue.
pub(super) struct SocketHandler {
    link: Arc<Link>,
}

impl SocketHandler {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self { link }
    }

    fn push(&self, message: Message, context: &mut HandlerContext<'_>) -> Poll<()> {
        self.link.inbox().push(message);
        self.wait_for_room(context)
    }

    fn wait_for_room(&self, context: &mut HandlerContext<'_>) -> Poll<()> {
        let mut inbox = self.link.inbox();
        if inbox.has_room() {
            return Poll::Ready(());
        }
        inbox.handler = Some(context.waker());
        Poll::Pending
    }
}

impl Handler for SocketHandler {
    fn on_message(&mut self, message: Incoming<'_>, context: &mut HandlerContext<'_>) -> Poll<()> {
        let bytes = Bytes::copy_from_slice(message.payload);
        let message = match message.kind {
            // The engine has checked that it is UTF-8.
            MessageKind::Text => Message::Text(Utf8Bytes::try_from(bytes).unwrap_or_default()),
            MessageKind::Binary => Message::Binary(bytes),
        };
        self.push(message, context)
    }

    fn wants_control_frames(&self) -> bool {
        true
    }

    fn on_control(&mut self, frame: Control<'_>, context: &mut HandlerContext<'_>) -> Poll<()> {
        let message = match frame {
            Control::Ping(payload) => Message::Ping(Bytes::copy_from_slice(payload)),
            Control::Pong(payload) => Message::Pong(Bytes::copy_from_slice(payload)),
            Control::Close(close) => Message::Close(close.map(|(code, reason)| close_frame(code, reason))),
            _ => return Poll::Ready(()),
        };
        self.push(message, context)
    }

    fn on_resume(&mut self, context: &mut HandlerContext<'_>) -> Poll<()> {
        self.wait_for_room(context)
    }

    fn on_close(&mut self, reason: &CloseReason, _: &mut HandlerContext<'_>) -> Poll<()> {
        let mut inbox = self.link.inbox();
        match reason {
            CloseReason::Peer { code, text } => {
                inbox.push(Message::Close(code.map(|code| close_frame(code, text))))
            }
            CloseReason::Application { .. } => {}
            _ => inbox.ends_with_error = true,
        }
        inbox.end = Some(reason.clone());
        inbox.wake_reader();
        Poll::Ready(())
    }
}

impl Drop for SocketHandler {
    /// A handler may be dropped without having been told of an end, if its engine ends meanwhile.
    fn drop(&mut self) {
        let mut inbox = self.link.inbox();
        inbox.end.get_or_insert(CloseReason::Shutdown { code: CloseCode::GOING_AWAY });
        inbox.wake_reader();
    }
}

fn close_frame(code: CloseCode, reason: &str) -> CloseFrame {
    CloseFrame { code: code.into(), reason: reason.into() }
}

impl WebSocket {
    pub(super) fn new(
        link: Arc<Link>,
        namespace: Namespace,
        id: ConnectionId,
        node: Option<NodeId>,
        protocol: Option<HeaderValue>,
    ) -> Self {
        let id = crate::ConnectionId::new(node, id);
        Self { link, namespace, id, protocol, sending: None, is_closed: false, is_over: false }
    }

    /// The next message, or `None` when the connection has ended and everything has been read.
    ///
    /// The last message of a client that closes is [`Message::Close`]. Any other end that the application has not
    /// asked for is an error first: a broken connection, a fault of the client, a timeout, a shutdown. The error's
    /// source is the [`CloseReason`]. Cancel safe: a dropped future has taken no message.
    pub async fn recv(&mut self) -> Option<Result<Message, Error>> {
        future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }

    /// Sends a message, after everything that was sent before. Returns when the connection has accepted it: while the
    /// client is slow and its outbox is full, that takes until it has read enough.
    ///
    /// # Errors
    /// A connection that has ended, by its [`CloseReason`]; a Close frame that was sent before; an engine that has
    /// ended; a message that is too long. Dropping the future does not take the message back.
    pub async fn send(&mut self, message: Message) -> Result<(), Error> {
        future::poll_fn(|context| Pin::new(&mut *self).poll_ready(context)).await?;
        self.check_open()?;
        self.is_closed = matches!(message, Message::Close(_));
        send(&self.namespace, self.id.local(), message).await
    }

    /// The subprotocol that the handshake selected, if any.
    pub fn protocol(&self) -> Option<&HeaderValue> {
        self.protocol.as_ref()
    }

    /// The connection's id: what [`Clients::join`](crate::Clients::join), [`Clients::to`](crate::Clients::to) and
    /// [`Target::except`](crate::Target::except) take, if it is a [client of a hub](super::WebSocketUpgrade::client_of).
    pub fn id(&self) -> crate::ConnectionId {
        self.id
    }

    /// A handle that can close the connection when the socket is in other hands.
    pub(crate) fn closer(&self) -> Closer {
        Closer { namespace: self.namespace.clone(), id: self.id.local() }
    }

    /// Why the connection has ended, once it has.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.link.inbox().end.clone()
    }

    /// Whether a message may still be sent.
    fn check_open(&self) -> Result<(), Error> {
        if self.is_closed {
            return Err(Error::new(SendAfterClose));
        }
        self.close_reason().map_or(Ok(()), |reason| Err(Error::new(reason)))
    }
}

/// Closes a connection.
pub(crate) struct Closer {
    namespace: Namespace,
    id: ConnectionId,
}

impl Closer {
    pub(crate) fn id(&self) -> ConnectionId {
        self.id
    }

    /// Closes it after what was sent before.
    pub(crate) async fn close(&self, code: u16) {
        if let Ok(close) = Publication::close(Address::Connection(self.id), CloseCode(code), "") {
            let _ = self.namespace.publish(close).await; // the engine has ended: so has the connection
        }
    }
}

/// Gives a message to the engine; ready when the connection has accepted it.
async fn send(namespace: &Namespace, id: ConnectionId, message: Message) -> Result<(), Error> {
    let payload = match &message {
        Message::Text(text) => Payload::text(text),
        Message::Binary(bytes) => Payload::binary(bytes),
        // Boxed, because a waiting task is as large as all that it may await.
        _ => return Box::pin(send_control(namespace, id, message)).await,
    };
    drop(message);
    namespace.publish(Publication::message(Address::Connection(id), payload)).await.map_err(error)
}

async fn send_control(namespace: &Namespace, id: ConnectionId, message: Message) -> Result<(), Error> {
    let frame = match &message {
        Message::Ping(payload) => Control::Ping(payload),
        Message::Pong(payload) => Control::Pong(payload),
        Message::Close(Some(close)) => Control::Close(Some((CloseCode(close.code), &close.reason))),
        _ => Control::Close(None),
    };
    namespace.send_control(id, frame).await.map_err(error)
}

fn error(error: shardcast_engine::PublishError) -> Error {
    Error::new(PublishError::from(error))
}

/// A message was to be sent after a Close frame.
#[derive(Debug, thiserror::Error)]
#[error("a Close frame was sent: no message may follow it")]
struct SendAfterClose;

impl Stream for WebSocket {
    type Item = Result<Message, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let mut inbox = this.link.inbox();
        if let Some(message) = inbox.pop() {
            return Poll::Ready(Some(Ok(message)));
        }
        let Some(end) = &inbox.end else {
            if inbox.reader.as_ref().is_none_or(|reader| !reader.will_wake(context.waker())) {
                inbox.reader = Some(context.waker().clone());
            }
            return Poll::Pending;
        };
        let error = inbox.ends_with_error.then(|| Error::new(end.clone()));
        inbox.ends_with_error = false;
        this.is_over |= error.is_none();
        Poll::Ready(error.map(Err))
    }
}

impl FusedStream for WebSocket {
    fn is_terminated(&self) -> bool {
        self.is_over
    }
}

impl Sink<Message> for WebSocket {
    type Error = Error;

    fn poll_ready(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        if let Some(sending) = &mut self.sending {
            let sent = ready!(sending.as_mut().poll(context));
            self.sending = None;
            return Poll::Ready(sent);
        }
        Poll::Ready(Ok(()))
    }

    fn start_send(mut self: Pin<&mut Self>, message: Message) -> Result<(), Error> {
        self.check_open()?;
        self.is_closed = matches!(message, Message::Close(_));
        let (namespace, id) = (self.namespace.clone(), self.id.local());
        self.sending = Some(Box::pin(async move { send(&namespace, id, message).await }));
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.poll_ready(context)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        ready!(self.as_mut().poll_ready(context))?;
        if self.check_open().is_ok() {
            self.as_mut().start_send(Message::Close(None))?;
        }
        self.poll_ready(context)
    }
}

impl Drop for WebSocket {
    fn drop(&mut self) {
        let is_over = {
            let mut inbox = self.link.inbox();
            inbox.is_dropped = true;
            (inbox.messages, inbox.bytes, inbox.reader) = (VecDeque::new(), 0, None);
            if let Some(handler) = inbox.handler.take() {
                handler.wake();
            }
            inbox.end.is_some()
        };
        if is_over {
            return;
        }
        let code = if std::thread::panicking() { CloseCode::INTERNAL_ERROR } else { CloseCode::NORMAL };
        let Ok(close) = Publication::close(Address::Connection(self.id.local()), code, "") else { return };
        let sending = self.sending.take();
        if sending.is_none() && self.namespace.try_publish(close.clone()).is_ok() {
            return;
        }
        // After what is still to be accepted, or when the shard's mailbox has room.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let namespace = self.namespace.clone();
            runtime.spawn(async move {
                if let Some(sending) = sending {
                    let _ = sending.await;
                }
                let _ = namespace.publish(close).await;
            });
        }
    }
}

impl fmt::Debug for WebSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebSocket")
            .field("id", &self.id)
            .field("protocol", &self.protocol)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_socket_and_its_task_cost_a_known_amount_of_memory() {
        fn size<'a, F>(_: impl Fn(&'a Namespace, ConnectionId, Message) -> F) -> usize {
            size_of::<F>()
        }
        assert_eq!((size_of::<WebSocket>(), size_of::<Link>(), size(send)), (112, 120, 256));
    }
}
