//! Connections that are opened by their first message, and connections that expire.
//!
//! A client that must say who it is gets nothing before it has, and costs at most the time and the bytes that it was
//! given. A connection whose authentication expires is asked at its time, and ends if nobody prolongs it.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use shardcast_engine::{
    Address, AdoptError, CloseReason, ConnectionConfig, ConnectionId, Context, FirstMessage, Handler,
    Message, Payload, Publication, User, UserLimit,
};
use testkit::client::new_connection_with;
use testkit::time::ms;
use testkit::{RawClient, Received, Rig, at_once, lock, on_each_transport};

#[derive(Default)]
struct Shared {
    id: Option<ConnectionId>,
    calls: Vec<String>,
    /// Each message keeps the handler busy until it is woken.
    is_slow: bool,
    waker: Option<Waker>,
    /// The handler prolongs by itself when it is asked.
    prolongs: bool,
}

struct Recorder(Arc<Mutex<Shared>>);

impl Handler for Recorder {
    fn on_open(&mut self, _: &mut Context<'_>) -> Poll<()> {
        lock(&self.0).calls.push("open".into());
        Poll::Ready(())
    }

    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        let mut shared = lock(&self.0);
        shared.calls.push(String::from_utf8(message.payload.to_vec()).unwrap());
        shared.waker = Some(context.waker());
        if shared.is_slow { Poll::Pending } else { Poll::Ready(()) }
    }

    fn on_expired(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut shared = lock(&self.0);
        shared.calls.push("expired".into());
        if !shared.prolongs {
            context.close(CloseReason::Expired);
        }
        Poll::Ready(())
    }

    fn on_close(&mut self, reason: &CloseReason, _: &mut Context<'_>) -> Poll<()> {
        lock(&self.0).calls.push(format!("close {}", reason.name()));
        Poll::Ready(())
    }
}

type Record = Arc<Mutex<Shared>>;

fn connect(rig: &mut Rig, first_message: Option<FirstMessage>) -> (RawClient, Record) {
    let shared = Arc::new(Mutex::new(Shared::default()));
    let for_handler = shared.clone();
    let make = move |id| {
        lock(&for_handler).id = Some(id);
        Box::new(Recorder(for_handler)) as Box<dyn Handler>
    };
    let (mut new_connection, peer) =
        new_connection_with(&rig.engine, &rig.config, rig.send_buffer, Box::new(make));
    new_connection.first_message = first_message;
    at_once(rig.everyone.adopt(new_connection)).unwrap();
    rig.settle();
    (peer, shared)
}

const FIRST: Option<FirstMessage> = Some(FirstMessage { within: ms(1000), max_bytes: 10 });

fn calls(shared: &Record) -> Vec<String> {
    std::mem::take(&mut lock(shared).calls)
}

fn publish(rig: &mut Rig, to: impl Into<Address>, text: &str) {
    rig.everyone.try_publish(Publication::message(to, Payload::text(text))).unwrap();
    rig.settle();
}

fn resume(rig: &mut Rig, shared: &Record) {
    let waker = lock(shared).waker.take();
    waker.unwrap().wake();
    rig.settle();
}

on_each_transport!(a_client_gets_nothing_before_its_first_message_was_handled_and_everything_after);
fn a_client_gets_nothing_before_its_first_message_was_handled_and_everything_after() {
    for is_slow in [false, true] {
        let mut rig = Rig::new(2);
        let (mut peer, shared) = connect(&mut rig, FIRST);
        lock(&shared).is_slow = is_slow;
        publish(&mut rig, Address::Everyone, "a secret");
        assert_eq!((calls(&shared).len(), peer.receive()), (0, vec![]), "no hook has run");
        peer.text("me");
        peer.text("more");
        rig.settle();
        if is_slow {
            publish(&mut rig, Address::Everyone, "another secret");
            assert_eq!((calls(&shared), peer.receive()), (vec!["me".to_owned()], vec![]));
            resume(&mut rig, &shared);
            resume(&mut rig, &shared);
            assert_eq!(calls(&shared), ["more"]);
        } else {
            assert_eq!(calls(&shared), ["me", "more"], "in order, and `on_open` was not called");
        }
        publish(&mut rig, Address::Everyone, "hello all");
        assert_eq!(peer.receive_data(), ["hello all"]);
        assert_eq!(rig.everyone.len(), 1);
    }
}

on_each_transport!(a_client_that_says_nothing_is_closed_at_its_deadline);
fn a_client_that_says_nothing_is_closed_at_its_deadline() {
    let mut rig = Rig::new(1);
    let (mut silent, silent_calls) = connect(&mut rig, FIRST);
    let (mut pinging, pinging_calls) = connect(&mut rig, FIRST);
    let (mut unfinished, unfinished_calls) = connect(&mut rig, FIRST);
    rig.pass(ms(500));
    pinging.send_frame(0x89, b"alive");
    unfinished.send_frame(0x01, b"begun");
    rig.pass(ms(499));
    assert_eq!(calls(&silent_calls).len() + calls(&pinging_calls).len() + calls(&unfinished_calls).len(), 0);
    rig.pass(ms(10));
    for (peer, record) in
        [(&mut silent, &silent_calls), (&mut pinging, &pinging_calls), (&mut unfinished, &unfinished_calls)]
    {
        assert_eq!(calls(record), ["close no_first_message"]);
        assert!(peer.receive().contains(&Received::Close(Some(1008))));
    }
}

on_each_transport!(a_handler_that_checks_the_first_message_for_longer_is_waited_for);
fn a_handler_that_checks_the_first_message_for_longer_is_waited_for() {
    let mut rig = Rig::new(1);
    let (mut peer, shared) = connect(&mut rig, FIRST);
    lock(&shared).is_slow = true;
    peer.text("me");
    rig.pass(ms(5000));
    assert_eq!(calls(&shared), ["me"]);
    resume(&mut rig, &shared);
    publish(&mut rig, Address::Everyone, "hello");
    assert!(peer.receive().contains(&Received::Data("hello".into())));
}

on_each_transport!(a_first_message_that_is_too_long_is_refused_at_its_header_and_later_ones_may_be_longer);
fn a_first_message_that_is_too_long_is_refused_at_its_header_and_later_ones_may_be_longer() {
    let mut rig = Rig::new(1);
    let (mut peer, shared) = connect(&mut rig, FIRST);
    peer.send_some(b"\x81\x8B\0\0\0\0"); // 11 bytes are announced
    rig.settle();
    assert_eq!(calls(&shared), ["close protocol"]);
    assert!(peer.receive().contains(&Received::Close(Some(1009))));
    let (mut peer, shared) = connect(&mut rig, FIRST);
    peer.text("0123456789");
    peer.text("0123456789 and more");
    rig.settle();
    assert_eq!(calls(&shared), ["0123456789", "0123456789 and more"]);
}

on_each_transport!(a_client_that_leaves_before_its_first_message_leaves_nothing_behind);
fn a_client_that_leaves_before_its_first_message_leaves_nothing_behind() {
    let mut rig = Rig::new(1);
    let (peer, shared) = connect(&mut rig, FIRST);
    drop(peer);
    rig.settle();
    assert_eq!(calls(&shared), ["close disconnected"]);
    assert_eq!((rig.everyone.len(), rig.engine.connection_count()), (0, 0));
}

on_each_transport!(a_user_who_is_known_by_the_first_message_is_addressed_and_limited_as_any_other);
fn a_user_who_is_known_by_the_first_message_is_addressed_and_limited_as_any_other() {
    let limit = Some(UserLimit::OldestStays(1));
    let mut rig =
        Rig::one(ConnectionConfig { max_connections_per_user: limit, ..ConnectionConfig::default() });
    let config = rig.config.clone();
    let (mut peer, shared) = connect(&mut rig, FIRST);
    let id = lock(&shared).id.unwrap();
    lock(&shared).is_slow = true;
    peer.text("ada");
    rig.settle();
    at_once(rig.everyone.identify(id, User::new("ada"), &config)).unwrap();
    // The handler is done before its shard has carried out the command.
    resume(&mut rig, &shared);
    publish(&mut rig, Address::User("ada".into()), "to ada");
    assert_eq!(peer.receive_data(), ["to ada"]);
    assert_eq!(rig.everyone.user_len("ada"), 1);

    let (_second, shared) = connect(&mut rig, FIRST);
    let second = lock(&shared).id.unwrap();
    let refused = at_once(rig.everyone.identify(second, User::new("ada"), &config));
    assert!(matches!(refused, Err(AdoptError::TooManyConnectionsOfUser)), "{refused:?}");
    // One that is open keeps the user it has.
    at_once(rig.everyone.identify(id, User::new("eve"), &config)).unwrap();
    rig.settle();
    let (_anonymous, shared) = connect(&mut rig, None);
    let anonymous = lock(&shared).id.unwrap();
    at_once(rig.everyone.identify(anonymous, User::new("eve"), &config)).unwrap();
    at_once(rig.everyone.join(anonymous, "room")).unwrap();
    rig.settle();
    assert_eq!(rig.everyone.groups()[0].users, 0, "one that is open without a user has none");
    assert_eq!((rig.everyone.user_len("ada"), rig.everyone.user_len("eve")), (1, 0));
}

on_each_transport!(a_connection_ends_when_it_expires);
fn a_connection_ends_when_it_expires() {
    let mut rig = Rig::new(1);
    let (mut peer, shared) = connect(&mut rig, None);
    let id = lock(&shared).id.unwrap();
    at_once(rig.everyone.expire_at(id, Some(rig.now + ms(700)))).unwrap();
    rig.settle();
    rig.pass(ms(690));
    assert_eq!(calls(&shared), ["open"]);
    rig.pass(ms(20));
    assert_eq!(calls(&shared), ["expired", "close expired"]);
    assert!(peer.receive().contains(&Received::Close(Some(1008))));
}

on_each_transport!(a_time_can_be_replaced_taken_back_and_prolonged_when_asked);
fn a_time_can_be_replaced_taken_back_and_prolonged_when_asked() {
    // No pings, which the client would have to answer.
    let mut rig = Rig::one(ConnectionConfig { heartbeat_interval: None, ..ConnectionConfig::default() });
    let (_peer, shared) = connect(&mut rig, None);
    let id = lock(&shared).id.unwrap();
    lock(&shared).prolongs = true;
    let set = |rig: &mut Rig, at: Option<u64>| {
        at_once(rig.everyone.expire_at(id, at.map(|at| rig.now + ms(at)))).unwrap();
        rig.settle();
    };
    set(&mut rig, Some(100));
    set(&mut rig, Some(500));
    rig.pass(ms(490));
    assert_eq!(calls(&shared), ["open"]);
    rig.pass(ms(20));
    assert_eq!(calls(&shared), ["expired"]);
    set(&mut rig, Some(100));
    set(&mut rig, None);
    rig.pass(ms(20_000));
    assert_eq!(calls(&shared).len(), 0);
    set(&mut rig, Some(0));
    assert_eq!(calls(&shared), ["expired"], "a time that has passed counts at once");
    rig.pass(ms(20_000));
    assert_eq!(calls(&shared).len(), 0, "and is asked about once");
}

on_each_transport!(a_busy_handler_is_asked_afterwards_but_not_for_longer_than_a_close_takes);
fn a_busy_handler_is_asked_afterwards_but_not_for_longer_than_a_close_takes() {
    let mut rig = Rig::one(ConnectionConfig { close_timeout: ms(300), ..ConnectionConfig::default() });
    for (busy, expected) in [(200, "expired"), (400, "close expired")] {
        let (mut peer, shared) = connect(&mut rig, None);
        let id = lock(&shared).id.unwrap();
        (lock(&shared).is_slow, lock(&shared).prolongs) = (true, true);
        peer.text("work");
        rig.settle();
        at_once(rig.everyone.expire_at(id, Some(rig.now + ms(100)))).unwrap();
        rig.settle();
        rig.pass(ms(100 + busy));
        assert_eq!(calls(&shared), ["open", "work"]);
        resume(&mut rig, &shared);
        assert_eq!(calls(&shared), [expected]);
    }
}
