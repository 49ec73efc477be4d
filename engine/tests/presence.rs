//! Presence: who is in a group, at a definite position in the order, and the changes of it.
//!
//! Changes are announced once per user and group, alternate, and have a position after the join. Driven turn by turn,
//! so that joins and leaves meet on different shards in every sequence that a test names.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardcast_engine::{
    Address, CloseCode, ConnectionConfig, EngineConfig, GroupCount, Payload, PresenceChange, PresenceKind,
    PresenceObserver, Present, Publication, User,
};
use testkit::client::new_connection;
use testkit::time::ms;
use testkit::{Client, Rig, at_once, lock};

use PresenceKind::{Joined, Left};

/// Keeps the changes that it is told of; takes as many as it has room for.
#[derive(Clone)]
struct Recorder {
    changes: Arc<Mutex<Vec<PresenceChange>>>,
    room: Arc<AtomicUsize>,
}

impl PresenceObserver for Recorder {
    fn room(&self) -> usize {
        self.room.load(SeqCst)
    }

    fn on_change(&self, change: PresenceChange) {
        self.room.fetch_sub(1, SeqCst);
        lock(&self.changes).push(change);
    }
}

impl Recorder {
    fn on(rig: &Rig) -> Self {
        let recorder = Self { changes: Arc::default(), room: Arc::new(1_000_000.into()) };
        assert!(rig.everyone.observe_presence(recorder.clone()));
        recorder
    }

    /// The changes since the last call, as group, user and kind.
    fn take(&self) -> Vec<(String, String, PresenceKind)> {
        let changes = std::mem::take(&mut *lock(&self.changes));
        let text = |change: &PresenceChange| {
            let group = change.group.as_deref().unwrap_or("everyone");
            (group.to_owned(), change.user.to_string(), change.kind)
        };
        changes.iter().map(text).collect()
    }

    /// Those of one group.
    fn take_of(&self, group: &str) -> Vec<(String, PresenceKind)> {
        self.take()
            .into_iter()
            .filter(|change| change.0 == group)
            .map(|(_, user, kind)| (user, kind))
            .collect()
    }
}

fn rig(shards: usize, grace: Duration) -> Rig {
    let connection =
        ConnectionConfig { presence_grace: grace, heartbeat_interval: None, ..ConnectionConfig::default() };
    Rig::with(EngineConfig { shards: Some(shards), ..EngineConfig::default() }, connection)
}

fn connect(rig: &mut Rig, user: User) -> Client {
    let (mut connection, client) = new_connection(&rig.engine, &rig.config, rig.send_buffer);
    connection.user = Some(user);
    at_once(rig.everyone.adopt(connection)).unwrap();
    rig.settle();
    client
}

fn connect_as(rig: &mut Rig, user: &str) -> Client {
    connect(rig, User::new(user))
}

fn join(rig: &Rig, client: &Client, group: &str) {
    at_once(rig.everyone.join(client.id(), group)).map(drop).unwrap();
}

fn leave(rig: &Rig, client: &Client, group: &str) {
    at_once(rig.everyone.leave(client.id(), group)).unwrap();
}

fn pass(rig: &mut Rig, time: Duration) {
    rig.now += time;
    rig.turn();
    rig.settle();
}

fn present(rig: &mut Rig, group: Option<&str>) -> Vec<Present> {
    let answers = Arc::new(Mutex::new(Vec::new()));
    let told = answers.clone();
    at_once(rig.everyone.collect_presence(group, move |list| lock(&told).push(list))).unwrap();
    rig.settle();
    assert_eq!((lock(&answers).len(), Arc::strong_count(&answers)), (1, 1), "answered once");
    let mut list = lock(&answers).remove(0);
    list.sort_by(|a, b| a.user.cmp(&b.user));
    assert_eq!(list.len(), rig.everyone.presence_len(group), "the count is the list's length");
    list
}

fn names(rig: &mut Rig, group: Option<&str>) -> Vec<(String, usize)> {
    present(rig, group).into_iter().map(|one| (one.user.to_string(), one.connections)).collect()
}

fn joined(user: &str) -> (String, PresenceKind) {
    (user.to_owned(), Joined)
}

fn left(user: &str) -> (String, PresenceKind) {
    (user.to_owned(), Left)
}

#[test]
fn the_users_of_a_group_are_listed_once_with_their_connections() {
    for shards in 1..=3 {
        let mut rig = rig(shards, Duration::ZERO);
        let began = rig.now;
        let tabs: Vec<_> = (0..3).map(|_| connect_as(&mut rig, "ada")).collect();
        let bob = connect(&mut rig, User::new("bob").with_metadata(*b"away"));
        let nobody = rig.connect();
        rig.now += ms(20);
        for client in tabs[..2].iter().chain([&bob, &nobody]) {
            join(&rig, client, "room");
        }
        assert_eq!(
            names(&mut rig, Some("room")),
            [("ada".into(), 2), ("bob".into(), 1)],
            "no turn was needed"
        );
        assert_eq!(names(&mut rig, None), [("ada".into(), 3), ("bob".into(), 1)]);
        let list = present(&mut rig, Some("room"));
        assert_eq!(list[1].metadata.as_deref(), Some(&b"away"[..]));
        assert_eq!((list[0].since - began, present(&mut rig, None)[0].since - began), (ms(20), ms(0)));
        let counts: Vec<GroupCount> = rig.everyone.groups();
        assert_eq!((counts.len(), counts[0].connections, counts[0].users), (1, 4, 2));
        assert_eq!((rig.everyone.group_len("room"), rig.everyone.presence_len(Some("room"))), (4, 2));
        leave(&rig, &tabs[0], "room");
        leave(&rig, &bob, "room");
        assert_eq!(names(&mut rig, Some("room")), [("ada".into(), 1)]);
        assert_eq!(names(&mut rig, Some("no such room")), []);
        drop((tabs, bob, nobody));
        rig.settle();
        assert_eq!((rig.everyone.presence_len(None), rig.everyone.group_count()), (0, 0));
    }
}

#[test]
fn metadata_is_what_a_connection_of_the_user_brought_last() {
    let mut rig = rig(2, Duration::ZERO);
    let metadata = |rig: &mut Rig| present(rig, Some("room"))[0].metadata.clone();
    let one = connect(&mut rig, User::new("ada").with_metadata(*b"one"));
    let two = connect(&mut rig, User::new("ada").with_metadata(*b"two"));
    let plain = connect_as(&mut rig, "ada");
    join(&rig, &one, "room");
    assert_eq!(metadata(&mut rig).as_deref(), Some(&b"one"[..]));
    join(&rig, &two, "room");
    rig.settle();
    join(&rig, &plain, "room");
    assert_eq!(metadata(&mut rig).as_deref(), Some(&b"two"[..]), "none replaces none");
    at_once(rig.everyone.set_metadata(one.id(), *b"away")).unwrap();
    assert_eq!(metadata(&mut rig).as_deref(), Some(&b"away"[..]));
    assert_eq!(present(&mut rig, None)[0].metadata.as_deref(), Some(&b"away"[..]));
    let nobody = rig.connect();
    at_once(rig.everyone.set_metadata(nobody.id(), *b"no user")).unwrap();
    rig.settle();
}

#[test]
fn a_change_is_announced_once_for_a_user_s_first_and_last_connection() {
    for shards in 1..=3 {
        let mut rig = rig(shards, Duration::ZERO);
        let recorder = Recorder::on(&rig);
        let tabs: Vec<_> = (0..3).map(|_| connect_as(&mut rig, "ada")).collect();
        assert_eq!(recorder.take(), [("everyone".into(), "ada".into(), Joined)]);
        for tab in &tabs {
            join(&rig, tab, "room");
            join(&rig, tab, "room");
        }
        rig.settle();
        assert_eq!(recorder.take(), [("room".into(), "ada".into(), Joined)]);
        for tab in &tabs {
            leave(&rig, tab, "room");
            rig.settle();
        }
        assert_eq!(recorder.take(), [("room".into(), "ada".into(), Left)]);
        join(&rig, &tabs[1], "room");
        rig.settle();
        drop(tabs);
        rig.settle();
        let changes = recorder.take();
        assert_eq!(changes[0], ("room".into(), "ada".into(), Joined));
        assert_eq!(changes.len(), 3, "{changes:?}");
        assert!(changes[1..].iter().all(|(_, _, kind)| *kind == Left));
        assert_eq!(rig.everyone.group_count(), 0);
    }
}

#[test]
fn a_change_has_its_position_after_the_join_and_before_what_follows_from_it() {
    let mut rig = rig(3, Duration::ZERO);
    let recorder = Recorder::on(&rig);
    let ada = connect_as(&mut rig, "ada");
    recorder.take();
    let mut bob = connect_as(&mut rig, "bob");
    rig.settle();
    lock(&recorder.changes).clear();
    let at_join = at_once(rig.everyone.join(ada.id(), "room")).unwrap();
    rig.settle();
    let change = lock(&recorder.changes)[0].clone();
    assert!(change.position > at_join, "{} is not after {at_join}", change.position);
    let published = rig.everyone.clone();
    let mut receipt = testkit::Task::new(
        published.deliver(Publication::message(Address::Everyone, Payload::text("ada joined"))),
    );
    let _ = receipt.poll();
    rig.settle();
    assert!(receipt.poll().unwrap().unwrap().position > change.position);
    assert_eq!(bob.peer.receive().iter().filter(|one| matches!(one, testkit::Received::Data(_))).count(), 1);
}

#[test]
fn a_user_who_comes_back_in_time_has_neither_left_nor_joined() {
    for shards in 1..=3 {
        let mut rig = rig(shards, ms(3000));
        let recorder = Recorder::on(&rig);
        let mut tab = connect_as(&mut rig, "ada");
        join(&rig, &tab, "room");
        rig.settle();
        recorder.take();
        let since = present(&mut rig, Some("room"))[0].since;
        for _ in 0..4 {
            drop(tab);
            rig.settle();
            assert_eq!(names(&mut rig, Some("room")), [("ada".into(), 0)], "still present");
            assert_eq!((rig.everyone.group_len("room"), rig.everyone.group_count()), (0, 0));
            pass(&mut rig, ms(2999));
            tab = connect_as(&mut rig, "ada");
            join(&rig, &tab, "room");
            rig.settle();
            assert_eq!(names(&mut rig, Some("room")), [("ada".into(), 1)]);
            assert_eq!(present(&mut rig, Some("room"))[0].since, since);
            pass(&mut rig, ms(2));
        }
        pass(&mut rig, ms(10_000));
        assert_eq!(recorder.take(), []);
        drop(tab);
        rig.settle();
        pass(&mut rig, ms(2999));
        assert_eq!(recorder.take(), []);
        pass(&mut rig, ms(2));
        let mut changes = recorder.take();
        changes.sort();
        assert_eq!(changes, [("everyone".into(), "ada".into(), Left), ("room".into(), "ada".into(), Left)]);
        assert_eq!(names(&mut rig, Some("room")), []);
    }
}

#[test]
fn changes_alternate_however_a_user_s_connections_join_and_leave_on_several_shards() {
    let mut rig = rig(3, Duration::ZERO);
    let recorder = Recorder::on(&rig);
    let tabs: Vec<_> = (0..3).map(|_| connect_as(&mut rig, "ada")).collect();
    recorder.take();
    let mut changes = Vec::new();
    let mut number = 7_u64;
    for _ in 0..3000 {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (tab, shard) = ((number >> 33) % 3, (number >> 40) % 3);
        if (number >> 45).is_multiple_of(2) {
            join(&rig, &tabs[tab as usize], "room");
        } else {
            leave(&rig, &tabs[tab as usize], "room");
        }
        if !(number >> 50).is_multiple_of(3) {
            rig.turn_of(shard as usize);
        }
        changes.extend(recorder.take_of("room"));
    }
    rig.settle();
    changes.extend(recorder.take_of("room"));
    assert!(changes.len() > 100, "{}", changes.len());
    for (index, change) in changes.iter().enumerate() {
        let expected = if index % 2 == 0 { joined("ada") } else { left("ada") };
        assert_eq!(*change, expected, "change {index}");
    }
    let is_present = !names(&mut rig, Some("room")).is_empty();
    assert_eq!(is_present, changes.len() % 2 == 1, "the last change is how it is");
}

#[test]
fn while_an_observer_has_no_room_changes_that_cancel_each_other_out_are_not_announced() {
    let mut rig = rig(2, Duration::ZERO);
    let recorder = Recorder::on(&rig);
    let (ada, bob) = (connect_as(&mut rig, "ada"), connect_as(&mut rig, "bob"));
    recorder.take();
    recorder.room.store(0, SeqCst);
    for _ in 0..10 {
        join(&rig, &ada, "room");
        join(&rig, &bob, "room");
        rig.settle();
        leave(&rig, &ada, "room");
        rig.settle();
    }
    assert_eq!(recorder.take(), []);
    assert!(rig.shards.iter().all(|shard| !shard.has_work()), "no shard spins meanwhile");
    pass(&mut rig, ms(6));
    assert_eq!(recorder.take(), []);
    recorder.room.store(1, SeqCst);
    pass(&mut rig, ms(6));
    assert_eq!(recorder.take_of("room"), [joined("bob")]);
    assert_eq!(names(&mut rig, Some("room")), [("bob".into(), 1)]);
    leave(&rig, &bob, "room");
    join(&rig, &ada, "room");
    rig.settle();
    assert_eq!(recorder.take(), [], "there is no room again");
    recorder.room.store(10, SeqCst);
    pass(&mut rig, ms(6));
    let mut changes = recorder.take_of("room");
    changes.sort();
    assert_eq!(changes, [joined("ada"), left("bob")]);
}

#[test]
fn a_full_log_delays_changes_and_loses_none() {
    let engine = EngineConfig { shards: Some(2), log_capacity: 2, ..EngineConfig::default() };
    let connection = ConnectionConfig { presence_grace: Duration::ZERO, ..ConnectionConfig::default() };
    let mut rig = Rig::with(engine, connection);
    let recorder = Recorder::on(&rig);
    let users: Vec<_> = (0..20).map(|number| connect_as(&mut rig, &format!("user {number}"))).collect();
    for user in &users {
        join(&rig, user, "room");
    }
    for _ in 0..200 {
        pass(&mut rig, ms(6));
    }
    assert_eq!(recorder.take_of("room").len(), 20);
}

#[test]
fn a_list_and_the_changes_after_it_are_the_state_now() {
    let mut rig = rig(3, Duration::ZERO);
    let recorder = Recorder::on(&rig);
    let users: Vec<_> = (0..6).map(|number| connect_as(&mut rig, &format!("user {number}"))).collect();
    lock(&recorder.changes).clear();
    let (mut number, mut lists) = (3_u64, Vec::new());
    for step in 0..600 {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let user = &users[(number >> 33) as usize % 6];
        if (number >> 45).is_multiple_of(2) {
            join(&rig, user, "room")
        } else {
            leave(&rig, user, "room")
        }
        rig.turn_of((number >> 50) as usize % 3);
        if step % 50 == 0 {
            let asked_at = lock(&recorder.changes).len();
            let list = Arc::new(Mutex::new(Vec::new()));
            let told = list.clone();
            at_once(rig.everyone.collect_presence(Some("room"), move |it| *lock(&told) = it)).unwrap();
            lists.push((asked_at, list));
        }
    }
    rig.settle();
    let now: Vec<_> = names(&mut rig, Some("room")).into_iter().map(|(user, _)| user).collect();
    let changes = recorder.take_of("room");
    for (asked_at, list) in lists {
        let mut state: BTreeMap<String, ()> =
            lock(&list).iter().map(|one| (one.user.to_string(), ())).collect();
        for (user, kind) in &changes[asked_at..] {
            match kind {
                Joined => drop(state.insert(user.clone(), ())),
                Left => drop(state.remove(user)),
            }
        }
        assert_eq!(state.into_keys().collect::<Vec<_>>(), now);
    }
}

#[test]
fn connections_without_a_user_are_in_no_list_and_announce_nothing() {
    let mut rig = rig(2, Duration::ZERO);
    let recorder = Recorder::on(&rig);
    let client = rig.connect();
    join(&rig, &client, "room");
    rig.settle();
    assert_eq!((names(&mut rig, Some("room")), names(&mut rig, None)), (vec![], vec![]));
    at_once(rig.everyone.publish(Publication::close(client.id(), CloseCode::NORMAL, "").unwrap())).unwrap();
    rig.settle();
    assert_eq!(recorder.take(), []);
    assert!(!rig.everyone.observe_presence(recorder), "there is one observer");
}

#[test]
#[cfg(feature = "audit")]
fn a_change_needs_nothing_that_happens_to_wake_the_shards() {
    let mut rig = rig(3, ms(50)).sleepy();
    let recorder = Recorder::on(&rig);
    let tabs: Vec<_> = (0..3).map(|_| connect_as(&mut rig, "ada")).collect();
    for tab in &tabs {
        join(&rig, tab, "room");
    }
    rig.settle();
    assert_eq!(recorder.take_of("room"), [joined("ada")]);
    for tab in &tabs {
        leave(&rig, tab, "room");
    }
    rig.settle();
    assert_eq!(recorder.take(), []);
    rig.now += ms(51);
    rig.settle();
    assert_eq!(recorder.take(), [("room".into(), "ada".into(), Left)]);
}
