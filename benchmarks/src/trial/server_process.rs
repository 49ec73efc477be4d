//! A server under measurement: started, awaited until it listens, and killed when dropped.
//!
//! Ports are taken from below the ephemeral range, where no client connection can occupy them, and each only once.

use std::{
    ffi::OsString,
    io::{self, BufRead, BufReader},
    net::{Ipv4Addr, TcpListener},
    process::{Child, Stdio},
    sync::{
        atomic::{AtomicU16, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Harness, Program};
use crate::{server::READY, tls::TlsError};

const PORTS_FROM: u16 = 20_000;
const PORTS_TO: u16 = 32_000;
const START_MAX: Duration = Duration::from_secs(10);

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("no port between {PORTS_FROM} and {PORTS_TO} is free")]
    NoPort,
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("{program} did not start")]
    Spawn { program: String, source: io::Error },
    #[error("{program} ended, or {} s passed, before it printed {READY:?}", START_MAX.as_secs())]
    NotReady { program: String },
}

/// A running server.
#[derive(Debug)]
pub(crate) struct ServerProcess {
    child: Child,
    port: u16,
    scheme: &'static str,
    query: &'static str,
}

impl ServerProcess {
    /// Starts a program on a free port and waits until it listens.
    pub(crate) fn start(program: &Program, harness: &Harness, is_tls: bool) -> Result<Self, StartError> {
        let mut arguments = Vec::new();
        if is_tls {
            arguments.extend(["--tls".into(), harness.certificate()?.into_os_string()]);
        }
        Self::start_with(program, harness, if is_tls { "wss" } else { "ws" }, &arguments)
    }

    /// The same for one of several nodes, which meet at the broker with this URL.
    pub(crate) fn start_node(program: &Program, harness: &Harness, broker: &str) -> Result<Self, StartError> {
        Self::start_with(program, harness, "ws", &["--backplane".into(), broker.into()])
    }

    fn start_with(
        program: &Program,
        harness: &Harness,
        scheme: &'static str,
        arguments: &[OsString],
    ) -> Result<Self, StartError> {
        let port = free_port().ok_or(StartError::NoPort)?;
        let child = program
            .command(harness, port)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|source| StartError::Spawn { program: program.to_string(), source })?;
        // Owned from here on, so that a server that is never ready is killed as well.
        let mut server = Self { child, port, scheme, query: program.query() };
        if server.is_ready_in_time() {
            Ok(server)
        } else {
            Err(StartError::NotReady { program: program.to_string() })
        }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}://127.0.0.1:{}{path}{}", self.scheme, self.port, self.query)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end (SIGTERM).
    pub(crate) fn terminate(&self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM); // fails only when it has ended already
    }

    fn is_ready_in_time(&mut self) -> bool {
        let Some(stdout) = self.child.stdout.take() else { return false };
        let (sender, receiver) = mpsc::channel();
        // Continues to read after that, so that a server that prints more never blocks on its pipe.
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.trim() == READY {
                    let _ = sender.send(());
                }
            }
        });
        receiver.recv_timeout(START_MAX).is_ok()
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // Fails only when the server has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port on which nothing listens, another one in each call.
pub(crate) fn free_port() -> Option<u16> {
    // Relaxed: only one thread of this process takes ports; the atomic replaces a mutable static.
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 100) as u16 * 100;
    (PORTS_FROM..PORTS_TO).find_map(|_| {
        let offset = first + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = PORTS_FROM + offset % (PORTS_TO - PORTS_FROM);
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok().then_some(port)
    })
}
