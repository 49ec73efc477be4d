//! The client's states, and how they are watched.
//!
//! Written by the handle while it connects and by the client's task afterwards; the two never run at the same time. Read
//! by anyone. Does not know what causes a change.

use std::{fmt, time::Duration};

use futures_util::{Stream, stream};
use http::HeaderValue;
use tokio::sync::watch;

use super::error::ClientClose;

/// What a [`HubClient`](super::HubClient) is doing.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum ClientState {
    /// It has not been connected yet.
    #[default]
    Idle,
    /// It is connecting: name lookup, TCP, TLS and the handshake. The first time or again.
    Connecting,
    /// The connection is open.
    Open,
    /// It waits before the next attempt to connect. Messages are queued.
    Reconnecting {
        /// The number of the attempt that follows, from 1, since the connection was last stable.
        attempt: u32,
        /// The delay before the attempt, from the moment when this state was entered.
        next_attempt_in: Duration,
        /// How the connection ended, or why the last attempt failed.
        cause: ClientClose,
    },
    /// The connection has ended and the client does not reconnect.
    Closed(ClientClose),
}

impl fmt::Display for ClientState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => formatter.write_str("not connected yet"),
            Self::Connecting => formatter.write_str("connecting"),
            Self::Open => formatter.write_str("open"),
            Self::Reconnecting { attempt, next_attempt_in, cause } => {
                write!(formatter, "attempt {attempt} to reconnect in {next_attempt_in:?}; {cause}")
            }
            Self::Closed(close) => close.fmt(formatter),
        }
    }
}

/// The state, and what the server selected at the last handshake.
#[derive(Default)]
struct Current {
    state: ClientState,
    protocol: Option<HeaderValue>,
}

/// The writing end.
pub(super) struct StateSender(watch::Sender<Current>);

impl StateSender {
    pub(super) fn new() -> Self {
        Self(watch::Sender::default())
    }

    pub(super) fn set(&self, state: ClientState) {
        // The former state is dropped outside the lock: its cause may run arbitrary code.
        let mut former = Some(state);
        self.0.send_modify(|current| {
            if let Some(state) = former.take() {
                former = Some(std::mem::replace(&mut current.state, state));
            }
        });
    }

    pub(super) fn opened(&self, protocol: Option<HeaderValue>) {
        self.0.send_modify(|current| *current = Current { state: ClientState::Open, protocol });
    }

    pub(super) fn current(&self) -> ClientState {
        self.0.borrow().state.clone()
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.0.borrow().state, ClientState::Open)
    }

    pub(super) fn protocol(&self) -> Option<HeaderValue> {
        self.0.borrow().protocol.clone()
    }

    pub(super) fn watch(&self) -> ClientStates {
        ClientStates(self.0.subscribe())
    }
}

/// Watches a client's state; from [`HubClient::states`](super::HubClient::states).
///
/// A watcher that is slower than the changes sees the latest state and misses some before it. A callback set by
/// [`on_state`](super::HubClient::on_state) sees every one.
#[derive(Clone)]
pub struct ClientStates(watch::Receiver<Current>);

impl ClientStates {
    /// The state now. A later [`changed`](Self::changed) waits for another one.
    pub fn current(&mut self) -> ClientState {
        self.0.borrow_and_update().state.clone()
    }

    /// Waits for a state that this watcher has not seen, and returns it; `None` when the client was dropped and its
    /// connection has ended. Cancel-safe.
    pub async fn changed(&mut self) -> Option<ClientState> {
        self.0.changed().await.ok()?;
        Some(self.current())
    }

    /// Waits for a state that `is_wanted` accepts, the current one included, and returns it; `None` when the client was
    /// dropped and its connection has ended. Cancel-safe.
    pub async fn wait_for(&mut self, mut is_wanted: impl FnMut(&ClientState) -> bool) -> Option<ClientState> {
        let current = self.0.wait_for(|current| is_wanted(&current.state)).await.ok()?;
        Some(current.state.clone())
    }

    /// The state now and every later one, as a stream. It ends when the client was dropped and its connection has ended.
    pub fn into_stream(self) -> impl Stream<Item = ClientState> + Send + Unpin {
        Box::pin(stream::unfold((self, true), async |(mut states, is_first)| {
            let state = if is_first { states.current() } else { states.changed().await? };
            Some((state, (states, false)))
        }))
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.0.borrow().state, ClientState::Open)
    }
}

impl fmt::Debug for ClientStates {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("ClientStates").field(&self.0.borrow().state).finish()
    }
}
