//! The end of an engine: which connections are closed when, with how much time, and how they are counted.
//!
//! One shard or two, driven with a clock of the test's own. Messages that still arrive are in `ends.rs`,
//! threads that do not end are in `threads.rs`.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::net::Shutdown as Half;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shardcast_engine::{
    Address, BridgeProgress, CloseCode, CloseReason, ConnectionConfig, EngineConfig, Payload, Policy,
    Publication, Shutdown, ShutdownReport, Socket,
};
use testkit::client::new_connection;
use testkit::handler::{ClosesAtDrop, SlowToPart};
use testkit::time::ms;
use testkit::{Client, Received, Rig, Task, at_once, lock};

const fn seconds(seconds: u64) -> Duration {
    ms(1000 * seconds)
}

/// No pings, so that only the shutdown ends connections.
fn quiet() -> ConnectionConfig {
    ConnectionConfig { heartbeat_interval: None, stall_timeout: None, ..Default::default() }
}

/// Closes all connections at once.
fn within(within: Duration) -> Shutdown {
    Shutdown { close_window: Duration::ZERO, ..Shutdown::within(within) }
}

fn shut_down(rig: &mut Rig, shutdown: Shutdown) -> Task<'static, ShutdownReport> {
    let engine = rig.engine.clone();
    let mut end = Task::new(async move { engine.shutdown(shutdown).await.unwrap() });
    assert!(end.poll().is_none());
    rig.now = rig.now.max(Instant::now()); // a shutdown's time counts from the real clock
    rig.settle();
    end
}

/// The report when its time is over: flushed, cut off, left over.
fn report(rig: &mut Rig, mut end: Task<'static, ShutdownReport>) -> [u64; 3] {
    rig.settle();
    rig.shards.clear();
    let report = end.poll().expect("all shards have ended");
    [report.flushed, report.cut_off, report.left_over]
}

fn publish(rig: &Rig, to: impl Into<Address>, text: &str) {
    rig.everyone.try_publish(Publication::message(to, Payload::text(text))).unwrap();
}

const GOES: [Received; 2] = [Received::Close(Some(1001)), Received::End];

// ---- Draining ---------------------------------------------------------------------------------------------------

#[test]
fn a_busy_handler_is_waited_for_until_half_of_the_time_is_over() {
    let mut rig = Rig::with(EngineConfig { shards: Some(2), ..Default::default() }, quiet());
    let (mut busy, mut idle) = (rig.connect(), rig.connect());
    busy.peer.text("wait");
    rig.settle();
    let end = shut_down(&mut rig, within(seconds(60)));
    rig.pass(seconds(29));
    assert_eq!((busy.peer.receive(), idle.peer.receive()), (vec![], vec![]), "it may still publish");
    rig.pass(seconds(2));
    assert_eq!((&busy.peer.receive()[..], &idle.peer.receive()[..]), (&GOES[..], &GOES[..]));
    rig.pass(seconds(30));
    assert_eq!(report(&mut rig, end), [2, 0, 1], "one handler never finished");
    assert_eq!((busy.record().ends.len(), idle.record().ends.len()), (0, 1));
}

#[test]
fn a_draining_engine_handles_no_message_and_admits_no_connection() {
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, quiet());
    let (mut busy, mut other) = (rig.connect(), rig.connect());
    busy.peer.text("wait");
    rig.settle();
    let (new_connection, mut late) = new_connection(&rig.engine, &rig.config, 4096); // its handshake is complete
    let _end = shut_down(&mut rig, within(seconds(60)));
    busy.peer.text("too late");
    other.peer.text("too late");
    at_once(rig.everyone.adopt(new_connection)).unwrap();
    rig.settle();
    assert_eq!(late.peer.receive(), GOES, "it was refused");
    assert_eq!((late.record().id, rig.everyone.len()), (None, 2));
    publish(&rig, Address::Everyone, "still accepted");
    busy.release();
    rig.settle();
    assert_eq!(other.record().messages, [""; 0]);
    assert_eq!(busy.record().messages, ["wait"]);
    for client in [&mut busy, &mut other] {
        assert_eq!(client.peer.receive()[0], Received::Data("still accepted".into()));
    }
}

#[test]
fn a_handler_that_closes_slowly_delays_no_other() {
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, quiet());
    let waker = Arc::new(Mutex::new(None));
    let handed = waker.clone();
    let mut parting = rig.connect_handler(Box::new(|_| Box::new(SlowToPart(handed))));
    parting.close(1000);
    let mut other = rig.connect();
    assert!(lock(&waker).is_some(), "it is closing");
    let end = shut_down(&mut rig, within(seconds(60)));
    assert_eq!(other.peer.receive(), GOES, "at once");
    rig.pass(seconds(61));
    drop(other);
    let [_, _, left_over] = report(&mut rig, end);
    assert_eq!(left_over, 1);
}

#[test]
fn messages_before_an_engines_close_are_written_however_much_precedes_them() {
    for sent_to_many in [false, true] {
        let engine = EngineConfig { shards: Some(1), mailbox_capacity: 1 << 14, ..Default::default() };
        let mut rig = Rig::with(engine, quiet());
        let mut client = rig.connect();
        for _ in 0..10_000 {
            at_once(rig.everyone.connection_metrics(client.id(), |_| ())).unwrap();
        }
        publish(&rig, Address::Connection(client.id()), "one");
        if sent_to_many {
            publish(&rig, Address::Everyone, "two");
        }
        let _end = shut_down(&mut rig, within(seconds(60)));
        let texts = if sent_to_many { &["one", "two"][..] } else { &["one"] };
        let mut expected: Vec<_> = texts.iter().map(|text| Received::Data((*text).into())).collect();
        expected.extend(GOES);
        assert_eq!(client.peer.receive(), expected);
    }
}

#[cfg(feature = "audit")]
#[test]
fn a_shard_without_connections_runs_until_the_engine_is_closed() {
    let mut rig = Rig::with(EngineConfig { shards: Some(2), ..Default::default() }, quiet());
    let mut busy = rig.connect();
    busy.peer.text("wait");
    rig.settle();
    let _end = shut_down(&mut rig, within(seconds(60)));
    let is_over = |rig: &Rig| rig.shards.iter().map(shardcast_engine::Shard::is_over).collect::<Vec<_>>();
    assert_eq!(is_over(&rig), [false, false], "the other one drains");
    busy.release();
    rig.settle();
    assert_eq!(is_over(&rig), [false, true], "the peer has not ended its side");
    drop(busy);
    rig.settle();
    assert_eq!(is_over(&rig), [true, true]);
}

#[test]
fn a_handlers_close_precedes_that_of_the_engine() {
    let policy = Policy::DropMessage { timeout: ms(20) };
    let config = ConnectionConfig { outbox_frames: 1, policy, ..quiet() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, config);
    let mut peer = rig.connect_handler(Box::new(|_| Box::new(ClosesAtDrop)));
    for _ in 0..2 {
        publish(&rig, Address::Everyone, &"x".repeat(100_000));
        rig.settle();
    }
    // In one turn: the frame expires, the handler is notified and closes, the engine waits for no handler any more.
    rig.now += ms(50);
    let _end = shut_down(&mut rig, within(seconds(60)));
    let mut received = Vec::new();
    while received.last() != Some(&Received::End) {
        received.extend(peer.receive());
        rig.settle();
    }
    assert_eq!(received[1..], [Received::Close(Some(4000)), Received::End]);
}

// ---- Closing ----------------------------------------------------------------------------------------------------

#[test]
fn connections_are_closed_at_even_distances_over_at_most_half_of_the_time() {
    for (time, spread) in [(seconds(60), seconds(20)), (seconds(40), seconds(30))] {
        let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, quiet());
        let mut clients = rig.connect_many(20);
        let _end = shut_down(&mut rig, Shutdown { close_window: spread, ..Shutdown::within(time) });
        let mut closed = 0;
        for second in 1..=20 {
            rig.pass(seconds(1));
            let hears = |client: &mut Client| client.peer.receive().first() == GOES.first();
            closed += clients.iter_mut().map(hears).filter(|hears| *hears).count();
            clients.retain(|client| client.record().ends.is_empty());
            assert!(closed.abs_diff(second) <= 3, "{closed} of 20 after {second} of 20 s, within {time:?}");
        }
        rig.pass(seconds(1));
        assert_eq!((clients.len(), rig.everyone.len()), (0, 0), "within {time:?}");
    }
}

#[test]
fn a_client_that_does_not_end_its_side_is_dropped_after_the_close_timeout() {
    let config = ConnectionConfig { close_timeout: seconds(5), ..quiet() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, config);
    let mut client = rig.connect();
    let end = shut_down(&mut rig, within(seconds(60)));
    assert_eq!(client.peer.receive(), GOES);
    rig.pass(seconds(4));
    assert_eq!(rig.engine.connection_count(), 1, "it may still end its side");
    rig.pass(seconds(2));
    assert_eq!(rig.engine.connection_count(), 0, "of 60 s");
    assert_eq!(report(&mut rig, end), [1, 0, 0]);
}

#[test]
fn a_client_that_has_ended_its_side_is_dropped_as_soon_as_all_is_written() {
    for is_first in [false, true] {
        let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, quiet());
        let mut client = rig.connect();
        client.peer.text("wait");
        rig.settle();
        if is_first {
            client.peer.stream.shutdown(Half::Write).unwrap();
            rig.settle();
        }
        at_once(
            rig.everyone.publish(Publication::close(Address::Everyone, CloseCode(4000), "enough").unwrap()),
        )
        .unwrap();
        client.release();
        rig.settle();
        assert_eq!(client.peer.receive(), [Received::Close(Some(4000)), Received::End]);
        if !is_first {
            assert_eq!(rig.engine.connection_count(), 1);
            client.peer.stream.shutdown(Half::Write).unwrap();
            rig.settle();
        }
        assert_eq!(rig.engine.connection_count(), 0, "first: {is_first}");
    }
}

/// Lets the client take `bytes` each second, until it has received the end or `seconds_max` seconds have passed.
fn take_slowly(rig: &mut Rig, client: &mut Client, bytes: usize, seconds_max: usize) -> Vec<Received> {
    let mut received = Vec::new();
    for _ in 0..seconds_max {
        rig.pass(seconds(1));
        let mut left = bytes;
        while left > 0 {
            received.extend(client.peer.receive_some(left.min(4000)));
            left = left.saturating_sub(4000);
            rig.settle();
        }
        if matches!(received.last(), Some(Received::Close(_))) {
            break;
        }
    }
    received
}

#[test]
fn a_slow_client_has_the_time_of_the_shutdown_to_take_its_backlog() {
    // Half a megabyte at 20 KB per second, with a close timeout of two seconds.
    let config = ConnectionConfig { close_timeout: seconds(2), ..quiet() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, config);
    let mut client = rig.connect();
    for _ in 0..10 {
        publish(&rig, Address::Everyone, &"x".repeat(50_000));
    }
    let end = shut_down(&mut rig, within(seconds(60)));
    let received = take_slowly(&mut rig, &mut client, 20_000, 50);
    assert_eq!(received.len(), 11, "all, and the Close");
    assert_eq!(received[10], Received::Close(Some(1001)));
    rig.pass(seconds(5));
    assert_eq!(report(&mut rig, end), [1, 0, 0]);
}

#[test]
fn a_client_that_takes_the_last_frame_at_the_last_moment_has_everything() {
    let config = ConnectionConfig { close_timeout: seconds(5), ..quiet() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, config);
    let mut client = rig.connect();
    publish(&rig, Address::Everyone, &"x".repeat(100_000));
    let end = shut_down(&mut rig, within(seconds(20)));
    // A partly written frame is not discarded in favour of the Close frame.
    rig.pass(seconds(17));
    let mut received = Vec::new();
    while received.last() != Some(&Received::End) {
        received.extend(client.peer.receive());
        rig.settle();
    }
    assert_eq!((received.len(), &received[1..]), (3, &GOES[..]));
    rig.pass(seconds(4));
    assert_eq!(report(&mut rig, end), [1, 0, 0]);
}

#[test]
fn a_client_that_lacks_something_is_counted_as_cut_off() {
    let config = ConnectionConfig { close_timeout: seconds(5), ..quiet() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, config);
    // One receives everything, one does not read what the kernel has for it, one receives less than half
    // before its backlog is discarded, and its Close frame, one does not read at all.
    let mut clients = rig.connect_many(4);
    publish(&rig, Address::Connection(clients[1].id()), "unread");
    for client in &clients[2..] {
        for _ in 0..10 {
            publish(&rig, Address::Connection(client.id()), &"x".repeat(50_000));
        }
    }
    let end = shut_down(&mut rig, within(seconds(20)));
    assert_eq!(clients[0].peer.receive(), GOES);
    let received = take_slowly(&mut rig, &mut clients[2], 12_000, 19);
    assert!((2..8).contains(&received.len()), "a part of it: {}", received.len());
    assert_eq!(received.last(), Some(&Received::Close(Some(1001))));
    assert!(matches!(clients[2].peer.receive()[..], [] | [Received::End]));
    rig.pass(seconds(10));
    assert_eq!(report(&mut rig, end), [1, 3, 0]);
}

#[test]
fn only_clients_that_have_everything_at_the_deadline_are_counted_as_flushed() {
    // Less time than for a closing handshake, which no client completes. Or the shard ends in the middle of it.
    for passes in [seconds(4), Duration::ZERO] {
        let config = ConnectionConfig { close_timeout: seconds(60), ..quiet() };
        let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, config);
        let mut clients = rig.connect_many(3);
        publish(&rig, Address::Connection(clients[1].id()), "unread");
        publish(&rig, Address::Connection(clients[2].id()), &"x".repeat(50_000));
        let end = shut_down(&mut rig, within(seconds(3)));
        assert_eq!(clients[0].peer.receive(), GOES);
        rig.pass(passes);
        assert_eq!(report(&mut rig, end), [1, 2, 0]);
    }
}

#[test]
fn a_failed_connection_with_a_backlog_is_counted_as_cut_off() {
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, quiet());
    let mut busy = rig.connect(); // keeps the engine draining
    busy.peer.text("wait");
    let failing = rig.connect();
    publish(&rig, Address::Connection(failing.id()), &"x".repeat(50_000));
    rig.settle(); // the kernel is full
    let end = shut_down(&mut rig, within(seconds(60)));
    drop(failing);
    rig.settle();
    busy.release();
    rig.settle();
    assert_eq!(busy.peer.receive(), GOES);
    drop(busy);
    rig.settle();
    let [flushed, cut_off, _] = report(&mut rig, end);
    assert_eq!((flushed, cut_off), (1, 1));
}

#[test]
fn a_connection_whose_close_frame_was_not_written_is_counted_as_cut_off() {
    let mut rig = Rig::one(quiet());
    let mut client = rig.connect();
    let engine = rig.engine.clone();
    let mut end = Task::new(async move { engine.shutdown(within(ms(0))).await.unwrap() });
    assert!(end.poll().is_none());
    rig.turn();
    rig.shards.clear();
    let report = end.poll().unwrap();
    assert_eq!(client.peer.receive(), [Received::End], "no Close");
    assert_eq!((report.flushed, report.cut_off), (0, 1), "{report:?}");
}

#[test]
fn a_client_that_resets_with_unread_bytes_is_counted_as_cut_off() {
    let mut rig = Rig::one(quiet());
    let mut busy = rig.connect();
    busy.peer.text("wait");
    let failing = rig.connect();
    publish(&rig, Address::Connection(failing.id()), "unread");
    rig.settle();
    let end = shut_down(&mut rig, within(seconds(60)));
    let record = failing.record.clone();
    drop(failing);
    rig.settle();
    assert!(matches!(lock(&record).ends[..], [CloseReason::Transport(_)]));
    busy.release();
    rig.settle();
    assert_eq!(busy.peer.receive(), GOES);
    drop(busy);
    assert_eq!(report(&mut rig, end), [1, 1, 0]);
}

#[test]
fn on_a_bridge_only_a_client_that_ends_the_stream_has_everything() {
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..Default::default() }, quiet());
    let mut clients: Vec<_> = (0..3)
        .map(|_| {
            let (mut new_connection, mut client) = new_connection(&rig.engine, &rig.config, 4096);
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            let progress = BridgeProgress::default();
            progress.passed_on(1 << 30); // whatever is written is passed on at once
            new_connection.socket = Socket::bridge(ours, progress);
            client.peer = testkit::RawClient::new(theirs);
            at_once(rig.everyone.adopt(new_connection)).unwrap();
            client
        })
        .collect();
    rig.settle();
    // The last one ends its side before everything that was sent to it is written.
    let mut last = clients.pop().unwrap();
    publish(&rig, Address::Connection(last.id()), &"x".repeat(1 << 20));
    rig.settle();
    last.peer.stream.shutdown(Half::Write).unwrap();
    rig.settle();
    let end = shut_down(&mut rig, within(seconds(60)));
    for client in &mut clients {
        assert_eq!(client.peer.receive(), GOES);
    }
    let mut received = Vec::new();
    while received.last() != Some(&Received::End) {
        received.extend(last.peer.receive());
        rig.settle();
    }
    assert_eq!((received.len(), last.record().ends), (2, vec![CloseReason::Disconnected]));
    clients[0].peer.stream.shutdown(Half::Write).unwrap();
    rig.settle();
    rig.pass(seconds(61));
    assert_eq!(report(&mut rig, end), [2, 1, 0]);
}
