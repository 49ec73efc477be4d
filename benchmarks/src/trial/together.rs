//! Several servers at once, and one client that turns to one after the other for a slice of time.
//!
//! What disturbs the machine for longer than a few slices disturbs all alike, so that their ratios are known to a
//! percent or two where runs behind each other differ by ten. The client is a thread of this process: it must know
//! whose turn it is. Does not know what is made of the results.

use std::{fmt, path::PathBuf, thread, time::Duration};

use super::{Contender, Load, TrialError, Workshop, contender, server_process::ServerProcess};
use crate::{
    cpu,
    load::{Bout, Options, report::Report},
};

/// Who takes part.
#[derive(Clone, Debug)]
pub(crate) enum Entrant {
    Server(Contender),
    /// Another build of shardcast's example.
    Build(PathBuf),
}

/// Who has how many turns, and how long one is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turns {
    pub(crate) slice: Duration,
    /// Those before what is measured.
    pub(crate) warmup: usize,
    pub(crate) measured: usize,
}

/// What came of one entrant.
#[derive(Debug)]
pub(crate) struct Tried {
    pub(crate) report: Report,
    /// The server's CPU per delivery, turn by turn, in microseconds; absent where nothing was delivered.
    pub(crate) costs: Vec<Option<f64>>,
}

/// One entrant and its part of the client.
#[derive(Debug)]
struct Side {
    bout: Bout,
    costs: Vec<Option<f64>>,
    /// Ends with it.
    _server: ServerProcess,
}

impl Turns {
    /// As many as make up these seconds, at least one that is measured.
    pub(crate) fn of(slice: Duration, warmup_seconds: f64, seconds: f64) -> Self {
        let turns = |seconds: f64| (seconds / slice.as_secs_f64()).round() as usize;
        Self { slice, warmup: turns(warmup_seconds), measured: turns(seconds).max(1) }
    }
}

impl Workshop {
    /// All entrants with one thread each under the same load, in turns.
    pub(crate) fn run_together(
        &self,
        entrants: &[Entrant],
        load: &Load,
        turns: Turns,
    ) -> Vec<Result<Tried, TrialError>> {
        let client = || {
            let mut sides: Vec<_> = entrants.iter().map(|entrant| self.enter(entrant, load)).collect();
            take_turns(&mut sides, turns);
            sides.into_iter().map(|side| side.and_then(Side::end)).collect()
        };
        // A thread of its own, because it is pinned: nothing that is run later is to inherit that.
        let client = thread::scope(|scope| scope.spawn(client).join());
        client.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn enter(&self, entrant: &Entrant, load: &Load) -> Result<Side, TrialError> {
        let server = match entrant {
            Entrant::Server(contender) => self.start(*contender, 1)?,
            Entrant::Build(fanout) => ServerProcess::start(Contender::Shardcast.query(), |port| {
                contender::fanout(self, fanout, port, 1)
            })?,
        };
        cpu::pin(self.pins.as_ref().map(|pins| pins.client))?;
        let bout = Bout::open(&Options::parse(self.words(&server, load))?)?;
        Ok(Side { bout, costs: Vec::new(), _server: server })
    }
}

/// Each round begins with another side: who comes behind the same one always would find the same in the caches. Who
/// fails or loses something has no more turns.
fn take_turns(sides: &mut [Result<Side, TrialError>], turns: Turns) {
    let count = sides.len();
    for round in 0..turns.warmup + turns.measured {
        for turn in 0..count {
            let side = &mut sides[(turn + round) % count];
            let Some(present) = side.as_mut().ok().filter(|side| !side.bout.is_stuck()) else { continue };
            let taken = match round < turns.warmup {
                true => present.bout.warm_up(turns.slice),
                false => present.bout.slice(turns.slice).map(|cost| present.costs.push(cost)),
            };
            if let Err(error) = taken {
                *side = Err(error.into());
            }
        }
    }
}

impl Side {
    fn end(self) -> Result<Tried, TrialError> {
        Ok(Tried { report: self.bout.end()?, costs: self.costs })
    }
}

impl fmt::Display for Entrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server(contender) => contender.fmt(f),
            Self::Build(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_make_up_the_time_and_one_at_least_is_measured() {
        let turns = |warmup, seconds| {
            let turns = Turns::of(Duration::from_millis(100), warmup, seconds);
            (turns.warmup, turns.measured)
        };
        assert_eq!([turns(0.5, 3.0), turns(0.0, 0.01)], [(5, 30), (0, 1)]);
    }
}
