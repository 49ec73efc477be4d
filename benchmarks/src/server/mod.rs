//! The servers that shardcast is compared with.
//!
//! Each is a process that listens on 127.0.0.1, with TLS if it is given a certificate, prints the line `ready`, broadcasts every message on `/ws` to all
//! including the sender, and returns every message on `/echo` to its sender. The load generator needs nothing else of
//! a server.

mod axum_signal;
mod fastwebsockets;
pub(crate) mod floor;
mod floor_socket;
mod listener;
mod runtime;
mod socketioxide;
mod tokio_websockets;
mod tutorial;

use self::runtime::ServeError;

/// The line that a server prints once it listens.
pub(crate) const READY: &str = "ready";

/// The servers that use a published crate.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum LibraryServer {
    /// The crate axum-signal, as its README uses it.
    AxumSignal(runtime::Options),
    /// The crate fastwebsockets on hyper, with a broadcast channel of tokio.
    Fastwebsockets(runtime::Options),
    /// The crate socketioxide on axum: events of Socket.IO over WebSocket.
    Socketioxide(socketioxide::Options),
    /// The crate tokio-websockets with a broadcast channel of tokio, flushed in batches.
    TokioWebsockets(runtime::Options),
    /// axum's WebSocket with a broadcast channel of tokio, as in most tutorials.
    Tutorial(runtime::Options),
}

impl LibraryServer {
    /// Serves until it is killed.
    pub(crate) fn run(&self) -> Result<(), ServeError> {
        match self {
            Self::AxumSignal(options) => runtime::run(options, axum_signal::serve),
            Self::Fastwebsockets(options) => runtime::run(options, fastwebsockets::serve),
            Self::Socketioxide(options) => socketioxide::run(options),
            Self::TokioWebsockets(options) => runtime::run(options, tokio_websockets::serve),
            Self::Tutorial(options) => runtime::run(options, tutorial::serve),
        }
    }
}
