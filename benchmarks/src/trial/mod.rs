//! A trial: one server and a load against it, as two processes, and the resulting report.
//!
//! Each trial has a fresh server, so that no state is left over from the one before, and a core for the client that no
//! server uses. Several servers can also run at once and take turns. Knows servers by their command lines and results
//! by the load generator's report.

mod harness;
pub(crate) mod outcome;
mod server_process;
mod subject;
mod turns;

use std::io;

pub(crate) use self::server_process::{ServerProcess, StartError, free_port};
use self::subject::BuildError;
pub(crate) use self::{
    harness::{Harness, HarnessError, on_path},
    outcome::Outcome,
    subject::{Program, Subject, locked_version},
    turns::{TrialResult, Turns},
};
use crate::{cpu::PinError, load::LoadError};

/// Why one trial has no report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrialError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the load generator did not start")]
    Spawn(#[source] io::Error),
    #[error("the load generator printed no report but: {0}")]
    NoReport(String),
    #[error("the load generator rejects its flags")]
    Flags(#[from] clap::Error),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the client could not be pinned")]
    Pin(#[from] PinError),
}

/// A route of the server and the load generator's flags.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) path: &'static str,
    pub(crate) flags: Vec<(&'static str, String)>,
    pub(crate) is_tls: bool,
}
