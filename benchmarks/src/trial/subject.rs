//! The subjects: the servers that are measured, by name, and how each is built and started.
//!
//! All but shardcast are subcommands of this program; shardcast is its own example, known by its path and flags only.

use std::{
    env,
    ffi::OsString,
    fmt, io,
    path::{Path, PathBuf},
    process::Command,
};

use clap::ValueEnum;

use super::Harness;

/// A server that is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Subject {
    Floor,
    Shardcast,
    /// Over TLS only: its streams are hidden from the shards.
    ShardcastBridge,
    TokioWebsockets,
    Fastwebsockets,
    Tutorial,
    AxumSignal,
    Socketioxide,
}

/// What is started.
#[derive(Clone, Debug)]
pub(crate) enum Program {
    Subject(Subject),
    /// Another build of shardcast's example.
    Build(PathBuf),
}

/// Why a server could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error("cargo did not start")]
    Cargo(#[source] io::Error),
    #[error("the example fanout does not build; leave shardcast out of --servers, or see above")]
    Example,
}

impl Subject {
    pub(crate) const ALL: [Self; 8] = [
        Self::Floor,
        Self::Shardcast,
        Self::ShardcastBridge,
        Self::TokioWebsockets,
        Self::Fastwebsockets,
        Self::Tutorial,
        Self::AxumSignal,
        Self::Socketioxide,
    ];

    /// Ours must be faultless; what another library loses is a result.
    pub(crate) fn is_ours(self) -> bool {
        self == Self::Floor || self.is_example()
    }

    fn is_example(self) -> bool {
        matches!(self, Self::Shardcast | Self::ShardcastBridge)
    }

    /// The crate that is measured, and its version; the floor has none.
    pub(crate) fn crate_version(self) -> Option<(&'static str, String)> {
        let name = match self {
            Self::Floor => return None,
            Self::Shardcast | Self::ShardcastBridge => "shardcast",
            Self::TokioWebsockets => "tokio-websockets",
            Self::Fastwebsockets => "fastwebsockets",
            Self::Tutorial => "axum",
            Self::AxumSignal => "axum-signal",
            Self::Socketioxide => "socketioxide",
        };
        Some((name, locked_version(name)?))
    }

    /// Builds shardcast's example into the target directory of this program, in its profile.
    pub(super) fn build(self, harness: &Harness, features: &str) -> Result<(), BuildError> {
        if !self.is_example() {
            return Ok(());
        }
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // What `cargo run` has set for this program. Build scripts that read it, such as ring's, would run again, and
        // everything that depends on them would be compiled again.
        let of_this_package = |name: &OsString| {
            let name = name.to_string_lossy();
            name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
        };
        for name in env::vars_os().map(|(name, _)| name).filter(of_this_package) {
            cargo.env_remove(name);
        }
        let status = cargo
            .args(["build", "-p", "examples", "--example", "fanout", "--features", features])
            .args(harness.is_release().then_some("--release"))
            .current_dir(workspace)
            .env("CARGO_TARGET_DIR", &harness.target)
            .status()
            .map_err(BuildError::Cargo)?;
        if status.success() { Ok(()) } else { Err(BuildError::Example) }
    }
}

impl Program {
    /// What follows the path in a URL; it also selects the protocol, see `Dialect`.
    pub(super) fn query(&self) -> &'static str {
        match self {
            Self::Subject(Subject::Socketioxide) => "?EIO=4&transport=websocket",
            _ => "",
        }
    }

    /// The command that serves on `port` with one thread, on the server's core.
    pub(super) fn command(&self, harness: &Harness, port: u16) -> Command {
        let example = harness.example();
        let mut command = match self {
            Self::Build(path) => harness.on_server_core(path),
            Self::Subject(subject) if subject.is_example() => harness.on_server_core(&example),
            Self::Subject(subject) => {
                let mut command = harness.on_server_core(&harness.benchmarks);
                command.args([&subject.to_string(), "--port", &port.to_string()]);
                return command;
            }
        };
        command.args(["--port", &port.to_string(), "--shards", "1", "--no-pin"]);
        if matches!(self, Self::Subject(Subject::ShardcastBridge)) {
            command.arg("--bridge");
        }
        command
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Subject(subject) => subject.fmt(f),
            Self::Build(path) => path.display().fmt(f),
        }
    }
}

/// The version of a crate that this program was built with.
pub(crate) fn locked_version(name: &str) -> Option<String> {
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
        for subject in Subject::ALL {
            assert_eq!(subject.crate_version().is_none(), subject == Subject::Floor, "{subject}");
        }
        assert_eq!(locked_version("axum-signal").as_deref(), Some("0.1.3"));
        assert_eq!(locked_version("no such crate"), None);
    }
}
