//! Random histories of an engine, compared with a model of what clients must observe.
//!
//! The engine is driven shard by shard in any sequence, with a clock of the test's own; its shards sleep and
//! are woken as their threads would be. All actions from outside are on this thread, so what is accepted is
//! in one sequence, and each connection must receive exactly its part of it: the model keeps that part. After
//! every turn the shard is inspected (the feature `audit`): tallies, lists, timers and counters must agree.
//!
//! A history follows from its seed alone, as far as the kernel behaves the same, so a failure can be replayed.
//! `HISTORIES_FROM` and `HISTORIES_COUNT` set the seeds (0 and 4,000), `HISTORIES_THREADS` the number of
//! threads (2); `HISTORIES_SEED` runs one and prints its events; with `HISTORIES_OUTSIDE=1` no shard is
//! inspected, which shows the effect of a fault that is visible from outside. `ci/histories` runs any number.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test that tells what it did"
)]

mod checks;
mod handler;
mod history;
mod model;
mod peer;
mod random;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use history::History;
use testkit::lock;

/// The message of a handler's deliberate panic.
const ON_PURPOSE: &str = "as it was told";
/// Failures after which no more histories are begun.
const FAILURES_MAX: usize = 40;

/// Runs one history; returns its faults.
fn run(seed: u64, is_told: bool) -> Vec<String> {
    let mut history = History::new(seed, is_told);
    history.run();
    history.into_faults()
}

/// The same; a panic is a fault as well.
fn run_caught(seed: u64) -> Vec<String> {
    catch_unwind(AssertUnwindSafe(|| run(seed, false)))
        .unwrap_or_else(|panic| vec![format!("panicked: {}", text_of(&*panic).unwrap_or_default())])
}

/// The message of a panic.
fn text_of(panic: &dyn Any) -> Option<String> {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
}

fn setting(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

#[test]
fn random_histories_are_what_the_model_says() {
    if std::env::var_os("HISTORIES_SEED").is_some() {
        let faults = run(setting("HISTORIES_SEED", 0), true);
        assert!(faults.is_empty(), "{faults:#?}");
        return;
    }
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if text_of(info.payload()).as_deref() != Some(ON_PURPOSE) {
            before(info);
        }
    }));
    let (from, count) = (setting("HISTORIES_FROM", 0), setting("HISTORIES_COUNT", 4000));
    let threads = setting("HISTORIES_THREADS", 2);
    let (failures, run, began) = (Mutex::new(Vec::new()), AtomicU64::new(0), Instant::now());
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (failures, run) = (&failures, &run);
            scope.spawn(move || {
                for seed in (from..from + count).filter(|seed| seed % threads == thread) {
                    let faults = run_caught(seed);
                    run.fetch_add(1, Relaxed);
                    if let Some(first) = faults.first() {
                        let first: String = first.chars().take(600).collect();
                        eprintln!("HISTORIES_SEED={seed}: {first}");
                        lock(failures).push(seed);
                    }
                    if lock(failures).len() >= FAILURES_MAX {
                        return;
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    println!("{} histories in {:?}, {} failed", run.into_inner(), began.elapsed(), failures.len());
    assert!(failures.is_empty(), "replay one by HISTORIES_SEED=SEED: {failures:?}");
}
