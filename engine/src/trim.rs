//! Returning the heap's free memory to the system after many connections have opened or ended.
//!
//! Owned by the watchdog, because a trim takes milliseconds and must not delay a shard. After a storm of handshakes their
//! memory is free, but glibc returns only the top of a heap to the system, and a longer-lived allocation may occupy it.
//! Decides when; the allocator decides what. Reads no clock. Does not know connections.

use std::time::{Duration, Instant};

/// Connections that opened or ended since the last time, below which nothing is done.
const CHANGES_MIN: u64 = 256;
/// How long no connection has opened or ended.
const QUIET: Duration = Duration::from_secs(2);
/// The time between two, at least.
const INTERVAL: Duration = Duration::from_secs(10);

/// When the heap should be trimmed.
#[derive(Debug)]
pub(crate) struct Trimmer {
    /// Connections that have opened and ended, at the last look and when it was last trimmed.
    changes: u64,
    trimmed_changes: u64,
    changed: Instant,
    trimmed: Option<Instant>,
}

impl Trimmer {
    pub(crate) fn new(now: Instant) -> Self {
        Self { changes: 0, trimmed_changes: 0, changed: now, trimmed: None }
    }

    /// Whether the heap must be trimmed now, when so many connections have opened and ended.
    pub(crate) fn look(&mut self, changes: u64, now: Instant) -> bool {
        if changes != self.changes {
            (self.changes, self.changed) = (changes, now);
        }
        let is_due = self.due().is_some_and(|due| due <= now);
        if is_due {
            (self.trimmed_changes, self.trimmed) = (changes, Some(now));
        }
        is_due
    }

    /// When it will be trimmed, unless more connections open or end until then. None if there were too few.
    pub(crate) fn due(&self) -> Option<Instant> {
        let quiet = self.changed + QUIET;
        let due = self.trimmed.map_or(quiet, |trimmed| quiet.max(trimmed + INTERVAL));
        (self.changes - self.trimmed_changes >= CHANGES_MIN).then_some(due)
    }
}

/// Returns the free memory of all heaps of the process; false where the allocator cannot do it.
#[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
pub(crate) fn trim_heaps() -> bool {
    // SAFETY: `malloc_trim` has no preconditions: it takes the locks that `malloc` takes, in any thread, and changes
    // only memory that is free. Where the program has another allocator, glibc's heaps are small or empty.
    // Witness: `trimming_leaves_what_is_in_use`.
    let _ = unsafe { libc::malloc_trim(0) };
    true
}

#[cfg(not(all(target_os = "linux", target_env = "gnu", not(miri))))]
pub(crate) fn trim_heaps() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_heap_is_trimmed_once_after_a_storm_when_it_is_over() {
        let start = Instant::now();
        let mut trimmer = Trimmer::new(start);
        let mut look = |changes, millis: u32| trimmer.look(changes, start + millis * MS);
        assert!(
            !look(0, 5000) && !look(CHANGES_MIN - 1, 10_000) && !look(CHANGES_MIN - 1, 60_000),
            "too few"
        );
        assert!(!look(1000, 61_000) && !look(2000, 62_900), "it goes on");
        assert!(!look(2000, 64_899) && look(2000, 64_900), "two seconds later");
        assert!(!look(2000, 64_901) && !look(2000, 100_000), "once");
    }

    #[test]
    fn storm_after_storm_is_trimmed_at_intervals() {
        let start = Instant::now();
        let mut trimmer = Trimmer::new(start);
        let storms = (0..100_000_u32).step_by(50).filter(|millis| {
            // A storm every three seconds.
            trimmer.look(u64::from(millis / 3000) * 1000, start + *millis * MS)
        });
        let trimmed: Vec<_> = storms.collect();
        let apart = trimmed.windows(2).map(|two| two[1] - two[0]).min();
        assert!(trimmed.len() >= 7 && apart >= Some(10_000), "{trimmed:?}");
    }

    #[test]
    fn trimming_leaves_what_is_in_use() {
        let mut kept: Vec<Vec<u8>> = (0..1000).map(|byte| vec![byte as u8; 10_000]).collect();
        kept.retain(|piece| piece[0] % 2 == 0);
        let trims = trim_heaps();
        assert_eq!(trims, cfg!(all(target_os = "linux", target_env = "gnu", not(miri))));
        assert!(kept.iter().all(|piece| piece.iter().all(|byte| *byte == piece[0])));
    }
}
