//! Answers: messages to one connection are written between the reads, and messages to many are still batched.
//!
//! Driven turn by turn; the effect of a turn is checked, not waited for.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::task::Poll;

use shardcast_engine::{
    Address, ConnectionConfig, Context, EngineConfig, Handler, Message, Namespace, Payload, Publication,
};
use testkit::client::new_connection_with;
use testkit::{RawClient, Rig, at_once, on_each_transport};

/// Answers messages: `all…` to everyone, `others…` to everyone but its client, `both…` to everyone and then
/// `you both…` to its client, anything else to its client.
struct Speaker(Namespace);

impl Handler for Speaker {
    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        let text = std::str::from_utf8(message.payload).unwrap();
        let say =
            |to, text: &str| self.0.try_publish(Publication::message(&to, Payload::text(text))).unwrap();
        let me = Address::Connection(context.id());
        match text.split(' ').next() {
            Some("all") => say(Address::Everyone, text),
            Some("others") => {
                let others =
                    Publication::message(&Address::Everyone, Payload::text(text)).except(&[context.id()]);
                self.0.try_publish(others).unwrap();
            }
            Some("both") => {
                say(Address::Everyone, text);
                say(me, &format!("you {text}"));
            }
            _ => say(me, text),
        }
        Poll::Ready(())
    }
}

fn rig(peers: usize) -> (Rig, Vec<RawClient>) {
    rig_reading(peers, EngineConfig::default().read_buffer_bytes)
}

fn rig_reading(peers: usize, read_buffer_bytes: usize) -> (Rig, Vec<RawClient>) {
    let engine = EngineConfig { shards: Some(1), read_buffer_bytes, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, ConnectionConfig::default());
    let peers = (0..peers)
        .map(|_| {
            let speaker = Speaker(rig.everyone.clone());
            let (new_connection, peer) =
                new_connection_with(&rig.engine, &rig.config, 1 << 20, Box::new(|_| Box::new(speaker)));
            at_once(rig.everyone.adopt(new_connection)).unwrap();
            peer
        })
        .collect();
    rig.settle();
    (rig, peers)
}

on_each_transport!(one_turn_answers_every_client_that_it_reads);
fn one_turn_answers_every_client_that_it_reads() {
    // More than a fan-out would flush in one turn.
    let (mut rig, mut peers) = rig(1000);
    peers.iter_mut().for_each(|peer| peer.text("me"));
    rig.turn();
    assert!(peers.iter_mut().all(|peer| peer.receive_data() == ["me"]));
}

on_each_transport!(broadcasts_of_one_turn_are_written_in_one_write_per_connection);
fn broadcasts_of_one_turn_are_written_in_one_write_per_connection() {
    let (mut rig, mut peers) = rig(60); // no more than are flushed in one turn
    for (number, peer) in peers.iter_mut().enumerate() {
        peer.text(&format!("all {number}"));
    }
    let before = rig.engine.metrics();
    rig.turn();
    let after = rig.engine.metrics();
    assert_eq!((after.tally.written - before.tally.written, after.writes - before.writes), (3_600, 60));
    let received = peers[0].receive_data();
    assert_eq!(received.len(), 60);
    assert!(peers[1..].iter_mut().all(|peer| peer.receive_data() == received));
}

on_each_transport!(messages_to_all_but_their_senders_are_written_in_one_write_per_connection);
fn messages_to_all_but_their_senders_are_written_in_one_write_per_connection() {
    let (mut rig, mut peers) = rig(60); // no more than are flushed in one turn
    for (number, peer) in peers.iter_mut().enumerate() {
        peer.text(&format!("others {number}"));
        peer.text(&format!("{} {number}", if number % 3 == 0 { "others" } else { "all" }));
    }
    let before = rig.engine.metrics();
    rig.turn();
    let after = rig.engine.metrics();
    assert_eq!((after.tally.written - before.tally.written, after.writes - before.writes), (7_120, 60));
    let received: Vec<_> = peers.iter_mut().map(RawClient::receive_data).collect();
    let is_from = |text: &str, number: usize| text.split(' ').nth(1) == Some(&number.to_string());
    for (number, texts) in received.iter().enumerate() {
        let (own, theirs): (Vec<_>, Vec<_>) = texts.iter().partition(|text| is_from(text, number));
        let expected = if number % 3 == 0 { vec![] } else { vec![format!("all {number}")] };
        assert!(own.into_iter().eq(&expected), "{texts:?}");
        // All see the others' in one order.
        let next = (number + 1) % received.len();
        let seen_by_next = received[next].iter().filter(|text| !is_from(text, number));
        assert!(
            theirs
                .into_iter()
                .filter(|text| !is_from(text, next))
                .eq(seen_by_next.filter(|text| !is_from(text, next)))
        );
    }
}

on_each_transport!(an_answer_follows_the_broadcasts_before_it);
fn an_answer_follows_the_broadcasts_before_it() {
    let (mut rig, mut peers) = rig(100);
    for (number, peer) in peers.iter_mut().enumerate() {
        // Some only ask, so that there are answers before and after the messages to everyone.
        peer.text(&format!("{} {number}", if number % 40 < 20 { "me" } else { "both" }));
    }
    rig.settle();
    for (number, peer) in peers.iter_mut().enumerate() {
        let received = peer.receive_data();
        assert_eq!(received.len(), 40 + 1);
        let place = |text: String| received.iter().position(|received| *received == text);
        if let Some(said) = place(format!("both {number}")) {
            assert!(place(format!("you both {number}")) > Some(said), "{received:?}");
        }
    }
}

on_each_transport!(many_questions_at_once_are_all_answered_in_order);
fn many_questions_at_once_are_all_answered_in_order() {
    let (mut rig, mut peers) = rig(100);
    for peer in &mut peers {
        (0..9).for_each(|number| peer.text(&format!("me {number}")));
    }
    rig.settle();
    let expected: Vec<_> = (0..9).map(|number| format!("me {number}")).collect();
    assert!(peers.iter_mut().all(|peer| peer.receive_data() == expected));
}

on_each_transport!(many_messages_at_once_arrive_whole_with_a_small_read_buffer);
fn many_messages_at_once_arrive_whole_with_a_small_read_buffer() {
    let (mut rig, mut peers) = rig_reading(100, 1024);
    // From a few bytes to several buffers.
    let said = |number: usize| format!("me {number} {}", "x".repeat(number * 37 % 3000));
    for (number, peer) in peers.iter_mut().enumerate() {
        peer.text(&said(number));
        peer.text("me too");
    }
    rig.settle();
    for (number, peer) in peers.iter_mut().enumerate() {
        assert_eq!(peer.receive_data(), [said(number), "me too".to_owned()]);
    }
}
