//! The client's callbacks: set through the handle, called by the client's task.
//!
//! Shared by both, so that a callback can be replaced at any time. A panic in a callback propagates to the caller. Does
//! not know messages, sockets or what a callback does.

use std::sync::{Arc, Mutex, PoisonError};

use tokio_tungstenite::tungstenite::Message;

use super::{error::ClientClose, state::ClientState};
use crate::codec::CodecError;

/// One slot for each event.
pub(super) struct Callbacks<R> {
    pub(super) message: Slot<R>,
    pub(super) error: Slot<CodecError>,
    pub(super) state: Slot<ClientState>,
    /// Returns what is written first on each connection, encoded.
    pub(super) open: Slot<(), Vec<Result<Message, CodecError>>>,
    pub(super) close: Slot<ClientClose>,
}

impl<R> Default for Callbacks<R> {
    fn default() -> Self {
        Self {
            message: Slot::default(),
            error: Slot::default(),
            state: Slot::default(),
            open: Slot::default(),
            close: Slot::default(),
        }
    }
}

type Callback<T, O> = Box<dyn FnMut(T) -> O + Send>;
type SharedCallback<T, O> = Arc<Mutex<Callback<T, O>>>;

/// One callback. Two locks, so that it can be replaced while it runs, even by itself.
pub(super) struct Slot<T, O = ()>(Mutex<Option<SharedCallback<T, O>>>);

impl<T, O> Default for Slot<T, O> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T, O> Slot<T, O> {
    pub(super) fn set(&self, callback: impl FnMut(T) -> O + Send + 'static) {
        let callback: Callback<T, O> = Box::new(callback);
        let former =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(Arc::new(Mutex::new(callback)));
        // Outside the lock: dropping a callback may run arbitrary code.
        drop(former);
    }

    /// Whether there is one.
    pub(super) fn is_set(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Calls the callback, or returns the argument if none is set.
    pub(super) fn call(&self, argument: T) -> Result<O, T> {
        let callback = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(callback) = callback else { return Err(argument) };
        let mut callback = callback.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(callback(argument))
    }
}
