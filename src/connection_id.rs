//! The id of a connection, unique over all nodes.
//!
//! A value: the engine's id, which is unique within the engine, and the node of the engine, if it is one of several. Does
//! not know which nodes there are.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use shardcast_backplane::NodeId;
use shardcast_engine::InvalidConnectionId as InvalidEngineId;

/// Identifies one connection: of one engine, or of all nodes that share a [backplane](crate::Engine::backplane). In
/// practice never reused for another one.
///
/// Displayed, parsed and serialized as text of hexadecimal digits: 16, or 32 with a backplane, of which the first 16 are
/// the [node's](Self::node). It is not a secret.
///
/// ```
/// # use shardcast::ConnectionId;
/// let id: ConnectionId = "0010000020000003".parse()?;
/// assert_eq!((id.to_string().as_str(), id.node()), ("0010000020000003", None));
/// let id: ConnectionId = "95d6b1a20c4f83e70010000020000003".parse()?;
/// assert_eq!(id.node().map(|node| node.to_string()).as_deref(), Some("95d6b1a20c4f83e7"));
/// # Ok::<(), shardcast::InvalidConnectionId>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId {
    /// 0 for an engine that is alone.
    node: u64,
    local: shardcast_engine::ConnectionId,
}

const NODE_DIGITS: usize = 16;

impl ConnectionId {
    /// The id of a connection of this node.
    pub(crate) fn new(node: Option<NodeId>, local: shardcast_engine::ConnectionId) -> Self {
        Self { node: node.map_or(0, NodeId::to_bits), local }
    }

    /// The node of the connection; none if its engine has no backplane.
    pub fn node(self) -> Option<NodeId> {
        Some(self.node).filter(|node| *node != 0).map(NodeId::from_bits)
    }

    /// The index of the shard that owns the connection, in its engine.
    pub fn shard(self) -> usize {
        self.local.shard()
    }

    /// What the engine of its node calls the connection.
    pub(crate) fn local(self) -> shardcast_engine::ConnectionId {
        self.local
    }

    /// What the engine of this node calls the connection; none for a connection of another node.
    pub(crate) fn on(self, node: Option<NodeId>) -> Option<shardcast_engine::ConnectionId> {
        (self.node() == node).then_some(self.local)
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(node) = self.node() {
            write!(f, "{node}")?;
        }
        write!(f, "{}", self.local)
    }
}

impl fmt::Debug for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnectionId({self})")
    }
}

/// A text is not a connection id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a connection id: expected 16 or 32 hexadecimal digits")]
pub struct InvalidConnectionId;

impl From<InvalidEngineId> for InvalidConnectionId {
    fn from(_: InvalidEngineId) -> Self {
        Self
    }
}

impl FromStr for ConnectionId {
    type Err = InvalidConnectionId;

    fn from_str(text: &str) -> Result<Self, InvalidConnectionId> {
        if text.len() != 2 * NODE_DIGITS {
            return Ok(Self::new(None, text.parse()?));
        }
        let (node, local) = text.split_at_checked(NODE_DIGITS).ok_or(InvalidConnectionId)?;
        let node = node.parse().map_err(|_| InvalidConnectionId)?;
        Ok(Self::new(Some(node), local.parse()?))
    }
}

/// As text: JavaScript's numbers cannot hold it.
impl Serialize for ConnectionId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ConnectionId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'_, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_is_written_with_a_node_and_without() {
        for text in ["0010000020000003", "000000000000000a0010000020000003"] {
            let id: ConnectionId = text.parse().expect("an id");
            assert_eq!(id.to_string(), text);
            let json = serde_json::to_string(&id).expect("JSON");
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<ConnectionId>(&json).expect("an id"), id);
        }
    }

    #[test]
    fn a_connection_of_another_node_is_unknown_here() {
        let (here, there) = (NodeId::from_bits(1), NodeId::from_bits(2));
        let local: shardcast_engine::ConnectionId = "0010000020000003".parse().expect("an id");
        assert_eq!(ConnectionId::new(Some(here), local).on(Some(here)), Some(local));
        assert_eq!(ConnectionId::new(None, local).on(None), Some(local));
        assert_eq!(ConnectionId::new(Some(here), local).on(Some(there)), None);
        assert_eq!(ConnectionId::new(Some(here), local).on(None), None);
        assert_eq!(ConnectionId::new(None, local).on(Some(here)), None);
    }

    #[test]
    fn what_is_not_an_id_is_refused() {
        for text in [
            "",
            "1",
            "00000000000000000",
            "000000000000000g",
            "+00000000000000f0010000020000003",
            "ééééééééééééééééé",
        ] {
            assert_eq!(text.parse::<ConnectionId>(), Err(InvalidConnectionId), "{text}");
        }
    }
}
