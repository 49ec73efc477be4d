//! Backlogs of slow consumers, and the publishers that wait for them.
//!
//! `publish` under `Block` ends when no member has to be waited for any more. Held memory is bounded for one
//! connection and for all, and the bounds end connections that do not read, not those whose flush is merely
//! due. The feature `audit` shows what waits inside the shard.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use shardcast_engine::{
    Address, CloseReason, ConnectionAudit, ConnectionConfig, EngineConfig, Payload, Policy, Publication,
    PublishError,
};
use testkit::time::ms;
use testkit::{Client, Received, Rig, Sender, Task};

fn bytes(count: usize) -> Payload {
    Payload::text(&"x".repeat(count))
}

fn outbox_of(outbox_bytes: usize) -> ConnectionConfig {
    ConnectionConfig { outbox_bytes, ..ConnectionConfig::default() }
}

/// Looks at the only connection of the first shard.
fn look(rig: &Rig) -> ConnectionAudit {
    let audit = rig.shards[0].audit();
    assert_eq!(audit.errors, [""; 0]);
    audit.connections.into_iter().next().expect("a connection")
}

fn publishing(
    sender: impl Into<Sender>,
    to: Address,
    length: usize,
) -> Task<'static, Result<(), PublishError>> {
    Task::new(sender.into().publish(Publication::message(to, bytes(length))))
}

/// Lets the client read until nothing is left for it; returns the number of frames.
fn read_all(rig: &mut Rig, client: &mut Client) -> usize {
    let mut count = 0;
    loop {
        let is_last = look(rig).pending == 0;
        count += client.peer.receive_data().len();
        rig.settle();
        if is_last {
            return count;
        }
    }
}

// ---- When `publish` returns -------------------------------------------------------------------------------------

/// Publishes frames of these sizes, all at once, and compares the publishers that have returned with the
/// frames that wait.
fn no_frame_of_a_returned_publisher_waits(sizes: &[usize], unicast_first: Option<usize>) {
    let mut rig = Rig::one(outbox_of(100_000));
    let mut client = rig.connect();
    let everyone = rig.everyone.clone();
    let mut publishers = Vec::new();
    if let Some(length) = unicast_first {
        publishers.push(publishing(&everyone, Address::Connection(client.id()), length));
    }
    publishers.extend(sizes.iter().map(|length| publishing(&everyone, Address::Everyone, *length)));
    let all = publishers.len();
    for _ in 0..2 {
        publishers.retain_mut(|publisher| publisher.poll().is_none());
        rig.settle();
        publishers.retain_mut(|publisher| publisher.poll().is_none());
        let look = look(&rig);
        assert_eq!(look.waiting, publishers.len() as u64, "frames and publishers that wait: {look:?}");
    }
    assert!(!publishers.is_empty(), "the test must make publishers wait: {sizes:?}");
    assert_eq!(read_all(&mut rig, &mut client), all);
    publishers.retain_mut(|publisher| publisher.poll().is_none());
    assert_eq!(publishers.len(), 0, "the client has taken everything");
    assert_eq!(client.record().ends, []);
}

#[test]
fn a_publish_under_block_that_has_returned_leaves_no_frame_waiting() {
    // Each fits into what the ones before it seem to leave: half, a third, a quarter …
    let ever_smaller: Vec<usize> = (1..=20).map(|part| 50_000 / part - 20).collect();
    no_frame_of_a_returned_publisher_waits(&ever_smaller, None);
    no_frame_of_a_returned_publisher_waits(&[17_000; 12], None);
    let mut ever_larger = ever_smaller;
    ever_larger.reverse();
    no_frame_of_a_returned_publisher_waits(&ever_larger, None);
}

#[test]
fn a_unicast_in_flight_counts_against_the_room_for_a_broadcast() {
    no_frame_of_a_returned_publisher_waits(&[30_000], Some(90_000));
    no_frame_of_a_returned_publisher_waits(&[200_000, 30_000, 10], Some(200_000));
}

#[test]
fn a_publish_to_a_full_outbox_returns_when_the_outbox_has_room() {
    let mut rig = Rig::one(outbox_of(100_000));
    let mut client = rig.connect();
    let everyone = rig.everyone.clone();
    everyone.try_publish(Publication::message(Address::Everyone, bytes(20_000))).unwrap();
    rig.settle(); // the kernel is full
    everyone.try_publish(Publication::message(Address::Connection(client.id()), bytes(80_000))).unwrap();
    let mut publisher = publishing(&everyone, Address::Everyone, 30_000);
    assert!(publisher.poll().is_none(), "80,000 bytes are in flight, 30,000 more will wait");
    rig.settle();
    assert!(publisher.poll().is_none());
    assert_eq!(look(&rig).waiting, 1);
    assert_eq!(read_all(&mut rig, &mut client), 3);
    assert_eq!(publisher.poll(), Some(Ok(())));
}

#[test]
fn a_client_that_reads_is_never_ended_as_a_slow_consumer_while_its_publisher_waits() {
    let equal = [17_000; 40].to_vec();
    let ever_smaller = (1..=40).map(|part| 50_000 / part - 20).collect();
    let large = vec![300_000; 5];
    for sizes in [equal, ever_smaller, large] {
        let mut rig = Rig::one(ConnectionConfig { overflow_bytes: 10_000, ..outbox_of(100_000) });
        let mut client = rig.connect();
        let everyone = rig.everyone.clone();
        let mut received = 0;
        for length in &sizes {
            let mut publisher = publishing(&everyone, Address::Everyone, *length);
            while publisher.poll().is_none() {
                rig.settle();
                received += client.peer.receive_data().len();
            }
        }
        received += read_all(&mut rig, &mut client);
        assert_eq!(client.record().ends, [], "it reads all the time: {sizes:?}");
        assert_eq!(received, sizes.len());
    }
}

#[test]
fn congestion_ends_when_nothing_waits_and_the_outbox_is_nearly_empty() {
    let mut rig = Rig::one(outbox_of(100_000));
    let _client = rig.connect();
    let drops = Sender::new(&rig.everyone, Some(Policy::DropMessage { timeout: ms(10) }));
    drops.try_publish(Publication::message(Address::Everyone, bytes(20_000))).unwrap();
    rig.settle(); // the kernel is full, a little is in the outbox
    drops.try_publish(Publication::message(Address::Everyone, bytes(95_000))).unwrap();
    rig.settle();
    assert_eq!(rig.shards[0].audit().groups[0].congested, 1, "it waits");
    rig.pass(ms(50));
    let look = look(&rig);
    assert_eq!((look.waiting, look.tally.dropped.timeout), (0, 1), "{look:?}");
    assert!(look.queued_bytes <= 25_000, "{look:?}");
    assert_eq!(rig.shards[0].audit().groups[0].congested, 0, "at most a quarter is queued");
    let everyone = rig.everyone.clone();
    assert_eq!(publishing(&everyone, Address::Everyone, 10).poll(), Some(Ok(())), "so no publisher waits");
}

#[test]
fn a_publisher_waits_from_the_first_frame_that_may_not_fit() {
    let mut rig = Rig::one(ConnectionConfig { outbox_frames: 4, ..ConnectionConfig::default() });
    let mut client = rig.connect();
    let everyone = rig.everyone.clone();
    let mut sent = 0;
    while look(&rig).queued == 0 {
        everyone.try_publish(Publication::message(Address::Everyone, bytes(1000))).unwrap();
        rig.settle();
        sent += 1;
    }
    assert_eq!(look(&rig).queued, 1, "a quarter of the outbox");
    // A quarter in the mailbox and a half in the log fill it.
    let mut publishers = vec![publishing(&everyone, Address::Connection(client.id()), 1000)];
    publishers.extend((0..3).map(|_| publishing(&everyone, Address::Everyone, 1000)));
    publishers.retain_mut(|publisher| publisher.poll().is_none());
    assert_eq!(publishers.len(), 1);
    rig.settle();
    publishers.retain_mut(|publisher| publisher.poll().is_none());
    let look = look(&rig);
    assert_eq!((look.queued, look.waiting, publishers.len()), (4, 1, 1), "{look:?}");
    assert_eq!(read_all(&mut rig, &mut client), sent + 4);
    assert_eq!(publishers[0].poll(), Some(Ok(())));
}

#[test]
fn the_smallest_outbox_limits_what_is_published_without_waiting() {
    let narrow = |config| ConnectionConfig { outbox_frames: 4, ..config };
    for small in [narrow(outbox_of(1 << 20)), outbox_of(20_000)] {
        for small_first in [true, false] {
            let mut rig = Rig::one(outbox_of(1 << 20));
            let mut configs = [std::sync::Arc::new(small.clone()), rig.config.clone()];
            configs.rotate_left(usize::from(!small_first));
            let _clients = configs.map(|config| {
                rig.config = config;
                rig.connect()
            });
            let everyone = rig.everyone.clone();
            let mut publishers: Vec<_> =
                (0..12).map(|_| publishing(&everyone, Address::Everyone, 5000)).collect();
            publishers.retain_mut(|publisher| publisher.poll().is_none());
            rig.settle();
            publishers.retain_mut(|publisher| publisher.poll().is_none());
            let waiting: u64 =
                rig.shards[0].audit().connections.iter().map(|connection| connection.waiting).sum();
            assert_eq!(waiting, publishers.len() as u64, "{small:?}, first: {small_first}");
            assert!(waiting > 0, "the test must make a frame wait");
        }
    }
}

#[test]
fn a_unicast_waits_if_what_is_in_flight_may_fill_the_outbox() {
    // Commands in the mailbox, each of which fits by itself; or publications in the log.
    let unicasts = |count| vec![(true, 20_000); count];
    for ahead in [unicasts(7), vec![(false, 90_000)]] {
        let mut rig = Rig::one(outbox_of(100_000));
        let client = rig.connect();
        let (everyone, id) = (rig.everyone.clone(), client.id());
        let mut publishers = Vec::new();
        for (is_unicast, length) in &ahead {
            match is_unicast {
                true => publishers.push(publishing(&everyone, Address::Connection(id), *length)),
                false => {
                    everyone.try_publish(Publication::message(Address::Everyone, bytes(*length))).unwrap()
                }
            }
        }
        publishers.push(publishing(&everyone, Address::Connection(id), 20_000));
        publishers.retain_mut(|publisher| publisher.poll().is_none());
        rig.settle();
        publishers.retain_mut(|publisher| publisher.poll().is_none());
        let look = look(&rig);
        assert!(look.waiting > 0, "the test must make a frame wait");
        assert_eq!(publishers.len() as u64, look.waiting, "{look:?}");
    }
}

#[test]
fn a_publisher_under_block_waits_for_every_congested_member() {
    // Its own policy would let its frames be dropped.
    let policy = Policy::DropMessage { timeout: ms(3_600_000) };
    let mut rig = Rig::one(ConnectionConfig { policy, ..outbox_of(100_000) });
    let (behind, other) = (rig.connect(), rig.connect());
    let everyone = rig.everyone.clone();
    let blocking = Sender::new(&everyone, Some(Policy::Block));
    for (id, group) in [(other.id(), "a"), (behind.id(), "b")] {
        testkit::at_once(everyone.join(id, group)).unwrap();
    }
    blocking.try_publish(Publication::message(Address::Connection(behind.id()), bytes(150_000))).unwrap();
    rig.settle(); // what the kernel has not taken fills its outbox
    // A member counts in a group as soon as its join is in flight.
    testkit::at_once(everyone.join(behind.id(), "c")).unwrap();
    let targets = [Address::Everyone, Address::groups(["a", "b"]), Address::group("b"), Address::group("c")];
    let mut publishers: Vec<_> = targets.map(|to| publishing(&blocking, to, 10)).into();
    publishers.push(publishing(&everyone, Address::Connection(behind.id()), 10));
    let polled: Vec<_> = publishers.iter_mut().map(Task::poll).collect();
    assert_eq!(polled, [None; 5], "no shard has taken a turn");
    rig.settle();
    assert!(publishers.iter_mut().all(|publisher| publisher.poll().is_none()), "it has no room");
    assert_eq!(
        publishing(&everyone, Address::Everyone, 10).poll(),
        Some(Ok(())),
        "by its own policy no publisher waits"
    );
    drop(behind);
    rig.settle();
    assert!(publishers.iter_mut().all(|publisher| publisher.poll() == Some(Ok(()))));
}

#[test]
fn a_congested_connection_counts_in_a_group_as_soon_as_its_join_is_in_flight() {
    let mut rig = Rig::one(outbox_of(100_000));
    let behind = rig.connect();
    let everyone = rig.everyone.clone();
    everyone.try_publish(Publication::message(Address::Connection(behind.id()), bytes(150_000))).unwrap();
    rig.settle();
    testkit::at_once(everyone.join(behind.id(), "a")).unwrap();
    let mut publisher = publishing(&everyone, Address::group("a"), 10);
    assert_eq!(publisher.poll(), None, "no shard has taken a turn");
    rig.settle();
    assert_eq!((publisher.poll(), look(&rig).waiting), (None, 1));
}

#[test]
fn a_publisher_waits_only_for_members_whose_policy_is_block() {
    let mut rig = Rig::one(outbox_of(100_000));
    let blocking = rig.config.clone();
    let policy = Policy::DropMessage { timeout: ms(3_600_000) };
    rig.config = std::sync::Arc::new(ConnectionConfig { policy, ..outbox_of(100_000) });
    let mut dropping = rig.connect();
    rig.config = blocking;
    let mut client = rig.connect();
    let everyone = rig.everyone.clone();
    everyone.try_publish(Publication::message(Address::Connection(dropping.id()), bytes(100_000))).unwrap();
    rig.settle(); // its outbox is full
    // More than surely fits, so the publisher waits until every `Block` member has accepted it.
    let mut publisher = publishing(&everyone, Address::Everyone, 80_000);
    assert!(publisher.poll().is_none());
    rig.settle();
    assert_eq!(publisher.poll(), Some(Ok(())), "the frame waits for one that may drop it");
    let mut received = [0, 0];
    for _ in 0..100 {
        received[0] += dropping.peer.receive_data().len();
        received[1] += client.peer.receive_data().len();
        rig.settle();
    }
    assert_eq!(received, [2, 1]);
}

#[test]
fn refused_and_empty_publications_take_no_room_from_others() {
    let engine =
        EngineConfig { shards: Some(1), log_capacity: 2, mailbox_capacity: 2, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, outbox_of(10_000));
    let mut client = rig.connect();
    let gone = rig.connect().id();
    rig.settle();
    let everyone = rig.everyone.clone();
    let all = [Address::Everyone, Address::Connection(client.id())];
    for to in &all {
        let refused =
            (0..20).filter(|_| everyone.try_publish(Publication::message(to, bytes(1000))).is_err()).count();
        assert_eq!(refused, 18, "there is room for two, {to:?}");
        rig.settle();
    }
    for _ in 0..20 {
        everyone.try_publish(Publication::message(Address::Connection(gone), bytes(1000))).unwrap();
        rig.settle();
    }
    assert_eq!(client.peer.receive_data().len(), 4);
    for to in &all {
        let mut publisher = Task::new(everyone.publish(Publication::message(to, bytes(10))));
        assert_eq!(publisher.poll(), Some(Ok(())), "nothing is in flight, so no publisher waits, {to:?}");
        rig.settle();
    }
}

#[test]
fn a_publisher_of_droppable_messages_waits_for_no_member() {
    let mut rig = Rig::new(2);
    let clients = rig.connect_many(2);
    for _ in 0..3 {
        rig.everyone.try_publish(Publication::message(Address::Everyone, bytes(1 << 20))).unwrap();
    }
    rig.settle(); // far more than half of an outbox waits for each
    for policy in [
        Policy::DropMessage { timeout: ms(1000) },
        Policy::DropConnection { timeout: ms(1000), max_drops: 100 },
        Policy::DropOnHighRtt { max_rtt: ms(1000), rtt_samples: 3 },
    ] {
        let dropping = Sender::new(&rig.everyone, Some(policy));
        for to in [Address::Everyone, Address::Connection(clients[0].id())] {
            // No shard has taken a turn meanwhile.
            let mut publisher = Task::new(dropping.publish(Publication::message(&to, bytes(1 << 20))));
            assert_eq!(publisher.poll(), Some(Ok(())), "{policy:?} to {to:?}");
        }
        rig.settle();
    }
}

// ---- Bounds -----------------------------------------------------------------------------------------------------

#[test]
fn a_frame_of_any_size_follows_a_small_one_that_was_sent_just_before() {
    // Both are sent before the shard takes a turn; alone they fit, one after the other.
    for is_unicast in [false, true] {
        let config = ConnectionConfig { overflow_bytes: 5000, ..outbox_of(1024) };
        let mut rig = Rig::one(config);
        let mut clients = rig.connect_many(11);
        for client in &clients {
            let to = if is_unicast { Address::Connection(client.id()) } else { Address::Everyone };
            for length in [2, 100_000] {
                rig.everyone.try_publish(Publication::message(&to, bytes(length))).unwrap();
            }
            if !is_unicast {
                break;
            }
        }
        for client in &mut clients {
            let mut received = Vec::new();
            while received.len() < 2 && client.record().ends.is_empty() {
                rig.settle();
                received.extend(client.peer.receive_data());
            }
            assert_eq!(client.record().ends, [], "healthy; unicast: {is_unicast}");
            assert_eq!(received.iter().map(String::len).collect::<Vec<_>>(), [2, 100_000]);
        }
    }
}

#[test]
fn a_publication_to_many_healthy_clients_counts_once_against_the_budget() {
    const CLIENTS: usize = 1100;
    testkit::client::ask_for_descriptors(2 * CLIENTS as u64 + 200);
    let engine = EngineConfig { shards: Some(1), backlog_bytes_max: 1 << 20, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, ConnectionConfig::default());
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| rig.connect_at_once()).collect();
    rig.settle();
    rig.everyone.try_publish(Publication::message(Address::Everyone, bytes(2000))).unwrap();
    rig.settle();
    assert_eq!(rig.engine.metrics().ended, 0);
    assert!(clients.iter_mut().all(|client| client.peer.receive_data().len() == 1));
}

#[test]
fn frames_that_are_merely_due_to_be_flushed_end_no_connection() {
    // Coalescing delays the writes, so everything is in memory at the end of the turn.
    let engine = EngineConfig {
        shards: Some(1),
        backlog_bytes_max: 1 << 20,
        coalesce: ms(20),
        ..EngineConfig::default()
    };
    let mut rig = Rig::with(engine, ConnectionConfig::default());
    rig.send_buffer = 1 << 16;
    let mut clients = rig.connect_many(20);
    for client in &clients {
        rig.everyone
            .try_publish(Publication::message(Address::Connection(client.id()), bytes(100_000)))
            .unwrap();
    }
    rig.turn();
    assert!(rig.engine.metrics().retained_bytes > 1 << 20, "the test must exceed the budget");
    // While they read, no socket refuses a write.
    let mut received = 0;
    rig.now += ms(20);
    for _ in 0..200 {
        rig.turn();
        received += clients.iter_mut().map(|client| client.peer.receive_data().len()).sum::<usize>();
        rig.now += ms(20);
    }
    assert_eq!((received, rig.engine.metrics().ended_slow), (20, 0));
}

/// One shard that may keep 1 MiB for clients that read nothing.
fn within_a_mebibyte(clients: usize) -> (Rig, Vec<Client>) {
    let engine = EngineConfig { shards: Some(1), backlog_bytes_max: 1 << 20, ..EngineConfig::default() };
    let config = ConnectionConfig { stall_timeout: None, ..outbox_of(16 << 20) };
    let mut rig = Rig::with(engine, config);
    let clients = rig.connect_many(clients);
    (rig, clients)
}

#[test]
fn the_budget_holds_for_sockets_that_are_stalled_for_long() {
    let (mut rig, clients) = within_a_mebibyte(10);
    for round in 0..60 {
        for client in &clients {
            rig.everyone
                .try_publish(Publication::message(Address::Connection(client.id()), bytes(20_000)))
                .unwrap();
        }
        rig.settle();
        let kept = rig.engine.metrics().retained_bytes;
        assert!(kept <= (1 << 20) + (1 << 20) / 64, "{kept} bytes are kept in round {round}");
    }
    let ended = clients.iter().filter(|client| client.record().ends == [CloseReason::BacklogLimit]).count();
    assert_eq!((ended as u64, rig.engine.metrics().ended), (10, 10), "none of them reads");
}

#[test]
fn above_the_budget_no_more_connections_are_ended_than_free_the_excess() {
    // Each has a partly written frame, so ending one does not free all that it holds; in the second case,
    // what is left is less than what another one holds.
    for sizes in [
        [&[900_000][..], &[500_000], &[400_000], &[20_000]],
        [&[400_000, 50_000], &[440_000], &[300_000], &[]],
    ] {
        let (mut rig, mut clients) = within_a_mebibyte(4);
        for (client, lengths) in clients.iter().zip(sizes) {
            for length in lengths {
                rig.everyone
                    .try_publish(Publication::message(Address::Connection(client.id()), bytes(*length)))
                    .unwrap();
            }
        }
        rig.settle();
        let ends: Vec<_> = clients.iter().map(|client| client.record().ends).collect();
        assert_eq!(ends, [vec![CloseReason::BacklogLimit], vec![], vec![], vec![]], "{sizes:?}");
        assert!(rig.engine.metrics().retained_bytes <= 1 << 20);
        assert_eq!(clients[0].peer.receive(), [Received::End], "its frame could not be finished");
        assert_eq!(rig.shards[0].audit().errors, [""; 0]);
    }
}

#[test]
fn a_frame_counts_as_long_as_a_part_of_it_has_not_been_taken() {
    let (mut rig, mut clients) = within_a_mebibyte(2);
    rig.everyone
        .try_publish(Publication::message(Address::Connection(clients[0].id()), bytes(600_000)))
        .unwrap();
    for _ in 0..500 {
        rig.settle();
        let _ = clients[0].peer.receive_some(1000);
    }
    rig.everyone
        .try_publish(Publication::message(Address::Connection(clients[1].id()), bytes(450_000)))
        .unwrap();
    rig.settle();
    let ends: Vec<_> = clients.iter().map(|client| client.record().ends).collect();
    assert_eq!(
        ends,
        [vec![CloseReason::BacklogLimit], vec![]],
        "it holds the most memory, although less is left to write"
    );
    assert!(rig.engine.metrics().retained_bytes <= 1 << 20);
}

#[test]
fn a_frame_that_many_keep_is_freed_by_ending_all_of_them() {
    let (mut rig, mut clients) = within_a_mebibyte(40);
    rig.everyone.try_publish(Publication::message(Address::Everyone, bytes(2 << 20))).unwrap();
    // Several turns, as each check ends as many more as the one before.
    for _ in 0..20 {
        rig.turn();
    }
    assert_eq!((rig.engine.metrics().retained_bytes, rig.engine.metrics().ended_slow), (0, 40));
    assert!(clients.iter_mut().all(|client| client.peer.receive() == [Received::End]));
}

#[test]
fn messages_of_a_client_that_has_closed_are_discarded_first() {
    let engine = EngineConfig { shards: Some(1), unfinished_bytes_max: 1 << 20, ..EngineConfig::default() };
    let config = ConnectionConfig { max_message_bytes: 1 << 20, ..ConnectionConfig::default() };
    let mut rig = Rig::with(engine, config);
    let mut clients = rig.connect_many(2);
    let say = |rig: &mut Rig, client: &mut Client, bytes: &[u8]| {
        let mut said = 0;
        while said < bytes.len() {
            said += client.peer.send_some(&bytes[said..]);
            rig.settle();
        }
    };
    // It has sent a long message while its handler was busy, and then closed.
    say(&mut rig, &mut clients[0], &testkit::frames::client_frame(0x81, b"wait"));
    let close = testkit::frames::client_frame(0x88, &1000u16.to_be_bytes());
    let said = [testkit::frames::client_frame(0x82, &vec![b'x'; 800_000]), close].concat();
    say(&mut rig, &mut clients[0], &said);
    assert!(rig.engine.metrics().unfinished_bytes > 800_000, "the test must hold messages");
    say(&mut rig, &mut clients[1], &testkit::frames::client_frame(0x01, &vec![b'x'; 500_000]));
    assert_eq!(clients[1].record().ends, [], "there is room without what the other has left");
    assert!(rig.engine.metrics().unfinished_bytes <= 1 << 20);
    clients[0].release();
    rig.settle();
    assert_eq!(clients[0].record().messages, ["wait"]);
    assert_eq!(rig.shards[0].audit().errors, [""; 0]);
}

#[test]
fn above_the_budget_for_unfinished_messages_the_largest_is_ended() {
    let engine = EngineConfig { shards: Some(1), unfinished_bytes_max: 1 << 20, ..EngineConfig::default() };
    let config = ConnectionConfig { max_message_bytes: 1 << 20, ..ConnectionConfig::default() };
    let mut rig = Rig::with(engine, config);
    let mut clients = rig.connect_many(3);
    // Each sends a fragment, the last of which exceeds the limit for all.
    for (client, length) in clients.iter_mut().zip([100_000, 600_000, 450_000]) {
        let frame = testkit::frames::client_frame(0x01, &vec![b'x'; length]);
        let mut said = 0;
        while said < frame.len() {
            said += client.peer.send_some(&frame[said..]);
            rig.settle();
        }
    }
    let ends: Vec<_> = clients.iter().map(|client| client.record().ends).collect();
    assert_eq!(ends, [vec![], vec![CloseReason::UnfinishedLimit], vec![]]);
    let received = clients[1].peer.receive_and_answer();
    assert_eq!(received, [Received::Close(Some(1013)), Received::End]);
    assert_eq!(clients[1].peer.close_text, "overloaded by unfinished messages");
    assert!(rig.engine.metrics().unfinished_bytes <= 1 << 20);
    // The others complete their messages.
    for client in [0, 2] {
        clients[client].peer.send_frame(0x80, b"the end");
    }
    rig.settle();
    assert!([0, 2].iter().all(|client| clients[*client].record().messages.len() == 1));
    assert_eq!(rig.engine.metrics().unfinished_bytes, 0);
}

/// Clients that read nothing, on several shards, with a budget of 1 MiB and no timeout that ends them.
fn on_a_budget(shards: usize, clients: usize) -> (Rig, Vec<Client>) {
    let engine = EngineConfig { shards: Some(shards), backlog_bytes_max: 1 << 20, ..EngineConfig::default() };
    let config = ConnectionConfig {
        heartbeat_interval: None,
        stall_timeout: None,
        close_timeout: ms(60_000),
        ..ConnectionConfig::default()
    };
    let mut rig = Rig::with(engine, config);
    let clients = rig.connect_many(clients);
    (rig, clients)
}

/// Sends 10,000 bytes to one client, several times.
fn send_to(rig: &mut Rig, client: &Client, times: usize) {
    let frame = bytes(10_000 - 4);
    for _ in 0..times {
        rig.everyone
            .try_publish(Publication::message(Address::Connection(client.id()), frame.clone()))
            .unwrap();
    }
    rig.settle();
}

fn ends(clients: &[Client]) -> Vec<usize> {
    clients.iter().map(|client| client.record().ends.len()).collect()
}

#[test]
fn frames_shared_by_slow_clients_count_once_against_the_budget() {
    let (mut rig, clients) = on_a_budget(1, 30);
    for _ in 0..10 {
        rig.everyone.try_publish(Publication::message(Address::Everyone, bytes(50_000))).unwrap();
        rig.settle();
    }
    let metrics = rig.engine.metrics();
    assert!(metrics.pending_bytes > 10 << 20 && metrics.retained_bytes < 1 << 20, "{metrics:?}");
    assert_eq!(ends(&clients), [0; 30]);
}

#[test]
fn above_the_budget_closing_connections_are_dropped_before_open_ones_are_ended() {
    let (mut rig, clients) = on_a_budget(1, 2);
    send_to(&mut rig, &clients[0], 70);
    send_to(&mut rig, &clients[1], 20);
    let code = shardcast_engine::CloseCode(4000);
    testkit::at_once(
        rig.everyone.publish(Publication::close(Address::Connection(clients[0].id()), code, "bye").unwrap()),
    )
    .unwrap();
    rig.settle();
    assert!(rig.engine.metrics().retained_bytes > 850_000, "a minute is left to take it");
    send_to(&mut rig, &clients[1], 20);
    assert_eq!(clients[1].record().ends, []);
    assert!((350_000..450_000).contains(&rig.engine.metrics().retained_bytes));
}

#[test]
fn above_the_budget_each_shard_sheds_its_part_of_the_excess() {
    let (mut rig, clients) = on_a_budget(2, 20);
    let frame = bytes(10_000 - 4);
    for _ in 0..6 {
        for client in &clients {
            rig.everyone
                .try_publish(Publication::message(Address::Connection(client.id()), frame.clone()))
                .unwrap();
        }
    }
    // 1,200,000 bytes, of which each shard has one half.
    rig.settle();
    let shed: usize = ends(&clients).iter().sum();
    assert!((3..=4).contains(&shed), "{shed} of 60,000 bytes each, to shed some 151,000");
    assert!((850_000..1 << 20).contains(&rig.engine.metrics().retained_bytes));
}

#[test]
fn above_the_budget_a_connection_that_is_due_to_be_flushed_is_not_ended() {
    // More than are flushed in one turn; all but the first read, and receive what the turn did not write.
    const CLIENTS: usize = 600;
    testkit::client::ask_for_descriptors(2 * CLIENTS as u64 + 200);
    let (mut rig, slow) = on_a_budget(1, 1);
    rig.send_buffer = 1 << 16;
    let mut clients = rig.connect_many(CLIENTS - 1);
    rig.everyone.try_publish(Publication::message(Address::Connection(slow[0].id()), bytes(60_000))).unwrap();
    for (number, client) in clients.iter().enumerate() {
        let length = if number < 512 { 10 } else { 30_000 };
        rig.everyone
            .try_publish(Publication::message(Address::Connection(client.id()), bytes(length)))
            .unwrap();
    }
    rig.turn();
    assert!(rig.engine.metrics().retained_bytes > 1 << 20, "the test must exceed the budget");
    rig.turn();
    let mut received = 0;
    for _ in 0..200 {
        received += clients.iter_mut().map(|client| client.peer.receive_data().len()).sum::<usize>();
        rig.turn();
    }
    assert_eq!((ends(&clients).iter().sum::<usize>(), received), (0, CLIENTS - 1));
}

#[test]
fn messages_that_wait_for_a_busy_handler_count_as_unfinished() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    client.peer.text("wait");
    for _ in 0..10 {
        client.peer.text(&"x".repeat(1000));
    }
    rig.settle();
    let unfinished = rig.engine.metrics().unfinished_bytes;
    assert!((10_000..40_000).contains(&unfinished), "{unfinished}");
    client.release();
    rig.settle();
    assert_eq!((client.record().messages.len(), rig.engine.metrics().unfinished_bytes), (11, 0));
}

#[test]
fn drops_are_counted_beyond_32_bits() {
    let policy = Policy::DropMessage { timeout: Duration::ZERO };
    let mut rig = Rig::one(ConnectionConfig { outbox_frames: 1, policy, ..ConnectionConfig::default() });
    let client = rig.connect();
    let id = client.id();
    rig.everyone.try_publish(Publication::message(Address::Everyone, bytes(100_000))).unwrap();
    rig.settle(); // the outbox is full
    let before = 2 * (u64::from(u32::MAX) - 1); // just below for each cause
    rig.shards[0].pretend_losses(id, before);
    let late = Sender::new(&rig.everyone, Some(Policy::DropMessage { timeout: ms(10) }));
    for everyone in [Sender::from(&rig.everyone), late] {
        for _ in 0..5 {
            everyone.try_publish(Publication::message(Address::Everyone, bytes(10))).unwrap();
            rig.settle();
        }
    }
    rig.pass(ms(100));
    assert_eq!(look(&rig).pending, 1); // and the tally of this connection adds up
    let counted = rig.metrics_of(id).unwrap();
    let all = rig.engine.metrics();
    for (timeout, overflow) in [
        (counted.tally.dropped.timeout, counted.tally.dropped.overflow),
        (all.tally.dropped.timeout, all.tally.dropped.overflow),
    ] {
        assert_eq!((timeout, overflow), (before / 2 + 5, before / 2 + 5));
    }
    assert_eq!(client.record().drops.iter().sum::<u64>(), 10, "the ten are reported to the handler");
    assert_eq!(client.record().ends, []);
}

// ---- Time -------------------------------------------------------------------------------------------------------

#[test]
fn a_client_that_takes_no_byte_for_the_stall_timeout_is_ended_and_its_publisher_continues() {
    let mut rig = Rig::one(ConnectionConfig { heartbeat_interval: None, ..outbox_of(1024) });
    let mut client = rig.connect();
    let everyone = rig.everyone.clone();
    everyone.try_publish(Publication::message(Address::Everyone, bytes(100_000))).unwrap();
    rig.settle(); // the kernel refuses the rest: the time begins
    let mut publisher = publishing(&everyone, Address::Everyone, 10);
    assert!(publisher.poll().is_none());
    rig.pass(ms(9900));
    assert!(publisher.poll().is_none() && client.record().ends.is_empty(), "10 s by default");
    rig.pass(ms(200));
    assert_eq!(publisher.poll(), Some(Ok(())));
    assert_eq!(client.record().ends, [CloseReason::SlowConsumer]);
    // The partly written frame arrives whole, then the Close.
    let mut received = Vec::new();
    while received.last() != Some(&Received::End) {
        received.extend(client.peer.receive_and_answer());
        rig.settle();
    }
    assert_eq!(received[1..], [Received::Close(Some(1013)), Received::End]);
}

#[test]
fn a_client_that_takes_a_little_within_each_stall_timeout_is_not_ended() {
    let mut rig = Rig::one(ConnectionConfig { heartbeat_interval: None, ..outbox_of(1024) });
    let mut client = rig.connect();
    let everyone = rig.everyone.clone();
    everyone.try_publish(Publication::message(Address::Everyone, bytes(200_000))).unwrap();
    rig.settle();
    let mut publisher = publishing(&everyone, Address::Everyone, 10);
    assert!(publisher.poll().is_none());
    let mut received = Vec::new();
    while received.is_empty() {
        rig.pass(ms(8000));
        // As much as a local socket accounts as one piece.
        received.extend(client.peer.receive_some(5000));
        assert_eq!(client.record().ends, []);
    }
    rig.settle();
    assert_eq!(publisher.poll(), Some(Ok(())));
}
