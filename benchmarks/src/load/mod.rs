//! The load generator: many clients on one thread, and a check of every delivery.
//!
//! A measurement is worth something only if it can fail, so each run checks that every connection gets every message once
//! and in the same order as all others, and says when the client itself was the limit. A run connects, settles, warms
//! up, measures, drains and reports. Knows a server by its address and, if told, its process id.

pub(crate) mod alarm;
pub(crate) mod client_pool;
mod clients;
mod close_counts;
pub(crate) mod connect;
pub(crate) mod connection;
mod cursor;
mod delivery_tracker;
mod idle;
pub(crate) mod latencies;
mod memory_monitor;
mod options;
pub(crate) mod pace;
mod pending_connection;
pub(crate) mod plan;
pub(crate) mod report;
pub(crate) mod settle;
mod slow_readers;
mod snapshot;
mod socket;
mod socket_memory;
pub(crate) mod target;
#[cfg(test)]
mod tests;
mod text;
mod timed_run;
mod tls_socket;
mod traffic;

use std::io;

pub(crate) use self::{
    options::{Mode, Options},
    timed_run::TimedRun,
};
use self::{report::Report, target::Target};
use crate::{
    cpu::{self, PinError},
    message::MessageError,
    process::{Process, ProcessError},
};

/// Why there is no report.
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
    #[error("{unreached} of {connections} connections got no probe within {} s", settle::SETTLE_MAX.as_secs())]
    Unsettled { unreached: usize, connections: usize },
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("the client's loop failed")]
    Io(#[from] io::Error),
    #[error("the report cannot be encoded as JSON")]
    Json(#[from] serde_json::Error),
}

/// Runs the load and prints the report; false when a delivery was faulty.
pub(crate) fn run(options: &Options) -> Result<bool, LoadError> {
    cpu::pin(options.cpu)?;
    options.check()?;
    let target: Target = options.url.parse()?;
    let server = options.server_pid.map(Process::new);
    let report: Report = match options.mode {
        Mode::Idle => idle::measure(options, &target, server)?,
        Mode::Fanout | Mode::Echo => traffic::measure(options, &target, server)?,
    };
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(report.is_faultless())
}
