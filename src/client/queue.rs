//! The send queue: encoded messages that the socket has not been given yet.
//!
//! Shared by the handle, its senders and the client's task, and outlives connections: what is queued while the client
//! reconnects is written afterwards, in order. Bounded in messages and in bytes; what happens at the limit is a setting.
//! Messages are encoded outside the lock. Knows codecs. Does not know sockets, callbacks or time.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use shardcast_engine::MessageKind;
use tokio::sync::Notify;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::error::SendError;
use crate::codec::{CodecError, Encode};

/// What happens to a message for which the send queue has no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenFull {
    /// [`send`](super::HubClient::send) fails with [`SendError::Full`], which returns the message. The default.
    #[default]
    Refuse,
    /// The oldest queued messages are dropped to make room, and counted by
    /// [`dropped_messages`](super::HubClient::dropped_messages). For messages that later ones replace, such as positions.
    DropOldest,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) messages: usize,
    /// An empty queue accepts one message of any length.
    pub(super) bytes: usize,
    pub(super) when_full: WhenFull,
}

#[derive(Debug)]
pub(super) struct Queue {
    limits: Limits,
    state: Mutex<State>,
    /// For the one task that writes: a message, or the end.
    changed: Notify,
    /// For everyone who waits for the end.
    closed: Notify,
}

#[derive(Debug, Default)]
struct State {
    messages: VecDeque<Message>,
    bytes: usize,
    is_open: bool,
    dropped: u64,
}

impl State {
    fn pop(&mut self) -> Option<Message> {
        let message = self.messages.pop_front()?;
        self.bytes -= message.len();
        Some(message)
    }

    fn has_room(&self, bytes: usize, limits: &Limits) -> bool {
        self.messages.is_empty()
            || (self.messages.len() < limits.messages && self.bytes.saturating_add(bytes) <= limits.bytes)
    }
}

impl Queue {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), changed: Notify::new(), closed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn open(&self) {
        self.lock().is_open = true;
    }

    pub(super) fn is_open(&self) -> bool {
        self.lock().is_open
    }

    /// Accepts no more messages. Those that are queued can still be taken.
    pub(super) fn close(&self) {
        self.lock().is_open = false;
        self.changed.notify_one();
        self.closed.notify_waiters();
    }

    /// Closes, and removes all messages; their number.
    pub(super) fn discard(&self) -> usize {
        let discarded = {
            let mut state = self.lock();
            state.is_open = false;
            state.bytes = 0;
            std::mem::take(&mut state.messages)
        };
        self.changed.notify_one();
        self.closed.notify_waiters();
        discarded.len()
    }

    pub(super) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Returns when the queue is closed.
    pub(super) async fn closed(&self) {
        loop {
            let closed = self.closed.notified();
            if !self.is_open() {
                return;
            }
            closed.await;
        }
    }

    /// Returns true when there is a message, false when the queue is closed and empty.
    pub(super) async fn has_message(&self) -> bool {
        loop {
            {
                let state = self.lock();
                if !state.messages.is_empty() {
                    return true;
                }
                if !state.is_open {
                    return false;
                }
            }
            self.changed.notified().await;
        }
    }

    pub(super) fn pop(&self) -> Option<Message> {
        self.lock().pop()
    }

    pub(super) fn send<S, C: Encode<S>>(&self, message: S) -> Result<(), SendError<S>> {
        // No work is done for a message that is not accepted, as far as that is known before its length.
        {
            let state = self.lock();
            if !state.is_open {
                return Err(SendError::NotConnected(message));
            }
            if self.limits.when_full == WhenFull::Refuse && !state.has_room(0, &self.limits) {
                return Err(SendError::Full(message));
            }
        }
        let encoded = match encode::<S, C>(&message) {
            Ok(encoded) => encoded,
            Err(source) => return Err(SendError::Encode { message, source }),
        };
        {
            let mut state = self.lock();
            if !state.is_open {
                return Err(SendError::NotConnected(message));
            }
            while !state.has_room(encoded.len(), &self.limits) {
                if self.limits.when_full == WhenFull::Refuse {
                    return Err(SendError::Full(message));
                }
                state.pop();
                state.dropped += 1;
            }
            state.bytes += encoded.len();
            state.messages.push_back(encoded);
        }
        self.changed.notify_one();
        Ok(())
    }
}

pub(super) fn encode<S, C: Encode<S>>(message: &S) -> Result<Message, CodecError> {
    let mut payload = Vec::new();
    match C::encode(message, &mut payload)? {
        MessageKind::Text => Utf8Bytes::try_from(payload).map(Message::Text).map_err(CodecError::encode),
        MessageKind::Binary => Ok(Message::Binary(payload.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::RawCodec;

    fn queue(messages: usize, bytes: usize, when_full: WhenFull) -> Queue {
        let queue = Queue::new(Limits { messages, bytes, when_full });
        queue.open();
        queue
    }

    fn send(queue: &Queue, text: &str) -> Result<(), SendError<String>> {
        queue.send::<String, RawCodec>(text.to_owned())
    }

    fn queued(queue: &Queue) -> Vec<String> {
        std::iter::from_fn(|| queue.pop()).map(|message| message.to_string()).collect()
    }

    #[test]
    fn a_full_queue_returns_the_message_and_keeps_the_others() {
        let by_messages = queue(2, 100, WhenFull::Refuse);
        let by_bytes = queue(100, 4, WhenFull::Refuse);
        for queue in [by_messages, by_bytes] {
            send(&queue, "aa").unwrap();
            send(&queue, "bb").unwrap();
            assert!(matches!(send(&queue, "c"), Err(SendError::Full(message)) if message == "c"));
            assert_eq!(queued(&queue), ["aa", "bb"]);
            send(&queue, "c").unwrap();
            assert_eq!((queued(&queue), queue.dropped()), (vec!["c".to_owned()], 0));
        }
    }

    #[test]
    fn a_full_queue_that_drops_the_oldest_keeps_the_latest_and_counts() {
        let by_messages = queue(2, 100, WhenFull::DropOldest);
        let by_bytes = queue(100, 4, WhenFull::DropOldest);
        for queue in [by_messages, by_bytes] {
            for text in ["aa", "bb", "cc", "dd"] {
                send(&queue, text).unwrap();
            }
            assert_eq!((queued(&queue), queue.dropped()), (vec!["cc".to_owned(), "dd".to_owned()], 2));
        }
    }

    #[test]
    fn an_empty_queue_accepts_one_message_of_any_length() {
        let refuses = queue(1, 4, WhenFull::Refuse);
        send(&refuses, "longer than that").unwrap();
        assert!(send(&refuses, "").is_err());
        let drops = queue(10, 4, WhenFull::DropOldest);
        for text in ["a", "b", "longer than that"] {
            send(&drops, text).unwrap();
        }
        assert_eq!((queued(&drops), drops.dropped()), (vec!["longer than that".to_owned()], 2));
    }

    #[tokio::test]
    async fn a_closed_queue_accepts_nothing_and_gives_out_what_it_has() {
        let queue = queue(10, 100, WhenFull::Refuse);
        send(&queue, "a").unwrap();
        queue.close();
        queue.closed().await;
        assert!(matches!(send(&queue, "b"), Err(SendError::NotConnected(_))));
        assert!(queue.has_message().await);
        assert_eq!(queued(&queue), ["a"]);
        assert!(!queue.has_message().await);
        queue.open();
        send(&queue, "c").unwrap();
        assert_eq!(queue.discard(), 1);
        assert!(!queue.has_message().await);
    }
}
