//! What became of one message, over all nodes.
//!
//! A value: the engine's receipts of several nodes, summed. Does not know how they are collected.

use shardcast_engine::{Drops, Position};

/// The outcome of one message: see [`Target::deliver`](crate::Target::deliver).
#[must_use = "a receipt says how many clients did not accept the message at once"]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Receipt {
    /// Clients that the message was for. One that joins during the call may get the message without being counted.
    pub recipients: u64,
    /// Of these, clients whose outbox was full, so that the message had to wait (or was dropped at once).
    pub delayed: u64,
    /// Clients for which the message was dropped.
    pub dropped: Drops,
    /// Clients that disconnected before they accepted the message.
    pub disconnected: u64,
    /// The position of the message on this node: after it. Of a message to one client, or of one without recipients:
    /// after everything that was published before it.
    pub position: Position,
    /// Nodes that were to deliver the message and to answer: 1 without a [backplane](crate::Engine::backplane).
    pub nodes_asked: u64,
    /// Of these, nodes that have answered. If there are fewer, the clients of the others are not counted.
    pub nodes_answered: u64,
}

impl Receipt {
    /// Clients that have accepted the message: it is in their outbox or in the kernel.
    pub fn accepted(&self) -> u64 {
        self.recipients - self.dropped.total() - self.disconnected
    }

    /// Adds what another node has answered.
    pub(crate) fn add(&mut self, other: &Self) {
        self.recipients += other.recipients;
        self.delayed += other.delayed;
        for (cause, count) in other.dropped.by_cause() {
            self.dropped[cause] += count;
        }
        self.disconnected += other.disconnected;
        self.nodes_answered += other.nodes_answered;
    }
}

/// Of this node alone.
impl From<shardcast_engine::Receipt> for Receipt {
    fn from(receipt: shardcast_engine::Receipt) -> Self {
        let shardcast_engine::Receipt { recipients, delayed, dropped, disconnected, position, .. } = receipt;
        Self { recipients, delayed, dropped, disconnected, position, nodes_asked: 1, nodes_answered: 1 }
    }
}
