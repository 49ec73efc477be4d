//! A node: this program once more as the chat, kept running on one port.
//!
//! What it prints is printed with its name in front. Does not know the balancer.

use std::net::SocketAddr;
use std::pin::pin;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::process::{Ending, RESTART_AFTER, end, start};

/// Seconds from SIGTERM until the first client is disconnected, in which the balancer notices.
const PAUSE: &str = "1";
/// Seconds over which the clients are disconnected.
const SPREAD: &str = "2";

pub(crate) struct Node {
    pub(crate) name: String,
    /// The broker's URL.
    pub(crate) broker: String,
    /// 0: any.
    pub(crate) port: u16,
}

/// A node that listens.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Started {
    pub(crate) address: SocketAddr,
    pub(crate) pid: u32,
}

impl Node {
    /// Runs it again and again on one port, until it must end. Shows where it listens.
    pub(crate) async fn keep_running(
        mut self,
        starts: watch::Sender<Option<Started>>,
        mut ending: Ending,
    ) -> Result<(), String> {
        let name = self.name.clone();
        let mut has_listened = false;
        loop {
            let (mut child, stdout) = self.start()?;
            let mut reading = pin!(read(&name, child.id().unwrap_or_default(), stdout, &starts));
            let outcome = tokio::select! {
                _ = ending.changed() => {
                    tokio::join!(end(&mut child), reading).1.map_err(|error| format!("{name}: {error}"))?;
                    return Ok(());
                }
                outcome = &mut reading => outcome,
            };
            let listened_on = starts.send_replace(None);
            let status = outcome.and(child.wait().await).map_err(|error| format!("{name}: {error}"))?;
            if let Some(Started { address, .. }) = listened_on {
                self.port = address.port();
                has_listened = true;
            } else if !has_listened {
                return Err(format!("{name} ended at its start ({status}): see above"));
            }
            println!("{name}: ended ({status}), and starts again");
            tokio::select! {
                _ = ending.changed() => return Ok(()),
                () = sleep(RESTART_AFTER) => {}
            }
        }
    }

    fn start(&self) -> Result<(Child, ChildStdout), String> {
        let own = std::env::current_exe().map_err(|error| format!("this program's own path: {error}"))?;
        let port = self.port.to_string();
        let arguments =
            ["node", "--port", &port, "--backplane", &self.broker, "--pause", PAUSE, "--spread", SPREAD];
        let mut child = start(&own, arguments, Stdio::piped(), Stdio::inherit())?;
        let stdout = child.stdout.take().ok_or("a node without output")?;
        Ok((child, stdout))
    }
}

/// Reads what a node prints, to the end.
async fn read(
    name: &str,
    pid: u32,
    stdout: ChildStdout,
    starts: &watch::Sender<Option<Started>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stdout).lines();
    let mut id = String::new();
    while let Some(line) = lines.next_line().await? {
        if let Some(given) = line.strip_prefix("node ") {
            id = given.to_owned();
        } else if let Some(Ok(address)) = line.strip_prefix("listening on http://").map(str::parse) {
            println!("{name}: http://{address}, process {pid}, id {id}");
            starts.send_replace(Some(Started { address, pid }));
        } else {
            println!("{name}: {line}");
        }
    }
    Ok(())
}
