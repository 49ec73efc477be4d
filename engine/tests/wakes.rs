//! A sleeping shard is woken by everything that it has to process.
//!
//! Shards are driven as their threads would be: a shard takes a turn only if it has work, if its time is
//! over, or if something has woken it. A missing wake shows as a frame that does not arrive, or as a
//! publisher that waits for ever.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use shardcast_engine::{Address, ConnectionConfig, EngineConfig, Payload, Policy, Publication};
use testkit::client::new_connection;
use testkit::handler::ClosesAtDrop;
use testkit::{Client, Rig, Task, at_once};

fn asleep(shards: usize) -> Rig {
    let engine = EngineConfig { shards: Some(shards), ..EngineConfig::default() };
    let mut rig = Rig::with(engine, ConnectionConfig::default()).sleepy();
    rig.settle();
    rig
}

fn publish(rig: &Rig, to: impl Into<Address>, text: &str) {
    rig.everyone.try_publish(Publication::message(to, Payload::text(text))).unwrap();
}

/// Clients of the first of two shards.
fn clients_of_one_shard(rig: &mut Rig, count: usize) -> Vec<Client> {
    let mut clients = rig.connect_many(2 * count);
    clients.retain(|client| client.id().shard() == 0);
    assert_eq!(clients.len(), count);
    clients
}

#[test]
fn a_publication_wakes_a_shard_as_long_as_one_member_stays() {
    let mut rig = asleep(2);
    let mut clients = clients_of_one_shard(&mut rig, 3);
    for client in &clients {
        at_once(rig.everyone.join(client.id(), "a")).unwrap();
    }
    rig.settle();
    for left in [2, 1] {
        at_once(rig.everyone.leave(clients[left].id(), "a")).unwrap();
        rig.settle();
        publish(&rig, Address::group("a"), "to the others");
        rig.settle();
        assert_eq!(clients[0].peer.receive_data(), ["to the others"], "{left} stay");
    }
}

#[test]
fn connections_that_arrive_together_share_a_wake_and_none_is_forgotten() {
    let mut rig = asleep(1);
    let wakes = |rig: &Rig| rig.engine.metrics().wakes;
    let before = wakes(&rig);
    let (everyone, mut clients) = (rig.everyone.clone(), Vec::new());
    let mut pending = Vec::new();
    for _ in 0..3 {
        let (connection, client) = new_connection(&rig.engine, &rig.config, rig.send_buffer);
        pending.push(at_once(everyone.adopt_without_wake(connection)).unwrap());
        clients.push(client);
    }
    rig.settle();
    assert_eq!((rig.engine.metrics().connections, wakes(&rig) - before), (0, 0), "the shard sleeps");
    drop(pending);
    rig.settle();
    assert_eq!((rig.engine.metrics().connections, wakes(&rig) - before), (3, 1));
    publish(&rig, Address::Everyone, "to all");
    rig.settle();
    for client in &mut clients {
        assert_eq!(client.peer.receive_data(), ["to all"]);
    }
}

#[test]
fn a_shard_is_woken_for_a_connection_whose_task_is_dropped() {
    let mut rig = asleep(1);
    let (connection, _client) = new_connection(&rig.engine, &rig.config, rig.send_buffer);
    let everyone = rig.everyone.clone();
    let mut task = Task::new(async move {
        let _wake = everyone.adopt_without_wake(connection).await.unwrap();
        std::future::pending::<()>().await;
    });
    assert_eq!(task.poll(), None);
    rig.settle();
    assert_eq!(rig.engine.metrics().connections, 0);
    drop(task);
    rig.settle();
    assert_eq!(rig.engine.metrics().connections, 1);
}

#[test]
fn a_closing_member_does_not_disable_the_others_wakes() {
    let mut rig = asleep(2);
    let mut clients = clients_of_one_shard(&mut rig, 2);
    for client in &clients {
        at_once(rig.everyone.join(client.id(), "a")).unwrap();
    }
    rig.settle();
    drop(clients.pop());
    rig.settle();
    for to in [Address::group("a"), Address::groups(["a", "b"]), Address::Everyone] {
        publish(&rig, &to, "still here");
        rig.settle();
        assert_eq!(clients[0].peer.receive_data(), ["still here"], "{to:?}");
    }
}

#[test]
fn a_join_restores_the_interest_that_a_leave_has_cleared() {
    let mut rig = asleep(2);
    let mut clients = clients_of_one_shard(&mut rig, 2);
    let (first, second) = (clients[0].id(), clients[1].id());
    at_once(rig.everyone.join(first, "a")).unwrap();
    rig.settle();
    // The leave is executed while the join is in flight: it removes the shard's last member.
    at_once(rig.everyone.leave(first, "a")).unwrap();
    at_once(rig.everyone.join(second, "a")).unwrap();
    rig.settle();
    publish(&rig, Address::group("a"), "to the second");
    rig.settle();
    assert_eq!(clients[1].peer.receive_data(), ["to the second"]);
}

#[test]
fn a_sender_at_a_full_mailbox_is_woken_as_soon_as_one_command_was_taken() {
    let engine = EngineConfig { shards: Some(1), mailbox_capacity: 2, ..EngineConfig::default() };
    // With so small an outbox the shard runs one publication a turn.
    let config = ConnectionConfig { outbox_frames: 1, ..ConnectionConfig::default() };
    let mut rig = Rig::with(engine, config).sleepy();
    let mut client = rig.connect();
    let id = client.id();
    publish(&rig, Address::Everyone, "one");
    publish(&rig, Address::Everyone, "two");
    publish(&rig, Address::Connection(id), "three");
    publish(&rig, Address::Connection(id), "four");
    let everyone = rig.everyone.clone();
    let mut fifth =
        Task::new(everyone.publish(Publication::message(Address::Connection(id), Payload::text("five"))));
    assert_eq!(fifth.poll(), None, "the mailbox is full");
    // "three" is taken and must wait for "two"; "four" is still in the mailbox.
    rig.turn();
    let _ = fifth.poll();
    let again = rig.everyone.try_publish(Publication::message(Address::Connection(id), Payload::text("six")));
    assert!(again.is_err(), "five was woken and has taken the room");
    rig.settle();
    assert_eq!(client.peer.receive_data(), ["one", "two", "three", "four", "five"]);
    assert_eq!(fifth.poll(), Some(Ok(())));
}

#[test]
fn a_publisher_at_a_full_log_is_woken_even_if_no_shard_has_members() {
    for shards in [1, 3] {
        let engine = EngineConfig { shards: Some(shards), log_capacity: 4, ..EngineConfig::default() };
        let mut rig = Rig::with(engine, ConnectionConfig::default()).sleepy();
        let mut clients = rig.connect_many(shards);
        at_once(rig.everyone.join(clients[0].id(), "a")).unwrap();
        rig.settle();
        let everyone = rig.everyone.clone();
        let mut waiting: Vec<_> = (0..20)
            .map(|_| {
                Task::new(
                    everyone
                        .publish(Publication::message(Address::group("a"), Payload::text("to one shard"))),
                )
            })
            .collect();
        for _ in 0..100 {
            waiting.retain_mut(|task| task.poll().is_none());
            rig.settle();
        }
        assert!(waiting.is_empty(), "{} of 20 wait for ever, {shards} shards", waiting.len());
        assert_eq!(clients[0].peer.receive_data().len(), 20);
    }
}

#[test]
fn a_frame_that_may_be_dropped_wakes_its_shard_when_its_time_is_over() {
    let policy = Policy::DropMessage { timeout: Duration::from_millis(20) };
    let config = ConnectionConfig { outbox_frames: 1, policy, ..ConnectionConfig::default() };
    let mut rig = Rig::one(config).sleepy();
    let client = rig.connect();
    let everyone = rig.everyone.clone();
    // More than the kernel accepts, then one that finds the outbox full.
    publish(&rig, Address::Everyone, &"x".repeat(100_000));
    rig.settle();
    let mut sending =
        Task::new(everyone.deliver(Publication::message(Address::Everyone, Payload::text("late"))));
    assert!(sending.poll().is_none());
    rig.settle();
    rig.now += Duration::from_millis(20);
    rig.settle();
    let receipt = sending.poll().expect("its time is over").unwrap();
    assert_eq!((receipt.recipients, receipt.dropped.timeout), (1, 1));
    assert_eq!(client.record().drops, [1]);
}

#[test]
fn a_handlers_close_at_the_end_of_a_turn_keeps_its_shard_awake() {
    let policy = Policy::DropMessage { timeout: Duration::from_millis(20) };
    let config = ConnectionConfig { outbox_frames: 1, policy, ..ConnectionConfig::default() };
    let mut rig = Rig::one(config).sleepy();
    let _peer = rig.connect_handler(Box::new(|_| Box::new(ClosesAtDrop)));
    for length in [100_000, 10] {
        publish(&rig, Address::Everyone, &"x".repeat(length));
        rig.settle();
    }
    assert_eq!(rig.everyone.len(), 1);
    rig.now += Duration::from_millis(20);
    rig.settle(); // the drop is reported after sockets and mailbox have been processed
    assert_eq!(rig.everyone.len(), 0, "it has closed");
}

/// Shards of the engine that have read a publication or were woken since the last call.
fn busy_shards(rig: &Rig, before: &mut Vec<(u64, u64)>) -> Vec<usize> {
    let now: Vec<_> =
        rig.engine.shard_metrics().iter().map(|metrics| (metrics.publications, metrics.wakes)).collect();
    let busy = (0..now.len()).filter(|shard| before.get(*shard) != Some(&now[*shard])).collect();
    *before = now;
    busy
}

#[test]
fn a_receipt_wakes_only_the_shards_with_members_and_waits_only_for_them() {
    let mut rig = asleep(16);
    let mut clients = rig.connect_many(16);
    for client in clients.iter().filter(|client| [3, 9].contains(&client.id().shard())) {
        at_once(rig.everyone.join(client.id(), "a")).unwrap();
    }
    rig.settle();
    let mut seen = Vec::new();
    busy_shards(&rig, &mut seen);
    let everyone = rig.everyone.clone();
    for to in [Address::group("a"), Address::groups(["a", "b"])] {
        let publication = Publication::message(&to, Payload::text("to two"));
        let mut sending = Task::new(everyone.deliver(publication));
        assert!(sending.poll().is_none());
        rig.settle();
        let receipt = sending.poll().expect("both shards have passed it").unwrap();
        assert_eq!((receipt.recipients, receipt.accepted()), (2, 2));
        assert_eq!(busy_shards(&rig, &mut seen), [3, 9], "{to:?}");
    }
    let received: usize = clients.iter_mut().map(|client| client.peer.receive_data().len()).sum();
    assert_eq!(received, 4);
}

#[test]
fn a_publisher_that_waits_for_a_congested_member_wakes_only_the_shards_with_members() {
    let engine = EngineConfig { shards: Some(16), ..EngineConfig::default() };
    let config = ConnectionConfig { outbox_frames: 64, ..ConnectionConfig::default() };
    let mut rig = Rig::with(engine, config).sleepy();
    let mut clients = rig.connect_many(16);
    let slow = clients.iter().position(|client| client.id().shard() == 5).unwrap();
    at_once(rig.everyone.join(clients[slow].id(), "a")).unwrap();
    rig.settle();
    let everyone = rig.everyone.clone();
    let publish = |text: &str| {
        Task::new(everyone.publish(Publication::message(Address::group("a"), Payload::text(text))))
    };
    // More than the kernel accepts, then a quarter of the outbox.
    assert!(publish(&"x".repeat(100_000)).poll().is_some());
    for _ in 0..16 {
        rig.settle();
        assert!(publish("y").poll().is_some());
    }
    rig.settle();
    let mut seen = Vec::new();
    busy_shards(&rig, &mut seen);
    for _ in 0..4 {
        let mut waiting = publish("z");
        assert!(waiting.poll().is_none(), "the member is congested");
        rig.settle();
        assert_eq!(busy_shards(&rig, &mut seen), [5]);
        assert!(waiting.poll().is_some(), "the outbox has room");
    }
    let mut received = Vec::new();
    for _ in 0..21 {
        received.extend(clients[slow].peer.receive_data());
        rig.settle();
    }
    assert_eq!(received.len(), 21);
}

#[test]
fn a_receipt_arrives_although_its_last_member_leaves_before_the_shard_reads_the_publication() {
    let mut rig = asleep(2);
    let clients = clients_of_one_shard(&mut rig, 1);
    at_once(rig.everyone.join(clients[0].id(), "a")).unwrap();
    rig.settle();
    at_once(rig.everyone.leave(clients[0].id(), "a")).unwrap();
    at_once(rig.everyone.join(clients[0].id(), "a")).unwrap();
    at_once(rig.everyone.leave(clients[0].id(), "a")).unwrap();
    let everyone = rig.everyone.clone();
    let mut sending =
        Task::new(everyone.deliver(Publication::message(Address::group("a"), Payload::text("too late"))));
    assert!(sending.poll().is_none(), "the leaves have not been executed");
    rig.settle();
    assert_eq!(sending.poll().map(|receipt| receipt.unwrap().recipients), Some(0));
}

#[test]
fn a_receipt_counts_a_join_that_has_returned_although_a_leave_was_executed_after_it() {
    // With so small an outbox the shard runs one publication a turn.
    let config = ConnectionConfig { outbox_frames: 1, ..ConnectionConfig::default() };
    let engine = EngineConfig { shards: Some(2), ..EngineConfig::default() };
    let mut rig = Rig::with(engine, config).sleepy();
    let clients = clients_of_one_shard(&mut rig, 2);
    at_once(rig.everyone.join(clients[0].id(), "a")).unwrap();
    rig.settle();
    at_once(rig.everyone.leave(clients[0].id(), "a")).unwrap();
    publish(&rig, Address::Everyone, "one");
    publish(&rig, Address::Everyone, "two");
    at_once(rig.everyone.join(clients[1].id(), "a")).unwrap();
    rig.turn(); // the shard has no members now, and the join waits for "two"
    let everyone = rig.everyone.clone();
    let mut sending =
        Task::new(everyone.deliver(Publication::message(Address::group("a"), Payload::text("three"))));
    assert!(sending.poll().is_none());
    rig.settle();
    assert_eq!(sending.poll().map(|receipt| receipt.unwrap().recipients), Some(1));
}

#[test]
fn shards_without_members_do_not_keep_publishers_waiting_for_room() {
    let engine = EngineConfig { shards: Some(4), ..EngineConfig::default() };
    // The window is two publications.
    let config = ConnectionConfig { outbox_frames: 4, ..ConnectionConfig::default() };
    let mut rig = Rig::with(engine, config).sleepy();
    let mut clients = rig.connect_many(4);
    at_once(rig.everyone.join(clients[0].id(), "a")).unwrap();
    rig.settle();
    let everyone = rig.everyone.clone();
    let mut at_once = 0;
    for _ in 0..100 {
        let publication = Publication::message(Address::group("a"), Payload::text("on"));
        let mut publishing = Task::new(everyone.publish(publication));
        at_once += usize::from(publishing.poll().is_some());
        rig.settle();
        publishing.poll();
        assert_eq!(clients[0].peer.receive_data(), ["on"]);
    }
    assert!(at_once >= 50, "{at_once} of 100 found room, although the only member reads everything");
}
