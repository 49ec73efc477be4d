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

/// An entrant from its start to its result.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one for each server")]
enum Part {
    Present(Side),
    Over(Result<Tried, TrialError>),
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
            let mut parts: Vec<_> = entrants.iter().map(|entrant| Some(self.enter(entrant, load))).collect();
            take_turns(&mut parts, turns);
            parts.into_iter().flatten().map(Part::end).collect()
        };
        // A thread of its own, because it is pinned: nothing that is run later is to inherit that.
        let client = thread::scope(|scope| scope.spawn(client).join());
        client.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn enter(&self, entrant: &Entrant, load: &Load) -> Part {
        match self.try_enter(entrant, load) {
            Ok(side) => Part::Present(side),
            Err(error) => Part::Over(Err(error)),
        }
    }

    fn try_enter(&self, entrant: &Entrant, load: &Load) -> Result<Side, TrialError> {
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

fn take_turns(parts: &mut [Option<Part>], turns: Turns) {
    let mut order = Order::of(parts.len());
    for round in 0..turns.warmup + turns.measured {
        for &place in order.next_round() {
            let part = parts[place].take();
            parts[place] = part.map(|part| part.take_turn(turns.slice, round >= turns.warmup));
        }
    }
}

impl Part {
    /// Who fails or loses something is over then: its connections would be read by nobody from there on.
    fn take_turn(self, slice: Duration, is_measured: bool) -> Self {
        let Self::Present(mut side) = self else { return self };
        let taken = match is_measured {
            true => side.bout.slice(slice).map(|cost| side.costs.push(cost)),
            false => side.bout.warm_up(slice),
        };
        match taken {
            Ok(()) if side.bout.is_stuck() => Self::Over(side.end()),
            Ok(()) => Self::Present(side),
            Err(error) => Self::Over(Err(error.into())),
        }
    }

    fn end(self) -> Result<Tried, TrialError> {
        match self {
            Self::Present(side) => side.end(),
            Self::Over(outcome) => outcome,
        }
    }
}

impl Side {
    fn end(self) -> Result<Tried, TrialError> {
        Ok(Tried { report: self.bout.end()?, costs: self.costs })
    }
}

/// Who has a turn behind whom: by chance, and anew each round, because a server finds in the caches what the one before
/// it has left there. Never the same twice in a row, who would find its own. Of two, each always comes behind the other.
#[derive(Debug)]
struct Order {
    places: Vec<usize>,
    chance: fastrand::Rng,
}

impl Order {
    fn of(count: usize) -> Self {
        Self { places: (0..count).collect(), chance: fastrand::Rng::with_seed(count as u64) }
    }

    fn next_round(&mut self) -> &[usize] {
        if self.places.len() > 2 {
            let last = self.places.last().copied();
            self.chance.shuffle(&mut self.places);
            if self.places.first().copied() == last {
                self.places.rotate_left(1);
            }
        }
        &self.places
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

    #[test]
    fn everybody_comes_behind_everybody_else_about_as_often_and_never_behind_itself() {
        for count in [1, 2, 3, 7_usize] {
            let (mut order, rounds) = (Order::of(count), 1000);
            let turns: Vec<usize> = (0..rounds).flat_map(|_| order.next_round().to_vec()).collect();
            let mut behind = vec![vec![0; count]; count];
            turns.windows(2).for_each(|pair| behind[pair[1]][pair[0]] += 1);
            for (place, behind) in behind.iter().enumerate() {
                assert_eq!(turns.iter().filter(|&&turn| turn == place).count(), rounds);
                for (other, &times) in behind.iter().enumerate() {
                    let share = f64::from(times) * (count - 1) as f64 / rounds as f64;
                    let range = if other == place { 0.0..0.001 } else { 0.8..1.2 };
                    assert!(range.contains(&share), "of {count}, {place} behind {other}: {share}");
                }
            }
        }
    }
}
