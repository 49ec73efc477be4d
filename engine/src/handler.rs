//! What the engine asks of an application: one handler for each connection.
//!
//! A plain trait with bytes; there is no future in it. A handler lives on its
//! connection's shard and is called there, one call at a time. One that cannot go on
//! answers `Pending`, keeps a waker from the context, and is called again when it was
//! woken; until then messages are held for it, and
//! its connection is soon not read any more (promise 7). Knows ids, frames and close
//! reasons. Does not know sockets.

use std::sync::Arc;
use std::task::{Poll, Wake, Waker};

use crate::close_code::{CloseCode, InvalidCloseCode};
use crate::close_reason::CloseReason;
use crate::drop_notice::DropNotice;
use crate::frame::MessageKind;
use crate::id::ConnectionId;
use crate::mailbox::Queued;
use crate::position::Position;

/// Makes the handler of a connection that has been given an id, on its shard.
pub type MakeHandler = Box<dyn FnOnce(ConnectionId) -> Box<dyn Handler> + Send>;

/// Handles one connection, on its shard. It is made there and never leaves it.
///
/// A call must not block: the shard's other connections wait meanwhile. A panic ends this
/// connection (1011) and harms no other.
pub trait Handler {
    /// The connection is open. No message is handed over before this is `Ready`. Until then nothing that is published
    /// to everyone reaches the connection, only what is sent to it alone or to groups that it has joined.
    ///
    /// What this method sends to everyone does not reach its own connection. If it returns `Ready` at once, that holds for what
    /// it has sent on this thread; what others send on its behalf, it must have awaited: by `Pending`, and `Ready` from
    /// [`on_resume`](Self::on_resume).
    fn on_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let _ = context;
        Poll::Ready(())
    }

    /// A whole message has arrived. Payloads of text are valid UTF-8.
    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()>;

    /// Frames for this connection were dropped by the policy. Called once for each cause and group since the last
    /// calls; not while another call is pending, but before the next message and before the end.
    fn on_drop(&mut self, notice: &DropNotice, context: &mut Context<'_>) -> Poll<()> {
        let _ = (notice, context);
        Poll::Ready(())
    }

    /// A waker from the context was woken, after a call that answered `Pending`.
    fn on_resume(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let _ = context;
        Poll::Ready(())
    }

    /// The connection has ended; called exactly once, after the last `Pending` was resolved and the messages that came
    /// before the end were handled.
    /// The handler is dropped when this, or the `on_resume` after it, is `Ready`.
    fn on_close(&mut self, reason: &CloseReason, context: &mut Context<'_>) -> Poll<()> {
        let _ = (reason, context);
        Poll::Ready(())
    }
}

/// A message: what the application means, in one or more frames on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// Whether it came as text or as binary.
    pub kind: MessageKind,
    /// Its bytes; valid UTF-8 if the kind is text.
    pub payload: &'a [u8],
}

/// What a handler may ask of its connection during a call.
#[derive(Debug)]
pub struct Context<'a> {
    id: ConnectionId,
    position: Position,
    post: &'a Arc<dyn ResumeQueue>,
    resume: &'a mut Option<Arc<Resume>>,
    close: Option<CloseReason>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(
        id: ConnectionId,
        position: Position,
        post: &'a Arc<dyn ResumeQueue>,
        resume: &'a mut Option<Arc<Resume>>,
    ) -> Self {
        Self { id, position, post, resume, close: None }
    }

    /// The connection's id.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// How far the connection has come in the order: publications before this place have been queued for it, were dropped,
    /// or were not for it; those behind it come later.
    pub fn position(&self) -> Position {
        self.position
    }

    /// A waker that brings about `on_resume`. May be woken from any thread, at any time, more than once.
    pub fn waker(&mut self) -> Waker {
        let (post, id) = (self.post, self.id);
        let fresh = || Arc::new(Resume { post: post.clone(), id, queued: Queued::new() });
        self.resume.get_or_insert_with(fresh).clone().into()
    }

    /// Ends the connection after this call; the first reason counts. A code of the application's that cannot be sent
    /// is logged as an error and replaced by 1011.
    pub fn close(&mut self, mut reason: CloseReason) {
        if let CloseReason::Application { code, .. } = &mut reason
            && !code.is_valid_on_wire()
        {
            let error = InvalidCloseCode(*code);
            tracing::error!(id = %self.id, %error, "a handler closed its connection with a code that cannot be sent");
            *code = CloseCode::INTERNAL_ERROR;
        }
        self.close.get_or_insert(reason);
    }

    pub(crate) fn into_close(self) -> Option<CloseReason> {
        self.close
    }
}

/// Where resumes are posted: the shards' mailboxes, which this file need not know.
pub(crate) trait ResumeQueue: std::fmt::Debug + Send + Sync {
    fn resume(&self, id: ConnectionId);
}

/// Posts the connection's id to its shard, at most once until the shard has taken it.
#[derive(Debug)]
pub(crate) struct Resume {
    post: Arc<dyn ResumeQueue>,
    id: ConnectionId,
    queued: Queued,
}

impl Resume {
    /// The shard is about to resume: a wake from now on counts anew.
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
            self.post.resume(self.id);
        }
    }
}
