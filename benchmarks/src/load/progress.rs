//! A line each second on stderr during a long run. Plain lines, so that they fit into a log.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use super::{delivery_tracker::DeliveryTracker, report::Report};

const EVERY: Duration = Duration::from_secs(1);
/// A shorter run prints no lines unless asked to.
const DURATION_MIN: Duration = Duration::from_secs(5);

/// What the last line said.
#[derive(Debug)]
pub(crate) struct Progress {
    start: Instant,
    printed: Instant,
    received: u64,
}

impl Progress {
    /// `None` when no lines are to be printed.
    pub(crate) fn new(asked: bool, duration: Duration) -> Option<Self> {
        let is_default = duration > DURATION_MIN && io::stderr().is_terminal();
        let now = Instant::now();
        (asked || is_default).then_some(Self { start: now, printed: now, received: 0 })
    }

    pub(crate) fn print_due(&mut self, tracker: &DeliveryTracker, report: &Report, now: Instant) {
        let since = now.saturating_duration_since(self.printed);
        if since < EVERY {
            return;
        }
        let tally = &tracker.tally;
        eprintln!(
            "{:>4} s: {:.0} deliveries/s, {} messages in flight, {} deliveries outstanding, {} faults, {} disconnections",
            now.saturating_duration_since(self.start).as_secs(),
            (tally.received - self.received) as f64 / since.as_secs_f64(),
            tracker.in_flight(),
            tally.expected - tally.received,
            tally.duplicates + tally.order_violations + tally.strays,
            report.disconnections,
        );
        self.printed = now;
        self.received = tally.received;
    }
}
