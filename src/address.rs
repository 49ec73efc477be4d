//! Whom a message is for, on all nodes.
//!
//! A value: the engine's address, but a connection is named as all nodes know it. Does not know hubs or publications.

use serde::{Deserialize, Serialize};
use shardcast_backplane::NodeId;
use shardcast_engine::Address;

use crate::connection_id::ConnectionId;

/// Whom a message is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum To {
    /// Whoever the address names, on each node. Never [`Address::Connection`].
    Many(Address),
    One(ConnectionId),
}

impl To {
    /// The same for the engine of this node.
    pub(crate) fn on(&self, node: Option<NodeId>) -> Address {
        match self {
            Self::Many(address) => address.clone(),
            Self::One(id) => on_or_nobody(*id, node).into(),
        }
    }

    /// Whether only this node has connections that it can reach.
    pub(crate) fn is_only_on(&self, node: Option<NodeId>) -> bool {
        matches!(self, Self::One(id) if id.node() == node)
    }
}

/// What the engine of this node calls the connection, or nobody.
pub(crate) fn on_or_nobody(id: ConnectionId, node: Option<NodeId>) -> shardcast_engine::ConnectionId {
    id.on(node).unwrap_or(shardcast_engine::ConnectionId::NOBODY)
}

/// What the engine of this node calls those of the connections that it has.
pub(crate) fn those_on(ids: &[ConnectionId], node: Option<NodeId>) -> Vec<shardcast_engine::ConnectionId> {
    ids.iter().filter_map(|id| id.on(node)).collect()
}
