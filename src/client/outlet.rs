//! The outlet: encodes the application's messages and queues them for the connection.
//!
//! Shared by the handle and its senders. Owns the only sending end of the current connection's queue, if there is a
//! connection; closing the outlet closes that queue. Knows codecs. Does not know sockets or callbacks.

use std::sync::{PoisonError, RwLock};

use shardcast_engine::MessageKind;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::error::SendError;
use crate::codec::{CodecError, Encode};

/// The queue of the current connection, if there is one.
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
        // No clone of the sender may leave the lock: it would keep the queue open after the outlet closes.
        let outgoing = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(outgoing) = &*outgoing else { return Err(SendError::NotConnected(message)) };
        // Reserve before encoding, so that no work is done for a message that is not accepted.
        let permit = match outgoing.try_reserve() {
            Ok(permit) => permit,
            Err(mpsc::error::TrySendError::Full(())) => return Err(SendError::Full(message)),
            Err(mpsc::error::TrySendError::Closed(())) => return Err(SendError::NotConnected(message)),
        };
        match encode::<S, C>(&message) {
            Ok(encoded) => {
                permit.send(encoded);
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
