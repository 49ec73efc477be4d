//! The killing: half way through, some connections end at once and without a word, and the others must not notice.
//!
//! Every second one ends with a reset, the others as the kernel ends the socket of a process that dies. What is
//! looked for is the longest time that a message took around it, for those who stayed.

use std::{
    io,
    time::{Duration, Instant},
};

use super::{
    ledger::Landed,
    report,
    role::spread,
    stage::{Stage, Standing},
};

/// Messages sent this long after the killing still belong to it.
const AFTERMATH: Duration = Duration::from_secs(2);

/// The killing, before and after.
#[derive(Debug)]
pub(crate) struct Kill {
    count: usize,
    /// Who may be killed.
    pool: Vec<usize>,
    due: Option<Instant>,
    done: Option<Instant>,
    killed: usize,
    gap: Option<Duration>,
}

impl Kill {
    pub(crate) fn new(count: usize, pool: Vec<usize>) -> Self {
        Self { count, pool, due: None, done: None, killed: 0, gap: None }
    }

    pub(crate) fn set_due(&mut self, due: Instant) {
        self.due = Some(due);
    }

    /// Kills when it is time.
    pub(crate) fn turn(&mut self, stage: &mut Stage, now: Instant) -> io::Result<()> {
        if self.due.is_none_or(|due| now < due) {
            return Ok(());
        }
        self.due = None;
        self.pool.retain(|&index| stage.standing(index) == Standing::Member);
        let victims = spread(self.count.min(self.pool.len()), &self.pool);
        for (turn, &index) in victims.iter().enumerate() {
            stage.abort(index, turn.is_multiple_of(2), Standing::Gone)?;
        }
        self.killed = victims.len();
        self.done = Some(now);
        Ok(())
    }

    /// A message has landed at all survivors.
    #[inline]
    pub(crate) fn follow(&mut self, landed: &Landed, now: Instant) {
        if self.done.is_some_and(|done| landed.sent <= done + AFTERMATH) {
            self.gap = self.gap.max(Some(now.saturating_duration_since(landed.sent)));
        }
    }

    pub(crate) fn report(&self) -> report::Kill {
        report::Kill { killed: self.killed, max_gap_ms: self.gap.map(|gap| 1e3 * gap.as_secs_f64()) }
    }
}
