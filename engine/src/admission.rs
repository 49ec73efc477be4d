//! Admission: how many connections are open, in total and on each shard.
//!
//! Shared by all threads. A connection takes a permit before its upgrade is answered, and is assigned to the least
//! loaded shard when it is adopted. Dropping the permit gives both back, wherever that happens, so a handshake
//! that fails halfway costs nothing. An address is counted in a form that a client cannot change at will: IPv4 as
//! it is, also in its IPv6 form, and IPv6 by its first 64 bits. Does not know sockets or the work of shards.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_utils::CachePadded;

#[derive(Debug)]
pub(crate) struct Admission {
    taken: AtomicUsize,
    max: usize,
    /// Connections of each address, if that number is limited. Locked per connection, not per message.
    addresses: Option<(usize, Mutex<HashMap<IpAddr, usize>>)>,
    /// Whether the address of a connection was unknown although addresses are counted.
    address_was_lacking: AtomicBool,
    seats: Box<[CachePadded<AtomicUsize>]>,
}

impl Admission {
    pub(crate) fn new(max: usize, max_per_address: Option<usize>, shards: usize) -> Arc<Self> {
        let seats = (0..shards).map(|_| CachePadded::default()).collect();
        let addresses = max_per_address.map(|max| (max, Mutex::new(HashMap::new())));
        Arc::new(Self {
            taken: AtomicUsize::new(0),
            max,
            addresses,
            address_was_lacking: false.into(),
            seats,
        })
    }

    /// A permit for one more connection, unless the limit is reached, in total or for its address.
    pub(crate) fn admit(self: &Arc<Self>, address: Option<IpAddr>) -> Option<ConnectionPermit> {
        // Relaxed: a counter; no other data depends on it.
        let one_more = |taken| (taken < self.max).then_some(taken + 1);
        self.taken.fetch_update(Relaxed, Relaxed, one_more).ok()?;
        // From here on, dropping the permit releases what it counts.
        let mut permit = ConnectionPermit { admission: self.clone(), shard: None, address: None };
        match address {
            Some(address) if !permit.count_for(address) => None,
            _ => Some(permit),
        }
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Relaxed)
    }
}

/// Permission for one more connection. Dropping it releases it.
#[derive(Debug)]
pub struct ConnectionPermit {
    admission: Arc<Admission>,
    shard: Option<u32>,
    /// The address for which it is counted.
    address: Option<Box<IpAddr>>,
}

impl ConnectionPermit {
    /// Whether connections are counted by their addresses, and this one's is not known.
    pub fn lacks_address(&self) -> bool {
        self.admission.addresses.is_some() && self.address.is_none()
    }

    /// True the first time that this is called for any permit of the engine, so that a missing address is
    /// logged once.
    pub fn is_first_to_lack_address(&self) -> bool {
        !self.admission.address_was_lacking.swap(true, Relaxed) // Relaxed: nothing else depends on it
    }

    /// Counts the connection for its address; false if that address is at its limit. A connection is counted
    /// for one address at most, the first.
    pub fn count_for(&mut self, address: IpAddr) -> bool {
        if !self.lacks_address() {
            return true;
        }
        let Some((max, counts)) = &self.admission.addresses else { return true };
        let address = counted_as(address);
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= *max {
            return false;
        }
        *count += 1;
        self.address = Some(Box::new(address));
        true
    }

    /// Picks the shard with the fewest connections and counts this one there.
    pub(crate) fn choose_shard(&mut self) -> usize {
        let load = |(_, seats): &(usize, &CachePadded<AtomicUsize>)| seats.load(Relaxed);
        let shard = self.admission.seats.iter().enumerate().min_by_key(load).map_or(0, |(shard, _)| shard);
        self.admission.seats[shard].fetch_add(1, Relaxed);
        self.shard = Some(shard as u32);
        shard
    }
}

/// A client with an IPv6 address has all 2⁶⁴ addresses of its network, and may use a different one each time.
fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

impl Drop for ConnectionPermit {
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
    fn permits_are_limited_and_released() {
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
    fn an_address_has_a_limit_of_its_own() {
        let admission = Admission::new(10, Some(1), 1);
        let (one, other) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2]));
        let first = admission.admit(Some(one)).unwrap();
        assert!(admission.admit(Some(one)).is_none() && admission.admit(Some(other)).is_some());
        assert!(admission.admit(None).is_some(), "an unknown address is not counted");
        drop(first);
        assert!(admission.admit(Some(one)).is_some());
        assert_eq!(admission.taken(), 0);
    }

    #[test]
    fn an_address_counts_by_the_network_it_belongs_to() {
        let admission = Admission::new(10, Some(1), 1);
        let admit = |address: &str| admission.admit(Some(address.parse().unwrap()));
        let _first = [admit("192.0.2.1").unwrap(), admit("2001:db8::1").unwrap()];
        assert!(admit("::ffff:192.0.2.1").is_none(), "the same address in IPv6's form");
        assert!(admit("2001:db8::ffff:1:2").is_none(), "the same network of 64 bits");
        assert!(admit("::ffff:192.0.2.2").is_some() && admit("2001:db8:0:1::1").is_some());
        assert_eq!(admission.taken(), 2);
    }

    #[test]
    fn an_address_that_becomes_known_later_counts_from_then_on() {
        let admission = Admission::new(10, Some(1), 1);
        let address = IpAddr::from([127, 0, 0, 1]);
        let mut late = admission.admit(None).unwrap();
        assert!(late.lacks_address() && late.is_first_to_lack_address());
        assert!(late.count_for(address) && !late.lacks_address());
        assert!(late.count_for(IpAddr::from([127, 0, 0, 2])), "counted once, for the first");
        let mut second = admission.admit(None).unwrap();
        assert!(second.lacks_address() && !second.is_first_to_lack_address());
        assert!(!second.count_for(address) && admission.admit(Some(address)).is_none());
        drop(late);
        assert!(second.count_for(address));
        let unlimited = Admission::new(10, None, 1);
        assert!(!unlimited.admit(None).unwrap().lacks_address());
    }
}
