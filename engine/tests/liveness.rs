//! Liveness: which clients count as alive, and which are ended.
//!
//! A client is judged by what it does, never by what keeps the server busy: its bytes, its whole messages and
//! what it takes are signs of life wherever they are delayed. In turn, no client keeps a connection, or
//! blocks publishers, merely by sending. Tests control the time, except where they are about threads.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::task::Poll;
use std::time::{Duration, Instant};

use shardcast_engine::{
    Address, CloseReason, ConnectionConfig, Context, Engine, EngineConfig, Handler, Message, Payload, Policy,
    Publication,
};
use testkit::client::new_tcp_connection;
use testkit::frames::client_frame;
use testkit::time::ms;
use testkit::{Client, RawClient, Received, Rig, at_once, block_on, lock, on_each_transport};

/// Pings each `interval`, which must be answered within `timeout`.
fn beating(interval: u64, timeout: u64) -> ConnectionConfig {
    ConnectionConfig {
        heartbeat_interval: Some(ms(interval)),
        pong_timeout: ms(timeout),
        ..ConnectionConfig::default()
    }
}

fn coalescing(coalesce: Duration, config: ConnectionConfig) -> Rig {
    Rig::with(EngineConfig { shards: Some(1), coalesce, ..EngineConfig::default() }, config)
}

/// Lets time pass until the client receives a ping; returns its nonce.
fn await_ping(rig: &mut Rig, peer: &mut RawClient) -> Vec<u8> {
    for _ in 0..1000 {
        rig.pass(ms(20));
        for received in peer.receive() {
            if let Received::Ping(nonce) = received {
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
        let _ = client.peer.receive_and_answer();
        rig.settle();
    }
}

// ---- Signs of life ----------------------------------------------------------------------------------------------

/// Where a pong is while its client's handler is busy.
#[derive(Debug, Clone, Copy)]
enum Stuck {
    /// Before the message that keeps the handler busy.
    Nowhere,
    /// After it and this many others of 1,000 bytes.
    Behind(usize),
    /// After as many that were sent before the ping arrived.
    LongBehind(usize),
}

/// Directly after the message, after more than is read at once, after more than is read ahead of a busy handler.
const STUCK: [Stuck; 6] = [
    Stuck::Nowhere,
    Stuck::Behind(0),
    Stuck::Behind(2),
    Stuck::Behind(40),
    Stuck::LongBehind(0),
    Stuck::LongBehind(40),
];

/// A connection with a busy handler, whose client has answered a ping at once.
fn answered_but_busy(stuck: Stuck, is_tcp: bool, config: ConnectionConfig) -> (Rig, Client) {
    let engine = EngineConfig { shards: Some(1), read_buffer_bytes: 1024, ..EngineConfig::default() };
    let mut rig = Rig::with(engine, config);
    let (new_connection, mut client) = match is_tcp {
        true => new_tcp_connection(&rig.engine, &rig.config),
        false => testkit::client::new_connection(&rig.engine, &rig.config, 1 << 16),
    };
    at_once(rig.everyone.adopt(new_connection)).unwrap();
    rig.settle();
    let busy = |others: usize| {
        [client_frame(0x82, b"wait"), client_frame(0x82, &[b'x'; 1000]).repeat(others)].concat()
    };
    if let Stuck::LongBehind(others) = stuck {
        client.peer.stream.write_all(&busy(others)).unwrap();
        arrive(&mut rig, &client);
    }
    let nonce = await_ping(&mut rig, &mut client.peer);
    let pong = client_frame(0x8A, &nonce);
    let said = match stuck {
        Stuck::Nowhere => [pong, busy(0)].concat(),
        Stuck::Behind(others) => [busy(others), pong].concat(),
        Stuck::LongBehind(_) => pong,
    };
    client.peer.stream.write_all(&said).unwrap();
    arrive(&mut rig, &client);
    assert_eq!(client.record().messages, ["wait"]);
    (rig, client)
}

/// Waits for the first message: over TCP it may take a while to arrive.
fn arrive(rig: &mut Rig, client: &Client) {
    let began = Instant::now();
    rig.settle();
    while client.record().messages.is_empty() && began.elapsed() < Duration::from_secs(20) {
        rig.settle();
    }
}

#[test]
fn a_pong_counts_wherever_a_busy_handler_delays_it() {
    for (stuck, is_tcp) in STUCK.into_iter().flat_map(|stuck| [(stuck, false), (stuck, true)]) {
        let (mut rig, client) = answered_but_busy(stuck, is_tcp, beating(1000, 300));
        rig.pass(ms(900)); // three times the pong timeout, and before the next ping
        assert_eq!(client.record().ends, [], "it has answered in time; {stuck:?}, TCP {is_tcp}");
        client.release();
        rig.settle();
        assert_eq!(client.record().ends, [], "{stuck:?}, TCP {is_tcp}");
    }
}

#[test]
fn a_handlers_time_is_no_round_trip() {
    let policy = Policy::DropOnHighRtt { max_rtt: ms(100), rtt_samples: 1 };
    for stuck in STUCK {
        let config = ConnectionConfig { policy, ..beating(1000, 10_000) };
        let (mut rig, client) = answered_but_busy(stuck, false, config);
        rig.pass(ms(500));
        client.release();
        rig.settle();
        assert_eq!(client.record().ends, [], "answered within 20 ms; {stuck:?}");
        let rtt = rig.metrics_of(client.id()).unwrap().rtt.last;
        assert!(rtt.is_none_or(|rtt| rtt <= ms(20)), "{rtt:?}, {stuck:?}");
    }
}

/// Blocks its shard for `time` in each of `turns` turns, and reports when it has done so.
struct Blocker {
    time: Duration,
    turns: usize,
    done: Sender<()>,
}

impl Handler for Blocker {
    fn on_message(&mut self, _: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        self.on_resume(context)
    }

    fn on_resume(&mut self, context: &mut Context<'_>) -> Poll<()> {
        std::thread::sleep(self.time);
        self.turns -= 1;
        if self.turns == 0 {
            self.done.send(()).unwrap();
            return Poll::Ready(());
        }
        context.waker().wake();
        Poll::Pending
    }
}

#[test]
fn a_neighbour_that_blocks_the_shard_is_no_round_trip() {
    // The client is at some distance, so that its pongs arrive while the shard is blocked, but far below the limit.
    const AWAY: Duration = ms(100);
    const MAX: Duration = ms(1000);
    let engine =
        Engine::start(EngineConfig { shards: Some(1), pin: false, ..EngineConfig::default() }).unwrap();
    let everyone = engine.namespace();
    let policy = Policy::DropOnHighRtt { max_rtt: MAX, rtt_samples: 2 };
    let config = Arc::new(ConnectionConfig { policy, ..beating(50, 60_000) });
    let (new_connection, client) = testkit::client::new_connection(&engine, &config, 1 << 16);
    block_on(everyone.adopt(new_connection)).unwrap();
    let (done, is_done) = channel();
    // A ping is written in the turn after the one in which it is due, and its pong read two turns later.
    let blocker = Blocker { time: 2 * MAX + AWAY, turns: 6, done };
    let (new_connection, mut neighbour) =
        testkit::client::new_connection_with(&engine, &config, 1 << 16, Box::new(|_| Box::new(blocker)));
    block_on(everyone.adopt(new_connection)).unwrap();
    let Client { mut peer, record } = client;
    let idle = std::thread::spawn(move || {
        loop {
            match peer.wait() {
                Received::Ping(nonce) => {
                    std::thread::sleep(AWAY);
                    peer.send_frame(0x8A, &nonce);
                }
                Received::Data(text) if text == "enough" => return peer,
                Received::Data(_) => {}
                other => panic!("{other:?}"),
            }
        }
    });
    neighbour.text("block");
    is_done.recv().unwrap();
    // What had arrived by now has been read when the shard has processed another message, twice.
    for _ in 0..2 {
        block_on(everyone.publish(Publication::message(Address::Everyone, Payload::text("a turn")))).unwrap();
        assert_eq!(
            block_on(everyone.deliver(Publication::message(Address::group("nobody"), Payload::text(""))))
                .unwrap()
                .recipients,
            0
        );
    }
    let receipt =
        block_on(everyone.deliver(Publication::message(Address::Everyone, Payload::text("enough")))).unwrap();
    assert_eq!((lock(&record).ends.len(), receipt.recipients), (0, 2), "it answers each ping at once");
    let _peer = idle.join().unwrap();
}

#[test]
fn a_client_that_sends_messages_and_answers_no_ping_stays_connected() {
    let mut rig = Rig::one(beating(1000, 300));
    let mut client = rig.connect();
    for _ in 0..100 {
        client.peer.text("hello");
        rig.pass(ms(100));
        let _ = client.peer.receive();
    }
    assert_eq!(client.record().ends, []);
    rig.pass(ms(2000));
    assert_eq!(client.record().ends, [CloseReason::PongTimeout], "it is silent now");
}

#[test]
fn a_client_that_pings_and_answers_no_ping_stays_connected() {
    let mut rig = Rig::one(beating(1000, 300));
    let mut client = rig.connect();
    for _ in 0..100 {
        client.peer.send_frame(0x89, b"are you there");
        rig.pass(ms(100));
        let _ = client.peer.receive();
    }
    assert_eq!(client.record().ends, []);
    rig.pass(ms(2000));
    assert_eq!(client.record().ends, [CloseReason::PongTimeout], "it is silent now");
}

#[test]
fn a_pong_that_is_read_in_the_turn_in_which_its_time_is_over_counts() {
    for stuck in STUCK {
        let (mut rig, client) = answered_but_busy(stuck, false, beating(1000, 300));
        rig.now += ms(800); // which the shard does not notice
        client.release();
        rig.settle();
        assert_eq!(client.record().ends, [], "{stuck:?}");
    }
}

#[test]
fn a_client_whose_input_is_still_unread_is_not_silent() {
    // More than one turn can read.
    const CLIENTS: usize = 1100;
    testkit::client::ask_for_descriptors(2 * CLIENTS as u64 + 200);
    let quiet = beating(86_400_000, 1000);
    for config in [
        ConnectionConfig { idle_timeout: Some(ms(1000)), ..quiet.clone() },
        ConnectionConfig { message_timeout: Some(ms(1000)), ..quiet },
    ] {
        let mut rig = Rig::one(config.clone());
        let mut clients: Vec<_> = (0..CLIENTS).map(|_| rig.connect_at_once()).collect();
        rig.settle();
        clients.iter_mut().for_each(|client| client.peer.text("here I am"));
        rig.now += ms(1200);
        rig.turn();
        let received = rig.engine.metrics().tally.received;
        assert!(received < CLIENTS as u64, "{received}");
        rig.settle();
        assert_eq!((rig.engine.metrics().tally.received, rig.everyone.len()), (CLIENTS as u64, CLIENTS));
        rig.pass(ms(1100));
        assert_eq!(rig.everyone.len(), 0, "they are silent now; {config:?}");
    }
}

on_each_transport!(a_long_message_that_keeps_coming_keeps_its_connection);
fn a_long_message_that_keeps_coming_keeps_its_connection() {
    let mut rig = Rig::one(beating(100, 100));
    let mut client = rig.connect();
    // No pong may be sent inside a frame. 60,000 bytes at 1,000 each 20 ms are twelve times the pong timeout.
    let frame = client_frame(0x82, &[b'x'; 60_000]);
    for piece in frame.chunks(1000) {
        client.peer.stream.write_all(piece).unwrap();
        rig.pass(ms(20));
        let _ = client.peer.receive();
    }
    assert_eq!(client.record().ends, []);
    assert_eq!(client.record().messages.iter().map(String::len).collect::<Vec<_>>(), [60_000]);
}

#[test] // not over TLS: how soon TCP announces room to one that takes little is not in the hands of this clock
fn a_long_message_that_is_taken_slowly_keeps_its_connection() {
    // The pings wait after bytes that it has not read yet: in the outbox, or in the kernel.
    for (send_buffer, bytes) in [(4096, 2000), (1 << 20, 20_000)] {
        let mut rig = Rig::one(beating(200, 200));
        rig.send_buffer = send_buffer;
        let mut client = rig.connect();
        rig.everyone
            .try_publish(Publication::message(Address::Everyone, Payload::text(&"x".repeat(400_000))))
            .unwrap();
        let (began, mut received) = (rig.now, Vec::new());
        while received.is_empty() && client.record().ends.is_empty() {
            rig.pass(ms(33));
            for one in client.peer.receive_some(bytes) {
                match one {
                    Received::Ping(nonce) => client.peer.send_frame(0x8A, &nonce),
                    other => received.push(other),
                }
            }
        }
        assert_eq!(client.record().ends, [], "send buffer {send_buffer}");
        assert!(rig.now - began > ms(500), "the test must exceed the pong timeout");
        let [Received::Data(text)] = &received[..] else { panic!("{received:?}") };
        assert_eq!(text.len(), 400_000);
    }
}

#[test]
fn a_ping_after_many_messages_waits_as_long_as_the_client_takes_some() {
    // Whether it takes something is checked four times within the pong timeout, the last time at its end.
    let mut rig = Rig::one(ConnectionConfig { stall_timeout: Some(ms(10_000)), ..beating(200, 200) });
    rig.send_buffer = 1 << 16;
    let mut client = rig.connect();
    let publish = |rig: &mut Rig, count: usize| {
        for _ in 0..count {
            rig.everyone
                .try_publish(Publication::message(Address::Everyone, Payload::text(&"x".repeat(1000))))
                .unwrap();
            rig.settle(); // each is a write of its own
        }
    };
    publish(&mut rig, 25);
    rig.pass(ms(200));
    while rig.metrics_of(client.id()).unwrap().tally.pending() == 0 {
        publish(&mut rig, 1);
    }
    let (began, mut is_answered) = (rig.now, false);
    while !is_answered && client.record().ends.is_empty() {
        rig.pass(ms(20));
        for received in client.peer.receive_some(1000) {
            if let Received::Ping(nonce) = received {
                client.peer.send_frame(0x8A, &nonce);
                is_answered = true;
            }
        }
    }
    rig.settle();
    assert_eq!((client.record().ends, is_answered), (vec![], true));
    assert!(rig.now > began + ms(400), "the test must exceed the pong timeout");
}

#[test]
fn a_client_that_gets_a_ping_late_has_the_whole_time_for_its_answer() {
    // Pings wait in the kernel after bytes that the client takes at its pace; it answers most of a timeout
    // after it received one.
    for pace in [70, 110, 130, 170, 300, 390] {
        let mut rig = Rig::one(beating(1000, 400));
        let mut client = rig.connect();
        for _ in 0..300 {
            rig.everyone
                .try_publish(Publication::message(Address::Everyone, Payload::text(&"x".repeat(1000))))
                .unwrap();
        }
        rig.settle();
        let mut answers = std::collections::VecDeque::new();
        let (mut received, mut pings, mut next) = (0, 0, rig.now);
        while received < 300 && client.record().ends.is_empty() {
            rig.pass(ms(10));
            if rig.now >= next {
                next = rig.now + ms(pace);
                // As much as a local socket accounts as one piece.
                for one in client.peer.receive_some(5000) {
                    match one {
                        Received::Ping(nonce) => {
                            answers.push_back((rig.now + ms(300), nonce));
                            pings += 1;
                        }
                        _ => received += 1,
                    }
                }
            }
            while let Some((_, nonce)) = answers.pop_front_if(|(due, _)| *due <= rig.now) {
                client.peer.send_frame(0x8A, &nonce);
            }
        }
        assert_eq!(client.record().ends, [], "a piece each {pace} ms");
        assert!(pings > 0, "the test must answer pings");
    }
}

// ---- The server's pings -----------------------------------------------------------------------------------------

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
    client.peer.send_frame(0x8A, b"");
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
    // The turns before which the process was suspended, for three times the pong timeout: so it happens to a
    // ping that is due, one that is delayed, one that was written and a pong that was not read.
    let stops: [&[bool]; 4] =
        [&[true, false, false], &[true, true, false], &[true, false], &[true, true, false, true, false]];
    for (coalesce, stops) in [0, 20].into_iter().flat_map(|coalesce| stops.map(|stops| (ms(coalesce), stops)))
    {
        let mut rig = coalescing(coalesce, beating(1000, 1000));
        let mut clients = rig.connect_many(20);
        for is_stopped in stops.iter().cycle().take(60) {
            rig.now += if *is_stopped { ms(3000) } else { ms(90) };
            rig.turn();
            for client in &mut clients {
                let _ = client.peer.receive_and_answer();
            }
        }
        let ended = clients.iter().filter(|client| !client.record().ends.is_empty()).count();
        assert_eq!(ended, 0, "coalesce {coalesce:?}, stopped {stops:?}");
        // A client that is really silent is ended.
        rig.pass(ms(5000));
        assert!(clients.iter().all(|client| client.record().ends == [CloseReason::PongTimeout]));
    }
}

#[test]
fn unsolicited_pongs_leave_no_timers() {
    for heartbeat_interval in [15_000, 5000] {
        let mut rig = Rig::one(beating(heartbeat_interval, 10_000));
        let mut client = rig.connect();
        for _ in 0..4 {
            for _ in 0..190 {
                client.peer.send_frame(0x8A, b"unasked");
                rig.turn();
            }
            rig.pass(ms(1000));
            let _ = client.peer.receive();
        }
        assert_eq!(client.record().ends, []);
        let reminders = rig.shards[0].audit().reminders;
        assert!(
            reminders <= 3,
            "{reminders} reminders for one connection, heartbeat {heartbeat_interval} ms"
        );
    }
}

// ---- Silence ----------------------------------------------------------------------------------------------------

/// Ends a client that sends nothing for a second, whether any byte counts or only whole messages.
fn impatient(for_messages: bool) -> ConnectionConfig {
    let timeout = Some(ms(1000));
    match for_messages {
        true => ConnectionConfig { message_timeout: timeout, ..beating(86_400_000, 1000) },
        false => ConnectionConfig { idle_timeout: timeout, ..beating(86_400_000, 1000) },
    }
}

/// A client that sends messages to a busy handler: as much as is held for it, followed by `unread`.
fn talking_to_a_busy_handler(config: ConnectionConfig, unread: &[u8]) -> (Rig, Client) {
    let mut rig = Rig::one(config);
    let mut client = rig.connect();
    client.peer.text("wait");
    for _ in 0..17 {
        client.peer.send_frame(0x82, &[b'x'; 1000]);
    }
    rig.settle();
    client.peer.stream.write_all(unread).unwrap();
    rig.settle();
    (rig, client)
}

#[test]
fn a_client_is_not_silent_while_a_busy_handler_keeps_it_from_being_read() {
    for for_messages in [false, true] {
        let unread = client_frame(0x82, &[b'x'; 1000]).repeat(20);
        let (mut rig, client) = talking_to_a_busy_handler(impatient(for_messages), &unread);
        rig.pass(ms(5000));
        assert_eq!(client.record().ends, [], "it has sent more; for messages: {for_messages}");
        client.release();
        rig.settle();
        assert_eq!(client.record().messages.len(), 38);
        rig.pass(ms(1100));
        assert_eq!(client.record().ends, [CloseReason::IdleTimeout], "now it is silent");
    }
}

#[test]
fn the_message_timeout_restarts_when_reading_resumes() {
    let message = client_frame(0x82, &[b'x'; 1000]);
    let (begun, rest) = message.split_at(500);
    let (mut rig, mut client) = talking_to_a_busy_handler(impatient(true), begun);
    rig.pass(ms(900));
    client.release();
    rig.pass(ms(900));
    assert_eq!(client.record().ends, [], "it could not continue while its socket was not read");
    client.peer.stream.write_all(rest).unwrap();
    rig.settle();
    assert_eq!(client.record().messages.len(), 19);
}

#[test]
fn a_client_that_is_silent_while_its_handler_is_busy_is_silent() {
    for for_messages in [false, true] {
        let mut rig = Rig::one(impatient(for_messages));
        let mut client = rig.connect();
        client.peer.text("wait");
        rig.settle();
        rig.pass(ms(1100));
        assert_eq!(client.record().ends, [], "its handler is busy");
        assert_eq!(
            client.peer.receive(),
            [Received::Close(Some(1001)), Received::End],
            "for messages: {for_messages}"
        );
    }
}

// ---- Dead and stalled clients -----------------------------------------------------------------------------------

/// Sends messages until the client's own kernel accepts no more, and reads nothing.
fn flood(rig: &mut Rig, peer: &mut RawClient) {
    let messages = client_frame(0x81, &[b'x'; 1000]).repeat(100);
    for _ in 0..50 {
        let _ = peer.send_some(&messages);
        rig.settle();
    }
}

#[test]
fn a_client_that_never_reads_is_ended_whatever_it_sends() {
    let narrow = ConnectionConfig { outbox_frames: 1, outbox_bytes: 1024, ..beating(100, 100) };
    // Sends until its kernel accepts no more; sends nothing more; sends a byte of a frame now and then.
    for trickle in [None, Some(80)] {
        let mut rig = Rig::one(narrow.clone());
        let (mut flooder, ends) = rig.connect_broadcaster();
        let (mut neighbour, _) = rig.connect_broadcaster();
        flood(&mut rig, &mut flooder);
        neighbour.text("one");
        let began = rig.now;
        let mut received = Vec::new();
        while !received.contains(&Received::Data("two".into())) && rig.now < began + ms(2000) {
            rig.pass(ms(trickle.unwrap_or(20)));
            if trickle.is_some() {
                let _ = flooder.send_some(b"x");
            }
            let new = neighbour.receive_and_answer();
            if new.contains(&Received::Data("one".into())) {
                neighbour.text("two");
            }
            received.extend(new);
        }
        assert_eq!(*lock(&ends), [CloseReason::PongTimeout], "trickle {trickle:?}");
        assert!(rig.now <= began + ms(1000), "{:?}, trickle {trickle:?}", rig.now - began);
    }
}

#[test]
fn a_silent_client_is_ended_even_if_more_send_than_one_turn_can_read() {
    let mut rig = Rig::one(beating(200, 200));
    testkit::client::ask_for_descriptors(3000);
    let mut talkers: Vec<_> = (0..1200).map(|_| rig.connect_at_once()).collect();
    let (mut prompt, silent) = (rig.connect_at_once(), rig.connect_at_once());
    rig.settle();
    // A turn reports 1,024 sockets at most. All of these have input in each turn.
    let (mut is_full, mut pong) = (true, None::<(u32, Vec<u8>)>);
    for round in 0..100 {
        for talker in &mut talkers {
            talker.peer.text("hello");
            let _ = talker.peer.receive();
        }
        // One answers as late as it may, and is the last of the ready sockets.
        if let Some((_, nonce)) = pong.take_if(|(since, _)| round == *since + 10) {
            prompt.peer.send_frame(0x8A, &nonce);
        }
        rig.now += ms(20);
        let before = rig.engine.metrics().tally.received;
        rig.turn();
        is_full &= rig.engine.metrics().tally.received - before >= 1024;
        if let [Received::Ping(nonce)] = &prompt.peer.receive()[..] {
            pong = Some((round, nonce.clone()));
        }
    }
    assert!(is_full, "every turn must be full");
    assert_eq!(prompt.record().ends, [], "its answers had arrived in time");
    assert_eq!(silent.record().ends, [CloseReason::PongTimeout]);
    assert_eq!(rig.engine.metrics().ended, 1, "nobody else");
}

#[test]
fn a_client_that_gets_a_ping_and_does_not_answer_has_one_timeout_and_no_more() {
    let mut rig = Rig::one(beating(1000, 400));
    let mut client = rig.connect();
    let _ = await_ping(&mut rig, &mut client.peer); // written at most 20 ms ago
    rig.pass(ms(370));
    assert_eq!(client.record().ends, []);
    rig.pass(ms(80));
    assert_eq!(client.record().ends, [CloseReason::PongTimeout]);
}

#[test]
fn unsolicited_pongs_keep_no_connection_alive() {
    let mut rig = Rig::one(beating(1000, 300));
    let mut client = rig.connect();
    let _ = await_ping(&mut rig, &mut client.peer);
    for _ in 0..40 {
        if client.record().ends.is_empty() {
            client.peer.stream.write_all(&client_frame(0x8A, &[b'x'; 125])).unwrap();
        }
        rig.pass(ms(10));
    }
    assert_eq!(client.record().ends, [CloseReason::PongTimeout]);
}

#[test]
fn the_stall_timeout_holds_even_if_a_ping_waits() {
    let config = ConnectionConfig { stall_timeout: Some(ms(500)), ..beating(100, 5000) };
    let mut rig = Rig::one(config);
    let client = rig.connect();
    rig.everyone
        .try_publish(Publication::message(Address::Everyone, Payload::text(&"x".repeat(100_000))))
        .unwrap();
    rig.pass(ms(450));
    assert_eq!(client.record().ends, []);
    rig.pass(ms(200));
    assert_eq!(client.record().ends, [CloseReason::SlowConsumer]);
}

#[test]
fn without_pings_a_client_that_takes_nothing_is_ended_after_the_stall_timeout() {
    let config = ConnectionConfig {
        outbox_frames: 1,
        outbox_bytes: 1024,
        heartbeat_interval: None,
        stall_timeout: Some(ms(1000)),
        ..ConnectionConfig::default()
    };
    let mut rig = Rig::one(config);
    let (mut flooder, ends) = rig.connect_broadcaster();
    let mut neighbours: Vec<_> = (0..10).map(|_| rig.connect_broadcaster().0).collect();
    flood(&mut rig, &mut flooder);
    // Each sends two messages, the second of which is handled when all have accepted the first or have disconnected.
    for (number, neighbour) in neighbours.iter_mut().enumerate() {
        neighbour.text(&format!("neighbour {number}"));
        neighbour.text(&format!("neighbour {number} again"));
    }
    let began = rig.now;
    let mut received = vec![0; neighbours.len()];
    while received.iter().any(|count| *count < 20) && rig.now < began + ms(10_000) {
        rig.pass(ms(50));
        let _ = flooder.send_some(b"x"); // whatever it sends
        for (neighbour, count) in neighbours.iter_mut().zip(&mut received) {
            *count += neighbour.receive_data().iter().filter(|text| text.starts_with("neighbour")).count();
        }
    }
    assert_eq!(received, [20; 10], "ten neighbours receive each other's messages");
    assert_eq!(*lock(&ends), [CloseReason::SlowConsumer]);
    assert!(rig.now <= began + ms(2000), "{:?}", rig.now - began);
}

#[test]
fn a_client_that_only_answers_pings_is_ended_by_the_message_timeout() {
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
    for (rtt_samples, ends) in [(1, vec![]), (3, vec![CloseReason::HighRtt])] {
        let mut rig = Rig::one(beating(1000, 900));
        let mut client = rig.connect();
        let judging = |max_rtt, rtt_samples| {
            testkit::Sender::new(&rig.everyone, Some(Policy::DropOnHighRtt { max_rtt, rtt_samples }))
        };
        let (patient, strict) = (judging(ms(500), 3), judging(ms(250), rtt_samples));
        for rtt in [400, 400, 10] {
            let nonce = await_ping(&mut rig, &mut client.peer);
            rig.pass(ms(rtt));
            client.peer.send_frame(0x8A, &nonce);
            rig.settle();
            // From the first judgement on, three are remembered.
            patient.try_publish(Publication::message(Address::Everyone, Payload::text("judge"))).unwrap();
            rig.settle();
            assert_eq!(client.record().ends, []);
        }
        // The last alone was fast, the last three together were too slow; and nothing waits for the client.
        strict.try_publish(Publication::message(Address::Everyone, Payload::text("judge"))).unwrap();
        rig.settle();
        assert_eq!(client.record().ends, ends, "over {rtt_samples}");
    }
}
