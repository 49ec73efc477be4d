//! Handlers for the engine's tests: one that records its calls, and some that do one thing.
//!
//! Owned by the shard that calls them; what they record is shared with the test.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context as TaskContext, Poll, Waker};

use shardcast_engine::{
    Address, CloseCode, CloseReason, ConnectionId, Context, DropNotice, Handler, Message, Namespace, Payload,
    Publication, PublishError,
};

use crate::task::lock;

/// What a handler was told, and how it must answer.
#[derive(Debug, Default, Clone)]
pub struct Record {
    /// Of its connection, once that is open.
    pub id: Option<ConnectionId>,
    /// The messages it was given.
    pub messages: Vec<String>,
    /// How often it was resumed.
    pub resumes: usize,
    /// How many frames each `on_drop` reported.
    pub drops: Vec<u64>,
    /// What each `on_drop` reported, with cause and group.
    pub drop_notices: Vec<DropNotice>,
    /// How many messages each `on_rate_limited` reported.
    pub rate_limited: Vec<u64>,
    /// The calls in their order: a message's text, `drop`, `rate limited`, `close`.
    pub calls: Vec<String>,
    /// Whether `on_open` must answer `Pending`.
    pub waits_at_open: bool,
    /// Whether `on_drop` must answer `Pending`.
    pub waits_at_drop: bool,
    /// The reasons it was given at the end; more than one would be a fault.
    pub ends: Vec<CloseReason>,
    /// Whether the engine has dropped the handler.
    pub is_dropped: bool,
    /// The waker of the last call that answered `Pending`.
    pub waker: Option<Waker>,
}

/// Records its calls and does what a message says: `wait…` (answers `Pending` until [`Client::release`]), `panic`, `close`
/// (with code 4000); anything else is only recorded.
///
/// [`Client::release`]: crate::client::Client::release
#[derive(Debug)]
pub(crate) struct Recorder(pub(crate) Arc<Mutex<Record>>);

impl Handler for Recorder {
    fn on_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut record = lock(&self.0);
        record.id = Some(context.id());
        if record.waits_at_open {
            record.waker = Some(context.waker());
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        let text = String::from_utf8_lossy(message.payload).into_owned();
        let mut record = lock(&self.0);
        record.messages.push(text.clone());
        record.calls.push(text.clone());
        if text.starts_with("wait") {
            record.waker = Some(context.waker());
            return Poll::Pending;
        }
        drop(record);
        assert_ne!(text, "panic", "on request");
        if text == "close" {
            let code = CloseCode(4000);
            context.close(CloseReason::Application { code, text: "on request".into() });
        }
        Poll::Ready(())
    }

    fn on_drop(&mut self, notice: &DropNotice, context: &mut Context<'_>) -> Poll<()> {
        let mut record = lock(&self.0);
        record.drops.push(notice.frames);
        record.drop_notices.push(notice.clone());
        record.calls.push("drop".into());
        if record.waits_at_drop {
            record.waker = Some(context.waker());
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    fn on_rate_limited(&mut self, messages: u64, _: &mut Context<'_>) -> Poll<()> {
        let mut record = lock(&self.0);
        record.rate_limited.push(messages);
        record.calls.push("rate limited".into());
        Poll::Ready(())
    }

    fn on_resume(&mut self, _: &mut Context<'_>) -> Poll<()> {
        let mut record = lock(&self.0);
        record.resumes += 1;
        match record.waker {
            Some(_) => Poll::Pending,
            None => Poll::Ready(()),
        }
    }

    fn on_close(&mut self, reason: &CloseReason, _: &mut Context<'_>) -> Poll<()> {
        let mut record = lock(&self.0);
        record.ends.push(reason.clone());
        record.calls.push("close".into());
        Poll::Ready(())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        lock(&self.0).is_dropped = true;
    }
}

/// Publishes to everyone what it receives, and is busy until the engine has accepted it.
pub(crate) struct Broadcaster {
    everyone: Namespace,
    ends: Arc<Mutex<Vec<CloseReason>>>,
    sending: Option<Sending>,
}

impl Broadcaster {
    /// `ends` gets the reasons for which the connection ended.
    pub(crate) fn new(everyone: Namespace, ends: Arc<Mutex<Vec<CloseReason>>>) -> Self {
        Self { everyone, ends, sending: None }
    }
}

type Sending = Pin<Box<dyn Future<Output = Result<(), PublishError>> + Send>>;

impl Handler for Broadcaster {
    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        let everyone = self.everyone.clone();
        let publication = Publication::message(Address::Everyone, Payload::binary(message.payload));
        self.sending = Some(Box::pin(async move { everyone.publish(publication).await }));
        self.on_resume(context)
    }

    fn on_resume(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(sending) = &mut self.sending else { return Poll::Ready(()) };
        if sending.as_mut().poll(&mut TaskContext::from_waker(&context.waker())).is_pending() {
            return Poll::Pending;
        }
        self.sending = None;
        Poll::Ready(())
    }

    fn on_close(&mut self, reason: &CloseReason, _: &mut Context<'_>) -> Poll<()> {
        lock(&self.ends).push(reason.clone());
        Poll::Ready(())
    }
}

/// Answers `Pending` when its connection has ended; its waker is then in the mutex.
#[derive(Debug)]
pub struct SlowToPart(pub Arc<Mutex<Option<Waker>>>);

impl Handler for SlowToPart {
    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn on_close(&mut self, _: &CloseReason, context: &mut Context<'_>) -> Poll<()> {
        *lock(&self.0) = Some(context.waker());
        Poll::Pending
    }
}

/// Closes its connection, with code 4000, when frames for it are dropped.
#[derive(Debug)]
pub struct ClosesAtDrop;

impl Handler for ClosesAtDrop {
    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn on_drop(&mut self, _: &DropNotice, context: &mut Context<'_>) -> Poll<()> {
        context.close(CloseReason::Application { code: CloseCode(4000), text: "too slow".into() });
        Poll::Ready(())
    }
}
