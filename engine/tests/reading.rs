//! Whatever a client has sent is read, whenever it arrives: between the turns of a shard, within a record that a read has
//! decrypted in part, or while a busy handler keeps the shard from reading.
//!
//! Driven turn by turn, over each kind of socket that keeps bytes of its own. The kernel announces input once: a shard that
//! forgets an announcement never reads what it was for, unless the client goes on sending.

#![allow(clippy::unwrap_used, reason = "a test")]

use proptest::collection::vec;
use proptest::prelude::*;
use shardcast_engine::{ConnectionConfig, EngineConfig};
use testkit::frames::client_text;
use testkit::stream::{Transport, over};
use testkit::{Client, Rig, lock};

/// Shorter than most messages and records here, so that many reads end within one.
const READ_BYTES: usize = 4096;

#[derive(Debug, Clone)]
enum Step {
    /// The client sends a message of so many bytes, as far as the kernel takes it.
    Send { bytes: usize, keeps_handler_busy: bool },
    /// The shard takes a turn.
    Turn,
    /// A busy handler is free again.
    Release,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = prop_oneof![4..200_usize, 4..40_000_usize];
    prop_oneof![
        2 => (bytes, prop::bool::weighted(0.3))
            .prop_map(|(bytes, keeps_handler_busy)| Step::Send { bytes, keeps_handler_busy }),
        3 => Just(Step::Turn),
        1 => Just(Step::Release),
    ]
}

fn rig() -> Rig {
    let engine = EngineConfig { shards: Some(1), read_buffer_bytes: READ_BYTES, ..EngineConfig::default() };
    Rig::with(engine, ConnectionConfig::default())
}

fn release(client: &Client) {
    let waker = lock(&client.record).waker.take();
    waker.into_iter().for_each(|waker| waker.wake());
}

/// Runs the steps, and then until nothing is left to do.
fn run(steps: &[Step]) {
    let mut rig = rig();
    let mut client = rig.connect();
    let (mut sent, mut unsent) = (Vec::new(), Vec::new());
    for step in steps {
        match *step {
            Step::Send { bytes, keeps_handler_busy } => {
                let number = sent.len();
                let word = if keeps_handler_busy { "wait" } else { "text" };
                sent.push(format!("{word}{number:0width$}", width = bytes - word.len()));
                unsent.extend(client_text(&sent[number]));
            }
            Step::Turn => rig.turn(),
            Step::Release => release(&client),
        }
        let count = client.peer.send_some(&unsent);
        unsent.drain(..count);
    }
    loop {
        release(&client);
        rig.settle();
        let count = client.peer.send_some(&unsent);
        unsent.drain(..count);
        if count == 0 && lock(&client.record).waker.is_none() {
            break;
        }
    }
    assert!(unsent.is_empty(), "the client cannot send the last {} bytes", unsent.len());
    let received = client.record().messages;
    assert_eq!(received.len(), sent.len(), "messages");
    assert_eq!(received, sent);
}

/// Over a kind of socket, whatever the order of steps.
fn everything_is_read(transport: Transport) {
    over(transport, || {
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) };
        proptest!(config, |(steps in vec(step(), 1..60))| run(&steps));
    });
}

#[test]
fn everything_that_a_client_sends_is_read() {
    everything_is_read(Transport::Plain);
}

#[test]
fn everything_that_a_client_sends_over_tls_is_read() {
    everything_is_read(Transport::Tls);
}

#[test]
fn everything_that_a_client_sends_over_tls_with_buffers_is_read() {
    everything_is_read(Transport::BufferedTls);
}

/// The second one arrives when the shard has asked the kernel for the last time, but has not taken all of the first one
/// from the session.
#[test]
fn a_message_that_arrives_within_a_record_of_another_one_is_read() {
    for transport in [Transport::Plain, Transport::Tls, Transport::BufferedTls] {
        over(transport, || {
            for bytes in (1000..33_000).step_by(331) {
                let mut rig = rig();
                let mut client = rig.connect();
                client.peer.text(&"x".repeat(bytes));
                rig.turn();
                client.peer.text("second");
                rig.settle();
                let lengths: Vec<_> = client.record().messages.iter().map(String::len).collect();
                assert_eq!(lengths, [bytes, 6], "{transport:?}");
            }
        });
    }
}
