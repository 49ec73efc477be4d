//! The cost of a fan-out without the kernel: from the publisher to flushed outboxes.
//!
//! `cargo bench --bench fanout`, or a part of it: `cargo bench --bench fanout -- 'delivery/shards=1/1000$'`. The case
//! with a million members needs about 600 MB. Panics if a delivery was lost.
//!
//! - `delivery/shards=S/N`: 64 publications to N sinks, until all are written; then the next 64. The elements are
//!   deliveries, so the reciprocal of the throughput is the time per delivery. It includes the publisher, the waking
//!   of the shards and the waiting for the last of them, which dominate for few members. More shards can only help if
//!   there are CPUs for them and one more for the thread that publishes and waits. If the scheduler puts that thread
//!   on a shard's CPU, the shard preempts it on waking, fewer publications are coalesced, and a delivery costs
//!   several times as much: compare runs only on a machine with a spare CPU.
//! - `publish/awake/shards=S/N`: `try_publish` alone, the publisher's cost while the shards are busy (the bench drives
//!   them itself, between the samples). Must depend neither on S nor on N.
//! - `publish/asleep/shards=S`: the same for idle shards that sleep in their poll. Each shard that has members is woken
//!   by a system call, so this depends on S. It is the cost of a publication in a quiet service.

#![allow(missing_docs)] // criterion's macros make public items without any

mod audience;

use std::time::{Duration, Instant};

use audience::driven::Driven;
use audience::running::Running;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use shardcast_engine::Payload;

const SHARDS: [usize; 4] = [1, 2, 4, 8];
const MEMBERS: [usize; 6] = [1, 10, 100, 1_000, 10_000, 100_000];
/// Measured with one shard only and with few samples, because it is large.
const MILLION: usize = 1_000_000;
const IN_FLIGHT: u64 = 64;
/// Publications that are sure to fit a log of 4096.
const BATCH: u64 = 1024;
/// Long enough for a shard to fall asleep.
const LULL: Duration = Duration::from_micros(200);

/// Small enough that 64 publications to a million members stay below the backlog budget, above which connections are
/// ended.
fn frame() -> Payload {
    Payload::binary(b"12345678")
}

fn delivery(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("delivery");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group.sampling_mode(SamplingMode::Flat);
    let frame = frame();
    for shards in SHARDS {
        // Created by the first selected case; later cases add sinks.
        let mut audience = None;
        for members in MEMBERS.into_iter().chain((shards == 1).then_some(MILLION)) {
            group.sample_size(if members == MILLION { 10 } else { 30 });
            group.throughput(Throughput::Elements(IN_FLIGHT * members as u64));
            group.bench_function(BenchmarkId::new(format!("shards={shards}"), members), |bencher| {
                let audience = audience.get_or_insert_with(|| Running::start(shards));
                audience.grow(members);
                bencher.iter_custom(|iterations| {
                    let started = Instant::now();
                    for _ in 0..iterations {
                        audience.publish(&frame, IN_FLIGHT);
                        audience.settle();
                    }
                    let took = started.elapsed();
                    audience.check();
                    took
                });
            });
        }
    }
    group.finish();
}

fn publish_awake(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("publish/awake");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group.sampling_mode(SamplingMode::Flat).sample_size(30);
    let frame = frame();
    for shards in SHARDS {
        for members in [1, 1_000, 100_000] {
            let mut made = None;
            group.bench_function(BenchmarkId::new(format!("shards={shards}"), members), |bencher| {
                let (audience, published) = made.get_or_insert_with(|| {
                    let mut audience = Driven::new(shards);
                    audience.add_sinks(members);
                    (audience, 0)
                });
                bencher.iter_custom(|iterations| {
                    let mut took = Duration::ZERO;
                    let mut left = iterations;
                    while left > 0 {
                        let count = left.min(BATCH);
                        let started = Instant::now();
                        audience.publish(&frame, count);
                        took += started.elapsed();
                        audience.settle();
                        *published += count;
                        left -= count;
                    }
                    audience.check(members as u64, *published);
                    took
                });
            });
        }
    }
    group.finish();
}

fn publish_asleep(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("publish/asleep");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group.sampling_mode(SamplingMode::Flat).sample_size(30);
    let frame = frame();
    for shards in SHARDS {
        let mut audience = None;
        group.bench_function(format!("shards={shards}"), |bencher| {
            let audience = audience.get_or_insert_with(|| Running::start(shards));
            audience.grow(shards); // one member on each shard
            bencher.iter_custom(|iterations| {
                let mut took = Duration::ZERO;
                for _ in 0..iterations {
                    std::thread::sleep(LULL);
                    let started = Instant::now();
                    audience.publish(&frame, 1);
                    took += started.elapsed();
                    audience.settle();
                }
                audience.check();
                took
            });
        });
    }
    group.finish();
}

criterion_group!(benches, delivery, publish_awake, publish_asleep);
criterion_main!(benches);
