//! Every entry exactly once and in one order, whatever the broker does: random histories on the in-memory log.
//!
//! Time is paused, so a history takes no time and is the same for the same seed. `HISTORIES` sets their number (200),
//! `HISTORIES_FROM` the first seed (0).

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use shardcast_backplane::memory::{Faults, MemoryLog};
use shardcast_backplane::{
    Backplane, ClusterLog, ClusterLogConfig, EntryError, EntryPosition, Event, GapCause, NodeId, Start,
    TryAppendError,
};
use tokio::time::{sleep, timeout};

const NODES: usize = 3;
const PUBLISHERS: usize = 2;
const ENTRIES: usize = 25;

/// SplitMix64.
fn draw(state: &mut u64, end: u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (mixed ^ (mixed >> 31)) % end
}

/// What a node has read: entries, and in between where a gap was.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Entry(EntryPosition, String),
    Gap(GapCause),
    Missing,
}

type Read = Arc<Mutex<Vec<Seen>>>;

/// A node that reads until the test ends.
async fn node(log: &MemoryLog, number: u64, config: ClusterLogConfig) -> (ClusterLog, Read) {
    let joined = ClusterLog::join(log.backplane(), NodeId::from_bits(number), Start::Oldest, config);
    let (log, mut entries) = joined.await.unwrap();
    let read = Read::default();
    let seen = read.clone();
    tokio::spawn(async move {
        loop {
            let event = match entries.next().await.unwrap() {
                Event::Entry { position, payload, .. } => {
                    Seen::Entry(position, String::from_utf8(payload.to_vec()).unwrap())
                }
                Event::Gap(gap) => Seen::Gap(gap.cause),
                Event::Missing { .. } => Seen::Missing,
            };
            seen.lock().unwrap().push(event);
        }
    });
    (log, read)
}

struct Outcome {
    /// Each entry, and where its append said that it is.
    appended: Vec<(String, EntryPosition)>,
    read: Vec<Vec<Seen>>,
}

/// Several nodes append under faults; `loses` says whether the broker also loses records.
async fn history(seed: u64, loses: bool) -> Outcome {
    let mut state = seed;
    let mut one_of = |choices: &[u64]| choices[draw(&mut state, choices.len() as u64) as usize];
    let log = MemoryLog::with_faults(Faults {
        seed,
        acknowledged_within: Duration::from_millis(one_of(&[0, 1, 20])),
        read_within: Duration::from_millis(one_of(&[0, 1, 20])),
        unknown: one_of(&[0, 10, 40]) as f64 / 100.0,
        failed: one_of(&[0, 10, 40]) as f64 / 100.0,
    });
    let config = ClusterLogConfig {
        batch_bytes_max: one_of(&[1, 40, 65_536]) as usize,
        queue_bytes_max: one_of(&[1, 100, 1 << 20]) as usize,
    };
    let mut reads = Vec::new();
    let mut publishers = Vec::new();
    for number in 0..NODES {
        let (handle, read) = node(&log, number as u64, config.clone()).await;
        reads.push(read);
        for publisher in 0..PUBLISHERS {
            let (handle, mut state) = (handle.clone(), seed ^ (number * 16 + publisher) as u64);
            publishers.push(tokio::spawn(async move {
                let mut appended = Vec::new();
                for entry in 0..ENTRIES {
                    sleep(Duration::from_millis(draw(&mut state, 20))).await;
                    let text = format!("{number}.{publisher}:{entry}");
                    let position = handle.append(Bytes::from(text.clone())).await.unwrap();
                    appended.push((text, position));
                }
                appended
            }));
        }
    }
    let chaos = tokio::spawn({
        let (log, mut state) = (log.clone(), seed ^ 0xC0FFEE);
        async move {
            loop {
                sleep(Duration::from_millis(draw(&mut state, 100))).await;
                match draw(&mut state, 4) {
                    0 => {
                        log.set_outage(true);
                        sleep(Duration::from_millis(draw(&mut state, 8000))).await;
                        log.set_outage(false);
                    }
                    1 if loses => log.lose(draw(&mut state, 5) as usize),
                    2 if loses => log.truncate(draw(&mut state, 5) as usize),
                    _ => {}
                }
            }
        }
    });
    let mut appended = Vec::new();
    for publisher in publishers {
        let done = timeout(Duration::from_secs(24 * 60 * 60), publisher).await;
        appended.extend(done.expect("every append returns, sooner or later").unwrap());
    }
    chaos.abort();
    let _ = chaos.await;
    log.set_outage(false);
    log.set_faults(Faults::default());
    // The last entry is read by all.
    let (last, _) = node(&log, 99, ClusterLogConfig::default()).await;
    let position = last.append(Bytes::from_static(b"last")).await.unwrap();
    appended.push(("last".to_owned(), position));
    let is_last = |seen: &Seen| matches!(seen, Seen::Entry(_, text) if text == "last");
    while !reads.iter().all(|read| read.lock().unwrap().iter().any(is_last)) {
        sleep(Duration::from_millis(1)).await;
    }
    Outcome { appended, read: reads.iter().map(|read| read.lock().unwrap().clone()).collect() }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Runs histories with their seeds; names the seed of one that fails.
fn each_history(loses: bool, check: impl Fn(u64, Outcome)) {
    let first = setting("HISTORIES_FROM", 0);
    for seed in first..first + setting("HISTORIES", 200) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let outcome = runtime.unwrap().block_on(history(seed, loses));
        let is_missing = outcome.read.iter().any(|read| read.contains(&Seen::Missing));
        assert!(!is_missing, "HISTORIES_FROM={seed}: batches are missing without a gap");
        check(seed, outcome);
    }
}

fn entries(read: &[Seen]) -> Vec<(EntryPosition, String)> {
    let entry = |seen: &Seen| match seen {
        Seen::Entry(position, text) => Some((*position, text.clone())),
        Seen::Gap(_) | Seen::Missing => None,
    };
    read.iter().filter_map(entry).collect()
}

/// Nothing twice, positions that grow, and each publisher's entries in their order.
fn check_order(seed: u64, read: &[(EntryPosition, String)]) {
    assert!(read.windows(2).all(|pair| pair[0].0 < pair[1].0), "HISTORIES_FROM={seed}: positions grow");
    let mut last: HashMap<&str, usize> = HashMap::new();
    for (_, text) in read {
        let Some((publisher, number)) = text.split_once(':') else { continue };
        let number: usize = number.parse().unwrap();
        let before = last.insert(publisher, number);
        assert!(
            before.is_none_or(|before| before < number),
            "HISTORIES_FROM={seed}: {text} after {before:?}"
        );
    }
}

#[test]
fn all_nodes_read_every_entry_once_and_in_one_order() {
    each_history(false, |seed, Outcome { appended, read }| {
        let first = entries(&read[0]);
        assert_eq!(first.len(), read[0].len(), "HISTORIES_FROM={seed}: no gap");
        check_order(seed, &first);
        for other in &read {
            assert_eq!(*other, read[0], "HISTORIES_FROM={seed}: one order for all");
        }
        let told: HashSet<_> = appended.into_iter().map(|(text, position)| (position, text)).collect();
        assert_eq!(
            told,
            first.into_iter().collect(),
            "HISTORIES_FROM={seed}: what was appended is read, there"
        );
    });
}

#[test]
fn a_broker_that_loses_records_costs_a_gap_and_nothing_is_read_twice() {
    let gaps = std::cell::Cell::new(0);
    each_history(true, |seed, Outcome { appended, read }| {
        for (number, read) in read.iter().enumerate() {
            let known = entries(read);
            check_order(seed, &known);
            let known: HashMap<_, _> = known.into_iter().map(|(position, text)| (text, position)).collect();
            let has_gap = read.iter().any(|seen| matches!(seen, Seen::Gap(_)));
            gaps.set(gaps.get() + usize::from(has_gap));
            for (text, position) in &appended {
                if text.starts_with(&format!("{number}.")) {
                    // A node reads its own entries whatever is lost, where it was told that they are.
                    assert_eq!(known.get(text), Some(position), "HISTORIES_FROM={seed}: {text}");
                } else {
                    assert!(known.contains_key(text) || has_gap, "HISTORIES_FROM={seed}: {text} is missing");
                }
            }
        }
    });
    assert!(gaps.get() > 0, "the histories lose something");
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_is_too_long_is_refused_and_the_next_one_is_appended() {
    let log = MemoryLog::new();
    let (handle, read) = node(&log, 1, ClusterLogConfig::default()).await;
    let max = log.backplane().record_bytes_max();
    let refused = handle.append(Bytes::from(vec![b'x'; max])).await.unwrap_err();
    let EntryError::TooLong { len, max: told } = refused else { panic!("{refused}") };
    assert!(len == max && told < max && told > max - 100);
    handle.append(Bytes::from(vec![b'x'; told])).await.unwrap();
    handle.append(Bytes::from_static(b"on")).await.unwrap();
    assert_eq!(read.lock().unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_while_the_queue_is_full_and_ends_with_the_reader() {
    let log = MemoryLog::new();
    let config = ClusterLogConfig { queue_bytes_max: 10, ..ClusterLogConfig::default() };
    let (handle, entries) =
        ClusterLog::join(log.backplane(), NodeId::from_bits(1), Start::Tail, config).await.unwrap();
    log.set_outage(true);
    let appends: Vec<_> = (0..3)
        .map(|_| {
            let handle = handle.clone();
            tokio::spawn(async move { handle.append(Bytes::from_static(b"12345678")).await })
        })
        .collect();
    sleep(Duration::from_secs(60)).await;
    assert!(appends.iter().all(|append| !append.is_finished()), "an outage is waited out");
    drop(entries);
    for append in appends {
        assert!(matches!(append.await.unwrap(), Err(EntryError::Closed)));
    }
    assert!(matches!(handle.append(Bytes::new()).await, Err(EntryError::Closed)));
}

#[tokio::test(start_paused = true)]
async fn an_origin_comes_back_with_its_entry_or_with_the_refusal() {
    let log = MemoryLog::new();
    let config = ClusterLogConfig { queue_bytes_max: 10, ..ClusterLogConfig::default() };
    let join = |node| ClusterLog::join(log.backplane(), NodeId::from_bits(node), Start::Tail, config.clone());
    let (here, mut read_here) = join(1).await.unwrap();
    let (_there, mut read_there): (ClusterLog<&str>, _) = join(2).await.unwrap();
    let text = || Bytes::from_static(b"12345678");
    let on_its_way = here.try_append_from(text(), "first").unwrap();
    let refused = here.try_append_from(text(), "second").unwrap_err();
    assert!(matches!(refused, TryAppendError::Full("second")), "{refused}");
    let origin = |event| match event {
        Event::Entry { origin, .. } => origin,
        other => panic!("{other:?}"),
    };
    assert_eq!(origin(read_here.next().await.unwrap()), Some("first"));
    assert_eq!(origin(read_there.next().await.unwrap()), None, "it stays on its node");
    assert!(timeout(Duration::from_secs(1), read_here.next()).await.is_err());
    on_its_way.await.unwrap();
    drop(here.try_append_from(text(), "third").expect("there is room again"));
    assert_eq!(origin(read_here.next().await.unwrap()), Some("third"), "although nobody awaits it");
    drop(read_here);
    sleep(Duration::from_secs(1)).await;
    let closed = here.try_append_from(text(), "fourth").unwrap_err();
    assert!(
        matches!(closed, TryAppendError::Entry(EntryError::Closed) | TryAppendError::Full("fourth")),
        "{closed}"
    );
}
