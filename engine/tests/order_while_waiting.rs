//! Publishers that wait, while other things happen.
//!
//! A publisher that finds the log or a mailbox full waits. Meanwhile groups are emptied and created again,
//! other publishers get in first, futures are dropped, the engine ends. The guarantees hold for the moment at
//! which the publication is accepted, not for that of its first attempt.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use shardcast_engine::{
    Address, ConnectionConfig, ConnectionId, EngineConfig, GroupMetrics, Handler, Message, Namespace,
    Payload, Publication, PublishError, Shutdown,
};
use testkit::sender::too_many_to_join;
use testkit::{Client, Rig, Task, at_once};

/// An engine whose log holds four publications.
fn narrow_log(shards: usize) -> Rig {
    let engine = EngineConfig { shards: Some(shards), log_capacity: 4, ..EngineConfig::default() };
    Rig::with(engine, ConnectionConfig::default())
}

fn fill_log(rig: &Rig) {
    for _ in 0..4 {
        rig.everyone.try_publish(Publication::message(Address::Everyone, Payload::text("fill"))).unwrap();
    }
    rig.everyone.try_publish(Publication::message(Address::Everyone, Payload::text("too much"))).unwrap_err();
}

/// What a client has received, without the publications that filled the log.
fn receive(client: &mut Client) -> Vec<String> {
    let mut data = client.peer.receive_data();
    data.retain(|text| text != "fill");
    data
}

#[test]
fn a_member_that_joins_before_a_waiting_publication_is_accepted_gets_it() {
    for names in [&["a", "b"][..], &["a"]] {
        let mut rig = narrow_log(2);
        let mut clients = rig.connect_many(3);
        let [first, second, third] = [0, 1, 2].map(|client: usize| clients[client].id());
        assert_eq!([first, second, third].map(|id| id.shard()), [0, 1, 0]);
        at_once(rig.everyone.join(first, "a")).unwrap();
        at_once(rig.everyone.join(third, names[names.len() - 1])).unwrap();
        rig.settle();
        fill_log(&rig);
        let everyone = rig.everyone.clone();
        let mut waiting =
            Task::new(everyone.publish(Publication::message(
                Address::groups(names.iter().copied()),
                Payload::text("waited"),
            )));
        assert!(waiting.poll().is_none(), "the log is full");
        // The first member leaves: with two names, the group is emptied by that, while the other shard keeps
        // the log full.
        at_once(rig.everyone.leave(first, "a")).unwrap();
        rig.turn_of(0);
        at_once(rig.everyone.join(second, "a")).unwrap();
        rig.turn_of(1);
        rig.everyone
            .try_publish(Publication::message(
                Address::groups(names.iter().copied()),
                Payload::text("quicker"),
            ))
            .unwrap();
        assert!(waiting.poll().is_some(), "there is room");
        rig.settle();
        assert_eq!(receive(&mut clients[2]), ["quicker", "waited"], "{names:?}");
        assert_eq!(receive(&mut clients[1]), ["quicker", "waited"], "a member before either, of {names:?}");
        assert_eq!(receive(&mut clients[0]), <[&str; 0]>::default(), "it has left, {names:?}");
    }
}

#[test]
fn a_receipt_counts_the_members_at_the_moment_of_acceptance() {
    let mut rig = narrow_log(1);
    let clients = rig.connect_many(2);
    at_once(rig.everyone.join(clients[0].id(), "a")).unwrap();
    rig.settle();
    fill_log(&rig);
    let everyone = rig.everyone.clone();
    let mut sending =
        Task::new(everyone.deliver(Publication::message(Address::group("a"), Payload::text("waited"))));
    assert!(sending.poll().is_none(), "the log is full");
    at_once(rig.everyone.leave(clients[0].id(), "a")).unwrap();
    rig.settle(); // the group is closed
    at_once(rig.everyone.join(clients[1].id(), "a")).unwrap();
    assert!(sending.poll().is_none(), "there is room, but no publisher has taken it");
    rig.settle();
    assert_eq!(sending.poll().expect("it was accepted").unwrap().recipients, 1);
}

#[test]
fn a_query_that_waited_is_about_the_members_at_the_moment_of_acceptance() {
    for names in [&["a"][..], &["a", "b"]] {
        let engine = EngineConfig { shards: Some(1), mailbox_capacity: 4, ..EngineConfig::default() };
        let mut rig = Rig::with(engine, ConnectionConfig::default());
        let clients = [rig.connect(), rig.connect()];
        let [first, second] = [clients[0].id(), clients[1].id()];
        at_once(rig.everyone.join(first, "a")).unwrap();
        rig.everyone
            .try_publish(Publication::message(Address::Connection(second), Payload::text("one")))
            .unwrap();
        rig.settle();
        for _ in 0..4 {
            at_once(rig.everyone.leave(first, "a")).unwrap();
        }
        let offered = Arc::new(AtomicU64::new(0));
        let (everyone, sum) = (rig.everyone.clone(), offered.clone());
        let on_metrics = move |part: GroupMetrics| {
            sum.fetch_add(part.tally.offered, Relaxed);
        };
        let address = Address::groups(names.iter().copied());
        let mut asking = Task::new(everyone.collect_metrics(&address, &[], on_metrics));
        assert!(asking.poll().is_none(), "the mailbox is full");
        // The group is closed, and created again with a member that has been offered a frame.
        rig.turn();
        at_once(rig.everyone.join(second, "a")).unwrap();
        assert_eq!(asking.poll(), Some(Ok(())));
        rig.settle();
        assert_eq!(offered.load(Relaxed), 1, "{names:?}");
    }
}

#[test]
fn a_publisher_that_stops_waiting_makes_room_for_another() {
    for given_up in [0, 2, 10] {
        let engine = EngineConfig {
            shards: Some(1),
            log_capacity: 2,
            publishers_waiting_max: 2,
            ..EngineConfig::default()
        };
        let mut rig = Rig::with(engine, ConnectionConfig::default());
        let _client = rig.connect();
        let everyone = rig.everyone.clone();
        let publish =
            || Task::new(everyone.publish(Publication::message(Address::Everyone, Payload::text("one"))));
        for _ in 0..2 {
            assert_eq!(publish().poll(), Some(Ok(())));
        }
        for _ in 0..given_up {
            assert!(publish().poll().is_none(), "it waits, and is dropped");
        }
        let (mut first, mut second, mut third) = (publish(), publish(), publish());
        assert_eq!((first.poll(), second.poll()), (None, None), "two may wait, {given_up} were dropped");
        assert_eq!(third.poll(), Some(Err(PublishError::Overloaded)), "and no more");
    }
}

#[test]
fn a_publication_whose_future_was_dropped_after_it_was_accepted_is_delivered() {
    let config = ConnectionConfig { outbox_frames: 1, ..ConnectionConfig::default() };
    let mut rig = Rig::one(config);
    let mut client = rig.connect();
    rig.everyone
        .try_publish(Publication::message(Address::Everyone, Payload::text(&"x".repeat(100_000))))
        .unwrap();
    rig.settle();
    let everyone = rig.everyone.clone();
    for number in 0..3 {
        // As a timeout around it does.
        let text = format!("pay {number}");
        let mut given_up =
            Task::new(everyone.publish(Publication::message(Address::Everyone, Payload::text(&text))));
        assert!(given_up.poll().is_none(), "the peer has no room");
        rig.settle();
        assert!(given_up.poll().is_none());
    }
    let mut received = Vec::new();
    while received.len() < 4 {
        received.extend(client.peer.receive_data());
        rig.settle();
    }
    assert_eq!(received[1..], ["pay 0", "pay 1", "pay 2"]);
}

#[test]
fn a_publication_whose_future_was_dropped_before_it_was_accepted_is_not_sent() {
    let mut rig = narrow_log(1);
    let mut client = rig.connect();
    fill_log(&rig);
    let everyone = rig.everyone.clone();
    let mut given_up =
        Task::new(everyone.publish(Publication::message(Address::Everyone, Payload::text("given up"))));
    assert!(given_up.poll().is_none(), "the log is full");
    drop(given_up);
    rig.settle();
    assert_eq!(receive(&mut client), <[&str; 0]>::default());
}

#[test]
fn a_publication_that_waited_while_the_engine_closed_is_refused_and_not_delivered() {
    let engine = EngineConfig { shards: Some(1), mailbox_capacity: 1, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, ConnectionConfig::default());
    let mut client = rig.connect();
    let id = client.id();
    at_once(rig.everyone.connection_metrics(id, |_| ())).unwrap();
    let (everyone, engine) = (rig.everyone.clone(), rig.engine.clone());
    let mut waiting =
        Task::new(everyone.publish(Publication::message(Address::Connection(id), Payload::text("too late"))));
    assert!(waiting.poll().is_none(), "the mailbox is full");
    let mut end = Task::new(engine.shutdown(Shutdown::within(Duration::from_secs(60))));
    assert!(end.poll().is_none());
    rig.settle();
    assert_eq!(waiting.poll(), Some(Err(PublishError::Closed)));
    assert_eq!(client.peer.receive_data(), <[&str; 0]>::default());
}

/// Publishes three frames that cannot share one chunk, then closes.
struct Farewell(Namespace);

impl Handler for Farewell {
    fn on_message(
        &mut self,
        _: Message<'_>,
        context: &mut shardcast_engine::Context<'_>,
    ) -> std::task::Poll<()> {
        for text in ["one", "two", "three"] {
            self.0
                .try_publish(
                    Publication::message(Address::Everyone, Payload::text(text)).except(&too_many_to_join()),
                )
                .unwrap();
        }
        let code = shardcast_engine::CloseCode(4000);
        context.close(shardcast_engine::CloseReason::Application { code, text: "bye".into() });
        std::task::Poll::Ready(())
    }
}

#[test]
fn publications_before_a_handlers_close_arrive_even_if_the_mailbox_is_full() {
    for is_full in [false, true] {
        let engine = EngineConfig { shards: Some(1), mailbox_capacity: 1, ..EngineConfig::default() };
        let mut rig = Rig::with(engine, ConnectionConfig::default());
        rig.send_buffer = 1 << 16;
        let everyone = rig.everyone.clone();
        let mut peer = rig.connect_handler(Box::new(|_| Box::new(Farewell(everyone))));
        peer.text("go");
        if is_full {
            // Another publisher sends a command at the same time.
            at_once(rig.everyone.connection_metrics("0000000000000000".parse().unwrap(), |_| ())).unwrap();
        }
        rig.settle();
        let data = |text: &str| testkit::Received::Data(text.into());
        let closed = [testkit::Received::Close(Some(4000)), testkit::Received::End];
        let received = peer.receive_and_answer();
        assert_eq!(received[..3], [data("one"), data("two"), data("three")], "full: {is_full}");
        assert_eq!(received[3..], closed, "full: {is_full}");
    }
}

// ---- A turn that cannot finish ----------------------------------------------------------------------------------

#[test]
fn a_publication_after_more_commands_than_one_turn_takes_follows_all_of_them() {
    let engine = EngineConfig { shards: Some(1), mailbox_capacity: 1 << 14, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, ConnectionConfig::default());
    let mut clients = rig.connect_many(2);
    let [first, second] = [clients[0].id(), clients[1].id()];
    at_once(rig.everyone.join(second, "a")).unwrap();
    rig.settle();
    for _ in 0..10_000 {
        at_once(rig.everyone.connection_metrics(first, |_| ())).unwrap();
    }
    // The last of many commands: is the connection a member by now?
    at_once(rig.everyone.join(first, "a")).unwrap();
    at_once(rig.everyone.leave(second, "a")).unwrap();
    rig.everyone.try_publish(Publication::message(Address::Connection(first), Payload::text("one"))).unwrap();
    for to in [Address::group("a"), Address::groups(["a", "b"]), Address::Everyone] {
        rig.everyone.try_publish(Publication::message(&to, Payload::text("two"))).unwrap();
    }
    rig.settle();
    assert_eq!(clients[0].peer.receive_data(), ["one", "two", "two", "two"]);
    assert_eq!(clients[1].peer.receive_data(), ["two"], "it had left the group");
}

/// Sends a message to one connection and then one to everyone about a new connection.
struct Announces(Namespace, ConnectionId);

impl Handler for Announces {
    fn on_open(&mut self, _: &mut shardcast_engine::Context<'_>) -> std::task::Poll<()> {
        self.0
            .try_publish(Publication::message(Address::Connection(self.1), Payload::text("to one")))
            .unwrap();
        self.0.try_publish(Publication::message(Address::Everyone, Payload::text("to everyone"))).unwrap();
        std::task::Poll::Ready(())
    }

    fn on_message(&mut self, _: Message<'_>, _: &mut shardcast_engine::Context<'_>) -> std::task::Poll<()> {
        std::task::Poll::Ready(())
    }
}

#[test]
fn messages_of_a_handler_keep_their_order_while_its_shard_empties_the_mailbox() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    let (everyone, id) = (rig.everyone.clone(), client.id());
    let _peer = rig.connect_handler(Box::new(move |_| Box::new(Announces(everyone, id))));
    assert_eq!(client.peer.receive_data(), ["to one", "to everyone"]);
}
