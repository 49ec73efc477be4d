//! Changes of counts and metadata, as an application takes them that tells other processes.
//!
//! Whoever applies every change that it takes has what the namespace counts, whatever joins and leaves in between.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use shardcast_engine::{ConnectionConfig, EngineConfig, Namespace, NamespaceChange, User};
use testkit::client::new_connection;
use testkit::{Client, Rig, at_once};

/// What is known by applying changes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Known {
    groups: BTreeMap<Arc<str>, usize>,
    users: BTreeMap<Arc<str>, usize>,
}

impl Known {
    /// As the namespace counts now.
    fn of(namespace: &Namespace) -> Self {
        let groups = namespace.groups().into_iter().map(|group| (group.name, group.connections));
        Self { groups: groups.collect(), users: namespace.users().into_iter().collect() }
    }

    fn apply(&mut self, changes: Vec<NamespaceChange>) {
        for change in changes {
            let (counts, name, now) = match change {
                NamespaceChange::Members { group, connections } => (&mut self.groups, group, connections),
                NamespaceChange::Connections { user, connections } => (&mut self.users, user, connections),
                _ => continue,
            };
            match now {
                0 => counts.remove(&name),
                _ => counts.insert(name, now),
            };
        }
    }
}

fn rig(shards: usize) -> Rig {
    let connection = ConnectionConfig { heartbeat_interval: None, ..ConnectionConfig::default() };
    Rig::with(EngineConfig { shards: Some(shards), ..EngineConfig::default() }, connection)
}

fn connect_as(rig: &mut Rig, user: &str) -> Client {
    let (mut connection, client) = new_connection(&rig.engine, &rig.config, rig.send_buffer);
    connection.user = Some(User::new(user).with_metadata(*b"0"));
    at_once(rig.everyone.adopt(connection)).unwrap();
    rig.settle();
    client
}

fn members(group: &str, connections: usize) -> NamespaceChange {
    NamespaceChange::Members { group: group.into(), connections }
}

#[test]
fn what_has_changed_is_told_once_as_it_is_now() {
    let mut rig = rig(2);
    assert_eq!(rig.everyone.take_changes(), None, "nobody has asked for it");
    rig.everyone.track_changes();
    let [ada, bob] = ["ada", "bob"].map(|user| connect_as(&mut rig, user));
    let mut known = Known::default();
    known.apply(rig.everyone.take_changes().unwrap());
    assert_eq!(known.users, BTreeMap::from([("ada".into(), 1), ("bob".into(), 1)]));
    assert_eq!(rig.everyone.take_changes(), Some(Vec::new()));

    for client in [&ada, &bob] {
        at_once(rig.everyone.join_all(client.id(), &["x", "y"])).map(drop).unwrap();
    }
    at_once(rig.everyone.leave(ada.id(), "y")).unwrap();
    rig.settle();
    assert_eq!(rig.everyone.take_changes(), Some(vec![members("x", 2), members("y", 1)]));
    // The group ends, and one of the same name begins.
    at_once(rig.everyone.leave(bob.id(), "y")).unwrap();
    rig.settle();
    at_once(rig.everyone.join(ada.id(), "y")).map(drop).unwrap();
    rig.settle();
    known.apply(rig.everyone.take_changes().unwrap());
    assert_eq!(known.groups.get("y"), Some(&1));

    drop((ada, bob));
    rig.settle();
    known.apply(rig.everyone.take_changes().unwrap());
    assert_eq!(known.users, BTreeMap::new());
    assert_eq!(known.groups.get("y"), None);
}

#[test]
fn metadata_that_is_set_is_told_for_each_group_of_the_connection() {
    let mut rig = rig(2);
    rig.everyone.track_changes();
    let ada = connect_as(&mut rig, "ada");
    at_once(rig.everyone.join(ada.id(), "room")).map(drop).unwrap();
    rig.settle();
    rig.everyone.take_changes().unwrap();
    for metadata in [*b"1", *b"2"] {
        at_once(rig.everyone.set_metadata(ada.id(), metadata)).unwrap();
        rig.settle();
    }
    let mut groups = Vec::new();
    for change in rig.everyone.take_changes().unwrap() {
        let NamespaceChange::Metadata { group, user, metadata } = change else { panic!("{change:?}") };
        assert_eq!((&*user, &*metadata), ("ada", &b"2"[..]), "as it is now");
        groups.push(group);
    }
    groups.sort();
    groups.dedup();
    assert_eq!(groups, [None, Some("room".into())]);
    assert_eq!(rig.everyone.metadata_in(Some("room"), "ada").as_deref(), Some(&b"2"[..]));
    assert_eq!(rig.everyone.metadata_in(None, "ada").as_deref(), Some(&b"2"[..]));
    assert_eq!(rig.everyone.metadata_in(Some("room"), "bob"), None);
    assert_eq!(rig.everyone.metadata_in(Some("no such room"), "ada"), None);
}

#[test]
fn more_changes_than_are_kept_are_told_of() {
    let mut rig = rig(1);
    rig.everyone.track_changes();
    let client = rig.connect();
    for number in 0..20_000 {
        let group = number.to_string();
        at_once(rig.everyone.join(client.id(), &group)).map(drop).unwrap();
        at_once(rig.everyone.leave(client.id(), &group)).unwrap();
        rig.settle();
    }
    at_once(rig.everyone.join(client.id(), "late")).map(drop).unwrap();
    assert_eq!(rig.everyone.take_changes(), None);
    assert_eq!(rig.everyone.take_changes(), Some(Vec::new()));
    let other = rig.connect();
    at_once(rig.everyone.join(other.id(), "late")).map(drop).unwrap();
    assert_eq!(rig.everyone.take_changes(), Some(vec![members("late", 2)]), "it is kept again");
}

/// What happens in a random history.
#[derive(Debug, Clone, Copy)]
enum Step {
    Connect(u8),
    Disconnect(usize),
    Join(usize, u8),
    Leave(usize, u8),
    Turn,
    Take,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0..3u8).prop_map(Step::Connect),
        1 => any::<usize>().prop_map(Step::Disconnect),
        3 => (any::<usize>(), 0..4u8).prop_map(|(client, group)| Step::Join(client, group)),
        3 => (any::<usize>(), 0..4u8).prop_map(|(client, group)| Step::Leave(client, group)),
        2 => Just(Step::Turn),
        2 => Just(Step::Take),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whoever_applies_all_changes_counts_as_the_namespace(
        shards in 1..3usize,
        steps in proptest::collection::vec(step(), 1..80),
    ) {
        let mut rig = rig(shards);
        rig.everyone.track_changes();
        let (mut clients, mut known) = (Vec::new(), Known::default());
        for step in steps {
            match step {
                Step::Connect(user) => clients.push(connect_as(&mut rig, &user.to_string())),
                Step::Disconnect(index) if !clients.is_empty() => {
                    drop(clients.swap_remove(index % clients.len()));
                }
                Step::Join(index, group) if !clients.is_empty() => {
                    let client = &clients[index % clients.len()];
                    at_once(rig.everyone.join(client.id(), &group.to_string())).map(drop).unwrap();
                }
                Step::Leave(index, group) if !clients.is_empty() => {
                    let client = &clients[index % clients.len()];
                    at_once(rig.everyone.leave(client.id(), &group.to_string())).unwrap();
                }
                Step::Turn => rig.turn(),
                Step::Take => known.apply(rig.everyone.take_changes().unwrap()),
                _ => {}
            }
        }
        rig.settle();
        known.apply(rig.everyone.take_changes().unwrap());
        prop_assert_eq!(known, Known::of(&rig.everyone));
    }
}
