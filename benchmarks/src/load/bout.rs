//! The bout: one server's part in a duel, traffic in slices with pauses between them.
//!
//! Between two slices nothing is on its way, so what the server's books say there belongs to the slices before. Does
//! not know the other servers, or whose turn it is.

use std::time::Duration;

use super::{LoadError, Options, report::Report, snapshot::Snapshot, traffic::Traffic};
use crate::process::Process;

/// One server, its connections, and what stood in its books when they were open.
#[derive(Debug)]
pub(crate) struct Bout {
    traffic: Traffic,
    server: Process,
    before: Snapshot,
}

/// What one slice has cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    pub(crate) deliveries: u64,
    /// The server's time on a CPU.
    pub(crate) cpu: Duration,
}

impl Slice {
    /// The server's CPU per delivery, in microseconds; absent if nothing was delivered.
    pub(crate) fn cost(self) -> Option<f64> {
        (self.deliveries > 0).then(|| 1e6 * self.cpu.as_secs_f64() / self.deliveries as f64)
    }
}

impl Bout {
    /// Connects everybody to the server, whose process `options` name.
    pub(crate) fn open(options: &Options) -> Result<Self, LoadError> {
        options.check()?;
        let server = options.server_pid.ok_or(LoadError::Options("a bout needs --server-pid"))?;
        let server = Process::new(server);
        let traffic = Traffic::open(options, &options.url.parse()?, None)?;
        Ok(Self { before: traffic.snapshot(Some(server))?, traffic, server })
    }

    /// Keeps messages in flight for `duration`, then waits for them.
    pub(crate) fn slice(&mut self, duration: Duration) -> Result<Slice, LoadError> {
        let before = self.server.cpu_time()?;
        let deliveries = self.traffic.slice(duration)?;
        Ok(Slice { deliveries, cpu: self.server.cpu_time()?.since(before).running })
    }

    /// Everything that was right or wrong.
    pub(crate) fn end(self) -> Result<Report, LoadError> {
        self.traffic.end(&self.before, self.server)
    }
}
