//! The comparison: every server under every scenario, in turn, several times.
//!
//! Servers are interleaved within a round, where little is to be told apart by tenths of a second, and each is set against
//! the floor of the same round, so that a machine that others use as well disturbs them alike. What peers lose is shown and held against them only there; ours must
//! not lose anything. Knows what is asked and what is shown; a trial knows how it is done.

mod figure;
mod run;
mod scenario;
mod table;

use std::{path::PathBuf, time::Duration};

use serde::Serialize;

use self::{
    run::{Run, Runs},
    scenario::{Extent, Scenario},
    table::Table,
};
use crate::{
    machine::Machine,
    results::{Results, ResultsError},
    trial::{Contender, Entrant, Outcome, Turns, Workshop, WorkshopError},
};

/// How long a turn is where servers are tried in turns: long beside what it takes to fill the caches, short beside what
/// disturbs the machine.
const SLICE: Duration = Duration::from_millis(100);

/// What the comparison is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which servers, in the order of the table.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Contender::ALL)]
    servers: Vec<Contender>,
    /// Which scenarios.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Scenario::ALL)]
    scenarios: Vec<Scenario>,
    /// Connections in fan-out.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Connections in the fan-out to a crowd.
    #[arg(long, default_value_t = 10_000)]
    crowd_connections: usize,
    /// Connections in echo, each with one message in flight.
    #[arg(long, default_value_t = 1000)]
    echo_connections: usize,
    /// Connections whose memory is measured.
    #[arg(long, default_value_t = 10_000)]
    idle_connections: usize,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each run measures.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Bytes of a whole JSON message.
    #[arg(long, default_value_t = 64)]
    payload: usize,
    /// One round of a moment with few connections, to see that every benchmark is whole. The numbers mean nothing.
    #[arg(long, conflicts_with_all = [
        "rounds", "seconds", "connections", "crowd_connections", "echo_connections", "idle_connections",
    ])]
    brief: bool,
    /// Where the results are put; `benchmarks/results` by default, and `brief` in it for a brief run.
    #[arg(long)]
    results: Option<PathBuf>,
    /// Take shardcast's example as it was built last.
    #[arg(long)]
    no_build: bool,
    /// Leave server and client to the scheduler instead of giving each a core.
    #[arg(long)]
    no_pin: bool,
}

/// Why there is no comparison.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompareError {
    #[error(transparent)]
    Workshop(#[from] WorkshopError),
    #[error(transparent)]
    Results(#[from] ResultsError),
}

/// Everything that was asked, and everything that came of it.
#[derive(Debug)]
struct Comparison {
    machine: Machine,
    placement: String,
    extent: Extent,
    servers: Vec<Contender>,
    scenarios: Vec<Scenario>,
    runs: Runs,
}

/// What of it is kept for programs.
#[derive(Debug, Serialize)]
struct Record<'a> {
    machine: &'a Machine,
    placement: &'a str,
    extent: &'a Extent,
    medians: Vec<Median>,
    runs: &'a [Run],
}

/// One cell of the tables.
#[derive(Debug, Serialize)]
struct Median {
    scenario: Scenario,
    server: Contender,
    column: &'static str,
    median: Option<f64>,
    ratio_to_floor: Option<f64>,
}

/// Compares, prints and writes; false when a server failed, or one of ours was faulty.
pub(crate) fn run(options: &Options) -> Result<bool, CompareError> {
    let workshop = Workshop::find(options.no_pin)?;
    let results = Results::open(options.results.as_deref(), options.brief)?;
    if !options.no_build {
        workshop.build(&options.servers)?;
    }
    let comparison = Comparison::make(options, &workshop);
    let figures = comparison.figures();
    let mut page = Table(&comparison).to_string();
    for (_, figure) in &figures {
        page += &format!("\n```text\n{}```\n", figure.sketch());
    }
    print!("{page}");
    results.write("compare.md", &page)?;
    results.write_json("compare.json", &comparison.record())?;
    for (name, figure) in &figures {
        results.write(name, &figure.draw())?;
    }
    Ok(!comparison.runs.0.iter().any(|run| run.outcome.is_unacceptable(run.server)))
}

impl Options {
    fn extent(&self) -> Extent {
        const BRIEF_CONNECTIONS: usize = 50;
        let connections = |asked: usize| if self.brief { BRIEF_CONNECTIONS } else { asked };
        Extent {
            rounds: if self.brief { 1 } else { self.rounds },
            seconds: if self.brief { 0.3 } else { self.seconds },
            warmup_seconds: if self.brief { 0.1 } else { 0.5 },
            payload_bytes: self.payload,
            connections: connections(self.connections),
            crowd_connections: connections(self.crowd_connections),
            echo_connections: connections(self.echo_connections),
            idle_connections: connections(self.idle_connections),
        }
    }
}

impl Comparison {
    fn make(options: &Options, workshop: &Workshop) -> Self {
        let extent = options.extent();
        // Before the runs: sources that are edited meanwhile are not what is measured.
        let machine = Machine::look(&options.servers);
        let mut runs = Vec::new();
        for round in 0..extent.rounds {
            // Another server begins each round.
            let mut servers = options.servers.clone();
            servers.rotate_left(round % options.servers.len().max(1));
            for &scenario in &options.scenarios {
                let mut note = |server, outcome: Outcome| {
                    // A comparison takes minutes: say how it goes.
                    eprintln!(
                        "round {} of {}, {scenario}, {server}: {}",
                        round + 1,
                        extent.rounds,
                        outcome.progress()
                    );
                    runs.push(Run { round, scenario, server, outcome });
                };
                let load = scenario.load(&extent);
                if scenario.is_in_turns() {
                    let entrants: Vec<_> = servers.iter().copied().map(Entrant::Server).collect();
                    let turns = Turns::of(SLICE, extent.warmup_seconds, extent.seconds);
                    let tried = workshop.run_together(&entrants, &load, turns);
                    for (&server, tried) in servers.iter().zip(tried) {
                        note(server, Outcome::from(tried.map(|tried| tried.report)));
                    }
                } else {
                    servers.iter().for_each(|&server| note(server, workshop.run(server, 1, &load).into()));
                }
            }
        }
        Self {
            machine,
            placement: workshop.placement(),
            extent,
            servers: options.servers.clone(),
            scenarios: options.scenarios.clone(),
            runs: Runs(runs),
        }
    }

    fn record(&self) -> Record<'_> {
        let mut medians = Vec::new();
        for &scenario in &self.scenarios {
            for &server in &self.servers {
                for column in scenario.columns().iter().filter(|column| column.is_plain()) {
                    medians.push(Median {
                        scenario,
                        server,
                        column: column.title,
                        median: self.runs.median(scenario, server, column.measure),
                        ratio_to_floor: self.runs.ratio(scenario, server, column.measure),
                    });
                }
            }
        }
        let Self { machine, placement, extent, runs, .. } = self;
        Record { machine, placement, extent, medians, runs: &runs.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trial::outcome::tests::{failed, faulty, weighed};

    /// The floor, shardcast, a peer that loses, and one that does not start; twice weighed.
    pub(super) fn comparison() -> Comparison {
        let servers =
            vec![Contender::Floor, Contender::Shardcast, Contender::Tutorial, Contender::AxumSignal];
        let outcomes = || [weighed(300.0), weighed(150.0), faulty(weighed(40.0)), failed()];
        let mut runs = Vec::new();
        for round in 0..2 {
            for (&server, outcome) in servers.iter().zip(outcomes()) {
                runs.push(Run { round, scenario: Scenario::Idle, server, outcome });
            }
        }
        Comparison {
            machine: Machine::look(&servers),
            placement: "nowhere".to_owned(),
            extent: Extent {
                rounds: 2,
                seconds: 1.0,
                warmup_seconds: 0.0,
                payload_bytes: 64,
                connections: 10,
                crowd_connections: 10,
                echo_connections: 10,
                idle_connections: 10,
            },
            servers,
            scenarios: vec![Scenario::Idle],
            runs: Runs(runs),
        }
    }

    #[test]
    fn the_record_has_every_run_and_the_medians_of_the_tables() {
        let comparison = comparison();
        let record = serde_json::to_value(comparison.record()).unwrap();
        assert_eq!(record["runs"].as_array().unwrap().len(), 8);
        let medians = record["medians"].as_array().unwrap();
        let shardcast = medians.iter().find(|median| median["server"] == "shardcast").unwrap();
        assert_eq!(shardcast["scenario"], "idle");
        assert_eq!(
            (shardcast["median"].as_f64(), shardcast["ratio_to_floor"].as_f64()),
            (Some(150.0), Some(0.5))
        );
    }
}
