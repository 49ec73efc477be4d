//! One server's part among several that take turns: traffic in slices with pauses between them.
//!
//! Between two slices no message is in flight, so the CPU time that a server has used by then belongs to the slices
//! before. What it does in its pauses, such as sending pings, is not counted. Does not know the other servers, or whose
//! turn it is.

use std::time::Duration;

use super::{LoadError, Options, report::Report, snapshot::Interval, traffic::Traffic};
use crate::process::Process;

/// One server and its connections.
#[derive(Debug)]
pub(crate) struct TimedRun {
    traffic: Traffic,
    server: Process,
    /// All measured slices.
    measured: Option<Interval>,
}

impl TimedRun {
    /// Connects to the server, whose process id `options` must have.
    pub(crate) fn open(options: &Options) -> Result<Self, LoadError> {
        options.check()?;
        let server = options.server_pid.ok_or(LoadError::Options("a timed run needs --server-pid"))?;
        let traffic = Traffic::open(options, &options.url.parse()?, None)?;
        Ok(Self { traffic, server: Process::new(server), measured: None })
    }

    /// A slice that is not measured, unless something is lost in it.
    pub(crate) fn warm_up(&mut self, duration: Duration) -> Result<(), LoadError> {
        let slice = self.traffic.slice(self.server, duration)?;
        self.measured = self.is_stuck().then_some(slice);
        Ok(())
    }

    /// Sends for `duration`, then waits until all has landed; returns the server's CPU per delivery in microseconds.
    pub(crate) fn slice(&mut self, duration: Duration) -> Result<Option<f64>, LoadError> {
        if self.measured.is_none() {
            self.traffic.measure_slices();
        }
        let slice = self.traffic.slice(self.server, duration)?;
        self.measured = Some(self.measured.map_or(slice, |before| before.and(slice)));
        Ok(slice.cost())
    }

    /// A message has not landed within seconds: it will be reported as lost, and more slices would measure nothing.
    pub(crate) fn is_stuck(&self) -> bool {
        !self.traffic.is_settled()
    }

    /// The report on all slices.
    pub(crate) fn finish(self) -> Result<Report, LoadError> {
        let measured =
            self.measured.ok_or(LoadError::Options("a timed run needs at least one measured slice"))?;
        self.traffic.finish_slices(&measured)
    }
}
