//! What the tests and benches of shardcast share.
//!
//! Not published. Each part is behind a feature, so that the engine's tests are built without Axum, tokio and rustls.
//! Independent of the engine's frame code ([`frames`]), since it judges that code. Panics where a test must fail. What no
//! test uses does not stay here.
//!
//! | feature | parts |
//! |---|---|
//! | none | [`frames`], [`raw_client`], [`task`], [`time`] |
//! | `engine` | `rig`, `client`, `handler`, `sender`, `audience` |
//! | `audit` | `engine`, with shards that sleep and are woken |
//! | `hub` | `hub` |
//! | `tls` | `tls` |

pub mod frames;
pub mod raw_client;
pub mod task;
pub mod time;

#[cfg(feature = "engine")]
pub mod client;
#[cfg(feature = "engine")]
pub mod handler;
#[cfg(feature = "engine")]
pub mod rig;
#[cfg(feature = "engine")]
pub mod sender;

#[cfg(feature = "engine")]
pub use client::Client;
pub use raw_client::{RawClient, Received};
#[cfg(feature = "engine")]
pub use rig::Rig;
#[cfg(feature = "engine")]
pub use sender::Sender;
pub use task::{Task, at_once, block_on, lock};
