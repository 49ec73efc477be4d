//! Coalescing: with `coalesce` a shard waits for more frames before it writes, but never longer than configured.
//!
//! Driven turn by turn; what the client has received is checked, not waited for.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use shardcast_engine::{Address, ConnectionConfig, EngineConfig, Payload, Publication};
use testkit::{Client, Received, Rig};

const COALESCE: Duration = Duration::from_millis(5);

fn rig(coalesce: Duration) -> (Rig, Vec<Client>) {
    let engine = EngineConfig { shards: Some(1), coalesce, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, ConnectionConfig::default());
    rig.send_buffer = 1 << 20;
    let clients = rig.connect_many(3);
    rig.pass(COALESCE);
    (rig, clients)
}

fn publish(rig: &mut Rig, text: &str) {
    rig.everyone.try_publish(Publication::message(Address::Everyone, Payload::text(text))).unwrap();
    rig.settle();
}

#[test]
fn frames_within_the_coalescing_time_share_one_write() {
    let (mut rig, mut clients) = rig(COALESCE);
    let before = rig.engine.metrics();
    for text in ["one", "two", "three"] {
        publish(&mut rig, text);
        assert!(clients.iter_mut().all(|client| client.peer.receive().is_empty()), "the shard coalesces");
        rig.pass(COALESCE / 5);
    }
    assert_eq!(rig.engine.metrics().tally.written, before.tally.written);
    rig.pass(COALESCE / 5 * 2);
    for client in &mut clients {
        assert_eq!(client.peer.receive_data(), ["one", "two", "three"]);
    }
    let after = rig.engine.metrics();
    assert_eq!((after.writes - before.writes, after.tally.written - before.tally.written), (3, 9));
}

#[test]
fn the_time_runs_from_the_first_frame_and_restarts_after_each_round() {
    let (mut rig, mut clients) = rig(COALESCE);
    for round in ["a", "b"] {
        publish(&mut rig, round);
        rig.pass(COALESCE - Duration::from_nanos(1));
        assert!(clients[0].peer.receive().is_empty(), "{round}: not yet");
        rig.pass(Duration::from_nanos(1));
        assert_eq!(clients[0].peer.receive_data(), [round]);
        rig.pass(COALESCE * 3);
    }
}

#[test]
fn a_burst_of_the_maximum_size_is_not_delayed_any_longer() {
    let (mut rig, mut clients) = rig(Duration::from_secs(1));
    // In steps, each smaller than a burst.
    for number in 0..1000 {
        rig.everyone
            .try_publish(Publication::message(Address::Everyone, Payload::text(&number.to_string())))
            .unwrap();
        if number % 50 == 0 {
            rig.settle();
        }
    }
    rig.settle();
    let received = clients[0].peer.receive_data();
    assert!(received.len() >= 700, "{} of 1000", received.len());
    rig.pass(Duration::from_secs(1));
    assert_eq!(received.len() + clients[0].peer.receive_data().len(), 1000);
}

#[test]
fn without_it_an_idle_shard_writes_at_once() {
    let (mut rig, mut clients) = rig(Duration::ZERO);
    publish(&mut rig, "now");
    assert_eq!(clients[0].peer.receive(), [Received::Data("now".into())]);
}

#[test]
fn a_close_follows_coalesced_frames() {
    let (mut rig, mut clients) = rig(COALESCE);
    publish(&mut rig, "last words");
    testkit::at_once(
        rig.everyone
            .publish(Publication::close(Address::Everyone, shardcast_engine::CloseCode::NORMAL, "").unwrap()),
    )
    .unwrap();
    rig.pass(COALESCE);
    let received = clients[0].peer.receive();
    assert_eq!(received[..2], [Received::Data("last words".into()), Received::Close(Some(1000))]);
}
