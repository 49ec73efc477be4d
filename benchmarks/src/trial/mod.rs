//! A trial: a server and a load against it, as two processes, and the report that comes of it.
//!
//! A fresh server each time, so that nothing is inherited, and a core for the client that no server shares. Several
//! servers can be tried together, in turns. Knows servers by their command lines and results by the load generator's
//! JSON.

mod contender;
pub(crate) mod measure;
pub(crate) mod outcome;
mod server_process;
mod together;

use std::{
    env, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use self::{
    contender::BuildError,
    server_process::{ServerProcess, StartError},
};
pub(crate) use self::{
    contender::Contender,
    measure::Measure,
    outcome::Outcome,
    together::{Entrant, Tried, Turns},
};
use crate::{
    cpu::{self, PinError},
    load::{LoadError, report::Report},
};

/// Why nothing can be tried.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkshopError {
    #[error("cannot find this program's own path")]
    OwnPath(#[source] io::Error),
    #[error("{0} is not in a target directory")]
    NoTargetDirectory(PathBuf),
    #[error("taskset, which pins the servers, is not on the PATH: install util-linux, or say --no-pin")]
    NoTaskset,
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Why one trial has no report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrialError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the load generator did not start")]
    Load(#[source] io::Error),
    #[error("the load generator said: {0}")]
    NoReport(String),
    #[error("the load generator does not take its flags")]
    Flags(#[from] clap::Error),
    #[error(transparent)]
    Bout(#[from] LoadError),
    #[error("the client could not be pinned")]
    Pin(#[from] PinError),
}

/// What the load generator is told: a route of the server, and flags.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) path: &'static str,
    pub(crate) flags: Vec<(&'static str, String)>,
}

/// Where everything is.
#[derive(Debug)]
pub(crate) struct Workshop {
    benchmarks: PathBuf,
    target: PathBuf,
    /// Absent when nothing is pinned.
    pins: Option<Pins>,
}

/// Who runs where.
#[derive(Debug)]
struct Pins {
    taskset: PathBuf,
    server: Vec<usize>,
    client: usize,
}

impl Workshop {
    /// Finds the parts, and one core for the server and one for the client unless they are not to be pinned.
    pub(crate) fn find(no_pin: bool) -> Result<Self, WorkshopError> {
        let benchmarks = env::current_exe().map_err(WorkshopError::OwnPath)?;
        let target = benchmarks
            .ancestors()
            .nth(2)
            .ok_or_else(|| WorkshopError::NoTargetDirectory(benchmarks.clone()))?
            .to_owned();
        let pins = match cpu::server_and_client().filter(|_| !no_pin) {
            Some((server, client)) => {
                let taskset = on_path("taskset").ok_or(WorkshopError::NoTaskset)?;
                Some(Pins { taskset, server: vec![server], client })
            }
            None => None,
        };
        Ok(Self { benchmarks, target, pins })
    }

    /// The same, but with every core but the client's for the server.
    pub(crate) fn with_all_cores(mut self) -> Self {
        if let Some(pins) = &mut self.pins {
            pins.server = cpu::all().into_iter().filter(|&core| core != pins.client).collect();
        }
        self
    }

    /// Builds what the contenders need.
    pub(crate) fn build(&self, contenders: &[Contender]) -> Result<(), WorkshopError> {
        Ok(contenders.iter().try_for_each(|contender| contender.build(self))?)
    }

    /// In words, where server and client run.
    pub(crate) fn placement(&self) -> String {
        match &self.pins {
            Some(pins) => {
                let cores = if pins.server.len() == 1 { "core" } else { "cores" };
                format!("server on {cores} {}, client on core {}", pins.server_list(), pins.client)
            }
            None => "server and client not pinned".to_owned(),
        }
    }

    /// On how many cores the server runs; `None` when it is not pinned.
    pub(crate) fn server_cores(&self) -> Option<usize> {
        self.pins.as_ref().map(|pins| pins.server.len())
    }

    /// One server with `shards` threads, one load, one report.
    pub(crate) fn run(&self, contender: Contender, shards: usize, load: &Load) -> Result<Report, TrialError> {
        let server = self.start(contender, shards)?;
        let mut command = Command::new(&self.benchmarks);
        command.args(["load", "--json"]).args(self.words(&server, load));
        if let Some(pins) = &self.pins {
            command.args(["--cpu", &pins.client.to_string()]);
        }
        let output = command.stdin(Stdio::null()).output().map_err(TrialError::Load)?;
        // A faulty run exits with 1 and has a report all the same.
        serde_json::from_slice(&output.stdout)
            .map_err(|_| TrialError::NoReport(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }

    fn start(&self, contender: Contender, shards: usize) -> Result<ServerProcess, StartError> {
        ServerProcess::start(contender.query(), |port| contender.command(self, port, shards))
    }

    /// What the load generator is told about a server.
    fn words(&self, server: &ServerProcess, load: &Load) -> Vec<String> {
        let mut words = vec!["--url".to_owned(), server.url(load.path)];
        words.extend(["--server-pid".to_owned(), server.pid().to_string()]);
        for (name, value) in &load.flags {
            words.extend([(*name).to_owned(), value.clone()]);
        }
        // Only a client with a core of its own may keep it.
        words.extend(self.pins.is_some().then(|| "--spin".to_owned()));
        words
    }

    fn on_server_cores(&self, program: &Path) -> Command {
        match &self.pins {
            // taskset becomes what it starts, so the process id is the server's.
            Some(pins) => {
                let mut command = Command::new(&pins.taskset);
                command.args(["-c", &pins.server_list()]).arg(program);
                command
            }
            None => Command::new(program),
        }
    }
}

impl Pins {
    /// As taskset takes it.
    fn server_list(&self) -> String {
        self.server.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|directory| directory.join(program)).find(|program| program.is_file())
}
