//! What a publication costs by count: wakes, reads of the log, atomic operations, shared cache lines, bytes.
//!
//! `cargo bench -p shardcast-engine --features audit --bench scale`. `-- --test` for small numbers, `-- --connections N`
//! for another number of connections than 1,000,000 (which need some 700 MB).
//!
//! Time depends on the machine; these figures do not, and they can be had for more shards than there are CPUs. The
//! engine is driven by hand on one thread; a shard takes a turn only if its thread would, so wakes are those of an
//! idle engine. Connections are sinks: no socket, so no system call of a write is in it.
//!
//! - *wakes and reads*: publications one by one, each from an idle engine to an idle engine, to a group of two on one
//!   shard and to everyone (one connection on each shard); by `try_publish`, which waits for nothing, and by `deliver`,
//!   which waits for a receipt. *Reads* are those of log entries by all shards; one that sleeps reads them later, 256
//!   at a time. Besides, how long a shard without members takes to pass one.
//! - *scale*: one publication to all connections, and to a group of 1,000 and one of 2 among them. *Operations* are
//!   those on the engine's own atomics, without reference counts (below) and without what is inside of crossbeam's
//!   queues and papaya's map. A *shared line* is a cache line that more than one thread touches for this publication,
//!   and one of them writes; *transfers* is the sum of the threads that touch each of these, which is how often such
//!   a line moves between CPUs at least. Besides that the publisher touches the reference counts of the group (twice)
//!   and every shard that of the payload (twice).
//! - *bytes*: what the publication touches at most: one place in the log for each shard, and for each member the
//!   connection and its entry in the group.
//!
//! Panics if a delivery was lost.

#![allow(clippy::print_stdout, reason = "a report")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shardcast_engine::{Address, AtomicUse, Metrics, Payload, Publication, footprint, record};
use testkit::Task;
use testkit::sinks::Driven;

const SHARDS: [usize; 5] = [2, 4, 8, 16, 64];
const CONNECTIONS: usize = 1_000_000;
/// A shard without members is woken for the first time after 256.
const PUBLICATIONS: u64 = 8192;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let is_test = arguments.iter().any(|argument| argument == "--test");
    let given = arguments.iter().position(|argument| argument == "--connections");
    let given = given.and_then(|at| arguments.get(at + 1));
    let connections = match given.map(|text| text.parse()) {
        Some(Ok(count)) => count,
        Some(Err(error)) => panic!("--connections: {error}"),
        None if is_test => 10_000,
        None => CONNECTIONS,
    };
    memory(connections);
    wakes_and_reads();
    passing();
    scale(connections);
}

fn message(to: Address) -> Publication {
    Publication::message(to, Payload::binary(&[b'x'; 64]))
}

/// What all shards have counted since.
fn since(driven: &Driven, before: &Metrics) -> Metrics {
    let mut now = driven.metrics();
    now.wakes -= before.wakes;
    now.publications -= before.publications;
    now.turns -= before.turns;
    now.tally.written -= before.tally.written;
    now
}

/// First, while nothing else has used the heap.
fn memory(connections: usize) {
    let before = resident_bytes();
    let mut driven = Driven::new(64);
    let ids = driven.connect(connections);
    let each = (resident_bytes() - before) / connections;
    assert_eq!(ids.len(), connections);
    println!("Resident memory of each of {connections} idle connections without sockets: {each} bytes.\n");
}

fn wakes_and_reads() {
    println!("Wakes and reads of the log per publication, each from an idle engine to an idle engine:\n");
    println!("| shards | to | waits for | wakes | reads of the log | turns |");
    println!("|--:|---|---|--:|--:|--:|");
    for shards in SHARDS {
        for (to, name) in
            [(Address::group("two"), "2 on one shard"), (Address::Everyone, "one on each shard")]
        {
            for receipt in [false, true] {
                let mut driven = Driven::new(shards).sleepy();
                let mut ids = driven.connect(2 * shards);
                ids.retain(|id| to == Address::Everyone || id.shard() == 0);
                ids.iter().for_each(|id| driven.join(*id, "two"));
                driven.settle();
                let before = driven.metrics();
                for _ in 0..PUBLICATIONS {
                    publish(&mut driven, &to, receipt);
                }
                let counted = since(&driven, &before);
                let recipients = if to == Address::Everyone { 2 * shards } else { 2 };
                assert_eq!(counted.tally.written, recipients as u64 * PUBLICATIONS);
                let each = |count: u64| count as f64 / PUBLICATIONS as f64;
                let waits_for = if receipt { "a receipt" } else { "nothing" };
                let (wakes, reads, turns) =
                    (each(counted.wakes), each(counted.publications), each(counted.turns));
                println!("| {shards} | {name} | {waits_for} | {wakes:.2} | {reads:.2} | {turns:.2} |");
            }
        }
    }
}

/// What publications to others cost a shard.
fn passing() {
    let mut driven = Driven::new(2);
    let ids = driven.connect(2);
    let member = ids.iter().find(|id| id.shard() == 0).expect("connections are spread");
    driven.join(*member, "other");
    driven.settle();
    let mut shortest = Duration::MAX;
    for _ in 0..100 {
        for _ in 0..1024 {
            driven.everyone().try_publish(message(Address::group("other"))).expect("the log has room");
        }
        let started = Instant::now();
        driven.rig().turn_of(1);
        shortest = shortest.min(started.elapsed());
        driven.settle();
    }
    println!(
        "\nA shard without members passes a publication in {:.1} ns.",
        shortest.as_secs_f64() * 1e9 / 1024.0
    );
}

fn publish(driven: &mut Driven, to: &Address, receipt: bool) {
    let everyone = driven.everyone().clone();
    if receipt {
        let mut delivering = Task::new(everyone.deliver(message(to.clone())));
        assert!(delivering.poll().is_none(), "there are recipients");
        driven.settle();
        assert!(delivering.poll().is_some_and(|receipt| receipt.is_ok()), "all have passed it");
    } else {
        everyone.try_publish(message(to.clone())).expect("the log has room");
        driven.settle();
    }
}

fn scale(connections: usize) {
    let sizes = footprint();
    println!("\nOne publication among {connections} connections:\n");
    println!(
        "| shards | members | wakes | publisher: loads, stores, updates | a shard: the same, per turn | shared lines | \
         transfers | bytes, at most | ns per delivery, one thread |"
    );
    println!("|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    for shards in [1, 4, 16, 64] {
        let mut driven = Driven::new(shards).sleepy();
        let ids = driven.connect(connections);
        driven.settle();
        for (name, size) in [("two", 2), ("thousand", 1000.min(connections))] {
            let members = ids.iter().step_by(connections / size).take(size);
            members.for_each(|id| driven.join(*id, name));
            driven.settle();
        }
        let targets = [
            (Address::Everyone, connections),
            (Address::group("thousand"), 1000.min(connections)),
            (Address::group("two"), 2),
        ];
        for (to, members) in targets {
            let before = driven.metrics();
            let seen = watch(&mut driven, &to);
            let counted = since(&driven, &before);
            assert_eq!(counted.tally.written, members as u64);
            let took = time(&mut driven, &to, members);
            let Seen { publisher, shards: all, busy, turns, lines } = seen;
            let shared: Vec<&Line> =
                lines.values().filter(|line| line.threads > 1 && line.is_written).collect();
            let transfers: u64 = shared.iter().map(|line| line.threads).sum();
            let each = |count: u64| count as f64 / turns.max(1) as f64;
            println!(
                "| {shards} | {members} | {} | {}, {}, {} | {:.1}, {:.1}, {:.1} | {} | {transfers} | {} | {:.1} |",
                counted.wakes,
                publisher.loads,
                publisher.stores,
                publisher.updates,
                each(all.loads),
                each(all.stores),
                each(all.updates),
                shared.len(),
                busy * sizes.log_slot as u64 + members as u64 * sizes.member as u64,
                took.as_secs_f64() * 1e9 / members as f64,
            );
        }
    }
}

/// What one publication did to atomics.
struct Seen {
    publisher: AtomicUse,
    /// All shards together, in so many turns of so many shards.
    shards: AtomicUse,
    busy: u64,
    turns: u64,
    lines: BTreeMap<usize, Line>,
}

#[derive(Default)]
struct Line {
    threads: u64,
    is_written: bool,
}

fn watch(driven: &mut Driven, to: &Address) -> Seen {
    let everyone = driven.everyone().clone();
    let publication = message(to.clone());
    let publisher = record(|| everyone.try_publish(publication).expect("the log has room"));
    let (mut shards, mut lines) = (AtomicUse::default(), BTreeMap::new());
    let (mut busy, mut turns) = (0, 0);
    note_lines(&mut lines, &publisher.lines);
    let rig = driven.rig();
    for index in 0..rig.shards.len() {
        let mut own: BTreeMap<usize, bool> = BTreeMap::new();
        while rig.would_work(index) {
            let used = record(|| rig.turn_of(index));
            shards.loads += used.loads;
            shards.stores += used.stores;
            shards.updates += used.updates;
            used.lines.iter().for_each(|(line, is_written)| *own.entry(*line).or_default() |= is_written);
            turns += 1;
        }
        busy += u64::from(!own.is_empty());
        note_lines(&mut lines, &own);
    }
    Seen { publisher, shards, busy, turns, lines }
}

/// Adds the lines that one thread has touched.
fn note_lines(lines: &mut BTreeMap<usize, Line>, touched: &BTreeMap<usize, bool>) {
    for (line, is_written) in touched {
        let line = lines.entry(*line).or_default();
        line.threads += 1;
        line.is_written |= is_written;
    }
}

/// The shortest of some publications, all shards' turns one after the other.
fn time(driven: &mut Driven, to: &Address, members: usize) -> Duration {
    let rounds = (1_000_000 / members).clamp(3, 100);
    let once = |_| {
        let started = Instant::now();
        driven.everyone().try_publish(message(to.clone())).expect("the log has room");
        driven.settle();
        started.elapsed()
    };
    (0..rounds).map(once).min().unwrap_or_default()
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0);
    pages * 4096
}
