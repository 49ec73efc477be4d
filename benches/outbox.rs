//! The cost of outboxes: one frame offered and flushed, many frames coalesced into one write, and frames for a slow
//! consumer.
//!
//! `cargo bench --bench outbox`. Outboxes are private to the engine, so these are whole turns of one shard that the
//! bench drives itself: a publication passes through the log and the group of all connections into outboxes. Elements
//! are deliveries, so the reciprocal of the throughput is the time per delivery. Panics if the counters are not exact.
//!
//! - `flush/1 to 1000`: one publication for 1000 sinks, until all is written.
//! - `flush/64 to 1000`: 64 publications that are in the log together: one piece of memory, one write for each sink.
//! - `full/1 to 100`: one publication for 100 clients that do not read, whose sockets and outboxes are full, with
//!   `DropMessage { timeout: 0 }`: dropped, counted, and reported to the handler.

#![allow(missing_docs)] // criterion's macros make public items without any

mod audience;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use audience::driven::Driven;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use shardcast_engine::{ConnectionConfig, Payload, Policy, Socket};

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
            let mut audience = Driven::new(1);
            audience.add_sinks(MEMBERS);
            let mut published = 0;
            bencher.iter(|| {
                audience.publish(&frame, publications);
                audience.settle();
                published += publications;
            });
            audience.check(MEMBERS as u64, published);
        });
    }
    group.finish();
}

/// Clients that do not read, with full sockets and outboxes. The caller must keep their ends open.
fn stall(audience: &mut Driven) -> Vec<UnixStream> {
    let (ours, theirs): (Vec<_>, Vec<_>) =
        (0..STALLED).map(|_| UnixStream::pair().expect("a socket pair can be opened")).unzip();
    let policy = Policy::DropMessage { timeout: Duration::ZERO };
    let config = ConnectionConfig { outbox_frames: 16, policy, ..audience::config() };
    audience.adopt(ours.into_iter().map(Socket::from), config);
    // All accept the same frames, and the first frame that does not fit is dropped for all.
    let large = Payload::binary(&[b'x'; 16 << 10]);
    while audience.metrics().tally.dropped.overflow == 0 {
        audience.publish(&large, 1);
        audience.settle();
    }
    theirs
}

fn full(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("full");
    let frame = frame();
    group.throughput(Throughput::Elements(STALLED as u64));
    group.bench_function(format!("1 to {STALLED}"), |bencher| {
        let mut audience = Driven::new(1);
        let _peers = stall(&mut audience);
        let before = audience.metrics();
        let mut published = 0;
        bencher.iter(|| {
            audience.publish(&frame, 1);
            audience.settle();
            published += 1;
        });
        let after = audience.metrics();
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
