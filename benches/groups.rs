//! The cost of memberships: joining, leaving, and closing while in many groups.
//!
//! `cargo bench --bench groups`. The bench drives the shard itself, so there are no threads and no wakes in these
//! numbers: they include the call, the directory, the command through the mailbox, the shard's index, and a small part
//! of a turn. Panics if a group has the wrong members.
//!
//! - `join/in G groups`, `leave/in G groups`: one connection that is in G groups joins or leaves another one, which has
//!   no other member, so that the group is created or removed. Must not depend on G, except for effects of the CPU's
//!   caches.
//! - `join/of N members`, `leave/of N members`: a connection joins or leaves a group of N others. Must not depend on N,
//!   with the same exception.
//! - `end/in G groups`: a connection in G groups is closed. The elements are memberships. The groups have no other
//!   member, so each of them is removed, too: the most expensive case.

#![allow(missing_docs)] // criterion's macros make public items without any

mod audience;

use std::time::{Duration, Instant};

use audience::CLOSE_TIMEOUT;
use audience::driven::Driven;
use criterion::measurement::WallTime;
use criterion::{
    Bencher, BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group,
    criterion_main,
};
use shardcast_engine::ConnectionId;

const GROUPS: [usize; 4] = [1, 100, 10_000, 100_000];
const MEMBERS: [usize; 3] = [1, 1_000, 100_000];
/// Joins or leaves in one turn; they fit a mailbox of 4096.
const BATCH: usize = 1024;

/// Joins that are followed by the same leaves, so that the state before and after is the same.
struct MembershipChanges {
    audience: Driven,
    list: Vec<(ConnectionId, String)>,
    /// The number of groups, and of members of the first group in `list`, without the joins.
    before: (usize, usize),
}

impl MembershipChanges {
    /// One connection that is in `groups` groups joins others.
    fn of_one_connection_in(groups: usize) -> Self {
        let mut audience = Driven::new(1);
        let member = audience.add_sinks(1)[0];
        names("own", groups).for_each(|name| audience.join(member, &name));
        Self::new(audience, names("other", BATCH).map(|name| (member, name)).collect())
    }

    /// Many connections join one group that has `members` without them.
    fn to_one_group_of(members: usize) -> Self {
        let mut audience = Driven::new(1);
        audience.add_sinks(members).into_iter().for_each(|id| audience.join(id, "large"));
        let list = audience.add_sinks(BATCH).into_iter().map(|id| (id, "large".to_owned())).collect();
        Self::new(audience, list)
    }

    fn new(mut audience: Driven, list: Vec<(ConnectionId, String)>) -> Self {
        audience.settle();
        let before = (audience.everyone.group_count(), audience.everyone.group_len(&list[0].1));
        Self { audience, list, before }
    }

    /// Does the first `count` joins, then the same leaves; returns the time of each.
    fn run(&mut self, count: usize) -> (Duration, Duration) {
        let (audience, list) = (&mut self.audience, &self.list[..count]);
        let started = Instant::now();
        list.iter().for_each(|(id, group)| audience.join(*id, group));
        audience.settle();
        let joined = started.elapsed();
        let same = list.iter().filter(|(_, group)| *group == list[0].1).count();
        assert_eq!(audience.everyone.group_len(&list[0].1), self.before.1 + same);
        let started = Instant::now();
        list.iter().for_each(|(id, group)| audience.leave(*id, group));
        audience.settle();
        let left = started.elapsed();
        let after = (audience.everyone.group_count(), audience.everyone.group_len(&list[0].1));
        assert_eq!(after, self.before);
        (joined, left)
    }
}

/// Calls `run` with at most `batch` iterations at a time, `iterations` in all; returns the sum of the times.
fn in_batches(iterations: u64, batch: usize, mut run: impl FnMut(usize) -> Duration) -> Duration {
    let (mut left, mut took) = (iterations, Duration::ZERO);
    while left > 0 {
        let count = left.min(batch as u64);
        took += run(count as usize);
        left -= count;
    }
    took
}

fn names(prefix: &'static str, count: usize) -> impl Iterator<Item = String> {
    (0..count).map(move |number| format!("{prefix} {number}"))
}

/// The cases `join` and `leave`, for the same changes.
fn measure_changes(criterion: &mut Criterion, case: &str, make: impl Fn() -> MembershipChanges) {
    let mut changes = None;
    let mut measure = |verb: &str, took: fn((Duration, Duration)) -> Duration| {
        group(criterion, verb).bench_function(BenchmarkId::from_parameter(case), |bencher| {
            let changes = changes.get_or_insert_with(&make);
            bencher.iter_custom(|iterations| in_batches(iterations, BATCH, |count| took(changes.run(count))));
        });
    };
    measure("join", |(joined, _)| joined);
    measure("leave", |(_, left)| left);
}

fn join_and_leave(criterion: &mut Criterion) {
    for groups in GROUPS {
        measure_changes(criterion, &format!("in {groups} groups"), || {
            MembershipChanges::of_one_connection_in(groups)
        });
    }
    for members in MEMBERS {
        measure_changes(criterion, &format!("of {members} members"), || {
            MembershipChanges::to_one_group_of(members)
        });
    }
}

fn end(criterion: &mut Criterion) {
    for groups in GROUPS {
        let mut group = group(criterion, "end");
        group.throughput(Throughput::Elements(groups as u64));
        let case = BenchmarkId::from_parameter(format!("in {groups} groups"));
        group.bench_function(case, |bencher| end_in(bencher, groups));
    }
}

fn end_in(bencher: &mut Bencher<'_>, groups: usize) {
    let mut audience = Driven::new(1);
    // Several at once if the cost of one would be small compared with a turn.
    let batch = (BATCH / groups).max(1);
    let names: Vec<Vec<String>> = (0..batch)
        .map(|number| names("own", groups).map(|name| format!("{name} of {number}")).collect())
        .collect();
    bencher.iter_custom(|iterations| {
        in_batches(iterations, batch, |count| {
            let ids = audience.add_sinks(count);
            for (id, names) in ids.iter().zip(&names) {
                names.iter().for_each(|name| audience.join(*id, name));
            }
            audience.settle();
            assert_eq!(audience.everyone.group_count(), count * groups);
            let started = Instant::now();
            ids.into_iter().for_each(|id| audience.close(id));
            audience.settle();
            let took = started.elapsed();
            assert_eq!((audience.everyone.group_count(), audience.everyone.len()), (0, 0));
            audience.pass(2 * CLOSE_TIMEOUT); // sinks do not answer the Close frames
            took
        })
    });
}

fn group<'c>(criterion: &'c mut Criterion, verb: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(verb);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group.sampling_mode(SamplingMode::Flat).sample_size(20);
    group
}

criterion_group!(benches, join_and_leave, end);
criterion_main!(benches);
