//! Admission: how many connections there are, in all and on each shard.
//!
//! Shared by all threads. A connection takes a place before its upgrade is answered and
//! a seat on the least loaded shard when it is handed over; both come back when they are
//! dropped, wherever that happens, so a handshake that fails halfway costs nothing.
//! Does not know sockets or shards' work.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_utils::CachePadded;

#[derive(Debug)]
pub(crate) struct Admission {
    taken: AtomicUsize,
    max: usize,
    /// Connections of each address, where that is bounded. Locked per connection, not per message.
    addresses: Option<(usize, Mutex<HashMap<IpAddr, usize>>)>,
    seats: Box<[CachePadded<AtomicUsize>]>,
}

impl Admission {
    pub(crate) fn new(max: usize, max_per_address: Option<usize>, shards: usize) -> Arc<Self> {
        let seats = (0..shards).map(|_| CachePadded::default()).collect();
        let addresses = max_per_address.map(|max| (max, Mutex::new(HashMap::new())));
        Arc::new(Self { taken: AtomicUsize::new(0), max, addresses, seats })
    }

    /// A place for one more connection, unless all are taken, in all or for its address.
    pub(crate) fn admit(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Place> {
        // Relaxed: a counter; nothing else hangs on it.
        let one_more = |taken| (taken < self.max).then_some(taken + 1);
        self.taken.fetch_update(Relaxed, Relaxed, one_more).ok()?;
        // From here on the place gives back what it has.
        let mut place = Place { admission: self.clone(), shard: None, address: None };
        if let (Some((max, counts)), Some(address)) = (&self.addresses, address) {
            let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
            let count = counts.entry(address).or_default();
            if *count >= *max {
                drop(counts);
                return None;
            }
            *count += 1;
            place.address = Some(Box::new(address));
        }
        Some(place)
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
    /// Where it is counted for its address.
    address: Option<Box<IpAddr>>,
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
        if let (Some((_, counts)), Some(address)) = (&self.admission.addresses, &self.address) {
            let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(count) = counts.get_mut(address) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(address);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_and_come_back() {
        let admission = Admission::new(2, None, 2);
        let mut first = admission.admit(None).unwrap();
        let mut second = admission.admit(None).unwrap();
        assert!(admission.admit(None).is_none());
        assert_ne!(first.choose_shard(), second.choose_shard());
        drop(first);
        assert_eq!(admission.admit(None).unwrap().choose_shard(), 0);
        drop(second);
        assert_eq!(admission.taken(), 0);
    }

    #[test]
    fn an_address_has_a_bound_of_its_own() {
        let admission = Admission::new(10, Some(1), 1);
        let (one, other) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2]));
        let first = admission.admit(Some(one)).unwrap();
        assert!(admission.admit(Some(one)).is_none() && admission.admit(Some(other)).is_some());
        assert!(admission.admit(None).is_some(), "an unknown address is not counted");
        drop(first);
        assert!(admission.admit(Some(one)).is_some());
        assert_eq!(admission.taken(), 0);
    }
}
