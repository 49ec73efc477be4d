//! What the tests and benches of the engine share, and those of hubs as far as they need no hub.
//!
//! Not published. Independent of the engine's frame code ([`frames`]), because it judges that code. Does not know hubs,
//! Axum or an async runtime: what needs them is in `testkit-hub`, so that the engine's tests are built without them.
//! Panics where a test must fail. What no test uses does not stay here.

pub mod client;
pub mod frames;
pub mod handler;
pub mod log;
pub mod raw_client;
pub mod rig;
pub mod sender;
pub mod sinks;
pub mod stream;
pub mod task;
pub mod time;

pub use client::Client;
pub use log::Log;
pub use raw_client::{RawClient, Received};
pub use rig::{Rig, uses_io_uring};
pub use sender::Sender;
pub use stream::{Stream, Transport};
pub use task::{Task, at_once, block_on, lock};
