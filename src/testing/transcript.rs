//! The transcript: everything that a test's client has received, and how its connection ended.
//!
//! Written by the client's task, read by the client's handle and by its server, whose assertions show it when they fail.
//! Nothing is removed from it. Does not know sockets or codecs.

use std::fmt::{self, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};

use shardcast_engine::CloseCode;
use tokio::sync::Notify;

use crate::codec::RawMessage;

/// How much of a message, and how many messages, a failed assertion shows.
const SHOWN_CHARS: usize = 400;
const SHOWN_MESSAGES: usize = 50;

/// How a connection ended, as its client saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Closed {
    /// The code in the server's Close frame: [`CloseCode::NO_STATUS`] if the frame was empty, none without a Close frame.
    pub code: Option<CloseCode>,
    /// The reason in the server's Close frame; without one, what ended the stream.
    pub reason: String,
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(f, "closed with {code}: {:?}", self.reason),
            None => write!(f, "ended without a Close frame: {}", self.reason),
        }
    }
}

#[derive(Debug)]
pub(super) struct Transcript {
    /// What a failed assertion calls the client.
    name: String,
    record: Mutex<Record>,
    changed: Notify,
}

#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) messages: Vec<RawMessage>,
    pub(super) pongs: u64,
    pub(super) end: Option<Closed>,
}

impl Transcript {
    pub(super) fn new(name: String) -> Self {
        Self { name, record: Mutex::default(), changed: Notify::new() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A test that has panicked still reads it.
    pub(super) fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.record());
        self.changed.notify_waiters();
    }

    /// Waits until the record has what is looked for.
    pub(super) async fn find<T>(&self, mut look: impl FnMut(&Record) -> Option<T>) -> T {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable(); // before the look: a change after it is not missed
            if let Some(found) = look(&self.record()) {
                return found;
            }
            changed.await;
        }
    }

    /// For a failed assertion: all that has arrived, of which the first `read` messages have been asserted before.
    pub(super) fn text(&self, read: usize) -> String {
        let record = self.record();
        let count = record.messages.len();
        let mut text = match count {
            0 => format!("{} has received nothing", self.name),
            1 => format!("{} has received 1 message:", self.name),
            _ => format!("{} has received {count} messages:", self.name),
        };
        let left_out = count.saturating_sub(SHOWN_MESSAGES);
        if left_out > 0 {
            let _ = write!(text, "\n    (the first {left_out} are left out)");
        }
        for (index, message) in record.messages.iter().enumerate().skip(left_out) {
            let mark = if index < read { "asserted before" } else { "not yet asserted" };
            let _ = write!(text, "\n    {}. {} ({mark})", index + 1, Shown(message));
        }
        match &record.end {
            Some(end) => drop(write!(text, "\n  its connection was {end}")),
            None => text.push_str("\n  its connection is open"),
        }
        text
    }
}

/// A message as a failed assertion shows it.
pub(super) struct Shown<'a>(pub(super) &'a RawMessage);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, text) = match self.0 {
            RawMessage::Text(text) => ("text", format!("{text:?}")),
            RawMessage::Binary(bytes) => ("binary", format!("{bytes:?}")),
        };
        let shown: String = text.chars().take(SHOWN_CHARS).collect();
        let more = if shown.len() < text.len() { " …" } else { "" };
        write!(f, "{kind} {shown}{more}")
    }
}
