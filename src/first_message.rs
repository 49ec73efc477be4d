//! A hub that is made from its client's first message: for clients that say who they are by a message.
//!
//! Plain values: the application's check, what it accepts, and how long it waits. `hub_handler` runs the check; the engine
//! keeps the time and the length. Does not know connections.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use shardcast_engine::FirstMessage;

use crate::codec::RawMessage;
use crate::hub::Refusal;
use crate::presence::{Metadata, MetadataError};

/// What the first message has if nothing else is said: 10 s, 8 KiB.
pub(crate) const DEFAULT: FirstMessage = FirstMessage { within: Duration::from_secs(10), max_bytes: 8 << 10 };

/// Checks a first message.
pub(crate) type Check<H> =
    Box<dyn FnOnce(RawMessage) -> Pin<Box<dyn Future<Output = Result<Accepted<H>, Refusal>> + Send>> + Send>;

pub(crate) fn check_of<H, A, C, Fut>(check: C) -> Check<H>
where
    H: 'static,
    A: Into<Accepted<H>>,
    C: FnOnce(RawMessage) -> Fut + Send + 'static,
    Fut: Future<Output = Result<A, Refusal>> + Send + 'static,
{
    Box::new(move |first| {
        let checking = check(first);
        Box::pin(async move { checking.await.map(Into::into) })
    })
}

/// A client whose first message was accepted: its hub, and what is known of the client by now. See
/// [`WebSocketUpgrade::serve_first_message`](crate::WebSocketUpgrade::serve_first_message).
///
/// A hub without more is converted by `into()`; the check may return it as it is.
pub struct Accepted<H> {
    pub(crate) hub: H,
    pub(crate) user: Option<Arc<str>>,
    pub(crate) metadata: Option<Result<Metadata, MetadataError>>,
    pub(crate) expires_at: Option<SystemTime>,
}

impl<H> Accepted<H> {
    /// A client that this hub handles.
    pub fn new(hub: impl Into<H>) -> Self {
        Self { hub: hub.into(), user: None, metadata: None, expires_at: None }
    }

    /// The client's user: see [`Serve::user`](crate::Serve::user). A name that is too long, and a user with too many
    /// connections, close the connection with 1008.
    pub fn user(self, name: impl Into<Arc<str>>) -> Self {
        Self { user: Some(name.into()), ..self }
    }

    /// What presence shows of the user: see [`Serve::metadata`](crate::Serve::metadata). Metadata that cannot be kept are
    /// logged as an error, and the connection is closed with 1011.
    pub fn metadata<T: Serialize + ?Sized>(self, metadata: &T) -> Self {
        Self { metadata: Some(Metadata::new(metadata)), ..self }
    }

    /// When the connection expires: see [`Serve::expires_at`](crate::Serve::expires_at).
    pub fn expires_at(self, at: SystemTime) -> Self {
        Self { expires_at: Some(at), ..self }
    }
}

impl<H> From<H> for Accepted<H> {
    fn from(hub: H) -> Self {
        Self::new(hub)
    }
}

impl<H> fmt::Debug for Accepted<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accepted")
            .field("user", &self.user)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}
