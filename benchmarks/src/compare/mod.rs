//! `compare`: every server under every scenario, several times, as tables, charts and JSON.
//!
//! What another library loses is shown and is a result; ours must not lose anything. Owns the command line and the
//! results directory; `comparison` owns the runs, and `trial` knows how one is done.

mod bar_chart;
mod charts;
mod column;
mod comparison;
mod runs;
mod scenario;
mod table;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use self::{
    charts::charts,
    comparison::Comparison,
    scenario::{Extent, Scenario},
    table::Table,
};
use crate::trial::{Harness, HarnessError, Subject};

/// The command line of `compare`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which servers, in the order of the table.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Subject::ALL)]
    servers: Vec<Subject>,
    /// Which scenarios.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Scenario::ALL)]
    scenarios: Vec<Scenario>,
    /// Connections in fan-out.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Connections in the large fan-out.
    #[arg(long, default_value_t = 10_000)]
    large_connections: usize,
    /// Connections in echo, each with one message in flight.
    #[arg(long, default_value_t = 1000)]
    echo_connections: usize,
    /// Connections whose memory is measured.
    #[arg(long, default_value_t = 10_000)]
    idle_connections: usize,
    /// Groups of 2 and of 20 connections.
    #[arg(long, default_value_t = 500)]
    groups: usize,
    /// Connections in fan-out and echo over TLS.
    #[arg(long, default_value_t = 400)]
    tls_connections: usize,
    /// Connections over TLS whose memory is measured.
    #[arg(long, default_value_t = 2000)]
    tls_idle_connections: usize,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each run measures.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Bytes of a whole JSON message.
    #[arg(long, default_value_t = 64)]
    payload: usize,
    /// One short round with few connections, to check that every benchmark works. Its numbers mean nothing.
    #[arg(long, conflicts_with_all = [
        "rounds", "seconds", "connections", "large_connections", "echo_connections", "idle_connections", "groups",
        "tls_connections", "tls_idle_connections",
    ])]
    brief: bool,
    /// The directory of the results: `benchmarks/results` by default, and `brief` in it for a brief run.
    #[arg(long)]
    results: Option<PathBuf>,
    /// Use shardcast's example as it was built last.
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
    Harness(#[from] HarnessError),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("the results cannot be encoded as JSON")]
    Json(#[from] serde_json::Error),
}

/// Compares, prints and writes the results; false when a server failed or one of ours was faulty.
pub(crate) fn run(options: &Options) -> Result<bool, CompareError> {
    let harness = Harness::find(options.no_pin)?;
    let results = options.results_directory();
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| CompareError::Write { path, source }
    };
    fs::create_dir_all(&results).map_err(failed(&results))?;
    if !options.no_build {
        harness.build(&options.servers, "tls")?;
    }
    let comparison = Comparison::run(&harness, &options.servers, &options.scenarios, options.extent());
    let mut page = Table(&comparison).to_string();
    for chart in charts(&comparison) {
        page += &format!("\n```text\n{chart}```\n");
    }
    print!("{page}");
    let json = serde_json::to_string_pretty(&comparison.record())? + "\n";
    for (name, text) in [("compare.md", &page), ("compare.json", &json)] {
        let path = results.join(name);
        fs::write(&path, text).map_err(failed(&path))?;
    }
    Ok(comparison.is_acceptable())
}

impl Options {
    fn results_directory(&self) -> PathBuf {
        let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
        match &self.results {
            Some(chosen) => chosen.clone(),
            // Meaningless numbers must not replace others.
            None if self.brief => default.join("brief"),
            None => default,
        }
    }

    fn extent(&self) -> Extent {
        const BRIEF_CONNECTIONS: usize = 50;
        const BRIEF_GROUPS: usize = 5;
        let connections = |asked: usize| if self.brief { BRIEF_CONNECTIONS } else { asked };
        Extent {
            rounds: if self.brief { 1 } else { self.rounds },
            seconds: if self.brief { 0.3 } else { self.seconds },
            warmup_seconds: if self.brief { 0.1 } else { 0.5 },
            payload_bytes: self.payload,
            connections: connections(self.connections),
            large_connections: connections(self.large_connections),
            echo_connections: connections(self.echo_connections),
            idle_connections: connections(self.idle_connections),
            groups: if self.brief { BRIEF_GROUPS } else { self.groups },
            tls_connections: connections(self.tls_connections),
            tls_idle_connections: connections(self.tls_idle_connections),
        }
    }
}
