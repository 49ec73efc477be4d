//! The scaling: how shardcast, and the floor where it can, goes with connections, shards, payload and groups.
//!
//! Each is varied alone around a base. The server has every core but the client's, since shards are to have cores;
//! where there are fewer cores than shards, that is what is measured, and the result says so. Knows what is varied
//! and what is shown; a trial knows how it is done.

mod axis;
mod show;

use std::path::PathBuf;

use serde::Serialize;

use self::axis::{Axis, Base};
use crate::{
    machine::Machine,
    results::{Results, ResultsError},
    statistic::median,
    trial::{Contender, Measure, Outcome, Workshop, WorkshopError},
};

/// What the scaling is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What is varied.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Axis::ALL)]
    axes: Vec<Axis>,
    /// Connections where they are not varied.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Bytes of a whole JSON message where they are not varied.
    #[arg(long, default_value_t = 64)]
    payload: usize,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How long each run measures.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// One round of a moment with few connections, to see that every benchmark is whole. The numbers mean nothing.
    #[arg(long, conflicts_with_all = ["rounds", "seconds", "connections"])]
    brief: bool,
    /// Where the results are put; `benchmarks/results` by default, and `brief` in it for a brief run.
    #[arg(long)]
    results: Option<PathBuf>,
    /// Take shardcast's example as it was built last.
    #[arg(long)]
    no_build: bool,
    /// Leave server and client to the scheduler instead of giving the client a core of its own.
    #[arg(long)]
    no_pin: bool,
}

/// Why there is no scaling.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScaleError {
    #[error(transparent)]
    Workshop(#[from] WorkshopError),
    #[error(transparent)]
    Results(#[from] ResultsError),
}

/// One run of one server at one value.
#[derive(Debug, Serialize)]
struct Run {
    /// From 0.
    round: usize,
    axis: Axis,
    value: usize,
    server: Contender,
    #[serde(flatten)]
    outcome: Outcome,
}

/// Everything that was varied, and everything that came of it.
#[derive(Debug, Serialize)]
struct Scaling {
    machine: Machine,
    placement: String,
    /// Absent when the server was not pinned.
    server_cores: Option<usize>,
    base: Base,
    axes: Vec<Axis>,
    runs: Vec<Run>,
}

/// Scales, prints and writes; false when a run failed or was faulty.
pub(crate) fn run(options: &Options) -> Result<bool, ScaleError> {
    let workshop = Workshop::find(options.no_pin)?.with_all_cores();
    let results = Results::open(options.results.as_deref(), options.brief)?;
    if !options.no_build {
        workshop.build(&[Contender::Shardcast])?;
    }
    let scaling = Scaling::make(options, &workshop);
    let text = scaling.to_string();
    print!("{text}");
    results.write("scale.md", &text)?;
    results.write_json("scale.json", &scaling)?;
    for &axis in &scaling.axes {
        results.write(&format!("scale-{axis}.svg"), &scaling.figure(axis))?;
    }
    Ok(!scaling.runs.iter().any(|run| run.outcome.is_unacceptable(run.server)))
}

impl Options {
    fn base(&self) -> Base {
        const BRIEF_CONNECTIONS: usize = 50;
        Base {
            rounds: if self.brief { 1 } else { self.rounds },
            seconds: if self.brief { 0.3 } else { self.seconds },
            warmup_seconds: if self.brief { 0.1 } else { 0.5 },
            connections: if self.brief { BRIEF_CONNECTIONS } else { self.connections },
            payload_bytes: self.payload,
        }
    }
}

impl Scaling {
    fn make(options: &Options, workshop: &Workshop) -> Self {
        let base = options.base();
        // Before the runs: sources that are edited meanwhile are not what is measured.
        let machine = Machine::look(&[Contender::Shardcast]);
        let mut runs = Vec::new();
        for round in 0..base.rounds {
            for &axis in &options.axes {
                for value in axis.values(options.brief) {
                    for &server in axis.servers() {
                        let outcome =
                            Outcome::from(workshop.run(server, axis.shards(value), &axis.load(value, &base)));
                        eprintln!(
                            "round {} of {}, {value} {}, {server}: {}",
                            round + 1,
                            base.rounds,
                            axis.unit(),
                            outcome.progress()
                        );
                        runs.push(Run { round, axis, value, server, outcome });
                    }
                }
            }
        }
        Self {
            machine,
            placement: workshop.placement(),
            server_cores: workshop.server_cores(),
            base,
            axes: options.axes.clone(),
            runs,
        }
    }

    fn outcomes(&self, axis: Axis, value: usize, server: Contender) -> impl Iterator<Item = &Outcome> {
        let here = move |run: &&Run| run.axis == axis && run.value == value && run.server == server;
        self.runs.iter().filter(here).map(|run| &run.outcome)
    }

    fn median(&self, axis: Axis, value: usize, server: Contender, measure: Measure) -> Option<f64> {
        let reports = self.outcomes(axis, value, server).filter_map(|outcome| outcome.report.as_ref());
        median(reports.filter_map(measure).collect())
    }

    /// The values that were run, ascending.
    fn values(&self, axis: Axis) -> Vec<usize> {
        let runs = self.runs.iter().filter(|run| run.axis == axis);
        let mut values: Vec<usize> = runs.map(|run| run.value).collect();
        values.sort_unstable();
        values.dedup();
        values
    }
}
