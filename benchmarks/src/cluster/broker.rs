//! The broker at which the nodes meet: a real server on a free port, which can be killed and started again.
//!
//! Debian's programs. It keeps what it stores in a folder of its own, and ends with this process, even if that is killed.
//! Does not know what is stored.

use std::{
    fmt, io,
    net::{Ipv4Addr, TcpStream},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::{
    process::Process,
    trial::{free_port, on_path},
};

const START_MAX: Duration = Duration::from_secs(20);
const ASK_EVERY: Duration = Duration::from_millis(5);

/// Which program.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum BrokerKind {
    Nats,
    Redis,
}

/// When Redis writes its log to the disk.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Fsync {
    /// Before it answers.
    Always,
    /// Once a second.
    Everysec,
    /// When the kernel does.
    No,
}

/// Where NATS keeps the log.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Storage {
    Memory,
    /// Kept over a restart.
    File,
}

/// How a broker keeps what it stores.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keeping {
    /// Redis, always with `appendonly yes`.
    pub(super) fsync: Fsync,
    /// NATS.
    pub(super) storage: Storage,
}

/// Why there is no broker.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BrokerError {
    #[error(
        "{program} is not on the PATH: install the package {package} of Debian (ci/install-brokers does)"
    )]
    NotInstalled { program: &'static str, package: &'static str },
    #[error("no port is free")]
    NoPort,
    #[error("{program} did not start")]
    Spawn { program: &'static str, source: io::Error },
    #[error("{program} has ended: {status}")]
    Ended { program: &'static str, status: ExitStatus },
    #[error("{program} accepts no connections after {} s", START_MAX.as_secs())]
    Silent { program: &'static str },
}

/// A broker that runs, or that has been killed and can be started again.
#[derive(Debug)]
pub(super) struct Broker {
    kind: BrokerKind,
    keeping: Keeping,
    port: u16,
    folder: TempDir,
    process: Option<Child>,
}

impl Broker {
    /// Starts one, and returns when it accepts connections.
    pub(super) fn start(kind: BrokerKind, keeping: Keeping) -> Result<Self, BrokerError> {
        let program = kind.program();
        for (program, package) in [(program, program), ("setpriv", "util-linux")] {
            if on_path(program).is_none() {
                return Err(BrokerError::NotInstalled { program, package });
            }
        }
        let port = free_port().ok_or(BrokerError::NoPort)?;
        let folder = tempfile::tempdir().map_err(|source| BrokerError::Spawn { program, source })?;
        let mut broker = Self { kind, keeping, port, folder, process: None };
        broker.spawn()?;
        broker.await_connections()?;
        Ok(broker)
    }

    /// Where nodes find it.
    pub(super) fn url(&self) -> String {
        let port = self.port;
        match self.kind {
            // In NATS the stream decides, which a node makes: in memory if nothing else is said.
            BrokerKind::Nats => match self.keeping.storage {
                Storage::Memory => format!("nats://127.0.0.1:{port}"),
                Storage::File => format!("nats://127.0.0.1:{port}?storage=file"),
            },
            BrokerKind::Redis => format!("redis://127.0.0.1:{port}"),
        }
    }

    pub(super) fn process(&self) -> Option<Process> {
        self.process.as_ref().map(|child| Process::new(child.id()))
    }

    /// Kills it by SIGKILL.
    pub(super) fn kill(&mut self) {
        if let Some(mut child) = self.process.take() {
            // Fails only when it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it with its port and what it has stored. Does not wait until it accepts connections.
    pub(super) fn spawn(&mut self) -> Result<(), BrokerError> {
        // It replaces itself by what it starts, so the process id is the broker's. The broker is killed when the thread
        // ends that has started it.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", self.kind.program()]).args(self.arguments());
        command.arg(match self.kind {
            BrokerKind::Nats => "--store_dir",
            BrokerKind::Redis => "--dir",
        });
        command.arg(self.folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let spawned = command.spawn();
        let program = self.kind.program();
        self.process = Some(spawned.map_err(|source| BrokerError::Spawn { program, source })?);
        Ok(())
    }

    /// An error if it has ended by itself.
    pub(super) fn check(&mut self) -> Result<(), BrokerError> {
        let program = self.kind.program();
        let ended = self.process.as_mut().map_or(Ok(None), Child::try_wait);
        match ended.map_err(|source| BrokerError::Spawn { program, source })? {
            Some(status) => Err(BrokerError::Ended { program, status }),
            None => Ok(()),
        }
    }

    fn await_connections(&mut self) -> Result<(), BrokerError> {
        let end = Instant::now() + START_MAX;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            self.check()?;
            if Instant::now() > end {
                return Err(BrokerError::Silent { program: self.kind.program() });
            }
            thread::sleep(ASK_EVERY);
        }
        Ok(())
    }

    fn arguments(&self) -> Vec<String> {
        let port = self.port;
        let text = match self.kind {
            BrokerKind::Nats => format!("--addr 127.0.0.1 --port {port} --jetstream"),
            BrokerKind::Redis => {
                let fsync = self.keeping.fsync;
                format!("--bind 127.0.0.1 --port {port} --appendonly yes --appendfsync {fsync}")
            }
        };
        text.split(' ').map(str::to_owned).collect()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill();
    }
}

impl BrokerKind {
    /// Also the name of Debian's package.
    fn program(self) -> &'static str {
        match self {
            Self::Nats => "nats-server",
            Self::Redis => "redis-server",
        }
    }

    /// What the program says of itself.
    pub(super) fn version(self) -> Option<String> {
        let output = Command::new(self.program()).arg("--version").output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let version = text.split_whitespace().find_map(|word| {
            let number = word.trim_start_matches("v=").trim_start_matches('v');
            number.starts_with(|first: char| first.is_ascii_digit()).then(|| number.to_owned())
        })?;
        Some(format!("{} {version}", self.program()))
    }
}

impl fmt::Display for Fsync {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Always => "always",
            Self::Everysec => "everysec",
            Self::No => "no",
        })
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::File => "file",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEPING: Keeping = Keeping { fsync: Fsync::Always, storage: Storage::File };

    #[test]
    fn a_broker_that_was_killed_starts_again_at_its_port_and_ends_with_its_owner() {
        for kind in [BrokerKind::Nats, BrokerKind::Redis] {
            let mut broker = Broker::start(kind, KEEPING).unwrap();
            let (url, connect) = (broker.url(), |port| TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
            let port = broker.port;
            broker.kill();
            assert!(connect(port).is_err() && broker.process().is_none());
            broker.spawn().unwrap();
            broker.await_connections().unwrap();
            assert_eq!(broker.url(), url);
            drop(broker);
            assert!(connect(port).is_err());
            assert!(kind.version().is_some_and(|version| version.starts_with(kind.program())));
        }
    }

    #[test]
    fn a_broker_that_cannot_start_is_an_error_and_is_not_waited_for() {
        let first = Broker::start(BrokerKind::Redis, KEEPING).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (kind, port) = (first.kind, first.port);
        let mut second = Broker { kind, keeping: KEEPING, port, folder, process: None };
        second.spawn().unwrap();
        let ended = std::iter::repeat_with(|| second.check()).find(Result::is_err);
        assert!(matches!(ended, Some(Err(BrokerError::Ended { program: "redis-server", .. }))));
    }
}
