//! What memberships cost: joining, leaving, and ending while in many groups.
//!
//! `cargo bench --bench groups`. The shard is turned by hand, so there are no threads and no wakes in these
//! numbers: the call, the directory, the command through the mailbox, the shard's index, and a small part of a turn.
//! Panics if a group has not the members that it should have.
//!
//! - `join/in G groups`, `leave/in G groups`: one connection that is in G groups joins or leaves one more, which
//!   has nobody else, so that the group begins or ends. Must not depend on G, but for what a processor's caches do.
//! - `join/of N members`, `leave/of N members`: a connection joins or leaves a group of N others. Must not depend on
//!   N, likewise.
//! - `end/in G groups`: a connection in G groups is closed, and is in none. Its elements are memberships. Nobody
//!   else is in these groups, so each of them ends, too: the dearest case.

#![allow(missing_docs)] // criterion's macros make public items without any

use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{
    Bencher, BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group,
    criterion_main,
};
use shardcast_engine::ConnectionId;
use testkit::sinks::{CLOSE_TIMEOUT, Driven};

const GROUPS: [usize; 4] = [1, 100, 10_000, 100_000];
const MEMBERS: [usize; 3] = [1, 1_000, 100_000];
/// Joins or leaves of one turn; a mailbox of 4096 takes them at once.
const BATCH: usize = 1024;

/// Memberships that are made and taken back while everything else stays as it is.
struct Visits {
    sinks: Driven,
    list: Vec<(ConnectionId, String)>,
    /// Groups, and members of the group that is visited first, while there is no visit.
    before: (usize, usize),
}

impl Visits {
    /// Of one connection that is in `groups` groups, to others.
    fn by_member_of(groups: usize) -> Self {
        let mut sinks = Driven::new(1);
        let visitor = sinks.connect(1)[0];
        names("own", groups).for_each(|name| sinks.join(visitor, &name));
        Self::new(sinks, names("other", BATCH).map(|name| (visitor, name)).collect())
    }

    /// Of many connections, to one group that has `members` without them.
    fn to_group_of(members: usize) -> Self {
        let mut sinks = Driven::new(1);
        sinks.connect(members).into_iter().for_each(|id| sinks.join(id, "visited"));
        let list = sinks.connect(BATCH).into_iter().map(|id| (id, "visited".to_owned())).collect();
        Self::new(sinks, list)
    }

    fn new(mut sinks: Driven, list: Vec<(ConnectionId, String)>) -> Self {
        sinks.settle();
        let before = (sinks.everyone().group_count(), sinks.everyone().group_len(&list[0].1));
        Self { sinks, list, before }
    }

    /// Makes the first `count` visits, then takes them back; how long each of the two took.
    fn pay(&mut self, count: usize) -> (Duration, Duration) {
        let (sinks, list) = (&mut self.sinks, &self.list[..count]);
        let started = Instant::now();
        list.iter().for_each(|(id, group)| sinks.join(*id, group));
        sinks.settle();
        let joined = started.elapsed();
        let same = list.iter().filter(|(_, group)| *group == list[0].1).count();
        assert_eq!(sinks.everyone().group_len(&list[0].1), self.before.1 + same);
        let started = Instant::now();
        list.iter().for_each(|(id, group)| sinks.leave(*id, group));
        sinks.settle();
        let left = started.elapsed();
        let after = (sinks.everyone().group_count(), sinks.everyone().group_len(&list[0].1));
        assert_eq!(after, self.before);
        (joined, left)
    }
}

/// Sums up what `pay` says of at most `batch` at a time, `iterations` in all.
fn in_batches(iterations: u64, batch: usize, mut pay: impl FnMut(usize) -> Duration) -> Duration {
    let (mut left, mut took) = (iterations, Duration::ZERO);
    while left > 0 {
        let count = left.min(batch as u64);
        took += pay(count as usize);
        left -= count;
    }
    took
}

fn names(prefix: &'static str, count: usize) -> impl Iterator<Item = String> {
    (0..count).map(move |number| format!("{prefix} {number}"))
}

/// `join` and `leave`, for the same visits.
fn visits(criterion: &mut Criterion, case: &str, make: impl Fn() -> Visits) {
    let mut visits = None;
    let mut measure = |verb: &str, took: fn((Duration, Duration)) -> Duration| {
        group(criterion, verb).bench_function(BenchmarkId::from_parameter(case), |bencher| {
            let visits = visits.get_or_insert_with(&make);
            bencher.iter_custom(|iterations| in_batches(iterations, BATCH, |count| took(visits.pay(count))));
        });
    };
    measure("join", |(joined, _)| joined);
    measure("leave", |(_, left)| left);
}

fn join_and_leave(criterion: &mut Criterion) {
    for groups in GROUPS {
        visits(criterion, &format!("in {groups} groups"), || Visits::by_member_of(groups));
    }
    for members in MEMBERS {
        visits(criterion, &format!("of {members} members"), || Visits::to_group_of(members));
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
    let mut sinks = Driven::new(1);
    // Several at once where one would be little beside a turn.
    let batch = (BATCH / groups).max(1);
    let names: Vec<Vec<String>> = (0..batch)
        .map(|number| names("own", groups).map(|name| format!("{name} of {number}")).collect())
        .collect();
    bencher.iter_custom(|iterations| {
        in_batches(iterations, batch, |count| {
            let ids = sinks.connect(count);
            for (id, names) in ids.iter().zip(&names) {
                names.iter().for_each(|name| sinks.join(*id, name));
            }
            sinks.settle();
            assert_eq!(sinks.everyone().group_count(), count * groups);
            let started = Instant::now();
            ids.into_iter().for_each(|id| sinks.close(id));
            sinks.settle();
            let took = started.elapsed();
            assert_eq!((sinks.everyone().group_count(), sinks.everyone().len()), (0, 0));
            sinks.pass(2 * CLOSE_TIMEOUT); // nobody answers the Close frames
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
