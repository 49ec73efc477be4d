//! The broker: a server that is installed, on a free port and in a temporary folder, kept running.
//!
//! Started again in the same place, so that a crash loses nothing. Does not know nodes.

use std::fmt;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::process::{Ending, RESTART_AFTER, end, find, start};

/// How often a server is asked whether it accepts connections, and for how long in all.
const ASK_EVERY: Duration = Duration::from_millis(20);
const START_WITHIN: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Nats,
    Redis,
}

impl Kind {
    fn program(self) -> &'static str {
        match self {
            Self::Nats => "nats-server",
            Self::Redis => "redis-server",
        }
    }
}

pub(crate) struct Broker {
    kind: Kind,
    program: PathBuf,
    port: u16,
    folder: TempDir,
}

impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broker ({}, log in {})", self.program.display(), self.folder.path().display())
    }
}

impl Broker {
    /// One of this kind, or of any that is installed.
    pub(crate) fn find(kind: Option<Kind>) -> Result<Self, String> {
        let kinds = kind.map_or_else(|| vec![Kind::Nats, Kind::Redis], |kind| vec![kind]);
        let found = kinds.iter().find_map(|kind| Some((*kind, find(kind.program())?)));
        let (kind, program) = found.ok_or_else(|| {
            let names: Vec<_> = kinds.iter().map(|kind| kind.program()).collect();
            format!(
                "{} is not installed: run `sudo ci/install-brokers`, or `sudo apt-get install {}`",
                names.join(" or "),
                names[0]
            )
        })?;
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
        let port = free.map_err(|error| format!("no free port: {error}"))?.port();
        Ok(Self { kind, program, port, folder })
    }

    /// For the nodes.
    pub(crate) fn url(&self) -> String {
        match self.kind {
            Kind::Nats => format!("nats://127.0.0.1:{}?storage=file", self.port),
            Kind::Redis => format!("redis://127.0.0.1:{}", self.port),
        }
    }

    fn arguments(&self) -> Vec<String> {
        let (port, folder) = (self.port, self.folder.path().display().to_string());
        let words = match self.kind {
            Kind::Nats => format!("--addr 127.0.0.1 --port {port} --jetstream --store_dir"),
            Kind::Redis => {
                format!("--bind 127.0.0.1 --port {port} --appendonly yes --appendfsync always --save  --dir")
            }
        };
        words.split(' ').map(str::to_owned).chain([folder]).collect()
    }

    /// Runs it again and again, until it must end. Shows its process while it accepts connections.
    pub(crate) async fn keep_running(
        self,
        accepts: watch::Sender<Option<u32>>,
        mut ending: Ending,
    ) -> Result<(), String> {
        loop {
            let output = self.folder.path().join("output");
            let file = File::create(&output).and_then(|file| Ok((file.try_clone()?, file)));
            let (stdout, stderr) = file.map_err(|error| format!("{}: {error}", output.display()))?;
            let mut child = start(&self.program, self.arguments(), Stdio::from(stdout), Stdio::from(stderr))?;
            let pid = child.id();
            let has_ended = tokio::select! {
                _ = ending.changed() => {
                    end(&mut child).await;
                    return Ok(());
                }
                status = child.wait() => Some(status),
                accepts = timeout(START_WITHIN, self.accepts()) => {
                    accepts.map_err(|_| format!("{} does not accept connections", self.program.display()))?;
                    None
                }
            };
            if has_ended.is_some() {
                let said = std::fs::read_to_string(&output).unwrap_or_default();
                return Err(format!("{} has ended at its start:\n{said}", self.program.display()));
            }
            accepts.send_replace(pid);
            println!("broker: process {}", pid.unwrap_or_default());
            let status = tokio::select! {
                _ = ending.changed() => {
                    end(&mut child).await;
                    return Ok(());
                }
                status = child.wait() => status.map_err(|error| error.to_string())?,
            };
            accepts.send_replace(None);
            println!("broker: ended ({status}), and starts again");
            tokio::select! {
                _ = ending.changed() => return Ok(()),
                () = sleep(RESTART_AFTER) => {}
            }
        }
    }

    async fn accepts(&self) {
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await.is_err() {
            sleep(ASK_EVERY).await;
        }
    }
}
