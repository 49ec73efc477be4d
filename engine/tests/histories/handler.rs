//! The handler: executes what a message asks for, and records how it is called.
//!
//! A message begins with its number; one byte gives the action. Every call is checked against the engine's
//! guarantees to handlers: none while one is pending, none after `on_close`.

use std::task::{Poll, Waker};

use shardcast_engine::{
    Address, CloseCode, CloseReason, Context, DropNotice, Handler, Message, Namespace, Policy, Publication,
};
use testkit::lock;

use super::ON_PURPOSE;
use super::model::{GROUPS, Model, Shared, Target, USERS};
use super::peer::{number_in, numbered_frame};

/// The actions that a message can ask of its handler.
pub(crate) mod action {
    pub(crate) const NOTHING: u8 = 0;
    pub(crate) const WAIT: u8 = 1;
    pub(crate) const CLOSE: u8 = 2;
    pub(crate) const PANIC: u8 = 3;
    pub(crate) const PUBLISH_TO_EVERYONE: u8 = 4;
    pub(crate) const PUBLISH_TO_ITSELF: u8 = 5;
    pub(crate) const PUBLISH_TO_A_GROUP: u8 = 6;
    pub(crate) const PUBLISH_AND_WAIT: u8 = 7;
}

/// What was reported to a handler, and how it answers.
#[derive(Debug, Default)]
pub(crate) struct Record {
    /// The numbers of its messages.
    pub(crate) messages: Vec<u32>,
    /// Frames whose drop was reported to it.
    pub(crate) drops: u64,
    /// Messages that were dropped for their rate, as was reported to it.
    pub(crate) rate_limited: u64,
    pub(crate) ends: Vec<CloseReason>,
    /// It has panicked or closed, and must get no more messages.
    pub(crate) has_enough: bool,
    /// A call has answered `Pending`.
    pub(crate) is_busy: bool,
    /// Wakes a call that answered `Pending`.
    pub(crate) waker: Option<Waker>,
    pub(crate) is_dropped: bool,
    pub(crate) is_opening: bool,
    pub(crate) waits_at_open: bool,
    pub(crate) waits_at_drop: bool,
    pub(crate) waits_at_close: bool,
    /// Wakes itself before the shard knows that it is busy.
    pub(crate) wakes_early: bool,
}

impl Record {
    pub(crate) fn has_ended(&self) -> bool {
        !self.ends.is_empty() || self.is_dropped
    }
}

pub(crate) struct Obedient {
    pub(crate) client: usize,
    pub(crate) record: Shared<Record>,
    pub(crate) model: Shared<Model>,
    pub(crate) namespaces: Vec<Namespace>,
}

impl Obedient {
    fn note_call(&self, of: &str) {
        let record = lock(&self.record);
        let fault = |text: &str| {
            lock(&self.model).faults.push(format!("{of} of {} is called {text}", self.client));
        };
        if record.is_busy {
            fault("while it is busy");
        }
        if !record.ends.is_empty() {
            fault("after on_close");
        }
    }

    fn wait(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut record = lock(&self.record);
        record.is_busy = true;
        let waker = context.waker();
        if record.wakes_early {
            waker.wake_by_ref();
        }
        record.waker = Some(waker);
        Poll::Pending
    }

    fn wait_if(&self, waits: impl Fn(&Record) -> bool, context: &mut Context<'_>) -> Poll<()> {
        let waits = waits(&lock(&self.record));
        if waits { self.wait(context) } else { Poll::Ready(()) }
    }

    fn publish(&self, target: &Target, bytes: usize) {
        let mut model = lock(&self.model);
        let client = &model.clients[self.client];
        let (namespace, id) = (client.namespace, client.id.unwrap());
        let (to, policy) = match target {
            Target::Everyone => (Address::Everyone, None),
            Target::Groups(groups) => (Address::group(GROUPS[groups[0]]), None),
            Target::Users(users) => (Address::user(USERS[users[0]]), None),
            Target::Client(_) => (Address::Connection(id), Some(Policy::Block)),
        };
        let number = model.new_frame(policy);
        // Publishing calls nothing that would take the model's lock.
        if self.namespaces[namespace]
            .try_publish(Publication::message(&to, numbered_frame(number, bytes)))
            .is_ok()
        {
            model.frame_accepted(number, namespace, target, &[]);
        }
    }
}

impl Handler for Obedient {
    fn on_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.note_call("on_open");
        lock(&self.model).clients[self.client].id = Some(context.id());
        let waits = lock(&self.record).waits_at_open;
        lock(&self.record).is_opening = waits;
        if waits { self.wait(context) } else { Poll::Ready(()) }
    }

    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        self.note_call("on_message");
        let is_last = matches!(message.payload[4], action::CLOSE | action::PANIC);
        {
            let mut record = lock(&self.record);
            if std::mem::replace(&mut record.has_enough, is_last) {
                let text = format!("on_message of {} is called after it has closed or panicked", self.client);
                lock(&self.model).faults.push(text);
            }
            record.messages.push(number_in(message.payload));
        }
        match message.payload[4] {
            action::WAIT => return self.wait(context),
            action::CLOSE => {
                lock(&self.model).may_close(self.client);
                context.close(CloseReason::Application { code: CloseCode(4001), text: "handler".into() });
            }
            action::PANIC => panic!("{}", ON_PURPOSE),
            action::PUBLISH_TO_EVERYONE => self.publish(&Target::Everyone, 40),
            action::PUBLISH_TO_ITSELF => self.publish(&Target::Client(self.client), 300),
            action::PUBLISH_TO_A_GROUP => self.publish(&Target::Groups(vec![0]), 3000),
            action::PUBLISH_AND_WAIT => {
                self.publish(&Target::Everyone, 10);
                return self.wait(context);
            }
            _ => {}
        }
        Poll::Ready(())
    }

    fn on_drop(&mut self, notice: &DropNotice, context: &mut Context<'_>) -> Poll<()> {
        self.note_call("on_drop");
        lock(&self.record).drops += notice.frames;
        self.wait_if(|record| record.waits_at_drop, context)
    }

    fn on_rate_limited(&mut self, messages: u64, context: &mut Context<'_>) -> Poll<()> {
        self.note_call("on_rate_limited");
        lock(&self.record).rate_limited += messages;
        self.wait_if(|record| record.waits_at_drop, context)
    }

    fn on_resume(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut record = lock(&self.record);
        if record.waker.is_some() {
            let _ = context.waker();
            return Poll::Pending;
        }
        if !std::mem::take(&mut record.is_busy) {
            let text = format!("on_resume of {} is called while it is not busy", self.client);
            lock(&self.model).faults.push(text);
        }
        if std::mem::take(&mut record.is_opening) {
            lock(&self.model).clients[self.client].has_entered = true;
        }
        Poll::Ready(())
    }

    fn on_close(&mut self, reason: &CloseReason, context: &mut Context<'_>) -> Poll<()> {
        self.note_call("on_close");
        lock(&self.record).ends.push(reason.clone());
        self.wait_if(|record| record.waits_at_close, context)
    }
}

impl Drop for Obedient {
    fn drop(&mut self) {
        lock(&self.record).is_dropped = true;
    }
}
