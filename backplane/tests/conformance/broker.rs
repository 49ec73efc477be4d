//! The brokers of the suite: real servers that a test starts, kills and starts again, and the one in memory.
//!
//! Each server has its own port and folder, and ends with its test, even if the test is killed. Does not know what is
//! tested.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use shardcast_backplane::Backplane;
use shardcast_backplane::memory::{MemoryBackplane, MemoryLog};
use shardcast_backplane::nats::{NatsBackplane, NatsConfig, Storage};
use shardcast_backplane::redis::{RedisBackplane, RedisConfig};
use tempfile::TempDir;

/// What a broker keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keeps {
    /// Also over a restart.
    Everything,
    /// The last records.
    Little,
    /// Nothing over a restart.
    Nothing,
}

pub(crate) trait Broker: Sized {
    type Backplane: Backplane;

    async fn start(keeps: Keeps) -> Self;

    /// A node that is connected to it.
    async fn node(&self) -> Self::Backplane;

    /// Kills it (SIGKILL).
    fn kill(&mut self);

    /// Starts it again, at the same address, with what it has kept.
    async fn restart(&mut self);

    /// Notes what it has stored, for [`go_back`](Self::go_back).
    async fn remember(&mut self);

    /// Loses what it has stored since then, as in a crash before the last records were written.
    async fn go_back(&mut self);

    /// Drops old records, if the broker does not do so by itself.
    fn truncate(&self) {}
}

pub(crate) struct Memory {
    log: MemoryLog,
    keeps: Keeps,
}

impl Broker for Memory {
    type Backplane = MemoryBackplane;

    async fn start(keeps: Keeps) -> Self {
        Self { log: MemoryLog::new(), keeps }
    }

    async fn node(&self) -> MemoryBackplane {
        self.log.backplane()
    }

    fn kill(&mut self) {
        self.log.set_outage(true);
        if self.keeps == Keeps::Nothing {
            self.log.lose(usize::MAX);
        }
    }

    async fn restart(&mut self) {
        self.log.set_outage(false);
    }

    async fn remember(&mut self) {}

    async fn go_back(&mut self) {
        self.log.lose(10);
    }

    fn truncate(&self) {
        self.log.truncate(20);
    }
}

/// The operations of a broker that is a server.
macro_rules! server_calls {
    () => {
        fn kill(&mut self) {
            self.server.kill();
        }

        async fn restart(&mut self) {
            self.server.run().await;
        }

        async fn remember(&mut self) {
            self.server.remember().await;
        }

        async fn go_back(&mut self) {
            self.server.go_back().await;
        }
    };
}

pub(crate) struct Nats {
    server: Server,
    keeps: Keeps,
}

impl Broker for Nats {
    type Backplane = NatsBackplane;

    async fn start(keeps: Keeps) -> Self {
        Self { server: Server::start(nats_server).await, keeps }
    }

    async fn node(&self) -> NatsBackplane {
        let config = NatsConfig {
            storage: if self.keeps == Keeps::Everything { Storage::File } else { Storage::Memory },
            max_bytes: if self.keeps == Keeps::Little { 100_000 } else { 64 << 20 },
            ..NatsConfig::default()
        };
        let url = format!("nats://127.0.0.1:{}", self.server.port);
        NatsBackplane::connect(&url, config).await.expect("it has been started")
    }

    server_calls! {}
}

pub(crate) struct Redis {
    server: Server,
    keeps: Keeps,
}

impl Broker for Redis {
    type Backplane = RedisBackplane;

    async fn start(keeps: Keeps) -> Self {
        let command = if keeps == Keeps::Nothing { forgetful_redis_server } else { redis_server };
        Self { server: Server::start(command).await, keeps }
    }

    async fn node(&self) -> RedisBackplane {
        let records_max = if self.keeps == Keeps::Little { 20 } else { 100_000 };
        let config =
            RedisConfig { records_max: NonZeroUsize::new(records_max).unwrap(), ..RedisConfig::default() };
        let url = format!("redis://127.0.0.1:{}", self.server.port);
        RedisBackplane::connect(&url, config).await.expect("it has been started")
    }

    server_calls! {}
}

/// A server's process.
struct Server {
    command: fn(port: u16, folder: &str) -> Vec<String>,
    port: u16,
    folder: TempDir,
    /// What was stored at some time.
    remembered: TempDir,
    process: Option<Child>,
}

fn words(text: String) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

fn nats_server(port: u16, folder: &str) -> Vec<String> {
    words(format!("nats-server --addr 127.0.0.1 --port {port} --jetstream --store_dir {folder}"))
}

fn redis_server(port: u16, folder: &str) -> Vec<String> {
    let stores = "--save  --appendonly yes --appendfsync always";
    words(format!("redis-server --bind 127.0.0.1 --port {port} --dir {folder} {stores}"))
}

fn forgetful_redis_server(port: u16, folder: &str) -> Vec<String> {
    words(format!("redis-server --bind 127.0.0.1 --port {port} --dir {folder} --save  --appendonly no"))
}

impl Server {
    async fn start(command: fn(u16, &str) -> Vec<String>) -> Self {
        let [folder, remembered] = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
        let mut server =
            Self { command, port: free.expect("a port").port(), folder, remembered, process: None };
        server.run().await;
        server
    }

    /// Starts it, and returns when it accepts connections.
    async fn run(&mut self) {
        let words = (self.command)(self.port, self.folder.path().to_str().expect("a path"));
        // It is killed when the thread ends that has started it, which is the test's.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).args(&words).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        self.process = Some(command.spawn().unwrap_or_else(|error| panic!("{}: {error}", words[0])));
        let started = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_err() {
            let ended = self.process.as_mut().and_then(|process| process.try_wait().expect("a child"));
            assert!(ended.is_none(), "{} has ended: is it installed? {ended:?}", words[0]);
            assert!(started.elapsed() < Duration::from_secs(60), "{} does not accept connections", words[0]);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn remember(&mut self) {
        self.kill();
        copy(self.folder.path(), self.remembered.path()).expect("a copy");
        self.run().await;
    }

    async fn go_back(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.folder.path()).expect("a folder");
        copy(self.remembered.path(), self.folder.path()).expect("a copy");
        self.run().await;
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("it runs");
            process.wait().expect("it has ended");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Copies a folder with all that is in it.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() { copy(&path, &to)? } else { std::fs::copy(&path, &to).map(drop)? }
    }
    Ok(())
}
