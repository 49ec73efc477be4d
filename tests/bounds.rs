//! Every bound of an engine and of its connections, reached over real sockets: what is kept, and what happens at it.
//!
//! Peers that do not read fill what is kept for them; a method that does not return holds up its shard, so that mailbox
//! and log fill to the last place. Bounds of what peers send stand in `bad_input.rs`.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::time::Duration;

use futures_util::poll;
use shardcast::{
    BroadcastPolicy, CloseReason, ConnectionId, ConnectionMetrics, EngineConfig, PublishError,
    TryPublishError, WsHubConfig,
};
use testkit::sender::DROP_AT_ONCE;
use testkit_hub::recording_hub::{number_of, numbered};
use testkit_hub::{Client, HubFixture, RawClient, Transport, eventually, on_each_transport, within_timeout};

const HOUR: Duration = Duration::from_secs(60 * 60);
const MESSAGE_BYTES: usize = 2000;
/// With its header.
const FRAME_BYTES: u64 = MESSAGE_BYTES as u64 + 4;
/// Enough to fill the kernels on both sides and every bound here.
const ENOUGH: usize = 150;
const DROP_LATE: BroadcastPolicy = BroadcastPolicy::DropMessage { timeout: HOUR };

fn with(policy: BroadcastPolicy) -> WsHubConfig {
    WsHubConfig { policy, heartbeat_interval: None, ..WsHubConfig::default() }
}

/// Publishes to a peer that does not read; the most that was pending in frames and bytes, and its account at last,
/// unless it has ended.
async fn most_pending(fixture: &HubFixture, id: ConnectionId) -> (u64, u64, Option<ConnectionMetrics>) {
    let (mut frames, mut bytes) = (0, 0);
    let mut last = None;
    for round in 0..ENOUGH {
        fixture.hub.to_all().try_publish(&numbered(round, MESSAGE_BYTES)).unwrap();
        let counted = within_timeout(fixture.hub.connection_metrics(id)).await.unwrap();
        last = counted.filter(|_| !fixture.hub.is_empty()); // it can be asked for until its socket has gone
        let Some(counted) = last else { break };
        frames = frames.max(counted.tally.pending());
        bytes = bytes.max(counted.pending_bytes);
    }
    (frames, bytes, last)
}

// ---- what is kept for one client

on_each_transport!(an_outbox_keeps_so_many_frames_and_then_the_policy_decides);
async fn an_outbox_keeps_so_many_frames_and_then_the_policy_decides(transport: Transport) {
    let mut fixture =
        HubFixture::open(transport, 1, WsHubConfig { outbox_frames: 16, ..with(DROP_AT_ONCE) }).await;
    let (_stalled, id) = fixture.connect_raw().await;
    let (frames, _, counted) = most_pending(&fixture, id).await;
    assert_eq!(frames, 16);
    let counted = counted.unwrap();
    assert!(counted.tally.dropped.overflow > 0 && counted.tally.dropped.timeout == 0, "{counted:?}");
    assert_eq!(
        counted.tally.offered,
        counted.tally.written + counted.tally.dropped.overflow + counted.tally.pending()
    );
    assert_eq!(fixture.others_ended(), []);
}

on_each_transport!(an_outbox_keeps_so_many_bytes_and_then_the_policy_decides);
async fn an_outbox_keeps_so_many_bytes_and_then_the_policy_decides(transport: Transport) {
    let mut fixture =
        HubFixture::open(transport, 1, WsHubConfig { outbox_bytes: 20_000, ..with(DROP_AT_ONCE) }).await;
    let (_stalled, id) = fixture.connect_raw().await;
    let (frames, bytes, counted) = most_pending(&fixture, id).await;
    assert!(bytes <= 20_000 && bytes > 20_000 - FRAME_BYTES, "{bytes}");
    assert!(frames <= 10 && counted.unwrap().tally.dropped.overflow > 0);
    assert_eq!(fixture.others_ended(), []);
    // What is larger than the bound passes alone: else nobody could ever get it.
    let (mut reader, reader_id) = fixture.connect().await;
    let large = numbered(7, 50_000);
    fixture.hub.to(reader_id).policy(DROP_AT_ONCE).unwrap().publish(&large.clone()).await.unwrap();
    reader.recv_texts(&[&large]).await;
}

on_each_transport!(so_many_frames_wait_for_room_and_more_end_a_client_that_may_lose_nothing);
async fn so_many_frames_wait_for_room_and_more_end_a_client_that_may_lose_nothing(transport: Transport) {
    let narrow = WsHubConfig { outbox_frames: 4, overflow_frames: 6, ..with(BroadcastPolicy::Block) };
    let mut fixture = HubFixture::open(transport, 1, narrow).await;
    let (mut stalled, id) = fixture.connect_raw().await;
    let (frames, _, last) = most_pending(&fixture, id).await;
    assert_eq!((frames, last), (10, None));
    assert_eq!(fixture.ended().await, (id, CloseReason::SlowConsumer));
    assert_eq!((fixture.hub.len(), fixture.recorder.drops(id)), (0, 0));
    let (texts, code) = stalled.rest().await;
    assert!(texts.iter().map(|text| number_of(text)).eq(0..texts.len()));
    assert_eq!(code, Some(1013));
    eventually(1, || fixture.engine.metrics().ended_slow).await;
}

on_each_transport!(so_many_frames_wait_for_room_and_more_are_dropped_at_once_where_they_may);
async fn so_many_frames_wait_for_room_and_more_are_dropped_at_once_where_they_may(transport: Transport) {
    let narrow = WsHubConfig { outbox_frames: 4, overflow_frames: 6, ..with(DROP_LATE) };
    let mut fixture = HubFixture::open(transport, 1, narrow).await;
    let (_stalled, id) = fixture.connect_raw().await;
    let (frames, _, counted) = most_pending(&fixture, id).await;
    let counted = counted.unwrap();
    assert_eq!((frames, counted.tally.dropped.timeout), (10, 0));
    assert!(counted.tally.dropped.overflow > 0, "{counted:?}");
    eventually(counted.tally.dropped.overflow, || fixture.recorder.drops(id)).await;
    assert_eq!(fixture.others_ended(), []);
}

on_each_transport!(so_many_bytes_wait_for_room);
async fn so_many_bytes_wait_for_room(transport: Transport) {
    for policy in [DROP_LATE, BroadcastPolicy::Block] {
        let narrow = WsHubConfig { outbox_frames: 4, overflow_bytes: 10_000, ..with(policy) };
        let mut fixture = HubFixture::open(transport, 1, narrow).await;
        let (_stalled, id) = fixture.connect_raw().await;
        let (frames, bytes, last) = most_pending(&fixture, id).await;
        assert_eq!(frames, 8, "four in the outbox, four that fit into 10,000 bytes");
        assert!(bytes <= 8 * FRAME_BYTES);
        match last {
            Some(counted) => assert!(policy == DROP_LATE && counted.tally.dropped.overflow > 0),
            None => assert_eq!(fixture.ended().await, (id, CloseReason::SlowConsumer)),
        }
        assert_eq!(fixture.others_ended(), []);
    }
}

on_each_transport!(kernel_and_session_keep_little_of_what_is_for_a_client_that_does_not_read);
async fn kernel_and_session_keep_little_of_what_is_for_a_client_that_does_not_read(transport: Transport) {
    const MESSAGES: usize = 250;
    const BYTES: usize = 32 << 10;
    // Without a small bound the kernel takes some 4 MB. With it, half of this is what it keeps for the client's end.
    const KEPT_BYTES_MAX: u64 = 320 << 10;
    let config = WsHubConfig { outbox_bytes: 16 << 20, ..with(BroadcastPolicy::Block) };
    let fixture = HubFixture::open(transport, 1, config).await;
    let mut stalled = RawClient::connect(&fixture.server).await;
    let id = stalled.recv_text().await.parse().unwrap();
    for number in 0..MESSAGES {
        fixture.hub.to_all().try_publish(&numbered(number, BYTES)).unwrap();
        // It has been flushed before the second answer.
        fixture.counted(id).await;
        fixture.counted(id).await;
    }
    let pending = fixture.counted(id).await.pending_bytes;
    let kept = (MESSAGES * BYTES) as u64 - pending;
    assert!(kept <= KEPT_BYTES_MAX, "the policy does not see {kept} bytes");
}

// ---- what is kept for all clients together

on_each_transport!(beyond_the_budget_for_all_backlogs_the_largest_is_shed_with_1013_and_the_others_stay);
async fn beyond_the_budget_for_all_backlogs_the_largest_is_shed_with_1013_and_the_others_stay(
    transport: Transport,
) {
    const BUDGET: usize = 1 << 20;
    const BYTES: usize = 10_000;
    let engine = EngineConfig { shards: Some(1), backlog_bytes_max: BUDGET, ..EngineConfig::default() };
    let mut fixture = HubFixture::open_on(transport, engine, with(BroadcastPolicy::Block)).await;
    let (mut small, small_id) = fixture.connect_raw().await;
    let (mut large, large_id) = fixture.connect_raw().await;
    let (mut middle, middle_id) = fixture.connect_raw().await;
    let publish = |id, number| fixture.hub.to(id).try_publish(&numbered(number, BYTES)).unwrap();
    (0..20).for_each(|number| publish(small_id, number));
    (0..40).for_each(|number| publish(middle_id, number));
    let pending = async |id| fixture.counted(id).await.pending_bytes;
    let (mut number, mut most) = (0, 0);
    loop {
        assert!(number < 10_000, "nobody is shed");
        publish(large_id, number);
        number += 1;
        pending(large_id).await; // the budget is looked at when the turn that answers this is over
        let all = pending(large_id).await + pending(small_id).await + pending(middle_id).await;
        if fixture.hub.len() < 3 {
            break;
        }
        most = all;
    }
    assert!(most <= BUDGET as u64, "nobody stays beyond the budget: {most}");
    assert!(most > (BUDGET - 2 * BYTES) as u64, "nobody is shed within it: {most}");
    assert_eq!(fixture.ended().await, (large_id, CloseReason::BacklogLimit));
    let (texts, code) = large.rest().await;
    assert!(code == Some(1013) && texts.len() < number);
    for (raw, id, count) in [(&mut small, small_id, 20), (&mut middle, middle_id, 40)] {
        for number in 0..count {
            assert_eq!(number_of(&raw.recv_text().await), number);
        }
        assert_eq!(fixture.counted(id).await.tally.discarded, 0);
    }
    eventually(1, || fixture.engine.metrics().ended_slow).await;
    assert_eq!(fixture.others_ended(), []);
}

// ---- what is on its way to the shards

/// An engine with little room on the way to its two shards, one of which is held up by its client's method; the other
/// has a client, too.
async fn held_up(
    transport: Transport,
    engine: EngineConfig,
) -> (HubFixture, (RawClient, ConnectionId), (Client, ConnectionId)) {
    let engine = EngineConfig { shards: Some(2), publishers_waiting_max: 2, ..engine };
    let fixture = HubFixture::open_on(transport, engine, with(BroadcastPolicy::Block)).await;
    let (mut holder, holder_id) = fixture.connect_raw().await;
    let (free, free_id) = fixture.connect().await;
    assert_ne!(holder_id.shard(), free_id.shard());
    holder.send(&testkit::frames::client_text("hold")).await;
    eventually(1, || fixture.recorder.holds()).await;
    (fixture, (holder, holder_id), (free, free_id))
}

async fn recv_numbers(raw: &mut RawClient, count: usize) {
    for number in 0..count {
        assert_eq!(raw.recv_text().await, numbered(number, 10));
    }
}

on_each_transport!(a_full_mailbox_refuses_lets_wait_and_is_overloaded_and_what_was_accepted_arrives);
async fn a_full_mailbox_refuses_lets_wait_and_is_overloaded_and_what_was_accepted_arrives(
    transport: Transport,
) {
    let engine = EngineConfig { mailbox_capacity: 8, ..EngineConfig::default() };
    let (fixture, (mut holder, holder_id), (mut free, free_id)) = held_up(transport, engine).await;
    let held = fixture.hub.to(holder_id);
    for number in 0..8 {
        held.try_publish(&numbered(number, 10)).unwrap();
    }
    assert!(matches!(held.try_publish(&"refused".to_owned()), Err(TryPublishError::Full(_))));
    // Two may wait for room, in that order of arrival or another; more may not.
    let mut first = Box::pin(held.publish(&numbered(8, 10)));
    assert!(poll!(&mut first).is_pending());
    let mut second = Box::pin(fixture.hub.join(holder_id, "late"));
    assert!(poll!(&mut second).is_pending());
    let refused = within_timeout(held.publish(&"refused".to_owned())).await;
    assert!(matches!(refused, Err(PublishError::Overloaded)), "{refused:?}");
    let refused = within_timeout(fixture.hub.join(holder_id, "never")).await;
    assert!(matches!(refused, Err(PublishError::Overloaded)), "{refused:?}");
    // The other shard's mailbox has room.
    within_timeout(fixture.hub.to(free_id).publish(&"free".to_owned())).await.unwrap();
    free.recv_texts(&["free"]).await;

    fixture.recorder.let_go();
    within_timeout(first).await.unwrap();
    within_timeout(second).await.unwrap();
    recv_numbers(&mut holder, 9).await;
    within_timeout(fixture.hub.to_groups(&["late", "never"]).publish(&numbered(9, 10))).await.unwrap();
    assert_eq!(holder.recv_text().await, numbered(9, 10), "and nothing that was refused");
    assert_eq!((fixture.hub.group_len("late"), fixture.hub.group_len("never")), (1, 0));
}

on_each_transport!(a_full_log_refuses_lets_wait_and_is_overloaded_and_what_was_accepted_arrives);
async fn a_full_log_refuses_lets_wait_and_is_overloaded_and_what_was_accepted_arrives(transport: Transport) {
    let engine = EngineConfig { log_capacity: 8, ..EngineConfig::default() };
    let (fixture, (mut holder, _), (mut free, free_id)) = held_up(transport, engine).await;
    let all = fixture.hub.to_all();
    for number in 0..8 {
        all.try_publish(&numbered(number, 10)).unwrap();
    }
    assert!(matches!(all.try_publish(&"refused".to_owned()), Err(TryPublishError::Full(_))));
    let mut waiting = Vec::new();
    for number in 8..10 {
        let mut publishing = Box::pin(all.publish(&numbered(number, 10)));
        assert!(poll!(&mut publishing).is_pending());
        waiting.push(publishing);
    }
    for _ in 0..2 {
        let refused = within_timeout(all.publish(&"refused".to_owned())).await;
        assert!(matches!(refused, Err(PublishError::Overloaded)), "{refused:?}");
    }
    // Who is on the other shard has it all by now, and what goes another way still comes.
    for number in 0..8 {
        free.recv_texts(&[&numbered(number, 10)]).await;
    }
    within_timeout(fixture.hub.to(free_id).publish(&"free".to_owned())).await.unwrap();
    free.recv_texts(&["free"]).await;

    fixture.recorder.let_go();
    for publishing in waiting {
        within_timeout(publishing).await.unwrap();
    }
    all.publish(&numbered(10, 10)).await.unwrap();
    recv_numbers(&mut holder, 11).await;
    for number in 8..11 {
        free.recv_texts(&[&numbered(number, 10)]).await;
    }
}
