//! The connections of one shard, by slot.
//!
//! Owned by one shard. A slot is looked up here and nowhere else. An id also contains the generation of its
//! slot, so the id of a closed connection finds nothing. Does not know what connections do.

use std::ops::{Index, IndexMut};

use slab::Slab;

use crate::connection::Connection;
use crate::id::{ConnectionId, SLOTS_MAX, Slot};

#[derive(Default)]
pub(crate) struct Connections(Slab<Connection>);

impl Connections {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The slot that the next connection gets; none if all are in use.
    pub(crate) fn vacant(&self) -> Option<Slot> {
        Some(self.0.vacant_key()).filter(|key| *key < SLOTS_MAX).map(Slot::new)
    }

    /// Adds a connection whose slot is the vacant one.
    pub(crate) fn insert(&mut self, connection: Connection) {
        let entry = self.0.vacant_entry();
        debug_assert_eq!(entry.key(), connection.slot().index());
        entry.insert(connection);
    }

    pub(crate) fn remove(&mut self, slot: Slot) -> Connection {
        self.0.remove(slot.index())
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    #[inline]
    pub(crate) fn get(&self, slot: Slot) -> Option<&Connection> {
        self.0.get(slot.index())
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut Connection> {
        self.0.get_mut(slot.index())
    }

    pub(crate) fn find(&self, id: ConnectionId) -> Option<&Connection> {
        self.get(id.slot()).filter(|connection| connection.id() == id)
    }

    pub(crate) fn find_mut(&mut self, id: ConnectionId) -> Option<&mut Connection> {
        self.get_mut(id.slot()).filter(|connection| connection.id() == id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Connection> {
        self.0.iter().map(|(_, connection)| connection)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Connection> {
        self.0.iter_mut().map(|(_, connection)| connection)
    }
}

impl Index<Slot> for Connections {
    type Output = Connection;

    fn index(&self, slot: Slot) -> &Connection {
        &self.0[slot.index()]
    }
}

impl IndexMut<Slot> for Connections {
    fn index_mut(&mut self, slot: Slot) -> &mut Connection {
        &mut self.0[slot.index()]
    }
}
