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
    excused: Duration,
}

impl Kill {
    pub(crate) fn new(count: usize, pool: Vec<usize>) -> Self {
        Self { count, pool, due: None, done: None, killed: 0, gap: None, excused: Duration::ZERO }
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
            let latency = now.saturating_duration_since(landed.sent).saturating_sub(self.excused);
            self.gap = self.gap.max(Some(latency));
        }
    }

    /// The client has looked elsewhere for so long: what lands from now on is not charged with it.
    pub(crate) fn excuse(&mut self, pause: Duration) {
        self.excused += pause;
    }

    pub(crate) fn report(&self) -> report::Kill {
        report::Kill { killed: self.killed, max_gap_ms: self.gap.map(|gap| 1e3 * gap.as_secs_f64()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_is_the_longest_time_around_the_killing_without_the_clients_own_pauses() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let landed = |sent| Landed { sender: 0, sent: start + ms(sent), seen: true, late: false };
        let mut kill = Kill::new(1, vec![0]);
        kill.follow(&landed(0), start + ms(900));
        kill.done = Some(start + ms(1000));
        kill.follow(&landed(990), start + ms(1020));
        assert_eq!(kill.report().max_gap_ms, Some(30.0));
        kill.follow(&landed(3001), start + ms(4000));
        assert_eq!(kill.report().max_gap_ms, Some(30.0), "too late to belong to it");
        kill.excuse(ms(100));
        kill.follow(&landed(2900), start + ms(3040));
        assert_eq!(kill.report().max_gap_ms, Some(40.0));
    }
}
