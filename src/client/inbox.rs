//! The receive queue: messages that were received and that the application has not taken yet.
//!
//! Filled by the client's task while there is no callback for messages, and emptied by one [`Messages`]. Bounded in
//! messages and in bytes: when it is full, the task stops reading the socket, so that a slow application slows its server
//! down and nothing is lost. Does not know sockets or codecs.

use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use futures_util::Stream;
use tokio::sync::Notify;

use crate::codec::CodecError;

type Item<R> = Result<R, CodecError>;

pub(super) struct Inbox<R> {
    messages_max: usize,
    /// Of payloads, before they were decoded. An empty inbox accepts one of any length.
    bytes_max: usize,
    state: Mutex<State<R>>,
    /// For the one task that fills.
    room: Notify,
}

struct State<R> {
    items: VecDeque<(Item<R>, usize)>,
    bytes: usize,
    is_open: bool,
    has_reader: bool,
    reader: Option<Waker>,
}

impl<R> Inbox<R> {
    pub(super) fn new(messages_max: usize, bytes_max: usize) -> (Arc<Self>, Messages<R>) {
        let state =
            State { items: VecDeque::new(), bytes: 0, is_open: false, has_reader: true, reader: None };
        let inbox = Arc::new(Self { messages_max, bytes_max, state: Mutex::new(state), room: Notify::new() });
        (Arc::clone(&inbox), Messages(inbox))
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn open(&self) {
        self.lock().is_open = true;
    }

    /// Nothing more is coming before the next `open`.
    pub(super) fn close(&self) {
        let reader = {
            let mut state = self.lock();
            state.is_open = false;
            state.reader.take()
        };
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Returns the item if there is no room. Without a reader, items are discarded.
    pub(super) fn try_push(&self, item: Item<R>, bytes: usize) -> Result<(), Item<R>> {
        let reader = {
            let mut state = self.lock();
            if !state.has_reader {
                drop(state);
                tracing::debug!(
                    "a message was discarded: no callback is set (`on_message`), and `Messages` was dropped"
                );
                return Ok(());
            }
            let has_room =
                state.items.len() < self.messages_max && state.bytes.saturating_add(bytes) <= self.bytes_max;
            if !has_room && !state.items.is_empty() {
                return Err(item);
            }
            state.bytes += bytes;
            state.items.push_back((item, bytes));
            state.reader.take()
        };
        if let Some(reader) = reader {
            reader.wake();
        }
        Ok(())
    }

    /// Waits for room.
    pub(super) async fn push(&self, mut item: Item<R>, bytes: usize) {
        while let Err(returned) = self.try_push(item, bytes) {
            item = returned;
            self.room.notified().await;
        }
    }

    fn poll_pop(&self, context: &mut Context<'_>) -> Poll<Option<Item<R>>> {
        let mut state = self.lock();
        if let Some((item, bytes)) = state.items.pop_front() {
            state.bytes -= bytes;
            drop(state);
            self.room.notify_one();
            return Poll::Ready(Some(item));
        }
        if !state.is_open {
            return Poll::Ready(None);
        }
        state.reader = Some(context.waker().clone());
        Poll::Pending
    }
}

/// The messages that a [`HubClient`](super::HubClient) receives, as a [`Stream`]; from
/// [`take_messages`](super::HubClient::take_messages).
///
/// A message that cannot be decoded is an `Err`, and the next ones follow. The stream ends when the client is closed for
/// good (not while it reconnects), and continues if it is connected again. When it is dropped, messages are discarded
/// from then on.
pub struct Messages<R>(Arc<Inbox<R>>);

impl<R> Messages<R> {
    /// The next message, or `None` when the client is not connected and nothing is left. Cancel-safe: no message is lost
    /// when the future is dropped.
    pub async fn recv(&mut self) -> Option<Result<R, CodecError>> {
        poll_fn(|context| self.0.poll_pop(context)).await
    }
}

impl<R> Stream for Messages<R> {
    type Item = Result<R, CodecError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_pop(context)
    }
}

impl<R> Drop for Messages<R> {
    fn drop(&mut self) {
        let unread = {
            let mut state = self.0.lock();
            state.has_reader = false;
            state.bytes = 0;
            std::mem::take(&mut state.items)
        };
        self.0.room.notify_one();
        // Outside the lock: dropping a message may run arbitrary code.
        drop(unread);
    }
}

impl<R> fmt::Debug for Messages<R> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Messages").field("queued", &self.0.lock().items.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, StreamExt as _};

    use super::*;

    #[tokio::test]
    async fn a_full_inbox_keeps_its_messages_in_order_and_makes_who_fills_it_wait() {
        for (messages_max, bytes_max) in [(2, 100), (100, 8)] {
            let (inbox, mut messages) = Inbox::new(messages_max, bytes_max);
            inbox.open();
            inbox.try_push(Ok(1), 4).unwrap();
            inbox.try_push(Ok(2), 4).unwrap();
            let mut push = std::pin::pin!(inbox.push(Ok(3), 4));
            assert!((&mut push).now_or_never().is_none());
            assert_eq!(messages.next().await.unwrap().unwrap(), 1);
            push.await;
            inbox.close();
            let rest: Vec<i32> = messages.map(Result::unwrap).collect().await;
            assert_eq!(rest, [2, 3]);
        }
    }

    #[tokio::test]
    async fn an_empty_inbox_accepts_one_message_of_any_length() {
        let (inbox, mut messages) = Inbox::new(10, 4);
        inbox.open();
        inbox.try_push(Ok("long"), 1000).unwrap();
        assert!(inbox.try_push(Ok("short"), 1).is_err());
        assert_eq!(messages.recv().await.unwrap().unwrap(), "long");
    }

    #[tokio::test]
    async fn without_a_reader_messages_are_discarded_and_nobody_waits() {
        let (inbox, messages) = Inbox::new(1, 100);
        inbox.open();
        inbox.try_push(Ok(1), 1).unwrap();
        let mut push = std::pin::pin!(inbox.push(Ok(2), 1));
        assert!((&mut push).now_or_never().is_none());
        drop(messages);
        push.await;
    }

    #[tokio::test]
    async fn a_reader_is_woken_by_a_message_and_by_the_end() {
        let (inbox, mut messages) = Inbox::new(1, 100);
        assert!(messages.recv().await.is_none(), "not connected");
        inbox.open();
        let reader = tokio::spawn(async move { (messages.recv().await, messages.recv().await) });
        tokio::task::yield_now().await;
        inbox.try_push(Ok(1), 1).unwrap();
        tokio::task::yield_now().await;
        inbox.close();
        let (first, second) = reader.await.unwrap();
        assert_eq!(first.unwrap().unwrap(), 1);
        assert!(second.is_none());
    }
}
