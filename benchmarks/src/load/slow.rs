//! Slow and stalled readers: connections that shake hands, and then read little or nothing.
//!
//! Their socket buffers are small, so that the kernel of the client does not take for long what they do not read.
//! They answer no ping, they are owed nothing, and a server may end them: all that is only told. What a server kept
//! for them, and whether it has ended them, shows when they are read out after everything else has been judged.

use std::{
    io,
    time::{Duration, Instant},
};

use super::{
    connection::Ended,
    crowd::Crowd,
    report,
    role::{Cast, Role},
    stage::{Stage, Standing},
};

/// A second is cut into so many slices.
const SLICES: u32 = 20;
/// Asked of the kernel, which doubles it for its own books.
const RECEIVE_BUFFER_BYTES: usize = 8 * 1024;
/// The reading out ends when nothing has come for so long,
const RECKONED_AFTER: Duration = Duration::from_millis(200);
/// or at the latest after this.
const RECKON_MAX: Duration = Duration::from_secs(3);

/// How large a socket's receive buffer is to be; `None` leaves it to the kernel.
pub(crate) fn receive_buffer(role: Role) -> Option<usize> {
    matches!(role, Role::Stalled | Role::Slow).then_some(RECEIVE_BUFFER_BYTES)
}

/// All who are slow or stalled.
#[derive(Debug)]
pub(crate) struct SlowReaders {
    slow: Vec<usize>,
    stalled: Vec<usize>,
    bytes_per_second: u32,
    /// Absent before they begin to be slow.
    pacing: Option<Pacing>,
    disconnected: u64,
    received: u64,
}

impl SlowReaders {
    pub(crate) fn new(cast: &Cast, bytes_per_second: u32) -> Self {
        let (slow, stalled) = (cast.all(Role::Slow), cast.all(Role::Stalled));
        Self { slow, stalled, bytes_per_second, pacing: None, disconnected: 0, received: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slow.is_empty() && self.stalled.is_empty()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = usize> + use<> {
        self.slow.clone().into_iter().chain(self.stalled.clone())
    }

    /// From now on they are what they are called.
    pub(crate) fn begin(&mut self, now: Instant) {
        self.pacing = Some(Pacing::new(self.bytes_per_second, now));
    }

    /// One of them may have something to read.
    pub(crate) fn attend(&mut self, stage: &mut Stage, index: usize) {
        if self.pacing.is_none() {
            self.read(stage, index, usize::MAX);
        }
    }

    /// Reads what is due.
    pub(crate) fn turn(&mut self, stage: &mut Stage, now: Instant) {
        let Some(bytes) = self.pacing.as_mut().and_then(|pacing| pacing.due(now)) else { return };
        for turn in 0..self.slow.len() {
            self.read(stage, self.slow[turn], bytes);
        }
    }

    /// Reads them all out, and reports.
    pub(crate) fn reckon(mut self, stage: &mut Stage) -> io::Result<report::Slow> {
        let all: Vec<usize> = self.all().collect();
        all.iter().for_each(|&index| self.read(stage, index, usize::MAX));
        let start = Instant::now();
        let mut heard = start;
        while heard.elapsed() < RECKONED_AFTER && start.elapsed() < RECKON_MAX {
            stage.crowd.wait(RECKONED_AFTER)?;
            while let Some(index) = stage.crowd.next_ready() {
                if stage.standing(index) == Standing::Unwatched {
                    self.read(stage, index, usize::MAX);
                    heard = Instant::now();
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

    fn read(&mut self, stage: &mut Stage, index: usize, limit: usize) {
        if stage.standing(index) != Standing::Unwatched {
            return;
        }
        let outcome = read(&mut stage.crowd, index, limit, &mut self.received);
        let (ended, gone) = match outcome {
            Ok(()) => return,
            // The socket stays until the server ends it.
            Err(Ended::Closed(_)) => (1, false),
            Err(Ended::Parted) => (0, true),
            Err(_) => (1, true),
        };
        self.disconnected += ended;
        if gone {
            stage.set_standing(index, Standing::Gone);
        }
    }
}

fn read(crowd: &mut Crowd, index: usize, limit: usize, received: &mut u64) -> Result<(), Ended> {
    match limit {
        usize::MAX => crowd.read(index, |_| *received += 1),
        limit => crowd.read_some(index, limit, |_| *received += 1),
    }
}

/// How many bytes a slow reader may read, slice by slice.
#[derive(Debug)]
struct Pacing {
    bytes_per_second: u64,
    start: Instant,
    slices: u64,
    given: u64,
}

impl Pacing {
    fn new(bytes_per_second: u32, start: Instant) -> Self {
        Self { bytes_per_second: bytes_per_second.into(), start, slices: 0, given: 0 }
    }

    /// What each may read now; `None` until the next slice begins. Slices that were missed are made up for.
    fn due(&mut self, now: Instant) -> Option<usize> {
        let slices = (now.saturating_duration_since(self.start) * SLICES).as_secs();
        if slices <= self.slices {
            return None;
        }
        self.slices = slices;
        let bytes = slices * self.bytes_per_second / u64::from(SLICES) - self.given;
        self.given += bytes;
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
    fn a_slow_reader_reads_its_rate_in_slices_however_often_it_is_asked() {
        let often = read_in(1000, Duration::from_millis(1), 1000);
        assert_eq!(often, [50; 20]);
        let seldom = read_in(1000, Duration::from_millis(400), 5);
        assert_eq!(seldom, [400; 5]);
    }

    #[test]
    fn a_rate_below_one_byte_a_slice_is_kept_over_the_second() {
        assert_eq!(read_in(7, Duration::from_millis(10), 100).iter().sum::<usize>(), 7);
    }
}
