//! The servers that shardcast is measured against.
//!
//! Each is a process of its own that listens on 127.0.0.1, prints `ready` on a line of its own, broadcasts every
//! message on `/ws` to all including the sender, and returns every message on `/echo` to its sender. Whoever keeps
//! to that can be compared; the load generator knows no more of a server.

mod axum_signal;
mod fastwebsockets;
pub(crate) mod floor;
pub(crate) mod peer;
mod socketioxide;
mod tokio_websockets;
mod tutorial;

use self::peer::PeerError;

/// The line that a server prints when it listens.
pub(crate) const READY: &str = "ready";

/// The servers that are built on a published crate.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Peer {
    /// The crate axum-signal, as its README uses it.
    AxumSignal(peer::Options),
    /// The crate fastwebsockets on hyper, with a broadcast channel of tokio.
    Fastwebsockets(peer::Options),
    /// The crate socketioxide on axum: events of Socket.IO over WebSocket.
    Socketioxide(peer::Options),
    /// The crate tokio-websockets with a broadcast channel of tokio, flushed in batches.
    TokioWebsockets(peer::Options),
    /// axum's WebSocket with a broadcast channel of tokio, as in the usual tutorial.
    Tutorial(peer::Options),
}

impl Peer {
    /// Serves until it is killed.
    pub(crate) fn run(&self) -> Result<(), PeerError> {
        match self {
            Self::AxumSignal(options) => peer::run(options, axum_signal::serve),
            Self::Fastwebsockets(options) => peer::run(options, fastwebsockets::serve),
            Self::Socketioxide(options) => peer::run(options, socketioxide::serve),
            Self::TokioWebsockets(options) => peer::run(options, tokio_websockets::serve),
            Self::Tutorial(options) => peer::run(options, tutorial::serve),
        }
    }
}
