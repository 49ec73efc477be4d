//! Runs every server under every scenario, round by round, and keeps what came of it.
//!
//! Each round begins with another server, and each server is compared with the floor of the same round. Does not know
//! how results are shown.

use std::time::Duration;

use serde::Serialize;

use super::{
    runs::{Run, Runs},
    scenario::{Extent, Scenario},
};
use crate::{
    machine::Machine,
    trial::{Harness, Outcome, Program, Subject, Turns},
};

/// How long a turn is where servers take turns: long enough that filling the caches hardly counts, and short beside what
/// disturbs the machine.
pub(crate) const SLICE: Duration = Duration::from_millis(100);

/// What was asked for, and all results.
#[derive(Debug)]
pub(crate) struct Comparison {
    pub(crate) machine: Machine,
    pub(crate) placement: String,
    pub(crate) extent: Extent,
    pub(crate) servers: Vec<Subject>,
    pub(crate) scenarios: Vec<Scenario>,
    pub(crate) runs: Runs,
}

/// The results for programs, as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Record<'a> {
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
    server: Subject,
    column: &'static str,
    median: Option<f64>,
    ratio_to_floor: Option<f64>,
}

impl Comparison {
    pub(crate) fn run(
        harness: &Harness,
        servers: &[Subject],
        scenarios: &[Scenario],
        extent: Extent,
    ) -> Self {
        // Before the runs: sources that are edited meanwhile are not what is measured.
        let machine = Machine::inspect(servers);
        let mut runs = Vec::new();
        for round in 0..extent.rounds {
            let mut rotated = servers.to_vec();
            rotated.rotate_left(round % servers.len().max(1));
            for &scenario in scenarios {
                let mut order = rotated.clone();
                order.retain(|&server| scenario.includes(server));
                let mut note = |server, outcome: Outcome| {
                    let (round_number, rounds) = (round + 1, extent.rounds);
                    let progress = outcome.progress();
                    eprintln!("round {round_number} of {rounds}, {scenario}, {server}: {progress}");
                    runs.push(Run { round, scenario, server, outcome });
                };
                let load = scenario.load(&extent);
                if scenario.is_in_turns() {
                    let programs: Vec<_> = order.iter().copied().map(Program::Subject).collect();
                    let turns = Turns::lasting(SLICE, extent.warmup_seconds, extent.seconds);
                    let results = harness.run_in_turns(&programs, &load, turns);
                    for (&server, result) in order.iter().zip(results) {
                        note(server, Outcome::from(result.map(|result| result.report)));
                    }
                } else {
                    order.iter().for_each(|&server| note(server, harness.run(server, &load).into()));
                }
            }
        }
        Self {
            machine,
            placement: harness.placement(),
            extent,
            servers: servers.to_vec(),
            scenarios: scenarios.to_vec(),
            runs: Runs(runs),
        }
    }

    /// False when a server failed or one of ours was faulty.
    pub(crate) fn is_acceptable(&self) -> bool {
        !self.runs.0.iter().any(|run| run.outcome.is_unacceptable(run.server))
    }

    /// The servers that take part in a scenario, in the order of the table.
    pub(crate) fn servers_in(&self, scenario: Scenario) -> impl Iterator<Item = Subject> {
        self.servers.iter().copied().filter(move |&server| scenario.includes(server))
    }

    pub(crate) fn record(&self) -> Record<'_> {
        let mut medians = Vec::new();
        for &scenario in &self.scenarios {
            for server in self.servers_in(scenario) {
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
pub(crate) mod tests {
    use super::*;
    use crate::trial::outcome::tests::{failed, faulty, memory_outcome};

    /// Two rounds of the floor, shardcast, a server that was faulty, and one that does not start.
    pub(crate) fn comparison() -> Comparison {
        let servers = vec![Subject::Floor, Subject::Shardcast, Subject::Tutorial, Subject::AxumSignal];
        let outcomes =
            || [memory_outcome(300.0), memory_outcome(150.0), faulty(memory_outcome(40.0)), failed()];
        let mut runs = Vec::new();
        for round in 0..2 {
            for (&server, outcome) in servers.iter().zip(outcomes()) {
                runs.push(Run { round, scenario: Scenario::Idle, server, outcome });
            }
        }
        Comparison {
            machine: Machine::inspect(&servers),
            placement: "not pinned".to_owned(),
            extent: Extent {
                rounds: 2,
                seconds: 1.0,
                warmup_seconds: 0.0,
                payload_bytes: 64,
                connections: 10,
                large_connections: 10,
                echo_connections: 10,
                idle_connections: 10,
                groups: 5,
                tls_connections: 10,
                tls_idle_connections: 10,
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
