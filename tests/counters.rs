//! What hubs and groups count: the sum over their clients, exact at its place in the sequence.
//!
//! What a connection and the engine count stands in `promises.rs`; random histories in the engine's tests.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use shardcast::{CloseReason, ConnectionId, GroupMetrics, Position, PublishError, WsHubConfig};
use testkit_hub::{HubFixture, Transport, eventually, on_each_transport, within_timeout};

/// Whether frames are pending exactly where bytes are, which are counted in the outboxes.
fn is_balanced(metrics: GroupMetrics) -> bool {
    (metrics.tally.pending() > 0) == (metrics.pending_bytes > 0)
}

on_each_transport!(a_hub_counts_all_clients_since_its_start_and_a_group_its_present_members);
async fn a_hub_counts_all_clients_since_its_start_and_a_group_its_present_members(transport: Transport) {
    const MESSAGES: u64 = 20;
    let mut fixture = HubFixture::open(transport, 2, WsHubConfig::default()).await;
    let (first, first_id) = fixture.connect().await;
    let (_second, second_id) = fixture.connect().await;
    let (_third, _) = fixture.connect().await;
    for id in [first_id, second_id] {
        within_timeout(fixture.hub.join(id, "room")).await.unwrap();
    }
    for _ in 0..MESSAGES {
        within_timeout(fixture.hub.to_group("room").publish(&"in the room".to_owned())).await.unwrap();
    }
    // Each was told its id, and then what was for its group: also what was published a moment ago.
    let room = within_timeout(fixture.hub.to_group("room").metrics()).await.unwrap();
    assert_eq!((room.connections, room.tally.offered, is_balanced(room)), (2, 2 + 2 * MESSAGES, true));
    let but_one = within_timeout(fixture.hub.to_group("room").except(&[first_id]).metrics()).await.unwrap();
    assert_eq!((but_one.connections, but_one.tally.offered), (1, 1 + MESSAGES));
    let all = within_timeout(fixture.hub.metrics()).await.unwrap();
    assert_eq!((all.connections, all.tally.offered, is_balanced(all)), (3, 3 + 2 * MESSAGES, true));
    let nobody = within_timeout(fixture.hub.to_group("elsewhere").metrics()).await.unwrap();
    assert_eq!(nobody, GroupMetrics::default());

    drop(first);
    fixture.ended().await;
    eventually(2, || fixture.engine.metrics().connections).await;
    let after = within_timeout(fixture.hub.metrics()).await.unwrap();
    assert_eq!((after.connections, after.tally.offered, is_balanced(after)), (2, all.tally.offered, true));
    let room = within_timeout(fixture.hub.to_group("room").metrics()).await.unwrap();
    assert_eq!((room.connections, room.tally.offered), (1, 1 + MESSAGES));
}

on_each_transport!(what_is_counted_and_reported_serializes_for_dashboards);
async fn what_is_counted_and_reported_serializes_for_dashboards(transport: Transport) {
    let fixture = HubFixture::open(transport, 1, WsHubConfig::default()).await;
    let (_client, id) = fixture.connect().await;
    let receipt = within_timeout(fixture.hub.to_all().deliver(&"news".to_owned())).await.unwrap();
    let json = serde_json::to_value(receipt).unwrap();
    assert_eq!((&json["recipients"], &json["dropped"]["overflow"]), (&1.into(), &0.into()));
    let counted = serde_json::to_value(fixture.counted(id).await).unwrap();
    assert_eq!(counted["tally"]["offered"], 2);
    assert_eq!(serde_json::to_value(fixture.engine.metrics()).unwrap()["connections"], 1);
    let text = serde_json::to_string(&id).unwrap();
    assert_eq!(text, format!("\"{id}\""));
    assert_eq!(serde_json::from_str::<ConnectionId>(&text).unwrap(), id);
    assert!(serde_json::from_str::<ConnectionId>("\"no id\"").is_err());
    let position = serde_json::to_string(&receipt.position).unwrap();
    assert_eq!(serde_json::from_str::<Position>(&position).unwrap(), receipt.position);
    let report = within_timeout(fixture.engine.shutdown(std::time::Duration::ZERO)).await;
    assert_eq!(serde_json::to_value(report).unwrap()["stuck"], serde_json::json!([]));
    let reason = serde_json::to_value(CloseReason::SlowConsumer).unwrap();
    assert_eq!((&reason["name"], &reason["code"]), (&"slow_consumer".into(), &1013.into()));
}

on_each_transport!(the_counters_of_an_engine_that_has_ended_are_an_error_and_no_zero);
async fn the_counters_of_an_engine_that_has_ended_are_an_error_and_no_zero(transport: Transport) {
    let fixture = HubFixture::open(transport, 1, WsHubConfig::default()).await;
    within_timeout(fixture.engine.shutdown(std::time::Duration::from_secs(1))).await;
    assert!(matches!(within_timeout(fixture.hub.metrics()).await, Err(PublishError::Closed)));
}
