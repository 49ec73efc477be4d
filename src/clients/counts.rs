//! How many clients there are: of all nodes by [`Clients`], of this one by [`ThisNode`].
//!
//! This node counts exactly; what other nodes have counted is kept by the backplane. Does not know how.

use std::sync::Arc;

use shardcast_engine::{GroupCount, Namespace};

use super::Clients;

/// With a [backplane](crate::Engine::backplane), counts are those of all nodes: of this node as they are now, and of each
/// other one as they were at its last [heartbeat](crate::backplane::BackplaneConfig::heartbeat_interval) (1 s). A client
/// that has moved from one node to another may count twice, or not at all, until then. A node that has left or is
/// [gone](crate::backplane::BackplaneConfig::node_timeout) counts no more. For the exact numbers of this node:
/// [`this_node`](Self::this_node).
impl<M> Clients<M> {
    /// How many clients are connected, those on their way to their shard included.
    pub fn len(&self) -> usize {
        let elsewhere = self.link().map_or(0, |link| link.state().connections_elsewhere());
        self.this_node().len() + elsewhere
    }

    /// Whether no client is connected.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many members a group has.
    pub fn group_len(&self, group: &str) -> usize {
        let elsewhere = self.link().map_or(0, |link| link.state().members_elsewhere(group));
        self.this_node().group_len(group) + elsewhere
    }

    /// The groups that have members, each with the number of connections and of users, in no particular order. Groups
    /// that appear or disappear during the call may be missing.
    pub fn groups(&self) -> Vec<GroupCount> {
        let mut groups = self.this_node().groups();
        if let Some(link) = self.link() {
            link.state().add_groups(&mut groups);
        }
        groups
    }

    /// How many groups have members. With a backplane it takes as long as to list [them](Self::groups).
    pub fn group_count(&self) -> usize {
        if self.link().is_some() { self.groups().len() } else { self.this_node().group_count() }
    }

    /// How many clients a user has, those on their way to their shard included.
    pub fn user_len(&self, user: &str) -> usize {
        let elsewhere = self.link().map_or(0, |link| link.state().connections_elsewhere_of(user));
        self.this_node().user_len(user) + elsewhere
    }

    /// The users who have clients, each with how many, in no particular order. Users who appear or disappear during the
    /// call may be missing.
    pub fn users(&self) -> Vec<(Arc<str>, usize)> {
        let mut users = self.this_node().users();
        if let Some(link) = self.link() {
            link.state().add_users(&mut users);
        }
        users
    }

    /// How many users have clients. With a backplane it takes as long as to list [them](Self::users).
    pub fn user_count(&self) -> usize {
        if self.link().is_some() { self.users().len() } else { self.this_node().user_count() }
    }

    /// The clients of this node only, to count them.
    ///
    /// ```
    /// # use shardcast::Clients;
    /// # fn example(clients: Clients<String>) {
    /// println!("{} clients, of which {} are connected to this node", clients.len(), clients.this_node().len());
    /// # }
    /// ```
    pub fn this_node(&self) -> ThisNode<'_> {
        ThisNode(self.namespace())
    }
}

/// The clients of one node, to count them: see [`Clients::this_node`]. The numbers are those of this moment.
#[derive(Debug, Clone, Copy)]
pub struct ThisNode<'a>(&'a Namespace);

impl ThisNode<'_> {
    /// How many clients are connected to this node, those on their way to their shard included.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no client is connected to this node.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many members a group has on this node.
    pub fn group_len(&self, group: &str) -> usize {
        self.0.group_len(group)
    }

    /// The groups that have members on this node, each with the number of connections and of users here, in no particular
    /// order. Groups that appear or disappear during the call may be missing.
    pub fn groups(&self) -> Vec<GroupCount> {
        self.0.groups()
    }

    /// How many groups have members on this node.
    pub fn group_count(&self) -> usize {
        self.0.group_count()
    }

    /// How many clients a user has on this node, those on their way to their shard included.
    pub fn user_len(&self, user: &str) -> usize {
        self.0.user_len(user)
    }

    /// The users who have clients on this node, each with how many, in no particular order. Users who appear or disappear
    /// during the call may be missing.
    pub fn users(&self) -> Vec<(Arc<str>, usize)> {
        self.0.users()
    }

    /// How many users have clients on this node.
    pub fn user_count(&self) -> usize {
        self.0.user_count()
    }
}
