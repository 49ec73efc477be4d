//! Brokers for tests: real servers that a test starts, pauses, kills and starts again.
//!
//! Each server has its own port and folder, and ends with its test, even if the test is killed. The programs must be
//! installed (Debian's packages `nats-server` and `redis-server`); `ci/test` does that. Not published. Panics where a test
//! must fail. Knows neither backplanes nor hubs.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tempfile::TempDir;

/// How long a server may take to start. Generous: a busy machine is not a failure.
const STARTED_WITHIN: Duration = Duration::from_secs(60);

/// Which server it is, and what it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// NATS with JetStream; each stream says whether it is kept over a restart.
    Nats,
    /// Redis that has written each command to its file before it answers.
    Redis,
    /// Redis that keeps nothing over a restart.
    ForgetfulRedis,
}

impl Kind {
    fn scheme(self) -> &'static str {
        match self {
            Self::Nats => "nats",
            Self::Redis | Self::ForgetfulRedis => "redis",
        }
    }

    fn command(self, port: u16, folder: &Path) -> Vec<String> {
        let folder = folder.display();
        let redis = format!("redis-server --bind 127.0.0.1 --port {port} --dir {folder} --save ");
        let command = match self {
            Self::Nats => {
                format!("nats-server --addr 127.0.0.1 --port {port} --jetstream --store_dir {folder}")
            }
            Self::Redis => format!("{redis} --appendonly yes --appendfsync always"),
            Self::ForgetfulRedis => format!("{redis} --appendonly no"),
        };
        command.split(' ').map(str::to_owned).collect() // `--save` has an empty value
    }
}

/// A server on a port of this machine, until this is dropped or the thread has ended that has started it last.
#[derive(Debug)]
pub struct Server {
    kind: Kind,
    address: SocketAddr,
    folder: TempDir,
    /// What was stored at some time.
    remembered: TempDir,
    process: Option<Child>,
}

impl Server {
    /// Starts it on a free port, and returns when it accepts connections.
    pub async fn start(kind: Kind) -> Self {
        let mut server = Self::prepare(kind);
        server.run().await;
        server
    }

    /// Chooses its port and folder, and leaves it to [`run`](Self::run) to start it.
    pub fn prepare(kind: Kind) -> Self {
        let [folder, remembered] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = free.local_addr().unwrap();
        Self { kind, address, folder, remembered, process: None }
    }

    /// As `nats://host:port` or `redis://host:port`.
    pub fn url(&self) -> String {
        format!("{}://{}", self.kind.scheme(), self.address)
    }

    /// Starts it, at the same address and with what it has kept, and returns when it accepts connections.
    pub async fn run(&mut self) {
        let words = self.kind.command(self.address.port(), self.folder.path());
        // It is killed when the thread ends that has started it, which is the test's.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).args(&words).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        self.process = Some(command.spawn().unwrap_or_else(|error| panic!("setpriv: {error}")));
        let started = Instant::now();
        while TcpStream::connect(self.address).is_err() {
            let ended = self.process.as_mut().and_then(|process| process.try_wait().unwrap());
            assert!(ended.is_none(), "{} has ended: is it installed? {ended:?}", words[0]);
            assert!(started.elapsed() < STARTED_WITHIN, "{} does not accept connections", words[0]);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Kills it (SIGKILL), if it runs.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Suspends it (SIGSTOP): the system still accepts connections and data for it, and nothing is answered.
    pub fn pause(&self) {
        pause(self.process.as_ref().expect("it runs").id());
    }

    /// Lets it go on (SIGCONT).
    pub fn resume(&self) {
        resume(self.process.as_ref().expect("it runs").id());
    }

    /// Notes what it has stored, for [`go_back`](Self::go_back). It is killed and started again.
    pub async fn remember(&mut self) {
        self.kill();
        copy(self.folder.path(), self.remembered.path()).unwrap();
        self.run().await;
    }

    /// Loses what it has stored since then, as in a crash before the last records were written.
    pub async fn go_back(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.folder.path()).unwrap();
        copy(self.remembered.path(), self.folder.path()).unwrap();
        self.run().await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Suspends a child of this process (SIGSTOP). Returns when none of its threads runs any more.
pub fn pause(process: u32) {
    signal(process, Signal::STOP);
    let (_, status) = waitpid(Some(id(process)), WaitOptions::UNTRACED).unwrap().expect("it was waited for");
    assert!(status.stopped(), "it has ended: {status:?}");
}

/// Lets a child of this process go on (SIGCONT).
pub fn resume(process: u32) {
    signal(process, Signal::CONT);
}

fn signal(process: u32, signal: Signal) {
    kill_process(id(process), signal).unwrap();
}

fn id(process: u32) -> Pid {
    i32::try_from(process).ok().and_then(Pid::from_raw).expect("the id of a process")
}

/// Copies a folder with all that is in it.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() { copy(&path, &to)? } else { std::fs::copy(&path, &to).map(drop)? }
    }
    Ok(())
}
