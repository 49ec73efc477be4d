//! The verdict: whether the 101 that a handler returned was sent.
//!
//! hyper releases the socket both after it has sent our 101 and after it has sent a response that a middleware returned
//! instead. So the response itself must detect what happens to it. It carries a mark in its extensions and a body
//! without bytes, and the order of the calls and drops decides:
//!
//! - hyper splits a response into head and body, calls [`Body::is_end_stream`] and then [`Body::size_hint`], writes the
//!   head and drops it together with the mark. Then it drops the body of a 101 without reading it, but reads the body
//!   of every other response, because its length is unknown.
//! - A response that is replaced is dropped as a whole, the mark first, and these two methods of its body have not been
//!   called in this order. The same holds for the response to a client that disconnected. A middleware that makes the
//!   same calls as hyper and then replaces the response cannot be distinguished from hyper; the docs of
//!   `WebSocketUpgrade` warn of that.
//! - If only `is_end_stream` was called, the caller was a middleware, or hyper through a wrapper that does not forward
//!   `size_hint`.
//! - A middleware that reads or replaces the body does so while it holds the head. What it does with the head later
//!   cannot be observed here.
//!
//! One end is owned by the response, the other by the task that waits for the socket. Knows the order of these events.
//! Does not know requests, sockets or what follows from the verdict.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering::AcqRel, Ordering::Acquire},
    },
    task::{Context, Poll},
};

use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::oneshot;

/// What became of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It was sent unchanged. The socket follows.
    Sent,
    /// A middleware removed the body, or called a method that hyper calls. This head may have been sent, or another one
    /// instead.
    Unclear,
    /// It was not sent: it was replaced, got another status, or was dropped because the client disconnected.
    NotSent,
}

/// The receiving end of a verdict, which is sent when all parts of the response have been dropped.
#[derive(Debug)]
pub(crate) struct PendingVerdict(oneshot::Receiver<Verdict>);

impl PendingVerdict {
    pub(crate) async fn verdict(self) -> Verdict {
        // The sender sends in its `Drop`, so this cannot fail.
        self.0.await.unwrap_or(Verdict::NotSent)
    }
}

/// Attaches the mark and the watched body to `response`, which must have no body.
pub(crate) fn watch(mut response: Response) -> (Response, PendingVerdict) {
    let (sender, receiver) = oneshot::channel();
    let events = Arc::new(Events { seen: AtomicU8::new(0), sender: Some(sender) });
    response.extensions_mut().insert(Mark { _head: Arc::new(Head(events.clone())) });
    let body = axum::body::Body::new(WatchedBody { events });
    (response.map(|_| body), PendingVerdict(receiver))
}

const HEAD_DROPPED: u8 = 1;
const BODY_ASKED: u8 = 2;
const BODY_READ_WITHOUT_HEAD: u8 = 4;
const BODY_DROPPED_FIRST: u8 = 8;
/// `is_end_stream` was called, and `size_hint` after it.
const LENGTH_ASKED_LAST: u8 = 16;

/// What has happened to the parts. Sends the verdict when the last part is dropped.
#[derive(Debug)]
struct Events {
    seen: AtomicU8,
    /// `None` once it has been used.
    sender: Option<oneshot::Sender<Verdict>>,
}

impl Events {
    // The parts may be dropped by different threads, and the verdict depends on the order: AcqRel throughout.
    fn note(&self, event: u8) {
        self.seen.fetch_or(event, AcqRel);
    }

    fn forget(&self, event: u8) {
        self.seen.fetch_and(!event, AcqRel);
    }

    fn has(&self, event: u8) -> bool {
        self.seen.load(Acquire) & event != 0
    }

    fn verdict(&self) -> Verdict {
        if self.has(BODY_READ_WITHOUT_HEAD) {
            Verdict::NotSent
        } else if self.has(BODY_DROPPED_FIRST) {
            Verdict::Unclear
        } else if self.has(LENGTH_ASKED_LAST) {
            Verdict::Sent
        } else if self.has(BODY_ASKED) {
            Verdict::Unclear
        } else {
            Verdict::NotSent
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let verdict = self.verdict();
        if let Some(sender) = self.sender.take() {
            let _ = sender.send(verdict); // the receiver may have been dropped
        }
    }
}

/// Part of the response's extensions, which require `Clone`; all clones share one head.
#[derive(Clone, Debug)]
struct Mark {
    _head: Arc<Head>,
}

#[derive(Debug)]
struct Head(Arc<Events>);

impl Drop for Head {
    fn drop(&mut self) {
        self.0.note(HEAD_DROPPED);
    }
}

/// A body without bytes that reports an unknown length: if it reported 0, hyper would not read it for any status.
#[derive(Debug)]
struct WatchedBody {
    events: Arc<Events>,
}

impl Body for WatchedBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.events.has(HEAD_DROPPED) {
            self.events.note(BODY_READ_WITHOUT_HEAD);
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.events.note(BODY_ASKED);
        self.events.forget(LENGTH_ASKED_LAST);
        false
    }

    fn size_hint(&self) -> SizeHint {
        if self.events.has(BODY_ASKED) {
            self.events.note(LENGTH_ASKED_LAST);
        }
        SizeHint::default()
    }
}

impl Drop for WatchedBody {
    fn drop(&mut self) {
        if !self.events.has(HEAD_DROPPED) {
            self.events.note(BODY_DROPPED_FIRST);
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse as _;
    use http::StatusCode;

    use super::*;

    fn response() -> (Response, PendingVerdict) {
        watch(StatusCode::SWITCHING_PROTOCOLS.into_response())
    }

    /// What hyper does first with each response.
    fn begin(response: Response) -> axum::body::Body {
        let (head, body) = response.into_parts();
        assert!(!body.is_end_stream() && body.size_hint().exact().is_none());
        drop(head);
        body
    }

    fn read(body: &mut axum::body::Body) {
        let mut context = Context::from_waker(std::task::Waker::noop());
        assert!(matches!(Pin::new(body).poll_frame(&mut context), Poll::Ready(None)));
    }

    #[tokio::test]
    async fn a_response_whose_body_is_not_read_was_sent_as_a_101() {
        let (response, pending) = response();
        drop(begin(response));
        assert_eq!(pending.verdict().await, Verdict::Sent);
    }

    #[tokio::test]
    async fn a_response_whose_body_is_read_had_another_status() {
        let (response, pending) = response();
        read(&mut begin(response));
        assert_eq!(pending.verdict().await, Verdict::NotSent);
    }

    #[tokio::test]
    async fn a_response_that_is_dropped_was_not_sent() {
        let (response, pending) = response();
        drop(response);
        assert_eq!(pending.verdict().await, Verdict::NotSent);
    }

    #[tokio::test]
    async fn what_became_of_a_head_without_its_body_is_unclear() {
        let (first, pending) = response();
        let (head, mut body) = first.into_parts();
        read(&mut body);
        drop(body);
        drop(head);
        assert_eq!(pending.verdict().await, Verdict::Unclear);

        let (second, pending) = response();
        drop(second.map(|_| "another body"));
        assert_eq!(pending.verdict().await, Verdict::Unclear);
    }

    #[tokio::test]
    async fn a_response_that_is_dropped_by_who_has_asked_less_than_hyper_is_not_known_to_be_sent() {
        let (asked, pending) = response();
        assert!(!asked.body().is_end_stream());
        drop(asked);
        assert_eq!(pending.verdict().await, Verdict::Unclear);

        let (asked_in_another_order, pending) = response();
        let body = asked_in_another_order.body();
        assert!(body.size_hint().exact().is_none() && !body.is_end_stream());
        drop(asked_in_another_order);
        assert_eq!(pending.verdict().await, Verdict::Unclear);

        let (asked_for_the_length, pending) = response();
        assert!(asked_for_the_length.body().size_hint().exact().is_none());
        drop(asked_for_the_length);
        assert_eq!(pending.verdict().await, Verdict::NotSent);
    }

    #[tokio::test]
    async fn a_copy_of_the_extensions_keeps_the_head() {
        let (response, pending) = response();
        let copy = response.extensions().clone();
        let body = begin(response);
        drop(copy);
        drop(body);
        assert_eq!(pending.verdict().await, Verdict::Sent);
    }
}
