//! Writing by io_uring is writing: the same bytes reach the same clients, and the same is counted.
//!
//! Needs a kernel and a container that permit io_uring: nothing can be shown elsewhere.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::thread;
use std::time::Duration;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use shardcast_engine::{
    Address, CloseCode, CloseReason, ConnectionConfig, EngineConfig, Metrics, Namespace, Payload, Policy,
    Publication, Tally,
};
use testkit::client::new_tcp_connection;
use testkit::{Log, Received, Rig, Stream, at_once};

const CLIENTS: usize = 40;
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

fn publish(everyone: &Namespace, to: Address, text: &str) {
    everyone.try_publish(Publication::message(to, Payload::text(text))).unwrap();
}

/// What each client received, how each connection ended, and the counters.
type Course = (Vec<Vec<String>>, Vec<Vec<CloseReason>>, Metrics);

/// From now on the kernel refuses this thread's submissions to all of its rings.
fn break_io_uring() {
    let rules = [(libc::SYS_io_uring_enter, Vec::new())].into();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let architecture = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

/// Runs the test on a thread of its own, in which it can [break](break_io_uring) the rings; they must fail once.
fn with_rings_that_break<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let run = move || tracing::subscriber::with_default(subscriber, test);
    let result = thread::spawn(run).join().unwrap();
    let text = log.text();
    assert_eq!(text.matches("io_uring failed").count(), 1, "{text}");
    result
}

/// Clients that keep up, one that reads nothing and one that disconnects without a word, in groups and by themselves. In
/// the round `breaks_in` the rings break.
fn course(io_uring: bool, breaks_in: Option<usize>) -> Course {
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
        if breaks_in == Some(round) {
            break_io_uring();
        }
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

/// What can be compared of two courses.
fn counted(metrics: &Metrics) -> (u64, u64, Tally) {
    (metrics.writes, metrics.bytes_written, metrics.tally)
}

#[test]
fn by_io_uring_every_client_receives_the_same_and_the_same_is_counted() {
    let (by_itself, together) = (course(false, None), course(true, None));
    assert_eq!(together.0, by_itself.0, "what the clients received");
    assert_eq!(together.1, by_itself.1, "how their connections ended");
    assert_eq!(counted(&together.2), counted(&by_itself.2));
    assert!(together.2.tally.dropped.total() > 0, "the client that reads nothing was slow");
}

#[test]
fn if_io_uring_fails_on_the_way_every_client_receives_the_same_and_the_same_is_counted() {
    let by_itself = course(false, None);
    for round in [0, 25] {
        let broken = with_rings_that_break(move || course(true, Some(round)));
        assert_eq!(broken.0, by_itself.0, "what the clients received");
        assert_eq!(broken.1, by_itself.1, "how their connections ended");
        assert_eq!(counted(&broken.2), counted(&by_itself.2));
    }
}

#[test]
fn a_client_whose_message_was_in_a_batch_that_failed_sees_the_end_of_its_connection() {
    with_rings_that_break(|| {
        let engine = EngineConfig { shards: Some(1), io_uring: true, ..EngineConfig::default() };
        let mut rig = Rig::with(engine, ConnectionConfig::default());
        let mut clients: Vec<_> = (0..CLIENTS).map(|_| rig.connect()).collect();
        for _ in 0..CLIENTS {
            let (new_connection, client) = new_tcp_connection(&rig.engine, &rig.config);
            at_once(rig.everyone.adopt(new_connection)).unwrap();
            clients.push(client);
        }
        rig.settle();
        break_io_uring();
        // More than the kernel takes, so that no Close frame is written either.
        publish(&rig.everyone, Address::Everyone, &"x".repeat(1 << 20));
        rig.settle();
        let close = Publication::close(Address::Everyone, CloseCode::NORMAL, "enough").unwrap();
        rig.everyone.try_publish(close).unwrap();
        rig.settle();
        rig.pass(2 * rig.config.close_timeout);
        rig.settle();
        assert_eq!(rig.engine.metrics().connections, 0);
        for client in &mut clients {
            let Stream::Plain(stream) = &client.peer.stream else { unreachable!() };
            stream.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
            while client.peer.wait() != Received::End {}
        }
    });
}
