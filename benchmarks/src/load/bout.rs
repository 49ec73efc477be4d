//! The bout: one server's part among several that take turns, traffic in slices with pauses between them.
//!
//! Between two slices nothing is on its way, so what the server's books say there belongs to the slices before. What
//! it does in its pauses (sending pings) is charged to nobody. Does not know the other servers, or whose turn it is.

use std::time::Duration;

use super::{LoadError, Options, report::Report, snapshot::Span, traffic::Traffic};
use crate::process::Process;

/// One server and its connections.
#[derive(Debug)]
pub(crate) struct Bout {
    traffic: Traffic,
    server: Process,
    /// All slices that were measured.
    measured: Option<Span>,
}

impl Bout {
    /// Connects everybody to the server, whose process `options` name.
    pub(crate) fn open(options: &Options) -> Result<Self, LoadError> {
        options.check()?;
        let server = options.server_pid.ok_or(LoadError::Options("a bout needs --server-pid"))?;
        let traffic = Traffic::open(options, &options.url.parse()?, None)?;
        Ok(Self { traffic, server: Process::new(server), measured: None })
    }

    /// A slice that is not measured, unless something is lost in it.
    pub(crate) fn warm_up(&mut self, duration: Duration) -> Result<(), LoadError> {
        let slice = self.traffic.slice(self.server, duration)?;
        self.measured = self.is_stuck().then_some(slice);
        Ok(())
    }

    /// Sends for `duration`, then waits until all has landed; tells the server's CPU per delivery in microseconds.
    pub(crate) fn slice(&mut self, duration: Duration) -> Result<Option<f64>, LoadError> {
        if self.measured.is_none() {
            self.traffic.measure_slices();
        }
        let slice = self.traffic.slice(self.server, duration)?;
        self.measured = Some(self.measured.map_or(slice, |before| before.and(slice)));
        Ok(slice.cost())
    }

    /// Something has not landed in some seconds: what is lost is to be reported, and more slices tell nothing.
    pub(crate) fn is_stuck(&self) -> bool {
        !self.traffic.is_settled()
    }

    /// What all slices say together, and everything that was wrong.
    pub(crate) fn end(self) -> Result<Report, LoadError> {
        let measured = self.measured.ok_or(LoadError::Options("a bout needs a slice to be measured"))?;
        self.traffic.end_slices(&measured)
    }
}
