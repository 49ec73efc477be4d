//! Threads under load: small logs and mailboxes, shards that fall asleep, publishers that wait.
//!
//! One engine after the other, each generated from its seed: several publishers join and leave groups and publish
//! to everyone, to groups and to single clients, some awaiting receipts, while every client reads with pauses. Each
//! client must receive exactly what addresses it, in each publisher's order (causal order), and all of them the
//! publications to everyone in one order (total order). An engine that takes longer than a minute has lost a wake.
//!
//! `SOAK_SECONDS` sets the duration in seconds (10), `SOAK_FROM` the first seed (0).

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that tells what it did")]

use std::collections::HashSet;
use std::io::Write;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use shardcast_engine::{
    Address, ConnectionConfig, ConnectionId, Engine, EngineConfig, Namespace, Payload, Publication,
};
use testkit::client::new_connection;
use testkit::frames::client_frame;
use testkit::{Client, RawClient, Received, block_on};

/// After this time an engine counts as stuck, however busy the machine is.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Steps of each publisher.
const STEPS: usize = 60;
/// The last message of each publisher.
const END: &str = "end";
const HELLO: &str = "hello";

/// A pseudo-random number below `end` that follows from a seed (SplitMix64).
fn draw(state: &mut u64, end: u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (mixed ^ (mixed >> 31)) % end
}

fn draw_of(state: &mut u64, among: &[usize]) -> usize {
    among[draw(state, among.len() as u64) as usize]
}

/// Pauses now and then, so that shards fall asleep.
fn pause(state: &mut u64, one_in: u64, micros: u64) {
    if draw(state, one_in) == 0 {
        thread::sleep(Duration::from_micros(draw(state, micros)));
    }
}

/// Reads until each publisher has sent its last message; returns what was received.
fn read(mut peer: RawClient, publishers: u64, mut state: u64) -> Vec<String> {
    let (mut received, mut ends) = (Vec::new(), 0);
    while ends < publishers {
        pause(&mut state, 40, 2000);
        match peer.wait() {
            Received::Data(text) if text == END => ends += 1,
            Received::Data(text) if text == HELLO => {}
            Received::Data(text) => received.push(text.trim_end_matches('.').to_owned()),
            Received::Ping(nonce) => peer.stream.write_all(&client_frame(0x8A, &nonce)).unwrap(),
            other => panic!("{other:?}"),
        }
    }
    received
}

/// Publishes, joins and leaves at random; returns what each client must receive of it.
fn publish(everyone: &Namespace, ids: &[ConnectionId], publisher: usize, mut state: u64) -> Vec<Vec<String>> {
    let group = format!("group {publisher}");
    let mut is_member = vec![false; ids.len()];
    let mut expected: Vec<Vec<String>> = vec![Vec::new(); ids.len()];
    for step in 0..STEPS {
        pause(&mut state, 12, 3000);
        let name = format!("{publisher}:{step}");
        let filler = ".".repeat(draw_of(&mut state, &[0, 100, 2000, 9000]));
        let frame = Payload::text(&format!("{name}{filler}"));
        let one = draw(&mut state, ids.len() as u64) as usize;
        let wants_receipt = draw(&mut state, 3) == 0;
        let (to, targets): (_, Vec<usize>) = match draw(&mut state, 10) {
            0..=2 => {
                block_on(everyone.join(ids[one], &group)).unwrap();
                is_member[one] = true;
                continue;
            }
            3 => {
                block_on(everyone.leave(ids[one], &group)).unwrap();
                is_member[one] = false;
                continue;
            }
            4 | 5 => (Address::Everyone, (0..ids.len()).collect()),
            6 => (Address::Connection(ids[one]), vec![one]),
            _ => (Address::group(&*group), (0..ids.len()).filter(|client| is_member[*client]).collect()),
        };
        targets.iter().for_each(|client| expected[*client].push(name.clone()));
        if wants_receipt {
            let (receipt, count) =
                (block_on(everyone.deliver(Publication::message(&to, frame))).unwrap(), targets.len() as u64);
            assert_eq!((receipt.recipients, receipt.accepted()), (count, count), "{name}");
        } else {
            block_on(everyone.publish(Publication::message(&to, frame))).unwrap();
        }
    }
    block_on(everyone.publish(Publication::message(Address::Everyone, Payload::text(END)))).unwrap();
    expected
}

/// Compares what every client has received with what each publisher has sent to it.
fn check(received: &[Vec<String>], expected: &[Vec<Vec<String>>]) {
    let sets: Vec<HashSet<&String>> = received.iter().map(|received| received.iter().collect()).collect();
    let is_heard_by_all = |name: &&String| sets.iter().all(|set| set.contains(name));
    let order: Vec<&String> = received[0].iter().filter(is_heard_by_all).collect();
    for (client, received) in received.iter().enumerate() {
        let common: Vec<&String> = received.iter().filter(is_heard_by_all).collect();
        assert_eq!(common, order, "one order for all, client {client}");
        for (publisher, expected) in expected.iter().enumerate() {
            let prefix = format!("{publisher}:");
            let from: Vec<&String> = received.iter().filter(|name| name.starts_with(&prefix)).collect();
            let expected: Vec<&String> = expected[client].iter().collect();
            assert_eq!(from, expected, "client {client}, publisher {publisher}");
        }
    }
}

/// Runs one engine; returns the number of messages that were received.
fn run(seed: u64) -> usize {
    let mut state = seed.wrapping_mul(77_777_777);
    let config = EngineConfig {
        shards: Some(1 + draw(&mut state, 4) as usize),
        pin: false,
        log_capacity: draw_of(&mut state, &[2, 4, 16, 64]),
        mailbox_capacity: draw_of(&mut state, &[1, 2, 8, 64]),
        coalesce: Duration::from_millis(draw_of(&mut state, &[0, 0, 1]) as u64),
        read_buffer_bytes: 1024,
        ..EngineConfig::default()
    };
    let engine = Engine::start(config).unwrap();
    let everyone = engine.namespace();
    let count = 2 + draw(&mut state, 6);
    let mut connect = || {
        let outbox_frames = draw_of(&mut state, &[1, 2, 8, 64, 1024]);
        let config = Arc::new(ConnectionConfig { outbox_frames, ..ConnectionConfig::default() });
        let (new_connection, client) = new_connection(&engine, &config, 4096);
        block_on(everyone.adopt(new_connection)).unwrap();
        client
    };
    let clients: Vec<Client> = (0..count).map(|_| connect()).collect();
    // When this completes, all are open and their ids are known.
    let _ =
        block_on(everyone.deliver(Publication::message(Address::Everyone, Payload::text(HELLO)))).unwrap();
    let ids: Vec<_> = clients.iter().map(Client::id).collect();
    let publishers = 1 + draw(&mut state, 4);
    let seeds: Vec<u64> = (0..publishers).map(|_| draw(&mut state, u64::MAX)).collect();
    let (received, expected): (Vec<_>, Vec<_>) = thread::scope(|scope| {
        let readers = clients.into_iter().enumerate();
        let readers: Vec<_> = readers
            .map(|(at, client)| scope.spawn(move || read(client.peer, publishers, seed ^ at as u64)))
            .collect();
        let writers = seeds.into_iter().enumerate();
        let writers: Vec<_> = writers
            .map(|(number, state)| {
                let (everyone, ids) = (&everyone, &ids);
                scope.spawn(move || publish(everyone, ids, number, state))
            })
            .collect();
        let expected = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        (readers.into_iter().map(|reader| reader.join().unwrap()).collect(), expected)
    });
    check(&received, &expected);
    received.iter().map(Vec::len).sum()
}

fn setting(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

#[test]
fn threads_that_wait_sleep_and_wake_lose_and_reorder_nothing() {
    let (seconds, first) = (setting("SOAK_SECONDS", 10), setting("SOAK_FROM", 0));
    let (began, mut seed, mut messages) = (Instant::now(), first, 0);
    while began.elapsed() < Duration::from_secs(seconds) {
        let (tell, told) = mpsc::channel();
        // A stuck engine is abandoned.
        thread::spawn(move || tell.send(run(seed)));
        match told.recv_timeout(TEST_TIMEOUT) {
            Ok(received) => messages += received,
            Err(error) => panic!("SOAK_FROM={seed}: {error}"),
        }
        seed += 1;
    }
    println!("{} engines, {messages} messages in {:?}", seed - first, began.elapsed());
}
