//! The outlet: where the application's messages go in.
//!
//! Shared by the handle and its senders. Holds the sending end of the present connection's queue, if there is one;
//! closing the outlet closes that queue. Knows codecs. Does not know sockets or callbacks.

use std::sync::{PoisonError, RwLock};

use shardcast_engine::MessageKind;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::error::SendError;
use crate::codec::{CodecError, Encode};

/// Where messages go in: the queue of the present connection, if there is one.
#[derive(Default)]
pub(super) struct Outlet(RwLock<Option<mpsc::Sender<Message>>>);

impl Outlet {
    pub(super) fn open(&self, outgoing: mpsc::Sender<Message>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(outgoing);
    }

    pub(super) fn close(&self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn is_open(&self) -> bool {
        let outgoing = self.0.read().unwrap_or_else(PoisonError::into_inner);
        outgoing.as_ref().is_some_and(|outgoing| !outgoing.is_closed())
    }

    pub(super) fn send<S, C: Encode<S>>(&self, message: S) -> Result<(), SendError<S>> {
        // No clone of the sender leaves the lock: it would keep the queue open when the outlet closes.
        let outgoing = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(outgoing) = &*outgoing else { return Err(SendError::NotConnected(message)) };
        // The place first, then the work.
        let place = match outgoing.try_reserve() {
            Ok(place) => place,
            Err(mpsc::error::TrySendError::Full(())) => return Err(SendError::Full(message)),
            Err(mpsc::error::TrySendError::Closed(())) => return Err(SendError::NotConnected(message)),
        };
        match encode::<S, C>(&message) {
            Ok(encoded) => {
                place.send(encoded);
                Ok(())
            }
            Err(source) => Err(SendError::Encode { message, source }),
        }
    }
}

fn encode<S, C: Encode<S>>(message: &S) -> Result<Message, CodecError> {
    let mut payload = Vec::new();
    match C::encode(message, &mut payload)? {
        MessageKind::Text => Utf8Bytes::try_from(payload).map(Message::Text).map_err(CodecError::encode),
        MessageKind::Binary => Ok(Message::Binary(payload.into())),
    }
}
