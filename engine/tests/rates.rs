//! Rate limits: how much of what a client sends is handled, when, and what happens to the rest.
//!
//! The engine is driven turn by turn, with a clock of the test's own, so each message's time is exact.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::Write;
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardcast_engine::{
    CloseReason, ConnectionConfig, Engine, EngineConfig, Metrics, OverLimit, Rate, RateLimit,
    SharedRateLimit, User,
};
use testkit::client::new_connection;
use testkit::frames::{client_frame, client_text};
use testkit::time::ms;
use testkit::{Client, Received, Rig, at_once, block_on, lock};

/// The wheel's step: how late a delayed message may be.
const TICK: Duration = ms(25);

fn limited(rate_limit: RateLimit) -> ConnectionConfig {
    ConnectionConfig { rate_limit, ..ConnectionConfig::default() }
}

fn messages(rate: Rate, over_limit: OverLimit) -> RateLimit {
    RateLimit { messages: Some(rate), over_limit, ..RateLimit::default() }
}

fn bytes(rate: Rate, over_limit: OverLimit) -> RateLimit {
    RateLimit { bytes: Some(rate), over_limit, ..RateLimit::default() }
}

/// A client that sends numbered messages as fast as the engine reads them.
struct Flooder {
    client: Client,
    length: usize,
    sent: usize,
    unsent: Vec<u8>,
}

impl Flooder {
    fn new(client: Client, length: usize) -> Self {
        Self { client, length, sent: 0, unsent: Vec::new() }
    }

    fn text(&self, number: usize) -> String {
        let digits = format!("{number:0length$}", length = self.length);
        digits[digits.len() - self.length..].to_owned()
    }

    fn flood(&mut self) {
        loop {
            // Many in one write, because the kernel counts more than the bytes of each.
            while self.unsent.len() < 4096 {
                self.unsent.extend(client_text(&self.text(self.sent)));
                self.sent += 1;
            }
            let count = self.client.peer.send_some(&self.unsent);
            self.unsent.drain(..count);
            if !self.unsent.is_empty() {
                return;
            }
        }
    }

    fn handled(&self) -> usize {
        lock(&self.client.record).messages.len()
    }

    /// Everything so far was handled in order, and nothing was left out.
    fn check_order(&self) {
        for (number, text) in lock(&self.client.record).messages.iter().enumerate() {
            assert_eq!(*text, self.text(number));
        }
    }
}

/// Lets time pass in steps, while the client floods and answers pings; what it gets from `at` is the number of
/// messages that were handled until then.
fn flood(rig: &mut Rig, flooder: &mut Flooder, time: Duration, step: Duration) -> usize {
    flooder.flood();
    rig.settle();
    let end = rig.now + time;
    while rig.now < end {
        flooder.flood();
        let _ = flooder.client.peer.receive_and_answer();
        rig.pass(step);
    }
    flooder.handled()
}

// ---- The pace ---------------------------------------------------------------------------------------------------

#[test]
fn a_delayed_client_is_handled_at_its_rate_in_order_and_without_loss() {
    // Also where the burst is less than what the rate allows in a tick.
    for (count, burst) in [(5, 1), (10, 30), (100, 1), (1000, 1), (1000, 500)] {
        let limit = messages(Rate::per_second(count).with_burst(burst), OverLimit::Delay);
        let mut rig = Rig::one(limited(limit));
        let mut flooder = Flooder::new(rig.connect(), 20);
        let handled = flood(&mut rig, &mut flooder, Duration::from_secs(10), ms(50));
        let (fair, burst) = (count as usize * 10, burst.max(count / 40) as usize);
        assert!(
            (fair..=fair + burst).contains(&handled),
            "{handled} in 10 s at {count} a second and {burst} at once"
        );
        flooder.check_order();
        let metrics = rig.engine.metrics();
        assert_eq!((metrics.tally.rate_dropped, metrics.tally.received), (0, handled as u64));
        assert!(metrics.tally.rate_delayed > 0);
        assert_eq!(flooder.client.record().ends, []);
    }
}

#[test]
fn bytes_are_limited_whatever_their_messages_are() {
    for length in [1, 100, 5000, 60_000] {
        let limit = bytes(Rate::per_second(40_000).with_burst(10_000), OverLimit::Delay);
        let mut rig = Rig::one(limited(limit));
        let mut flooder = Flooder::new(rig.connect(), length);
        let handled = flood(&mut rig, &mut flooder, Duration::from_secs(10), ms(50)) * length;
        // A message that is longer than the burst passes alone, and is paid for afterwards.
        let surplus = 10_000.max(length);
        assert!(
            (399_000 - length..=400_000 + surplus).contains(&handled),
            "{handled} bytes in messages of {length}"
        );
        flooder.check_order();
    }
}

#[test]
fn a_burst_passes_at_once_and_what_is_saved_up_is_bounded() {
    let mut rig = Rig::one(limited(messages(Rate::per_second(10).with_burst(7), OverLimit::Delay)));
    let mut client = rig.connect();
    let send = |rig: &mut Rig, client: &mut Client| {
        let before = client.record().messages.len();
        client.peer.stream.write_all(&client_text("x").repeat(20)).unwrap();
        rig.settle();
        client.record().messages.len() - before
    };
    assert_eq!(send(&mut rig, &mut client), 7);
    for _ in 0..60 {
        rig.pass(Duration::from_secs(1)); // all are handled, and the burst is full again
        let _ = client.peer.receive_and_answer();
    }
    assert_eq!(client.record().messages.len(), 20);
    assert_eq!(send(&mut rig, &mut client), 7);
}

#[test]
fn fragments_count_when_their_message_is_complete() {
    let mut rig = Rig::one(limited(messages(Rate::per_second(1), OverLimit::Drop)));
    let mut client = rig.connect();
    for _ in 0..10 {
        client.peer.send_frame(0x01, b"a");
        client.peer.send_frame(0x00, b"b");
        client.peer.send_frame(0x80, b"c");
    }
    rig.settle();
    let record = client.record();
    assert_eq!((record.messages, record.rate_limited), (vec!["abc".to_owned()], vec![9]));
}

// ---- Above the limit --------------------------------------------------------------------------------------------

#[test]
fn dropped_messages_are_counted_exactly_and_told_in_few_calls() {
    let mut rig = Rig::one(limited(messages(Rate::per_second(10).with_burst(5), OverLimit::Drop)));
    let mut client = rig.connect();
    let id = client.id();
    let (mut sent, step) = (0, ms(5));
    for _ in 0..2000 {
        for _ in 0..3 {
            client.peer.text("x");
        }
        sent += 3;
        rig.pass(step);
        let _ = client.peer.receive_and_answer();
    }
    let record = client.record();
    let handled = record.messages.len();
    assert!((104..=106).contains(&handled), "{handled} in 10 s");
    let dropped = (sent - handled) as u64;
    let metrics = rig.metrics_of(id).unwrap();
    assert_eq!((metrics.tally.rate_dropped, metrics.tally.received), (dropped, handled as u64));
    let Metrics { tally, .. } = rig.engine.metrics();
    assert_eq!((tally.rate_dropped, tally.rate_delayed), (dropped, 0));
    assert!(record.rate_limited.len() <= 11, "{:?}", record.rate_limited);
    // What was not told yet is told before the end.
    client.peer.close(1000);
    rig.settle();
    let record = client.record();
    assert_eq!(record.rate_limited.iter().sum::<u64>(), dropped);
    assert_eq!(record.calls[record.calls.len() - 2..], ["rate limited", "close"]);
}

#[test]
fn a_handler_that_is_busy_is_told_of_dropped_messages_when_it_is_done() {
    let mut rig = Rig::one(limited(messages(Rate::per_second(1), OverLimit::Drop)));
    let mut client = rig.connect();
    client.peer.text("wait");
    for _ in 0..5 {
        client.peer.text("x");
    }
    rig.pass(Duration::from_secs(3));
    assert_eq!(client.record().rate_limited, []);
    client.release();
    rig.settle();
    assert_eq!(client.record().calls, ["wait", "rate limited"]);
    assert_eq!(client.record().rate_limited, [5]);
}

#[test]
fn a_client_that_must_keep_to_its_rate_is_closed_after_what_was_within_it() {
    let mut rig = Rig::one(limited(messages(Rate::per_second(10).with_burst(3), OverLimit::Close)));
    let mut client = rig.connect();
    for number in 0..20 {
        client.peer.text(&number.to_string());
    }
    rig.settle();
    let record = client.record();
    assert_eq!((record.messages.len(), &record.ends[..]), (3, &[CloseReason::RateLimited][..]));
    assert!(client.peer.receive().contains(&Received::Close(Some(1008))));
    assert_eq!(client.peer.close_text, "rate limit exceeded");
    let metrics = rig.engine.metrics();
    assert_eq!((metrics.ended_rate_limited, metrics.ended_protocol), (1, 0));

    // Also if its handler was busy then.
    let mut client = rig.connect();
    for text in ["wait", "1", "2", "3"] {
        client.peer.text(text);
    }
    rig.settle();
    client.release();
    rig.settle();
    let record = client.record();
    assert_eq!(
        (record.calls, record.ends),
        (["wait", "1", "2", "close"].map(str::to_owned).to_vec(), vec![CloseReason::RateLimited])
    );
}

#[test]
fn a_message_longer_than_the_burst_of_bytes_passes_when_nothing_is_left_to_pay() {
    let mut rig = Rig::one(limited(bytes(Rate::per_second(1000), OverLimit::Drop)));
    let mut client = rig.connect();
    let long = "x".repeat(3000);
    for passes in [true, false, false, true] {
        let before = client.record().messages.len();
        client.peer.text(&long);
        rig.pass(ms(1000));
        assert_eq!(client.record().messages.len() > before, passes);
        let _ = client.peer.receive_and_answer();
    }
}

// ---- What is exempt ---------------------------------------------------------------------------------------------

#[test]
fn pings_of_a_delayed_client_are_answered_and_not_counted() {
    let limit = messages(Rate::new(1, Duration::from_secs(60)), OverLimit::Delay);
    let mut rig = Rig::one(limited(limit));
    let mut client = rig.connect();
    for _ in 0..10 {
        client.peer.text("x");
    }
    rig.settle();
    for number in 0..100_u8 {
        client.peer.send_frame(0x89, &[number]);
    }
    rig.settle();
    let pongs: Vec<_> =
        client.peer.receive().into_iter().filter(|received| matches!(received, Received::Pong(_))).collect();
    assert_eq!((pongs.len(), client.record().messages.len()), (100, 1));
    assert_eq!(rig.engine.metrics().tally.rate_dropped, 0);
}

#[test]
fn a_delayed_client_counts_as_alive_and_not_as_idle() {
    // A client that floods, whose pongs are behind what is not read; and one that sends little and then waits.
    for is_flooding in [true, false] {
        let config = ConnectionConfig {
            heartbeat_interval: Some(ms(500)),
            pong_timeout: ms(200),
            idle_timeout: is_flooding.then_some(ms(900)),
            message_timeout: Some(ms(900)),
            ..limited(messages(Rate::new(1, ms(2000)), OverLimit::Delay))
        };
        let mut rig = Rig::one(config);
        let mut flooder = Flooder::new(rig.connect(), 1000);
        if !is_flooding {
            flooder.client.peer.stream.write_all(&client_text("x").repeat(5)).unwrap();
        }
        let (began, mut handled_last) = (rig.now, rig.now);
        while rig.now < began + Duration::from_secs(12) {
            if is_flooding {
                flooder.flood();
            }
            let before = flooder.handled();
            rig.pass(ms(20));
            if flooder.handled() > before {
                handled_last = rig.now;
            }
            for received in flooder.client.peer.receive() {
                if let Received::Ping(nonce) = received {
                    // Behind what the kernel has not taken, if it takes nothing.
                    flooder.unsent.extend(client_frame(0x8A, &nonce));
                }
            }
            let count = flooder.client.peer.send_some(&flooder.unsent);
            flooder.unsent.drain(..count);
            if !flooder.client.record().ends.is_empty() {
                break;
            }
        }
        let record = flooder.client.record();
        if is_flooding {
            assert_eq!((record.ends, record.messages.len()), (vec![], 6));
        } else {
            // From when the last one was handled, silence is its own.
            assert_eq!((record.ends, record.messages.len()), (vec![CloseReason::IdleTimeout], 5));
            let silent = rig.now - handled_last;
            assert!((ms(880)..ms(1000)).contains(&silent), "{silent:?} after its last message was handled");
        }
    }
}

#[test]
fn a_delayed_client_that_answers_no_ping_is_ended() {
    let config = ConnectionConfig {
        heartbeat_interval: Some(ms(500)),
        pong_timeout: ms(200),
        ..limited(messages(Rate::new(1, Duration::from_secs(60)), OverLimit::Delay))
    };
    let mut rig = Rig::one(config);
    let mut client = rig.connect();
    for _ in 0..3 {
        client.peer.text("x");
    }
    rig.pass(Duration::from_secs(2)); // it answers no ping
    assert_eq!(client.record().ends, [CloseReason::PongTimeout]);
}

// ---- The end of a delayed connection ----------------------------------------------------------------------------

#[test]
fn a_delayed_client_may_close_and_what_it_sent_before_is_handled_at_its_rate() {
    for is_close in [true, false] {
        let mut rig = Rig::one(limited(messages(Rate::per_second(10), OverLimit::Delay)));
        let mut client = rig.connect();
        for number in 0..40 {
            client.peer.text(&number.to_string());
        }
        if is_close {
            client.peer.close(1000);
        } else {
            client.peer.stream.shutdown(Shutdown::Write).unwrap();
        }
        rig.settle();
        if is_close {
            assert!(client.peer.receive().contains(&Received::Close(Some(1000))), "it is answered at once");
        }
        rig.pass(ms(1000));
        let so_far = client.record().messages.len();
        assert!((19..=20).contains(&so_far), "{so_far} in a second");
        assert_eq!(client.record().ends, []);
        rig.pass(ms(2100));
        let record = client.record();
        assert_eq!((record.messages.len(), record.ends.len(), record.is_dropped), (40, 1, true));
        assert_eq!(record.rate_limited, []);
        drop(client);
        rig.settle();
        assert_eq!(rig.engine.connection_count(), 0);
    }
}

#[test]
fn what_a_closed_client_has_sent_beyond_its_rate_is_dropped_and_told_after_the_close_timeout() {
    for is_close in [true, false] {
        let mut rig = Rig::one(ConnectionConfig {
            close_timeout: ms(500),
            ..limited(messages(Rate::new(1, Duration::from_secs(3600)), OverLimit::Delay))
        });
        let mut client = rig.connect();
        let all: Vec<u8> = (0..1000).flat_map(|number: u32| client_text(&number.to_string())).collect();
        client.peer.stream.write_all(&all).unwrap();
        if is_close {
            client.peer.close(1000);
        } else {
            client.peer.stream.shutdown(Shutdown::Write).unwrap();
        }
        rig.settle();
        rig.pass(ms(400));
        assert_eq!(client.record().calls, ["0"]);
        rig.pass(ms(150) + TICK);
        let record = client.record();
        assert_eq!(
            (record.calls, record.rate_limited),
            (["0", "rate limited", "close"].map(str::to_owned).to_vec(), vec![999])
        );
        assert_eq!((rig.engine.connection_count(), rig.engine.metrics().tally.rate_dropped), (0, 999));
        assert_eq!(rig.engine.metrics().unfinished_bytes, 0);
    }
}

#[test]
fn a_shutdown_does_not_wait_for_delayed_messages() {
    for is_closed in [false, true] {
        let mut rig = Rig::one(limited(messages(Rate::new(1, Duration::from_secs(3600)), OverLimit::Delay)));
        let mut client = rig.connect();
        for _ in 0..10 {
            client.peer.text("x");
        }
        if is_closed {
            client.peer.close(1000);
        }
        rig.settle();
        let shutdown = shardcast_engine::Shutdown::within(Duration::from_secs(60));
        let engine = rig.engine.clone();
        let mut task = testkit::Task::new(async move { engine.shutdown(shutdown).await });
        assert!(task.poll().is_none());
        rig.settle();
        rig.pass(if is_closed { ms(100) } else { Duration::from_secs(59) }); // open ones are closed over a window
        let record = client.record();
        assert_eq!((record.messages.len(), record.ends.len(), record.is_dropped), (1, 1, true));
    }
}

// ---- What it costs ----------------------------------------------------------------------------------------------

#[test]
fn a_delayed_connection_costs_its_shard_nothing_between_its_messages() {
    let mut rig = Rig::one(limited(messages(Rate::per_second(1), OverLimit::Delay))).sleepy();
    let mut flooder = Flooder::new(rig.connect(), 1000);
    flooder.flood();
    rig.settle();
    let before = rig.engine.metrics().turns;
    for _ in 0..900 {
        flooder.flood();
        rig.turn();
        rig.now += ms(1);
    }
    let turns = rig.engine.metrics().turns - before;
    assert!(turns <= 5, "{turns} turns in which nothing could be handled");
}

#[test]
fn a_client_that_is_delayed_all_the_time_has_few_reminders() {
    let mut rig = Rig::one(limited(messages(Rate::per_second(40).with_burst(1), OverLimit::Delay)));
    let mut flooder = Flooder::new(rig.connect(), 1000);
    for _ in 0..20 {
        flood(&mut rig, &mut flooder, ms(500), ms(25));
        let audit = rig.shards[0].audit();
        assert_eq!(audit.errors, <[&str; 0]>::default());
        assert!(audit.reminders <= 3, "{} reminders", audit.reminders);
    }
    assert!(flooder.handled() > 390, "{}", flooder.handled());
    // And one that is delayed again and again, with pauses.
    let mut rig = Rig::one(limited(messages(Rate::per_second(20).with_burst(1), OverLimit::Delay)));
    let mut client = rig.connect();
    for round in 1..=130 {
        client.peer.stream.write_all(&client_text("x").repeat(2)).unwrap();
        rig.settle();
        for _ in 0..4 {
            rig.pass(ms(25));
            let _ = client.peer.receive_and_answer();
        }
        assert_eq!(client.record().messages.len(), 2 * round);
        let reminders = rig.shards[0].audit().reminders;
        assert!(reminders <= 5, "{reminders} reminders after {round} delays");
    }
}

// ---- Shared limits ----------------------------------------------------------------------------------------------

/// Connections of one user on the shards of the rig.
fn connect_user(rig: &mut Rig, limit: &SharedRateLimit, count: usize, length: usize) -> Vec<Flooder> {
    let connect = |_| {
        let (mut new_connection, client) = new_connection(&rig.engine, &rig.config, rig.send_buffer);
        new_connection.rate_limit = Some(limit.clone());
        at_once(rig.everyone.adopt(new_connection)).unwrap();
        Flooder::new(client, length)
    };
    let flooders = (0..count).map(connect).collect();
    rig.settle();
    flooders
}

#[test]
fn connections_on_two_shards_share_a_limit_and_none_of_them_starves() {
    let engine = EngineConfig { shards: Some(2), ..EngineConfig::default() };
    let mut rig = Rig::with(engine, ConnectionConfig::default());
    let limit = SharedRateLimit::new(Some(Rate::per_second(40).with_burst(10)), None).unwrap();
    let mut flooders = connect_user(&mut rig, &limit, 4, 200);
    let mut other = Flooder::new(rig.connect(), 200);
    for _ in 0..400 {
        flooders.iter_mut().for_each(Flooder::flood);
        for flooder in &mut flooders {
            let _ = flooder.client.peer.receive_and_answer();
        }
        rig.pass(ms(25));
    }
    let handled: Vec<usize> = flooders.iter().map(Flooder::handled).collect();
    let sum: usize = handled.iter().sum();
    assert!((395..=410).contains(&sum), "{handled:?} in 10 s");
    assert!(handled.iter().all(|handled| *handled > 50), "{handled:?}");
    flooders.iter().for_each(Flooder::check_order);
    // Connections without the limit are not affected.
    other.flood();
    rig.settle();
    assert!(other.handled() > 10);
}

#[test]
fn a_shared_limit_counts_in_addition_to_the_connections_own() {
    let mut rig = Rig::one(limited(messages(Rate::per_second(10), OverLimit::Drop)));
    let limit = SharedRateLimit::new(None, Some(Rate::per_second(1500))).unwrap();
    let mut flooders = connect_user(&mut rig, &limit, 2, 100);
    for flooder in &mut flooders {
        for _ in 0..30 {
            let text = flooder.text(flooder.sent);
            flooder.client.peer.text(&text);
            flooder.sent += 1;
        }
        rig.settle();
    }
    // Ten by the first one's own limit, and what is left of 1,500 bytes for the second.
    assert_eq!(flooders.iter().map(Flooder::handled).collect::<Vec<_>>(), [10, 5]);
    let dropped: Vec<u64> =
        flooders.iter().map(|flooder| flooder.client.record().rate_limited.iter().sum()).collect();
    assert_eq!(dropped, [20, 25]);
}

/// A client of a user, which sends messages of `length` bytes.
fn connect_as(rig: &mut Rig, user: &str, length: usize, shared: Option<&SharedRateLimit>) -> Flooder {
    let (mut new_connection, client) = new_connection(&rig.engine, &rig.config, rig.send_buffer);
    new_connection.user = Some(User::new(user));
    new_connection.rate_limit = shared.cloned();
    at_once(rig.everyone.adopt(new_connection)).unwrap();
    rig.settle();
    Flooder::new(client, length)
}

fn send(rig: &mut Rig, flooder: &mut Flooder, count: usize) {
    for _ in 0..count {
        let text = flooder.text(flooder.sent);
        flooder.client.peer.text(&text);
        flooder.sent += 1;
    }
    rig.settle();
}

#[test]
fn all_connections_of_a_user_have_one_limit_and_reconnecting_does_not_renew_it() {
    let hour = Duration::from_secs(3600);
    for over_limit in [OverLimit::Drop, OverLimit::Delay] {
        let rate = Rate::new(60, hour).with_burst(10);
        let limit = RateLimit { user_messages: Some(rate), over_limit, ..RateLimit::default() };
        let engine = EngineConfig { shards: Some(2), ..EngineConfig::default() };
        let mut rig = Rig::with(engine, limited(limit));
        let mut tabs: Vec<_> = (0..3).map(|_| connect_as(&mut rig, "ada", 10, None)).collect();
        let mut bob = connect_as(&mut rig, "bob", 10, None);
        let mut nobody = Flooder::new(rig.connect(), 10);
        for flooder in tabs.iter_mut().chain([&mut bob, &mut nobody]) {
            send(&mut rig, flooder, 6);
        }
        let handled: Vec<_> = tabs.iter().map(Flooder::handled).collect();
        assert_eq!(handled, [6, 4, 0], "ten of Ada, {over_limit:?}");
        assert_eq!((bob.handled(), nobody.handled()), (6, 6), "a user of its own, and no user");

        // Ada has no connection any more, and comes back.
        tabs.iter_mut().for_each(|tab| tab.client.peer.close(1000));
        rig.pass(Duration::from_secs(60));
        let mut again = connect_as(&mut rig, "ada", 10, None);
        send(&mut rig, &mut again, 6);
        assert!(again.handled() < 6, "{} handled, {over_limit:?}", again.handled());
        again.client.peer.close(1000);
        rig.pass(hour);
        let mut rested = connect_as(&mut rig, "ada", 10, None);
        send(&mut rig, &mut rested, 12);
        assert_eq!(rested.handled(), 10, "{over_limit:?}");
    }
}

#[test]
fn a_message_that_one_limit_refuses_is_counted_in_none() {
    let rate = |count| Some(Rate::new(count, Duration::from_secs(3600)));
    let limit = RateLimit {
        messages: rate(7),
        user_messages: rate(9),
        user_bytes: rate(500),
        over_limit: OverLimit::Drop,
        ..RateLimit::default()
    };
    let mut rig = Rig::one(limited(limit));
    let shared = SharedRateLimit::new(rate(12), None).unwrap();
    // Ada: 7 by the first connection's own limit, 2 more by hers. Bob: 3 by what is left of the shared one.
    for (user, sent, handled) in [("ada", 20, 7), ("ada", 20, 2), ("bob", 20, 3), ("carol", 20, 0)] {
        let mut flooder = connect_as(&mut rig, user, 10, Some(&shared));
        send(&mut rig, &mut flooder, sent);
        assert_eq!(flooder.handled(), handled, "{user}");
    }
    // Bytes: two of 200, and not a third; a shorter one is within what is left.
    let mut dave = connect_as(&mut rig, "dave", 200, None);
    send(&mut rig, &mut dave, 5);
    assert_eq!(dave.handled(), 2);
    dave.length = 100;
    send(&mut rig, &mut dave, 2);
    assert_eq!(dave.handled(), 3);
}

#[test]
fn threads_share_a_limit_without_exceeding_it() {
    // Real threads and the real clock: at most the burst and what the elapsed time allows.
    let config = EngineConfig { shards: Some(2), pin: false, ..EngineConfig::default() };
    let engine = Engine::start(config).unwrap();
    let everyone = engine.namespace();
    let limit = SharedRateLimit::new(Some(Rate::per_second(100)), None).unwrap();
    let config = Arc::new(limited(RateLimit { over_limit: OverLimit::Drop, ..RateLimit::default() }));
    let began = Instant::now();
    let mut clients: Vec<Client> = (0..4)
        .map(|_| {
            let (mut new_connection, client) = new_connection(&engine, &config, 1 << 16);
            new_connection.rate_limit = Some(limit.clone());
            block_on(everyone.adopt(new_connection)).unwrap();
            client
        })
        .collect();
    for client in &mut clients {
        client.peer.stream.write_all(&client_text("x").repeat(1000)).unwrap();
    }
    for client in &mut clients {
        client.peer.close(1000);
        while client.peer.wait() != Received::Close(Some(1000)) {}
    }
    let most = 100.0 + 100.0 * began.elapsed().as_secs_f64();
    let tally = engine.metrics().tally;
    block_on(engine.shutdown(shardcast_engine::Shutdown::within(Duration::from_secs(5)))).unwrap();
    let handled: usize = clients.iter().map(|client| client.record().messages.len()).sum();
    assert!((100.0..=most).contains(&(handled as f64)), "{handled}, at most {most}: {tally:?}");
    let dropped: u64 = clients.iter().flat_map(|client| client.record().rate_limited).sum();
    assert_eq!(handled as u64 + dropped, 4000);
}
