//! Who counts as alive, and who is given up.
//!
//! A peer is judged by what it does, and never by what keeps the server busy: its bytes, its
//! whole frames and what it takes are signs of life wherever they are stuck on the way. In
//! turn nobody keeps a connection, or those who publish to it, by sending alone. Time is the
//! tests' own, but for what is about threads.

#![allow(clippy::unwrap_used, reason = "a test")]

mod fixture;

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fixture::{Client, Heard, Peer, Rig, at_once, block_on, client_frame, lock, newcomer_by_tcp};
use shardcast_engine::{
    CloseReason, ConnectionConfig, Context, Engine, EngineConfig, Flow, Frame, Handler, Message, Policy, To,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Pings each `interval`, to be answered within `timeout`.
fn beating(interval: u64, timeout: u64) -> ConnectionConfig {
    ConnectionConfig {
        heartbeat_interval: ms(interval),
        pong_timeout: ms(timeout),
        ..ConnectionConfig::default()
    }
}

fn coalescing(coalesce: Duration, config: ConnectionConfig) -> Rig {
    Rig::with(EngineConfig { shards: Some(1), coalesce, ..EngineConfig::default() }, config)
}

/// Lets time pass until the peer hears a ping; its nonce.
fn await_ping(rig: &mut Rig, peer: &mut Peer) -> Vec<u8> {
    for _ in 0..1000 {
        rig.pass(ms(20));
        for heard in peer.hear() {
            if let Heard::Ping(nonce) = heard {
                return nonce;
            }
        }
    }
    panic!("no ping")
}

/// Lets time pass, in which the client answers every ping at once.
fn pass_answering(rig: &mut Rig, client: &mut Client, time: Duration) {
    let end = rig.now + time;
    while rig.now < end {
        rig.pass(ms(10));
        let _ = client.peer.hear_and_answer();
        rig.settle();
    }
}

// ---- Signs of life ----------------------------------------------------------------------------------------------

#[test]
fn a_pong_counts_wherever_it_is_stuck_behind_a_busy_handler() {
    // Behind the message; behind more than is read at once; behind more than is read ahead of a busy handler.
    for behind in [None, Some(0), Some(2000), Some(40_000)] {
        for is_tcp in [false, true] {
            let engine = EngineConfig { shards: Some(1), read_buffer_bytes: 1024, ..EngineConfig::default() };
            let mut rig = Rig::with(engine, beating(1000, 300));
            let mut client = if is_tcp {
                let (newcomer, client) = newcomer_by_tcp(&rig.engine, &rig.config);
                at_once(rig.everyone.adopt(newcomer)).unwrap();
                rig.settle();
                client
            } else {
                rig.connect()
            };
            let nonce = await_ping(&mut rig, &mut client.peer);
            let (message, pong) = (client_frame(0x82, b"wait"), client_frame(0x8A, &nonce));
            let said = match behind {
                None => [pong, message].concat(),
                Some(length) => [message, client_frame(0x82, &vec![b'x'; length]), pong].concat(),
            };
            client.peer.stream.write_all(&said).unwrap();
            // By TCP it comes when it comes.
            let began = Instant::now();
            while client.record().messages.is_empty() && began.elapsed() < Duration::from_secs(20) {
                rig.settle();
            }
            assert_eq!(client.record().messages, ["wait"]);
            rig.pass(ms(900)); // three times the pong timeout, and before the next ping
            assert_eq!(client.record().ends, [], "it has answered in time; behind {behind:?}, TCP {is_tcp}");
            client.release();
            rig.settle();
            assert_eq!(client.record().ends, [], "behind {behind:?}, TCP {is_tcp}");
        }
    }
}

#[test]
fn a_handlers_time_is_no_round_trip() {
    // Before the message; right behind it; behind more than is read ahead of a busy handler.
    for behind in [None, Some(0), Some(40_000)] {
        let policy = Policy::DropOnHighRtt { max_rtt: ms(100), rtt_samples: 1 };
        let mut rig = Rig::one(ConnectionConfig { policy, ..beating(1000, 10_000) });
        let mut client = rig.connect();
        let nonce = await_ping(&mut rig, &mut client.peer);
        let (message, pong) = (client_frame(0x82, b"wait"), client_frame(0x8A, &nonce));
        let said = match behind {
            None => [pong, message].concat(),
            Some(length) => [message, client_frame(0x82, &vec![b'x'; length]), pong].concat(),
        };
        client.peer.stream.write_all(&said).unwrap();
        rig.settle();
        rig.pass(ms(500));
        client.release();
        rig.settle();
        assert_eq!(client.record().ends, [], "answered within 20 ms; behind {behind:?}");
        let rtt = rig.metrics_of(client.id()).unwrap().rtt.last;
        assert!(rtt.is_none_or(|rtt| rtt <= ms(20)), "{rtt:?}");
    }
}

/// Blocks its shard for so long with each message.
struct Blocker(Duration);

impl Handler for Blocker {
    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Flow {
        std::thread::sleep(self.0);
        Flow::Ready
    }
}

#[test]
fn a_neighbour_that_blocks_the_shard_is_no_round_trip() {
    const MAX: Duration = ms(500);
    let engine = EngineConfig { shards: Some(1), pin: false, ..EngineConfig::default() };
    let engine = Engine::start(engine).unwrap();
    let everyone = engine.namespace();
    let policy = Policy::DropOnHighRtt { max_rtt: MAX, rtt_samples: 2 };
    let config = Arc::new(ConnectionConfig { policy, ..beating(50, 60_000) });
    let (newcomer, client) = fixture::newcomer(&engine, &config, 1 << 16);
    block_on(everyone.adopt(newcomer)).unwrap();
    let blocker = Box::new(|_| Box::new(Blocker(3 * MAX)) as Box<dyn Handler>);
    let (newcomer, mut neighbour) = fixture::newcomer_for(&engine, &config, 1 << 16, blocker);
    block_on(everyone.adopt(newcomer)).unwrap();
    let Client { mut peer, record } = client;
    let idle = std::thread::spawn(move || peer.wait_data_until(|text| text == "enough"));
    for _ in 0..2 {
        neighbour.text("block");
    }
    // Behind two messages that block it, and a ping of each.
    let received = || {
        let (tell, told) = std::sync::mpsc::channel();
        let ask = everyone.survey(To::Everyone, &[], move |part| tell.send(part.received).unwrap());
        block_on(ask).unwrap();
        told.iter().sum::<u64>()
    };
    while received() < 2 {
        std::thread::yield_now();
    }
    // The pongs of what was pinged meanwhile have been read before the next survey but one.
    let _ = (received(), received());
    assert_eq!(lock(&record).ends, [], "it answers at once");
    block_on(everyone.publish(To::Everyone, &[], Frame::text("enough"))).unwrap();
    assert_eq!(idle.join().unwrap(), <[&str; 0]>::default());
}

#[test]
fn a_client_that_talks_and_answers_no_ping_lives() {
    let mut rig = Rig::one(beating(1000, 300));
    let mut client = rig.connect();
    for _ in 0..100 {
        client.peer.text("hello");
        rig.pass(ms(100));
        let _ = client.peer.hear();
    }
    assert_eq!(client.record().ends, []);
    rig.pass(ms(2000));
    assert_eq!(client.record().ends, [CloseReason::PongTimeout], "it has fallen silent");
}

#[test]
fn a_long_message_that_keeps_coming_keeps_its_connection() {
    let mut rig = Rig::one(beating(100, 100));
    let mut client = rig.connect();
    // No pong may come inside a frame. 60,000 bytes at 1,000 each 20 ms are twelve times the pong timeout.
    let frame = client_frame(0x82, &[b'x'; 60_000]);
    for piece in frame.chunks(1000) {
        client.peer.stream.write_all(piece).unwrap();
        rig.pass(ms(20));
        let _ = client.peer.hear();
    }
    assert_eq!(client.record().ends, []);
    assert_eq!(client.record().messages.iter().map(String::len).collect::<Vec<_>>(), [60_000]);
}

#[test]
fn a_long_message_that_is_taken_slowly_keeps_its_connection() {
    let mut rig = Rig::one(beating(200, 200));
    let mut client = rig.connect();
    rig.everyone.try_publish(To::Everyone, &[], Frame::text(&"x".repeat(400_000))).unwrap();
    let mut heard = Vec::new();
    // The pings wait behind what it has not read yet; 2,000 bytes each 33 ms are 6.6 s.
    while heard.is_empty() && client.record().ends.is_empty() {
        rig.pass(ms(33));
        for one in client.peer.hear_some(2000) {
            match one {
                Heard::Ping(nonce) => client.peer.say(0x8A, &nonce),
                other => heard.push(other),
            }
        }
    }
    assert_eq!(client.record().ends, []);
    let Some(Heard::Data(text)) = heard.first() else { panic!("{heard:?}") };
    assert_eq!(text.len(), 400_000);
}

// ---- Pings of our own -------------------------------------------------------------------------------------------

#[test]
fn answers_to_our_pings_are_no_flood() {
    let mut rig = Rig::one(ConnectionConfig { control_frames_per_second: 5, ..beating(100, 300) });
    let mut client = rig.connect();
    pass_answering(&mut rig, &mut client, ms(2000));
    assert_eq!(client.record().ends, []);
}

#[test]
fn the_highest_limit_of_control_frames_is_a_limit() {
    let mut rig =
        Rig::one(ConnectionConfig { control_frames_per_second: u16::MAX, ..beating(86_400_000, 1000) });
    let mut client = rig.connect();
    let pongs = client_frame(0x8A, b"").repeat(255);
    for _ in 0..257 {
        client.peer.stream.write_all(&pongs).unwrap();
        rig.settle();
    }
    assert_eq!(client.record().ends, [], "65,535 within a second");
    client.peer.say(0x8A, b"");
    rig.settle();
    assert_eq!(client.record().ends, [CloseReason::ControlFlood]);
}

#[test]
fn a_ping_that_is_held_back_to_be_gathered_is_not_yet_waited_for() {
    for (coalesce, pong_timeout) in [(0, 50), (100, 50), (1000, 500)] {
        let mut rig = coalescing(ms(coalesce), beating(1000, pong_timeout));
        let mut client = rig.connect();
        pass_answering(&mut rig, &mut client, ms(5000));
        assert_eq!(client.record().ends, [], "it answers at once, coalesce {coalesce} ms");
    }
}

#[test]
fn time_that_the_shard_lost_before_a_ping_was_written_is_not_the_peers() {
    for coalesce in [ms(0), ms(20)] {
        let mut rig = coalescing(coalesce, beating(1000, 1000));
        let mut clients = rig.connect_many(20);
        for round in 0..30 {
            // Now and then the process is stopped for three times the pong timeout, wherever the shard is.
            rig.now += if round % 3 == 0 { ms(3000) } else { ms(90) };
            rig.turn();
            for client in &mut clients {
                let _ = client.peer.hear_and_answer();
            }
        }
        assert!(clients.iter().all(|client| client.record().ends.is_empty()), "coalesce {coalesce:?}");
        // Not even a look is needed for who is silent in truth.
        rig.pass(ms(5000));
        assert!(clients.iter().all(|client| client.record().ends == [CloseReason::PongTimeout]));
    }
}

#[test]
fn pongs_that_nobody_asked_for_leave_no_reminders() {
    for heartbeat_interval in [15_000, 5000] {
        let mut rig = Rig::one(beating(heartbeat_interval, 10_000));
        let mut client = rig.connect();
        for _ in 0..4 {
            for _ in 0..190 {
                client.peer.say(0x8A, b"unasked");
                rig.turn();
            }
            rig.pass(ms(1000));
            let _ = client.peer.hear();
        }
        assert_eq!(client.record().ends, []);
        let reminders = rig.shards[0].audit().reminders;
        assert!(
            reminders <= 3,
            "{reminders} reminders for one connection, heartbeat {heartbeat_interval} ms"
        );
    }
}

// ---- Who is given up --------------------------------------------------------------------------------------------

/// A flooder: says messages until its own kernel takes no more, and reads nothing.
fn flood(rig: &mut Rig, peer: &mut Peer) {
    let messages = client_frame(0x81, &[b'x'; 1000]).repeat(100);
    for _ in 0..50 {
        let _ = peer.say_some(&messages);
        rig.settle();
    }
}

#[test]
fn who_never_reads_is_given_up_whatever_it_sends() {
    let narrow = ConnectionConfig { outbox_frames: 1, outbox_bytes: 1024, ..beating(100, 100) };
    // Sends until nothing is taken any more; sends nothing more; sends a byte of a frame now and then.
    for trickle in [None, Some(80)] {
        let mut rig = Rig::one(narrow.clone());
        let (mut flooder, ends) = rig.connect_broadcaster();
        let (mut neighbour, _) = rig.connect_broadcaster();
        flood(&mut rig, &mut flooder);
        neighbour.text("one");
        let began = rig.now;
        let mut heard = Vec::new();
        while !heard.contains(&Heard::Data("two".into())) && rig.now < began + ms(2000) {
            rig.pass(ms(trickle.unwrap_or(20)));
            if trickle.is_some() {
                let _ = flooder.say_some(b"x");
            }
            let new = neighbour.hear_and_answer();
            if new.contains(&Heard::Data("one".into())) {
                neighbour.text("two");
            }
            heard.extend(new);
        }
        assert_eq!(*lock(&ends), [CloseReason::PongTimeout], "trickle {trickle:?}");
        assert!(rig.now <= began + ms(1000), "{:?}, trickle {trickle:?}", rig.now - began);
    }
}

#[test]
fn without_pings_who_takes_nothing_is_given_up_after_the_stall_timeout() {
    let config = ConnectionConfig {
        outbox_frames: 1,
        outbox_bytes: 1024,
        heartbeat_interval: DAY,
        stall_timeout: Some(ms(1000)),
        ..ConnectionConfig::default()
    };
    let mut rig = Rig::one(config);
    let (mut flooder, ends) = rig.connect_broadcaster();
    let mut neighbours: Vec<_> = (0..10).map(|_| rig.connect_broadcaster().0).collect();
    flood(&mut rig, &mut flooder);
    // Each says two things, the second of which is handled when everybody has taken the first or has gone.
    for (number, neighbour) in neighbours.iter_mut().enumerate() {
        neighbour.text(&format!("neighbour {number}"));
        neighbour.text(&format!("neighbour {number} again"));
    }
    let began = rig.now;
    let mut heard = vec![0; neighbours.len()];
    while heard.iter().any(|count| *count < 20) && rig.now < began + ms(10_000) {
        rig.pass(ms(50));
        let _ = flooder.say_some(b"x"); // whatever it sends
        for (neighbour, count) in neighbours.iter_mut().zip(&mut heard) {
            *count += neighbour.hear_data().iter().filter(|text| text.starts_with("neighbour")).count();
        }
    }
    assert_eq!(heard, [20; 10], "ten neighbours hear each other");
    assert_eq!(*lock(&ends), [CloseReason::SlowConsumer]);
    assert!(rig.now <= began + ms(2000), "{:?}", rig.now - began);
}

#[test]
fn a_client_that_only_answers_pings_ends_where_messages_are_asked_for() {
    let config = ConnectionConfig { message_timeout: Some(ms(1000)), ..beating(100, 300) };
    let mut rig = Rig::one(config);
    let mut client = rig.connect();
    for _ in 0..5 {
        pass_answering(&mut rig, &mut client, ms(900));
        client.peer.text("a message");
    }
    pass_answering(&mut rig, &mut client, ms(900));
    assert_eq!(client.record().ends, []);
    pass_answering(&mut rig, &mut client, ms(200));
    assert_eq!(client.record().ends, [CloseReason::IdleTimeout]);
}

#[test]
fn a_policy_of_one_message_judges_by_its_own_number_of_round_trips() {
    for (rtt_samples, ends) in [(1, vec![CloseReason::HighRtt]), (2, vec![])] {
        let mut rig = Rig::one(beating(1000, 900));
        let mut client = rig.connect();
        let policy = Policy::DropOnHighRtt { max_rtt: ms(250), rtt_samples };
        let judging = rig.everyone.with_policy(policy).unwrap();
        for rtt in [10, 10, 400] {
            let nonce = await_ping(&mut rig, &mut client.peer);
            rig.pass(ms(rtt));
            client.peer.say(0x8A, &nonce);
            rig.settle();
            judging.try_publish(To::Everyone, &[], Frame::text("judge")).unwrap();
            rig.settle();
        }
        // The last alone was too slow; the last two together were not.
        assert_eq!(client.record().ends, ends, "over {rtt_samples}");
    }
}
