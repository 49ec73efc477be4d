//! The harness: where the programs are, which core each runs on, and one trial from start to report.

use std::{
    env, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{BuildError, Load, Program, Subject, TrialError, server_process::ServerProcess};
use crate::{
    cpu,
    load::report::Report,
    tls::{self, TlsError},
};

/// Why no trial is possible.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HarnessError {
    #[error("cannot find this program's own path")]
    OwnPath(#[source] io::Error),
    #[error("{0} is not in a target directory: run it with cargo")]
    NoTargetDirectory(PathBuf),
    #[error("taskset, which pins the servers, is not on the PATH: install util-linux, or pass --no-pin")]
    NoTaskset,
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// The programs of a trial and their cores.
#[derive(Debug)]
pub(crate) struct Harness {
    pub(super) benchmarks: PathBuf,
    pub(super) target: PathBuf,
    /// `None` when nothing is pinned.
    pub(super) cores: Option<Cores>,
}

#[derive(Debug)]
pub(super) struct Cores {
    taskset: PathBuf,
    server: usize,
    pub(super) client: usize,
}

impl Harness {
    /// Finds the programs, and a core each for server and client unless `no_pin` or unless there is only one.
    pub(crate) fn find(no_pin: bool) -> Result<Self, HarnessError> {
        let benchmarks = env::current_exe().map_err(HarnessError::OwnPath)?;
        let target = benchmarks
            .ancestors()
            .nth(2)
            .ok_or_else(|| HarnessError::NoTargetDirectory(benchmarks.clone()))?
            .to_owned();
        let cores = match cpu::server_and_client().filter(|_| !no_pin) {
            Some((server, client)) => {
                let taskset = on_path("taskset").ok_or(HarnessError::NoTaskset)?;
                Some(Cores { taskset, server, client })
            }
            None => None,
        };
        Ok(Self { benchmarks, target, cores })
    }

    /// Builds what is not part of this program, with these features.
    pub(crate) fn build(&self, subjects: &[Subject], features: &str) -> Result<(), HarnessError> {
        Ok(subjects.iter().try_for_each(|subject| subject.build(self, features))?)
    }

    /// shardcast's example, compiled as this program was: in release, or for a moment's run in debug.
    pub(super) fn example(&self) -> PathBuf {
        self.benchmarks.with_file_name("examples").join("fanout")
    }

    pub(super) fn is_release(&self) -> bool {
        self.benchmarks.parent().is_some_and(|folder| folder.ends_with("release"))
    }

    /// For the results: where server and client run.
    pub(crate) fn placement(&self) -> String {
        match &self.cores {
            Some(cores) => format!("server on core {}, client on core {}", cores.server, cores.client),
            None => "server and client not pinned".to_owned(),
        }
    }

    /// One server with one thread, one load, one report.
    pub(crate) fn run(&self, subject: Subject, load: &Load) -> Result<Report, TrialError> {
        let server = ServerProcess::start(&Program::Subject(subject), self, load.is_tls)?;
        let mut command = Command::new(&self.benchmarks);
        command.args(["load", "--json"]).args(self.load_arguments(&server, load));
        if let Some(cores) = &self.cores {
            command.args(["--cpu", &cores.client.to_string()]);
        }
        let output = command.stdin(Stdio::null()).output().map_err(TrialError::Spawn)?;
        // A faulty run exits with 1 and prints a report as well.
        serde_json::from_slice(&output.stdout)
            .map_err(|_| TrialError::NoReport(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }

    /// A file with the certificate of all servers and its private key.
    pub(super) fn certificate(&self) -> Result<PathBuf, TlsError> {
        let path = self.target.join("benchmarks.pem");
        tls::make_certificate(&path)?;
        Ok(path)
    }

    pub(super) fn load_arguments(&self, server: &ServerProcess, load: &Load) -> Vec<String> {
        let mut arguments = vec!["--url".to_owned(), server.url(load.path)];
        arguments.extend(["--server-pid".to_owned(), server.pid().to_string()]);
        for (name, value) in &load.flags {
            arguments.extend([(*name).to_owned(), value.clone()]);
        }
        // Only a client that has a core for itself may poll without sleeping.
        arguments.extend(self.cores.is_some().then(|| "--spin".to_owned()));
        arguments
    }

    pub(super) fn on_server_core(&self, program: &Path) -> Command {
        match &self.cores {
            // taskset replaces itself by what it starts, so the process id is the server's.
            Some(cores) => {
                let mut command = Command::new(&cores.taskset);
                command.args(["-c", &cores.server.to_string()]).arg(program);
                command
            }
            None => Command::new(program),
        }
    }
}

/// Where a program is.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|directory| directory.join(program)).find(|program| program.is_file())
}
