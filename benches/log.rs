//! Several publishers, and several consumers that each see every publication: the engine against plain channels.
//!
//! `cargo bench --bench log`. Each case is named after the number of publishing and of consuming threads; its elements
//! are publications. All threads start at the same time, and the time ends when every consumer has seen all. Panics if
//! a consumer has not.
//!
//! - `engine`: `Namespace::try_publish` to one sink on each shard, with one shard for each consumer. That is more than
//!   the log, which cannot be measured from outside: it includes the whole path of a publication, up to flushed
//!   outboxes. A publisher that finds the log full yields and retries.
//! - `crossbeam`: a bounded channel for each consumer; a publisher sends to them in sequence and blocks on a full one.
//!   It gives no total order: two consumers may see two publishers' messages in different orders.
//! - `tokio`: one `broadcast` channel, which overwrites messages that a receiver was too slow to see. To lose nothing,
//!   publishers check its length and yield while it is nearly full; that check is part of the time.
//!
//! Each publication is a separate frame, and each queue holds 4096. If there are more threads than CPUs, the scheduler
//! is measured as well.

#![allow(missing_docs)] // criterion's macros make public items without any

mod audience;

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use audience::running::Running;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use shardcast_engine::Payload;
use tokio::sync::broadcast;

const PUBLISHERS: [usize; 3] = [1, 2, 4];
const CONSUMERS: [usize; 2] = [1, 2];
/// Capacity of every queue; the default of `EngineConfig::log_capacity`.
const CAPACITY: usize = 4096;
/// Publications per iteration, of all publishers together. Divisible by the number of publishers.
const TOTAL: u64 = 20_000;

/// Starts all publishers at the same time, each with its part of `total`; returns the time until all consumers have
/// seen all publications.
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

fn through_engine(audience: &mut Running, publishers: usize, total: u64) -> Duration {
    audience.expect_publications(total);
    let everyone = audience.everyone.clone();
    let settled = &*audience;
    let took =
        race(publishers, total, |frame| audience::publish(&everyone, frame), vec![|_| settled.settle()]);
    audience.check();
    took
}

fn through_crossbeam(publishers: usize, consumers: usize, total: u64) -> Duration {
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..consumers).map(|_| crossbeam_channel::bounded::<Payload>(CAPACITY)).unzip();
    let publish = |frame: Payload| {
        let (last, others) = senders.split_last().expect("there is a consumer");
        others.iter().for_each(|sender| sender.send(frame.clone()).expect("the consumer is running"));
        last.send(frame).expect("the consumer is running");
    };
    let consume = |receiver: crossbeam_channel::Receiver<Payload>| {
        move |total| {
            (0..total).for_each(|_| drop(receiver.recv().expect("a publisher is running")));
            assert!(receiver.is_empty());
        }
    };
    race(publishers, total, publish, receivers.into_iter().map(consume).collect())
}

fn through_tokio(publishers: usize, consumers: usize, total: u64) -> Duration {
    let (sender, _) = broadcast::channel::<Payload>(CAPACITY);
    let publish = |frame| {
        // All publishers may pass this check at the same time, and each then adds one.
        while sender.len() + publishers > CAPACITY {
            thread::yield_now();
        }
        sender.send(frame).expect("a consumer is running");
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
        let mut audience = None;
        for publishers in PUBLISHERS {
            let case = format!("{publishers} to {consumers}");
            group.bench_function(BenchmarkId::new("engine", &case), |bencher| {
                let audience = audience.get_or_insert_with(|| Running::start(consumers));
                audience.grow(consumers); // one on each shard
                bencher.iter_custom(|iterations| through_engine(audience, publishers, TOTAL * iterations));
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
