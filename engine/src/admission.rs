//! Admission: how many connections there are, in all and on each shard.
//!
//! Shared by all threads. A connection takes a place before its upgrade is answered and
//! a seat on the least loaded shard when it is handed over; both come back when they are
//! dropped, wherever that happens, so a handshake that fails halfway costs nothing.
//! Does not know sockets or shards' work.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use crossbeam_utils::CachePadded;

#[derive(Debug)]
pub(crate) struct Admission {
    taken: AtomicUsize,
    max: usize,
    seats: Box<[CachePadded<AtomicUsize>]>,
}

impl Admission {
    pub(crate) fn new(max: usize, shards: usize) -> Arc<Self> {
        let seats = (0..shards).map(|_| CachePadded::default()).collect();
        Arc::new(Self { taken: AtomicUsize::new(0), max, seats })
    }

    /// A place for one more connection, unless all are taken.
    pub(crate) fn admit(self: &Arc<Self>) -> Option<Place> {
        // Relaxed: a counter; nothing else hangs on it.
        let one_more = |taken| (taken < self.max).then_some(taken + 1);
        self.taken.fetch_update(Relaxed, Relaxed, one_more).ok()?;
        Some(Place { admission: self.clone(), shard: None })
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Relaxed)
    }
}

/// One connection's place; free again when dropped.
#[derive(Debug)]
pub struct Place {
    admission: Arc<Admission>,
    shard: Option<u32>,
}

impl Place {
    /// Picks the shard with the fewest connections and counts this one there.
    pub(crate) fn choose_shard(&mut self) -> usize {
        let load = |(_, seats): &(usize, &CachePadded<AtomicUsize>)| seats.load(Relaxed);
        let shard = self.admission.seats.iter().enumerate().min_by_key(load).map_or(0, |(shard, _)| shard);
        self.admission.seats[shard].fetch_add(1, Relaxed);
        self.shard = Some(shard as u32);
        shard
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.taken.fetch_sub(1, Relaxed);
        if let Some(shard) = self.shard {
            self.admission.seats[shard as usize].fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_come_back() {
        let admission = Admission::new(2, 2);
        let mut first = admission.admit().unwrap();
        let mut second = admission.admit().unwrap();
        assert!(admission.admit().is_none());
        assert_ne!(first.choose_shard(), second.choose_shard());
        drop(first);
        assert_eq!(admission.admit().unwrap().choose_shard(), 0);
        drop(second);
        assert_eq!(admission.taken(), 0);
    }
}
