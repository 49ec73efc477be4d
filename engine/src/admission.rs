//! Admission: how many connections are open, in total and on each shard, and how often addresses open new ones.
//!
//! Shared by all threads. A connection takes a permit before its upgrade is answered, and is assigned to the least
//! loaded shard when it is adopted. Dropping the permit gives both back, wherever that happens, so a handshake
//! that fails halfway costs nothing. An address is counted in a form that a client cannot change at will: IPv4 as
//! it is, also in its IPv6 form, and IPv6 by its first 64 bits. An address that upgrades is remembered until that
//! does not matter any more for its rate. Knows no clock. Does not know sockets or the work of shards.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;

use crate::rate::Rate;

/// Addresses whose upgrades are remembered: some 12 MiB.
const REMEMBERED_MAX: usize = 1 << 18;
/// Addresses that are remembered before outdated ones are looked for.
const REMEMBERED_MIN: usize = 1024;
/// Time between two such searches where they found too little.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Admission {
    taken: AtomicUsize,
    max: usize,
    /// Connections of each address, if that number is limited. Locked per connection, not per message.
    addresses: Option<(usize, Mutex<HashMap<IpAddr, usize>>)>,
    /// The rate of upgrades from one address, if it is limited, and each address's word for it.
    upgrades: Option<(Rate, Mutex<Upgrades>)>,
    /// Whether the address of a connection was unknown although addresses are counted.
    address_was_lacking: AtomicBool,
    seats: Box<[CachePadded<AtomicUsize>]>,
}

impl Admission {
    pub(crate) fn new(
        max: usize,
        max_per_address: Option<usize>,
        upgrades: Option<Rate>,
        shards: usize,
    ) -> Arc<Self> {
        let seats = (0..shards).map(|_| CachePadded::default()).collect();
        let addresses = max_per_address.map(|max| (max, Mutex::new(HashMap::new())));
        Arc::new(Self {
            taken: AtomicUsize::new(0),
            max,
            addresses,
            upgrades: upgrades.map(|rate| (rate, Mutex::default())),
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
        let mut permit = ConnectionPermit {
            counted: Counted { admission: self.clone(), address: None },
            chosen: None,
            is_address_known: false,
        };
        match address {
            Some(address) if !permit.count_for(address) => None,
            _ => Some(permit),
        }
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Relaxed)
    }

    /// Counts an upgrade from this address, if their rate is limited.
    ///
    /// # Errors
    /// The address is above the rate. The upgrade is not counted then.
    pub(crate) fn count_upgrade(&self, address: IpAddr, now: Instant) -> Result<(), TooManyUpgrades> {
        let Some((rate, upgrades)) = &self.upgrades else { return Ok(()) };
        upgrades.lock().unwrap_or_else(PoisonError::into_inner).count(rate, counted_as(address), now)
    }
}

/// The upgrades of the addresses for which they still matter.
#[derive(Debug, Default)]
struct Upgrades {
    /// When the first one was counted: times are measured from then.
    epoch: Option<Instant>,
    words: HashMap<IpAddr, u64>,
    /// How many addresses there may be before outdated ones are looked for, and when that was last done.
    sweep_above: usize,
    swept: Duration,
}

impl Upgrades {
    fn count(&mut self, rate: &Rate, address: IpAddr, now: Instant) -> Result<(), TooManyUpgrades> {
        let now = now.saturating_duration_since(*self.epoch.get_or_insert(now));
        let nanos = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        self.sweep(now, nanos);
        let word = self.words.get(&address).copied();
        let (next, ready) = rate.count(word.unwrap_or_default(), 1, nanos, 0);
        if ready > nanos {
            return Err(TooManyUpgrades { retry_after: Duration::from_nanos(ready - nanos) });
        }
        if word.is_some() || self.words.len() < REMEMBERED_MAX {
            self.words.insert(address, next);
        }
        Ok(())
    }

    /// Forgets addresses that may upgrade as if they had never done so. Each search doubles the number of addresses
    /// before the next one, so that it costs little for each of them.
    fn sweep(&mut self, now: Duration, nanos: u64) {
        let is_full = self.words.len() >= REMEMBERED_MAX;
        if self.words.len() <= self.sweep_above.max(REMEMBERED_MIN)
            || (is_full && now < self.swept + SWEEP_INTERVAL)
        {
            return;
        }
        self.words.retain(|_, word| *word > nanos);
        self.swept = now;
        self.sweep_above = (2 * self.words.len()).min(REMEMBERED_MAX - 1);
        self.words.shrink_to(self.sweep_above.max(REMEMBERED_MIN));
    }
}

/// A client's address opens connections more often than
/// [`max_upgrades_per_address`](crate::EngineConfig::max_upgrades_per_address) allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many upgrades from this address: try again in {retry_after:?}")]
#[non_exhaustive]
pub struct TooManyUpgrades {
    /// How long until the address may upgrade again, if it does not try before.
    pub retry_after: Duration,
}

/// Permission for one more connection. Dropping it releases it.
#[derive(Debug)]
pub struct ConnectionPermit {
    counted: Counted,
    chosen: Option<Chosen>,
    is_address_known: bool,
}

/// What a connection counts for besides its shard, until it is dropped. Two words, because every connection has one.
#[derive(Debug)]
struct Counted {
    admission: Arc<Admission>,
    /// The address for which it is counted.
    address: Option<Box<IpAddr>>,
}

/// A connection is counted for the shard, if any, until this is dropped.
#[derive(Debug)]
struct Chosen {
    admission: Arc<Admission>,
    shard: Option<u16>,
}

/// The permit of a connection that a shard has, without what the connection's id says. To be released with that.
#[derive(Debug)]
pub(crate) struct Seat(Counted);

impl Seat {
    /// The connection, which was on this shard, has ended. The rest is released when this is dropped.
    pub(crate) fn leave(&self, shard: usize) {
        self.0.admission.seats[shard].fetch_sub(1, Relaxed); // Relaxed: a counter
    }
}

impl ConnectionPermit {
    /// Whether connections or upgrades are counted by their addresses, and this one's is not known.
    pub fn lacks_address(&self) -> bool {
        !self.is_address_known
            && (self.counted.admission.addresses.is_some() || self.counted.admission.upgrades.is_some())
    }

    /// True the first time that this is called for any permit of the engine, so that a missing address is
    /// logged once.
    pub fn is_first_to_lack_address(&self) -> bool {
        !self.counted.admission.address_was_lacking.swap(true, Relaxed) // Relaxed: nothing else depends on it
    }

    /// Counts the connection for its address; false if that address is at its limit. A connection is counted
    /// for one address at most, the first.
    pub fn count_for(&mut self, address: IpAddr) -> bool {
        if !self.lacks_address() {
            return true;
        }
        self.is_address_known = true;
        let Some((max, counts)) = &self.counted.admission.addresses else { return true };
        let address = counted_as(address);
        let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= *max {
            self.is_address_known = false;
            return false;
        }
        *count += 1;
        self.counted.address = Some(Box::new(address));
        true
    }

    /// Picks the shard with the fewest connections and counts this one there.
    pub(crate) fn choose_shard(&mut self) -> usize {
        let load = |(_, seats): &(usize, &CachePadded<AtomicUsize>)| seats.load(Relaxed);
        let shard =
            self.counted.admission.seats.iter().enumerate().min_by_key(load).map_or(0, |(shard, _)| shard);
        self.counted.admission.seats[shard].fetch_add(1, Relaxed);
        let admission = self.counted.admission.clone();
        self.chosen = Some(Chosen { admission, shard: Some(shard as u16) }); // at most 4096
        shard
    }

    /// For the shard that was chosen, which has the connection now.
    pub(crate) fn into_seat(mut self) -> Seat {
        if let Some(chosen) = &mut self.chosen {
            chosen.shard = None; // counted until `Seat::leave`
        }
        Seat(self.counted)
    }
}

/// A client with an IPv6 address has all 2⁶⁴ addresses of its network, and may use a different one each time.
fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
        address => address,
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        // Relaxed, here and below: counters.
        if let Some(shard) = self.shard {
            self.admission.seats[usize::from(shard)].fetch_sub(1, Relaxed);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.admission.taken.fetch_sub(1, Relaxed);
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
        let admission = Admission::new(2, None, None, 2);
        let mut first = admission.admit(None).unwrap();
        let mut second = admission.admit(None).unwrap();
        assert!(admission.admit(None).is_none());
        assert_ne!(first.choose_shard(), second.choose_shard());
        drop(first);
        let mut third = admission.admit(None).unwrap();
        assert_eq!(third.choose_shard(), 0);
        let third = third.into_seat();
        drop(second);
        let other = admission.admit(None).map(|mut permit| permit.choose_shard());
        assert_eq!(other, Some(1), "the first shard stays chosen while its connection is open");
        third.leave(0);
        drop(third);
        assert_eq!(admission.admit(None).unwrap().choose_shard(), 0);
        assert_eq!(admission.taken(), 0);
    }

    #[test]
    fn an_address_has_a_limit_of_its_own() {
        let admission = Admission::new(10, Some(1), None, 1);
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
        let admission = Admission::new(10, Some(1), None, 1);
        let admit = |address: &str| admission.admit(Some(address.parse().unwrap()));
        let _first = [admit("192.0.2.1").unwrap(), admit("2001:db8::1").unwrap()];
        assert!(admit("::ffff:192.0.2.1").is_none(), "the same address in IPv6's form");
        assert!(admit("2001:db8::ffff:1:2").is_none(), "the same network of 64 bits");
        assert!(admit("::ffff:192.0.2.2").is_some() && admit("2001:db8:0:1::1").is_some());
        assert_eq!(admission.taken(), 2);
    }

    #[test]
    fn an_address_that_becomes_known_later_counts_from_then_on() {
        let admission = Admission::new(10, Some(1), None, 1);
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
        let unlimited = Admission::new(10, None, None, 1);
        assert!(!unlimited.admit(None).unwrap().lacks_address());
    }

    fn limited(rate: Rate) -> impl Fn(&str, Instant) -> Result<(), TooManyUpgrades> {
        let admission = Admission::new(10, None, Some(rate), 1);
        move |address, now| admission.count_upgrade(address.parse().unwrap(), now)
    }

    #[test]
    fn an_address_that_upgrades_too_often_is_told_when_it_may_again() {
        let upgrade = limited(Rate::new(6, Duration::from_secs(60)).with_burst(2));
        let now = Instant::now();
        assert_eq!(upgrade("192.0.2.1", now), Ok(()));
        assert_eq!(upgrade("192.0.2.1", now), Ok(()));
        let refused = Err(TooManyUpgrades { retry_after: Duration::from_secs(10) });
        for _ in 0..3 {
            assert_eq!(upgrade("::ffff:192.0.2.1", now), refused, "what is refused is not counted");
        }
        assert_eq!(upgrade("192.0.2.2", now), Ok(()), "another address");
        let later = now + Duration::from_secs(10);
        assert_eq!((upgrade("192.0.2.1", later), upgrade("192.0.2.1", later)), (Ok(()), refused));
    }

    #[test]
    fn a_network_of_64_bits_has_one_rate_of_upgrades() {
        let upgrade = limited(Rate::per_second(1));
        let now = Instant::now();
        assert_eq!(upgrade("2001:db8::1", now), Ok(()));
        assert!(upgrade("2001:db8::ffff:1:2", now).is_err());
        assert_eq!(upgrade("2001:db8:0:1::1", now), Ok(()));
    }

    #[test]
    fn upgrades_are_remembered_for_as_long_as_they_matter_and_within_a_bound() {
        let rate = Rate::per_second(1).with_burst(5);
        let address = |number: u32| IpAddr::from(number.to_be_bytes());
        let (mut upgrades, start) = (Upgrades::default(), Instant::now());
        // Each is forgotten a second after its upgrade: 1,000 of them matter at a time.
        for number in 0..50_000 {
            let now = start + Duration::from_millis(number.into());
            upgrades.count(&rate, address(number), now).unwrap();
            assert!(upgrades.words.len() <= 2 * 1000 + REMEMBERED_MIN, "{}", upgrades.words.len());
        }
        // Too many that matter: those who are remembered stay limited.
        let now = start + Duration::from_secs(100);
        for number in 0..REMEMBERED_MAX as u32 + 1000 {
            upgrades.count(&rate, address(number), now).unwrap();
        }
        assert_eq!(upgrades.words.len(), REMEMBERED_MAX);
        let first = |upgrades: &mut Upgrades| upgrades.count(&rate, address(0), now).is_ok();
        assert_eq!((0..6).filter(|_| first(&mut upgrades)).count(), 4, "it has upgraded once before");
        // And forgotten when they do not matter any more.
        let now = now + Duration::from_secs(10);
        upgrades.count(&rate, address(0), now).unwrap();
        assert_eq!(upgrades.words.len(), 1);
    }
}
