//! The watchdog: detects a blocked shard, which the shard itself cannot report.
//!
//! One thread for each engine that has threads, not pinned. It reads the shards' beacons twice in each
//! `blocked_after`, logs and counts calls that block their shard for longer, and sleeps when all shards have
//! slept for a while. It keeps a shutdown's deadline: it joins the shards' threads, abandons those that are
//! stuck, and completes the report. It returns free memory to the system, where that is wanted. No shard waits for it. Does not know connections, nor what a handler does.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::beacon::Beacons;
use crate::engine_core::EngineCore;
use crate::id::GroupKey;
use crate::shutdown::ShutdownState;
use crate::trim::{Trimmer, trim_heaps};

/// How long after a shutdown's deadline a shard that is still in a turn from before it counts as stuck.
const STUCK_AFTER: Duration = Duration::from_millis(200);
/// How long after the deadline no shard is waited for, whatever it does: time to drop very many connections.
const LOST_AFTER: Duration = Duration::from_secs(1);
/// The interval of looks in between.
const LAST_LOOKS: Duration = Duration::from_millis(50);
/// Number of looks at which all shards sleep, after which the watchdog sleeps, too. More than one: if
/// messages arrive singly, a shard would have to wake it for each.
const QUIET_LOOKS: u32 = 10;
/// The same namespace is not logged again for this time.
const SILENCE: Duration = Duration::from_secs(60);
/// The interval of looks at the number of connections, where the heap is trimmed.
const TRIM_LOOKS: Duration = Duration::from_millis(500);
/// A look that is late by more than this means that the whole process was suspended.
const OVERSLEPT: Duration = Duration::from_millis(100);

pub(crate) struct Watchdog {
    core: Arc<EngineCore>,
    /// The shards' threads.
    threads: Receiver<(usize, JoinHandle<()>)>,
    sampler: Option<Sampler>,
    trimmer: Option<Trimmer>,
}

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Sleep(Option<Duration>),
    Conclude,
}

impl Watchdog {
    pub(crate) fn new(core: Arc<EngineCore>, threads: Receiver<(usize, JoinHandle<()>)>) -> Self {
        let shards = core.mailboxes.len();
        let sampler = core.config.blocked_after.map(|after| Sampler::new(after, shards));
        let trimmer = core.config.trim_heap.then(|| Trimmer::new(Instant::now()));
        Self { core, threads, sampler, trimmer }
    }

    /// Watches until the engine is over.
    pub(crate) fn run(mut self) {
        let EngineCore { beacons, shutdown, .. } = &*self.core;
        let mut quiet_looks = 0;
        loop {
            let now = Instant::now();
            let sample = self.sampler.as_mut().map(|sampler| {
                sampler.sample(beacons, now);
                sampler.period()
            });
            let trims_soon = self.trimmer.as_mut().map(|trimmer| trim(&self.core, trimmer, now));
            let wait = match verdict(shutdown, beacons, now) {
                Next::Conclude => break,
                Next::Sleep(wait) => wait,
            };
            quiet_looks = if beacons.all_sleep() { quiet_looks + 1 } else { 0 };
            let is_quiet = quiet_looks >= QUIET_LOOKS && trims_soon != Some(true) && beacons.fall_asleep();
            quiet_looks = if is_quiet { 0 } else { quiet_looks };
            let looks = sample.into_iter().chain(trims_soon.map(|_| TRIM_LOOKS)).min().filter(|_| !is_quiet);
            match wait.into_iter().chain(looks).min() {
                Some(wait) => thread::park_timeout(wait),
                None => thread::park(),
            }
        }
        self.conclude();
    }

    fn conclude(&self) {
        let EngineCore { shutdown, metrics, mailboxes, .. } = &*self.core;
        let remaining = shutdown.remaining();
        for (shard, thread) in self.threads.try_iter().filter(|(shard, _)| !remaining.contains(shard)) {
            // Only the application's thread-local destructors are still running, which may take their time as well.
            let is_late = || shutdown.plan().is_some_and(|plan| Instant::now() >= plan.by + LOST_AFTER);
            while !thread.is_finished() && !is_late() {
                thread::park_timeout(Duration::from_millis(1));
            }
            if !thread.is_finished() {
                tracing::error!(shard, "a shard has ended, but its thread has not: the thread was abandoned");
            } else if thread.join().is_err() {
                tracing::error!(shard, "a shard's thread panicked");
            }
        }
        for shard in shutdown.conclude(|shard| metrics[shard].read().connections) {
            mailboxes[shard].close(); // its commands will never be executed
            tracing::error!(
                shard,
                "a shard is stuck: it has not ended in time and was abandoned with its connections; a handler computes \
                 or waits on it instead of on another thread"
            );
        }
    }
}

/// Trims the heap if it is time for it; whether that will be so soon.
fn trim(core: &EngineCore, trimmer: &mut Trimmer, now: Instant) -> bool {
    let changes =
        core.metrics.iter().map(|metrics| metrics.read()).map(|read| read.adopted + read.ended).sum();
    if trimmer.look(changes, now) {
        let begun = Instant::now();
        let is_trimmed = trim_heaps();
        tracing::debug!(is_trimmed, took = ?begun.elapsed(), "the heap's free memory was returned to the system");
    }
    trimmer.due().is_some()
}

/// Whether the engine's shutdown is over, or when to look again.
fn verdict(shutdown: &ShutdownState, beacons: &Beacons, now: Instant) -> Next {
    let remaining = shutdown.remaining();
    let Some(plan) = shutdown.plan() else { return Next::Sleep(None) };
    // A turn from before the deadline does not notice it. A shard that has noticed it is dropping its connections.
    let is_stuck = |shard: &usize| beacons.turn_of(*shard).is_some_and(|turn| turn < plan.by);
    if remaining.is_empty()
        || now >= plan.by + LOST_AFTER
        || (now >= plan.by + STUCK_AFTER && remaining.iter().all(is_stuck))
    {
        return Next::Conclude;
    }
    let first_look = (plan.by + STUCK_AFTER).saturating_duration_since(now);
    Next::Sleep(Some(first_look.max(LAST_LOOKS)))
}

/// Detects calls that block their shard for too long, by sampling.
struct Sampler {
    after: Duration,
    looked: Option<Instant>,
    /// The call that each shard was last seen in.
    seen: Box<[Option<Seen>]>,
    records: HashMap<GroupKey, LogRecord>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    call: u64,
    since: Instant,
    is_counted: bool,
}

#[derive(Debug, Clone, Copy)]
struct LogRecord {
    at: Instant,
    /// Calls since then that were not logged.
    suppressed: u64,
}

impl Sampler {
    fn new(after: Duration, shards: usize) -> Self {
        Self { after, looked: None, seen: vec![None; shards].into(), records: HashMap::new() }
    }

    fn period(&self) -> Duration {
        (self.after / 2).min(Duration::from_secs(1))
    }

    fn sample(&mut self, beacons: &Beacons, now: Instant) {
        let allowed = self.period() * 2 + OVERSLEPT;
        let overslept = self.looked.is_some_and(|looked| now.saturating_duration_since(looked) > allowed);
        self.looked = Some(now);
        for shard in 0..self.seen.len() {
            let call = beacons.call_of(shard);
            let seen = &mut self.seen[shard];
            let Some((call, namespace)) = call else {
                *seen = None;
                continue;
            };
            match seen.as_mut().filter(|seen| seen.call == call) {
                None => *seen = Some(Seen { call, since: now, is_counted: false }),
                // No thread ran meanwhile, so this call has not blocked its shard.
                Some(seen) if overslept => seen.since = now,
                Some(seen) => {
                    let held = now.saturating_duration_since(seen.since);
                    if held >= self.after && !std::mem::replace(&mut seen.is_counted, true) {
                        beacons.count_blocked(shard);
                        self.log_call(beacons, shard, namespace, now);
                    }
                }
            }
        }
    }

    /// Logs a call, unless one of the same namespace was logged recently; true if it did.
    fn log_call(&mut self, beacons: &Beacons, shard: usize, namespace: GroupKey, now: Instant) -> bool {
        if let Some(record) = self.records.get_mut(&namespace)
            && now.saturating_duration_since(record.at) < SILENCE
        {
            record.suppressed += 1;
            return false;
        }
        let before = self.records.insert(namespace, LogRecord { at: now, suppressed: 0 });
        self.records.retain(|namespace, _| beacons.name_of(*namespace).is_some()); // forgets dropped ones
        tracing::warn!(
            shard,
            namespace = beacons.name_of(namespace).as_deref().unwrap_or("a dropped one"),
            longer_than = ?self.after,
            not_logged_before = before.map_or(0, |record| record.suppressed),
            "a handler holds its shard, whose other connections wait until it returns: compute and wait on \
             another thread"
        );
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::close_code::CloseCode;
    use crate::shutdown::{EngineState, Shutdown, ShutdownReport};
    use crate::wait_list::Registration;

    const MS: Duration = Duration::from_millis(1);
    const NAMESPACE: GroupKey = GroupKey(7);

    /// A sampler for one shard and 100 ms, with a name that is kept.
    fn sampler() -> (Sampler, Beacons, Arc<str>, Instant) {
        let start = Instant::now();
        let (beacons, name) = (Beacons::new(1, start), Arc::from("a name"));
        beacons.name(NAMESPACE, &name);
        (Sampler::new(100 * MS, 1), beacons, name, start)
    }

    #[test]
    fn a_call_that_blocks_its_shard_is_counted_once_and_not_too_early() {
        let (mut sampler, beacons, _name, start) = sampler();
        let call = beacons.call(0, NAMESPACE);
        for (millis, blocked) in [(0, 0), (50, 0), (99, 0), (100, 1), (150, 1), (10_000, 1), (10_050, 1)] {
            sampler.sample(&beacons, start + millis * MS);
            assert_eq!(beacons.blocked(0), blocked, "after {millis} ms");
        }
        drop(call);
        let _next = beacons.call(0, NAMESPACE);
        sampler.sample(&beacons, start + 10_100 * MS);
        sampler.sample(&beacons, start + 10_200 * MS);
        assert_eq!(beacons.blocked(0), 2, "the next call counts for itself");
    }

    #[test]
    fn many_short_calls_block_nothing() {
        let (mut sampler, beacons, _name, start) = sampler();
        for look in 0..100 {
            let _call = beacons.call(0, NAMESPACE);
            sampler.sample(&beacons, start + look * 50 * MS);
        }
        assert_eq!(beacons.blocked(0), 0);
    }

    #[test]
    fn a_suspended_process_counts_no_call_as_blocking() {
        let (mut sampler, beacons, _name, start) = sampler();
        let _call = beacons.call(0, NAMESPACE);
        sampler.sample(&beacons, start);
        sampler.sample(&beacons, start + 3_600_000 * MS);
        assert_eq!(beacons.blocked(0), 0);
    }

    #[test]
    fn each_namespace_is_logged_at_most_once_a_minute() {
        let (mut sampler, beacons, _name, start) = sampler();
        let other: Arc<str> = "another".into();
        beacons.name(GroupKey(8), &other);
        let mut log_call =
            |key, seconds| sampler.log_call(&beacons, 0, GroupKey(key), start + Duration::from_secs(seconds));
        assert_eq!(
            [log_call(7, 0), log_call(7, 1), log_call(8, 2), log_call(7, 59), log_call(7, 60)],
            [true, false, true, false, true]
        );
        for key in 100..200 {
            assert!(log_call(key, 61), "a dropped namespace has no name, and is not remembered");
        }
        assert!(sampler.records.len() <= 2);
    }

    #[test]
    fn a_shutdown_abandons_stuck_shards_and_waits_for_the_others() {
        let start = Instant::now();
        let (shutdown, beacons) = (ShutdownState::new(3), Beacons::new(3, start));
        assert_eq!(verdict(&shutdown, &beacons, start), Next::Sleep(None));
        shutdown.ask(Shutdown::within(1000 * MS), start);
        beacons.turn(1, start + 500 * MS); // which does not end
        shutdown.shard_has_ended(0, &ShutdownReport { flushed: 3, ..ShutdownReport::default() });
        let at = |millis: u32| verdict(&shutdown, &beacons, start + millis * MS);
        assert_eq!(at(500), Next::Sleep(Some(700 * MS)));
        assert_eq!(at(1200), Next::Sleep(Some(50 * MS)), "the third sleeps: it is only slow to wake");
        assert_eq!(at(2000), Next::Conclude, "no longer than that");
        beacons.turn(2, start + 1001 * MS);
        assert_eq!(at(1300), Next::Sleep(Some(50 * MS)), "it drops its connections");
        shutdown.shard_has_ended(2, &ShutdownReport { flushed: 4, ..ShutdownReport::default() });
        assert_eq!(at(1199), Next::Sleep(Some(50 * MS)));
        assert_eq!(at(1200), Next::Conclude);
        assert_eq!(shutdown.state(), EngineState::Stopping);
        assert_eq!(shutdown.conclude(|shard| 10 * shard as u64), [1]);
        let report = ShutdownReport { flushed: 7, cut_off: 10, left_over: 0, stuck: vec![1] };
        let polled = || shutdown.poll(&mut Registration::default(), std::task::Waker::noop());
        assert_eq!(polled(), std::task::Poll::Ready(report.clone()));
        shutdown.shard_has_ended(1, &ShutdownReport { flushed: 5, ..ShutdownReport::default() });
        assert_eq!(polled(), std::task::Poll::Ready(report), "a late report changes nothing");
        assert_eq!(shutdown.state(), EngineState::Ended);
    }

    #[test]
    fn a_shutdown_is_over_as_soon_as_all_shards_have_ended() {
        let start = Instant::now();
        let (shutdown, beacons) = (ShutdownState::new(2), Beacons::new(2, start));
        let code = CloseCode::GOING_AWAY;
        shutdown.ask(Shutdown { within: 1000 * MS, close_window: Duration::ZERO, code }, start);
        for shard in 0..2 {
            assert_ne!(verdict(&shutdown, &beacons, start), Next::Conclude);
            shutdown.shard_has_ended(shard, &ShutdownReport::default());
        }
        assert_eq!(verdict(&shutdown, &beacons, start), Next::Conclude);
    }
}
