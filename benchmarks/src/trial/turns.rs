//! Several servers at once, and one client that loads one after the other for a slice of time.
//!
//! A disturbance of the machine that outlasts a few slices affects all servers alike, so their ratios are exact to one or
//! two percent, where consecutive runs differ by ten. The client is a thread of this process, because it must know
//! whose turn it is. Does not know how the results are used.

use std::{thread, time::Duration};

use super::{Harness, Load, Program, TrialError, server_process::ServerProcess};
use crate::{
    cpu,
    load::{Options, TimedRun, report::Report},
};

/// How many turns each server has, and how long one is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turns {
    pub(crate) slice: Duration,
    /// Turns before the measured ones.
    pub(crate) warmup: usize,
    pub(crate) measured: usize,
}

/// The result of one server.
#[derive(Debug)]
pub(crate) struct TrialResult {
    pub(crate) report: Report,
    /// The server's CPU per delivery, turn by turn, in microseconds; `None` where nothing was delivered.
    pub(crate) costs: Vec<Option<f64>>,
}

/// One server and its part of the client.
#[derive(Debug)]
struct ActiveTrial {
    run: TimedRun,
    costs: Vec<Option<f64>>,
    /// Killed when this is dropped.
    _server: ServerProcess,
}

/// A trial from its start to its result.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one for each server")]
enum Trial {
    Active(ActiveTrial),
    Finished(Result<TrialResult, TrialError>),
}

impl Turns {
    /// As many turns as fill these seconds, with at least one measured.
    pub(crate) fn lasting(slice: Duration, warmup_seconds: f64, seconds: f64) -> Self {
        let turns = |seconds: f64| (seconds / slice.as_secs_f64()).round() as usize;
        Self { slice, warmup: turns(warmup_seconds), measured: turns(seconds).max(1) }
    }
}

impl Harness {
    /// All programs with one thread each under the same load, in turns.
    pub(crate) fn run_in_turns(
        &self,
        programs: &[Program],
        load: &Load,
        turns: Turns,
    ) -> Vec<Result<TrialResult, TrialError>> {
        let client = || {
            let start = |program| {
                self.start(program, load).map_or_else(|error| Trial::Finished(Err(error)), Trial::Active)
            };
            let mut trials: Vec<_> = programs.iter().map(|program| Some(start(program))).collect();
            take_turns(&mut trials, turns);
            trials.into_iter().flatten().map(Trial::finish).collect()
        };
        // A thread of its own, because it is pinned: what runs later must not inherit that.
        let client = thread::scope(|scope| scope.spawn(client).join());
        client.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn start(&self, program: &Program, load: &Load) -> Result<ActiveTrial, TrialError> {
        let server = ServerProcess::start(program, self, load.is_tls)?;
        cpu::pin(self.cores.as_ref().map(|cores| cores.client))?;
        let run = TimedRun::open(&Options::parse(self.load_arguments(&server, load))?)?;
        Ok(ActiveTrial { run, costs: Vec::new(), _server: server })
    }
}

fn take_turns(trials: &mut [Option<Trial>], turns: Turns) {
    let mut order = TurnOrder::of(trials.len());
    for round in 0..turns.warmup + turns.measured {
        for &index in order.next_round() {
            let trial = trials[index].take();
            trials[index] = trial.map(|trial| trial.take_turn(turns.slice, round >= turns.warmup));
        }
    }
}

impl Trial {
    /// Finishes a trial that fails or loses something: it has nothing more to measure.
    fn take_turn(self, slice: Duration, is_measured: bool) -> Self {
        let Self::Active(mut trial) = self else { return self };
        let taken = match is_measured {
            true => trial.run.slice(slice).map(|cost| trial.costs.push(cost)),
            false => trial.run.warm_up(slice),
        };
        match taken {
            Ok(()) if trial.run.is_stuck() => Self::Finished(trial.finish()),
            Ok(()) => Self::Active(trial),
            Err(error) => Self::Finished(Err(error.into())),
        }
    }

    fn finish(self) -> Result<TrialResult, TrialError> {
        match self {
            Self::Active(trial) => trial.finish(),
            Self::Finished(result) => result,
        }
    }
}

impl ActiveTrial {
    fn finish(self) -> Result<TrialResult, TrialError> {
        Ok(TrialResult { report: self.run.finish()?, costs: self.costs })
    }
}

/// The order of the turns: random and different in each round, because a server finds in the caches what the previous
/// one left there. No server has two turns in a row, where it would find its own data. Two servers alternate.
#[derive(Debug)]
struct TurnOrder {
    indexes: Vec<usize>,
    random: fastrand::Rng,
}

impl TurnOrder {
    fn of(count: usize) -> Self {
        Self { indexes: (0..count).collect(), random: fastrand::Rng::with_seed(count as u64) }
    }

    fn next_round(&mut self) -> &[usize] {
        if self.indexes.len() > 2 {
            let last = self.indexes.last().copied();
            self.random.shuffle(&mut self.indexes);
            if self.indexes.first().copied() == last {
                self.indexes.rotate_left(1);
            }
        }
        &self.indexes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_fill_the_time_and_at_least_one_is_measured() {
        let turns = |warmup, seconds| {
            let turns = Turns::lasting(Duration::from_millis(100), warmup, seconds);
            (turns.warmup, turns.measured)
        };
        assert_eq!([turns(0.5, 3.0), turns(0.0, 0.01)], [(5, 30), (0, 1)]);
    }

    #[test]
    fn every_server_follows_every_other_about_as_often_and_never_itself() {
        for count in [1, 2, 3, 7_usize] {
            let (mut order, rounds) = (TurnOrder::of(count), 1000);
            let turns: Vec<usize> = (0..rounds).flat_map(|_| order.next_round().to_vec()).collect();
            let mut followed = vec![vec![0; count]; count];
            turns.windows(2).for_each(|pair| followed[pair[1]][pair[0]] += 1);
            for (index, followed) in followed.iter().enumerate() {
                assert_eq!(turns.iter().filter(|&&turn| turn == index).count(), rounds);
                for (other, &times) in followed.iter().enumerate() {
                    let share = f64::from(times) * (count - 1) as f64 / rounds as f64;
                    let range = if other == index { 0.0..0.001 } else { 0.8..1.2 };
                    assert!(range.contains(&share), "of {count}, {index} after {other}: {share}");
                }
            }
        }
    }
}
