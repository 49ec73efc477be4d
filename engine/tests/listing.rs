//! Lists: the groups of a namespace, the members of a group, the groups of a connection, each at a definite
//! position in the order. And several groups joined or left in one step.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, Mutex};

use shardcast_engine::{
    Address, CloseCode, CloseReason, ConnectionConfig, ConnectionId, GROUP_NAME_BYTES_MAX, Payload,
    Publication, PublishError,
};
use testkit::{Client, Rig, at_once, lock};

fn members(rig: &mut Rig, to: &Address) -> Vec<ConnectionId> {
    let parts = Arc::new(Mutex::new(Vec::new()));
    let told = parts.clone();
    at_once(rig.everyone.collect_members(to, move |part| lock(&told).extend(part))).unwrap();
    rig.settle();
    assert_eq!(Arc::strong_count(&parts), 1, "every shard has answered");
    let mut all = std::mem::take(&mut *lock(&parts));
    all.sort_unstable();
    all
}

fn groups_of(rig: &mut Rig, client: &Client) -> Option<Vec<String>> {
    let groups = Arc::new(Mutex::new(None));
    let told = groups.clone();
    let on_groups = move |names: Vec<Arc<str>>| *lock(&told) = Some(names);
    at_once(rig.everyone.groups_of(client.id(), on_groups)).unwrap();
    rig.settle();
    let names = lock(&groups).take()?;
    let mut names: Vec<_> = names.iter().map(|name| name.to_string()).collect();
    names.sort_unstable();
    Some(names)
}

fn ids(clients: &[&Client]) -> Vec<ConnectionId> {
    let mut ids: Vec<_> = clients.iter().map(|client| client.id()).collect();
    ids.sort_unstable();
    ids
}

#[test]
fn groups_members_and_a_connection_s_groups_can_be_listed() {
    let mut rig = Rig::new(2);
    let clients = rig.connect_many(4);
    let [a, b, c, d] = &clients[..] else { unreachable!() };
    let other = rig.engine.namespace();
    for (client, groups) in [(a, &["x", "y"][..]), (b, &["x"]), (c, &["y", "z"])] {
        let _ = at_once(rig.everyone.join_all(client.id(), groups)).unwrap();
    }
    rig.settle();
    let mut listed: Vec<_> =
        rig.everyone.groups().into_iter().map(|group| (group.name.to_string(), group.connections)).collect();
    listed.sort_unstable();
    assert_eq!(listed, [("x".to_owned(), 2), ("y".to_owned(), 2), ("z".to_owned(), 1)]);
    assert_eq!((rig.everyone.group_count(), other.groups().len()), (3, 0));
    assert_eq!(members(&mut rig, &Address::group("x")), ids(&[a, b]));
    assert_eq!(members(&mut rig, &Address::groups(["x", "y", "none"])), ids(&[a, b, c]), "each once");
    assert_eq!(members(&mut rig, &Address::Everyone), ids(&[a, b, c, d]));
    assert_eq!(members(&mut rig, &d.id().into()), [d.id()]);
    assert_eq!(members(&mut rig, &Address::group("none")), []);
    assert_eq!(groups_of(&mut rig, a), Some(vec!["x".into(), "y".into()]));
    assert_eq!(groups_of(&mut rig, d), Some(vec![]), "everyone is no group");
    // A closing connection belongs to nothing any more; one whose `on_open` is not done, not yet to everyone.
    at_once(rig.everyone.publish(Publication::close(a.id(), CloseCode::NORMAL, "").unwrap())).unwrap();
    let opening = rig.connect_opening();
    rig.settle();
    assert_eq!(members(&mut rig, &Address::Everyone), ids(&[b, c, d]));
    assert_eq!(groups_of(&mut rig, a), Some(vec![]));
    assert_eq!(
        (members(&mut rig, &a.id().into()), members(&mut rig, &opening.id().into())),
        (vec![], vec![])
    );
    opening.release();
    rig.settle();
    assert_eq!(members(&mut rig, &Address::Everyone), ids(&[b, c, d, &opening]));
    drop(clients);
    rig.settle();
    assert_eq!(rig.everyone.groups().len(), 0);
}

#[test]
fn a_list_is_of_the_point_in_the_order_where_it_was_asked_for() {
    let mut rig = Rig::new(1);
    let client = rig.connect();
    let seen = Arc::new(Mutex::new(Vec::new()));
    for group in ["a", "b"] {
        at_once(rig.everyone.join(client.id(), group)).map(drop).unwrap();
        let told = seen.clone();
        at_once(rig.everyone.groups_of(client.id(), move |names| lock(&told).push(names.len()))).unwrap();
    }
    at_once(rig.everyone.leave_all(client.id(), &["a", "b", "never there"])).unwrap();
    let told = seen.clone();
    at_once(rig.everyone.groups_of(client.id(), move |names| lock(&told).push(names.len()))).unwrap();
    rig.settle();
    assert_eq!(*lock(&seen), [1, 2, 0]);
    assert_eq!(rig.everyone.group_count(), 0);
}

#[test]
fn several_groups_are_joined_and_left_in_one_step() {
    let mut rig = Rig::new(2);
    let mut client = rig.connect();
    let (everyone, id) = (rig.everyone.clone(), client.id());
    let publish = |group, text| {
        everyone.try_publish(Publication::message(Address::group(group), Payload::text(text))).unwrap();
    };
    at_once(everyone.join_all(id, &["a", "b"])).map(drop).unwrap();
    publish("a", "1");
    publish("b", "2");
    at_once(everyone.leave_all(id, &["a", "b"])).unwrap();
    publish("a", "3");
    publish("b", "4");
    rig.settle();
    assert_eq!(client.peer.receive_data(), ["1", "2"]);
    // All or none: one name is too long.
    let too_long = "x".repeat(GROUP_NAME_BYTES_MAX + 1);
    assert_eq!(at_once(everyone.join_all(id, &["a", &too_long])), Err(PublishError::GroupNameTooLong));
    rig.settle();
    assert_eq!(everyone.group_count(), 0);
}

#[test]
fn a_connection_that_joins_too_many_groups_at_once_is_closed_and_is_in_none() {
    let mut rig = Rig::one(ConnectionConfig { max_groups: 2, ..ConnectionConfig::default() });
    let client = rig.connect();
    at_once(rig.everyone.join_all(client.id(), &["a", "b", "c", "d", "e"])).map(drop).unwrap();
    rig.settle();
    assert_eq!(client.record().ends, [CloseReason::TooManyGroups]);
    assert_eq!((rig.everyone.group_count(), rig.everyone.len()), (0, 0));
}
