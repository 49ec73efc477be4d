//! Slow and stalled readers: connections that read little or nothing during the measurement.
//!
//! Their receive buffers are small, so that the client's kernel does not take long what they do not read. They answer
//! no ping, no delivery is expected, and a server may close them: all of that is only reported. After everything else
//! has been checked they are read to the end, which shows what a server kept for them and whether it closed them.

use std::{
    io,
    time::{Duration, Instant},
};

use super::{
    clients::{Clients, Status},
    connection::Ended,
    plan::{Plan, Role},
    report,
};

const SLICES_PER_SECOND: u32 = 20;
/// Requested of the kernel, which doubles it for its own overhead.
const RECEIVE_BUFFER_BYTES: usize = 8 * 1024;
/// The final reading ends when nothing has arrived for so long, or after `FINISH_MAX`.
const FINISH_QUIET: Duration = Duration::from_millis(200);
const FINISH_MAX: Duration = Duration::from_secs(3);

/// The size of a socket's receive buffer; `None` leaves it to the kernel.
pub(crate) fn receive_buffer(role: Role) -> Option<usize> {
    matches!(role, Role::Stalled | Role::Slow).then_some(RECEIVE_BUFFER_BYTES)
}

/// All connections that are slow or stalled.
#[derive(Debug)]
pub(crate) struct SlowReaders {
    slow: Vec<usize>,
    stalled: Vec<usize>,
    bytes_per_second: u32,
    /// `None` before the measurement, while they read like all others.
    pacing: Option<Pacing>,
    disconnected: u64,
    received: u64,
}

impl SlowReaders {
    pub(crate) fn new(plan: &Plan, bytes_per_second: u32) -> Self {
        let (slow, stalled) = (plan.all(Role::Slow), plan.all(Role::Stalled));
        Self { slow, stalled, bytes_per_second, pacing: None, disconnected: 0, received: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slow.is_empty() && self.stalled.is_empty()
    }

    pub(crate) fn all(&self) -> Vec<usize> {
        [&self.slow[..], &self.stalled[..]].concat()
    }

    /// From now on they are slow or stalled.
    pub(crate) fn begin(&mut self, now: Instant) {
        self.pacing = Some(Pacing::new(self.bytes_per_second, now));
    }

    /// One of them may have something to read.
    pub(crate) fn on_readable(&mut self, clients: &mut Clients, index: usize) {
        if self.pacing.is_none() {
            self.read(clients, index, None);
        }
    }

    /// Reads what is due.
    pub(crate) fn read_due(&mut self, clients: &mut Clients, now: Instant) {
        let Some(bytes) = self.pacing.as_mut().and_then(|pacing| pacing.due(now)) else { return };
        for turn in 0..self.slow.len() {
            self.read(clients, self.slow[turn], Some(bytes));
        }
    }

    /// Reads them all to the end, and reports.
    pub(crate) fn finish(mut self, clients: &mut Clients) -> io::Result<report::Slow> {
        self.all().into_iter().for_each(|index| self.read(clients, index, None));
        let start = Instant::now();
        let mut last_read = start;
        while last_read.elapsed() < FINISH_QUIET && start.elapsed() < FINISH_MAX {
            clients.pool.wait(FINISH_QUIET)?;
            while let Some(index) = clients.pool.next_ready() {
                if clients.status(index) == Status::Unwatched {
                    self.read(clients, index, None);
                    last_read = Instant::now();
                }
            }
        }
        Ok(report::Slow {
            stalled: self.stalled.len(),
            slow: self.slow.len(),
            slow_bytes_per_second: self.bytes_per_second,
            disconnected: self.disconnected,
            received: self.received,
        })
    }

    /// Reads at most `limit` bytes, or everything.
    fn read(&mut self, clients: &mut Clients, index: usize, limit: Option<usize>) {
        if clients.status(index) != Status::Unwatched {
            return;
        }
        let Err(ended) = clients.pool.read(index, limit, |_| self.received += 1) else { return };
        // After a Close frame the end of TCP is no second end.
        self.disconnected += u64::from(!matches!(ended, Ended::ClosedByBoth));
        if !matches!(ended, Ended::Closed(_)) {
            clients.set_status(index, Status::Disconnected);
        }
    }
}

/// How many bytes a slow reader may read, slice by slice.
#[derive(Debug)]
struct Pacing {
    bytes_per_second: u64,
    start: Instant,
    slices: u64,
    granted: u64,
}

impl Pacing {
    fn new(bytes_per_second: u32, start: Instant) -> Self {
        Self { bytes_per_second: bytes_per_second.into(), start, slices: 0, granted: 0 }
    }

    /// What each may read now, missed slices included; `None` until the next slice begins.
    fn due(&mut self, now: Instant) -> Option<usize> {
        let slices = (now.saturating_duration_since(self.start) * SLICES_PER_SECOND).as_secs();
        if slices <= self.slices {
            return None;
        }
        self.slices = slices;
        let bytes = slices * self.bytes_per_second / u64::from(SLICES_PER_SECOND) - self.granted;
        self.granted += bytes;
        (bytes > 0).then_some(bytes as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_in(bytes_per_second: u32, every: Duration, turns: u32) -> Vec<usize> {
        let start = Instant::now();
        let mut pacing = Pacing::new(bytes_per_second, start);
        (0..=turns).filter_map(|turn| pacing.due(start + every * turn)).collect()
    }

    #[test]
    fn a_slow_reader_keeps_its_rate_however_often_it_has_a_turn() {
        assert_eq!(read_in(1000, Duration::from_millis(1), 1000), [50; 20]);
        assert_eq!(read_in(1000, Duration::from_millis(400), 5), [400; 5]);
    }

    #[test]
    fn a_rate_below_one_byte_a_slice_is_kept_over_the_second() {
        assert_eq!(read_in(7, Duration::from_millis(10), 100).iter().sum::<usize>(), 7);
    }
}
