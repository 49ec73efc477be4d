//! `duel`: an A/B comparison of servers or builds that take turns of some milliseconds, in CPU per delivery.
//!
//! For tuning: most changes gain less than consecutive runs differ by. Measures nothing else; `compare` measures what
//! users notice.

use std::{fmt, path::PathBuf, time::Duration};

use crate::{
    load::Mode,
    statistic::{counted, median},
    trial::{Harness, HarnessError, Load, Program, Subject, TrialError, TrialResult, Turns},
};

/// Rounds that are run and not counted.
const WARMUP_ROUNDS: usize = 5;

/// The command line of `duel`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which servers; the others are compared with the first.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Subject::Floor, Subject::Shardcast])]
    servers: Vec<Subject>,
    /// Another build of shardcast's example `fanout`; may be repeated.
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
    /// Groups in fan-out: connection i is in group i % N, and a message goes to the members of its sender's group. Needs
    /// servers with groups: the floor, shardcast and its builds.
    #[arg(long, default_value_t = 1)]
    groups: usize,
    /// Bytes of a whole JSON message.
    #[arg(long, default_value_t = 64)]
    payload: usize,
    /// Over TLS. Builds of shardcast's example need the feature `tls`.
    #[arg(long)]
    tls: bool,
    /// How many turns each server has.
    #[arg(long, default_value_t = 200)]
    rounds: usize,
    /// How long a turn is, in milliseconds.
    #[arg(long, default_value_t = 20)]
    slice_millis: u64,
    /// Use shardcast's example as it was built last.
    #[arg(long)]
    no_build: bool,
    /// Leave servers and client to the scheduler instead of giving each side a core.
    #[arg(long)]
    no_pin: bool,
}

/// Why there is no duel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DuelError {
    #[error("a duel needs messages: pass --mode echo or --mode fanout")]
    Mode,
    #[error("rounds, slice-millis and groups must be at least 1")]
    Extent,
    #[error(
        "groups need --mode fanout, and no server but the floor, shardcast and its builds: pass --servers floor,shardcast"
    )]
    Groups,
    #[error("shardcast-bridge is a server over TLS: pass --tls")]
    Bridge,
    #[error(transparent)]
    Harness(#[from] HarnessError),
    #[error("{name} has no result")]
    Trial { name: String, source: TrialError },
}

/// The result of one server or build.
#[derive(Debug)]
struct Score {
    name: String,
    /// Microseconds of CPU per delivery: the median.
    cost: f64,
    /// Relative to the cost of the first in the same round: the median and the quartiles.
    ratio: f64,
    quartiles: (f64, f64),
}

/// Runs the duel and prints it; false when a promise of delivery was broken.
pub(crate) fn run(options: &Options) -> Result<bool, DuelError> {
    let load = options.load()?;
    let harness = Harness::find(options.no_pin)?;
    if !options.no_build {
        harness.build(&options.servers, "tls")?;
    }
    let builds = options.build.iter().cloned().map(Program::Build);
    let programs: Vec<_> = options.servers.iter().copied().map(Program::Subject).chain(builds).collect();
    let turns = Turns {
        slice: Duration::from_millis(options.slice_millis),
        warmup: WARMUP_ROUNDS,
        measured: options.rounds,
    };
    let results = programs.iter().zip(harness.run_in_turns(&programs, &load, turns));
    let results: Vec<(String, TrialResult)> = results
        .map(|(program, result)| match result {
            Ok(result) => Ok((program.to_string(), result)),
            Err(source) => Err(DuelError::Trial { name: program.to_string(), source }),
        })
        .collect::<Result<_, _>>()?;
    println!(
        "{}{}, {}, {} of {} ms, {}",
        load.path,
        if load.is_tls { " over TLS" } else { "" },
        counted(options.connections, "connection"),
        counted(options.rounds, "round"),
        options.slice_millis,
        harness.placement()
    );
    let first = results.first().map_or(&[][..], |(_, result)| &result.costs);
    for (name, TrialResult { costs, .. }) in &results {
        match Score::compute(name, costs, first) {
            Some(score) => println!("{score}"),
            None => println!("  {name}: nothing was delivered"),
        }
    }
    let faulty = results.iter().filter(|(_, result)| !result.report.is_faultless());
    faulty.clone().for_each(|(name, result)| println!("{name} was faulty:\n{}", result.report));
    Ok(faulty.count() == 0)
}

impl Options {
    /// The load on each server.
    fn load(&self) -> Result<Load, DuelError> {
        if self.rounds == 0 || self.slice_millis == 0 || self.groups == 0 {
            return Err(DuelError::Extent);
        }
        let has_groups = self.mode == Mode::Fanout && self.servers.iter().all(|server| server.is_ours());
        if self.groups > 1 && !has_groups {
            return Err(DuelError::Groups);
        }
        if !self.tls && self.servers.contains(&Subject::ShardcastBridge) {
            return Err(DuelError::Bridge);
        }
        let (path, mode, in_flight) = match self.mode {
            Mode::Echo => ("/echo", "echo", self.connections),
            Mode::Fanout if self.groups > 1 => ("/group/{group}", "fanout", self.groups),
            Mode::Fanout => ("/ws", "fanout", 1),
            Mode::Idle => return Err(DuelError::Mode),
        };
        let flags = vec![
            ("--mode", mode.to_owned()),
            ("--connections", self.connections.to_string()),
            ("--in-flight", self.in_flight.unwrap_or(in_flight).to_string()),
            ("--payload", self.payload.to_string()),
            ("--groups", self.groups.to_string()),
        ];
        Ok(Load { path, flags, is_tls: self.tls })
    }
}

impl Score {
    /// Compares `costs` with those of the first; leaves out rounds in which either delivered nothing.
    fn compute(name: &str, costs: &[Option<f64>], first: &[Option<f64>]) -> Option<Self> {
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
        let score = Score::compute("b", &costs, &first).unwrap();
        assert_eq!((score.cost, score.ratio, score.quartiles), (4.0, 2.0, (1.5, 3.0)));
        assert!(score.to_string().contains("4.000 µs per delivery, 2.000 of the first (1.500 to 3.000)"));
        assert!(Score::compute("b", &[None], &first).is_none());
    }
}
