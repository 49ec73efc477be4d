//! The duel: several servers at once, and one client that turns to one after the other for some milliseconds.
//!
//! What disturbs the machine for longer than that disturbs all alike, so their ratio is known to a percent or two where
//! runs behind each other differ by ten. For tuning: two builds of the example can be set against each other. Knows
//! CPU per delivery and nothing else; what users feel, `compare` says. Does not know how a slice is run.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    cpu,
    load::{Bout, LoadError, Mode, Options as Load},
    statistic::{counted, median},
    trial::{Contender, ServerProcess, StartError, Workshop, WorkshopError},
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
    #[error("{name} does not serve")]
    Start { name: String, source: StartError },
    #[error("the load on {name} failed")]
    Load { name: String, source: LoadError },
    #[error("the client could not be pinned")]
    Pin(#[from] cpu::PinError),
}

/// One server and what it has cost, slice by slice.
#[derive(Debug)]
struct Side {
    name: String,
    /// Ends with it.
    _server: ServerProcess,
    bout: Bout,
    costs: Vec<f64>,
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
    if !matches!(options.mode, Mode::Echo | Mode::Fanout) {
        return Err(DuelError::Mode);
    }
    if options.rounds == 0 || options.slice_millis == 0 {
        return Err(DuelError::Extent);
    }
    let workshop = Workshop::find(options.no_pin)?;
    if !options.no_build {
        workshop.build(&options.servers)?;
    }
    let servers = start(options, &workshop)?;
    // Behind the start: what a process starts inherits its core.
    cpu::pin(workshop.client_core())?;
    let mut sides = servers
        .into_iter()
        .map(|(name, server)| Side::open(options, name, server))
        .collect::<Result<Vec<_>, _>>()?;
    fight(options, &mut sides)?;
    let first = sides.first().map(|side| side.costs.clone()).unwrap_or_default();
    println!(
        "{:?}, {}, {} of {} ms, {}",
        options.mode,
        counted(options.connections, "connection"),
        counted(options.rounds, "round"),
        options.slice_millis,
        workshop.placement()
    );
    let mut faultless = true;
    for side in sides {
        if let Some(score) = Score::reckon(&side.name, &side.costs, &first) {
            println!("{score}");
        }
        let (name, report) = (side.name, side.bout.end());
        let report = report.map_err(|source| DuelError::Load { name: name.clone(), source })?;
        if !report.is_faultless() {
            faultless = false;
            println!("{name} was faulty:\n{report}");
        }
    }
    Ok(faultless)
}

fn start(options: &Options, workshop: &Workshop) -> Result<Vec<(String, ServerProcess)>, DuelError> {
    let named = |name: String, server: Result<_, _>| match server {
        Ok(server) => Ok((name, server)),
        Err(source) => Err(DuelError::Start { name, source }),
    };
    let servers = options.servers.iter().map(|server| named(server.to_string(), workshop.start(*server, 1)));
    let build = |path: &Path| named(path.display().to_string(), workshop.start_build(path));
    servers.chain(options.build.iter().map(|path| build(path))).collect()
}

/// Everybody's slices, each round beginning with another side: who comes first finds the caches coldest.
fn fight(options: &Options, sides: &mut [Side]) -> Result<(), DuelError> {
    let slice = Duration::from_millis(options.slice_millis);
    let count = sides.len();
    for round in 0..WARMUP_ROUNDS + options.rounds {
        for turn in 0..count {
            let side = &mut sides[(turn + round) % count];
            let outcome = side.bout.slice(slice);
            let slice = outcome.map_err(|source| DuelError::Load { name: side.name.clone(), source })?;
            if round >= WARMUP_ROUNDS {
                side.costs.push(slice.cost().unwrap_or(f64::NAN));
            }
        }
    }
    Ok(())
}

impl Side {
    fn open(options: &Options, name: String, server: ServerProcess) -> Result<Self, DuelError> {
        let echo = options.mode == Mode::Echo;
        let usual = if echo { options.connections } else { 1 };
        let mut load = Load::closed_loop(
            server.url(if echo { "/echo" } else { "/ws" }),
            server.pid(),
            options.mode,
            options.connections,
            options.in_flight.unwrap_or(usual),
            options.payload,
        );
        load.spin = !options.no_pin;
        let bout = Bout::open(&load).map_err(|source| DuelError::Load { name: name.clone(), source })?;
        Ok(Self { name, _server: server, bout, costs: Vec::new() })
    }
}

impl Score {
    /// `costs` against those of the first side; rounds in which either delivered nothing do not count.
    fn reckon(name: &str, costs: &[f64], first: &[f64]) -> Option<Self> {
        let mut ratios: Vec<f64> = costs.iter().zip(first).map(|(cost, first)| cost / first).collect();
        ratios.retain(|ratio| ratio.is_finite());
        ratios.sort_by(f64::total_cmp);
        let quartile = |quarter: usize| ratios.get(ratios.len() * quarter / 4).copied();
        Some(Self {
            name: name.to_owned(),
            cost: median(costs.iter().copied().filter(|cost| cost.is_finite()).collect())?,
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
        let score = Score::reckon("b", &[2.0, 3.0, 30.0, 5.0], &[1.0, 2.0, 10.0, f64::NAN]).unwrap();
        assert_eq!((score.cost, score.ratio, score.quartiles), (4.0, 2.0, (1.5, 3.0)));
        assert!(score.to_string().contains("4.000 µs per delivery, 2.000 of the first (1.500 to 3.000)"));
        assert!(Score::reckon("b", &[f64::NAN], &[1.0]).is_none());
    }
}
