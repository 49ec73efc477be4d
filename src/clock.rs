//! Times of the calendar and times of an engine's clock.
//!
//! Functions. An engine counts by a clock that nobody sets; applications and other nodes name times of the calendar.

use std::time::{Duration, Instant, SystemTime};

/// The time of the calendar at `instant`, which has passed.
pub(crate) fn time_of(instant: Instant) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(instant.elapsed()).unwrap_or(now)
}

/// A time of the calendar on the engine's clock, by which it is `now`.
pub(crate) fn instant_of(time: SystemTime, now: Instant) -> Instant {
    /// For a time that no clock can say.
    const YEARS: Duration = Duration::from_secs(30 * 366 * 24 * 60 * 60);
    let left = time.duration_since(SystemTime::now()).unwrap_or_default().min(YEARS);
    now + left
}
