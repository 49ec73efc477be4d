//! Directed: each asserts what the promise says, and fails where it is broken.
#![allow(clippy::unwrap_used, unused, reason = "a test")]
mod fixture;
use fixture::{Client, Heard, Peer, Rig, Task, at_once, client_frame, newcomer};
use shardcast_engine::*;
use std::time::Duration;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// T1: a connection whose handler is busy and whose socket fails while the engine drains is counted twice.
#[test]
fn t1_report_counts_each_connection_once() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    client.peer.text("wait");
    rig.settle();
    let engine = rig.engine.clone();
    let mut end = Task::new(async move { engine.shutdown(Shutdown::within(Duration::from_secs(60))).await });
    assert!(end.poll().is_none());
    rig.settle(); // the shard drains: it waits for the handler
    client.peer.stream.shutdown(std::net::Shutdown::Both).unwrap();
    rig.everyone.try_publish(To::Everyone, &[], Frame::text("x")).unwrap(); // still accepted: draining
    rig.settle(); // the write fails: hang_up
    client.release();
    rig.settle();
    rig.pass(Duration::from_secs(1));
    rig.shards.clear();
    let report = end.poll().unwrap().unwrap();
    assert_eq!(report.flushed + report.cut_off, 1, "{report:?}");
}

/// T2: a publication to several groups that waits for room in the log misses who joined meanwhile.
#[test]
fn t2_who_has_joined_before_a_publication_enters_the_order_gets_it() {
    let engine = EngineConfig { shards: Some(2), log_capacity: 4, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, ConnectionConfig::default());
    let mut clients = rig.connect_many(3);
    let (x, y, z) = (clients[0].id(), clients[1].id(), clients[2].id());
    assert_eq!((x.shard(), y.shard(), z.shard()), (0, 1, 0));
    at_once(rig.everyone.join(x, "a")).unwrap();
    at_once(rig.everyone.join(z, "b")).unwrap();
    rig.settle();
    for _ in 0..4 {
        rig.everyone.try_publish(To::Everyone, &[], Frame::text("fill")).unwrap();
    }
    let namespace = rig.everyone.clone();
    let mut p =
        Task::new(async move { namespace.publish(To::Groups(&["a", "b"]), &[], Frame::text("P")).await });
    assert!(p.poll().is_none(), "the log is full");
    at_once(rig.everyone.leave(x, "a")).unwrap(); // the last member goes
    let now = rig.now;
    rig.shards[0].turn(now).unwrap(); // the group ends; the log is still full because of shard 1
    at_once(rig.everyone.join(y, "a")).unwrap(); // and begins anew: from here on y is a member of a
    rig.shards[1].turn(now).unwrap();
    // Somebody is quicker than P when there is room.
    rig.everyone.try_publish(To::Groups(&["a", "b"]), &[], Frame::text("Q")).unwrap();
    assert!(p.poll().is_some());
    rig.settle();
    let mut said = |client: usize| {
        let mut data = clients[client].peer.hear_data();
        data.retain(|text| text != "fill");
        data
    };
    let (of_y, of_z) = (said(1), said(2));
    assert_eq!(of_z, ["Q", "P"]);
    assert_eq!(of_y, ["Q", "P"], "a member of a since before Q, and P comes after Q");
}

/// T3: a connection whose waiting frames have run out of time is still counted as congested.
#[test]
fn t3_congestion_ends_when_nothing_waits_and_the_outbox_is_nearly_empty() {
    let config =
        ConnectionConfig { outbox_bytes: 100_000, policy: Policy::Block, ..ConnectionConfig::default() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
    let client = rig.connect();
    // Fill the kernel, then a little in the outbox.
    let drops = rig.everyone.with_policy(Policy::DropMessage { timeout: ms(10) }).unwrap();
    drops.try_publish(To::Everyone, &[], Frame::text(&"x".repeat(20_000))).unwrap();
    rig.settle();
    drops.try_publish(To::Everyone, &[], Frame::text(&"y".repeat(95_000))).unwrap();
    rig.settle();
    rig.pass(ms(50));
    let audit = rig.shards[0].audit();
    let conn = &audit.conns[0];
    assert_eq!((conn.waiting, conn.dropped), (0, 1), "{conn:?}");
    assert!(conn.queued_bytes <= 25_000, "{conn:?}");
    assert_eq!(audit.groups[0].congested, 0, "nothing waits, at most a quarter is queued");
}

/// T4: publish returns at once although its frame will wait for a peer.
#[test]
fn t4_publish_ends_when_the_frame_is_taken() {
    let config = ConnectionConfig { outbox_bytes: 100_000, ..ConnectionConfig::default() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
    let client = rig.connect();
    let id = client.id();
    rig.everyone.try_publish(To::Everyone, &[], Frame::text(&"x".repeat(20_000))).unwrap();
    rig.settle(); // the kernel is full
    rig.everyone.try_publish(To::Connection(id), &[], Frame::text(&"x".repeat(80_000))).unwrap();
    let namespace = rig.everyone.clone();
    let mut p =
        Task::new(
            async move { namespace.publish(To::Everyone, &[], Frame::text(&"P".repeat(30_000))).await },
        );
    let at_once = p.poll().is_some();
    rig.settle();
    let audit = rig.shards[0].audit();
    assert_eq!(audit.conns[0].waiting, 1, "{:?}", audit.conns[0]);
    assert!(!at_once, "it waits, but who published has been let go");
}

/// T4b: the same by publications alone: half the bytes, then a third, then a quarter …
#[test]
fn t4b_publish_ends_when_the_frame_is_taken_publications_only() {
    let config = ConnectionConfig { outbox_bytes: 100_000, ..ConnectionConfig::default() };
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
    let client = rig.connect();
    let mut returned = 0;
    for on_their_way in 0..20 {
        let bytes = 50_000 / (on_their_way + 1) - 20;
        let namespace = rig.everyone.clone();
        let mut p =
            Task::new(
                async move { namespace.publish(To::Everyone, &[], Frame::text(&"P".repeat(bytes))).await },
            );
        returned += u64::from(p.poll().is_some());
    }
    rig.settle();
    let audit = rig.shards[0].audit();
    assert_eq!(audit.conns[0].waiting, 0, "{returned} of 20 have returned, {:?}", audit.conns[0]);
}

/// T5: who gives up waiting leaves a place taken.
#[test]
fn t5_who_gives_up_waiting_frees_the_place() {
    for given_up in [0, 2] {
        let engine = EngineConfig {
            shards: Some(1),
            log_capacity: 2,
            publishers_waiting_max: 2,
            ..EngineConfig::default()
        };
        let mut rig = Rig::with(engine, ConnectionConfig::default());
        let _client = rig.connect();
        for _ in 0..2 {
            rig.everyone.try_publish(To::Everyone, &[], Frame::text("fill")).unwrap();
        }
        for _ in 0..given_up {
            let namespace = rig.everyone.clone();
            let mut p =
                Task::new(async move { namespace.publish(To::Everyone, &[], Frame::text("given up")).await });
            assert!(p.poll().is_none());
            drop(p);
        }
        let namespace = rig.everyone.clone();
        let mut p = Task::new(async move { namespace.publish(To::Everyone, &[], Frame::text("mine")).await });
        assert_eq!(p.poll(), None, "nobody waits, two may; {given_up} have given up");
    }
}

fn beating() -> ConnectionConfig {
    ConnectionConfig { heartbeat_interval: ms(1000), pong_timeout: ms(300), ..ConnectionConfig::default() }
}

fn ping_of(rig: &mut Rig, client: &mut Client) -> Vec<u8> {
    for _ in 0..100 {
        rig.pass(ms(20));
        for heard in client.peer.hear() {
            if let Heard::Ping(nonce) = heard {
                return nonce;
            }
        }
    }
    panic!("no ping")
}

/// T7: the pong came in time, behind the message that keeps the handler busy.
#[test]
fn t7_a_pong_behind_the_message_that_is_being_handled_counts() {
    for behind in [false, true] {
        let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, beating());
        let mut client = rig.connect();
        let nonce = ping_of(&mut rig, &mut client);
        let (message, pong) = (client_frame(0x82, b"wait"), client_frame(0x8A, &nonce));
        let bytes = if behind { [message, pong] } else { [pong, message] }.concat();
        std::io::Write::write_all(&mut client.peer.stream, &bytes).unwrap();
        rig.settle();
        rig.pass(ms(500));
        client.release();
        rig.settle();
        assert_eq!(client.record().ends, [], "the peer has answered at once; behind the message: {behind}");
    }
}

/// T7b: the same where the pong is still in the kernel.
#[test]
fn t7b_a_pong_in_the_kernel_behind_the_message_that_is_being_handled_counts() {
    let engine = EngineConfig { shards: Some(1), read_buffer_bytes: 1024, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, beating());
    let mut client = rig.connect();
    let nonce = ping_of(&mut rig, &mut client);
    let mut bytes = client_frame(0x82, b"wait");
    bytes.extend(client_frame(0x82, &[b'x'; 2000]));
    bytes.extend(client_frame(0x8A, &nonce));
    std::io::Write::write_all(&mut client.peer.stream, &bytes).unwrap();
    rig.settle();
    rig.pass(ms(500));
    client.release();
    rig.settle();
    assert_eq!(client.record().ends, [], "the peer has answered at once");
}

fn tcp_newcomer(rig: &Rig, record_config: &std::sync::Arc<ConnectionConfig>) -> (Newcomer, Client) {
    let (mut newcomer, mut client) = newcomer(&rig.engine, record_config, 1 << 16);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (ours, _) = listener.accept().unwrap();
    theirs.set_nodelay(true).unwrap();
    newcomer.socket = ours.into();
    use std::os::fd::{FromRawFd, IntoRawFd};
    client.peer = Peer::new(unsafe { std::os::unix::net::UnixStream::from_raw_fd(theirs.into_raw_fd()) });
    (newcomer, client)
}

/// T7c: by TCP.
#[test]
fn t7c_a_pong_in_the_kernel_of_tcp() {
    let engine = EngineConfig { shards: Some(1), read_buffer_bytes: 1024, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, beating());
    let (newcomer, mut client) = tcp_newcomer(&rig, &rig.config.clone());
    at_once(rig.everyone.adopt(newcomer)).unwrap();
    rig.settle();
    let nonce = ping_of(&mut rig, &mut client);
    std::thread::sleep(ms(20)); // acknowledgements
    rig.settle();
    let mut bytes = client_frame(0x82, b"wait");
    bytes.extend(client_frame(0x82, &[b'x'; 2000]));
    bytes.extend(client_frame(0x8A, &nonce));
    std::io::Write::write_all(&mut client.peer.stream, &bytes).unwrap();
    std::thread::sleep(ms(20));
    rig.settle();
    assert_eq!(client.record().messages, ["wait"]);
    rig.pass(ms(500));
    client.release();
    rig.settle();
    assert_eq!(client.record().ends, [], "the peer has answered at once");
}

/// T8: the handler's time is taken for the network's.
#[test]
fn t8_the_handlers_time_is_no_round_trip() {
    for behind in [false, true] {
        let policy = Policy::DropOnHighRtt { max_rtt: ms(100), rtt_samples: 1 };
        let config = ConnectionConfig { policy, pong_timeout: Duration::from_secs(10), ..beating() };
        let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
        let mut client = rig.connect();
        let nonce = ping_of(&mut rig, &mut client);
        let (message, pong) = (client_frame(0x82, b"wait"), client_frame(0x8A, &nonce));
        let bytes = if behind { [message, pong] } else { [pong, message] }.concat();
        std::io::Write::write_all(&mut client.peer.stream, &bytes).unwrap();
        rig.settle();
        rig.pass(ms(500));
        client.release();
        rig.settle();
        assert_eq!(
            client.record().ends,
            [],
            "the peer has answered within 20 ms; behind the message: {behind}"
        );
    }
}

/// T9: the engine's own pings make a peer that answers them a flood.
#[test]
fn t9_answers_to_our_pings_are_no_flood() {
    let config = ConnectionConfig {
        heartbeat_interval: ms(100),
        pong_timeout: ms(300),
        control_frames_per_second: 5,
        ..ConnectionConfig::default()
    };
    assert!(config.validate().is_ok());
    let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
    let mut client = rig.connect();
    for _ in 0..100 {
        rig.pass(ms(20));
        for heard in client.peer.hear() {
            if let Heard::Ping(nonce) = heard {
                let _ = std::io::Write::write_all(&mut client.peer.stream, &client_frame(0x8A, &nonce));
            }
        }
        rig.settle();
    }
    assert_eq!(client.record().ends, []);
}

/// T4c: a peer that reads is ended, though each publisher awaits each publication.
#[test]
fn t4c_no_connection_is_ended_whose_publishers_await() {
    for equal in [true, false] {
        let config =
            ConnectionConfig { outbox_bytes: 100_000, waiting_bytes: 10_000, ..ConnectionConfig::default() };
        let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
        let mut client = rig.connect();
        for on_their_way in 0..8 {
            let bytes = if equal { 17_000 } else { 50_000 / (on_their_way + 1) - 20 };
            let namespace = rig.everyone.clone();
            let mut p = Task::new(async move {
                namespace.publish(To::Everyone, &[], Frame::text(&"P".repeat(bytes))).await
            });
            // One publisher, one after the other.
            for _ in 0..100 {
                if p.poll().is_some() {
                    break;
                }
                assert!(equal, "the early return is what this is about");
                rig.settle();
                client.peer.hear();
            }
        }
        for _ in 0..100 {
            rig.settle();
            client.peer.hear();
        }
        assert_eq!(client.record().ends, [], "it reads all the time, equal sizes: {equal}");
    }
}

/// T10: pings that are held back to be gathered are missed.
#[test]
fn t10_a_ping_that_is_held_back_is_not_yet_waited_for() {
    for coalesce in [ms(0), ms(100)] {
        let engine = EngineConfig { shards: Some(1), coalesce, ..EngineConfig::default() };
        let config = ConnectionConfig {
            heartbeat_interval: ms(1000),
            pong_timeout: ms(50),
            ..ConnectionConfig::default()
        };
        let mut rig = Rig::with(engine, config);
        let mut client = rig.connect();
        for _ in 0..3000 {
            rig.pass(ms(1));
            for heard in client.peer.hear() {
                if let Heard::Ping(nonce) = heard {
                    let _ = std::io::Write::write_all(&mut client.peer.stream, &client_frame(0x8A, &nonce));
                }
            }
            rig.settle();
        }
        assert_eq!(client.record().ends, [], "it answers each ping at once, coalesce {coalesce:?}");
    }
}

fn close_and_half_close(coalesce: Duration) -> Vec<Heard> {
    let engine = EngineConfig { shards: Some(1), coalesce, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, ConnectionConfig::default());
    let mut client = rig.connect();
    rig.everyone.try_publish(To::Everyone, &[], Frame::text("last words")).unwrap();
    client.peer.close(1000);
    client.peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
    rig.settle();
    rig.pass(ms(20));
    let mut heard = client.peer.hear();
    heard.retain(|heard| !matches!(heard, Heard::Ping(_)));
    heard
}

/// T11: a peer that says Close, ends its side and reads on.
#[test]
fn t11_a_peer_that_closes_and_reads_on_is_answered() {
    let want = [Heard::Data("last words".into()), Heard::Close(Some(1000)), Heard::End];
    assert_eq!(close_and_half_close(Duration::ZERO), want);
    assert_eq!(close_and_half_close(ms(3)), want, "with coalesce");
}

/// T15: pongs that nobody asked for fill the wheel.
#[test]
fn t15_the_wheel_holds_a_reminder_or_two_for_each() {
    for heartbeat_interval in [Duration::from_secs(15), Duration::from_secs(5)] {
        let config = ConnectionConfig { heartbeat_interval, ..ConnectionConfig::default() };
        let mut rig = Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config);
        let mut client = rig.connect();
        for _ in 0..4 {
            for _ in 0..190 {
                client.peer.say(0x8A, b"unasked");
                rig.turn();
            }
            rig.pass(ms(1000));
            client.peer.hear();
        }
        assert_eq!(client.record().ends, []);
        let reminders = rig.shards[0].audit().reminders;
        assert!(reminders <= 3, "{reminders} reminders for one connection, heartbeat {heartbeat_interval:?}");
    }
}

struct Farewell(Namespace);
impl Handler for Farewell {
    fn on_message(&mut self, _: Message<'_>, context: &mut Context<'_>) -> Flow {
        for text in ["one", "two", "three"] {
            self.0
                .try_publish(To::Everyone, &["0000000000000000".parse().unwrap()], Frame::text(text))
                .unwrap();
        }
        context.close(CloseReason::Application { code: CloseCode(4000), text: "bye".into() });
        Flow::Ready
    }
}

/// T12: what a handler publishes before it closes, where the shard's mailbox is full.
#[test]
fn t12_what_was_published_before_a_close_arrives_though_the_mailbox_is_full() {
    for full in [false, true] {
        let engine = EngineConfig { shards: Some(1), mailbox_capacity: 1, ..EngineConfig::default() };
        let mut rig = Rig::with(engine, ConnectionConfig::default());
        let everyone = rig.everyone.clone();
        let (newcomer, mut peer) = fixture::newcomer_for(
            &rig.engine,
            &rig.config.clone(),
            1 << 16,
            Box::new(|_| Box::new(Farewell(everyone))),
        );
        at_once(rig.everyone.adopt(newcomer)).unwrap();
        rig.settle();
        peer.text("go");
        if full {
            // Somebody asks for something at the same time.
            let ask = rig.everyone.inspect("0000000000000000".parse().unwrap(), |_| ());
            at_once(ask).unwrap();
        }
        rig.settle();
        let mut heard = peer.hear();
        heard.retain(|heard| !matches!(heard, Heard::Ping(_)));
        let data = |text: &str| Heard::Data(text.into());
        assert_eq!(
            heard,
            [data("one"), data("two"), data("three"), Heard::Close(Some(4000)), Heard::End],
            "full: {full}"
        );
    }
}

struct Lingerer(std::sync::Arc<std::sync::Mutex<Option<std::task::Waker>>>, bool);
impl Handler for Lingerer {
    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Flow {
        Flow::Ready
    }
    fn on_close(&mut self, _: &CloseReason, context: &mut Context<'_>) -> Flow {
        *self.0.lock().unwrap() = Some(context.waker());
        Flow::Pending
    }
}

/// T1b: the same where `on_close` takes its time, as an async `on_disconnect` does.
#[test]
fn t1b_report_counts_each_connection_once_whose_handler_parts_slowly() {
    let mut rig = Rig::new(1);
    let waker = std::sync::Arc::new(std::sync::Mutex::new(None));
    let handed = waker.clone();
    let (newcomer, peer) = fixture::newcomer_for(
        &rig.engine,
        &rig.config.clone(),
        4096,
        Box::new(|_| Box::new(Lingerer(handed, false))),
    );
    at_once(rig.everyone.adopt(newcomer)).unwrap();
    let mut busy = rig.connect(); // keeps the engine draining
    busy.peer.text("wait");
    rig.settle();
    let engine = rig.engine.clone();
    let mut end = Task::new(async move { engine.shutdown(Shutdown::within(Duration::from_secs(60))).await });
    assert!(end.poll().is_none());
    rig.settle();
    peer.stream.shutdown(std::net::Shutdown::Both).unwrap();
    rig.everyone.try_publish(To::Everyone, &[], Frame::text("x")).unwrap();
    rig.settle();
    waker.lock().unwrap().take().unwrap().wake();
    rig.settle();
    busy.release();
    rig.settle();
    rig.pass(Duration::from_secs(70));
    rig.shards.clear();
    let report = end.poll().unwrap().unwrap();
    assert_eq!(report.flushed + report.cut_off, 2, "{report:?}");
}
