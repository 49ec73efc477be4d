//! What the tests of hubs share: hubs behind a server on a real socket, TLS, and clients on tokio sockets.
//!
//! Not published. Every wait has a bound ([`TEST_TIMEOUT`]). Panics where a test must fail. What no test uses does not stay
//! here.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

pub mod client;
pub mod command_hub;
pub mod http_2;
pub mod log;
pub mod node;
pub mod program;
pub mod raw_client;
pub mod recorder;
pub mod recording_hub;
pub mod server;
pub mod tls;
pub mod transport;
pub mod wait;

pub use client::Client;
pub use command_hub::{CommandHub, OnRuntime, command_app, connect, connect_amid};
pub use log::logged;
pub use node::{Node, SharedLog};
pub use raw_client::RawClient;
pub use recorder::Recorder;
pub use recording_hub::HubFixture;
pub use server::{Server, engine};
pub use transport::{Stream, Transport};
pub use wait::{TEST_TIMEOUT, eventually, within_timeout, yield_twice};
