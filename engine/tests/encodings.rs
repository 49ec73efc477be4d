//! Encodings: connections that receive their payloads in different frames see one order and lose nothing.
//!
//! The second encoding puts a prefix in front of each payload, so that a frame in the wrong encoding is noticed. The
//! test counts how often it renders: publishers render while it is in use, shards only what has no rendition yet.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::mpsc::channel;
use std::thread;

use shardcast_engine::{
    Address, AdoptError, CloseCode, CloseReason, ConnectionConfig, Encoding, Engine, EngineConfig, Frame,
    Payload, Publication,
};
use testkit::client::new_connection;
use testkit::{Client, Received, Rig, Task, at_once, block_on, lock};

const EVERYONE: Address = Address::Everyone;
const PREFIX: &str = "prefixed ";

fn prefixed(payload: &Payload) -> Frame {
    Frame::text(&format!("{PREFIX}{}", std::str::from_utf8(payload.bytes()).unwrap()))
}

/// The text without the prefix, which it has exactly if the encoding adds one.
fn decoded(encoding: Encoding, text: &str) -> String {
    let (rest, has_prefix) = match text.strip_prefix(PREFIX) {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    assert_eq!(has_prefix, encoding != Encoding::PLAIN, "{text} is in another encoding");
    rest.to_owned()
}

/// An engine with an encoding that counts its renditions.
fn counting(shards: usize) -> (Rig, Encoding, Arc<AtomicUsize>) {
    let rig = Rig::new(shards);
    let rendered = Arc::new(AtomicUsize::new(0));
    let count = rendered.clone();
    let encoding = rig.engine.register_encoding(move |payload| {
        count.fetch_add(1, SeqCst);
        prefixed(payload)
    });
    (rig, encoding.unwrap(), rendered)
}

/// An encoding that cannot render `bad`.
fn broken(rig: &Rig) -> Encoding {
    let render = |payload: &Payload| {
        assert_ne!(payload.bytes(), b"bad", "on purpose");
        prefixed(payload)
    };
    rig.engine.register_encoding(render).unwrap()
}

fn adopt_with(rig: &Rig, encoding: Encoding) -> Client {
    let (mut connection, client) = new_connection(&rig.engine, &rig.config, 1 << 16);
    connection.encoding = encoding;
    at_once(rig.everyone.adopt(connection)).unwrap();
    client
}

fn publish(rig: &Rig, to: impl Into<Address>, text: &str) {
    rig.everyone.try_publish(Publication::message(to, Payload::text(text))).unwrap();
}

#[test]
fn a_publisher_renders_once_for_all_shards_while_the_encoding_is_in_use() {
    let (mut rig, encoding, rendered) = counting(3);
    let mut plain: Vec<_> = (0..3).map(|_| adopt_with(&rig, Encoding::PLAIN)).collect();
    rig.settle();
    publish(&rig, EVERYONE, "before the encoding is in use");
    assert_eq!(rendered.load(SeqCst), 0, "no connection uses it");
    let mut others: Vec<_> = (0..6).map(|_| adopt_with(&rig, encoding)).collect();
    rig.settle();
    for client in &others {
        at_once(rig.everyone.join(client.id(), "room")).unwrap();
    }
    rendered.store(0, SeqCst);
    // To everyone, several of which a shard batches; to a group; to several.
    let to = [EVERYONE, EVERYONE, EVERYONE, Address::group("room"), Address::groups(["room", "none"])];
    for (number, to) in to.iter().enumerate() {
        publish(&rig, to, &number.to_string());
        assert_eq!(rendered.load(SeqCst), number + 1, "by the publisher, before any shard has taken a turn");
    }
    rig.settle();
    assert_eq!(rendered.load(SeqCst), to.len(), "and by no shard");
    for client in &mut others {
        let received: Vec<_> = client.peer.receive_data();
        let received: Vec<_> = received.iter().map(|text| decoded(encoding, text)).collect();
        assert_eq!(received, ["0", "1", "2", "3", "4"]);
    }
    for client in &mut plain {
        assert_eq!(client.peer.receive_data(), ["before the encoding is in use", "0", "1", "2"]);
    }
    drop(others);
    rig.settle();
    publish(&rig, EVERYONE, "after them");
    rig.settle();
    assert_eq!(rendered.load(SeqCst), to.len(), "no connection uses it any more");
    assert_eq!(plain[0].peer.receive_data(), ["after them"]);
}

#[test]
fn publications_before_the_first_connection_of_an_encoding_are_rendered_once_by_its_shard() {
    let (mut rig, encoding, rendered) = counting(1);
    let mut plain = adopt_with(&rig, Encoding::PLAIN);
    rig.settle();
    // Both adoptions are in flight, followed by publications that no publisher has rendered.
    let mut others = [adopt_with(&rig, encoding), adopt_with(&rig, encoding)];
    for number in 0..3 {
        publish(&rig, EVERYONE, &number.to_string());
    }
    assert_eq!(rendered.load(SeqCst), 0);
    rig.settle();
    publish(&rig, EVERYONE, "3");
    rig.settle();
    assert_eq!(rendered.load(SeqCst), 4, "each once, for both");
    for client in &mut others {
        let received: Vec<_> = client.peer.receive_data();
        let received: Vec<_> = received.iter().map(|text| decoded(encoding, text)).collect();
        assert_eq!(received, ["0", "1", "2", "3"]);
    }
    assert_eq!(plain.peer.receive_data(), ["0", "1", "2", "3"]);
}

#[test]
fn a_message_to_one_connection_has_its_encoding() {
    let (mut rig, encoding, rendered) = counting(2);
    let mut clients = [adopt_with(&rig, Encoding::PLAIN), adopt_with(&rig, encoding)];
    rig.settle();
    for client in &clients {
        publish(&rig, client.id(), "to one");
    }
    assert_eq!(rendered.load(SeqCst), 0, "only the shard knows what the connection uses");
    rig.settle();
    assert_eq!(rendered.load(SeqCst), 1);
    assert_eq!(clients[0].peer.receive_data(), ["to one"]);
    assert_eq!(clients[1].peer.receive_data(), [format!("{PREFIX}to one")]);
}

#[test]
fn a_publisher_waits_for_room_for_the_longest_rendition() {
    let config = ConnectionConfig { outbox_bytes: 16_000, ..ConnectionConfig::default() };
    let mut rig = Rig::one(config);
    let large = rig.engine.register_encoding(|_| Frame::binary(&[0; 10_000])).unwrap();
    let everyone = rig.everyone.clone();
    let small = || Publication::message(EVERYONE, Payload::text("small"));
    let _plain = adopt_with(&rig, Encoding::PLAIN);
    rig.settle();
    assert_eq!(Task::new(everyone.publish(small())).poll(), Some(Ok(())), "every outbox has room");
    let _large = adopt_with(&rig, large);
    rig.settle();
    let mut publishing = Task::new(everyone.publish(small()));
    assert_eq!(publishing.poll(), None, "more than half of an outbox: it is not known to fit");
    rig.settle();
    assert_eq!(publishing.poll(), Some(Ok(())));
}

#[test]
fn a_publisher_to_one_connection_waits_for_room_for_what_its_message_becomes() {
    let config = ConnectionConfig { outbox_bytes: 16_000, ..ConnectionConfig::default() };
    let mut rig = Rig::one(config);
    let large = rig.engine.register_encoding(|_| Frame::binary(&[0; 10_000])).unwrap();
    let mut client = adopt_with(&rig, large);
    rig.settle();
    let (everyone, id) = (rig.everyone.clone(), client.id());
    let small = || Publication::message(id, Payload::text("small"));
    let mut publishing: Vec<_> = (0..20).map(|_| Task::new(everyone.publish(small()))).collect();
    assert!(publishing.iter_mut().all(|task| task.poll().is_none()), "nobody knows whether it fits");
    rig.settle();
    let accepted = publishing.iter_mut().filter_map(Task::poll).count();
    assert!((1..20).contains(&accepted), "{accepted} of 20 fit into the outbox and the socket");
    while !client.peer.receive().is_empty() {
        rig.settle();
    }
    assert_eq!(accepted + publishing.iter_mut().filter_map(Task::poll).count(), 20);
}

#[test]
fn an_encoding_that_panics_closes_the_connections_that_use_it_and_no_other() {
    let mut rig = Rig::new(2);
    let broken = broken(&rig);
    let mut plain = adopt_with(&rig, Encoding::PLAIN);
    let mut others: Vec<_> = (0..3).map(|_| adopt_with(&rig, broken)).collect();
    rig.settle();
    let one = others.pop().unwrap();
    publish(&rig, EVERYONE, "good");
    publish(&rig, one.id(), "bad");
    rig.settle();
    assert_eq!(one.record().ends, [CloseReason::RenderFailed]);
    assert!(others.iter().all(|client| client.record().ends.is_empty()));
    let everyone = rig.everyone.clone();
    let mut delivering = Task::new(everyone.deliver(Publication::message(EVERYONE, Payload::text("bad"))));
    assert!(delivering.poll().is_none());
    rig.settle();
    let receipt = delivering.poll().unwrap().unwrap();
    assert_eq!((receipt.recipients, receipt.disconnected), (3, 2));
    for client in &mut others {
        assert_eq!(client.record().ends, [CloseReason::RenderFailed]);
        let received = client.peer.receive();
        assert_eq!(received[..2], [Received::Data(format!("{PREFIX}good")), Received::Close(Some(1011))]);
    }
    publish(&rig, EVERYONE, "after it");
    rig.settle();
    assert_eq!(plain.peer.receive_data(), ["good", "bad", "after it"]);
    assert!(plain.record().ends.is_empty());
}

#[test]
fn messages_before_one_that_cannot_be_rendered_arrive_although_they_are_joined_with_it() {
    let mut rig = Rig::new(1);
    let broken = broken(&rig);
    let mut client = adopt_with(&rig, broken);
    rig.settle();
    for text in ["one", "two", "bad", "three"] {
        publish(&rig, EVERYONE, text);
    }
    rig.settle();
    let texts = ["one", "two"].map(|text| Received::Data(format!("{PREFIX}{text}")));
    let received = client.peer.receive();
    assert_eq!(received[..2], texts);
    assert_eq!(received[2..], [Received::Close(Some(1011)), Received::End]);
    assert_eq!(client.record().ends, [CloseReason::RenderFailed]);
    let tally = rig.engine.metrics().tally;
    assert_eq!((tally.offered, tally.written, tally.discarded, tally.pending()), (4, 2, 2, 0));
    assert_eq!(rig.collect_metrics(&EVERYONE, &[]).tally, tally, "the same, added up by connection");
}

#[test]
fn a_message_that_cannot_be_rendered_does_not_end_the_connection_that_it_leaves_out() {
    let mut rig = Rig::new(1);
    let broken = broken(&rig);
    let (mut sender, other) = (adopt_with(&rig, broken), adopt_with(&rig, broken));
    rig.settle();
    for text in ["one", "bad", "two"] {
        let to_others = Publication::message(EVERYONE, Payload::text(text)).except(&[sender.id()]);
        rig.everyone.try_publish(to_others).unwrap();
    }
    publish(&rig, EVERYONE, "three");
    rig.settle();
    assert_eq!(other.record().ends, [CloseReason::RenderFailed]);
    assert!(sender.record().ends.is_empty());
    assert_eq!(sender.peer.receive_data(), [format!("{PREFIX}three")]);
}

#[test]
fn an_encoding_is_out_of_use_when_its_last_connection_ends_although_a_handler_is_busy() {
    let (mut rig, encoding, rendered) = counting(1);
    let mut plain = adopt_with(&rig, Encoding::PLAIN);
    let mut client = adopt_with(&rig, encoding);
    client.peer.text("wait");
    rig.settle();
    client.peer.close(1000);
    rig.settle();
    publish(&rig, EVERYONE, "after it");
    rig.settle();
    assert_eq!(rendered.load(SeqCst), 0);
    assert_eq!(plain.peer.receive_data(), ["after it"]);
    client.release();
    rig.settle();
    publish(&rig, EVERYONE, "at the end");
    assert_eq!(rendered.load(SeqCst), 0);
}

#[test]
fn an_encoding_of_another_engine_is_refused() {
    let (rig, (other, encoding, _)) = (Rig::new(1), counting(1));
    drop(other);
    let (mut connection, _client) = new_connection(&rig.engine, &rig.config, 4096);
    connection.encoding = encoding;
    assert!(matches!(at_once(rig.everyone.adopt(connection)), Err(AdoptError::UnknownEncoding)));
    assert_eq!((rig.everyone.len(), rig.engine.connection_count()), (0, 0));
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Clients of both encodings connect and leave during a flood from several threads, on several shards, so
/// that the second encoding comes into use and out of use in the middle of it. One client sees the whole
/// flood; what any other sees must be a contiguous part of that, in its own encoding.
#[test]
fn clients_of_two_encodings_that_connect_and_leave_during_a_flood_see_one_order_without_gaps() {
    const PUBLISHERS: usize = 3;
    const VISITORS: usize = 48;
    const OPEN_AT_A_TIME: usize = 3;
    let config = EngineConfig { shards: Some(3), pin: false, log_capacity: 64, ..EngineConfig::default() };
    let engine = Engine::start(config).unwrap();
    let everyone = engine.namespace();
    let other = engine.register_encoding(prefixed).unwrap();
    let connection_config = Arc::new(ConnectionConfig::default());
    let connect = |encoding| {
        let (mut connection, client) = new_connection(&engine, &connection_config, 1 << 16);
        connection.encoding = encoding;
        block_on(everyone.adopt(connection)).unwrap();
        client
    };
    let close = |to: Address| {
        block_on(everyone.publish(Publication::close(to, CloseCode::NORMAL, "").unwrap())).unwrap();
    };
    let is_over = AtomicBool::new(false);
    let (whole, parts) = thread::scope(|scope| {
        // A failing test must not leave threads running that publish or read for ever.
        let _end = OnDrop(|| {
            is_over.store(true, Relaxed);
            close(EVERYONE);
        });
        // Reads everything until the client is closed. Sends its id with the first message.
        let read = |encoding| {
            let (Client { mut peer, record }, (tell_id, id)) = (connect(encoding), channel());
            let reader = scope.spawn(move || {
                let mut all = Vec::new();
                loop {
                    match peer.wait() {
                        Received::Data(text) => {
                            if all.is_empty() {
                                tell_id.send(lock(&record).id.unwrap()).unwrap();
                            }
                            all.push(decoded(encoding, &text));
                        }
                        Received::Ping(_) => {}
                        Received::Close(Some(1000)) => return all,
                        received => panic!("{received:?}"),
                    }
                }
            });
            (reader, id)
        };
        let (reference, its_id) = read(Encoding::PLAIN);
        block_on(everyone.publish(Publication::message(EVERYONE, Payload::text("first")))).unwrap();
        let its_id = its_id.recv().unwrap();
        let publishers: Vec<_> = (0..PUBLISHERS)
            .map(|publisher| {
                let (everyone, is_over) = (&everyone, &is_over);
                scope.spawn(move || {
                    for number in (0..).take_while(|_| !is_over.load(Relaxed)) {
                        let payload = Payload::text(&format!("{publisher} {number}"));
                        block_on(everyone.publish(Publication::message(EVERYONE, payload))).unwrap();
                    }
                })
            })
            .collect();
        let (mut visitors, mut open) = (Vec::new(), VecDeque::new());
        for visitor in 0..VISITORS {
            // Runs longer than the number of clients connected at a time: then no connection uses the other encoding.
            let encoding =
                if (visitor / (2 * OPEN_AT_A_TIME)).is_multiple_of(2) { Encoding::PLAIN } else { other };
            let (reader, id) = read(encoding);
            visitors.push(reader);
            open.push_back(id.recv().unwrap());
            if open.len() > OPEN_AT_A_TIME {
                close(open.pop_front().unwrap().into());
            }
        }
        open.into_iter().for_each(|id| close(id.into()));
        is_over.store(true, Relaxed);
        publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
        close(its_id.into());
        let parts: Vec<_> = visitors.into_iter().map(|visitor| visitor.join().unwrap()).collect();
        (reference.join().unwrap(), parts)
    });
    let places: HashMap<_, _> = whole.iter().enumerate().map(|(place, text)| (text, place)).collect();
    assert_eq!(places.len(), whole.len(), "each message once");
    for part in parts {
        let from = places[&part[0]];
        assert_eq!(part, whole[from..from + part.len()], "without gaps");
    }
}
