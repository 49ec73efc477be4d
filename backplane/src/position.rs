//! A place in the log.
//!
//! A value. Made by the backplanes; compared and kept by their readers. Does not know the record.

use std::fmt;

/// The place of a record in the log: an epoch, and a number in it.
///
/// Positions of one log are ordered as its records are. Numbers are consecutive within an epoch.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// Grows when the broker has lost records: the numbers of the former epoch may have been given twice. In
    /// milliseconds since 1970, as far as clocks are right.
    pub epoch: u64,
    /// The number of the record.
    pub sequence: u64,
}

impl Position {
    /// The position after this one.
    pub(crate) fn next(self) -> Self {
        Self { sequence: self.sequence + 1, ..self }
    }
}

/// As `epoch-sequence`.
impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.sequence)
    }
}

/// An epoch that is greater than `former`: the time, unless a clock is wrong.
#[cfg(any(feature = "nats", feature = "redis"))]
pub(crate) fn new_epoch(former: u64) -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (since.as_millis() as u64).max(former + 1)
}
