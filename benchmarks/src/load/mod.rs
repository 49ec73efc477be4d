//! The load generator: many clients on one thread, and a verdict on every delivery.
//!
//! A measurement only counts when it can fail, so each run checks that every connection got every message once and
//! in the same order as all others, and says when the client itself was the limit. Sequence of a run: connect,
//! settle, warm up, measure, drain, report. Knows a server only by its address and, if told, its process id.

mod connect;
mod crowd;
mod idle;
mod latency;
mod ledger;
mod order;
mod pace;
pub(crate) mod report;
mod target;
mod traffic;

use std::{io, time::Duration};

use self::{
    report::{Report, Setup},
    target::Target,
};
use crate::{
    cpu::{self, PinError},
    message::MessageError,
    process::{Process, ProcessError},
};

/// What the load generator is told.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Where the server is: `ws://127.0.0.1:PORT/ws` or `…/echo`.
    #[arg(long)]
    url: String,
    #[arg(long, value_enum, default_value_t = Mode::Fanout)]
    mode: Mode,
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// How many of the connections send, spread evenly over all; as many as are in flight by default.
    #[arg(long)]
    senders: Option<usize>,
    /// Closed loop: messages in flight in total.
    #[arg(long, default_value_t = 1)]
    in_flight: usize,
    /// Open loop instead: messages per second, with the latency counted from the intended time of sending.
    #[arg(long)]
    rate: Option<f64>,
    /// How long to measure.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// How long to send before measuring.
    #[arg(long, default_value_t = 0.5)]
    warmup: f64,
    /// Bytes of a whole JSON message.
    #[arg(long, default_value_t = 64)]
    payload: usize,
    /// The server's process, to measure its CPU and memory.
    #[arg(long)]
    server_pid: Option<u32>,
    /// The core to run on.
    #[arg(long)]
    cpu: Option<usize>,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// Every message is expected at every connection.
    Fanout,
    /// Every message is expected back at its sender.
    Echo,
    /// Nothing is sent: what does a connection cost in memory?
    Idle,
}

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
    #[error("{unseen} of {connections} connections got no probe within {}s", traffic::SETTLE_MAX.as_secs())]
    Unsettled { unseen: usize, connections: usize },
    #[error("no sender is left")]
    NoSender,
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
    let report = match options.mode {
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

impl Options {
    fn check(&self) -> Result<(), LoadError> {
        let positive = |number: f64| number.is_finite() && number > 0.0;
        if self.connections == 0 || self.in_flight == 0 || self.senders == Some(0) {
            return Err(LoadError::Options("connections, senders and in-flight must be at least 1"));
        }
        if !positive(self.seconds) || !self.warmup.is_finite() || self.warmup < 0.0 {
            return Err(LoadError::Options("seconds must be above 0, and warmup not below"));
        }
        if self.rate.is_some_and(|rate| !positive(rate)) {
            return Err(LoadError::Options("the rate must be above 0"));
        }
        if self.mode == Mode::Idle && self.server_pid.is_none() {
            return Err(LoadError::Options("idle measures the server's memory and needs --server-pid"));
        }
        Ok(())
    }

    fn sender_count(&self) -> usize {
        let wanted = self.senders.unwrap_or(if self.rate.is_some() { 64 } else { self.in_flight });
        wanted.min(self.connections)
    }

    fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    fn setup(&self) -> Setup {
        Setup {
            mode: self.mode,
            url: self.url.clone(),
            connections: self.connections,
            senders: self.sender_count(),
            in_flight: self.rate.is_none().then_some(self.in_flight),
            rate: self.rate,
            payload_bytes: self.payload,
        }
    }
}

impl Report {
    fn new(options: &Options) -> Self {
        Self { setup: options.setup(), traffic: None, memory: None, disconnections: 0, causes: Vec::new() }
    }
}
