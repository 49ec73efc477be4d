//! A room's last messages, for members who enter.
//!
//! Owned by the members: a room that nobody is in may be forgotten. shardcast knows who is in a room; it does not keep
//! what was said. A room's lock is held while a message is delivered and while a member enters, so that the history
//! ends exactly where the messages that the member receives begin. With several nodes no history is kept: this one
//! would have only what was said by its own members, which is half of a conversation.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Messages of one room that are kept.
const HISTORY_MAX: usize = 50;
/// Rooms from which on those without members are forgotten.
const ROOMS_MAX: usize = 256;

/// A message to a room.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Said {
    /// Who said it.
    pub(crate) user: Arc<str>,
    /// The name that the user had then.
    pub(crate) name: Arc<str>,
    pub(crate) text: String,
    /// When, in milliseconds since 1970. No two messages of a history have the same, so it identifies the message.
    pub(crate) at: u64,
}

/// One room.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) name: Arc<str>,
    pub(crate) history: tokio::sync::Mutex<History>,
}

/// The last messages of a room, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct History {
    messages: VecDeque<Said>,
    /// Whether older messages were discarded.
    is_cut: bool,
    last_at: u64,
}

impl History {
    /// Adds a message, and discards the oldest one beyond the limit. Returns the message with the time that it has.
    pub(crate) fn add(&mut self, said: Said) -> Said {
        self.last_at = said.at.max(self.last_at + 1);
        let said = Said { at: self.last_at, ..said };
        if self.messages.len() == HISTORY_MAX {
            self.messages.pop_front();
            self.is_cut = true;
        }
        self.messages.push_back(said.clone());
        said
    }

    pub(crate) fn messages(&self) -> Vec<Said> {
        self.messages.iter().cloned().collect()
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.is_cut
    }
}

/// All rooms.
#[derive(Debug, Default)]
pub(crate) struct Rooms(Mutex<HashMap<Arc<str>, Arc<Room>>>);

impl Rooms {
    /// The room of this name, which may be new.
    pub(crate) fn room(&self, name: &str) -> Arc<Room> {
        let mut rooms = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(room) = rooms.get(name) {
            return room.clone();
        }
        if rooms.len() >= ROOMS_MAX {
            rooms.retain(|_, room| Arc::strong_count(room) > 1);
        }
        let name: Arc<str> = name.into();
        let room = Arc::new(Room { name: name.clone(), history: Default::default() });
        rooms.insert(name, room.clone());
        room
    }
}

/// Milliseconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64)
}
