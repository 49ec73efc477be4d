//! What the engine asks of an application: one handler for each connection.
//!
//! A plain trait with bytes, without futures. A handler lives on its connection's shard and is called there,
//! one call at a time. A handler that must wait answers `Pending`, keeps a waker from the context, and is
//! called again after the waker was woken. Until then messages are held for it, and soon its connection is no
//! longer read (backpressure). Knows ids, frames and close reasons. Does not know sockets.

use std::sync::Arc;
use std::task::{Poll, Wake, Waker};

use crate::close_code::{CloseCode, InvalidCloseCode};
use crate::close_reason::CloseReason;
use crate::drop_notice::DropNotice;
use crate::frame::MessageKind;
use crate::id::ConnectionId;
use crate::mailbox::Queued;
use crate::position::Position;

/// Makes the handler of a connection, on the connection's shard, once the connection has its id.
pub type MakeHandler = Box<dyn FnOnce(ConnectionId) -> Box<dyn Handler> + Send>;

/// Handles one connection, on its shard. It is made there and never leaves it.
///
/// A call must not block: the shard's other connections wait meanwhile. A panic ends this connection (1011)
/// and affects no other.
pub trait Handler {
    /// The connection is open. No message is passed to the handler before this is `Ready`. Until then nothing that is
    /// published to everyone reaches the connection, only what is sent to it alone or to groups that it has joined.
    ///
    /// What this method sends to everyone does not reach its own connection. If the method returns `Ready` at
    /// once, that holds for everything that it has sent on this thread; what other threads send on its
    /// behalf, it must have awaited: by `Pending`, and `Ready` from [`on_resume`](Self::on_resume).
    fn on_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let _ = context;
        Poll::Ready(())
    }

    /// Messages may have arrived for several handlers, this one among them. Called before any of them gets its own, for
    /// a handler that reads something of each piece of memory that it will need, as a hint to the CPU: it then fetches
    /// the memory of all of them at the same time, and not of one after the other. Must have no effect.
    fn prefetch(&self) {}

    /// A whole message has arrived. A text message's payload is valid UTF-8.
    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()>;

    /// Whether [`on_control`](Self::on_control) is called; asked for each control frame.
    fn wants_control_frames(&self) -> bool {
        false
    }

    /// A control frame has arrived, in its place among the messages. The engine has answered a ping already. Not called
    /// for pongs that answer the engine's own pings, nor for a Close frame that ends the connection, which is the reason
    /// in [`on_close`](Self::on_close).
    fn on_control(&mut self, frame: Control<'_>, context: &mut Context<'_>) -> Poll<()> {
        let _ = (frame, context);
        Poll::Ready(())
    }

    /// The connection has reached the expiry time set by [`Namespace::expire_at`](crate::Namespace::expire_at). By
    /// default it ends with [`CloseReason::Expired`]; a handler may set a new time instead. Not called while another call
    /// is pending; if that call takes longer than [`close_timeout`](crate::ConnectionConfig::close_timeout), the
    /// connection ends without this call.
    fn on_expired(&mut self, context: &mut Context<'_>) -> Poll<()> {
        context.close(CloseReason::Expired);
        Poll::Ready(())
    }

    /// The policy dropped frames for this connection. Called once for each cause and group since the last
    /// calls; not while another call is pending, but before the next message and before the end.
    /// Frames that expire after the connection began to close are counted and not reported here; a handler that has
    /// panicked is not notified.
    fn on_drop(&mut self, notice: &DropNotice, context: &mut Context<'_>) -> Poll<()> {
        let _ = (notice, context);
        Poll::Ready(())
    }

    /// So many messages from the client, at least 1, were dropped because it exceeded its rate limit
    /// ([`OverLimit::Drop`](crate::OverLimit)), since the last call. Called at the first one, then at most once a
    /// second while more are dropped, and before the end; not while another call is pending. A handler that has
    /// panicked is not notified.
    fn on_rate_limited(&mut self, messages: u64, context: &mut Context<'_>) -> Poll<()> {
        let _ = (messages, context);
        Poll::Ready(())
    }

    /// A waker from the context was woken after a call that answered `Pending`.
    fn on_resume(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let _ = context;
        Poll::Ready(())
    }

    /// The connection has ended. Called exactly once, after the last `Pending` was resolved and the messages
    /// before the end were handled. The handler is dropped when this, or the `on_resume` after it, is `Ready`.
    fn on_close(&mut self, reason: &CloseReason, context: &mut Context<'_>) -> Poll<()> {
        let _ = (reason, context);
        Poll::Ready(())
    }
}

/// A whole message, which may have arrived in several frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Whether it arrived as text or as binary.
    pub kind: MessageKind,
    /// Its bytes; valid UTF-8 if the kind is text.
    pub payload: &'a [u8],
}

/// A control frame from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Control<'a> {
    /// A ping, with at most 125 bytes.
    Ping(&'a [u8]),
    /// A pong, with at most 125 bytes.
    Pong(&'a [u8]),
    /// The answer to a Close frame that [`Namespace::close_and_listen`](crate::Namespace::close_and_listen) has sent.
    Close(Option<(CloseCode, &'a str)>),
}

/// What is passed to a handler in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input<'a> {
    Message(Message<'a>),
    Control(Control<'a>),
}

impl Input<'_> {
    pub(crate) fn is_message(&self) -> bool {
        matches!(self, Self::Message(_))
    }

    pub(crate) fn pass_to(self, handler: &mut dyn Handler, context: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Message(message) => handler.on_message(message, context),
            Self::Control(frame) => handler.on_control(frame, context),
        }
    }
}

/// What a handler can do with its connection during a call.
#[derive(Debug)]
pub struct Context<'a> {
    id: ConnectionId,
    position: Position,
    resume_queue: &'a Arc<dyn ResumeQueue>,
    resume: &'a mut Option<Arc<Resume>>,
    close: Option<CloseReason>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(
        id: ConnectionId,
        position: Position,
        resume_queue: &'a Arc<dyn ResumeQueue>,
        resume: &'a mut Option<Arc<Resume>>,
    ) -> Self {
        Self { id, position, resume_queue, resume, close: None }
    }

    /// The connection's id.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// The connection's position in the order: publications before it have been queued for the connection,
    /// were dropped, or did not address it; those after it will come later.
    pub fn position(&self) -> Position {
        self.position
    }

    /// A waker that causes a call of `on_resume`. May be woken from any thread, at any time, more than once.
    pub fn waker(&mut self) -> Waker {
        let (resume_queue, id) = (self.resume_queue, self.id);
        let fresh = || Arc::new(Resume { resume_queue: resume_queue.clone(), id, queued: Queued::new() });
        self.resume.get_or_insert_with(fresh).clone().into()
    }

    /// Ends the connection after this call; the first reason counts. An application's code that cannot be
    /// sent is logged as an error and replaced by 1011.
    pub fn close(&mut self, mut reason: CloseReason) {
        if let CloseReason::Application { code, .. } = &mut reason
            && !code.is_valid_on_wire()
        {
            let error = InvalidCloseCode(*code);
            tracing::error!(id = %self.id, %error, "a handler closed with an invalid code: 1011 is sent instead");
            *code = CloseCode::INTERNAL_ERROR;
        }
        self.close.get_or_insert(reason);
    }

    pub(crate) fn into_close(self) -> Option<CloseReason> {
        self.close
    }
}

/// Where resumes are queued: the shards' mailboxes, which this file does not have to know.
pub(crate) trait ResumeQueue: std::fmt::Debug + Send + Sync {
    fn resume(&self, id: ConnectionId);
}

/// Queues the connection's id at its shard, at most once until the shard has taken it.
#[derive(Debug)]
pub(crate) struct Resume {
    resume_queue: Arc<dyn ResumeQueue>,
    id: ConnectionId,
    queued: Queued,
}

impl Resume {
    /// The shard is about to resume the handler: a wake from now on queues the id again.
    pub(crate) fn taken(&self) {
        self.queued.taken();
    }
}

impl Wake for Resume {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.set() {
            self.resume_queue.resume(self.id);
        }
    }
}
