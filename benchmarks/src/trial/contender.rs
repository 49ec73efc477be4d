//! The contenders: the servers by name, and how each is built and started.
//!
//! The floor and the peers are this program; shardcast is its own example, known by its path and its flags only.

use std::{env, fmt, io, path::Path, process::Command};

use clap::ValueEnum;

use super::Workshop;

/// A server that is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    Floor,
    Shardcast,
    TokioWebsockets,
    Fastwebsockets,
    Tutorial,
    AxumSignal,
    Socketioxide,
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
    pub(crate) const ALL: [Self; 7] = [
        Self::Floor,
        Self::Shardcast,
        Self::TokioWebsockets,
        Self::Fastwebsockets,
        Self::Tutorial,
        Self::AxumSignal,
        Self::Socketioxide,
    ];

    /// Ours must be faultless; what a peer loses is a result.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Self::Floor | Self::Shardcast)
    }

    /// The crate that is measured, and its version; the floor has none.
    pub(crate) fn subject(self) -> Option<(&'static str, String)> {
        let name = match self {
            Self::Floor => return None,
            Self::Shardcast => "shardcast",
            Self::TokioWebsockets => "tokio-websockets",
            Self::Fastwebsockets => "fastwebsockets",
            Self::Tutorial => "axum",
            Self::AxumSignal => "axum-signal",
            Self::Socketioxide => "socketioxide",
        };
        Some((name, locked_version(name)?))
    }

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

    /// What follows the path in its URLs, which also says how it is to be spoken to.
    pub(crate) fn query(self) -> &'static str {
        if self == Self::Socketioxide { "?EIO=4&transport=websocket" } else { "" }
    }

    /// The command that serves on `port`, on the server's cores, with as many shards or threads.
    pub(crate) fn command(self, workshop: &Workshop, port: u16, shards: usize) -> Command {
        if self == Self::Shardcast {
            return fanout(workshop, &workshop.target.join("release/examples/fanout"), port, shards);
        }
        let (port, shards) = (port.to_string(), shards.to_string());
        let mut command = workshop.on_server_cores(&workshop.benchmarks);
        command.args([&self.to_string(), "--port", &port]);
        if self != Self::Floor {
            command.args(["--threads", &shards]);
        }
        command
    }
}

/// The command for one build of shardcast's example.
pub(super) fn fanout(workshop: &Workshop, program: &Path, port: u16, shards: usize) -> Command {
    let mut command = workshop.on_server_cores(program);
    command.args(["--port", &port.to_string(), "--shards", &shards.to_string(), "--no-pin"]);
    command
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// The version that this program was built with.
fn locked_version(name: &str) -> Option<String> {
    let packages = include_str!("../../../Cargo.lock").split("[[package]]");
    let field = |package: &str, key: &str| {
        let value = package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "))?;
        Some(value.trim_matches('"').to_owned())
    };
    packages
        .filter(|package| field(package, "name").as_deref() == Some(name))
        .find_map(|package| field(package, "version"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_that_is_measured_has_a_version() {
        for contender in Contender::ALL {
            assert_eq!(contender.subject().is_none(), contender == Contender::Floor, "{contender}");
        }
        assert_eq!(locked_version("axum-signal").as_deref(), Some("0.1.3"));
        assert_eq!(locked_version("no such crate"), None);
    }
}
