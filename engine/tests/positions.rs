//! Positions in the total order, in receipts, joins and handlers' calls.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, Mutex};
use std::task::Poll;

use shardcast_engine::{Address, Context, Handler, Message, Payload, Position, Publication};
use testkit::{Rig, Task, at_once, lock};

/// Sends, lets everything settle, and returns the position.
fn send(rig: &mut Rig, to: Address, text: &str) -> Position {
    let everyone = rig.everyone.clone();
    let mut sending = Task::new(everyone.deliver(Publication::message(&to, Payload::text(text))));
    let early = sending.poll();
    rig.settle();
    early.or_else(|| sending.poll()).expect("every target has accepted it").unwrap().position
}

#[test]
fn a_receipt_gives_the_position_of_its_publication() {
    let mut rig = Rig::new(2);
    let clients = rig.connect_many(2);
    at_once(rig.everyone.join(clients[0].id(), "room")).unwrap();
    let first = send(&mut rig, Address::Everyone, "one");
    let second = send(&mut rig, Address::group("room"), "two");
    assert_eq!([first.sequence, second.sequence], [1, 2]);
    assert_eq!(
        send(&mut rig, Address::Connection(clients[1].id()), "for one"),
        second,
        "after what was published"
    );
    assert_eq!(send(&mut rig, Address::group("nobody"), "for nobody"), second);
    let third = send(&mut rig, Address::groups(["room", "nobody"]), "three");
    assert!(first < second && second < third);
    let mut other = Rig::new(1);
    let _client = other.connect();
    let elsewhere = send(&mut other, Address::Everyone, "one");
    assert_ne!(elsewhere.epoch, first.epoch);
    assert_eq!(elsewhere.partial_cmp(&first), None, "they are not comparable");
}

#[test]
fn a_join_returns_the_position_from_which_publications_include_the_connection() {
    let mut rig = Rig::new(2);
    let mut clients = rig.connect_many(2);
    let mut sent: Vec<_> =
        (0..3).map(|number| send(&mut rig, Address::Everyone, &format!("{number}"))).collect();
    at_once(rig.everyone.join(clients[0].id(), "room")).unwrap();
    rig.settle();
    for number in 3..6 {
        sent.push(send(&mut rig, Address::group("room"), &format!("{number}")));
    }
    let joined = at_once(rig.everyone.join(clients[1].id(), "room")).unwrap();
    for number in 6..9 {
        sent.push(send(&mut rig, Address::group("room"), &format!("{number}")));
    }
    let behind = (3..9).filter(|number| sent[*number] > joined).map(|number| number.to_string());
    let behind: Vec<_> = behind.collect();
    assert_eq!(behind.len(), 3);
    assert_eq!(clients[1].peer.receive_data()[3..], behind, "beside what was for everyone");
}

/// Records the positions of its calls.
struct Noting(Arc<Mutex<Vec<Position>>>);

impl Handler for Noting {
    fn on_message(&mut self, _: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        lock(&self.0).push(context.position());
        Poll::Ready(())
    }
}

#[test]
fn a_handler_knows_its_connections_position() {
    let mut rig = Rig::new(1);
    let noted = Arc::new(Mutex::new(Vec::new()));
    let told = noted.clone();
    let mut peer = rig.connect_handler(Box::new(|_| Box::new(Noting(told))));
    let mut expected = Vec::new();
    for number in 0..3 {
        expected.push(send(&mut rig, Address::Everyone, "news"));
        assert_eq!(peer.receive_data(), ["news"]);
        peer.text(&format!("{number}"));
        rig.settle();
    }
    assert_eq!(*lock(&noted), expected);
}
