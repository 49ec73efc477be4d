//! The load generator: many clients on one thread, and a verdict on every delivery.
//!
//! A measurement only counts when it can fail, so each run checks that every connection got every message once and
//! in the same order as all others, and says when the client itself was the limit. Sequence of a run: connect,
//! settle, warm up, measure, drain, report. Knows a server only by its address and, if told, its process id.

mod bout;
mod candidate;
mod churn;
mod connect;
mod connection;
mod crowd;
mod end;
mod idle;
mod kill;
mod latency;
mod ledger;
mod memory;
mod options;
mod order;
mod pace;
mod progress;
pub(crate) mod report;
mod role;
mod settle;
mod slow;
mod snapshot;
mod socket;
mod stage;
mod storm;
mod target;
#[cfg(test)]
mod tests;
mod text;
mod traffic;

use std::io;

pub(crate) use self::{
    bout::Bout,
    options::{Mode, Options},
};
use self::{report::Report, target::Target};
use crate::{
    cpu::{self, PinError},
    message::MessageError,
    process::{Process, ProcessError},
};

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("{0}")]
    Options(&'static str),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Target(#[from] target::TargetError),
    #[error(transparent)]
    Connect(#[from] connect::ConnectError),
    #[error("{unseen} of {connections} connections got no probe within {}s", settle::SETTLE_MAX.as_secs())]
    Unsettled { unseen: usize, connections: usize },
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("the client's loop failed")]
    Io(#[from] io::Error),
    #[error("the report does not become JSON")]
    Json(#[from] serde_json::Error),
}

/// Runs the load and prints the report; false when a promise of delivery was broken.
pub(crate) fn run(options: &Options) -> Result<bool, LoadError> {
    cpu::pin(options.cpu)?;
    options.check()?;
    let target: Target = options.url.parse()?;
    let server = options.server_pid.map(Process::new);
    let report: Report = match options.mode {
        Mode::Idle => idle::measure(options, &target, server)?,
        Mode::Storm => storm::measure(options, &target, server)?,
        Mode::Fanout | Mode::Echo => traffic::measure(options, &target, server)?,
    };
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(report.is_faultless())
}
