//! Commands that a handler sends to its own shard during a call: they do not go through the shard's mailbox, and keep
//! their place among those that do.
//!
//! Driven turn by turn. Other threads send while a handler is in a call, and have sent when it continues.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread::scope;

use shardcast_engine::{
    Address, ConnectionConfig, ConnectionId, Context, EngineConfig, Handler, Message, Namespace, Payload,
    Publication,
};
use testkit::{RawClient, Rig, Task, at_once, lock};

/// Calls the test's function with each message.
struct Calls<F>(F);

impl<F: FnMut(&Message<'_>, ConnectionId)> Handler for Calls<F> {
    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        (self.0)(&message, context.id());
        Poll::Ready(())
    }
}

fn connect(rig: &mut Rig, on_message: impl FnMut(&Message<'_>, ConnectionId) + Send + 'static) -> RawClient {
    rig.connect_handler(Box::new(|_| Box::new(Calls(on_message))))
}

fn say(namespace: &Namespace, to: impl Into<Address>, text: impl std::fmt::Display) {
    namespace.try_publish(Publication::message(to, Payload::text(&text.to_string()))).unwrap();
}

/// Runs it on another thread, to its end.
fn elsewhere<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    scope(|threads| threads.spawn(run).join().unwrap())
}

/// All that there is for the client.
fn receive(rig: &mut Rig, client: &mut RawClient) -> Vec<String> {
    let mut received = Vec::new();
    loop {
        rig.settle();
        let more = client.receive_data();
        if more.is_empty() {
            return received;
        }
        received.extend(more);
    }
}

/// More than the local queue holds, so that some commands go through the mailbox.
const ROUNDS: usize = 100;

#[test]
fn what_a_handler_and_other_threads_send_one_after_the_other_arrives_in_that_order() {
    let mut rig = Rig::new(1);
    let namespace = rig.everyone.clone();
    let mut client = connect(&mut rig, move |_, id| {
        let mut numbers = 0..;
        let mut number = || numbers.next().unwrap();
        for _ in 0..ROUNDS {
            say(&namespace, id, number());
            let (first, second) = (number(), number());
            elsewhere(|| say(&namespace, id, first));
            say(&namespace, id, second);
            say(&namespace, Address::Everyone, number());
            say(&namespace, id, number());
            let (first, second) = (number(), number());
            elsewhere(|| say(&namespace, Address::Everyone, first));
            say(&namespace, id, second);
        }
    });
    client.text("go");
    let expected: Vec<String> = (0..7 * ROUNDS).map(|number| number.to_string()).collect();
    assert_eq!(receive(&mut rig, &mut client), expected);
}

#[test]
fn a_handler_that_joins_a_group_gets_what_any_thread_publishes_to_it_next() {
    let mut rig = Rig::new(1);
    let namespace = rig.everyone.clone();
    let mut client = connect(&mut rig, move |_, id| {
        for round in 0..ROUNDS {
            let publish = |text: &str| {
                elsewhere(|| say(&namespace, Address::group("g"), format_args!("{text} {round}")));
            };
            publish("before");
            at_once(namespace.join(id, "g")).unwrap();
            publish("member");
            at_once(namespace.leave(id, "g")).unwrap();
            publish("after");
        }
    });
    client.text("go");
    let expected: Vec<String> = (0..ROUNDS).map(|round| format!("member {round}")).collect();
    assert_eq!(receive(&mut rig, &mut client), expected);
}

#[test]
fn a_publisher_elsewhere_waits_if_a_handlers_own_messages_have_used_up_the_room() {
    // Two messages on their way to a shard are within the window, a quarter of the outbox.
    let mut rig = Rig::one(ConnectionConfig { outbox_frames: 8, ..ConnectionConfig::default() });
    let waits = Arc::new(Mutex::new(Vec::new()));
    let (namespace, seen) = (rig.everyone.clone(), waits.clone());
    let mut client = connect(&mut rig, move |message, id| {
        let own: usize = std::str::from_utf8(message.payload).unwrap().parse().unwrap();
        (0..own).for_each(|number| say(&namespace, id, number));
        let is_waiting = elsewhere(|| {
            let publication = Publication::message(id, Payload::text("other"));
            Task::new(namespace.publish(publication)).poll().is_none()
        });
        lock(&seen).push(is_waiting);
    });
    for own in ["1", "2"] {
        client.text(own);
        rig.settle();
    }
    assert_eq!(*lock(&waits), [false, true]);
    assert_eq!(client.receive_data(), ["0", "other", "0", "1", "other"]);
}

#[test]
fn a_handler_that_answers_each_drop_of_a_message_with_another_one_does_not_hold_its_shard() {
    /// Sends a message that is dropped at once, and the next one when it is told so.
    struct Stubborn(Namespace);

    impl Stubborn {
        fn send(&self, id: ConnectionId) {
            let policy = shardcast_engine::Policy::DropMessage { timeout: std::time::Duration::ZERO };
            let delivery = shardcast_engine::Delivery::with_policy(policy).unwrap();
            let publication = Publication::message(id, Payload::text("x")).with_delivery(delivery);
            self.0.try_publish(publication).unwrap();
        }
    }

    impl Handler for Stubborn {
        fn on_message(&mut self, _: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
            self.send(context.id());
            self.send(context.id());
            Poll::Ready(())
        }

        fn on_drop(&mut self, _: &shardcast_engine::DropNotice, context: &mut Context<'_>) -> Poll<()> {
            self.send(context.id());
            Poll::Ready(())
        }
    }

    let config = ConnectionConfig { outbox_frames: 1, ..ConnectionConfig::default() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
    let stubborn = Stubborn(rig.everyone.clone());
    let mut client = rig.connect_handler(Box::new(|_| Box::new(stubborn)));
    client.text("go");
    rig.turn(); // returns
    let dropped = rig.engine.metrics().tally.dropped.total();
    assert!((1..100).contains(&dropped), "{dropped}");
    assert!(rig.shards[0].has_work(), "the answer to the last drop is left for the next turn");
}
