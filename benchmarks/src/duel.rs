//! The duel: several servers or builds in turn for some milliseconds each, and what the others cost beside the first.
//!
//! For tuning: what a change brings is mostly less than what runs behind each other differ by. Knows CPU per delivery and
//! nothing else; what users feel, `compare` says.

use std::{fmt, path::PathBuf, time::Duration};

use crate::{
    load::Mode,
    statistic::{counted, median},
    trial::{Contender, Entrant, Load, TrialError, Tried, Turns, Workshop, WorkshopError},
};

/// Rounds that are run and not counted.
const WARMUP_ROUNDS: usize = 5;

/// What the duel is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which servers; the others are set against the first.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Contender::Floor, Contender::Shardcast])]
    servers: Vec<Contender>,
    /// Another build of shardcast's example `fanout`; may be said several times.
    #[arg(long)]
    build: Vec<PathBuf>,
    /// `echo` or `fanout`.
    #[arg(long, value_enum, default_value_t = Mode::Echo)]
    mode: Mode,
    /// Connections to each server.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Messages in flight: by default one for each connection in echo, and one in fan-out.
    #[arg(long)]
    in_flight: Option<usize>,
    /// Bytes of a whole JSON message.
    #[arg(long, default_value_t = 64)]
    payload: usize,
    /// How many times everybody has a turn.
    #[arg(long, default_value_t = 200)]
    rounds: usize,
    /// How long a turn is, in milliseconds.
    #[arg(long, default_value_t = 20)]
    slice_millis: u64,
    /// Take shardcast's example as it was built last.
    #[arg(long)]
    no_build: bool,
    /// Leave servers and client to the scheduler instead of giving each side a core.
    #[arg(long)]
    no_pin: bool,
}

/// Why there is no duel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DuelError {
    #[error("a duel is about messages: --mode echo or --mode fanout")]
    Mode,
    #[error("rounds and slice-millis must be at least 1")]
    Extent,
    #[error(transparent)]
    Workshop(#[from] WorkshopError),
    #[error("{name} has no result")]
    Trial { name: String, source: TrialError },
}

/// What is told of a side.
#[derive(Debug)]
struct Score {
    name: String,
    /// Microseconds of CPU per delivery: the median.
    cost: f64,
    /// Of the same round's cost of the first side: the median, and its quartiles.
    ratio: f64,
    quartiles: (f64, f64),
}

/// Runs the duel and prints it; false when a promise of delivery was broken.
pub(crate) fn run(options: &Options) -> Result<bool, DuelError> {
    let load = options.load()?;
    let workshop = Workshop::find(options.no_pin)?;
    if !options.no_build {
        workshop.build(&options.servers)?;
    }
    let builds = options.build.iter().cloned().map(Entrant::Build);
    let entrants: Vec<_> = options.servers.iter().copied().map(Entrant::Server).chain(builds).collect();
    let turns = Turns {
        slice: Duration::from_millis(options.slice_millis),
        warmup: WARMUP_ROUNDS,
        measured: options.rounds,
    };
    let tried = entrants.iter().zip(workshop.run_together(&entrants, &load, turns));
    let tried: Vec<(String, Tried)> = tried
        .map(|(entrant, tried)| match tried {
            Ok(tried) => Ok((entrant.to_string(), tried)),
            Err(source) => Err(DuelError::Trial { name: entrant.to_string(), source }),
        })
        .collect::<Result<_, _>>()?;
    println!(
        "{}, {}, {} of {} ms, {}",
        load.path,
        counted(options.connections, "connection"),
        counted(options.rounds, "round"),
        options.slice_millis,
        workshop.placement()
    );
    let first = tried.first().map_or(&[][..], |(_, tried)| &tried.costs);
    for (name, Tried { costs, .. }) in &tried {
        match Score::reckon(name, costs, first) {
            Some(score) => println!("{score}"),
            None => println!("  {name}: nothing was delivered"),
        }
    }
    let faulty = tried.iter().filter(|(_, tried)| !tried.report.is_faultless());
    faulty.clone().for_each(|(name, tried)| println!("{name} was faulty:\n{}", tried.report));
    Ok(faulty.count() == 0)
}

impl Options {
    /// What everybody is asked.
    fn load(&self) -> Result<Load, DuelError> {
        if self.rounds == 0 || self.slice_millis == 0 {
            return Err(DuelError::Extent);
        }
        let (path, mode, in_flight) = match self.mode {
            Mode::Echo => ("/echo", "echo", self.connections),
            Mode::Fanout => ("/ws", "fanout", 1),
            Mode::Idle | Mode::Storm => return Err(DuelError::Mode),
        };
        let flags = vec![
            ("--mode", mode.to_owned()),
            ("--connections", self.connections.to_string()),
            ("--in-flight", self.in_flight.unwrap_or(in_flight).to_string()),
            ("--payload", self.payload.to_string()),
        ];
        Ok(Load { path, flags })
    }
}

impl Score {
    /// `costs` against those of the first side; rounds in which either delivered nothing do not count.
    fn reckon(name: &str, costs: &[Option<f64>], first: &[Option<f64>]) -> Option<Self> {
        let ratio = |(cost, first): (&Option<f64>, &Option<f64>)| Some((*cost)? / (*first)?);
        let mut ratios: Vec<f64> = costs.iter().zip(first).filter_map(ratio).collect();
        ratios.sort_by(f64::total_cmp);
        let quartile = |quarter: usize| ratios.get(ratios.len() * quarter / 4).copied();
        Some(Self {
            name: name.to_owned(),
            cost: median(costs.iter().copied().flatten().collect())?,
            quartiles: (quartile(1)?, quartile(3)?),
            ratio: median(ratios)?,
        })
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, cost, ratio, quartiles: (low, high) } = self;
        write!(f, "  {name:<17} {cost:.3} µs per delivery, {ratio:.3} of the first ({low:.3} to {high:.3})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_the_median_of_the_rounds_ratios_and_leaves_out_rounds_without_deliveries() {
        let (costs, first) = ([2.0, 3.0, 30.0, 5.0].map(Some), [Some(1.0), Some(2.0), Some(10.0), None]);
        let score = Score::reckon("b", &costs, &first).unwrap();
        assert_eq!((score.cost, score.ratio, score.quartiles), (4.0, 2.0, (1.5, 3.0)));
        assert!(score.to_string().contains("4.000 µs per delivery, 2.000 of the first (1.500 to 3.000)"));
        assert!(Score::reckon("b", &[None], &first).is_none());
    }
}
