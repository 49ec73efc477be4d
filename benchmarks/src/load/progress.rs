//! Progress: a line a second on stderr, while a run takes its time. Plain lines, so that a log can hold them.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use super::{ledger::Ledger, report::Report};

const EVERY: Duration = Duration::from_secs(1);
/// A shorter run is not worth a line, unless it is asked for.
const WORTH_TELLING: Duration = Duration::from_secs(5);

/// What was told last.
#[derive(Debug)]
pub(crate) struct Progress {
    start: Instant,
    told: Instant,
    received: u64,
}

impl Progress {
    /// `None` when nobody would see it or nobody would wait for it.
    pub(crate) fn new(asked: bool, duration: Duration) -> Option<Self> {
        let worth = duration > WORTH_TELLING && io::stderr().is_terminal();
        let now = Instant::now();
        (asked || worth).then_some(Self { start: now, told: now, received: 0 })
    }

    pub(crate) fn turn(&mut self, ledger: &Ledger, report: &Report, now: Instant) {
        let since = now.saturating_duration_since(self.told);
        if since < EVERY {
            return;
        }
        let tally = &ledger.tally;
        eprintln!(
            "{:>4} s: {:.0} deliveries/s, {} messages in flight, {} deliveries outstanding, {} faults, {} disconnections",
            now.saturating_duration_since(self.start).as_secs(),
            (tally.received - self.received) as f64 / since.as_secs_f64(),
            ledger.open(),
            tally.expected - tally.received,
            tally.duplicates + tally.order_violations + tally.strays,
            report.disconnections,
        );
        self.told = now;
        self.received = tally.received;
    }
}
