//! The contenders: the servers by name, and how each is built and started.
//!
//! The floor and axum-signal are this program; shardcast is its own example, known by its path and its flags only.

use std::{
    env, fmt, io,
    path::{Path, PathBuf},
    process::Command,
};

use super::Workshop;

/// A server that is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Contender {
    Floor,
    AxumSignal,
    Shardcast,
}

/// Why a server is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error("cargo did not start")]
    Cargo(#[source] io::Error),
    #[error("the example fanout does not build; leave shardcast out of --servers, or see above")]
    Example,
}

impl Contender {
    pub(crate) const ALL: [Self; 3] = [Self::Floor, Self::AxumSignal, Self::Shardcast];

    /// Builds what is not part of this program, into the target directory that this program lies in.
    pub(crate) fn build(self, workshop: &Workshop) -> Result<(), BuildError> {
        if self != Self::Shardcast {
            return Ok(());
        }
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--release", "--example", "fanout"])
            .current_dir(workspace)
            .env("CARGO_TARGET_DIR", &workshop.target)
            .status()
            .map_err(BuildError::Cargo)?;
        if status.success() { Ok(()) } else { Err(BuildError::Example) }
    }

    /// The command that serves on `port`, on the server's core.
    pub(crate) fn command(self, workshop: &Workshop, port: u16) -> Command {
        let core = workshop.cores.map(|(server, _)| server.to_string());
        let port = port.to_string();
        match self {
            Self::Floor | Self::AxumSignal => {
                let name = if self == Self::Floor { "floor" } else { "axum-signal" };
                let mut command = Command::new(&workshop.benchmarks);
                command.args([name, "--port", &port]);
                command.args(core.iter().flat_map(|core| ["--cpu", core]));
                command
            }
            Self::Shardcast => {
                let example = workshop.target.join("release/examples/fanout");
                // taskset becomes what it starts, so the process id is the server's.
                let mut command = match core.zip(taskset()) {
                    Some((core, taskset)) => {
                        let mut command = Command::new(taskset);
                        command.args(["-c", &core]).arg(example);
                        command
                    }
                    None => Command::new(example),
                };
                command.args(["--port", &port, "--shards", "1", "--no-pin"]);
                command
            }
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Floor => "floor",
            Self::AxumSignal => "axum-signal",
            Self::Shardcast => "shardcast",
        })
    }
}

fn taskset() -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|directory| directory.join("taskset")).find(|program| program.is_file())
}
