//! What hubs and groups count: the sum over their clients, exact at its place in the sequence.
//!
//! What a connection and the engine count stands in `promises.rs`; random histories in the engine's tests.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

mod fixture;

use fixture::office::Office;
use fixture::{eventually, soon};
use shardcast::{GroupMetrics, SendError, WsHubConfig};

fn accounted(metrics: GroupMetrics) -> u64 {
    let GroupMetrics { written, dropped_timeout, dropped_overflow, discarded, pending, .. } = metrics;
    written + dropped_timeout + dropped_overflow + discarded + pending
}

#[tokio::test]
async fn a_hub_counts_all_clients_since_its_start_and_a_group_its_present_members() {
    const MESSAGES: u64 = 20;
    let mut office = Office::open(2, WsHubConfig::default()).await;
    let (first, first_id) = office.visit().await;
    let (_second, second_id) = office.visit().await;
    let (_third, _) = office.visit().await;
    for id in [first_id, second_id] {
        soon(office.hub.join(id, "room")).await.unwrap();
    }
    for _ in 0..MESSAGES {
        soon(office.hub.to_group("room").publish("in the room".to_owned())).await.unwrap();
    }
    // Each was told its id, and then what was for its group: also what was published a moment ago.
    let room = soon(office.hub.to_group("room").metrics()).await.unwrap();
    assert_eq!((room.connections, room.offered, accounted(room)), (2, 2 + 2 * MESSAGES, room.offered));
    let but_one = soon(office.hub.to_group("room").except(&[first_id]).metrics()).await.unwrap();
    assert_eq!((but_one.connections, but_one.offered), (1, 1 + MESSAGES));
    let all = soon(office.hub.metrics()).await.unwrap();
    assert_eq!((all.connections, all.offered, accounted(all)), (3, 3 + 2 * MESSAGES, all.offered));
    let nobody = soon(office.hub.to_group("elsewhere").metrics()).await.unwrap();
    assert_eq!(nobody, GroupMetrics::default());

    drop(first);
    office.ended().await;
    eventually(2, || office.engine.metrics().connections).await;
    let after = soon(office.hub.metrics()).await.unwrap();
    assert_eq!((after.connections, after.offered, accounted(after)), (2, all.offered, all.offered));
    let room = soon(office.hub.to_group("room").metrics()).await.unwrap();
    assert_eq!((room.connections, room.offered), (1, 1 + MESSAGES));
}

#[tokio::test]
async fn the_counters_of_an_engine_that_has_ended_are_an_error_and_no_zero() {
    let office = Office::open(1, WsHubConfig::default()).await;
    soon(office.engine.shutdown(std::time::Duration::from_secs(1))).await;
    assert!(matches!(soon(office.hub.metrics()).await, Err(SendError::Closed)));
}
