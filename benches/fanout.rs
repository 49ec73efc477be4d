//! What a fan-out costs without the kernel: from the publisher to outboxes that are written out.
//!
//! `cargo bench --bench fanout`, or a part of it: `cargo bench --bench fanout -- 'delivery/shards=1/1000$'`. The
//! million needs some 600 MB. Panics if a delivery was lost.
//!
//! - `delivery/shards=S/N`: 64 publications to N sinks, until all are written; then the next 64. Its elements are
//!   deliveries, so the reciprocal of its throughput is the time of one. It includes the publisher, the waking of
//!   the shards and the waiting for the last of them; for few members it is mostly that. More shards can only help
//!   where there are CPUs for them, and one more is taken by who publishes and waits. Where the scheduler puts that
//!   one on a shard's CPU, the shard preempts it when it is woken, less is coalesced, and a delivery costs several
//!   times as much: compare runs only on a machine with a CPU to spare.
//! - `publish/awake/shards=S/N`: `try_publish` alone, what a publisher pays while the shards are busy anyway (they
//!   are turned by hand here, between the samples). Must depend neither on S nor on N.
//! - `publish/asleep/shards=S`: the same, for shards that had nothing to do and sleep in their poll. Each that has
//!   members is woken by a system call, so this depends on S. What a publication in a quiet service costs.

#![allow(missing_docs)] // criterion's macros make public items without any

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use shardcast_engine::Payload;
use testkit::sinks::{Driven, Running};

const SHARDS: [usize; 4] = [1, 2, 4, 8];
const MEMBERS: [usize; 6] = [1, 10, 100, 1_000, 10_000, 100_000];
/// On one shard only, and rarely: it is large.
const MILLION: usize = 1_000_000;
const IN_FLIGHT: u64 = 64;
/// Publications that a log of 4096 surely takes.
const BATCH: u64 = 1024;
/// In which a shard surely falls asleep.
const LULL: Duration = Duration::from_micros(200);

/// So small that 64 for a million stay below the budget for backlogs, beyond which connections are ended.
fn frame() -> Payload {
    Payload::binary(b"12345678")
}

fn delivery(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("delivery");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group.sampling_mode(SamplingMode::Flat);
    let frame = frame();
    for shards in SHARDS {
        // Made by the first case that is selected; later cases let more in.
        let mut sinks = None;
        for members in MEMBERS.into_iter().chain((shards == 1).then_some(MILLION)) {
            group.sample_size(if members == MILLION { 10 } else { 30 });
            group.throughput(Throughput::Elements(IN_FLIGHT * members as u64));
            group.bench_function(BenchmarkId::new(format!("shards={shards}"), members), |bencher| {
                let sinks = sinks.get_or_insert_with(|| Running::start(shards));
                sinks.connect_up_to(members);
                bencher.iter_custom(|iterations| {
                    let started = Instant::now();
                    for _ in 0..iterations {
                        sinks.publish(&frame, IN_FLIGHT);
                        sinks.settle();
                    }
                    let took = started.elapsed();
                    sinks.check();
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
                let (sinks, published) = made.get_or_insert_with(|| {
                    let mut sinks = Driven::new(shards);
                    sinks.connect(members);
                    (sinks, 0)
                });
                bencher.iter_custom(|iterations| {
                    let mut took = Duration::ZERO;
                    let mut left = iterations;
                    while left > 0 {
                        let count = left.min(BATCH);
                        let started = Instant::now();
                        sinks.publish(&frame, count);
                        took += started.elapsed();
                        sinks.settle();
                        *published += count;
                        left -= count;
                    }
                    sinks.check(members as u64, *published);
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
        let mut sinks = None;
        group.bench_function(format!("shards={shards}"), |bencher| {
            let sinks = sinks.get_or_insert_with(|| Running::start(shards));
            sinks.connect_up_to(shards); // one member on each
            bencher.iter_custom(|iterations| {
                let mut took = Duration::ZERO;
                for _ in 0..iterations {
                    std::thread::sleep(LULL);
                    let started = Instant::now();
                    sinks.publish(&frame, 1);
                    took += started.elapsed();
                    sinks.settle();
                }
                sinks.check();
                took
            });
        });
    }
    group.finish();
}

criterion_group!(benches, delivery, publish_awake, publish_asleep);
criterion_main!(benches);
