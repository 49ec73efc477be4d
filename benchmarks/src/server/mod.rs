//! The servers that shardcast is measured against.
//!
//! Each is a process of its own that listens on 127.0.0.1, prints `ready` on a line of its own, broadcasts every
//! message on `/ws` to all including the sender, and returns every message on `/echo` to its sender. Whoever keeps
//! to that can be compared; the load generator knows no more of a server.

pub(crate) mod axum_signal;
pub(crate) mod floor;

/// The line that a server prints when it listens.
pub(crate) const READY: &str = "ready";
