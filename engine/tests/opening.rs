//! The opening of a connection: what reaches it before its `on_open` is done.
//!
//! A connection is a member of everyone only after its greeting: so a client receives nothing before its
//! greeting, and a client that is refused receives no message at all. What is sent to it alone, or to a group
//! that it has joined, reaches it at once.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::task::Poll;

use shardcast_engine::{
    Address, CloseCode, CloseReason, Context, Handler, Message, Namespace, Payload, Publication,
};
use testkit::client::new_connection_with;
use testkit::{Client, Received, Rig, Task, at_once, on_each_transport};

fn publish(rig: &Rig, to: impl Into<Address>, text: &str) {
    rig.everyone.try_publish(Publication::message(to, Payload::text(text))).unwrap();
}

fn finish_opening(rig: &mut Rig, client: &Client) {
    client.release();
    rig.settle();
}

on_each_transport!(before_on_open_is_done_a_client_gets_only_messages_to_it_alone);
fn before_on_open_is_done_a_client_gets_only_messages_to_it_alone() {
    let mut rig = Rig::new(2);
    let mut witness = rig.connect();
    let mut client = rig.connect_opening();
    let id = client.id();
    publish(&rig, Address::Everyone, "a secret");
    publish(&rig, Address::Connection(id), "welcome");
    publish(&rig, Address::Everyone, "another secret");
    rig.settle();
    assert_eq!(client.peer.receive_data(), ["welcome"]);
    finish_opening(&mut rig, &client);
    publish(&rig, Address::Everyone, "hello all");
    rig.settle();
    assert_eq!(client.peer.receive_data(), ["hello all"]);
    assert_eq!(witness.peer.receive_data(), ["a secret", "another secret", "hello all"]);
}

on_each_transport!(publications_during_the_end_of_on_open_arrive_in_order_from_some_position_on);
fn publications_during_the_end_of_on_open_arrive_in_order_from_some_position_on() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect_opening();
    let id = client.id();
    publish(&rig, Address::Connection(id), "welcome");
    client.release();
    for number in 0..3 {
        publish(&rig, Address::Everyone, &format!("{number}"));
        rig.turn();
    }
    rig.settle();
    let received = client.peer.receive_data();
    assert_eq!(received[0], "welcome", "{received:?}");
    assert!(received.len() > 1, "it is a member of everyone by then: {received:?}");
    assert!(["0", "1", "2"].map(String::from).ends_with(&received[1..]), "{received:?}");
}

on_each_transport!(a_group_that_is_joined_in_on_open_counts_at_once);
fn a_group_that_is_joined_in_on_open_counts_at_once() {
    let mut rig = Rig::new(2);
    let mut client = rig.connect_opening();
    at_once(rig.everyone.join(client.id(), "a")).unwrap();
    publish(&rig, Address::Everyone, "a secret");
    publish(&rig, Address::group("a"), "to the group");
    publish(&rig, Address::groups(["b", "a"]), "to two groups");
    rig.settle();
    assert_eq!(client.peer.receive_data(), ["to the group", "to two groups"]);
}

on_each_transport!(a_client_that_is_refused_in_on_open_gets_its_close_and_nothing_else);
fn a_client_that_is_refused_in_on_open_gets_its_close_and_nothing_else() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect_opening();
    publish(&rig, Address::Everyone, "a secret");
    rig.settle();
    at_once(
        rig.everyone.publish(
            Publication::close(Address::Connection(client.id()), CloseCode(4001), "not you").unwrap(),
        ),
    )
    .unwrap();
    publish(&rig, Address::Everyone, "another secret");
    rig.settle();
    assert_eq!(client.peer.receive(), [Received::Close(Some(4001)), Received::End]);
    finish_opening(&mut rig, &client);
    publish(&rig, Address::Everyone, "too late");
    rig.settle();
    assert_eq!(client.record().ends.len(), 1);
    assert!(rig.everyone.is_empty());
}

/// Sends a message to everyone within `on_open`; may close at once.
struct Announcer {
    everyone: Namespace,
    turns_away: bool,
}

impl Handler for Announcer {
    fn on_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.everyone
            .try_publish(Publication::message(Address::Everyone, Payload::text("hello from on_open")))
            .unwrap();
        if self.turns_away {
            context.close(CloseReason::Application { code: CloseCode(4001), text: "not you".into() });
        }
        Poll::Ready(())
    }

    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

on_each_transport!(broadcasts_of_a_handler_in_on_open_do_not_reach_its_own_client);
fn broadcasts_of_a_handler_in_on_open_do_not_reach_its_own_client() {
    for turns_away in [false, true] {
        let mut rig = Rig::new(2);
        let mut witness = rig.connect();
        let everyone = rig.everyone.clone();
        let mut peer = rig.connect_handler(Box::new(move |_| Box::new(Announcer { everyone, turns_away })));
        publish(&rig, Address::Everyone, "later");
        rig.settle();
        let received = peer.receive();
        match turns_away {
            false => assert_eq!(received, [Received::Data("later".into())]),
            true => assert_eq!(received, [Received::Close(Some(4001)), Received::End]),
        }
        assert_eq!(witness.peer.receive_data(), ["hello from on_open", "later"]);
    }
}

/// Another thread sends a message to everyone while `on_open` runs.
struct Interrupted(Namespace);

impl Handler for Interrupted {
    fn on_open(&mut self, _: &mut Context<'_>) -> Poll<()> {
        let tell = || {
            self.0.try_publish(Publication::message(Address::Everyone, Payload::text("meanwhile"))).unwrap()
        };
        std::thread::scope(|scope| drop(scope.spawn(tell)));
        Poll::Ready(())
    }

    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

on_each_transport!(messages_of_others_during_on_open_do_not_delay_the_opening);
fn messages_of_others_during_on_open_do_not_delay_the_opening() {
    let mut rig = Rig::new(1);
    let everyone = rig.everyone.clone();
    let (new_connection, mut peer) =
        new_connection_with(&rig.engine, &rig.config, 4096, Box::new(|_| Box::new(Interrupted(everyone))));
    at_once(rig.everyone.adopt(new_connection)).unwrap();
    // A publisher that has awaited the adoption reaches the connection with its next publication.
    publish(&rig, Address::Everyone, "next");
    rig.settle();
    assert_eq!(peer.receive_data(), ["next", "meanwhile"]);
}

on_each_transport!(messages_that_arrived_with_the_handshake_are_handled_after_on_open);
fn messages_that_arrived_with_the_handshake_are_handled_after_on_open() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect_opening();
    client.peer.text("early");
    rig.settle();
    assert_eq!(client.record().messages, <[&str; 0]>::default());
    finish_opening(&mut rig, &client);
    assert_eq!(client.record().messages, ["early"]);
}

on_each_transport!(a_publisher_to_everyone_does_not_wait_for_a_client_that_is_opening);
fn a_publisher_to_everyone_does_not_wait_for_a_client_that_is_opening() {
    let mut rig = Rig::new(1);
    let client = rig.connect_opening();
    publish(&rig, Address::Connection(client.id()), &"x".repeat(10 << 20));
    rig.settle(); // it does not read
    let everyone = rig.everyone.clone();
    let mut publisher =
        Task::new(everyone.deliver(Publication::message(Address::Everyone, Payload::text("to nobody"))));
    assert!(publisher.poll().is_none());
    rig.settle();
    assert_eq!(publisher.poll().expect("no member must be waited for").unwrap().recipients, 0);
}
