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
/// Joins or leaves of one turn; a mailbox of 4096 takes them at once.
const BATCH: usize = 1024;

/// Memberships that are made and taken back while everything else stays as it is.
struct Visits {
    audience: Driven,
    list: Vec<(ConnectionId, String)>,
    /// Groups, and members of the group that is visited first, while there is no visit.
    before: (usize, usize),
}

impl Visits {
    /// Of one connection that is in `groups` groups, to others.
    fn by_member_of(groups: usize) -> Self {
        let mut audience = Driven::new(1);
        let visitor = audience.seat(1)[0];
        names("own", groups).for_each(|name| audience.join(visitor, &name));
        Self::new(audience, names("other", BATCH).map(|name| (visitor, name)).collect())
    }

    /// Of many connections, to one group that has `members` without them.
    fn to_group_of(members: usize) -> Self {
        let mut audience = Driven::new(1);
        audience.seat(members).into_iter().for_each(|id| audience.join(id, "visited"));
        let list = audience.seat(BATCH).into_iter().map(|id| (id, "visited".to_owned())).collect();
        Self::new(audience, list)
    }

    fn new(mut audience: Driven, list: Vec<(ConnectionId, String)>) -> Self {
        audience.settle();
        let before = (audience.everyone.group_count(), audience.everyone.group_len(&list[0].1));
        Self { audience, list, before }
    }

    /// Makes the first `count` visits, then takes them back; how long each of the two took.
    fn pay(&mut self, count: usize) -> (Duration, Duration) {
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
    let mut audience = Driven::new(1);
    // Several at once where one would be little beside a turn.
    let batch = (BATCH / groups).max(1);
    let names: Vec<Vec<String>> = (0..batch)
        .map(|number| names("own", groups).map(|name| format!("{name} of {number}")).collect())
        .collect();
    bencher.iter_custom(|iterations| {
        in_batches(iterations, batch, |count| {
            let ids = audience.seat(count);
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
            audience.pass(2 * CLOSE_TIMEOUT); // nobody answers the Close frames
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
