//! Pinning: which CPU a shard has, and when it is bound to it.
//!
//! A thread's affinity is inherited by every thread and process that it starts, and a handler may start some. So
//! on Linux a shard is bound to its CPU only while it sleeps in its poll: the scheduler wakes it there, and as
//! nothing moves it, it stays. Everything that runs on the shard, the engine's code or an application's, runs with
//! the CPUs that the process has. Binding and unbinding cost some 4 µs, a fifth of an echo. So a shard that sleeps
//! often is bound for one sleep in 10 ms, and for others only if it has been moved away, which is cheap to detect
//! and rare: without being bound it was moved in one sleep of a thousand, on a machine with more to run than CPUs.
//!
//! Engines share the machine with each other, and a process cannot see another's choice. So a CPU is claimed
//! by a name that the kernel lets one socket have at a time, visible to all processes of the network
//! namespace and released when its holder ends, however it ends. Claims are advisory: nothing is refused to a
//! process that ignores them.
//!
//! Owned by the shard's thread. Does not know shards.

#[cfg(not(target_os = "linux"))]
pub(crate) use self::elsewhere::{Cpus, Pin};
#[cfg(target_os = "linux")]
pub(crate) use self::linux::{Cpus, Pin};

#[cfg(target_os = "linux")]
mod linux {
    use std::hash::{BuildHasher, RandomState};
    use std::io::{ErrorKind, Result};
    use std::net::Shutdown;
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    use std::time::{Duration, Instant};

    use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

    /// The prefix of the claims' names; all versions of this crate must agree on it.
    const NAMES: &str = "shardcast/cpu";
    /// The number of claims on one CPU, as bits of a `u8`.
    const CLAIMS_PER_CPU: u32 = u8::BITS;
    /// A shard that is on its CPU is bound for a sleep once in this time, at most. This is also how long a
    /// shard that never sleeps may be on another CPU.
    const LOOSE_MAX: Duration = Duration::from_millis(10);

    /// The CPUs that a process may use, and how many shards are on each as far as is known.
    pub(crate) struct Cpus {
        names: String,
        allowed: CpuSet,
        each: Vec<Cpu>,
    }

    struct Cpu {
        number: usize,
        /// The claims that are in use.
        held: u8,
        /// Shards of this engine that found no free claim.
        unclaimed: u32,
    }

    impl Cpus {
        /// The CPUs of the calling thread, which are the process's unless something else has pinned it.
        pub(crate) fn allowed() -> Self {
            Self::new(sched_getaffinity(None).unwrap_or_default(), NAMES.to_owned())
        }

        fn new(allowed: CpuSet, names: String) -> Self {
            let numbers: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
            // Where claims are not visible (another container) or all are equal, engines start at different CPUs.
            let start = RandomState::new().hash_one(0) as usize % numbers.len().max(1);
            let numbers = numbers[start..].iter().chain(&numbers[..start]);
            let each = numbers.map(|number| {
                let is_held = |claim: &u32| matches!(bind(&names, *number, *claim), Err(error) if error.kind() == ErrorKind::AddrInUse);
                let held = (0..CLAIMS_PER_CPU).filter(is_held).fold(0, |held, claim| held | 1 << claim);
                Cpu { number: *number, held, unclaimed: 0 }
            });
            Self { each: each.collect(), names, allowed }
        }

        /// A CPU for one more shard: one with the fewest shards on it.
        pub(crate) fn take(&mut self) -> Option<Pin> {
            let allowed = self.allowed;
            loop {
                let cpu = self.each.iter_mut().min_by_key(|cpu| cpu.held.count_ones() + cpu.unclaimed)?;
                let claim = cpu.held.trailing_ones();
                let bound = match claim {
                    CLAIMS_PER_CPU => None,
                    _ => Some(bind(&self.names, cpu.number, claim)),
                };
                match bound {
                    Some(Ok(socket)) => {
                        cpu.held |= 1 << claim;
                        return Some(Pin::new(cpu.number, allowed, Some(socket)));
                    }
                    // Claimed since the last look: there may be a better CPU now.
                    Some(Err(error)) if error.kind() == ErrorKind::AddrInUse => cpu.held |= 1 << claim,
                    None | Some(Err(_)) => {
                        cpu.unclaimed += 1;
                        return Some(Pin::new(cpu.number, allowed, None));
                    }
                }
            }
        }
    }

    /// Claims a CPU for as long as the socket exists.
    fn bind(names: &str, cpu: usize, claim: u32) -> Result<UnixDatagram> {
        let name = SocketAddr::from_abstract_name(format!("{names}/{cpu}/{claim}"))?;
        let socket = UnixDatagram::bind_addr(&name)?;
        socket.shutdown(Shutdown::Both)?; // only its name is needed: no process can send to it
        Ok(socket)
    }

    /// A shard's CPU.
    #[derive(Debug)]
    pub(crate) struct Pin {
        number: usize,
        own: CpuSet,
        allowed: CpuSet,
        is_tight: bool,
        /// The system has refused to bind it, or there is only one CPU.
        is_idle: bool,
        bound_at: Option<Instant>,
        _claim: Option<UnixDatagram>,
    }

    impl Pin {
        fn new(number: usize, allowed: CpuSet, claim: Option<UnixDatagram>) -> Self {
            let mut own = CpuSet::new();
            own.set(number);
            let is_idle = own == allowed;
            Self { number, own, allowed, is_tight: false, is_idle, bound_at: None, _claim: claim }
        }

        /// The calling thread is about to poll: binds it to its CPU if necessary. Does not read the clock.
        pub(crate) fn before_poll(&mut self, may_block: bool, now: Instant) {
            if self.is_idle {
                return;
            }
            let is_due = self.bound_at.is_none_or(|at| now.saturating_duration_since(at) >= LOOSE_MAX);
            let is_away = || sched_getcpu() != self.number;
            if if may_block { is_due || is_away() } else { is_due && is_away() } {
                self.bound_at = Some(now);
                self.is_tight = self.set(self.own);
            }
        }

        /// The thread is running: from here on it has the process's CPUs, and so has everything that it starts.
        pub(crate) fn after_poll(&mut self) {
            if self.is_tight {
                self.is_tight = !self.set(self.allowed);
            }
        }

        fn set(&mut self, cpus: CpuSet) -> bool {
            match sched_setaffinity(None, &cpus) {
                Ok(()) => true,
                Err(error) => {
                    // For instance because a container's CPUs were changed.
                    tracing::warn!(
                        cpu = self.number,
                        error = &error as &dyn std::error::Error,
                        "a shard could not be pinned and runs unpinned from now on: check the process's CPUs"
                    );
                    self.is_idle = true;
                    false
                }
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// Two CPUs that need not exist, under names that no other test uses.
        fn cpus(test: &str) -> Cpus {
            let mut allowed = CpuSet::new();
            [3, 5].into_iter().for_each(|cpu| allowed.set(cpu));
            Cpus::new(allowed, format!("shardcast-test/{}/{test}", std::process::id()))
        }

        fn take(cpus: &mut Cpus, count: usize) -> Vec<Pin> {
            (0..count).map(|_| cpus.take().expect("there are CPUs")).collect()
        }

        fn numbers<'a>(pins: impl IntoIterator<Item = &'a Pin>) -> Vec<usize> {
            let mut numbers: Vec<usize> = pins.into_iter().map(|pin| pin.number).collect();
            numbers.sort_unstable();
            numbers
        }

        #[test]
        fn engines_claim_the_cpus_with_the_fewest_shards_and_release_them() {
            for _ in 0..16 {
                let one = take(&mut cpus("fewest"), 1);
                let other = take(&mut cpus("fewest"), 1);
                assert_eq!(numbers(one.iter().chain(&other)), [3, 5]);
            }
            let mut held = take(&mut cpus("fewest"), 3);
            let twice = if numbers(&held) == [3, 3, 5] { 3 } else { 5 };
            assert_ne!(take(&mut cpus("fewest"), 1)[0].number, twice);
            held.retain(|pin| pin.number != twice);
            assert_eq!(take(&mut cpus("fewest"), 1)[0].number, twice, "its claims were given back");
        }

        #[test]
        fn more_shards_than_claims_are_spread_evenly() {
            let pins = take(&mut cpus("many"), 50);
            assert_eq!(pins.iter().filter(|pin| pin.number == 3).count(), 25);
            assert_eq!(pins.iter().filter(|pin| pin._claim.is_some()).count(), 2 * CLAIMS_PER_CPU as usize);
        }

        #[test]
        fn engines_that_start_at_the_same_moment_claim_different_cpus() {
            let (mut one, mut other) = (cpus("moment"), cpus("moment"));
            let (one, other) = (take(&mut one, 1), take(&mut other, 1));
            assert_eq!(numbers(one.iter().chain(&other)), [3, 5]);
        }

        #[test]
        fn a_process_without_known_cpus_pins_nothing() {
            assert!(Cpus::new(CpuSet::new(), "shardcast-test/none".to_owned()).take().is_none());
        }
    }
}

/// Nothing is pinned: macOS accepts no more than a hint, and none on its own chips, and the other systems
/// would need `unsafe` here.
#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use std::time::Instant;

    /// No CPUs to choose from.
    pub(crate) struct Cpus;

    impl Cpus {
        pub(crate) fn allowed() -> Self {
            Self
        }

        pub(crate) fn take(&mut self) -> Option<Pin> {
            None
        }
    }

    /// No value of it exists.
    #[derive(Debug)]
    pub(crate) enum Pin {}

    impl Pin {
        pub(crate) fn before_poll(&mut self, _may_block: bool, _now: Instant) {
            match *self {}
        }

        pub(crate) fn after_poll(&mut self) {
            match *self {}
        }
    }
}
