//! A handler that wants control frames, and a connection that goes on listening after its own Close frame.
//!
//! What a socket of the kind that Axum has needs of the engine: pings and pongs in their place among the messages, and
//! the messages that a client sends until it answers the Close frame (RFC 6455, section 5.5.1).

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use shardcast_engine::{
    Address, CloseCode, CloseReason, ConnectionConfig, ConnectionId, Context, Control, Handler, Message,
    Payload, Publication, Shutdown,
};
use testkit::time::ms;
use testkit::{RawClient, Received, Rig, Task, at_once, lock, on_each_transport};

#[derive(Default)]
struct Shared {
    seen: Vec<String>,
    id: Option<ConnectionId>,
    ends: Vec<CloseReason>,
    /// Each message keeps the handler busy until it is woken.
    is_slow: bool,
    closes_at: Option<&'static str>,
    waker: Option<Waker>,
}

struct Listener(Arc<Mutex<Shared>>);

impl Handler for Listener {
    fn on_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        lock(&self.0).id = Some(context.id());
        Poll::Ready(())
    }

    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        let mut shared = lock(&self.0);
        let text = String::from_utf8(message.payload.to_vec()).unwrap();
        if shared.closes_at == Some(&text) {
            context.close(CloseReason::Application { code: CloseCode(4001), text: "".into() });
        }
        shared.seen.push(text);
        shared.waker = Some(context.waker());
        if shared.is_slow { Poll::Pending } else { Poll::Ready(()) }
    }

    fn wants_control_frames(&self) -> bool {
        true
    }

    fn on_control(&mut self, frame: Control<'_>, _: &mut Context<'_>) -> Poll<()> {
        lock(&self.0).seen.push(match frame {
            Control::Ping(payload) => format!("ping {}", String::from_utf8_lossy(payload)),
            Control::Pong(payload) => format!("pong {}", String::from_utf8_lossy(payload)),
            Control::Close(close) => format!("close {close:?}"),
            _ => unreachable!("no others exist"),
        });
        Poll::Ready(())
    }

    fn on_close(&mut self, reason: &CloseReason, _: &mut Context<'_>) -> Poll<()> {
        lock(&self.0).ends.push(reason.clone());
        Poll::Ready(())
    }
}

fn connect(rig: &mut Rig) -> (RawClient, Arc<Mutex<Shared>>) {
    let shared = Arc::new(Mutex::new(Shared::default()));
    let handler = Listener(shared.clone());
    let peer = rig.connect_handler(Box::new(move |_| Box::new(handler)));
    rig.settle();
    (peer, shared)
}

fn seen(shared: &Mutex<Shared>) -> Vec<String> {
    std::mem::take(&mut lock(shared).seen)
}

fn resume(rig: &mut Rig, shared: &Mutex<Shared>) {
    let waker = lock(shared).waker.take();
    waker.unwrap().wake();
    rig.settle();
}

fn close_and_listen(rig: &mut Rig, shared: &Mutex<Shared>) {
    let id = lock(shared).id.unwrap();
    at_once(rig.everyone.close_and_listen(id, Some((CloseCode::NORMAL, "bye")))).unwrap();
    rig.settle();
}

const OURS: CloseReason =
    CloseReason::Application { code: CloseCode::NORMAL, text: std::borrow::Cow::Borrowed("bye") };

on_each_transport!(control_frames_reach_a_handler_that_wants_them_in_their_place_among_the_messages);
fn control_frames_reach_a_handler_that_wants_them_in_their_place_among_the_messages() {
    let mut rig = Rig::new(1);
    let (mut peer, shared) = connect(&mut rig);
    lock(&shared).is_slow = true;
    for (first_byte, payload) in [(0x81, "one"), (0x89, "a"), (0x8A, "b"), (0x81, "two"), (0x89, "c")] {
        peer.send_frame(first_byte, payload.as_bytes());
    }
    rig.settle();
    assert_eq!(seen(&shared), ["one"]);
    assert_eq!(
        peer.receive(),
        [Received::Pong(b"a".to_vec()), Received::Pong(b"c".to_vec())],
        "answered at once"
    );
    resume(&mut rig, &shared);
    assert_eq!(seen(&shared), ["ping a", "pong b", "two"]);
    resume(&mut rig, &shared);
    assert_eq!(seen(&shared), ["ping c"]);
}

on_each_transport!(the_pong_of_the_engines_own_ping_is_not_passed_on);
fn the_pong_of_the_engines_own_ping_is_not_passed_on() {
    let mut rig =
        Rig::one(ConnectionConfig { heartbeat_interval: Some(ms(100)), ..ConnectionConfig::default() });
    let (mut peer, shared) = connect(&mut rig);
    rig.pass(ms(200));
    let before = peer.receive();
    assert!(
        before.iter().all(|received| matches!(received, Received::Ping(_))) && !before.is_empty(),
        "{before:?}"
    );
    for ping in &before {
        let Received::Ping(nonce) = ping else { continue };
        peer.send_frame(0x8A, nonce);
    }
    rig.settle();
    let id = lock(&shared).id.unwrap();
    assert!(rig.metrics_of(id).unwrap().rtt.last.is_some(), "the engine has it");
    assert_eq!(seen(&shared), Vec::<String>::new());
}

on_each_transport!(pings_and_pongs_can_be_sent_and_only_so_many_wait);
fn pings_and_pongs_can_be_sent_and_only_so_many_wait() {
    let mut rig = Rig::new(1);
    let (mut peer, shared) = connect(&mut rig);
    let id = lock(&shared).id.unwrap();
    at_once(rig.everyone.send_control(id, Control::Ping(b"hello"))).unwrap();
    at_once(rig.everyone.send_control(id, Control::Pong(b"there"))).unwrap();
    rig.settle();
    assert_eq!(peer.receive(), [Received::Ping(b"hello".to_vec()), Received::Pong(b"there".to_vec())]);
    let payload = [7; 125];
    for _ in 0..10 {
        for _ in 0..1000 {
            at_once(rig.everyone.send_control(id, Control::Ping(&payload))).unwrap();
        }
        // All 1000 are carried out in one turn, before anything is written.
        rig.settle();
    }
    let received = peer.receive().len();
    assert!((10..=10 * 16).contains(&received), "{received} pings of 127 bytes for bursts of 1000");
}

on_each_transport!(messages_that_arrive_after_our_close_frame_are_handled_until_the_client_closes);
fn messages_that_arrive_after_our_close_frame_are_handled_until_the_client_closes() {
    for is_slow in [false, true] {
        let mut rig = Rig::new(1);
        let (mut peer, shared) = connect(&mut rig);
        lock(&shared).is_slow = is_slow;
        close_and_listen(&mut rig, &shared);
        assert_eq!(peer.receive(), [Received::Close(Some(1000)), Received::End]);
        assert_eq!(rig.everyone.len(), 0, "it is in no group any more");
        rig.everyone.try_publish(Publication::message(Address::Everyone, Payload::text("late"))).unwrap();
        peer.text("one");
        rig.settle();
        peer.send_frame(0x89, b"still there?");
        peer.text("two");
        rig.settle();
        assert_eq!(lock(&shared).ends, [], "its end is not told before the client has closed");
        peer.close(1000);
        rig.settle();
        if is_slow {
            assert_eq!((seen(&shared), lock(&shared).ends.len()), (vec!["one".to_owned()], 0));
            resume(&mut rig, &shared);
            assert_eq!(seen(&shared), ["ping still there?", "two"]);
            resume(&mut rig, &shared);
            assert_eq!(seen(&shared), ["close Some((CloseCode(1000), \"\"))"]);
        } else {
            let all = ["one", "ping still there?", "two", "close Some((CloseCode(1000), \"\"))"];
            assert_eq!(seen(&shared), all);
        }
        assert_eq!(lock(&shared).ends, [OURS]);
        peer.text("three");
        rig.settle();
        assert_eq!((seen(&shared).len(), lock(&shared).ends.len()), (0, 1));
        assert_eq!(peer.receive(), [Received::End], "no message and no pong follows a Close frame");
    }
}

on_each_transport!(a_client_that_never_answers_our_close_frame_is_given_up_in_time);
fn a_client_that_never_answers_our_close_frame_is_given_up_in_time() {
    let mut rig = Rig::one(ConnectionConfig { close_timeout: ms(500), ..ConnectionConfig::default() });
    let (mut peer, shared) = connect(&mut rig);
    close_and_listen(&mut rig, &shared);
    for _ in 0..4 {
        peer.text("more");
        rig.pass(ms(100));
    }
    assert_eq!((seen(&shared).len(), lock(&shared).ends.len()), (4, 0));
    rig.pass(ms(200));
    assert_eq!(lock(&shared).ends, [OURS]);
    assert_eq!(rig.engine.connection_count(), 0);
}

on_each_transport!(an_end_of_the_stream_or_a_fault_ends_the_listening);
fn an_end_of_the_stream_or_a_fault_ends_the_listening() {
    let faults: [&[u8]; 3] = [b"", b"\x83\x80\0\0\0\0", b"\x81\x81\0\0\0\0\xFF"]; // none, a reserved opcode, no UTF-8
    for fault in faults {
        let mut rig = Rig::new(1);
        let (mut peer, shared) = connect(&mut rig);
        close_and_listen(&mut rig, &shared);
        peer.text("one");
        peer.send_some(fault);
        if fault.is_empty() {
            peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
        } else {
            peer.text("two");
        }
        rig.settle();
        assert_eq!((seen(&shared), lock(&shared).ends.clone()), (vec!["one".to_owned()], vec![OURS]));
    }
}

on_each_transport!(a_handler_that_closes_while_it_listens_gets_nothing_more);
fn a_handler_that_closes_while_it_listens_gets_nothing_more() {
    let mut rig = Rig::new(1);
    let (mut peer, shared) = connect(&mut rig);
    lock(&shared).closes_at = Some("enough");
    close_and_listen(&mut rig, &shared);
    lock(&shared).is_slow = true;
    peer.text("one");
    rig.settle();
    peer.text("enough");
    peer.text("two");
    rig.settle();
    resume(&mut rig, &shared);
    resume(&mut rig, &shared);
    assert_eq!(
        (seen(&shared), lock(&shared).ends.clone()),
        (vec!["one".to_owned(), "enough".to_owned()], vec![OURS])
    );
}

on_each_transport!(a_client_that_sends_no_more_is_not_listened_to_although_it_has_not_read_our_close_frame);
fn a_client_that_sends_no_more_is_not_listened_to_although_it_has_not_read_our_close_frame() {
    let mut rig = Rig::new(1);
    let (mut peer, shared) = connect(&mut rig);
    let big = Payload::text(&"x".repeat(4 << 20));
    rig.everyone.try_publish(Publication::message(Address::Everyone, big)).unwrap();
    close_and_listen(&mut rig, &shared);
    assert_eq!(lock(&shared).ends, []);
    peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
    rig.settle();
    assert_eq!(lock(&shared).ends, [OURS]);
}

#[test] // not over TLS: a TCP connection keeps more than what is sent
fn a_client_cannot_make_a_listening_connection_hold_more_than_an_open_one() {
    let mut rig = Rig::new(1);
    let (mut peer, shared) = connect(&mut rig);
    lock(&shared).is_slow = true;
    close_and_listen(&mut rig, &shared);
    let mut sent = 0;
    for _ in 0..2000 {
        sent += peer.send_some(&testkit::frames::client_frame(0x82, &[0; 1000]));
        rig.turn();
    }
    assert!(sent < 1 << 20, "{sent} bytes were accepted while the handler was busy");
}

on_each_transport!(a_shutdown_ends_the_listening);
fn a_shutdown_ends_the_listening() {
    let mut rig = Rig::new(1);
    let (mut peer, shared) = connect(&mut rig);
    close_and_listen(&mut rig, &shared);
    peer.text("one");
    rig.settle();
    let engine = rig.engine.clone();
    let mut shutdown = Task::new(engine.shutdown(Shutdown::within(Duration::from_secs(1))));
    assert!(shutdown.poll().is_none());
    rig.now = rig.now.max(Instant::now()); // a shutdown's time counts from the real clock
    rig.settle();
    peer.text("two");
    rig.settle();
    assert_eq!((seen(&shared), lock(&shared).ends.clone()), (vec!["one".to_owned()], vec![OURS]));
}

on_each_transport!(unmasked_frames_are_accepted_only_where_they_are_allowed);
fn unmasked_frames_are_accepted_only_where_they_are_allowed() {
    for (accept_unmasked_frames, is_open) in [(false, false), (true, true)] {
        let mut rig = Rig::one(ConnectionConfig { accept_unmasked_frames, ..ConnectionConfig::default() });
        let (mut peer, shared) = connect(&mut rig);
        peer.send_some(b"\x81\x05hello");
        peer.send_some(b"\x81");
        rig.settle();
        peer.send_some(b"\x05ag");
        rig.settle();
        peer.send_some(b"ain");
        rig.settle();
        assert_eq!(lock(&shared).ends.is_empty(), is_open);
        assert_eq!(seen(&shared), if is_open { vec!["hello", "again"] } else { vec![] });
    }
}

on_each_transport!(a_frame_longer_than_its_limit_ends_the_connection_and_a_message_of_several_may_be_longer);
fn a_frame_longer_than_its_limit_ends_the_connection_and_a_message_of_several_may_be_longer() {
    let mut rig = Rig::one(ConnectionConfig { max_frame_bytes: 10, ..ConnectionConfig::default() });
    let (mut peer, shared) = connect(&mut rig);
    peer.send_frame(0x01, b"0123456789");
    peer.send_frame(0x80, b"0123456789");
    peer.send_frame(0x81, b"01234567890");
    rig.settle();
    assert_eq!(seen(&shared), ["01234567890123456789"]);
    assert_eq!(peer.receive()[0], Received::Close(Some(1009)));
}
