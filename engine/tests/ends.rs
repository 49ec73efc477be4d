//! Closing, and what must still happen before and after it.
//!
//! Every connection ends once and is counted once. A client that can still read gets a Close frame with the
//! reason, which no backlog and no busy handler delays for long; messages that it sent before its own Close
//! are handled first. A close that cannot be sent is refused before any connection is ended.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::Read as _;
use std::net::Shutdown as Half;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

use shardcast_engine::{
    Address, AdoptError, CloseCode, CloseReason, ConnectionConfig, Context, EngineConfig, FrameError,
    GROUP_NAME_BYTES_MAX, Handler, InvalidCloseCode, Message, Payload, Policy, Publication, PublishError,
    Shutdown, ShutdownReport,
};
use testkit::client::new_connection;
use testkit::frames::client_frame;
use testkit::handler::SlowToPart;
use testkit::time::ms;
use testkit::{Client, Received, Rig, Task, at_once, lock, on_each_transport};

fn data(text: &str) -> Received {
    Received::Data(text.into())
}

fn publish(rig: &Rig, to: impl Into<Address>, text: &str) {
    rig.everyone.try_publish(Publication::message(to, Payload::text(text))).unwrap();
}

// ---- The report of a shutdown -----------------------------------------------------------------------------------

/// Begins a shutdown that may take a minute.
fn shut_down(rig: &mut Rig) -> Task<'static, ShutdownReport> {
    let engine = rig.engine.clone();
    let mut end =
        Task::new(async move { engine.shutdown(Shutdown::within(Duration::from_secs(60))).await.unwrap() });
    assert!(end.poll().is_none());
    rig.settle();
    end
}

/// Lets the shutdown finish, and returns what it reports.
fn report(rig: &mut Rig, mut end: Task<'static, ShutdownReport>) -> ShutdownReport {
    rig.settle();
    rig.pass(Duration::from_secs(70));
    rig.shards.clear();
    end.poll().expect("all shards have ended")
}

on_each_transport!(a_connection_that_fails_while_its_handler_is_busy_is_reported_once);
fn a_connection_that_fails_while_its_handler_is_busy_is_reported_once() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    client.peer.text("wait");
    rig.settle();
    let end = shut_down(&mut rig);
    client.peer.stream.shutdown(Half::Both).unwrap();
    publish(&rig, Address::Everyone, "still accepted, but the write fails");
    rig.settle();
    client.release();
    let report = report(&mut rig, end);
    assert_eq!(report.flushed + report.cut_off, 1, "{report:?}");
}

#[test] // not over TLS: what TCP acknowledges the client has not read
fn a_client_that_has_ended_its_side_counts_as_flushed_when_it_has_taken_everything() {
    for takes_it in [true, false] {
        let mut rig = Rig::new(1);
        let mut client = rig.connect();
        client.peer.text("wait");
        client.peer.stream.shutdown(Half::Write).unwrap();
        rig.settle();
        publish(&rig, Address::Everyone, "the last");
        let end = shut_down(&mut rig);
        client.release();
        rig.settle();
        if takes_it {
            assert_eq!(client.peer.receive_data(), ["the last"]);
            rig.pass(ms(50));
            assert_eq!(rig.engine.metrics().connections, 0, "the shard waits for nothing more");
        }
        let report = report(&mut rig, end);
        assert_eq!((report.flushed, report.cut_off), if takes_it { (1, 0) } else { (0, 1) }, "{report:?}");
    }
}

on_each_transport!(a_client_that_is_refused_while_it_sends_gets_the_close_frame);
fn a_client_that_is_refused_while_it_sends_gets_the_close_frame() {
    let mut rig = Rig::new(1);
    let (new_connection, mut client) = new_connection(&rig.engine, &rig.config, 4096);
    let mut other = rig.connect();
    other.peer.text("wait");
    rig.settle();
    let _end = shut_down(&mut rig); // which waits for the other connection
    client.peer.text("hello");
    at_once(rig.everyone.adopt(new_connection)).unwrap();
    rig.settle();
    // Not with a reset: that would have destroyed the Close frame.
    let mut received = Vec::new();
    client.peer.stream.set_nonblocking(true).unwrap();
    client.peer.stream.read_to_end(&mut received).unwrap();
    assert_eq!(received, [0x88, 2, 0x03, 0xE9]);
}

on_each_transport!(a_connection_whose_handler_closes_slowly_is_reported_once);
fn a_connection_whose_handler_closes_slowly_is_reported_once() {
    let mut rig = Rig::new(1);
    let waker = Arc::new(Mutex::new(None));
    let handed = waker.clone();
    let mut peer = rig.connect_handler(Box::new(|_| Box::new(SlowToPart(handed))));
    let mut busy = rig.connect(); // keeps the engine draining
    busy.peer.text("wait");
    rig.settle();
    let end = shut_down(&mut rig);
    peer.stream.shutdown(Half::Both).unwrap();
    publish(&rig, Address::Everyone, "still accepted, but the write fails");
    rig.settle();
    lock(&waker).take().expect("it parts").wake();
    rig.settle();
    busy.release();
    let report = report(&mut rig, end);
    assert_eq!((report.flushed + report.cut_off, report.left_over), (2, 0), "{report:?}");
}

// ---- The client's own Close -------------------------------------------------------------------------------------

on_each_transport!(a_busy_handler_delays_neither_pong_nor_close);
fn a_busy_handler_delays_neither_pong_nor_close() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    for text in ["wait", "two"] {
        client.peer.text(text);
    }
    client.peer.send_frame(0x89, b"are you there");
    rig.settle();
    assert_eq!(
        client.peer.receive(),
        [Received::Pong(b"are you there".to_vec())],
        "although its handler is busy"
    );
    client.peer.text("three");
    client.peer.close(1000);
    rig.settle();
    assert_eq!(
        client.peer.receive(),
        [Received::Close(Some(1000)), Received::End],
        "although its handler is busy"
    );
    assert_eq!(rig.everyone.len(), 0, "it is in no group any more");
    assert_eq!(client.record().calls, ["wait"]);
    client.release();
    rig.settle();
    assert_eq!(client.record().calls, ["wait", "two", "three", "close"], "its messages are handled first");
}

on_each_transport!(messages_before_a_close_are_handled_in_order_even_if_each_takes_time);
fn messages_before_a_close_are_handled_in_order_even_if_each_takes_time() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    for text in ["wait 1", "wait 2", "wait 3"] {
        client.peer.text(text);
    }
    client.peer.close(1000);
    client.peer.stream.shutdown(Half::Write).unwrap();
    rig.settle();
    for handled in 1..=3 {
        assert_eq!(client.record().messages.len(), handled);
        assert_eq!(client.record().ends, []);
        client.release();
        rig.settle();
    }
    assert_eq!(client.record().calls, ["wait 1", "wait 2", "wait 3", "close"]);
}

on_each_transport!(a_client_that_closes_and_still_reads_gets_what_was_queued_and_its_close);
fn a_client_that_closes_and_still_reads_gets_what_was_queued_and_its_close() {
    for coalesce in [ms(0), ms(3)] {
        let engine = EngineConfig { shards: Some(1), coalesce, ..EngineConfig::default() };
        let mut rig = Rig::with(engine, ConnectionConfig::default());
        let mut client = rig.connect();
        publish(&rig, Address::Everyone, "last words");
        client.peer.close(1000);
        client.peer.stream.shutdown(Half::Write).unwrap();
        rig.settle();
        rig.pass(ms(20));
        let received = client.peer.receive_and_answer();
        assert_eq!(
            received,
            [data("last words"), Received::Close(Some(1000)), Received::End],
            "{coalesce:?}"
        );
    }
}

#[test] // not over TLS: a TCP connection keeps all of this backlog
fn a_close_gets_through_despite_a_backlog() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    for _ in 0..8 {
        publish(&rig, Address::Everyone, &"x".repeat(1 << 20));
    }
    rig.settle();
    client.peer.close(1000);
    let mut received = Vec::new();
    // It reads one megabyte per second, while eight wait for it.
    for _ in 0..70 {
        rig.pass(ms(100));
        let mut left: usize = 100_000;
        while left > 0 {
            received.extend(client.peer.receive_some(left.min(20_000)));
            left = left.saturating_sub(20_000);
            rig.settle();
        }
    }
    received.extend(client.peer.receive_and_answer());
    assert_eq!(
        received[received.len() - 2..],
        [Received::Close(Some(1000)), Received::End],
        "{}",
        received.len()
    );
    let whole = |received: &Received| matches!(received, Received::Data(text) if text.len() == 1 << 20);
    assert!(
        received[..received.len() - 2]
            .iter()
            .filter(|received| !matches!(received, Received::Ping(_)))
            .all(whole)
    );
}

on_each_transport!(a_close_without_a_code_is_answered_without_one);
fn a_close_without_a_code_is_answered_without_one() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    client.peer.send_frame(0x88, b"");
    rig.settle();
    assert_eq!(client.peer.receive(), [Received::Close(None), Received::End]);
    let reason = CloseReason::Peer { code: None, text: "".into() };
    assert_eq!(reason.close_frame(), Some((CloseCode::NO_STATUS, "".into())));
    assert_eq!(client.record().ends, [reason]);
}

on_each_transport!(the_reason_in_a_clients_close_reaches_its_handler);
fn the_reason_in_a_clients_close_reaches_its_handler() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    client.peer.send_frame(0x88, &[&4321u16.to_be_bytes()[..], b"tired of waiting"].concat());
    rig.settle();
    let reason = CloseReason::Peer { code: Some(CloseCode(4321)), text: "tired of waiting".into() };
    assert_eq!(client.record().ends, [reason]);
    assert_eq!(client.peer.receive(), [Received::Close(Some(4321)), Received::End]);
}

// ---- A client that ends its side --------------------------------------------------------------------------------

on_each_transport!(the_answer_to_a_last_message_arrives_after_the_client_has_ended_its_side);
fn the_answer_to_a_last_message_arrives_after_the_client_has_ended_its_side() {
    for is_busy in [false, true] {
        let mut rig = Rig::new(1);
        let mut client = rig.connect();
        client.peer.text(if is_busy { "wait" } else { "hello" });
        client.peer.stream.shutdown(Half::Write).unwrap();
        if !is_busy {
            // The answer is sent before the shard has read the end of the stream.
            publish(&rig, Address::Connection(client.id()), "the answer");
        }
        rig.settle();
        if is_busy {
            assert_eq!(client.record().ends, [], "its handler may still have an answer");
            publish(&rig, Address::Connection(client.id()), "the answer");
            rig.settle();
            client.release();
            rig.settle();
        }
        assert_eq!(client.peer.receive_data(), ["the answer"], "busy: {is_busy}");
        assert_eq!(client.record().ends, [CloseReason::Disconnected]);
        assert!(rig.metrics_of(client.id()).is_none(), "nothing is left of it");
    }
}

// ---- Simultaneous ends ------------------------------------------------------------------------------------------

on_each_transport!(a_client_that_has_ended_its_side_is_not_pinged_while_its_answer_is_prepared);
fn a_client_that_has_ended_its_side_is_not_pinged_while_its_answer_is_prepared() {
    let timeout = Some(ms(100));
    let config = ConnectionConfig {
        heartbeat_interval: Some(ms(100)),
        pong_timeout: ms(100),
        idle_timeout: timeout,
        message_timeout: timeout,
        ..ConnectionConfig::default()
    };
    let mut rig = Rig::one(config);
    let mut client = rig.connect();
    client.peer.text("wait");
    client.peer.stream.shutdown(Half::Write).unwrap();
    rig.settle();
    rig.pass(ms(5000));
    assert_eq!(client.record().ends, []);
    publish(&rig, Address::Connection(client.id()), "the answer");
    client.release();
    rig.settle();
    assert_eq!(client.peer.receive(), [data("the answer"), Received::End]);
    rig.settle();
    assert_eq!(client.record().ends, [CloseReason::Disconnected]);
}

/// Is busy with its first message, and panics or closes when it is resumed.
struct EndsWhenResumed(bool, Arc<Mutex<Vec<&'static str>>>, Arc<Mutex<Option<Waker>>>);

impl Handler for EndsWhenResumed {
    fn on_message(&mut self, _: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        lock(&self.1).push("message");
        *lock(&self.2) = Some(context.waker());
        Poll::Pending
    }

    fn on_resume(&mut self, context: &mut Context<'_>) -> Poll<()> {
        assert!(!self.0, "on purpose");
        context.close(CloseReason::Application { code: CloseCode(4000), text: "enough".into() });
        Poll::Ready(())
    }

    fn on_close(&mut self, _: &CloseReason, _: &mut Context<'_>) -> Poll<()> {
        lock(&self.1).push("close");
        Poll::Ready(())
    }
}

on_each_transport!(a_handler_that_panics_or_closes_when_it_is_resumed_gets_no_message_that_is_held_for_it);
fn a_handler_that_panics_or_closes_when_it_is_resumed_gets_no_message_that_is_held_for_it() {
    for panics in [true, false] {
        let mut rig = Rig::new(1);
        let (calls, waker) = <(Arc<Mutex<Vec<_>>>, Arc<Mutex<Option<Waker>>>)>::default();
        let handler = EndsWhenResumed(panics, calls.clone(), waker.clone());
        let mut peer = rig.connect_handler(Box::new(|_| Box::new(handler)));
        peer.text("one");
        peer.text("two");
        rig.settle();
        // In one turn the shard reads the Close and resumes the handler.
        peer.close(1000);
        lock(&waker).take().unwrap().wake();
        rig.settle();
        assert_eq!(*lock(&calls), ["message", "close"], "panics: {panics}");
        assert_eq!(rig.shards[0].audit().errors, [""; 0]);
    }
}

on_each_transport!(a_handler_that_panics_or_closes_gets_no_more_messages_from_before_the_end);
fn a_handler_that_panics_or_closes_gets_no_more_messages_from_before_the_end() {
    for last in ["panic", "close"] {
        let mut rig = Rig::new(1);
        let mut client = rig.connect();
        for message in ["wait", "one", last, "two", "three"] {
            client.peer.text(message);
        }
        client.peer.close(1000);
        rig.settle();
        client.release();
        rig.settle();
        let record = client.record();
        assert_eq!(record.messages, ["wait", "one", last]);
        assert_eq!(record.ends.len(), 1, "and is notified of the end once: {:?}", record.ends);
        assert_eq!(rig.shards[0].audit().errors, [""; 0]);
    }
}

on_each_transport!(of_two_simultaneous_ends_the_first_is_recorded_and_reported);
fn of_two_simultaneous_ends_the_first_is_recorded_and_reported() {
    let mut rig = Rig::new(1);
    let mut client = rig.connect();
    for (code, text) in [(4000, "the first"), (4001, "the second")] {
        at_once(rig.everyone.publish(Publication::close(Address::Everyone, CloseCode(code), text).unwrap()))
            .unwrap();
    }
    client.peer.close(1000);
    rig.settle();
    let ends = client.record().ends;
    let [reason] = &ends[..] else { panic!("{ends:?}") };
    let (code, text) = reason.close_frame().unwrap();
    assert_eq!(client.peer.receive(), [Received::Close(Some(code.0)), Received::End], "{reason:?}");
    assert_eq!((client.peer.close_text.as_str(), rig.engine.metrics().ended), (&*text, 1));
}

// ---- The Close frame --------------------------------------------------------------------------------------------

/// How the connection of a client that has sent these bytes ends: reason, close code and text.
fn told_after(bytes: &[u8], config: ConnectionConfig) -> (CloseReason, u16, String) {
    let mut rig = Rig::one(config);
    let mut client = rig.connect();
    let _ = client.peer.send_some(bytes);
    rig.settle();
    let received = client.peer.receive_and_answer();
    let [Received::Close(Some(code)), ..] = received[..] else { panic!("{received:?}") };
    (client.record().ends[0].clone(), code, client.peer.close_text.clone())
}

on_each_transport!(a_protocol_error_is_explained_in_the_close_frame);
fn a_protocol_error_is_explained_in_the_close_frame() {
    let config = ConnectionConfig { max_message_bytes: 100, ..ConnectionConfig::default() };
    let (reason, code, text) = told_after(&client_frame(0x81, &[b'x'; 101]), config.clone());
    assert!(matches!(reason, CloseReason::Protocol(FrameError::MessageTooBig { .. })), "{reason:?}");
    assert!(code == 1009 && text.contains("100"), "{code} {text}");
    let (reason, code, text) = told_after(&client_frame(0xF1, b"x"), config);
    let CloseReason::Protocol(error) = reason else { panic!("{reason:?}") };
    assert_eq!((code, text), (1002, error.to_string()));
}

on_each_transport!(a_close_code_that_may_not_be_sent_is_refused_and_ends_no_connection);
fn a_close_code_that_may_not_be_sent_is_refused_and_ends_no_connection() {
    let mut rig = Rig::new(1);
    let mut clients = rig.connect_many(2);
    for code in [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535].map(CloseCode) {
        for to in [Address::Connection(clients[0].id()), Address::Everyone] {
            let refused = Publication::close(to, code, "upstream gone");
            assert_eq!(refused, Err(InvalidCloseCode(code)));
        }
        let shutdown = Shutdown { code, ..Shutdown::within(ms(100)) };
        assert_eq!(at_once(rig.engine.shutdown(shutdown)), Err(InvalidCloseCode(code)));
    }
    rig.settle();
    assert!(clients.iter_mut().all(|client| client.peer.receive().is_empty()));
    assert_eq!(rig.everyone.len(), 2);
}

// ---- Limits that end a connection -------------------------------------------------------------------------------

on_each_transport!(a_connection_that_joins_too_many_groups_is_ended_with_1008);
fn a_connection_that_joins_too_many_groups_is_ended_with_1008() {
    let mut rig = Rig::one(ConnectionConfig { max_groups: 3, ..ConnectionConfig::default() });
    let mut client = rig.connect();
    let id = client.id();
    for group in ["a", "b", "c", "a"] {
        at_once(rig.everyone.join(id, group)).unwrap();
    }
    at_once(rig.everyone.leave(id, "b")).unwrap();
    at_once(rig.everyone.join(id, "d")).unwrap();
    rig.settle();
    assert_eq!(client.record().ends, [], "three at a time are allowed");
    at_once(rig.everyone.join(id, "e")).unwrap();
    rig.settle();
    assert_eq!(client.record().ends, [CloseReason::TooManyGroups]);
    assert_eq!(client.peer.receive(), [Received::Close(Some(1008)), Received::End]);
    assert_eq!(rig.everyone.group_count(), 0);
}

on_each_transport!(a_group_name_that_is_too_long_is_refused_and_makes_no_group);
fn a_group_name_that_is_too_long_is_refused_and_makes_no_group() {
    let mut rig = Rig::new(1);
    let client = rig.connect();
    let (longest, too_long) = ("x".repeat(GROUP_NAME_BYTES_MAX), "x".repeat(GROUP_NAME_BYTES_MAX + 1));
    assert_eq!(at_once(rig.everyone.join(client.id(), &too_long)), Err(PublishError::GroupNameTooLong));
    rig.settle();
    assert_eq!((rig.everyone.group_count(), client.record().ends.len()), (0, 0));
    assert!(at_once(rig.everyone.join(client.id(), &longest)).is_ok());
    rig.settle();
    assert_eq!(rig.everyone.group_len(&longest), 1);
}

// ---- Contradicting settings -------------------------------------------------------------------------------------

on_each_transport!(settings_that_contradict_each_other_are_refused_by_name);
fn settings_that_contradict_each_other_are_refused_by_name() {
    let connection = ConnectionConfig {
        pong_timeout: ms(500),
        policy: Policy::DropOnHighRtt { max_rtt: ms(501), rtt_samples: 1 },
        ..ConnectionConfig::default()
    };
    let error = connection.validate().unwrap_err();
    assert_eq!((error.field, &*error.value, &*error.highest), ("max_rtt", "501ms", "500ms"));

    let engine = EngineConfig {
        max_connections: 10,
        max_connections_per_address: Some(11),
        ..EngineConfig::default()
    };
    let error = engine.validate().unwrap_err();
    assert_eq!((error.field, &*error.value, &*error.highest), ("max_connections_per_address", "11", "10"));

    // One connection's setting against the engine's: checked at its adoption.
    let engine = EngineConfig { shards: Some(1), unfinished_bytes_max: 1 << 20, ..EngineConfig::default() };
    let connection = ConnectionConfig { max_message_bytes: (1 << 20) + 1, ..ConnectionConfig::default() };
    let rig = Rig::with(engine, connection);
    let (new_connection, Client { .. }) = new_connection(&rig.engine, &rig.config, 4096);
    let Err(AdoptError::Config(error)) = at_once(rig.everyone.adopt(new_connection)) else {
        panic!("refused")
    };
    assert_eq!((error.field, &*error.highest), ("max_message_bytes", "1048576"));
    assert_eq!(rig.engine.connection_count(), 0, "its permit is released");
}

/// Waits in its first message, closes in the second, and must get no third one.
struct ClosesInItsSecondMessage(Arc<Mutex<Vec<String>>>, Arc<Mutex<Option<Waker>>>);

impl Handler for ClosesInItsSecondMessage {
    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        let mut messages = lock(&self.0);
        messages.push(String::from_utf8_lossy(message.payload).into_owned());
        match messages.len() {
            1 => {
                *lock(&self.1) = Some(context.waker());
                return Poll::Pending;
            }
            2 => context.close(CloseReason::Application { code: CloseCode(4000), text: "enough".into() }),
            _ => {}
        }
        Poll::Ready(())
    }

    fn on_resume(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

on_each_transport!(a_handler_that_has_closed_gets_no_message_even_if_the_socket_fails_before_the_end);
fn a_handler_that_has_closed_gets_no_message_even_if_the_socket_fails_before_the_end() {
    // So small an outbox that the log is run one publication a turn, and the end must wait for them.
    let policy = Policy::DropMessage { timeout: Duration::from_secs(1) };
    let mut rig = Rig::one(ConnectionConfig { outbox_frames: 4, policy, ..ConnectionConfig::default() });
    let (messages, waker) = (Arc::default(), Arc::default());
    let handler = ClosesInItsSecondMessage(Arc::clone(&messages), Arc::clone(&waker));
    let mut peer = rig.connect_handler(Box::new(|_| Box::new(handler)));
    for text in ["wait", "close", "too late"] {
        peer.text(text);
    }
    rig.settle();
    let publication = || Publication::message(Address::Everyone, Payload::text("x"));
    let mut published = 0;
    while rig.everyone.try_publish(publication()).is_ok() {
        published += 1;
    }
    assert!(published > 1);
    lock(&waker).take().unwrap().wake();
    while lock(&messages).len() < 2 {
        rig.turn();
    }
    drop(peer);
    rig.settle();
    assert_eq!(*lock(&messages), ["wait", "close"]);
}
