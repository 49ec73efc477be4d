//! The client's callbacks: set through the handle, called by the connection's task.
//!
//! Shared by both, so that a callback can be replaced at any time. Does not know messages, sockets or what a callback
//! does; a panic in one goes through to whoever calls it.

use std::sync::{Arc, Mutex, PoisonError};

use super::error::ClientClose;
use crate::codec::CodecError;

/// The callbacks, shared by the handle, which sets them, and the connection's task, which calls them.
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
        // Outside the lock: what a callback owns may do anything when it is dropped.
        drop(former);
    }

    /// Calls the callback, or gives the argument back where there is none.
    pub(super) fn call(&self, argument: T) -> Result<(), T> {
        let callback = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(callback) = callback else { return Err(argument) };
        callback.lock().unwrap_or_else(PoisonError::into_inner)(argument);
        Ok(())
    }
}
