//! The client's callbacks: set through the handle, called by the connection's task.
//!
//! Shared by both, so that a callback can be replaced at any time. A panic in a callback propagates to the caller. Does
//! not know messages, sockets or what a callback does.

use std::sync::{Arc, Mutex, PoisonError};

use super::error::ClientClose;
use crate::codec::CodecError;

/// One slot for each event.
pub(super) struct Callbacks<R> {
    pub(super) message: Slot<R>,
    pub(super) error: Slot<CodecError>,
    pub(super) close: Slot<ClientClose>,
}

impl<R> Default for Callbacks<R> {
    fn default() -> Self {
        Self { message: Slot::default(), error: Slot::default(), close: Slot::default() }
    }
}

type Callback<T> = Box<dyn FnMut(T) + Send>;

/// One callback. Two locks, so that it can be replaced while it runs, even by itself.
pub(super) struct Slot<T>(Mutex<Option<Arc<Mutex<Callback<T>>>>>);

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Slot<T> {
    pub(super) fn set(&self, callback: impl FnMut(T) + Send + 'static) {
        let callback: Callback<T> = Box::new(callback);
        let former =
            self.0.lock().unwrap_or_else(PoisonError::into_inner).replace(Arc::new(Mutex::new(callback)));
        // Outside the lock: dropping a callback may run arbitrary code.
        drop(former);
    }

    /// Calls the callback, or returns the argument if none is set.
    pub(super) fn call(&self, argument: T) -> Result<(), T> {
        let callback = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(callback) = callback else { return Err(argument) };
        callback.lock().unwrap_or_else(PoisonError::into_inner)(argument);
        Ok(())
    }
}
