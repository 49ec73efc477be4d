//! Slow consumers: each policy, each bound and each sign of life, as a guarantee with its name.
//!
//! The engine is driven turn by turn with a clock of the test's own, and clients that stop reading do so at a
//! known frame: nothing sleeps, nothing depends on the machine. Random histories cover what no single test
//! does; after each, the tallies must add up.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use proptest::prelude::*;
use shardcast_engine::{
    Address, CloseCode, CloseReason, ConnectionConfig, ConnectionId, ConnectionMetrics, Context, Delivery,
    DropCause, DropNotice, EngineConfig, GroupMetrics, Handler, Message, Payload, Policy, Publication,
    PublishError, Receipt, Wants,
};
use testkit::sender::{DROP_AT_ONCE, too_many_to_join};
use testkit::stream::{Transport, over};
use testkit::time::{DAY, ms};
use testkit::{Client, Received, Rig, Sender, Task, at_once, lock};

const EVERYONE: Address = Address::Everyone;
const DROP: Policy = Policy::DropMessage { timeout: MS20 };
const MS20: Duration = ms(20);
/// How late a timer may be, for a ping and for its missing answer.
const TWO_TICKS: Duration = ms(50);
const OUTBOX_FRAMES: usize = 4;

type Sending = Task<'static, Result<Receipt, PublishError>>;

/// A frame of some 1,000 bytes that begins with `text`.
fn big(text: impl std::fmt::Display) -> Payload {
    Payload::text(&format!("{text:.<1000}"))
}

/// The texts of big frames.
fn short(received: Vec<String>) -> Vec<String> {
    received.iter().map(|text| text.trim_end_matches('.').to_owned()).collect()
}

/// Outboxes of four frames and no heartbeat.
fn narrow(policy: Policy) -> ConnectionConfig {
    ConnectionConfig {
        outbox_frames: OUTBOX_FRAMES,
        overflow_frames: 100,
        stall_timeout: None,
        policy,
        heartbeat_interval: None,
        pong_timeout: DAY,
        ..ConnectionConfig::default()
    }
}

fn rig(shards: usize, config: ConnectionConfig) -> Rig {
    Rig::with(EngineConfig { shards: Some(shards), ..EngineConfig::default() }, config)
}

/// Sends to the client alone until its outbox is full to the last frame and no frame waits.
fn fill(rig: &mut Rig, client: &Client) {
    fill_with(rig, client, OUTBOX_FRAMES as u64);
}

fn fill_with(rig: &mut Rig, client: &Client, outbox_frames: u64) {
    let everyone = Sender::new(&rig.everyone, Some(Policy::Block));
    for number in 0..1000 {
        everyone
            .try_publish(Publication::message(
                Address::Connection(client.id()),
                big(format!("fill {number}")),
            ))
            .unwrap();
        rig.settle();
        if metrics(rig, client).tally.pending() == outbox_frames {
            return;
        }
    }
    panic!("the client takes everything");
}

fn metrics(rig: &mut Rig, client: &Client) -> ConnectionMetrics {
    rig.metrics_of(client.id()).expect("it lives")
}

fn send(sender: impl Into<Sender>, to: impl Into<Address>, text: &str) -> Sending {
    let mut task = Task::new(sender.into().deliver(Publication::message(to, big(text))));
    assert!(task.poll().is_none(), "no shard has taken a turn");
    task
}

/// The numbers of the receipt: recipients, delayed, dropped by timeout, dropped by overflow, disconnected.
fn outcome(task: &mut Sending) -> Option<[u64; 5]> {
    let receipt = task.poll()?.unwrap();
    let Receipt { recipients, delayed, dropped, disconnected, .. } = receipt;
    Some([recipients, delayed, dropped.timeout, dropped.overflow, disconnected])
}

/// Lets the client take everything, and returns what it received.
fn hear_all(rig: &mut Rig, client: &mut Client) -> Vec<Received> {
    let mut all = Vec::new();
    let mut silence = 0;
    while silence < 3 {
        let received = client.peer.receive();
        let is_over = received.last() == Some(&Received::End);
        silence = if received.is_empty() { silence + 1 } else { 0 };
        all.extend(received);
        if is_over {
            break;
        }
        rig.settle();
    }
    all
}

fn receive_all_data(rig: &mut Rig, client: &mut Client) -> Vec<String> {
    let data = |received| if let Received::Data(text) = received { Some(text) } else { None };
    short(hear_all(rig, client).into_iter().filter_map(data).collect())
}

/// Checks how it ended, and that its client can read it: the close code after the last whole frame, then the
/// end of the stream.
fn assert_ended(rig: &mut Rig, client: &mut Client, reason: &CloseReason, code: u16) {
    rig.settle();
    assert_eq!(client.record().ends, std::slice::from_ref(reason));
    let received = hear_all(rig, client);
    assert!(received.ends_with(&[Received::Close(Some(code)), Received::End]), "{:?}", received.last());
    client.peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
    rig.settle();
    assert!(rig.metrics_of(client.id()).is_none());
}

fn assert_lives(client: &Client) {
    assert_eq!(client.record().ends, []);
}

// ---- DropMessage ------------------------------------------------------------------------------------------------

/// Every kind of address for several connections.
fn targets() -> [Address; 3] {
    [EVERYONE, Address::group("a"), Address::groups(["a", "b"])]
}

fn stalled_and_healthy(shards: usize, policy: Policy) -> (Rig, Client, Client) {
    let mut rig = rig(shards, narrow(policy));
    let (stalled, mut healthy) = (rig.connect(), rig.connect());
    for id in [stalled.id(), healthy.id()] {
        at_once(rig.everyone.join(id, "a")).unwrap();
        at_once(rig.everyone.join(id, "b")).unwrap();
    }
    fill(&mut rig, &stalled);
    assert_eq!(healthy.peer.receive_data().len(), 0);
    (rig, stalled, healthy)
}

#[test]
fn a_frame_waits_its_time_and_is_then_dropped_counted_and_reported() {
    for (shards, to) in [1, 2].into_iter().flat_map(|shards| targets().map(|to| (shards, to))) {
        let (mut rig, mut stalled, mut healthy) = stalled_and_healthy(shards, DROP);
        let everyone = rig.everyone.clone();
        let mut sending = send(&everyone, &to, "late");
        rig.settle();
        assert_eq!(short(healthy.peer.receive_data()), ["late"], "{to:?}: a client that reads does not wait");
        rig.pass(MS20 - Duration::from_nanos(1));
        assert!(sending.poll().is_none(), "{to:?}: its time is not over");
        let before = metrics(&mut rig, &stalled);
        assert_eq!(
            (before.tally.pending(), before.tally.dropped.timeout),
            (OUTBOX_FRAMES as u64 + 1, 0),
            "{to:?}"
        );
        assert_eq!(stalled.record().drops, []);
        rig.pass(Duration::from_nanos(1));
        assert_eq!(outcome(&mut sending), Some([2, 1, 1, 0, 0]), "{to:?}");
        let after = metrics(&mut rig, &stalled);
        assert_eq!(
            (after.tally.pending(), after.tally.dropped.timeout, after.tally.dropped.overflow),
            (4, 1, 0),
            "{to:?}"
        );
        let all = rig.engine.metrics();
        assert_eq!(
            (all.tally.dropped.timeout, all.tally.dropped.overflow, all.tally.pending()),
            (1, 0, 4),
            "{to:?}"
        );
        assert_eq!((stalled.record().drops, healthy.record().drops), (vec![1], vec![]), "{to:?}");
        // The rest arrives, and so does the next publication.
        let mut next = send(&everyone, &to, "next");
        let received = receive_all_data(&mut rig, &mut stalled);
        assert_eq!(received.last().map(String::as_str), Some("next"), "{to:?}");
        assert!(!received.contains(&"late".to_owned()), "{to:?}");
        let [recipients, .., timeout, overflow, gone] = outcome(&mut next).unwrap();
        assert_eq!((recipients, timeout, overflow, gone), (2, 0, 0, 0), "{to:?}");
        assert_lives(&stalled);
    }
}

#[test]
fn drops_are_reported_to_a_handler_by_cause_and_group() {
    for (policy, cause) in [(DROP, DropCause::Timeout), (DROP_AT_ONCE, DropCause::Overflow)] {
        let (mut rig, stalled, _healthy) = stalled_and_healthy(1, policy);
        let everyone = rig.everyone.clone();
        let one = Address::Connection(stalled.id());
        lock(&stalled.record).waits_at_drop = true; // so the rest is reported later
        let to =
            [Address::group("a"), Address::group("b"), Address::group("a"), targets()[2].clone(), EVERYONE];
        for to in to {
            everyone.try_publish(Publication::message(&to, big("lost"))).unwrap();
            rig.settle();
        }
        let dropping = Sender::new(&everyone, Some(policy)); // a message to one connection blocks by default
        dropping.try_publish(Publication::message(one, big("lost"))).unwrap();
        rig.settle();
        rig.pass(MS20);
        lock(&stalled.record).waits_at_drop = false;
        lock(&stalled.record).waker.take().unwrap().wake();
        rig.settle();
        let notices = stalled.record().drop_notices;
        let mut sums = std::collections::BTreeMap::<_, u64>::new();
        for notice in &notices {
            assert_eq!(notice.cause, cause);
            *sums.entry(notice.group.as_deref().map(str::to_owned)).or_default() += notice.frames;
        }
        let expected = [(None, 3), (Some("a".to_owned()), 2), (Some("b".to_owned()), 1)];
        assert_eq!(sums.into_iter().collect::<Vec<_>>(), expected);
        assert!(notices.len() <= 4, "drops while the handler was busy are reported together: {notices:?}");
    }
}

#[test]
fn each_frame_has_its_own_time() {
    let (mut rig, stalled, _healthy) = stalled_and_healthy(1, DROP);
    let everyone = Sender::from(&rig.everyone);
    let patient = Sender::new(&rig.everyone, Some(Policy::DropMessage { timeout: ms(30) }));
    // Dropped at 30, at 25 and at 30, at 35 ms.
    let mut sendings = Vec::new();
    for namespace in [&patient, &everyone, &everyone, &everyone] {
        sendings.push(send(namespace, EVERYONE, "late"));
        rig.settle();
        rig.pass(ms(5));
    }
    let mut dropped = vec![stalled.record().drops.len()];
    for _ in 0..4 {
        rig.pass(ms(5));
        dropped.push(stalled.record().drops.iter().sum::<u64>() as usize);
    }
    assert_eq!(dropped, [0, 1, 3, 4, 4]);
    assert!(sendings.iter_mut().all(|sending| outcome(sending) == Some([2, 1, 1, 0, 0])));
}

#[test]
fn what_is_enqueued_waits_for_no_client_until_its_outcome_is_asked_for() {
    for wants in [Wants::Nothing, Wants::Room, Wants::Outcome] {
        let (mut rig, mut stalled, mut healthy) = stalled_and_healthy(2, Policy::Block);
        for to in [Address::Everyone, Address::group("a"), stalled.id().into()] {
            let everyone = rig.everyone.clone();
            let publication = Publication::message(to.clone(), big("enqueued"));
            let enqueued = at_once(everyone.enqueue(publication, wants)).unwrap();
            rig.settle();
            let expected = if to == Address::from(stalled.id()) { 0 } else { 1 };
            assert_eq!(healthy.peer.receive_data().len(), expected, "it is published");
            let mut outcome = Task::new(enqueued.outcome());
            assert_eq!(outcome.poll().is_none(), wants != Wants::Nothing, "{wants:?} {to:?}");
            hear_all(&mut rig, &mut stalled);
            if wants != Wants::Nothing {
                let receipt = outcome.poll().expect("there was room").unwrap();
                let counted = if wants == Wants::Outcome { (1 + expected as u64, 1) } else { (0, 0) };
                assert_eq!((receipt.recipients, receipt.delayed), counted);
            }
            fill(&mut rig, &stalled);
        }
    }
}

#[test]
fn each_publisher_waits_for_its_own_frame_although_they_are_delivered_together() {
    let frames = 64; // so 16 are delivered together
    let mut rig = rig(1, ConnectionConfig { outbox_frames: frames, ..narrow(Policy::Block) });
    let (mut stalled, mut healthy) = (rig.connect(), rig.connect());
    fill_with(&mut rig, &stalled, frames as u64);
    let everyone = rig.everyone.clone();
    let mut publishing: Vec<_> = (0..3)
        .map(|number| Task::new(everyone.publish(Publication::message(EVERYONE, big(number)))))
        .collect();
    assert!(publishing.iter_mut().all(|publishing| publishing.poll().is_none()), "a member is congested");
    for number in 3..16 {
        Sender::from(&rig.everyone).try_publish(Publication::message(EVERYONE, big(number))).unwrap();
    }
    rig.settle();
    assert_eq!(receive_all_data(&mut rig, &mut healthy).len(), 16);
    let mut still_waiting = 0;
    while !publishing.is_empty() {
        stalled.peer.receive_some(500);
        rig.settle();
        publishing.retain_mut(|publishing| publishing.poll().is_none());
        let without_room = metrics(&mut rig, &stalled).tally.pending().saturating_sub(frames as u64);
        let theirs = without_room.saturating_sub(13);
        assert_eq!(publishing.len() as u64, theirs, "each until there is room for its own frame");
        still_waiting = without_room;
    }
    assert!(still_waiting > 0, "some of what was published later still waits");
}

#[test]
fn a_frame_that_gets_room_in_time_is_delivered() {
    for to in targets() {
        let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, DROP);
        let everyone = rig.everyone.clone();
        let mut sending = send(&everyone, &to, "just in time");
        rig.settle();
        rig.pass(MS20 - Duration::from_nanos(1));
        assert!(sending.poll().is_none());
        let received = receive_all_data(&mut rig, &mut stalled);
        assert_eq!(received.last().map(String::as_str), Some("just in time"), "{to:?}");
        assert_eq!(outcome(&mut sending), Some([2, 1, 0, 0, 0]), "{to:?}");
        rig.pass(ms(1000));
        assert_eq!((stalled.record().drops, rig.engine.metrics().tally.dropped.timeout), (vec![], 0));
    }
}

#[test]
fn a_timeout_of_zero_drops_at_once() {
    for to in targets() {
        let (mut rig, mut stalled, mut healthy) = stalled_and_healthy(2, DROP_AT_ONCE);
        let everyone = rig.everyone.clone();
        let mut sending = send(&everyone, &to, "lost");
        rig.settle();
        assert_eq!(outcome(&mut sending), Some([2, 1, 0, 1, 0]), "{to:?}: no time has passed");
        assert_eq!(
            (stalled.record().drops, metrics(&mut rig, &stalled).tally.dropped.overflow),
            (vec![1], 1)
        );
        assert_eq!(short(healthy.peer.receive_data()), ["lost"]);
        assert!(receive_all_data(&mut rig, &mut stalled).iter().all(|text| text.starts_with("fill")));
    }
}

#[test]
fn drops_leave_the_order_of_what_is_delivered() {
    let mut rig = rig(1, narrow(DROP));
    let mut client = rig.connect();
    at_once(rig.everyone.join(client.id(), "a")).unwrap();
    let patient = Sender::new(&rig.everyone, Some(Policy::DropMessage { timeout: ms(200) }));
    let mut received = Vec::new();
    for number in 0..300 {
        // Some may wait longer than later ones.
        let sender = if number % 7 == 0 { patient.clone() } else { Sender::from(&rig.everyone) };
        sender.try_publish(Publication::message(&targets()[number % 3], big(number))).unwrap();
        if number % 3 == 0 {
            rig.pass(ms(4));
        }
        if number % 50 > 40 {
            let some = client.peer.receive_some(3000);
            received.extend(
                some.into_iter()
                    .map(|received| if let Received::Data(text) = received { text } else { panic!() }),
            );
        }
    }
    rig.pass(ms(1000));
    let mut received = short(received);
    received.extend(receive_all_data(&mut rig, &mut client));
    let received: Vec<u64> = received.iter().map(|text| text.parse().unwrap()).collect();
    assert!(received.is_sorted_by(|a, b| a < b), "{received:?}");
    let after = metrics(&mut rig, &client);
    let dropped = after.tally.dropped.total();
    assert_eq!((received.len() as u64, after.tally.pending()), (300 - dropped, 0));
    assert!(dropped > 30 && received.len() > 30, "the test must drop and deliver many: {dropped}");
    assert_eq!(client.record().drops.iter().sum::<u64>(), dropped);
}

#[test]
fn recipients_clocks_run_together() {
    const STALLED: usize = 50;
    let mut rig = rig(2, narrow(DROP));
    let stalled = rig.connect_many(STALLED);
    stalled.iter().for_each(|client| fill(&mut rig, client));
    let everyone = rig.everyone.clone();
    for to in [EVERYONE, EVERYONE] {
        let began = rig.now;
        let mut sending = send(&everyone, &to, "to all");
        let mut publishing = Task::new(everyone.publish(Publication::message(&to, big("to all"))));
        assert_eq!(publishing.poll(), Some(Ok(())), "no publisher waits for frames that may be dropped");
        rig.settle();
        rig.pass(ms(19));
        assert!(sending.poll().is_none(), "but a receipt waits for the outcome");
        rig.pass(ms(1));
        let all = STALLED as u64;
        assert_eq!(outcome(&mut sending), Some([all, all, all, 0, 0]));
        assert_eq!(rig.now - began, MS20, "one timeout, not fifty");
    }
    assert!(stalled.iter().all(|client| client.record().drops.iter().sum::<u64>() == 4));
}

// ---- DropConnection ---------------------------------------------------------------------------------------------

const THREE_DROPS: Policy = Policy::DropConnection { timeout: MS20, max_drops: 3 };
const THREE_DROPS_AT_ONCE: Policy = Policy::DropConnection { timeout: Duration::ZERO, max_drops: 3 };

fn drop_one(rig: &mut Rig, to: impl Into<Address>) {
    rig.everyone.try_publish(Publication::message(to, big("lost"))).unwrap();
    rig.settle();
    rig.pass(MS20);
}

#[test]
fn too_many_drops_in_a_row_end_the_connection() {
    for (policy, to) in
        [THREE_DROPS, THREE_DROPS_AT_ONCE].into_iter().flat_map(|policy| targets().map(|to| (policy, to)))
    {
        let (mut rig, mut stalled, healthy) = stalled_and_healthy(1, policy);
        drop_one(&mut rig, &to);
        drop_one(&mut rig, &to);
        assert_lives(&stalled);
        drop_one(&mut rig, &to);
        assert_eq!(stalled.record().drops, [1, 1, 1], "{to:?}");
        assert_eq!(stalled.record().calls.last().map(String::as_str), Some("close"));
        assert_eq!((rig.everyone.len(), rig.engine.metrics().ended_slow), (1, 1));
        assert_ended(&mut rig, &mut stalled, &CloseReason::TooManyDrops, 1013);
        let all = rig.engine.metrics();
        assert!(all.tally.discarded > 0 && all.tally.pending() == 0 && all.tally.dropped.total() == 3);
        assert_lives(&healthy);
    }
}

#[test]
fn the_limit_on_drops_is_that_of_the_dropped_frames_policy() {
    for (strict, lenient) in [(THREE_DROPS, DROP), (THREE_DROPS_AT_ONCE, DROP_AT_ONCE)] {
        // The connection's own policy drops nothing, or ends no connection,
        for (own, is_unicast) in [Policy::Block, lenient].map(|own| [(own, false), (own, true)]).concat() {
            let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, own);
            let strict = Sender::new(&rig.everyone, Some(strict));
            let to = if is_unicast { Address::Connection(stalled.id()) } else { EVERYONE };
            for _ in 0..3 {
                assert_lives(&stalled);
                strict.try_publish(Publication::message(&to, big("lost"))).unwrap();
                rig.settle();
                rig.pass(MS20);
            }
            assert_ended(&mut rig, &mut stalled, &CloseReason::TooManyDrops, 1013);
        }
        // or ends it after three drops, of which the last must be its own.
        let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, strict);
        let lenient = Sender::new(&rig.everyone, Some(lenient));
        for _ in 0..10 {
            lenient.try_publish(Publication::message(EVERYONE, big("lost"))).unwrap();
            rig.settle();
            rig.pass(MS20);
        }
        assert_eq!(stalled.record().drops, [1; 10]);
        assert_lives(&stalled);
        drop_one(&mut rig, EVERYONE);
        assert_ended(&mut rig, &mut stalled, &CloseReason::TooManyDrops, 1013);
    }
}

#[test]
fn a_burst_of_drops_counts_as_many() {
    let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, THREE_DROPS);
    for _ in 0..3 {
        rig.everyone.try_publish(Publication::message(EVERYONE, big("lost"))).unwrap();
    }
    rig.settle();
    rig.pass(ms(19));
    assert_lives(&stalled);
    rig.pass(ms(1));
    assert_ended(&mut rig, &mut stalled, &CloseReason::TooManyDrops, 1013);
    assert_eq!(stalled.record().drops.iter().sum::<u64>(), 3);
}

#[test]
fn a_frame_accepted_in_between_resets_the_count_of_drops() {
    for policy in [THREE_DROPS, THREE_DROPS_AT_ONCE] {
        let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, policy);
        for _ in 0..3 {
            drop_one(&mut rig, EVERYONE);
            drop_one(&mut rig, EVERYONE);
            let _ = hear_all(&mut rig, &mut stalled);
            fill(&mut rig, &stalled);
        }
        assert_eq!(stalled.record().drops.len(), 6, "no more than two in a row");
        assert_lives(&stalled);
        drop_one(&mut rig, EVERYONE);
        drop_one(&mut rig, EVERYONE);
        assert_lives(&stalled);
        drop_one(&mut rig, EVERYONE);
        assert_ended(&mut rig, &mut stalled, &CloseReason::TooManyDrops, 1013);
    }
}

#[test]
fn a_frame_accepted_by_an_empty_outbox_resets_the_count_of_drops() {
    let config = ConnectionConfig { outbox_bytes: 4096, outbox_frames: 1024, ..narrow(THREE_DROPS_AT_ONCE) };
    let mut rig = rig(1, config);
    let mut client = rig.connect();
    for _ in 0..5 {
        // Both in one turn: with the first there is no room for the second.
        for length in [10, 5000] {
            let frame = Payload::text(&"x".repeat(length));
            rig.everyone
                .try_publish(Publication::message(EVERYONE, frame).except(&too_many_to_join()))
                .unwrap();
        }
        rig.settle();
        assert_eq!(client.peer.receive_data().len(), 1);
    }
    assert_eq!(client.record().drops, [1; 5]);
    assert_lives(&client);
}

#[test]
fn a_frame_accepted_after_waiting_resets_the_count_of_drops() {
    let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, THREE_DROPS);
    drop_one(&mut rig, EVERYONE);
    drop_one(&mut rig, EVERYONE);
    let patient = Sender::new(&rig.everyone, Some(Policy::Block));
    for _ in 0..30 {
        patient.try_publish(Publication::message(Address::Connection(stalled.id()), big("waits"))).unwrap();
    }
    rig.settle();
    // It takes some, but its outbox stays full.
    while metrics(&mut rig, &stalled).tally.pending() == 30 + OUTBOX_FRAMES as u64 {
        let _ = stalled.peer.receive_some(1000);
        rig.settle();
    }
    assert!(metrics(&mut rig, &stalled).tally.pending() > OUTBOX_FRAMES as u64 + 5);
    drop_one(&mut rig, EVERYONE);
    drop_one(&mut rig, EVERYONE);
    assert_lives(&stalled);
    drop_one(&mut rig, EVERYONE);
    assert_ended(&mut rig, &mut stalled, &CloseReason::TooManyDrops, 1013);
}

/// Frames that are published together are joined into one chunk; frames are counted all the same.
#[test]
fn a_frame_accepted_out_of_a_burst_resets_the_count_of_drops() {
    let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, THREE_DROPS_AT_ONCE);
    drop_one(&mut rig, EVERYONE);
    drop_one(&mut rig, EVERYONE);
    let _ = hear_all(&mut rig, &mut stalled);
    for number in 0..OUTBOX_FRAMES + 1 {
        rig.everyone.try_publish(Publication::message(EVERYONE, Payload::text(&number.to_string()))).unwrap();
    }
    rig.settle();
    assert_lives(&stalled);
}

/// A small frame after a large one gets room when the large one's time is over.
#[test]
fn a_frame_accepted_when_another_is_dropped_resets_the_count_of_drops() {
    let policy = Policy::DropConnection { timeout: MS20, max_drops: 2 };
    let config = ConnectionConfig { outbox_frames: 1000, outbox_bytes: 4000, ..narrow(policy) };
    let mut rig = rig(1, config);
    let stalled = rig.connect();
    while metrics(&mut rig, &stalled).pending_bytes < 2500 {
        rig.everyone.try_publish(Publication::message(EVERYONE, big("fill"))).unwrap();
        rig.settle();
    }
    let huge = Payload::text(&"x".repeat(3000));
    for _ in 0..3 {
        rig.everyone.try_publish(Publication::message(EVERYONE, huge.clone())).unwrap();
        rig.settle();
        rig.pass(ms(5));
        rig.everyone.try_publish(Publication::message(EVERYONE, Payload::text("small"))).unwrap();
        rig.pass(ms(15));
    }
    assert_lives(&stalled);
    assert_eq!(stalled.record().drops, [1, 1, 1]);
}

// ---- DropOnHighRtt ----------------------------------------------------------------------------------------------

/// Waits for a ping, and answers it after `rtt`.
fn round_trip(rig: &mut Rig, client: &mut Client, rtt: Duration) {
    for _ in 0..2000 {
        rig.pass(ms(1));
        for received in client.peer.receive() {
            if let Received::Ping(nonce) = received {
                rig.pass(rtt);
                client.peer.send_frame(0x8A, &nonce);
                rig.settle();
                return;
            }
        }
    }
    panic!("no ping");
}

fn beating(policy: Policy) -> ConnectionConfig {
    ConnectionConfig { heartbeat_interval: Some(ms(1000)), pong_timeout: ms(800), ..narrow(policy) }
}

#[test]
fn pings_are_sent_every_interval_even_if_a_pong_may_take_longer() {
    let interval = ms(50);
    let config = ConnectionConfig {
        heartbeat_interval: Some(interval),
        pong_timeout: ms(8000),
        ..narrow(Policy::Block)
    };
    let mut rig = rig(1, config);
    let mut client = rig.connect();
    for _ in 0..5 {
        let before = rig.now;
        round_trip(&mut rig, &mut client, ms(1));
        let passed = rig.now - before;
        assert!(passed <= interval + TWO_TICKS, "{passed:?}");
    }
}

#[test]
fn a_high_average_round_trip_ends_the_connection() {
    let policy = Policy::DropOnHighRtt { max_rtt: ms(100), rtt_samples: 3 };
    let mut rig = rig(1, beating(policy));
    let mut client = rig.connect();
    // Averages: 90; 100; 65 and a bit; the last three only: 101 and a bit, from 10, 90 and 205.
    for rtt in [90, 108, 10, 90] {
        round_trip(&mut rig, &mut client, ms(rtt));
        assert_lives(&client);
    }
    round_trip(&mut rig, &mut client, ms(206));
    assert_eq!(rig.engine.metrics().ended_slow, 1);
    assert_ended(&mut rig, &mut client, &CloseReason::HighRtt, 1013);
}

#[test]
fn old_round_trips_leave_the_window() {
    let policy = Policy::DropOnHighRtt { max_rtt: ms(100), rtt_samples: 2 };
    let mut first = rig(1, beating(policy));
    let mut client = first.connect();
    // If old ones were kept, ten fast ones would excuse two slow ones;
    (0..10).for_each(|_| round_trip(&mut first, &mut client, ms(10)));
    round_trip(&mut first, &mut client, ms(150));
    assert_lives(&client);
    round_trip(&mut first, &mut client, ms(150));
    assert_ended(&mut first, &mut client, &CloseReason::HighRtt, 1013);
    // and a slow one would count for ever.
    let mut second = rig(1, beating(policy));
    let mut client = second.connect();
    for rtt in [10, 180, 10, 180, 10, 180, 10] {
        round_trip(&mut second, &mut client, ms(rtt));
    }
    assert_lives(&client);
}

#[test]
fn before_the_first_pong_a_connection_counts_as_healthy() {
    let policy = Policy::DropOnHighRtt { max_rtt: ms(1), rtt_samples: 1 };
    let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, policy);
    let everyone = rig.everyone.clone();
    let mut sending = send(&everyone, EVERYONE, "waits");
    rig.settle();
    rig.pass(Duration::from_secs(3600));
    assert!(sending.poll().is_none(), "it waits, as with Block");
    assert_lives(&stalled);
    let received = receive_all_data(&mut rig, &mut stalled);
    assert_eq!(received.last().map(String::as_str), Some("waits"));
    assert_eq!(outcome(&mut sending), Some([2, 1, 0, 0, 0]));
}

// ---- Block and overrides ----------------------------------------------------------------------------------------

#[test]
fn under_block_nothing_is_dropped_and_only_publishers_to_the_stalled_client_wait() {
    let (mut rig, mut stalled, mut healthy) = stalled_and_healthy(2, Policy::Block);
    let everyone = rig.everyone.clone();
    at_once(everyone.join(healthy.id(), "others")).unwrap();
    rig.settle();
    let mut sending = send(&everyone, Address::group("a"), "0");
    let mut publishing =
        Task::new(everyone.publish(Publication::message(Address::groups(["a", "b"]), big("1"))));
    assert!(publishing.poll().is_none());
    rig.settle();
    let mut received = healthy.peer.receive_data().len();
    for _ in 0..10 {
        rig.pass(Duration::from_secs(600));
        let mut other =
            Task::new(everyone.publish(Publication::message(Address::group("others"), big("others"))));
        assert_eq!(other.poll(), Some(Ok(())), "no member of that group is congested");
        let mut other = send(&everyone, Address::group("others"), "others");
        rig.settle();
        assert_eq!(outcome(&mut other), Some([1, 0, 0, 0, 0]));
        received += healthy.peer.receive_data().len();
    }
    assert_eq!(received, 22);
    assert!(sending.poll().is_none() && publishing.poll().is_none());
    let received = receive_all_data(&mut rig, &mut stalled);
    assert!(received.ends_with(&["0".into(), "1".into()]), "{received:?}");
    assert_eq!((outcome(&mut sending), publishing.poll()), (Some([2, 1, 0, 0, 0]), Some(Ok(()))));
    let all = rig.engine.metrics();
    assert_eq!(
        (all.tally.dropped.timeout, all.tally.dropped.overflow, all.tally.discarded, all.tally.pending()),
        (0, 0, 0, 0)
    );
}

#[test]
fn a_publication_may_have_a_policy_of_its_own() {
    // A policy that drops, where connections block;
    let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, Policy::Block);
    let (own, dropping) = (rig.everyone.clone(), Sender::new(&rig.everyone, Some(DROP)));
    for to in targets() {
        let (mut waits, mut drops) = (send(&own, &to, "waits"), send(&dropping, &to, "drops"));
        rig.settle();
        rig.pass(MS20);
        assert_eq!((outcome(&mut waits), outcome(&mut drops)), (None, Some([2, 1, 1, 0, 0])), "{to:?}");
        assert_eq!(receive_all_data(&mut rig, &mut stalled).last().map(String::as_str), Some("waits"));
        assert_eq!(outcome(&mut waits), Some([2, 1, 0, 0, 0]));
        fill(&mut rig, &stalled);
    }
    // and one that blocks, where connections drop.
    let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, DROP_AT_ONCE);
    let (own, blocking) = (rig.everyone.clone(), Sender::new(&rig.everyone, Some(Policy::Block)));
    let (mut waits, mut drops) = (send(&blocking, EVERYONE, "waits"), send(&own, EVERYONE, "drops"));
    rig.settle();
    rig.pass(Duration::from_secs(3600));
    assert_eq!((outcome(&mut waits), outcome(&mut drops)), (None, Some([2, 1, 0, 1, 0])));
    assert_eq!(receive_all_data(&mut rig, &mut stalled).last().map(String::as_str), Some("waits"));
    assert_eq!(outcome(&mut waits), Some([2, 1, 0, 0, 0]));
    let error = Delivery::with_policy(Policy::DropMessage { timeout: DAY }).unwrap_err();
    assert_eq!(error.field, "timeout");
}

#[test]
fn a_unicast_waits_for_room_unless_its_policy_drops() {
    let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, DROP_AT_ONCE);
    let (own, dropping) = (rig.everyone.clone(), Sender::new(&rig.everyone, Some(DROP)));
    let to = Address::Connection(stalled.id());
    let (mut waits, mut drops) = (send(&own, &to, "waits"), send(&dropping, &to, "drops"));
    rig.settle();
    rig.pass(ms(19));
    assert!(drops.poll().is_none());
    rig.pass(ms(1));
    assert_eq!((outcome(&mut waits), outcome(&mut drops)), (None, Some([1, 1, 1, 0, 0])));
    rig.pass(Duration::from_secs(3600));
    assert_eq!((waits.poll(), stalled.record().drops), (None, vec![1]));
    assert_eq!(receive_all_data(&mut rig, &mut stalled).last().map(String::as_str), Some("waits"));
    assert_eq!(outcome(&mut waits), Some([1, 1, 0, 0, 0]));
}

// ---- Bounds -----------------------------------------------------------------------------------------------------

#[test]
fn above_the_overflow_limit_the_excess_is_dropped_at_once() {
    let by_frames = |config| ConnectionConfig { overflow_frames: 3, ..config };
    let by_bytes = |config| ConnectionConfig { overflow_bytes: 3500, ..config };
    let patient = Policy::DropMessage { timeout: Duration::from_secs(3600) };
    for config in [by_frames(narrow(patient)), by_bytes(narrow(patient))] {
        let mut rig = rig(1, config);
        let mut stalled = rig.connect();
        fill(&mut rig, &stalled);
        let everyone = rig.everyone.clone();
        let texts = ["0", "1", "2", "3", "4"];
        let mut sendings = texts.map(|text| send(&everyone, EVERYONE, text));
        rig.settle();
        let outcomes = sendings.each_mut().map(outcome);
        assert_eq!(outcomes, [None, None, None, Some([1, 1, 0, 1, 0]), Some([1, 1, 0, 1, 0])]);
        let now = metrics(&mut rig, &stalled);
        assert_eq!((now.tally.pending(), now.tally.dropped.overflow, now.tally.dropped.timeout), (7, 2, 0));
        assert_eq!(
            (stalled.record().drops.iter().sum::<u64>(), rig.engine.metrics().tally.dropped.overflow),
            (2, 2)
        );
        assert!(receive_all_data(&mut rig, &mut stalled).ends_with(&["0".into(), "1".into(), "2".into()]));
        assert!(sendings[..3].iter_mut().all(|sending| outcome(sending) == Some([1, 1, 0, 0, 0])));
        assert_lives(&stalled);
    }
}

#[test]
fn above_the_overflow_limit_a_connection_that_may_drop_nothing_is_ended() {
    let by_frames = |config| ConnectionConfig { overflow_frames: 3, ..config };
    let by_bytes = |config| ConnectionConfig { overflow_bytes: 3500, ..config };
    for config in [by_frames(narrow(Policy::Block)), by_bytes(narrow(Policy::Block))] {
        let mut rig = rig(1, config);
        let (mut stalled, healthy) = (rig.connect(), rig.connect());
        fill(&mut rig, &stalled);
        let everyone = rig.everyone.clone();
        let mut sendings = [0, 1, 2].map(|_| send(&everyone, EVERYONE, "waits"));
        rig.settle();
        assert_lives(&stalled);
        let mut last = send(&everyone, EVERYONE, "too much");
        rig.settle();
        assert!(sendings.iter_mut().all(|sending| outcome(sending) == Some([2, 1, 0, 0, 1])));
        assert_eq!(outcome(&mut last), Some([2, 1, 0, 0, 1]));
        assert_ended(&mut rig, &mut stalled, &CloseReason::SlowConsumer, 1013);
        assert_lives(&healthy);
        assert_eq!(rig.engine.metrics().pending_bytes, 0);
    }
}

#[test]
fn above_the_budget_the_largest_backlog_is_shed_and_the_others_stay() {
    let engine = EngineConfig { shards: Some(1), backlog_bytes_max: 1 << 20, ..EngineConfig::default() };
    let config = ConnectionConfig { outbox_frames: 1024, ..narrow(Policy::Block) };
    let mut rig = Rig::with(engine, config);
    let mut clients = rig.connect_many(4);
    let frame = Payload::text(&"x".repeat(10_000));
    // Some 300, 600 and 100 KB, and a client that reads.
    for (client, count) in [(0, 30), (1, 60), (2, 10)] {
        for _ in 0..count {
            rig.everyone
                .try_publish(Publication::message(Address::Connection(clients[client].id()), frame.clone()))
                .unwrap();
        }
        rig.settle();
    }
    clients.iter().for_each(assert_lives);
    let before = rig.engine.metrics().pending_bytes;
    assert!((950_000..1 << 20).contains(&before), "{before}");
    for _ in 0..10 {
        rig.everyone
            .try_publish(Publication::message(Address::Connection(clients[0].id()), frame.clone()))
            .unwrap();
        rig.settle();
    }
    let ended: Vec<_> = clients.iter().map(|client| client.record().ends.len()).collect();
    assert_eq!(ended, [0, 1, 0, 0]);
    assert!(rig.engine.metrics().pending_bytes < 500_000);
    assert_ended(&mut rig, &mut clients[1], &CloseReason::BacklogLimit, 1013);
    // The other backlogs are kept.
    assert_eq!(receive_all_data(&mut rig, &mut clients[0]).len(), 40);
    assert_eq!(receive_all_data(&mut rig, &mut clients[2]).len(), 10);
    assert_eq!(rig.engine.metrics().pending_bytes, 0);
}

#[test]
fn a_flood_of_control_frames_ends_the_connection_but_not_one_within_the_limit() {
    let config = ConnectionConfig { control_frames_per_second: 10, ..narrow(Policy::Block) };
    let mut rig = rig(1, config);
    let (mut within, mut beyond) = (rig.connect(), rig.connect());
    for _ in 0..5 {
        for number in 0..10u8 {
            // Unsolicited pongs count as well; data does not.
            within.peer.send_frame(if number % 2 == 0 { 0x89 } else { 0x8A }, &[number]);
            within.peer.text("data");
            within.peer.text("data");
        }
        rig.pass(ms(1000));
        let pongs = within.peer.receive();
        assert_eq!(pongs, [0, 2, 4, 6, 8].map(|number| Received::Pong(vec![number])));
    }
    for _ in 0..10 {
        beyond.peer.send_frame(0x89, b"");
    }
    rig.settle();
    assert_lives(&beyond);
    beyond.peer.send_frame(0x8A, b"");
    assert_ended(&mut rig, &mut beyond, &CloseReason::ControlFlood, 1008);
    assert_eq!(rig.engine.metrics().ended_protocol, 1);
    assert_lives(&within);
    assert_eq!(within.record().messages.len(), 100);
}

// ---- Drop notices -----------------------------------------------------------------------------------------------

#[test]
fn a_busy_handler_is_notified_of_drops_before_its_next_message_and_before_the_end() {
    let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, DROP);
    stalled.peer.text("wait");
    rig.settle();
    drop_one(&mut rig, EVERYONE);
    drop_one(&mut rig, EVERYONE);
    stalled.peer.text("next");
    rig.settle();
    assert_eq!(
        (stalled.record().calls, metrics(&mut rig, &stalled).tally.dropped.timeout),
        (vec!["wait".into()], 2)
    );
    stalled.release();
    rig.settle();
    assert_eq!(
        (stalled.record().calls, stalled.record().drops),
        (vec!["wait", "drop", "next"].into_iter().map(String::from).collect(), vec![2])
    );
    // The handler may take its time over a drop notice: the next message waits, and so does the next notice.
    stalled.wait_at_drop(true);
    drop_one(&mut rig, EVERYONE);
    drop_one(&mut rig, EVERYONE);
    stalled.peer.text("after");
    rig.settle();
    assert_eq!(
        (&stalled.record().calls[3..], stalled.record().drops),
        (&["drop".to_owned()][..], vec![2, 1])
    );
    stalled.wait_at_drop(false);
    stalled.release();
    rig.settle();
    assert_eq!(
        (&stalled.record().calls[4..], stalled.record().drops),
        (&["drop".to_owned(), "after".into()][..], vec![2, 1, 1])
    );
    // And before the end.
    stalled.peer.text("wait again");
    rig.settle();
    drop_one(&mut rig, EVERYONE);
    at_once(
        rig.everyone
            .publish(Publication::close(Address::Connection(stalled.id()), CloseCode::NORMAL, "").unwrap()),
    )
    .unwrap();
    rig.settle();
    assert_lives(&stalled);
    let dropped = metrics(&mut rig, &stalled).tally.dropped.timeout;
    stalled.release();
    rig.settle();
    assert_eq!(&stalled.record().calls[6..], ["wait again", "drop", "close"]);
    assert_eq!((stalled.record().drops, dropped), (vec![2, 1, 1, 1], 5));
    let _ = hear_all(&mut rig, &mut stalled);
}

#[test]
fn a_handler_that_is_busy_with_the_last_drop_is_notified_of_the_end_after_it() {
    let policy = Policy::DropConnection { timeout: MS20, max_drops: 1 };
    let (mut rig, mut stalled, _healthy) = stalled_and_healthy(1, policy);
    stalled.wait_at_drop(true);
    drop_one(&mut rig, EVERYONE);
    assert_eq!((rig.everyone.len(), stalled.record().calls), (1, vec!["drop".to_owned()]));
    stalled.release();
    rig.settle();
    assert_eq!(stalled.record().calls, ["drop", "close"]);
    assert_ended(&mut rig, &mut stalled, &CloseReason::TooManyDrops, 1013);
}

// ---- Liveness ---------------------------------------------------------------------------------------------------

#[test]
fn a_client_that_disappears_without_a_close_is_noticed_in_time() {
    let (interval, timeout) = (Duration::from_secs(15), Duration::from_secs(10));
    let config =
        ConnectionConfig { heartbeat_interval: Some(interval), pong_timeout: timeout, ..narrow(DROP) };
    // Whenever it disconnects, whatever its handler does, however full its outbox is.
    for second in 0..20 {
        for (is_busy, is_full) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut rig = rig(1, config.clone());
            let mut client = rig.connect();
            let answer = |client: &mut Client| {
                for received in client.peer.receive() {
                    if let Received::Ping(nonce) = received {
                        client.peer.send_frame(0x8A, &nonce);
                    }
                }
            };
            for _ in 0..20 + second {
                rig.pass(ms(1000));
                answer(&mut client);
                rig.settle();
            }
            assert_lives(&client);
            if is_busy {
                client.peer.text("wait");
                rig.settle();
            }
            if is_full {
                fill(&mut rig, &client);
            }
            // It sends nothing from now on and takes nothing; others continue to send to it.
            let noticed = (0..).find(|_| {
                rig.everyone.try_publish(Publication::message(EVERYONE, big("anybody?"))).unwrap();
                rig.pass(ms(50));
                rig.everyone.is_empty()
            });
            let took = ms(50) * (noticed.unwrap() + 1);
            assert!(took <= interval + timeout + TWO_TICKS, "{took:?}: {second} {is_busy} {is_full}");
            assert_eq!(rig.engine.metrics().ended_timeout, 1);
            if is_busy {
                client.release();
                rig.settle();
            }
            assert_eq!(client.record().ends, [CloseReason::PongTimeout]);
            rig.pass(Duration::from_secs(6));
            assert_eq!(rig.engine.metrics().connections, 0, "nothing is left of it");
        }
    }
}

// ---- Tallies and metrics ----------------------------------------------------------------------------------------

#[test]
fn a_groups_metrics_are_the_sum_of_its_current_members() {
    let (mut rig, stalled, mut healthy) = stalled_and_healthy(2, DROP_AT_ONCE);
    let stranger = rig.connect();
    for member in [&stalled, &healthy] {
        at_once(rig.everyone.join(member.id(), "room")).unwrap();
    }
    rig.everyone.try_publish(Publication::message(Address::group("room"), big("for two"))).unwrap();
    rig.everyone
        .try_publish(Publication::message(Address::Connection(stranger.id()), big("for a third")))
        .unwrap();
    let [first, second] = [&stalled, &healthy].map(|member| metrics(&mut rig, member));
    let room = rig.collect_metrics(&Address::group("room"), &[]);
    assert_eq!((room.connections, room.tally.offered), (2, first.tally.offered + second.tally.offered));
    assert_eq!(
        (room.tally.written, room.tally.pending()),
        (first.tally.written + second.tally.written, first.tally.pending() + second.tally.pending())
    );
    assert_eq!(
        (room.tally.dropped.overflow, room.pending_bytes),
        (1, first.pending_bytes + second.pending_bytes)
    );
    let others = rig.collect_metrics(&Address::group("room"), &[stalled.id()]);
    assert_eq!(
        (others.connections, others.tally.offered, others.tally.dropped.overflow),
        (1, second.tally.offered, 0)
    );
    assert_eq!(rig.collect_metrics(&Address::groups(["room", "none"]), &[]), room);
    assert_eq!(
        rig.collect_metrics(&Address::groups(["room", "a", "b", "room"]), &[]),
        room,
        "both are in all three"
    );
    assert_eq!(
        rig.collect_metrics(&Address::Connection(healthy.id()), &[]).tally.offered,
        second.tally.offered
    );
    assert_eq!(rig.collect_metrics(&Address::Connection(healthy.id()), &[healthy.id()]), Default::default());
    assert_eq!(rig.collect_metrics(&Address::group("none"), &[]), Default::default());

    // A connection that leaves is no longer counted in the group; in everyone, even a disconnected one is.
    at_once(rig.everyone.leave(stalled.id(), "room")).unwrap();
    assert_eq!(rig.collect_metrics(&Address::group("room"), &[]).tally.offered, second.tally.offered);
    let before = rig.collect_metrics(&EVERYONE, &[]);
    healthy.peer.close(1000);
    hear_all(&mut rig, &mut healthy);
    drop(healthy);
    rig.settle();
    let after = rig.collect_metrics(&EVERYONE, &[]);
    assert_eq!((after.connections, after.tally.offered), (before.connections - 1, before.tally.offered));
}

#[test]
fn queries_about_connections_are_answered_after_what_was_sent_before() {
    // With so small an outbox the shard runs one publication a turn.
    let mut rig = rig(1, narrow(Policy::Block));
    let clients = rig.connect_many(2);
    let seen = Arc::new(Mutex::new(Vec::new()));
    for asked in 1..=3 {
        rig.everyone.try_publish(Publication::message(EVERYONE, Payload::text("to both"))).unwrap();
        let told = seen.clone();
        let see = move |metrics: ConnectionMetrics| lock(&told).push((asked, metrics.tally.offered));
        at_once(rig.everyone.connection_metrics(clients[0].id(), see)).unwrap();
        rig.everyone.try_publish(Publication::message(EVERYONE, Payload::text("to both"))).unwrap();
        let told = seen.clone();
        let see = move |part: GroupMetrics| lock(&told).push((asked, part.tally.offered));
        at_once(rig.everyone.collect_metrics(&EVERYONE, &[], see)).unwrap();
    }
    rig.settle();
    assert_eq!(*lock(&seen), [(1, 1), (1, 4), (2, 3), (2, 8), (3, 5), (3, 12)]);
}

#[test]
fn group_metrics_contain_the_mean_and_the_highest_round_trip() {
    let mut rig = rig(2, beating(Policy::Block));
    assert_eq!(rig.collect_metrics(&EVERYONE, &[]).rtt_average(), None);
    let mut clients = rig.connect_many(2);
    for (client, rtt) in clients.iter_mut().zip([10, 30]) {
        round_trip(&mut rig, client, ms(rtt));
    }
    let each = clients.iter().map(|client| metrics(&mut rig, client).rtt.average.unwrap());
    let each: Vec<Duration> = each.collect();
    let together = rig.collect_metrics(&EVERYONE, &[]);
    assert_eq!(together.rtt_highest, each.iter().copied().max());
    assert_eq!(together.rtt_average(), Some((each[0] + each[1]) / 2));
}

/// One event of a history; clients are counted modulo their number.
#[derive(Debug, Clone)]
enum Happens {
    Publish { to: usize, bytes: usize, policy: usize, awaited: bool },
    Read { client: usize, bytes: usize },
    Say { client: usize },
    Vanish { client: usize },
    Close { client: usize },
    Enter,
    Join { client: usize, group: usize },
    Leave { client: usize, group: usize },
    Turn,
    Pass { millis: u64 },
}

fn happens() -> impl Strategy<Value = Happens> {
    let publish =
        (0..8usize, prop_oneof![Just(1), Just(300), Just(2_000), Just(20_000)], 0..8usize, any::<bool>());
    let client = || 0..8usize;
    prop_oneof![
        12 => publish.prop_map(|(to, bytes, policy, awaited)| Happens::Publish { to, bytes, policy, awaited }),
        4 => (client(), 1..30_000usize).prop_map(|(client, bytes)| Happens::Read { client, bytes }),
        1 => client().prop_map(|client| Happens::Say { client }),
        1 => client().prop_map(|client| Happens::Vanish { client }),
        1 => client().prop_map(|client| Happens::Close { client }),
        1 => Just(Happens::Enter),
        2 => (client(), 0..2usize).prop_map(|(client, group)| Happens::Join { client, group }),
        1 => (client(), 0..2usize).prop_map(|(client, group)| Happens::Leave { client, group }),
        4 => Just(Happens::Turn),
        3 => (1..40u64).prop_map(|millis| Happens::Pass { millis }),
    ]
}

const POLICIES: [Policy; 6] = [
    Policy::Block,
    DROP,
    DROP_AT_ONCE,
    Policy::DropMessage { timeout: ms(5) },
    Policy::DropConnection { timeout: ms(10), max_drops: 5 },
    Policy::DropOnHighRtt { max_rtt: ms(30), rtt_samples: 2 },
];
const GROUPS: [&str; 2] = ["a", "b"];

/// The connections' tallies add up for each, and together to the engine's.
fn assert_balance(rig: &mut Rig, clients: &[Client]) {
    rig.settle();
    let mut sum = [0; 2];
    for client in clients {
        let Some(now) = rig.metrics_of(client.id()) else { continue };
        let accounted =
            now.tally.written + now.tally.dropped.total() + now.tally.discarded + now.tally.pending();
        assert_eq!(now.tally.offered, accounted, "{now:?}");
        assert!(now.tally.pending() > 0 || now.pending_bytes == 0, "{now:?}");
        let record = client.record();
        let told = record.drops.iter().sum::<u64>();
        if record.ends.is_empty() && record.waker.is_none() {
            assert_eq!(told, now.tally.dropped.total(), "{now:?}");
        }
        sum[0] += now.tally.pending();
        sum[1] += now.pending_bytes;
    }
    let all = rig.engine.metrics();
    assert_eq!([all.tally.pending(), all.pending_bytes], sum, "{all:?}");
    assert_surveyed(rig);
}

/// The sum over the namespace's connections, including those that have disconnected, equals the engine's.
fn assert_surveyed(rig: &mut Rig) {
    let (all, surveyed) = (rig.engine.metrics(), rig.collect_metrics(&EVERYONE, &[]));
    let engine = [
        all.connections,
        all.tally.offered,
        all.tally.written,
        all.tally.dropped.timeout,
        all.tally.dropped.overflow,
    ];
    let namespace = [
        surveyed.connections,
        surveyed.tally.offered,
        surveyed.tally.written,
        surveyed.tally.dropped.timeout,
        surveyed.tally.dropped.overflow,
    ];
    assert_eq!(engine, namespace);
    let engine = [all.tally.discarded, all.tally.pending(), all.pending_bytes, all.tally.received];
    let namespace =
        [surveyed.tally.discarded, surveyed.tally.pending(), surveyed.pending_bytes, surveyed.tally.received];
    assert_eq!(engine, namespace);
}

fn live_through(history: &[Happens], own: Policy, shards: usize, all_awaited: bool) {
    let config = ConnectionConfig {
        outbox_bytes: 30_000,
        overflow_frames: 12,
        overflow_bytes: 60_000,
        heartbeat_interval: Some(ms(100)),
        pong_timeout: ms(200),
        close_timeout: ms(60),
        ..narrow(own)
    };
    let mut rig = rig(shards, config);
    let mut clients = rig.connect_many(4);
    let mut data_received = [0u64; 64];
    let mut sendings: Vec<Sending> = Vec::new();
    let mut receipts: Vec<Receipt> = Vec::new();
    for (number, happens) in history.iter().enumerate() {
        let count = clients.len();
        match *happens {
            Happens::Publish { to, bytes, policy, awaited } => {
                let sender = Sender::new(&rig.everyone, POLICIES.get(policy).copied());
                let to = match to {
                    0..=2 => EVERYONE,
                    3 => Address::group(GROUPS[0]),
                    4 => Address::group(GROUPS[1]),
                    5 => Address::groups(GROUPS),
                    one => Address::Connection(clients[(one + number) % count].id()),
                };
                let frame = Payload::text(&"x".repeat(bytes));
                if awaited || all_awaited {
                    let except = if number % 5 == 0 { vec![clients[0].id()] } else { vec![] };
                    let publication = Publication::message(to, frame).except(&except);
                    sendings.push(Task::new(sender.deliver(publication)));
                } else {
                    sender.try_publish(Publication::message(to, frame)).unwrap();
                }
            }
            Happens::Read { client, bytes } => {
                read_some(&mut clients, client % count, bytes, &mut data_received)
            }
            Happens::Say { client } => {
                let client = &mut clients[client % count];
                let waits = client.record().waker.is_some();
                if waits {
                    client.release();
                } else {
                    let frame = testkit::frames::client_frame(0x81, b"wait");
                    let _ = std::io::Write::write_all(&mut client.peer.stream, &frame);
                }
            }
            Happens::Vanish { client } => {
                let _ = clients[client % count].peer.stream.shutdown(std::net::Shutdown::Both);
            }
            Happens::Close { client } => {
                at_once(
                    rig.everyone.publish(
                        Publication::close(
                            Address::Connection(clients[client % count].id()),
                            CloseCode::NORMAL,
                            "",
                        )
                        .unwrap(),
                    ),
                )
                .unwrap();
            }
            Happens::Enter if count < 8 => clients.push(rig.connect()),
            Happens::Enter => {}
            Happens::Join { client, group } => {
                at_once(rig.everyone.join(clients[client % count].id(), GROUPS[group])).unwrap();
            }
            Happens::Leave { client, group } => {
                at_once(rig.everyone.leave(clients[client % count].id(), GROUPS[group])).unwrap();
            }
            Happens::Turn => rig.turn(),
            Happens::Pass { millis } => rig.pass(ms(millis)),
        }
        sendings.retain_mut(|sending| match sending.poll() {
            Some(receipt) => {
                receipts.push(receipt.unwrap());
                false
            }
            None => true,
        });
        if number % 8 == 0 {
            assert_balance(&mut rig, &clients);
        }
    }
    // Open clients that read receive exactly what was written for them.
    for _ in 0..20 {
        for client in 0..clients.len() {
            read_some(&mut clients, client, 1 << 20, &mut data_received);
        }
        rig.settle();
    }
    for (client, received) in clients.iter().zip(data_received) {
        if let Some(now) = rig.metrics_of(client.id())
            && client.record().ends.is_empty()
            && client.record().waker.is_none()
        {
            assert_eq!((now.tally.written, now.tally.pending()), (received, 0), "{now:?}");
        }
    }
    assert_balance(&mut rig, &clients);
    // At the end all disconnect, and nothing of them is left.
    for client in &mut clients {
        let _ = client.peer.stream.shutdown(std::net::Shutdown::Both);
    }
    // A handler may be notified of several events that it takes its time over.
    for _ in 0..history.len() {
        let busy = clients.iter().filter(|client| client.record().waker.is_some());
        busy.for_each(Client::release);
        rig.settle();
    }
    rig.pass(ms(1000));
    for mut sending in sendings {
        receipts.push(sending.poll().expect("every publisher is released").unwrap());
    }
    assert_surveyed(&mut rig);
    let all = rig.engine.metrics();
    assert_eq!((all.connections, all.tally.pending(), all.pending_bytes, rig.everyone.len()), (0, 0, 0, 0));
    assert_eq!(all.tally.offered, all.tally.written + all.tally.dropped.total() + all.tally.discarded);
    assert_eq!(all.ended, clients.len() as u64);
    for client in &clients {
        assert_eq!(client.record().ends.len(), 1);
    }
    let sum = |count: fn(&Receipt) -> u64| receipts.iter().map(count).sum::<u64>();
    assert!(receipts.iter().all(|receipt| {
        let lost = receipt.dropped.total() + receipt.disconnected;
        lost <= receipt.delayed && receipt.delayed <= receipt.recipients
    }));
    if all_awaited {
        assert_eq!(sum(|receipt| receipt.recipients), all.tally.offered);
        assert_eq!(sum(|receipt| receipt.dropped.timeout), all.tally.dropped.timeout);
        assert_eq!(sum(|receipt| receipt.dropped.overflow), all.tally.dropped.overflow);
        assert!(sum(|receipt| receipt.disconnected) <= all.tally.discarded);
    }
}

/// Takes some bytes from the kernel, and answers pings.
fn read_some(clients: &mut [Client], client: usize, bytes: usize, data_received: &mut [u64]) {
    let peer = &mut clients[client].peer;
    for received in peer.receive_some(bytes) {
        match received {
            Received::Data(_) => data_received[client] += 1,
            Received::Ping(nonce) => {
                let _ =
                    std::io::Write::write_all(&mut peer.stream, &testkit::frames::client_frame(0x8A, &nonce));
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn after_any_history_the_tallies_add_up(
        history in prop::collection::vec(happens(), 1..150),
        own in prop::sample::select(&POLICIES[..]),
        shards in 1..3usize,
        all_awaited in any::<bool>(),
    ) {
        live_through(&history, own, shards, all_awaited);
    }
}

/// Notes each notification of drops, and panics or closes at it.
struct EndsAtDrop(bool, Arc<Mutex<Vec<Option<Arc<str>>>>>);

impl Handler for EndsAtDrop {
    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn on_drop(&mut self, notice: &DropNotice, context: &mut Context<'_>) -> Poll<()> {
        lock(&self.1).push(notice.group.clone());
        assert!(!self.0, "on purpose");
        context.close(CloseReason::Application { code: CloseCode(4000), text: "too slow".into() });
        Poll::Ready(())
    }
}

#[test]
fn a_handler_that_panics_is_not_notified_of_drops_again_but_one_that_closes_is_notified_of_all() {
    for panics in [true, false] {
        let mut rig = rig(1, narrow(DROP));
        let (told, id) = <(Arc<Mutex<Vec<_>>>, Arc<Mutex<Option<ConnectionId>>>)>::default();
        let (handler, known) = (EndsAtDrop(panics, told.clone()), id.clone());
        let _peer = rig.connect_handler(Box::new(move |id| {
            *lock(&known) = Some(id);
            Box::new(handler)
        }));
        let id = lock(&id).unwrap();
        at_once(rig.everyone.join_all(id, &["a", "b"])).unwrap();
        rig.settle();
        while rig.engine.metrics().tally.pending() < 4 {
            rig.everyone.try_publish(Publication::message(id, big("fill"))).unwrap();
            rig.settle();
        }
        // Both expire in one turn.
        for group in ["a", "b"] {
            rig.everyone.try_publish(Publication::message(Address::group(group), big("lost"))).unwrap();
        }
        rig.settle();
        rig.pass(MS20);
        let notified = lock(&told).len();
        assert_eq!(notified, if panics { 1 } else { 2 }, "panics: {panics}");
    }
}

// ---- Clients that keep up ---------------------------------------------------------------------------------------

/// Publishes bursts to groups of several sizes, each without a turn between. The clients read all of it before the next one,
/// and the kernel keeps more than one. Nothing may be lost, although the outboxes are short and what does not fit is dropped.
fn keep_up(outbox_frames: usize, bursts: &[Vec<(usize, usize)>]) {
    const CLIENTS: usize = 12;
    let mut rig = rig(2, ConnectionConfig { outbox_frames, overflow_frames: 0, ..narrow(DROP_AT_ONCE) });
    rig.send_buffer = 1 << 18;
    let mut clients = rig.connect_many(CLIENTS);
    let is_member = |client: usize, group: usize| group == 0 || client.is_multiple_of(group + 1);
    for (number, client) in clients.iter().enumerate() {
        for group in (1..CLIENTS).filter(|group| is_member(number, *group)) {
            at_once(rig.everyone.join(client.id(), &group.to_string())).unwrap();
        }
    }
    for (round, burst) in bursts.iter().enumerate() {
        let mut expected = vec![Vec::new(); CLIENTS];
        for (part, (group, count)) in burst.iter().enumerate() {
            let to = if *group == 0 { EVERYONE } else { Address::group(group.to_string()) };
            for number in 0..*count {
                let text = format!("{round} {part} {number}");
                rig.everyone.try_publish(Publication::message(to.clone(), Payload::text(&text))).unwrap();
                for (_, expected) in
                    expected.iter_mut().enumerate().filter(|(client, _)| is_member(*client, *group))
                {
                    expected.push(text.clone());
                }
            }
        }
        rig.settle();
        for (client, expected) in clients.iter_mut().zip(expected) {
            assert_eq!(client.peer.receive_data(), expected);
        }
    }
    assert_eq!(rig.engine.metrics().tally.dropped.total(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_client_that_reads_everything_loses_nothing_whatever_groups_it_is_in(
        outbox_frames in 4usize..40,
        bursts in prop::collection::vec(prop::collection::vec((0usize..12, 1usize..60), 1..8), 1..10),
    ) {
        for transport in [Transport::Plain, Transport::Tls] {
            over(transport, || keep_up(outbox_frames, &bursts));
        }
    }
}
