//! Counts of one hub's connections on other nodes: in all, of each group, of each user.
//!
//! Each node reports the numbers that have changed once per heartbeat, so that a join or a leave needs no entry of its own
//! in the log. Nodes that do not count as alive are left out, and are included again if they were only silent. Pure. Does
//! not know how nodes count.

use std::collections::HashMap;
use std::sync::Arc;

use shardcast_backplane::NodeId;

use super::entry::NodeCounts;

#[derive(Debug)]
pub(super) struct Counts {
    this_node: NodeId,
    /// The others.
    nodes: HashMap<NodeId, Told>,
    /// The other nodes that are alive.
    alive: Arc<[NodeId]>,
}

/// What one node has told.
#[derive(Debug, Default)]
struct Told {
    now: Known,
    /// What it has told so far of everything that it counts.
    incomplete: Option<Known>,
}

#[derive(Debug, Default)]
struct Known {
    connections: usize,
    groups: HashMap<Arc<str>, usize>,
    users: HashMap<Arc<str>, usize>,
}

impl Counts {
    pub(super) fn new(this_node: NodeId) -> Self {
        Self { this_node, nodes: HashMap::new(), alive: Arc::default() }
    }

    /// These other nodes are alive.
    pub(super) fn are_alive(&mut self, others: Arc<[NodeId]>) {
        self.alive = others;
    }

    /// Numbers of a node that have changed.
    pub(super) fn change(&mut self, node: NodeId, counts: &NodeCounts<'_>) {
        if node != self.this_node {
            self.nodes.entry(node).or_default().now.set(counts);
        }
    }

    /// A part of everything that a node counts: the first one, others, the last one. With the last one, whatever it has not
    /// told of is 0.
    pub(super) fn tell_all(&mut self, node: NodeId, is_first: bool, is_last: bool, part: &NodeCounts<'_>) {
        if node == self.this_node {
            return;
        }
        let told = self.nodes.entry(node).or_default();
        if is_first {
            told.incomplete = Some(Known::default());
        }
        // If the beginning was missed, the node will be asked again.
        let Some(incomplete) = &mut told.incomplete else { return };
        incomplete.set(part);
        if is_last && let Some(complete) = told.incomplete.take() {
            told.now = complete;
        }
    }

    /// The node has no connections any more.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.nodes.remove(&node);
    }

    fn others(&self) -> impl Iterator<Item = &Known> {
        self.alive.iter().filter_map(|node| self.nodes.get(node)).map(|told| &told.now)
    }

    pub(super) fn connections(&self) -> usize {
        self.others().map(|counts| counts.connections).sum()
    }

    pub(super) fn members(&self, group: &str) -> usize {
        self.others().filter_map(|counts| counts.groups.get(group)).sum()
    }

    pub(super) fn connections_of(&self, user: &str) -> usize {
        self.others().filter_map(|counts| counts.users.get(user)).sum()
    }

    /// Adds the members of each group that has members on other nodes.
    pub(super) fn add_groups(&self, groups: &mut HashMap<Arc<str>, usize>) {
        add(groups, self.others().flat_map(|counts| &counts.groups));
    }

    /// Adds the connections of each user who has connections to other nodes.
    pub(super) fn add_users(&self, users: &mut HashMap<Arc<str>, usize>) {
        add(users, self.others().flat_map(|counts| &counts.users));
    }
}

fn add<'a>(sums: &mut HashMap<Arc<str>, usize>, counts: impl Iterator<Item = (&'a Arc<str>, &'a usize)>) {
    for (name, count) in counts {
        *sums.entry(name.clone()).or_default() += count;
    }
}

impl Known {
    fn set(&mut self, counts: &NodeCounts<'_>) {
        self.connections = count(counts.connections);
        set(&mut self.groups, &counts.groups);
        set(&mut self.users, &counts.users);
    }
}

fn set(counts: &mut HashMap<Arc<str>, usize>, told: &[(&str, u64)]) {
    for &(name, now) in told {
        match counts.get_mut(name) {
            Some(before) if now > 0 => *before = count(now),
            Some(_) => drop(counts.remove(name)),
            None if now > 0 => drop(counts.insert(name.into(), count(now))),
            None => {}
        }
    }
    if counts.capacity() > 64 && counts.len() < counts.capacity() / 4 {
        counts.shrink_to(2 * counts.len()); // a map does not shrink by itself
    }
}

fn count(told: u64) -> usize {
    usize::try_from(told).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told<'a>(connections: u64, groups: &[(&'a str, u64)], users: &[(&'a str, u64)]) -> NodeCounts<'a> {
        NodeCounts { connections, groups: groups.into(), users: users.into() }
    }

    #[test]
    fn counts_are_sums_over_the_nodes_that_are_alive() {
        let [here, a, b] = [0, 1, 2].map(NodeId::from_bits);
        let mut counts = Counts::new(here);
        counts.change(here, &told(9, &[("x", 9)], &[("ada", 9)]));
        counts.change(a, &told(3, &[("x", 2), ("y", 1)], &[("ada", 1)]));
        counts.change(b, &told(4, &[("x", 4)], &[("ada", 2)]));
        assert_eq!(counts.connections(), 0, "nobody is alive");
        counts.are_alive([here, a, b].into());
        assert_eq!((counts.connections(), counts.members("x"), counts.connections_of("ada")), (7, 6, 3));
        counts.change(a, &told(1, &[("x", 0), ("y", 1)], &[]));
        assert_eq!((counts.connections(), counts.members("x"), counts.members("y")), (5, 4, 1));
        let mut groups = HashMap::from([("y".into(), 10)]);
        counts.add_groups(&mut groups);
        assert_eq!(groups, HashMap::from([("x".into(), 4), ("y".into(), 11)]));
        let mut users = HashMap::new();
        counts.add_users(&mut users);
        assert_eq!(users, HashMap::from([("ada".into(), 3)]));
        counts.are_alive([b].into());
        assert_eq!((counts.connections(), counts.members("y")), (4, 0));
        counts.are_alive([a, b].into());
        assert_eq!(counts.members("y"), 1, "it was only silent");
        counts.forget(a);
        assert_eq!(counts.members("y"), 0);
    }

    #[test]
    fn a_node_that_tells_everything_replaces_its_counts_with_the_last_part() {
        let a = NodeId::from_bits(1);
        let mut counts = Counts::new(NodeId::from_bits(0));
        counts.are_alive([a].into());
        counts.change(a, &told(3, &[("x", 2), ("y", 1)], &[("ada", 1)]));
        counts.tell_all(a, true, false, &told(2, &[("x", 1)], &[]));
        assert_eq!(
            (counts.connections(), counts.members("x")),
            (3, 2),
            "nothing changes before the last part"
        );
        counts.tell_all(a, false, true, &told(2, &[], &[("bob", 2)]));
        assert_eq!((counts.connections(), counts.members("x"), counts.members("y")), (2, 1, 0));
        assert_eq!((counts.connections_of("ada"), counts.connections_of("bob")), (0, 2));
        counts.tell_all(a, false, true, &told(9, &[], &[]));
        assert_eq!(counts.connections(), 2, "its beginning was missed");
    }
}
