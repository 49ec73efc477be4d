//! The roster: which users of one hub are present on which nodes.
//!
//! Every node has one for each hub, and makes the same changes to it in the same order, because they come from the log that
//! nodes share. A user is present as long as one node says so; what changes that is returned. Pure. Does not know how nodes
//! learn of their own users.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use shardcast_backplane::NodeId;
use shardcast_engine::PresenceKind;

use crate::presence::Metadata;

/// A user in a group, or in the hub, on one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attendee {
    /// None for the hub.
    pub(super) group: Option<Arc<str>>,
    pub(super) user: Arc<str>,
    pub(super) since: SystemTime,
    pub(super) metadata: Option<Metadata>,
}

/// A user has joined with the first node, or left with the last one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) attendee: Attendee,
    pub(super) kind: PresenceKind,
}

/// Where a user is, and what that node says of the user.
#[derive(Debug)]
struct Seat {
    node: NodeId,
    since: SystemTime,
    metadata: Option<Metadata>,
}

type Users = HashMap<Arc<str>, Vec<Seat>>;

#[derive(Debug, Default)]
pub(super) struct Roster {
    everyone: Users,
    groups: HashMap<Arc<str>, Users>,
    /// What nodes that tell everything have told so far.
    incomplete: HashMap<NodeId, Vec<Attendee>>,
}

impl Roster {
    /// A user is present on the node.
    pub(super) fn join(&mut self, node: NodeId, attendee: Attendee) -> Option<Change> {
        let Attendee { group, user, since, metadata } = attendee;
        let users = match &group {
            None => &mut self.everyone,
            Some(group) => self.groups.entry(group.clone()).or_default(),
        };
        let seats = users.entry(user.clone()).or_default();
        let is_first = seats.is_empty();
        seats.retain(|seat| seat.node != node);
        seats.push(Seat { node, since, metadata: metadata.clone() });
        let attendee = Attendee { group, user, since, metadata };
        is_first.then_some(Change { attendee, kind: PresenceKind::Joined })
    }

    /// A user is not present on the node any more.
    pub(super) fn leave(&mut self, node: NodeId, group: Option<&Arc<str>>, user: &str) -> Option<Change> {
        let users = match group {
            None => &mut self.everyone,
            Some(group) => self.groups.get_mut(group)?,
        };
        let (name, seats) =
            users.get_key_value(user).map(|(name, _)| name.clone()).zip(users.get_mut(user))?;
        let at = seats.iter().position(|seat| seat.node == node)?;
        let since = seats.iter().map(|seat| seat.since).min().unwrap_or(SystemTime::UNIX_EPOCH);
        let Seat { metadata, .. } = seats.remove(at);
        if !seats.is_empty() {
            return None;
        }
        users.remove(user);
        if let Some(group) = group
            && users.is_empty()
        {
            self.groups.remove(group);
        }
        let attendee = Attendee { group: group.cloned(), user: name, since, metadata };
        Some(Change { attendee, kind: PresenceKind::Left })
    }

    /// A part of everything that a node tells: the first one, others, the last one. With the last one, users of whom it has
    /// not told are not present there.
    pub(super) fn tell_all(
        &mut self,
        node: NodeId,
        is_first: bool,
        is_last: bool,
        part: Vec<Attendee>,
    ) -> Vec<Change> {
        if is_first {
            self.incomplete.insert(node, part);
        } else if let Some(told) = self.incomplete.get_mut(&node) {
            told.extend(part);
        }
        if !is_last {
            return Vec::new();
        }
        match self.incomplete.remove(&node) {
            Some(told) => self.replace(node, told),
            None => Vec::new(), // its beginning was missed: it will be asked again
        }
    }

    /// The node has no users any more.
    pub(super) fn forget(&mut self, node: NodeId) -> Vec<Change> {
        self.incomplete.remove(&node);
        self.replace(node, Vec::new())
    }

    fn replace(&mut self, node: NodeId, told: Vec<Attendee>) -> Vec<Change> {
        let mut gone: Vec<(Option<Arc<str>>, Arc<str>)> = Vec::new();
        let groups = self.groups.iter().map(|(group, users)| (Some(group), users));
        for (group, users) in std::iter::once((None, &self.everyone)).chain(groups) {
            let of_node = users.iter().filter(|(_, seats)| seats.iter().any(|seat| seat.node == node));
            gone.extend(of_node.map(|(user, _)| (group.cloned(), user.clone())));
        }
        let told_names: std::collections::HashSet<_> =
            told.iter().map(|attendee| (attendee.group.clone(), attendee.user.clone())).collect();
        gone.retain(|who| !told_names.contains(who));
        let left: Vec<Change> =
            gone.iter().filter_map(|(group, user)| self.leave(node, group.as_ref(), user)).collect();
        let joined: Vec<Change> = told.into_iter().filter_map(|attendee| self.join(node, attendee)).collect();
        left.into_iter().chain(joined).collect()
    }

    fn users(&self, group: Option<&str>) -> Option<&Users> {
        match group {
            None => Some(&self.everyone),
            Some(group) => self.groups.get(group),
        }
    }

    /// How many users are present.
    pub(super) fn len(&self, group: Option<&str>) -> usize {
        self.users(group).map_or(0, HashMap::len)
    }

    /// The users who are present on other nodes than this one: each with the number of those nodes, since when, and the
    /// metadata that the last of them has told.
    pub(super) fn elsewhere(&self, here: NodeId, group: Option<&str>) -> Vec<(usize, Attendee)> {
        let others = |(user, seats): (&Arc<str>, &Vec<Seat>)| {
            let elsewhere = || seats.iter().filter(|seat| seat.node != here);
            let since = elsewhere().map(|seat| seat.since).min()?;
            let metadata = elsewhere().next_back().and_then(|seat| seat.metadata.clone());
            let group = group.map(Arc::from);
            Some((elsewhere().count(), Attendee { group, user: user.clone(), since, metadata }))
        };
        self.users(group).into_iter().flatten().filter_map(others).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn attendee(group: Option<&str>, user: &str) -> Attendee {
        let since = SystemTime::UNIX_EPOCH;
        Attendee { group: group.map(Arc::from), user: user.into(), since, metadata: None }
    }

    fn kinds(changes: &[Change]) -> Vec<(&str, PresenceKind)> {
        let mut kinds: Vec<_> = changes.iter().map(|change| (&*change.attendee.user, change.kind)).collect();
        kinds.sort_unstable();
        kinds
    }

    #[test]
    fn a_user_joins_with_the_first_node_and_leaves_with_the_last() {
        use PresenceKind::{Joined, Left};
        let [a, b] = [1, 2].map(NodeId::from_bits);
        let (mut roster, room) = (Roster::default(), Arc::from("room"));
        assert_eq!(kinds(&Vec::from_iter(roster.join(a, attendee(Some("room"), "ada")))), [("ada", Joined)]);
        assert_eq!(roster.join(b, attendee(Some("room"), "ada")), None);
        assert_eq!(roster.join(b, attendee(Some("room"), "ada")), None, "told twice");
        assert_eq!((roster.len(Some("room")), roster.len(None)), (1, 0));
        assert_eq!(roster.elsewhere(a, Some("room")), [(1, attendee(Some("room"), "ada"))]);
        assert_eq!(roster.leave(a, Some(&room), "ada"), None);
        assert_eq!(roster.leave(a, Some(&room), "ada"), None, "told twice");
        assert_eq!(kinds(&Vec::from_iter(roster.leave(b, Some(&room), "ada"))), [("ada", Left)]);
        assert_eq!(roster.leave(b, Some(&room), "ada"), None);
        assert!(roster.groups.is_empty());
    }

    #[test]
    fn a_node_that_tells_everything_replaces_what_was_known_of_it() {
        use PresenceKind::{Joined, Left};
        let [a, b] = [1, 2].map(NodeId::from_bits);
        let mut roster = Roster::default();
        for (node, user) in [(a, "ada"), (a, "bob"), (b, "bob"), (a, "cyd")] {
            roster.join(node, attendee(None, user));
        }
        assert_eq!(roster.tell_all(a, true, false, vec![attendee(None, "cyd")]), []);
        assert_eq!(roster.len(None), 3, "nothing changes before the last part");
        let changes = roster.tell_all(a, false, true, vec![attendee(None, "dan")]);
        assert_eq!(kinds(&changes), [("ada", Left), ("dan", Joined)]);
        assert_eq!(roster.tell_all(a, false, true, vec![]), [], "its beginning was missed");
        assert_eq!(kinds(&roster.forget(a)), [("cyd", Left), ("dan", Left)]);
        assert_eq!(kinds(&roster.forget(b)), [("bob", Left)]);
        assert_eq!(roster.len(None), 0);
    }

    /// Numbers that look random, the same in every run.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, max: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % max
        }
    }

    #[test]
    fn changes_alternate_and_end_with_what_is_so_whatever_nodes_tell() {
        let mut numbers = Numbers(7);
        for _ in 0..200 {
            let (mut roster, mut model) = (Roster::default(), BTreeMap::<String, BTreeSet<u64>>::new());
            let mut shown = BTreeSet::new();
            for _ in 0..60 {
                let (node, user) = (numbers.below(3) + 1, format!("user {}", numbers.below(4)));
                let id = NodeId::from_bits(node);
                let changes = match numbers.below(6) {
                    0..=2 => {
                        model.entry(user.clone()).or_default().insert(node);
                        Vec::from_iter(roster.join(id, attendee(None, &user)))
                    }
                    3..=4 => {
                        model.entry(user.clone()).or_default().remove(&node);
                        Vec::from_iter(roster.leave(id, None, &user))
                    }
                    _ => {
                        for nodes in model.values_mut() {
                            nodes.remove(&node);
                        }
                        model.entry(user.clone()).or_default().insert(node);
                        roster.tell_all(id, true, true, vec![attendee(None, &user)])
                    }
                };
                for Change { attendee, kind } in changes {
                    match kind {
                        PresenceKind::Joined => assert!(shown.insert(attendee.user), "it has joined already"),
                        PresenceKind::Left => assert!(shown.remove(&attendee.user), "it had not joined"),
                    }
                }
                let present: BTreeSet<Arc<str>> = model
                    .iter()
                    .filter(|(_, nodes)| !nodes.is_empty())
                    .map(|(user, _)| user.as_str().into())
                    .collect();
                assert_eq!(shown, present);
            }
        }
    }
}
