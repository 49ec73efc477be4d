//! Several publishers, and consumers that each see everything: the engine against plain channels.
//!
//! `cargo bench --bench log`. Each case is named after how many threads publish and how many consume; its elements
//! are publications. All threads start at once, and the time ends when every consumer has seen all. Panics if one
//! has not.
//!
//! - `engine`: `Namespace::try_publish` to one sink on each of as many shards as there are consumers. That is more
//!   than the log, which cannot be measured from outside: it carries the whole path of a publication, to outboxes
//!   that are flushed. Publishers that find the log full yield and try again.
//! - `crossbeam`: a bounded channel for each consumer; a publisher sends to one after the other and blocks where
//!   one is full. It gives no common order: two consumers may see two publishers' messages differently.
//! - `tokio`: one `broadcast` channel, which overwrites what a receiver was too slow to see. So that nothing is
//!   lost, publishers look at its length and yield while it is nearly full; that look is part of the time.
//!
//! Each publication is a frame of its own, and each queue takes 4096. Where threads outnumber the CPUs, what is
//! measured is the scheduler as well.

#![allow(missing_docs)] // criterion's macros make public items without any

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use shardcast_engine::Payload;
use testkit::sinks::{self, Running};
use tokio::sync::broadcast;

const PUBLISHERS: [usize; 3] = [1, 2, 4];
const CONSUMERS: [usize; 2] = [1, 2];
/// What every queue takes; the default of `EngineConfig::log_capacity`.
const CAPACITY: usize = 4096;
/// Publications of one iteration, all publishers together. Can be divided by their number.
const TOTAL: u64 = 20_000;

/// Lets all publishers go at once, each with its part of `total`; returns how long it took until all consumers
/// had seen all.
fn race(
    publishers: usize,
    total: u64,
    publish: impl Fn(Payload) + Sync,
    consumers: Vec<impl FnOnce(u64) + Send>,
) -> Duration {
    let start = Barrier::new(publishers + consumers.len() + 1);
    let each = total / publishers as u64;
    thread::scope(|scope| {
        for _ in 0..publishers {
            scope.spawn(|| {
                start.wait();
                (0..each).for_each(|number| publish(Payload::binary(&number.to_be_bytes())));
            });
        }
        let start = &start;
        let consumers = consumers.into_iter().map(|consumer| {
            scope.spawn(move || {
                start.wait();
                consumer(total);
            })
        });
        let consumers: Vec<_> = consumers.collect();
        start.wait();
        let started = Instant::now();
        consumers.into_iter().for_each(|consumer| consumer.join().expect("a consumer sees everything"));
        started.elapsed()
    })
}

fn through_engine(sinks: &mut Running, publishers: usize, total: u64) -> Duration {
    sinks.owe(total);
    let everyone = sinks.everyone().clone();
    let settled = &*sinks;
    let took = race(publishers, total, |frame| sinks::publish(&everyone, frame), vec![|_| settled.settle()]);
    sinks.check();
    took
}

fn through_crossbeam(publishers: usize, consumers: usize, total: u64) -> Duration {
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..consumers).map(|_| crossbeam_channel::bounded::<Payload>(CAPACITY)).unzip();
    let publish = |frame: Payload| {
        let (last, others) = senders.split_last().expect("somebody consumes");
        others.iter().for_each(|sender| sender.send(frame.clone()).expect("the consumer is there"));
        last.send(frame).expect("the consumer is there");
    };
    let consume = |receiver: crossbeam_channel::Receiver<Payload>| {
        move |total| {
            (0..total).for_each(|_| drop(receiver.recv().expect("a publisher is there")));
            assert!(receiver.is_empty());
        }
    };
    race(publishers, total, publish, receivers.into_iter().map(consume).collect())
}

fn through_tokio(publishers: usize, consumers: usize, total: u64) -> Duration {
    let (sender, _) = broadcast::channel::<Payload>(CAPACITY);
    let publish = |frame| {
        // All may pass this at once, and each adds one.
        while sender.len() + publishers > CAPACITY {
            thread::yield_now();
        }
        sender.send(frame).expect("a consumer is there");
    };
    let consume = |mut receiver: broadcast::Receiver<Payload>| {
        move |total| {
            (0..total).for_each(|_| drop(receiver.blocking_recv().expect("nothing was overwritten")));
            assert!(receiver.is_empty());
        }
    };
    let receivers: Vec<_> = (0..consumers).map(|_| sender.subscribe()).collect();
    race(publishers, total, publish, receivers.into_iter().map(consume).collect())
}

fn contention(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("log");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group.throughput(Throughput::Elements(TOTAL));
    for consumers in CONSUMERS {
        let mut sinks = None;
        for publishers in PUBLISHERS {
            let case = format!("{publishers} to {consumers}");
            group.bench_function(BenchmarkId::new("engine", &case), |bencher| {
                let sinks = sinks.get_or_insert_with(|| Running::start(consumers));
                sinks.connect_up_to(consumers); // one on each shard
                bencher.iter_custom(|iterations| through_engine(sinks, publishers, TOTAL * iterations));
            });
            group.bench_function(BenchmarkId::new("crossbeam", &case), |bencher| {
                bencher
                    .iter_custom(|iterations| through_crossbeam(publishers, consumers, TOTAL * iterations));
            });
            group.bench_function(BenchmarkId::new("tokio", &case), |bencher| {
                bencher.iter_custom(|iterations| through_tokio(publishers, consumers, TOTAL * iterations));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, contention);
criterion_main!(benches);
