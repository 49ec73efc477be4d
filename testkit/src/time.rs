//! Durations that tests name.

use std::time::Duration;

/// Longer than any test: for a limit that must not be reached.
pub const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Milliseconds.
pub const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
