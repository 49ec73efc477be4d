//! What every backplane promises: one suite for memory, NATS JetStream and Redis Streams, with real servers.
//!
//! The servers are started by the tests, on free ports, and end with them (`testkit-broker`).

#![allow(clippy::unwrap_used, reason = "a test")]

mod broker;

use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use shardcast_backplane::{
    Backplane, Connection, Error, Gap, GapCause, Inbox, NodeId, Position, Reader, Record, Start,
};
use tokio::time::timeout;

use broker::{Broker, Keeps, Memory, Nats, Redis};

/// Generous: a busy machine is not a failure.
const DEADLINE: Duration = Duration::from_secs(60);

async fn within<F: Future>(future: F) -> F::Output {
    timeout(DEADLINE, future).await.expect("it takes too long")
}

async fn append<B: Backplane>(node: &B, text: &str) {
    within(node.append(Bytes::copy_from_slice(text.as_bytes()))).await.unwrap();
}

/// Appends in spite of outages: until it is known that the record has been appended.
async fn insist<B: Backplane>(node: &B, text: &str) {
    while let Err(error) = within(node.append(Bytes::copy_from_slice(text.as_bytes()))).await {
        assert!(error.is_retryable(), "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A reader of each node, which begins with the next record.
async fn readers_of<B: Backplane>(nodes: &[B]) -> Vec<B::Reader> {
    let mut readers = Vec::new();
    for node in nodes {
        readers.push(within(node.read(Start::Tail)).await.unwrap());
    }
    readers
}

/// The next record or gap.
async fn next<R: Reader>(reader: &mut R) -> Result<Record, Gap> {
    within(reader.next()).await.unwrap()
}

async fn text<R: Reader>(reader: &mut R) -> String {
    let record = next(reader).await.expect("nothing was lost");
    String::from_utf8(record.payload.to_vec()).unwrap()
}

/// Reads up to a record with this text.
async fn up_to<R: Reader>(reader: &mut R, last: &str) -> Vec<(Position, String)> {
    let mut seen = Vec::new();
    while seen.last().is_none_or(|(_, text)| text != last) {
        let record = next(reader).await.expect("nothing was lost");
        seen.push((record.position, String::from_utf8(record.payload.to_vec()).unwrap()));
    }
    seen
}

async fn all_nodes_read_the_same_records_in_one_order_without_holes<B: Broker>() {
    let broker = B::start(Keeps::Everything).await;
    let nodes = [broker.node().await, broker.node().await, broker.node().await];
    let mut readers = readers_of(&nodes).await;
    let appends = nodes.iter().enumerate().map(async |(number, node)| {
        for count in 0..50 {
            append(node, &format!("{number}:{count}")).await;
        }
    });
    join_all(appends).await;
    append(&nodes[0], "last").await;
    let mut seen = Vec::new();
    for reader in &mut readers {
        seen.push(up_to(reader, "last").await);
    }
    assert!(seen.iter().all(|other| *other == seen[0]), "one order for all");
    assert_eq!(seen[0].len(), 151);
    for node in 0..3 {
        let own = seen[0].iter().filter(|(_, text)| text.starts_with(&format!("{node}:")));
        assert!(own.map(|(_, text)| text.clone()).eq((0..50).map(|count| format!("{node}:{count}"))));
    }
    for pair in seen[0].windows(2) {
        assert_eq!(pair[0].0.epoch, pair[1].0.epoch);
        assert_eq!(pair[0].0.sequence + 1, pair[1].0.sequence, "no hole");
    }
    assert_eq!(within(nodes[1].tail()).await.unwrap(), seen[0].last().unwrap().0);
}

async fn nodes_that_start_together_share_one_log<B: Broker>() {
    for _ in 0..5 {
        let broker = B::start(Keeps::Everything).await;
        let nodes = within(join_all((0..8).map(|_| broker.node()))).await;
        let mut readers = readers_of(&nodes).await;
        within(join_all(nodes.iter().map(|node| node.append(Bytes::from_static(b"one"))))).await;
        append(&nodes[0], "last").await;
        for reader in &mut readers {
            assert_eq!(up_to(reader, "last").await.len(), nodes.len() + 1);
        }
    }
}

async fn appends_that_are_in_progress_together_are_all_appended_once<B: Broker>() {
    let broker = B::start(Keeps::Everything).await;
    let node = broker.node().await;
    let mut reader = within(node.read(Start::Tail)).await.unwrap();
    let appends = (0..200).map(|number: u32| node.append(Bytes::from(number.to_string())));
    assert!(within(join_all(appends)).await.iter().all(Result::is_ok));
    let mut seen = HashSet::new();
    while seen.len() < 200 {
        assert!(seen.insert(text(&mut reader).await));
    }
    append(&node, "last").await;
    assert_eq!(text(&mut reader).await, "last");
}

async fn reading_begins_where_it_is_told_to<B: Broker>() {
    let broker = B::start(Keeps::Everything).await;
    let node = broker.node().await;
    let before = within(node.tail()).await.unwrap();
    for number in 0..5 {
        append(&node, &number.to_string()).await;
    }
    let tail = within(node.tail()).await.unwrap();
    assert_eq!((tail.epoch, tail.sequence), (before.epoch, before.sequence + 5));
    let other = broker.node().await;
    let middle = Position { sequence: before.sequence + 2, ..before };
    for (start, first) in [(Start::Oldest, "0"), (Start::After(before), "0"), (Start::After(middle), "2")] {
        let mut reader = within(other.read(start)).await.unwrap();
        assert_eq!(text(&mut reader).await, first, "{start:?}");
    }
    for start in [Start::Tail, Start::After(tail)] {
        let mut reader = within(other.read(start)).await.unwrap();
        append(&node, "new").await;
        assert_eq!(text(&mut reader).await, "new", "{start:?}");
        append(&node, "another").await;
        assert_eq!(text(&mut reader).await, "another");
    }
}

async fn an_empty_record_and_the_longest_are_records_and_a_longer_one_is_refused<B: Broker>() {
    let broker = B::start(Keeps::Everything).await;
    let node = broker.node().await;
    let mut reader = within(node.read(Start::Tail)).await.unwrap();
    let max = node.record_bytes_max();
    assert!(max >= 100_000);
    let longest = Bytes::from(vec![7; max]);
    within(node.append(Bytes::new())).await.unwrap();
    within(node.append(longest.clone())).await.unwrap();
    let refused = within(node.append(Bytes::from(vec![7; max + 1]))).await.unwrap_err();
    assert!(
        matches!(refused, Error::TooLong { len, max: told } if len == max + 1 && told == max),
        "{refused}"
    );
    assert!(!refused.is_retryable());
    append(&node, "on").await;
    assert_eq!(next(&mut reader).await.unwrap().payload, Bytes::new());
    assert!(next(&mut reader).await.unwrap().payload == longest);
    assert_eq!(text(&mut reader).await, "on");
}

async fn a_read_that_is_dropped_loses_nothing<B: Broker>() {
    let broker = B::start(Keeps::Everything).await;
    let node = broker.node().await;
    let mut reader = within(node.read(Start::Tail)).await.unwrap();
    let mut seen = Vec::new();
    for number in 0..40 {
        append(&node, &number.to_string()).await;
        // Dropped after its first poll, or some later one.
        if let Ok(record) = timeout(Duration::from_micros(50 * (number % 7)), reader.next()).await {
            seen.push(String::from_utf8(record.unwrap().unwrap().payload.to_vec()).unwrap());
        }
    }
    append(&node, "last").await;
    seen.extend(up_to(&mut reader, "last").await.into_iter().map(|(_, text)| text));
    seen.pop();
    assert!(seen.iter().cloned().eq((0..40).map(|number| number.to_string())), "{seen:?}");
}

async fn a_broker_that_is_killed_and_restarted_loses_nothing_that_was_acknowledged<B: Broker>() {
    let mut broker = B::start(Keeps::Everything).await;
    let nodes = [broker.node().await, broker.node().await];
    let mut readers = readers_of(&nodes).await;
    for number in 0..20 {
        append(&nodes[number % 2], &number.to_string()).await;
    }
    // One reader has read everything before, the other nothing.
    let read = up_to(&mut readers[0], "19").await;
    let mut connection = nodes[0].connection();
    assert_eq!(*connection.borrow(), Connection::Connected);
    broker.kill();
    within(connection.wait_for(|connection| *connection == Connection::Disconnected)).await.unwrap();
    broker.restart().await;
    for number in 20..40 {
        insist(&nodes[number % 2], &number.to_string()).await;
    }
    insist(&nodes[0], "last").await;
    within(connection.wait_for(|connection| *connection == Connection::Connected)).await.unwrap();
    let mut seen = [read, up_to(&mut readers[0], "last").await].concat();
    let other = up_to(&mut readers[1], "last").await;
    assert_eq!(seen, other, "one order for all");
    // What was appended twice, because its first outcome was not known.
    let mut known = HashSet::new();
    seen.retain(|(_, text)| known.insert(text.clone()));
    let texts = (0..40).map(|number: u32| number.to_string()).chain(["last".to_owned()]);
    assert!(seen.into_iter().map(|(_, text)| text).eq(texts));
}

async fn an_append_fails_in_time_while_the_broker_does_not_answer_and_says_that_it_may_be_retried<
    B: Broker,
>() {
    let mut broker = B::start(Keeps::Everything).await;
    let node = broker.node().await;
    append(&node, "before").await;
    broker.kill();
    let failed = within(node.append(Bytes::from_static(b"meanwhile"))).await.unwrap_err();
    assert!(failed.is_retryable(), "{failed}");
    assert!(within(node.tail()).await.unwrap_err().is_retryable());
}

async fn a_reader_that_falls_behind_retention_is_told_and_goes_on<B: Broker>() {
    let broker = B::start(Keeps::Little).await;
    let node = broker.node().await;
    append(&node, "first").await;
    let first = within(node.tail()).await.unwrap();
    let filler = "x".repeat(1000);
    for number in 0..300 {
        append(&node, &format!("{number} {filler}")).await;
    }
    broker.truncate();
    let mut reader = within(node.read(Start::After(first))).await.unwrap();
    let gap = next(&mut reader).await.unwrap_err();
    assert_eq!((gap.after, gap.cause), (first, GapCause::Retention));
    let record = next(&mut reader).await.expect("what is left");
    assert_eq!(record.position, Position { sequence: gap.before.sequence + 1, ..gap.before });
    let number = record.position.sequence - first.sequence - 1;
    assert_eq!(record.payload, format!("{number} {filler}"));
    assert!(number > 0);
    for number in number + 1..300 {
        assert_eq!(text(&mut reader).await, format!("{number} {filler}"));
    }
}

async fn a_log_that_is_lost_begins_anew_in_another_epoch_and_every_reader_is_told<B: Broker>() {
    let mut broker = B::start(Keeps::Nothing).await;
    let nodes = [broker.node().await, broker.node().await];
    let mut readers = readers_of(&nodes).await;
    for number in 0..10 {
        append(&nodes[0], &number.to_string()).await;
    }
    for reader in &mut readers {
        up_to(reader, "9").await;
    }
    let before = within(nodes[0].tail()).await.unwrap();
    broker.kill();
    broker.restart().await;
    insist(&nodes[1], "after").await;
    // More than there were before: what is new has the numbers of what was read, and is not taken for it.
    for _ in 0..20 {
        insist(&nodes[1], "more").await;
    }
    let mut seen = Vec::new();
    for reader in &mut readers {
        let gap = next(reader).await.unwrap_err();
        assert_eq!((gap.after, gap.cause), (before, GapCause::Epoch));
        assert!(gap.before > before, "{gap:?}");
        // Whoever makes the log anew may do so at the same time as another node: then the epoch begins twice.
        let record = loop {
            match next(reader).await {
                Ok(record) => break record,
                Err(gap) => assert_eq!(gap.cause, GapCause::Epoch),
            }
        };
        assert_eq!(record.payload, "after");
        assert!(record.position.epoch > before.epoch);
        seen.push(record.position);
    }
    assert_eq!(seen[0], seen[1]);
    // A position of the former epoch leads to a gap, and to nothing that was there before.
    let mut late = within(nodes[0].read(Start::After(before))).await.unwrap();
    append(&nodes[0], "later").await;
    assert_eq!(next(&mut late).await.unwrap_err().cause, GapCause::Epoch);
}

async fn a_log_that_has_lost_its_end_goes_on_in_another_epoch_and_every_reader_is_told<B: Broker>() {
    let mut broker = B::start(Keeps::Everything).await;
    let nodes = [broker.node().await, broker.node().await];
    let mut readers = readers_of(&nodes).await;
    let silent = broker.node().await;
    for number in 0..20 {
        if number == 10 {
            broker.remember().await;
        }
        insist(&nodes[number % 2], &number.to_string()).await;
    }
    for reader in &mut readers {
        up_to(reader, "19").await;
    }
    let before = within(nodes[0].tail()).await.unwrap();
    broker.go_back().await;
    for reader in &mut readers {
        let gap = next(reader).await.unwrap_err();
        assert_eq!((gap.after, gap.cause), (before, GapCause::Epoch));
        assert!(gap.before > before, "{gap:?}");
    }
    // Later ones go on in the order of positions, with nothing twice, also those of a node that does not read.
    insist(&silent, "on").await;
    let (one, other) = (up_to(&mut readers[0], "on").await, up_to(&mut readers[1], "on").await);
    assert_eq!((&one, one.len()), (&other, 1));
    assert!(one[0].0 > before);
    let mut late = within(nodes[1].read(Start::After(before))).await.unwrap();
    insist(&nodes[0], "later").await;
    assert_eq!(next(&mut late).await.unwrap_err().cause, GapCause::Epoch);
}

async fn what_is_told_to_a_node_reaches_it_and_no_other<B: Broker>() {
    let broker = B::start(Keeps::Everything).await;
    let (here, there) = (broker.node().await, broker.node().await);
    let (one, other) = (NodeId::random(), NodeId::random());
    let mut inbox = within(there.listen(one)).await.unwrap();
    let mut others = within(here.listen(other)).await.unwrap();
    within(here.tell(NodeId::random(), Bytes::from_static(b"to nobody"))).await.unwrap();
    within(here.tell(one, Bytes::from_static(b"to one"))).await.unwrap();
    within(there.tell(other, Bytes::from_static(b"to the other"))).await.unwrap();
    assert_eq!(within(inbox.next()).await.unwrap(), "to one");
    assert_eq!(within(others.next()).await.unwrap(), "to the other");
    // Nothing of it is in the log.
    let mut reader = within(here.read(Start::Oldest)).await.unwrap();
    append(&here, "a record").await;
    assert_eq!(text(&mut reader).await, "a record");
}

/// Makes a test of each function for each broker.
macro_rules! conformance {
    ($($test:ident,)*) => {
        conformance! { memory Memory: $($test,)* }
        conformance! { nats Nats: $($test,)* }
        conformance! { redis Redis: $($test,)* }
    };
    ($module:ident $broker:ident: $($test:ident,)*) => {
        mod $module {
            $(#[tokio::test]
            async fn $test() {
                super::$test::<super::$broker>().await;
            })*
        }
    };
}

conformance! {
    all_nodes_read_the_same_records_in_one_order_without_holes,
    nodes_that_start_together_share_one_log,
    appends_that_are_in_progress_together_are_all_appended_once,
    reading_begins_where_it_is_told_to,
    an_empty_record_and_the_longest_are_records_and_a_longer_one_is_refused,
    a_read_that_is_dropped_loses_nothing,
    a_broker_that_is_killed_and_restarted_loses_nothing_that_was_acknowledged,
    an_append_fails_in_time_while_the_broker_does_not_answer_and_says_that_it_may_be_retried,
    a_reader_that_falls_behind_retention_is_told_and_goes_on,
    a_log_that_is_lost_begins_anew_in_another_epoch_and_every_reader_is_told,
    a_log_that_has_lost_its_end_goes_on_in_another_epoch_and_every_reader_is_told,
    what_is_told_to_a_node_reaches_it_and_no_other,
}
