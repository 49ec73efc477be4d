//! Writing by io_uring is writing: the same bytes reach the same clients, and the same is counted.
//!
//! Needs a kernel and a container that permit io_uring: nothing can be shown elsewhere.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use shardcast_engine::{
    Address, CloseReason, ConnectionConfig, EngineConfig, Metrics, Namespace, Payload, Policy, Publication,
};
use testkit::Rig;
use testkit::task::at_once;

const CLIENTS: usize = 40;

fn publish(everyone: &Namespace, to: Address, text: &str) {
    everyone.try_publish(Publication::message(to, Payload::text(text))).unwrap();
}

/// What each client received, how each connection ended, and the counters.
type Course = (Vec<Vec<String>>, Vec<Vec<CloseReason>>, Metrics);

/// Clients that keep up, one that reads nothing and one that disconnects without a word, in groups and by themselves.
fn course(io_uring: bool) -> Course {
    let engine = EngineConfig { shards: Some(1), io_uring, ..EngineConfig::default() };
    let policy = Policy::DropMessage { timeout: Duration::ZERO };
    let connection = ConnectionConfig { policy, outbox_frames: 64, ..ConnectionConfig::default() };
    let mut rig = Rig::with(engine, connection);
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| rig.connect()).collect();
    rig.settle();
    for client in clients.iter().step_by(2) {
        at_once(rig.everyone.join(client.id(), "even")).unwrap();
    }
    drop(clients.pop());
    let mut received = vec![Vec::new(); clients.len()];
    for round in 0..50 {
        // Lone, several that are gathered alike for all, and several that are not.
        let long = format!("{round} {:.<3000}", "");
        publish(&rig.everyone, Address::Everyone, &long);
        if round % 2 == 0 {
            rig.settle();
        }
        publish(&rig.everyone, Address::group("even"), &format!("{round} to some"));
        publish(
            &rig.everyone,
            Address::Connection(clients[round % clients.len()].id()),
            &format!("{round} to one"),
        );
        publish(&rig.everyone, Address::Everyone, &format!("{round} to all"));
        rig.settle();
        for (client, received) in clients.iter_mut().zip(&mut received).skip(1) {
            received.extend(client.peer.receive_data());
            rig.settle();
        }
    }
    let ends = clients.iter().map(|client| client.record().ends.clone()).collect();
    (received, ends, rig.engine.metrics())
}

#[test]
fn by_io_uring_every_client_receives_the_same_and_the_same_is_counted() {
    let (by_itself, together) = (course(false), course(true));
    assert_eq!(together.0, by_itself.0, "what the clients received");
    assert_eq!(together.1, by_itself.1, "how their connections ended");
    let both =
        [by_itself.2, together.2].map(|metrics| (metrics.writes, metrics.bytes_written, metrics.tally));
    assert_eq!(both[1], both[0]);
    assert!(both[1].2.dropped.total() > 0, "the client that reads nothing was slow");
}
