//! The engine's guarantees, each a test with its name.
//!
//! Tests about consequences drive the engine turn by turn with a clock of their own. Tests about threads use
//! threads, and clients that connect and disconnect. Nothing here waits for time.
//! own. Where it is about threads, there are threads, and clients that come and go. Nothing here waits for time.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use shardcast_engine::{
    Address, CloseCode, CloseReason, ConnectionConfig, ConnectionId, Engine, EngineConfig, FrameError,
    MessageKind, Namespace, Payload, Policy, Publication, PublishError, Socket, TryPublishError,
};
use testkit::client::new_connection;
use testkit::frames::client_frame;
use testkit::sender::too_many_to_join;
use testkit::{Client, RawClient, Received, Rig, Task, at_once, block_on};

const EVERYONE: Address = Address::Everyone;

fn frame(text: impl AsRef<str>) -> Payload {
    Payload::text(text.as_ref())
}

/// A frame of some 1,000 bytes that begins with `text`.
fn big(text: impl std::fmt::Display) -> Payload {
    Payload::text(&format!("{text:.<1000}"))
}

fn publish(rig: &Rig, to: impl Into<Address>, text: impl AsRef<str>) {
    rig.everyone.try_publish(Publication::message(to, frame(text))).unwrap();
}

fn threaded(shards: usize) -> (Engine, Namespace, Arc<ConnectionConfig>) {
    let config =
        EngineConfig { shards: Some(shards), pin: false, log_capacity: 64, ..EngineConfig::default() };
    let config = EngineConfig { io_uring: testkit::uses_io_uring(), ..config };
    let engine = Engine::start(config).unwrap();
    let everyone = engine.namespace();
    (engine, everyone, Arc::new(ConnectionConfig::default()))
}

/// A client of an engine that has threads, and its id.
fn enter(engine: &Engine, everyone: &Namespace, config: &Arc<ConnectionConfig>) -> (RawClient, ConnectionId) {
    let (new_connection, client) = new_connection(engine, config, 1 << 16);
    block_on(everyone.adopt(new_connection)).unwrap();
    let Client { mut peer, record } = client;
    // Its id is known once it is open, and it is open before the message that is published now.
    let hello = format!("hello {:p}", Arc::as_ptr(&record));
    block_on(everyone.publish(Publication::message(EVERYONE, frame(&hello)))).unwrap();
    let _ = peer.wait_data_until(|text| text == hello);
    let id = record.lock().unwrap().id.unwrap();
    (peer, id)
}

/// A pseudo-random sequence, the same every time.
fn draw(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

// ---- Guarantee 1 ------------------------------------------------------------------------------------------------

#[test]
fn all_connections_see_one_order() {
    const PUBLISHERS: usize = 4;
    const EACH: usize = 400;
    let (engine, everyone, config) = threaded(3);
    let peers: Vec<_> = (0..9).map(|_| enter(&engine, &everyone, &config).0).collect();
    std::thread::scope(|scope| {
        let stay = |mut peer: RawClient| {
            let mut order = peer.wait_data_until(|text| text == "end");
            order.retain(|text| !text.starts_with("hello"));
            order
        };
        let stayers: Vec<_> = peers.into_iter().map(|peer| scope.spawn(move || stay(peer))).collect();
        // Transient clients connect meanwhile, stay for some messages and disconnect without a Close.
        let visitors: Vec<_> = (0..3)
            .map(|_| {
                let visit = || {
                    let (mut peer, _) = enter(&engine, &everyone, &config);
                    let mut left = 100;
                    let mut seen = Vec::new();
                    while left > 0 {
                        match peer.wait() {
                            Received::Data(text) if text == "end" => break,
                            Received::Data(text) if !text.starts_with("hello") => seen.push(text),
                            _ => {}
                        }
                        left -= 1;
                    }
                    seen
                };
                scope.spawn(move || (0..5).map(|_| visit()).collect::<Vec<_>>())
            })
            .collect();
        let publishers: Vec<_> = (0..PUBLISHERS)
            .map(|publisher| {
                let everyone = &everyone;
                scope.spawn(move || {
                    for number in 0..EACH {
                        let text = format!("{publisher}:{number}");
                        block_on(everyone.publish(Publication::message(EVERYONE, frame(text)))).unwrap();
                    }
                })
            })
            .collect();
        for publisher in publishers {
            publisher.join().unwrap();
        }
        // The last transient client may connect only now; it ends with the messages that end everything.
        let is_over = AtomicBool::new(false);
        let (orders, visits) = std::thread::scope(|inner| {
            inner.spawn(|| {
                while !is_over.load(SeqCst) {
                    block_on(everyone.publish(Publication::message(EVERYONE, frame("end")))).unwrap();
                    std::thread::yield_now();
                }
            });
            let orders: Vec<_> = stayers.into_iter().map(|stayer| stayer.join()).collect();
            let visits: Vec<_> = visitors.into_iter().map(|visitor| visitor.join()).collect();
            is_over.store(true, SeqCst);
            (orders, visits)
        });
        let orders: Vec<_> = orders.into_iter().map(|order| order.unwrap()).collect();
        assert!(orders.iter().all(|order| *order == orders[0]), "the permanent clients disagree");
        assert_eq!(orders[0].len(), PUBLISHERS * EACH);
        for seen in visits.into_iter().flat_map(|visits| visits.unwrap()) {
            let is_part = seen.is_empty() || orders[0].windows(seen.len()).any(|part| part == seen);
            assert!(is_part, "a transient client saw another order: {seen:?}");
        }
    });
}

// ---- Guarantees 2 and 3 -----------------------------------------------------------------------------------------

/// Each publisher has a group of its own, so it knows exactly which clients must receive which of its messages.
#[test]
fn each_publishers_actions_are_seen_in_their_sequence() {
    const PUBLISHERS: u64 = 3;
    const CLIENTS: u64 = 7;
    let (engine, everyone, config) = threaded(3);
    let clients: Vec<_> = (0..CLIENTS).map(|_| enter(&engine, &everyone, &config)).collect();
    let ids: Vec<_> = clients.iter().map(|(_, id)| *id).collect();
    let act = |publisher: u64| {
        let (mut random, group) = (publisher, format!("group {publisher}"));
        let mut members = [false; CLIENTS as usize];
        let mut expected: Vec<Vec<String>> = vec![Vec::new(); CLIENTS as usize];
        for number in 0..600 {
            let text = format!("{publisher}:{number}");
            let one = draw(&mut random, CLIENTS) as usize;
            let (to, sees): (_, Vec<_>) = match draw(&mut random, 8) {
                0..=1 => {
                    block_on(everyone.join(ids[one], &group)).unwrap();
                    members[one] = true;
                    continue;
                }
                2 => {
                    block_on(everyone.leave(ids[one], &group)).unwrap();
                    members[one] = false;
                    continue;
                }
                3 => (EVERYONE, (0..ids.len()).collect()),
                4 => (Address::Connection(ids[one]), vec![one]),
                _ => (Address::group(&*group), (0..ids.len()).filter(|client| members[*client]).collect()),
            };
            sees.iter().for_each(|client| expected[*client].push(text.clone()));
            block_on(everyone.publish(Publication::message(&to, frame(text)))).unwrap();
        }
        expected
    };
    std::thread::scope(|scope| {
        let act = &act;
        let publishers: Vec<_> =
            (0..PUBLISHERS).map(|publisher| scope.spawn(move || act(publisher))).collect();
        let readers: Vec<_> = clients
            .into_iter()
            .map(|(mut peer, _)| scope.spawn(move || peer.wait_data_until(|text| text == "end")))
            .collect();
        let expected: Vec<_> = publishers.into_iter().map(|publisher| publisher.join().unwrap()).collect();
        block_on(everyone.publish(Publication::message(EVERYONE, frame("end")))).unwrap();
        for (client, reader) in readers.into_iter().enumerate() {
            let seen = reader.join().unwrap();
            for (publisher, expected) in expected.iter().enumerate() {
                let prefix = format!("{publisher}:");
                let of_publisher: Vec<_> = seen.iter().filter(|text| text.starts_with(&prefix)).collect();
                assert!(
                    of_publisher.iter().copied().eq(&expected[client]),
                    "client {client}, publisher {publisher}"
                );
            }
        }
    });
}

#[test]
fn membership_is_exact() {
    const ROUNDS: usize = 200;
    let (engine, everyone, config) = threaded(2);
    let clients: Vec<_> = (0..4).map(|_| enter(&engine, &everyone, &config)).collect();
    let ids: Vec<_> = clients.iter().map(|(_, id)| *id).collect();
    // Publications begun and ended: those in between are in flight.
    let (begun, ended, is_over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let readers: Vec<_> = clients
            .into_iter()
            .map(|(mut peer, _)| scope.spawn(move || peer.wait_data_until(|text| text == "end")))
            .collect();
        let flood = scope.spawn(|| {
            while !is_over.load(SeqCst) {
                let number = begun.fetch_add(1, SeqCst);
                block_on(
                    everyone.publish(Publication::message(Address::group("room"), frame(number.to_string()))),
                )
                .unwrap();
                ended.fetch_add(1, SeqCst);
            }
        });
        let members: Vec<_> = ids
            .iter()
            .map(|id| {
                let (everyone, begun, ended) = (&everyone, &begun, &ended);
                scope.spawn(move || {
                    let mut stays = Vec::new();
                    for _ in 0..ROUNDS {
                        let may = ended.load(SeqCst);
                        block_on(everyone.join(*id, "room")).unwrap();
                        let must = begun.load(SeqCst);
                        std::thread::yield_now();
                        let must_end = ended.load(SeqCst);
                        block_on(everyone.leave(*id, "room")).unwrap();
                        stays.push((may, must..must_end, begun.load(SeqCst)));
                    }
                    stays
                })
            })
            .collect();
        let stays: Vec<_> = members.into_iter().map(|member| member.join().unwrap()).collect();
        is_over.store(true, SeqCst);
        flood.join().unwrap();
        block_on(everyone.publish(Publication::message(EVERYONE, frame("end")))).unwrap();
        for (reader, stays) in readers.into_iter().zip(stays) {
            let seen: Vec<u64> = reader.join().unwrap().iter().filter_map(|text| text.parse().ok()).collect();
            assert!(seen.is_sorted_by(|a, b| a < b), "once each, in order");
            let mut rest = &seen[..];
            for (may, must, may_end) in stays {
                let of_this_stay = rest.partition_point(|number| *number < may_end);
                let (stay, later) = rest.split_at(of_this_stay);
                rest = later;
                assert!(
                    stay.iter().all(|number| *number >= may),
                    "one from before the join: {stay:?}, {may}"
                );
                let inside = stay.iter().copied().filter(|number| must.contains(number));
                assert!(inside.eq(must.clone()), "not all since the join: {stay:?}, {must:?}");
            }
            assert!(rest.is_empty(), "some from after the last leave: {rest:?}");
        }
    });
}

#[test]
fn a_join_counts_from_the_next_publication_even_if_no_shard_has_moved_meanwhile() {
    let mut rig = Rig::new(3);
    let mut clients = rig.connect_many(6);
    let texts: Vec<_> = (0..6).map(|number| number.to_string()).collect();
    for (client, text) in clients.iter().zip(&texts) {
        publish(&rig, Address::group("room"), text);
        at_once(rig.everyone.join(client.id(), "room")).unwrap();
    }
    at_once(rig.everyone.leave(clients[5].id(), "room")).unwrap();
    publish(&rig, Address::group("room"), "last");
    assert_eq!(
        (rig.everyone.group_len("room"), rig.everyone.group_count()),
        (6, 1),
        "the shards have not taken a turn"
    );
    rig.settle();
    for (number, client) in clients.iter_mut().enumerate() {
        let mut expected = texts[number + 1..].to_vec();
        expected.push("last".into());
        if number == 5 {
            expected.clear();
        }
        assert_eq!(client.peer.receive_data(), expected);
        at_once(rig.everyone.leave(client.id(), "room")).unwrap();
    }
    rig.settle();
    assert_eq!(rig.everyone.group_count(), 0);
}

#[test]
fn several_groups_reach_each_connection_once_and_the_excepted_not_at_all() {
    let mut rig = Rig::new(2);
    let mut clients = rig.connect_many(6);
    for (number, client) in clients.iter().enumerate().take(5) {
        for group in ["a", "b"].iter().take(1 + number % 2) {
            at_once(rig.everyone.join(client.id(), group)).unwrap();
        }
        at_once(rig.everyone.join(client.id(), "c")).unwrap();
    }
    let except = [clients[1].id(), clients[2].id()];
    rig.everyone.try_publish(Publication::message(EVERYONE, frame("all")).except(&except[..1])).unwrap();
    rig.everyone
        .try_publish(Publication::message(Address::Connection(except[0]), frame("never")).except(&except))
        .unwrap();
    let everyone = rig.everyone.clone();
    let mut send = Task::new(everyone.deliver(
        Publication::message(Address::groups(["a", "b", "c", "none"]), frame("union")).except(&except),
    ));
    assert!(send.poll().is_none());
    rig.settle();
    assert_eq!(send.poll().unwrap().unwrap().recipients, 3);
    let received: Vec<_> = clients.iter_mut().map(|client| client.peer.receive_data()).collect();
    let both = vec!["all".to_owned(), "union".to_owned()];
    let all = vec!["all".to_owned()];
    assert_eq!(received, [both.clone(), vec![], all.clone(), both.clone(), both, all]);
}

// ---- Guarantee 4 ------------------------------------------------------------------------------------------------

/// Outboxes of four frames; the kernel holds a few more.
fn narrow() -> ConnectionConfig {
    ConnectionConfig { outbox_frames: 4, ..ConnectionConfig::default() }
}

/// Publishes to the client until a publisher has to wait for it; returns that publisher, and how many came before.
fn stall<'a>(
    rig: &mut Rig,
    everyone: &'a Namespace,
    client: &Client,
) -> (Task<'a, Result<(), shardcast_engine::PublishError>>, u64) {
    let id = client.id();
    for number in 0..1000 {
        let mut task =
            Task::new(everyone.publish(Publication::message(Address::Connection(id), big(number))));
        let first = task.poll();
        rig.settle();
        if first.or_else(|| task.poll()).is_none() {
            return (task, number);
        }
    }
    panic!("no publisher had to wait");
}

#[test]
fn a_publisher_waits_until_a_stalled_client_takes_the_message_or_disconnects() {
    for goes in [false, true] {
        let mut rig = Rig::with(EngineConfig { shards: Some(2), ..EngineConfig::default() }, narrow());
        let everyone = rig.everyone.clone();
        let (mut stalled, mut neighbour) = (rig.connect(), rig.connect());
        at_once(everyone.join(neighbour.id(), "others")).unwrap();
        let (mut waits, _) = stall(&mut rig, &everyone, &stalled);
        assert!(waits.poll().is_none());
        // A publisher that does not await the stalled client does not wait for it; nor does its neighbour.
        for number in 0..50 {
            let to =
                if number % 2 == 0 { Address::group("others") } else { Address::Connection(neighbour.id()) };
            let mut task = Task::new(everyone.publish(Publication::message(&to, frame(number.to_string()))));
            let first = task.poll();
            rig.settle();
            assert_eq!(first.or_else(|| task.poll()), Some(Ok(())));
            assert_eq!(neighbour.peer.receive_data(), [number.to_string()]);
        }
        // A publication to both reaches the neighbour at once, but ends only when both have accepted it.
        let mut both = Task::new(everyone.deliver(Publication::message(EVERYONE, frame("both"))));
        assert!(both.poll().is_none());
        rig.settle();
        assert!(both.poll().is_none() && waits.poll().is_none());
        assert_eq!(neighbour.peer.receive_data(), ["both"]);
        if goes {
            drop(stalled.peer.stream);
            rig.settle();
        } else {
            let mut last = Vec::new();
            while last.last().is_none_or(|text| text != "both") {
                last.extend(stalled.peer.receive_data());
                rig.settle();
            }
        }
        assert_eq!(waits.poll(), Some(Ok(())));
        let receipt = both.poll().unwrap().unwrap();
        assert_eq!((receipt.recipients, receipt.delayed), (2, 1));
    }
}

#[test]
fn a_client_with_too_much_overflow_is_ended_and_no_other() {
    let config = ConnectionConfig { overflow_frames: 8, ..narrow() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
    let (mut stalled, mut neighbour) = (rig.connect(), rig.connect());
    let mut received = Vec::new();
    for number in 0..100 {
        rig.everyone.try_publish(Publication::message(EVERYONE, big(number))).unwrap();
        rig.settle();
        received.extend(neighbour.peer.receive_data());
    }
    assert_eq!(received.len(), 100);
    assert_eq!(stalled.record().ends, [CloseReason::SlowConsumer]);
    assert_eq!((rig.everyone.len(), rig.engine.metrics().ended_slow), (1, 1));
    // What it has not taken is discarded, but the partly written frame is completed, and a Close frame follows.
    let mut received = Vec::new();
    while received.last() != Some(&Received::End) {
        received.extend(stalled.peer.receive());
        rig.settle();
    }
    assert_eq!(received[received.len() - 2..], [Received::Close(Some(1013)), Received::End]);
    assert!(neighbour.record().ends.is_empty());
}

#[test]
fn a_full_log_gives_the_frame_back_and_a_publisher_that_waits_is_woken() {
    let config = EngineConfig { shards: Some(2), log_capacity: 2, ..EngineConfig::default() };
    let mut rig = Rig::with(config, ConnectionConfig::default());
    let mut client = rig.connect();
    let everyone = rig.everyone.clone();
    publish(&rig, EVERYONE, "0");
    publish(&rig, EVERYONE, "1");
    let somebody_else = "0000000000000000".parse().unwrap();
    let publication = Publication::message(EVERYONE, frame("2")).except(&[somebody_else]);
    let refused = everyone.try_publish(publication.clone()).unwrap_err();
    assert!(refused.is_full());
    assert_eq!(refused.into_inner(), publication);
    let mut waits = Task::new(everyone.publish(Publication::message(EVERYONE, frame("2"))));
    assert!(waits.poll().is_none());
    // One of two shards is not enough.
    let now = rig.now;
    rig.shards[0].turn(now).unwrap();
    assert!(waits.poll().is_none());
    rig.settle();
    while waits.poll().is_none() {
        rig.settle();
    }
    rig.settle();
    assert_eq!(client.peer.receive_data(), ["0", "1", "2"]);
}

#[cfg(target_pointer_width = "64")]
#[test]
fn a_frame_too_long_for_any_outbox_is_refused_and_given_back() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    let (everyone, id) = (rig.everyone.clone(), client.id());
    // Zeros that are never touched take no memory.
    let long = Payload::build(0, |buffer| {
        *buffer = vec![0; Payload::BYTES_MAX + 11];
        Ok::<_, std::convert::Infallible>(MessageKind::Binary)
    });
    let Ok(long) = long;
    for to in [EVERYONE, Address::Connection(id)] {
        assert_eq!(
            Task::new(everyone.publish(Publication::message(&to, long.clone()))).poll(),
            Some(Err(PublishError::TooLong))
        );
        assert!(matches!(
            Task::new(everyone.deliver(Publication::message(&to, long.clone()))).poll(),
            Some(Err(PublishError::TooLong))
        ));
        assert!(
            matches!(everyone.try_publish(Publication::message(&to, long.clone())), Err(TryPublishError::TooLong(back)) if back.payload() == Some(&long))
        );
    }
    publish(&rig, EVERYONE, "short");
    rig.settle();
    assert_eq!(client.peer.receive_data(), ["short"]);
}

#[test]
fn a_full_mailbox_gives_the_frame_back_and_a_publisher_that_waits_is_woken() {
    let config = EngineConfig {
        shards: Some(1),
        mailbox_capacity: 1,
        publishers_waiting_max: 1,
        ..EngineConfig::default()
    };
    let mut rig = Rig::with(config, ConnectionConfig::default());
    let mut client = rig.connect();
    let (everyone, to) = (rig.everyone.clone(), Address::Connection(client.id()));
    publish(&rig, &to, "0");
    let publications = [
        Publication::message(&to, frame("1")),
        Publication::close(&to, shardcast_engine::CloseCode::NORMAL, "bye").unwrap(),
    ];
    for publication in publications {
        let refused = everyone.try_publish(publication.clone());
        assert_eq!(refused, Err(TryPublishError::Full(publication)));
    }
    let mut waits = Task::new(everyone.publish(Publication::message(&to, frame("1"))));
    assert!(waits.poll().is_none());
    let overloaded = Task::new(everyone.publish(Publication::message(&to, frame("2")))).poll();
    assert_eq!(overloaded, Some(Err(PublishError::Overloaded)));
    rig.settle();
    let first = waits.poll();
    rig.settle();
    assert_eq!(first.or_else(|| waits.poll()), Some(Ok(())));
    assert_eq!(client.peer.receive_data(), ["0", "1"]);
}

/// Waits until the shards have stopped turning, as far as that is visible from outside.
fn fall_asleep(engine: &Engine) {
    let mut unchanged = 0;
    let mut before = engine.metrics().turns;
    while unchanged < 100 {
        std::thread::yield_now();
        let turns = engine.metrics().turns;
        unchanged = if turns == before { unchanged + 1 } else { 0 };
        before = turns;
    }
}

#[test]
fn a_sleeping_shard_is_woken_by_what_concerns_it() {
    let (engine, everyone, _) = threaded(2);
    // No heartbeat rescues a lost wake: this test would hang.
    let config = Arc::new(ConnectionConfig { heartbeat_interval: None, ..ConnectionConfig::default() });
    let mut clients: Vec<_> = (0..2).map(|_| enter(&engine, &everyone, &config)).collect();
    block_on(everyone.join(clients[1].1, "room")).unwrap();
    for number in 0..300 {
        let (receiver, to) = match number % 3 {
            0 => (0, EVERYONE),
            1 => (1, Address::group("room")),
            _ => (0, Address::Connection(clients[0].1)),
        };
        fall_asleep(&engine);
        let text = number.to_string();
        everyone.try_publish(Publication::message(&to, frame(&text))).unwrap();
        let _ = clients[receiver].0.wait_data_until(|received| received == text);
    }
}

// ---- Guarantee 5 ------------------------------------------------------------------------------------------------

#[test]
fn offered_is_written_plus_discarded_plus_pending() {
    let config = ConnectionConfig { overflow_frames: 30, ..narrow() };
    let mut rig = Rig::with(EngineConfig { shards: Some(2), ..EngineConfig::default() }, config);
    // Two that read, two that stop and resume, one that stops for good, one that disconnects without a Close,
    // one that is closed with a backlog.
    let mut clients = rig.connect_many(7);
    let ids: Vec<_> = clients.iter().map(Client::id).collect();
    let mut received = [0; 7];
    let mut written = HashMap::new();
    for round in 0..60 {
        for number in 0..3 {
            rig.everyone
                .try_publish(Publication::message(EVERYONE, big(format!("{round}:{number}"))))
                .unwrap();
        }
        rig.everyone
            .try_publish(Publication::message(Address::Connection(ids[round % 7]), frame("one")))
            .unwrap();
        if round == 5 {
            clients[5].peer.stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
        if round == 7 {
            at_once(
                rig.everyone
                    .publish(Publication::close(Address::Connection(ids[6]), CloseCode::NORMAL, "").unwrap()),
            )
            .unwrap();
        }
        for _ in 0..2 {
            rig.turn();
            let mut readers = vec![0, 1];
            if round % 8 == 4 {
                readers.extend([2, 3]);
            }
            for reader in readers {
                received[reader] += clients[reader].peer.receive_data().len() as u64;
            }
        }
        for (client, id) in ids.iter().enumerate() {
            if let Some(metrics) = rig.metrics_of(*id) {
                assert_eq!(
                    metrics.tally.offered,
                    metrics.tally.written + metrics.tally.discarded + metrics.tally.pending(),
                    "{client}"
                );
                written.insert(client, metrics.tally.written);
            }
        }
        let all = rig.engine.metrics();
        assert_eq!(all.tally.offered, all.tally.written + all.tally.discarded + all.tally.pending());
    }
    let ended: Vec<_> = clients.iter().map(|client| client.record().ends.clone()).collect();
    assert_eq!((&ended[0][..], &ended[4][..]), (&[][..], &[CloseReason::SlowConsumer][..]));
    assert!(
        matches!(ended[5][..], [CloseReason::Disconnected | CloseReason::Transport(_)]),
        "{:?}",
        ended[5]
    );
    rig.pass(Duration::from_secs(10));
    // Clients that read at the end have received what was written, no more and no less.
    for _ in 0..200 {
        rig.settle();
        for reader in [0, 1, 2, 3, 4, 6] {
            received[reader] += clients[reader].peer.receive_data().len() as u64;
        }
    }
    for reader in 0..4 {
        match rig.metrics_of(ids[reader]) {
            Some(metrics) => {
                assert_eq!(
                    (metrics.tally.written, metrics.tally.pending()),
                    (received[reader], 0),
                    "{reader}"
                );
            }
            None => assert!(received[reader] >= written[&reader], "{reader}"),
        }
    }
    let all = rig.engine.metrics();
    assert!(
        all.tally.discarded > 0
            && all.tally.offered == all.tally.written + all.tally.discarded
            && all.tally.pending() == 0,
        "{all:?}"
    );
}

// ---- Coalescing and fairness ------------------------------------------------------------------------------------

#[test]
fn publications_of_one_turn_are_written_in_one_write() {
    let mut rig = Rig::new(1);
    let mut clients = rig.connect_many(3);
    let before = rig.engine.metrics();
    for number in 0..100 {
        publish(&rig, EVERYONE, number.to_string());
        publish(&rig, Address::Connection(clients[0].id()), "one");
    }
    rig.settle();
    let after = rig.engine.metrics();
    assert_eq!((after.tally.written - before.tally.written, after.writes - before.writes), (400, 3));
    assert_eq!(clients[0].peer.receive_data().len(), 200);
    assert_eq!(clients[1].peer.receive_data(), clients[2].peer.receive_data());
}

#[test]
fn frames_queued_for_a_stalled_client_are_written_in_few_writes() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    let mut sent = 0;
    while rig.engine.metrics().tally.pending() == 0 {
        rig.everyone.try_publish(Publication::message(EVERYONE, big(sent))).unwrap();
        rig.settle();
        sent += 1;
    }
    for number in 0..200 {
        publish(&rig, EVERYONE, number.to_string());
        rig.turn();
    }
    let before = rig.engine.metrics();
    assert_eq!(client.peer.receive_data().len() as u64, before.tally.written);
    rig.settle();
    assert!(
        rig.engine.metrics().writes - before.writes <= 2,
        "the partly written frame, and then all the rest"
    );
    assert_eq!(client.peer.receive_data().len() as u64, sent + 200 - before.tally.written);
}

#[test]
fn a_fan_out_to_many_does_not_starve_reading() {
    const MANY: usize = 1500;
    let mut rig = Rig::new(1);
    let (listener, speaker) = (rig.connect_many(MANY), rig.connect());
    let mut speaker = speaker;
    publish(&rig, EVERYONE, "to all");
    speaker.peer.text("hear me");
    rig.turn();
    let after = rig.engine.metrics();
    assert_eq!(speaker.record().messages, ["hear me"]);
    assert!(after.tally.written < MANY as u64, "one turn does not write to all: {}", after.tally.written);
    speaker.peer.text("hear me again");
    rig.turn();
    assert_eq!(speaker.record().messages.len(), 2);
    rig.settle();
    assert_eq!((rig.engine.metrics().tally.written, listener.len()), (MANY as u64 + 1, MANY));
}

/// Connections that take everything as soon as it is written to them.
fn connect_sinks(rig: &mut Rig, count: usize) {
    for _ in 0..count {
        let (mut new_connection, _) = new_connection(&rig.engine, &rig.config, 4096);
        new_connection.socket = Socket::sink();
        at_once(rig.everyone.adopt(new_connection)).unwrap();
        rig.turn();
    }
    rig.settle();
}

#[test]
fn one_turn_puts_no_more_frames_into_outboxes_than_a_bound() {
    const MANY: u64 = 1000;
    let mut rig = Rig::new(1);
    connect_sinks(&mut rig, MANY as usize);
    for _ in 0..250 {
        rig.everyone
            .try_publish(Publication::message(EVERYONE, frame("to all")).except(&too_many_to_join()))
            .unwrap();
    }
    rig.turn();
    let offered = rig.engine.metrics().tally.offered;
    assert!((100_000..200_000 + MANY).contains(&offered), "{offered}");
    rig.settle();
    assert_eq!(rig.engine.metrics().tally.written, 250 * MANY);
}

#[test]
fn messages_that_leave_out_a_few_connections_count_together_for_that_bound() {
    const MANY: u64 = 1000;
    let mut rig = Rig::new(1);
    connect_sinks(&mut rig, MANY as usize);
    for _ in 0..250 {
        let except = &too_many_to_join()[..4];
        rig.everyone.try_publish(Publication::message(EVERYONE, frame("to all")).except(except)).unwrap();
    }
    rig.turn();
    assert_eq!(rig.engine.metrics().tally.offered, 250 * MANY, "in one piece");
}

#[test]
fn a_client_that_keeps_up_loses_nothing_however_much_is_published_at_once() {
    // With so many clients a turn does not write to all of them.
    for (count, is_joined) in [(1, true), (1, false), (3000, true), (3000, false)] {
        let policy = Policy::DropMessage { timeout: Duration::ZERO };
        let mut rig = Rig::one(ConnectionConfig { outbox_frames: 8, policy, ..ConnectionConfig::default() });
        connect_sinks(&mut rig, count);
        let nobody = too_many_to_join();
        let except = if is_joined { &[][..] } else { &nobody };
        for _ in 0..60 {
            rig.everyone.try_publish(Publication::message(EVERYONE, frame("to all")).except(except)).unwrap();
        }
        rig.settle();
        let all = rig.engine.metrics();
        assert_eq!(
            (all.tally.written, all.tally.dropped.overflow),
            (60 * count as u64, 0),
            "joined: {is_joined}"
        );
    }
}

#[test]
fn a_flooding_client_is_read_no_more_in_one_turn_than_its_share() {
    let config = EngineConfig { shards: Some(1), read_buffer_bytes: 1024, ..EngineConfig::default() };
    let flood: Vec<u8> = (0..5000).flat_map(|_| client_frame(0x81, b"1234")).collect();
    // Alone, and among so many that they are polled in parts.
    for peers in [1, 100] {
        let mut rig = Rig::with(config.clone(), ConnectionConfig::default());
        let mut clients = rig.connect_many(peers);
        for client in &mut clients {
            client.peer.stream.set_nonblocking(true).unwrap();
            std::io::Write::write_all(&mut client.peer.stream, &flood).unwrap();
        }
        let mut before = vec![0; peers];
        for turn in 0..10 {
            clients.iter_mut().for_each(|client| client.peer.text("more")); // an event of its own in each turn
            rig.turn();
            for (client, before) in clients.iter().zip(&mut before) {
                let received = client.record().messages.len();
                // Four reads of 1,024 bytes, ten bytes a message; and what is left over from the turn before.
                assert!(received - *before <= 4 * 1024 / 10 + 1, "turn {turn}: {}", received - *before);
                *before = received;
            }
        }
    }
}

#[test]
fn a_connection_in_a_reused_slot_is_read_to_its_end() {
    let mut rig = Rig::new(1);
    drop(rig.connect().peer);
    let (new_connection, mut second) = testkit::client::new_connection(&rig.engine, &rig.config, 4096);
    at_once(rig.everyone.adopt(new_connection)).unwrap();
    second.peer.text("last words");
    second.peer.close(1000);
    second.peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
    // In one turn the first connection's end is noticed and the second gets its slot, in the next it is read.
    rig.turn();
    rig.settle();
    let record = second.record();
    assert_eq!(record.messages, ["last words"]);
    assert_eq!(record.ends, [CloseReason::Peer { code: Some(CloseCode(1000)), text: "".into() }]);
}

// ---- Guarantee 7 ------------------------------------------------------------------------------------------------

#[test]
fn messages_of_one_connection_are_handled_in_order_one_after_the_other() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    for text in ["a", "wait b", "c", "d", "wait e", "f"] {
        client.peer.text(text);
    }
    rig.settle();
    assert_eq!(client.record().messages, ["a", "wait b"]);
    client.release();
    rig.settle();
    assert_eq!(client.record().messages, ["a", "wait b", "c", "d", "wait e"]);
    client.release();
    rig.settle();
    assert_eq!((client.record().messages.len(), client.record().resumes), (6, 2));
    // A superfluous wake has no effect.
    client.peer.text("wait g");
    rig.settle();
    let waker = client.record().waker.clone().unwrap();
    waker.wake_by_ref();
    waker.wake_by_ref();
    rig.settle();
    assert_eq!(client.record().resumes, 3, "resumed, and still waiting");
    client.release();
    rig.settle();
    waker.wake();
    rig.settle();
    assert_eq!((client.record().resumes, client.record().ends.len()), (4, 0));
}

#[test]
fn a_client_that_is_not_read_is_blocked_by_its_own_kernel() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    client.peer.text("wait");
    rig.settle();
    client.peer.stream.set_nonblocking(true).unwrap();
    let frame = client_frame(0x82, &[7; 1000]);
    let mut taken = 0;
    let refused = loop {
        match std::io::Write::write(&mut client.peer.stream, &frame[taken % frame.len()..]) {
            Ok(count) => taken += count,
            Err(error) => break error,
        }
        rig.settle();
        assert!(taken < 64 << 20, "something buffers it all");
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
    client.release();
    rig.settle();
    assert_eq!(client.record().messages.len(), 1 + taken / frame.len());
}

#[test]
fn messages_before_a_close_are_handled_even_if_the_handler_was_busy() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    client.peer.text("wait");
    rig.settle();
    client.peer.text("and then");
    client.peer.close(1000);
    let (stream, _keep) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut client.peer.stream, stream.into()));
    rig.settle();
    client.release();
    rig.settle();
    assert_eq!(client.record().messages, ["wait", "and then"]);
    assert_eq!(client.record().ends, [CloseReason::Peer { code: Some(CloseCode::NORMAL), text: "".into() }]);
}

#[test]
fn a_busy_handler_is_not_taken_for_a_dead_client() {
    let config = ConnectionConfig {
        heartbeat_interval: Some(Duration::from_secs(15)),
        pong_timeout: Duration::from_secs(10),
        ..ConnectionConfig::default()
    };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
    let mut client = rig.connect();
    client.peer.text("wait");
    for _ in 0..120 {
        rig.pass(Duration::from_secs(1));
        for received in client.peer.receive() {
            let Received::Ping(nonce) = received else { panic!("{received:?}") };
            client.peer.send_frame(0x8A, &nonce);
        }
    }
    assert_eq!((rig.everyone.len(), client.record().ends.len()), (1, 0));
    let rtt = rig.metrics_of(client.id()).unwrap().rtt.last;
    assert!(
        rtt.is_some_and(|rtt| rtt <= Duration::from_secs(1)),
        "the handler's time is no round trip: {rtt:?}"
    );
}

// ---- Guarantee 8 ------------------------------------------------------------------------------------------------

/// A way to end a connection; the reason; the close code for a client that can still read it.
type End = (&'static str, fn(&mut Rig, &mut Client), fn(&CloseReason) -> bool, Option<u16>);

macro_rules! is {
    ($pattern:pat) => {
        |reason| matches!(reason, $pattern)
    };
}

const BAD_HEADERS: [(&str, &[u8], FrameError); 5] = [
    ("unmasked", &[0x81, 0x01, b'x'], FrameError::Unmasked),
    ("reserved bits", &[0xC1, 0x80, 0, 0, 0, 0], FrameError::ReservedBits),
    ("reserved opcode", &[0x83, 0x80, 0, 0, 0, 0], FrameError::ReservedOpcode(3)),
    ("fragmented control", &[0x09, 0x80, 0, 0, 0, 0], FrameError::FragmentedControl),
    ("continuation of nothing", &[0x80, 0x80, 0, 0, 0, 0], FrameError::UnexpectedContinuation),
];

fn ends() -> Vec<End> {
    vec![
        (
            "peer",
            |_, client| client.peer.close(1001),
            is!(CloseReason::Peer { code: Some(CloseCode::GOING_AWAY), .. }),
            Some(1001),
        ),
        (
            "peer, no code",
            |_, client| client.peer.send_frame(0x88, &[]),
            is!(CloseReason::Peer { code: None, .. }),
            Some(0),
        ),
        (
            "disconnected",
            |_, client| client.peer.stream.shutdown(std::net::Shutdown::Write).unwrap(),
            is!(CloseReason::Disconnected),
            None,
        ),
        (
            "utf-8",
            |_, client| client.peer.send_frame(0x81, b"\xFF"),
            is!(CloseReason::Protocol(FrameError::InvalidUtf8)),
            Some(1007),
        ),
        (
            "too big",
            |_, client| client.peer.send_frame(0x82, &[0; 2000]),
            is!(CloseReason::Protocol(FrameError::MessageTooBig { .. })),
            Some(1009),
        ),
        (
            "too many fragments",
            |_, client| {
                [0x02, 0x00, 0x00, 0x00, 0x00].iter().for_each(|first| client.peer.send_frame(*first, b"x"))
            },
            is!(CloseReason::Protocol(FrameError::TooManyFragments { .. })),
            Some(1008),
        ),
        (
            "close code",
            |_, client| client.peer.close(1005),
            is!(CloseReason::Protocol(FrameError::InvalidCloseCode(1005))),
            Some(1002),
        ),
        (
            "application",
            |rig, client| {
                at_once(rig.everyone.publish(
                    Publication::close(Address::Connection(client.id()), CloseCode(3999), "enough").unwrap(),
                ))
                .unwrap()
            },
            is!(CloseReason::Application { code: CloseCode(3999), .. }),
            Some(3999),
        ),
        (
            "handler",
            |_, client| client.peer.text("close"),
            is!(CloseReason::Application { code: CloseCode(4000), .. }),
            Some(4000),
        ),
        ("panic", |_, client| client.peer.text("panic"), is!(CloseReason::HandlerPanicked), Some(1011)),
        (
            "pong timeout",
            |rig, _| rig.pass(Duration::from_secs(60)),
            is!(CloseReason::PongTimeout),
            Some(1011),
        ),
        (
            "max duration",
            |rig, client| {
                while client.record().ends.is_empty() {
                    answer_pings(&mut client.peer);
                    rig.pass(Duration::from_secs(1));
                }
            },
            is!(CloseReason::MaxDuration),
            Some(1012),
        ),
        (
            "engine",
            |rig, _| {
                let engine = std::mem::replace(&mut rig.engine, Rig::new(1).engine);
                drop(engine);
            },
            is!(CloseReason::Shutdown { .. }),
            Some(1001),
        ),
    ]
}

/// Answers the pings that have arrived; fails on any other input except the end of the stream.
fn answer_pings(peer: &mut RawClient) {
    for received in peer.receive() {
        match received {
            Received::Ping(nonce) => peer.send_frame(0x8A, &nonce),
            other => panic!("{other:?}"),
        }
    }
}

fn strict() -> ConnectionConfig {
    ConnectionConfig {
        max_message_bytes: 1000,
        max_fragments: 3,
        heartbeat_interval: Some(Duration::from_secs(20)),
        pong_timeout: Duration::from_secs(10),
        max_connection_duration: Some(Duration::from_secs(70)),
        ..ConnectionConfig::default()
    }
}

/// A connection ends once, with the right Close frame, and then nothing of it is left.
fn ends_once(
    name: &str,
    end: impl Fn(&mut Rig, &mut Client),
    is_reason: impl Fn(&CloseReason) -> bool,
    told: Option<u16>,
) {
    let mut rig = Rig::with(EngineConfig { shards: Some(2), ..EngineConfig::default() }, strict());
    let mut client = rig.connect();
    at_once(rig.everyone.join(client.id(), "room")).unwrap();
    rig.settle();
    assert_eq!((rig.everyone.len(), rig.everyone.group_len("room")), (1, 1), "{name}");
    end(&mut rig, &mut client);
    for _ in 0..3 {
        rig.turn();
    }
    // Late events change nothing any more.
    let _ = std::io::Write::write(&mut client.peer.stream, &client_frame(0x81, b"late"));
    for _ in 0..10 {
        rig.turn();
    }
    assert!(
        client.record().ends.len() == 1 && is_reason(&client.record().ends[0]),
        "{name}: {:?}",
        client.record().ends
    );
    assert_eq!((rig.everyone.len(), rig.everyone.group_count()), (0, 0), "{name}");
    let mut received = client.peer.receive();
    received.retain(|received| !matches!(received, Received::Ping(_)));
    let close = told.map(|code| Received::Close((code > 0).then_some(code)));
    let expected: Vec<_> = close.into_iter().chain([Received::End]).collect();
    assert_eq!(received, expected, "{name}");
    // The client's socket is dropped as well, and with it the last memory of the connection.
    drop(std::mem::replace(
        &mut client.peer.stream,
        std::os::unix::net::UnixStream::pair().unwrap().0.into(),
    ));
    for _ in 0..10 {
        rig.turn();
    }
    assert!(client.record().is_dropped && client.record().ends.len() == 1, "{name}");
    assert!(!client.record().messages.contains(&"late".to_owned()), "{name}");
    assert!(format!("{:?}", rig.shards).matches("connections: 0").count() == 2, "{name}: {:?}", rig.shards);
}

#[test]
fn every_end_is_reported_once() {
    for (name, end, is_reason, told) in ends() {
        ends_once(name, end, is_reason, told);
    }
    for (name, bytes, error) in BAD_HEADERS {
        let end = |_: &mut Rig, client: &mut Client| {
            std::io::Write::write_all(&mut client.peer.stream, bytes).unwrap();
        };
        ends_once(name, end, |reason| *reason == CloseReason::Protocol(error), Some(1002));
    }
}

#[test]
fn an_idle_client_is_ended() {
    let config = ConnectionConfig { idle_timeout: Some(Duration::from_secs(5)), ..strict() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
    let mut client = rig.connect();
    rig.pass(Duration::from_secs(4));
    client.peer.text("still here");
    rig.settle();
    rig.pass(Duration::from_millis(4900));
    assert_eq!(client.record().ends, []);
    rig.pass(Duration::from_millis(200));
    assert_eq!(client.record().ends, [CloseReason::IdleTimeout]);
}

#[test]
fn a_client_that_does_not_answer_the_close_is_dropped_after_the_close_timeout() {
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, strict());
    let mut client = rig.connect();
    at_once(
        rig.everyone
            .publish(Publication::close(Address::Connection(client.id()), CloseCode::NORMAL, "").unwrap()),
    )
    .unwrap();
    rig.settle();
    assert_eq!((client.record().ends.len(), rig.engine.connection_count()), (1, 1));
    rig.pass(Duration::from_millis(5100));
    assert_eq!((client.record().ends.len(), rig.engine.connection_count()), (1, 0));
    assert_eq!(client.peer.receive().last(), Some(&Received::End));
}

#[test]
fn a_busy_handler_is_notified_of_the_end_when_it_is_done() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    client.peer.text("wait");
    rig.settle();
    at_once(
        rig.everyone
            .publish(Publication::close(Address::Connection(client.id()), CloseCode::NORMAL, "").unwrap()),
    )
    .unwrap();
    rig.settle();
    assert_eq!((client.record().ends.len(), rig.everyone.len()), (0, 0));
    client.release();
    rig.settle();
    assert_eq!((client.record().ends.len(), client.record().is_dropped), (1, true));
}

/// A handler whose destructor panics, as a future's may.
struct PanicsOnDrop;

impl shardcast_engine::Handler for PanicsOnDrop {
    fn on_message(
        &mut self,
        _: shardcast_engine::Message<'_>,
        _: &mut shardcast_engine::Context<'_>,
    ) -> std::task::Poll<()> {
        std::task::Poll::Ready(())
    }
}

impl Drop for PanicsOnDrop {
    fn drop(&mut self) {
        assert!(std::thread::panicking(), "as a destructor should not");
    }
}

#[test]
fn a_handler_that_panics_as_it_is_dropped_harms_no_other() {
    let mut rig = Rig::new(1);
    let mut neighbour = rig.connect();
    let (new_connection, client) = new_connection(&rig.engine, &rig.config, 4096);
    let new_connection =
        shardcast_engine::NewConnection { handler: Box::new(|_| Box::new(PanicsOnDrop)), ..new_connection };
    at_once(rig.everyone.adopt(new_connection)).unwrap();
    rig.settle();
    assert_eq!(rig.everyone.len(), 2);
    drop(client);
    rig.settle();
    publish(&rig, EVERYONE, "still here");
    rig.settle();
    assert_eq!((rig.everyone.len(), neighbour.peer.receive_data()), (1, vec!["still here".to_owned()]));
}

#[test]
fn messages_before_a_close_are_received_before_it() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    publish(&rig, EVERYONE, "one");
    publish(&rig, Address::Connection(client.id()), "two");
    publish(&rig, EVERYONE, "three");
    at_once(
        rig.everyone
            .publish(Publication::close(Address::Connection(client.id()), CloseCode::NORMAL, "").unwrap()),
    )
    .unwrap();
    publish(&rig, EVERYONE, "four");
    rig.settle();
    let data = |text: &str| Received::Data(text.into());
    assert_eq!(
        client.peer.receive(),
        [data("one"), data("two"), data("three"), Received::Close(Some(1000)), Received::End]
    );
}

#[test]
fn a_dropped_engine_closes_its_connections_and_releases_every_publisher() {
    let (engine, everyone, config) = threaded(2);
    let mut peers: Vec<_> = (0..6).map(|_| enter(&engine, &everyone, &config).0).collect();
    let publishers: Vec<_> = (0..4)
        .map(|_| {
            let everyone = everyone.clone();
            std::thread::spawn(move || {
                while block_on(everyone.publish(Publication::message(EVERYONE, frame("on and on")))).is_ok() {
                }
            })
        })
        .collect();
    let readers: Vec<_> = peers
        .drain(..)
        .map(|mut peer| {
            std::thread::spawn(move || {
                let mut last = Received::End;
                loop {
                    match peer.wait() {
                        Received::End => return last,
                        received => last = received,
                    }
                }
            })
        })
        .collect();
    drop(engine);
    for publisher in publishers {
        publisher.join().unwrap();
    }
    for reader in readers {
        assert_eq!(reader.join().unwrap(), Received::Close(Some(1001)));
    }
    let refused = everyone.try_publish(Publication::message(EVERYONE, frame("x"))).unwrap_err();
    assert!(refused.is_closed());
    assert_eq!((everyone.len(), everyone.group_count()), (0, 0));
}

#[test]
fn connections_that_connect_and_close_leave_nothing() {
    let mut rig = Rig::new(2);
    for round in 0..30 {
        let mut clients = rig.connect_many(4);
        for client in &clients {
            at_once(rig.everyone.join(client.id(), "room")).unwrap();
            at_once(rig.everyone.join(client.id(), &format!("room {round}"))).unwrap();
        }
        publish(&rig, Address::group("room"), "hello");
        rig.settle();
        let gone = clients[0].id();
        assert!(clients.iter_mut().all(|client| client.peer.receive_data() == ["hello"]));
        drop(clients);
        // The id of a closed connection reaches no other one, although its slot may be in use again.
        rig.settle();
        let mut fresh = rig.connect_many(4);
        publish(&rig, Address::Connection(gone), "to nobody");
        at_once(rig.everyone.join(gone, "ghosts")).unwrap();
        at_once(
            rig.everyone
                .publish(Publication::close(Address::Connection(gone), CloseCode::NORMAL, "").unwrap()),
        )
        .unwrap();
        rig.settle();
        assert!(fresh.iter_mut().all(|client| client.peer.receive().is_empty()));
        drop(fresh);
        rig.settle();
        assert_eq!(
            (rig.everyone.len(), rig.everyone.group_count(), rig.engine.connection_count()),
            (0, 0, 0)
        );
    }
}

// ---- Heartbeats -------------------------------------------------------------------------------------------------

#[test]
fn only_the_right_pong_counts() {
    for right in [true, false] {
        let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, strict());
        let mut client = rig.connect();
        let nonce = loop {
            rig.pass(Duration::from_millis(500));
            if let Some(Received::Ping(nonce)) = client.peer.receive().pop() {
                break nonce;
            }
        };
        client.peer.send_frame(0x8A, b"");
        client.peer.send_frame(0x8A, &[0; 8]);
        if right {
            client.peer.send_frame(0x8A, &nonce);
        }
        rig.settle();
        let rtt = rig.metrics_of(client.id()).unwrap().rtt;
        assert_eq!(rtt.last.is_some(), right);
        rig.pass(Duration::from_millis(10_500));
        assert_eq!(client.record().ends, if right { vec![] } else { vec![CloseReason::PongTimeout] });
    }
}

#[test]
fn first_pings_are_spread_over_the_interval() {
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, strict());
    let mut clients = rig.connect_many(100);
    let mut pings = Vec::new();
    for _ in 0..20 {
        rig.pass(Duration::from_secs(1));
        let mut count = 0_usize;
        for client in &mut clients {
            for received in client.peer.receive() {
                if let Received::Ping(nonce) = received {
                    client.peer.send_frame(0x8A, &nonce);
                    count += 1;
                }
            }
        }
        pings.push(count);
    }
    // 100 connections over 20 s: some 5 in each second, each once.
    assert!(pings.iter().all(|count| (2..=9).contains(count)), "{pings:?}");
    assert_eq!(pings.iter().sum::<usize>(), 100);
}
