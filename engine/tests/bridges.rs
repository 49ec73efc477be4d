//! What is in a bridge: it is pending and not written, no progress of the client, and not delivered by a shutdown.
//!
//! The test is the bridge's other end: it passes on as many bytes as it says, at the time that it says. A shard takes a
//! turn only if something wakes it.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::Read as _;
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shardcast_engine::{
    Address, BridgeProgress, CloseReason, ConnectionConfig, Payload, Publication, Shutdown, Socket, Tally,
};
use testkit::client::new_connection;
use testkit::frames::{CLOSE, FIN, client_frame};
use testkit::handler::Record;
use testkit::time::ms;
use testkit::{Client, Rig, Task, at_once, lock};

const fn seconds(seconds: u64) -> Duration {
    ms(1000 * seconds)
}

/// Nothing but what a test is about ends connections.
fn quiet() -> ConnectionConfig {
    ConnectionConfig { heartbeat_interval: None, stall_timeout: None, ..ConnectionConfig::default() }
}

/// The far end of a bridge, and the connection at its near end.
struct Bridge {
    stream: UnixStream,
    progress: BridgeProgress,
    record: Arc<Mutex<Record>>,
}

impl Bridge {
    fn open(rig: &mut Rig) -> Self {
        let (mut new_connection, Client { record, .. }) = new_connection(&rig.engine, &rig.config, 4096);
        let (ours, stream) = UnixStream::pair().unwrap();
        socket2::SockRef::from(&ours).set_send_buffer_size(16 << 10).unwrap();
        let progress = BridgeProgress::default();
        new_connection.socket = Socket::bridge(ours, progress.clone());
        at_once(rig.everyone.adopt(new_connection)).unwrap();
        rig.settle();
        Self { stream, progress, record }
    }

    /// The client takes this many bytes, which must be in the bridge or arrive as soon as it has room.
    fn pass_on(&mut self, rig: &mut Rig, bytes: usize) {
        let mut left = bytes;
        while left > 0 {
            let arrived = rustix::io::ioctl_fionread(&self.stream).unwrap();
            assert!(arrived > 0, "{left} of {bytes} bytes are missing");
            let count = left.min(arrived as usize);
            self.progress.passed_on(count);
            self.stream.read_exact(&mut vec![0; count]).unwrap();
            rig.settle();
            left -= count;
        }
    }

    fn send_close(&mut self) {
        std::io::Write::write_all(&mut self.stream, &client_frame(FIN | CLOSE, &1000_u16.to_be_bytes()))
            .unwrap();
    }

    fn ends(&self) -> Vec<CloseReason> {
        lock(&self.record).ends.clone()
    }
}

/// Publishes a message whose frame has so many bytes.
fn publish(rig: &mut Rig, frame_bytes: usize) {
    let header = match frame_bytes {
        0..=127 => 2,
        _ => 4,
    };
    let payload = Payload::text(&"x".repeat(frame_bytes - header));
    rig.everyone.try_publish(Publication::message(Address::Everyone, payload)).unwrap();
    rig.settle();
}

/// Offered, written, discarded, pending, of all connections there have been.
fn outcomes(rig: &mut Rig) -> [u64; 4] {
    let sum = rig.collect_metrics(&Address::Everyone, &[]);
    let outcomes = |tally: Tally| [tally.offered, tally.written, tally.discarded, tally.pending()];
    assert_eq!(outcomes(sum.tally), outcomes(rig.engine.metrics().tally), "the shard counts the same");
    assert_eq!(sum.pending_bytes, rig.engine.metrics().pending_bytes);
    outcomes(sum.tally)
}

#[test]
fn what_is_in_a_bridge_is_pending_and_not_written() {
    let mut rig = Rig::one(quiet()).sleepy();
    let mut bridge = Bridge::open(&mut rig);
    for _ in 0..3 {
        publish(&mut rig, 1000);
    }
    assert_eq!(outcomes(&mut rig), [3, 0, 0, 3]);
    let metrics = rig.engine.metrics();
    assert_eq!((metrics.pending_bytes, metrics.bytes_written), (3000, 0));
    bridge.pass_on(&mut rig, 999);
    assert_eq!(outcomes(&mut rig), [3, 0, 0, 3], "not whole");
    bridge.pass_on(&mut rig, 1);
    assert_eq!(outcomes(&mut rig), [3, 1, 0, 2]);
    bridge.pass_on(&mut rig, 2000);
    assert_eq!(outcomes(&mut rig), [3, 3, 0, 0]);
    let metrics = rig.engine.metrics();
    assert_eq!((metrics.pending_bytes, metrics.bytes_written), (0, 3000));
}

#[test]
fn a_shard_is_woken_when_its_bridge_has_passed_on_what_it_was_given() {
    let mut rig = Rig::one(quiet()).sleepy();
    let mut bridge = Bridge::open(&mut rig);
    publish(&mut rig, 1000);
    publish(&mut rig, 60_000);
    bridge.pass_on(&mut rig, 61_000);
    // Not asked for: the shard has published it by itself.
    assert_eq!(rig.engine.metrics().tally.written, 2);
}

#[test]
fn a_client_behind_a_bridge_is_stalled_if_and_only_if_the_bridge_passes_nothing_on() {
    let config = ConnectionConfig { stall_timeout: Some(seconds(10)), ..quiet() };
    let mut rig = Rig::one(config).sleepy();
    let mut bridge = Bridge::open(&mut rig);
    publish(&mut rig, 60_000);
    assert!(rig.engine.metrics().pending_bytes > 0);
    for _ in 0..20 {
        rig.pass(seconds(7));
        bridge.pass_on(&mut rig, 1);
    }
    assert_eq!(bridge.ends(), []);
    // What is taken out of the socket and not passed on is no progress.
    for _ in 0..3 {
        rig.pass(seconds(4));
        bridge.stream.read_exact(&mut [0; 1]).unwrap();
        rig.settle();
    }
    rig.pass(seconds(1));
    assert_eq!(bridge.ends(), [CloseReason::SlowConsumer]);
}

#[test]
fn a_ping_in_a_bridge_need_not_be_answered_while_what_is_before_it_is_passed_on() {
    let config =
        ConnectionConfig { heartbeat_interval: Some(seconds(10)), pong_timeout: seconds(10), ..quiet() };
    let mut rig = Rig::one(config);
    let (mut slow, stalled) = (Bridge::open(&mut rig), Bridge::open(&mut rig));
    publish(&mut rig, 8000);
    for _ in 0..10 {
        rig.pass(seconds(4));
        slow.pass_on(&mut rig, 1);
    }
    assert_eq!(slow.ends(), []);
    assert_eq!(stalled.ends(), [CloseReason::PongTimeout]);
}

/// A bridge that contains a message, and whose client has closed the connection.
fn closed_by_its_client() -> (Rig, Bridge) {
    let mut rig = Rig::one(quiet()).sleepy();
    let mut bridge = Bridge::open(&mut rig);
    publish(&mut rig, 1000);
    bridge.send_close();
    bridge.stream.shutdown(Half::Write).unwrap();
    rig.settle();
    (rig, bridge)
}

#[test]
fn a_client_that_has_closed_is_waited_for_until_its_bridge_is_empty() {
    let (mut rig, mut bridge) = closed_by_its_client();
    assert_eq!(rig.engine.metrics().connections, 1, "its last bytes are on their way");
    bridge.pass_on(&mut rig, 1000 + 4); // and the Close frame
    assert_eq!(rig.engine.metrics().connections, 0, "without a timer");
    assert_eq!(outcomes(&mut rig), [1, 1, 0, 0]);
}

#[test]
fn what_is_in_a_bridge_that_breaks_is_discarded() {
    let mut rig = Rig::one(quiet()).sleepy();
    let mut bridge = Bridge::open(&mut rig);
    for _ in 0..3 {
        publish(&mut rig, 1000);
    }
    bridge.pass_on(&mut rig, 1000);
    drop(bridge.stream);
    rig.settle();
    assert_eq!(rig.engine.metrics().connections, 0);
    assert_eq!(outcomes(&mut rig), [3, 1, 2, 0]);
}

#[test]
fn a_bridge_that_breaks_after_the_client_has_closed_is_not_waited_for() {
    let (mut rig, bridge) = closed_by_its_client();
    drop(bridge.stream);
    rig.settle();
    assert_eq!(rig.engine.metrics().connections, 0);
    assert_eq!(outcomes(&mut rig), [1, 0, 1, 0]);
}

#[test]
fn a_shutdown_counts_a_client_as_cut_off_for_what_is_in_its_bridge() {
    let mut rig = Rig::one(quiet());
    let mut bridges = [Bridge::open(&mut rig), Bridge::open(&mut rig), Bridge::open(&mut rig)];
    publish(&mut rig, 1000);
    let engine = rig.engine.clone();
    let shutdown = Shutdown { close_window: Duration::ZERO, ..Shutdown::within(seconds(5)) };
    let mut end = Task::new(async move { engine.shutdown(shutdown).await.unwrap() });
    assert!(end.poll().is_none());
    rig.now = rig.now.max(Instant::now()); // a shutdown's time counts from the real clock
    rig.settle();
    // All have ended the stream. One gets everything, one all but its Close frame, one nothing.
    for bridge in &mut bridges {
        bridge.stream.shutdown(Half::Write).unwrap();
    }
    rig.settle();
    bridges[0].pass_on(&mut rig, 1000 + 4);
    bridges[1].pass_on(&mut rig, 1000);
    rig.pass(seconds(6));
    rig.settle();
    rig.shards.clear();
    let report = end.poll().expect("all shards have ended");
    assert_eq!((report.flushed, report.cut_off), (1, 2));
    let tally = rig.engine.metrics().tally;
    assert_eq!((tally.written, tally.discarded), (2, 1));
}
