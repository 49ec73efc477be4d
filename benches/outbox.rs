//! What outboxes cost: a frame offered and flushed, many flushed as one, and frames for a peer that is full.
//!
//! `cargo bench --bench outbox`. Outboxes cannot be reached from outside, so these are whole turns of one shard,
//! turned by hand: a publication goes through the log and the group of everyone into outboxes. Elements are
//! deliveries, so the reciprocal of the throughput is the time of one. Panics if the books do not add up.
//!
//! - `flush/1 to 1000`: one publication for 1000 sinks, until all is written.
//! - `flush/64 to 1000`: 64 publications that were there at once: one piece of memory, one write for each sink.
//! - `full/1 to 100`: one publication for 100 peers that do not read, whose sockets and outboxes are full, with
//!   `DropMessage { timeout: 0 }`: dropped, counted, and told to the handler.

#![allow(missing_docs)] // criterion's macros make public items without any

use std::os::unix::net::UnixStream;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use shardcast_engine::{ConnectionConfig, Payload, Policy, Socket};
use testkit::sinks::{self, Driven};

const MEMBERS: usize = 1000;
const STALLED: usize = 100;

fn frame() -> Payload {
    Payload::binary(&[b'x'; 64])
}

fn flush(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flush");
    let frame = frame();
    for publications in [1, 64] {
        group.throughput(Throughput::Elements(publications * MEMBERS as u64));
        group.bench_function(format!("{publications} to {MEMBERS}"), |bencher| {
            let mut sinks = Driven::new(1);
            sinks.connect(MEMBERS);
            let mut published = 0;
            bencher.iter(|| {
                sinks.publish(&frame, publications);
                sinks.settle();
                published += publications;
            });
            sinks.check(MEMBERS as u64, published);
        });
    }
    group.finish();
}

/// Peers that do not read, with sockets and outboxes that are full. Their ends have to be kept.
fn stall(sinks: &mut Driven) -> Vec<UnixStream> {
    let (ours, theirs): (Vec<_>, Vec<_>) =
        (0..STALLED).map(|_| UnixStream::pair().expect("there are file descriptors")).unzip();
    let policy = Policy::DropMessage { timeout: Duration::ZERO };
    let config = ConnectionConfig { outbox_frames: 16, policy, ..sinks::config() };
    sinks.adopt(ours.into_iter().map(Socket::from), config);
    // All take the same, and one frame more than the last that fits is dropped by all.
    let large = Payload::binary(&[b'x'; 16 << 10]);
    while sinks.metrics().tally.dropped.overflow == 0 {
        sinks.publish(&large, 1);
        sinks.settle();
    }
    theirs
}

fn full(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("full");
    let frame = frame();
    group.throughput(Throughput::Elements(STALLED as u64));
    group.bench_function(format!("1 to {STALLED}"), |bencher| {
        let mut sinks = Driven::new(1);
        let _peers = stall(&mut sinks);
        let before = sinks.metrics();
        let mut published = 0;
        bencher.iter(|| {
            sinks.publish(&frame, 1);
            sinks.settle();
            published += 1;
        });
        let after = sinks.metrics();
        assert_eq!(after.tally.dropped.overflow - before.tally.dropped.overflow, published * STALLED as u64);
        assert_eq!(
            (after.tally.written, after.tally.pending(), after.ended),
            (before.tally.written, before.tally.pending(), 0)
        );
    });
    group.finish();
}

criterion_group!(benches, flush, full);
criterion_main!(benches);
