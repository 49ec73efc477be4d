//! The comparison: every server under every scenario, as processes of their own, in turn.
//!
//! Servers are interleaved within a round and each is set against the floor of the same round, so that a machine
//! that others use as well disturbs them alike. A fresh server for every run: nothing is inherited. Knows servers by
//! their command lines and results by the load generator's JSON.

mod contender;
mod scenario;
mod server_process;
mod table;

use std::{
    env, io,
    path::PathBuf,
    process::{Command, Stdio},
};

use self::{
    contender::{BuildError, Contender},
    scenario::{Scale, Scenario},
    server_process::{ServerProcess, StartError},
    table::{Run, Table},
};
use crate::{cpu, load::report::Report};

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
    /// Connections in echo, each with one message in flight.
    #[arg(long, default_value_t = 100)]
    echo_connections: usize,
    /// Connections whose memory is measured.
    #[arg(long, default_value_t = 10_000)]
    idle_connections: usize,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How long each run measures.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Bytes of a whole JSON message.
    #[arg(long, default_value_t = 64)]
    payload: usize,
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
    #[error("cannot find this program's own path")]
    OwnPath(#[source] io::Error),
    #[error("{0} is not in a target directory")]
    NoTargetDirectory(PathBuf),
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Why one run has no report.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the load generator did not start")]
    Load(#[source] io::Error),
    #[error("the load generator said: {0}")]
    NoReport(String),
}

/// Where everything is.
#[derive(Debug)]
struct Workshop {
    benchmarks: PathBuf,
    target: PathBuf,
    /// Server and client.
    cores: Option<(usize, usize)>,
}

/// Compares and prints; false when any run was faulty.
pub(crate) fn run(options: &Options) -> Result<bool, CompareError> {
    let workshop = Workshop::find(options.no_pin)?;
    if !options.no_build {
        options.servers.iter().try_for_each(|contender| contender.build(&workshop))?;
    }
    let scale = Scale {
        fanout: options.connections,
        echo: options.echo_connections,
        idle: options.idle_connections,
        seconds: options.seconds,
        payload: options.payload,
    };
    let mut runs = Vec::new();
    for round in 0..options.rounds {
        for &scenario in &options.scenarios {
            for turn in 0..options.servers.len() {
                // Another server begins each round, so that none always comes after the same.
                let contender = options.servers[(turn + round) % options.servers.len()];
                let outcome = workshop.run(contender, scenario, &scale);
                let run =
                    Run { round, scenario, contender, report: note(round, scenario, contender, outcome) };
                runs.push(run);
            }
        }
    }
    let faultless = runs.iter().all(Run::is_faultless);
    print!("{}", Table { options, scale: &scale, cores: workshop.cores, runs: &runs });
    Ok(faultless)
}

/// Tells on stderr how a run went, since a comparison takes minutes.
fn note(
    round: usize,
    scenario: Scenario,
    contender: Contender,
    outcome: Result<Report, RunError>,
) -> Option<Report> {
    let verdict = match &outcome {
        Ok(report) if report.is_faultless() => "faultless".to_owned(),
        Ok(report) => format!("FAULTY\n{report}"),
        Err(error) => format!("FAILED: {error}"),
    };
    eprintln!("round {}, {scenario}, {contender}: {verdict}", round + 1);
    outcome.ok()
}

impl Workshop {
    fn find(no_pin: bool) -> Result<Self, CompareError> {
        let benchmarks = env::current_exe().map_err(CompareError::OwnPath)?;
        let target = benchmarks
            .ancestors()
            .nth(2)
            .ok_or_else(|| CompareError::NoTargetDirectory(benchmarks.clone()))?
            .to_owned();
        let cores = if no_pin { None } else { cpu::server_and_client() };
        Ok(Self { benchmarks, target, cores })
    }

    fn run(&self, contender: Contender, scenario: Scenario, scale: &Scale) -> Result<Report, RunError> {
        let server = ServerProcess::start(|port| contender.command(self, port))?;
        let mut load = Command::new(&self.benchmarks);
        load.args([
            "load",
            "--json",
            "--url",
            &format!("ws://127.0.0.1:{}{}", server.port(), scenario.path()),
        ])
        .args(["--server-pid", &server.pid().to_string()])
        .args(scenario.arguments(scale))
        .stdin(Stdio::null());
        if let Some((_, client)) = self.cores {
            load.args(["--cpu", &client.to_string()]);
        }
        let output = load.output().map_err(RunError::Load)?;
        // A faulty run exits with 1 and has a report all the same.
        serde_json::from_slice(&output.stdout)
            .map_err(|_| RunError::NoReport(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
