//! Presence: which users have connections in a group, as values.
//!
//! A user of a connection, a user who is present, and a change of that, and the trait that receives changes. Made by
//! applications and shards. Does not know how presence is kept (`attendance.rs`), nor what metadata means.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crate::position::Position;

/// The user of a connection: a person or an account, which may have several connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub(crate) name: Arc<str>,
    pub(crate) metadata: Option<Arc<[u8]>>,
}

impl User {
    /// The user with this name, of at most [`USER_NAME_BYTES_MAX`](crate::USER_NAME_BYTES_MAX) bytes.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self { name: name.into(), metadata: None }
    }

    /// What presence shows of the user besides the name, in a form of the application's: at most
    /// [`METADATA_BYTES_MAX`](crate::METADATA_BYTES_MAX) bytes.
    #[must_use]
    pub fn with_metadata(self, metadata: impl Into<Arc<[u8]>>) -> Self {
        Self { metadata: Some(metadata.into()), ..self }
    }

    /// The user's name.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }
}

/// A user with connections in a group, or with one that has left it so recently that the user still counts as present
/// ([`presence_grace`](crate::ConnectionConfig::presence_grace)).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Present {
    /// The user's name.
    pub user: Arc<str>,
    /// Connections of the user that are members of the group; 0 while the user may still come back.
    pub connections: usize,
    /// Since when the user has been present.
    pub since: Instant,
    /// The metadata that a connection of the user brought last, by joining the group or by setting it.
    pub metadata: Option<Arc<[u8]>>,
}

/// What has become of a user in a group.
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PresenceKind {
    /// The user's first connection has joined.
    Joined,
    /// The user's last connection has left, and the user has not rejoined within
    /// [`presence_grace`](crate::ConnectionConfig::presence_grace).
    Left,
}

/// A user has joined or left a group.
///
/// For one user and group, [`Joined`](PresenceKind::Joined) and [`Left`](PresenceKind::Left) alternate, beginning with
/// `Joined`. A user who leaves and returns before the change was announced has not changed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PresenceChange {
    /// The group; none for everyone.
    pub group: Option<Arc<str>>,
    /// The user's name.
    pub user: Arc<str>,
    /// Whether the user has joined or left.
    pub kind: PresenceKind,
    /// Since when the user has been, or had been, present.
    pub since: Instant,
    /// The metadata that a connection of the user brought last.
    pub metadata: Option<Arc<[u8]>>,
    /// The change's position in the order of all publications: after the join, and before everything that is published
    /// by anyone who has received it.
    pub position: Position,
}

/// Is told of the changes of presence in one namespace, in their order, on one of the engine's shards.
pub trait PresenceObserver: Send + Sync {
    /// How many more changes can be taken now. While there is no room, changes wait on the shard, and those that cancel
    /// each other out are never announced. Asked often; must not block.
    fn room(&self) -> usize;

    /// A change. Must not block. A panic is logged.
    fn on_change(&self, change: PresenceChange);
}

impl fmt::Debug for dyn PresenceObserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PresenceObserver").finish_non_exhaustive()
    }
}
