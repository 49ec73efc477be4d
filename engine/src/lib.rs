//! The sharded fan-out engine of shardcast: sockets, frames, groups and one publication order.
//!
//! An [`Engine`] is a few pinned threads, the shards. Each shard owns its connections outright: sockets,
//! decoders, outboxes, and its part of every group. A [`Namespace`] is a set of connections that can be
//! addressed together. A publication goes through a log that all shards read in the same order (total order).
//! Messages from a client are passed to the [`Handler`] of its connection, on the connection's shard.
//!
//! The engine knows bytes. It does not know requests, what payloads mean, or any async runtime: its futures
//! (a publisher waits where there is no room: backpressure) can be polled by any executor. Routes and typed
//! messages belong to the crate `shardcast`, which builds on this one.
//! ```
//! use std::io::{Read, Write};
//! use std::os::unix::net::UnixStream;
//! use std::sync::Arc;
//! use std::task::Poll;
//! use std::time::Instant;
//!
//! use shardcast_engine::{
//!     Address, ConnectionConfig, Context, Encoding, Engine, EngineConfig, Handler, Message, Namespace,
//!     NewConnection, Payload, Publication,
//! };
//!
//! /// Sends the length of each message to all connections.
//! struct Lengths(Namespace);
//!
//! impl Handler for Lengths {
//!     fn on_message(&mut self, message: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
//!         let payload = Payload::text(&format!("{} bytes", message.payload.len()));
//!         self.0.try_publish(Publication::message(Address::Everyone, payload)).ok(); // refused if the log is full
//!         Poll::Ready(())
//!     }
//! }
//!
//! # fn block_on<F: Future>(future: F) -> F::Output {
//! #     let mut future = std::pin::pin!(future);
//! #     let mut context = std::task::Context::from_waker(std::task::Waker::noop());
//! #     loop {
//! #         if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) {
//! #             return output;
//! #         }
//! #     }
//! # }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Driven by the caller here, turn by turn; `Engine::start` gives each shard a thread.
//! let config = EngineConfig { shards: Some(1), ..EngineConfig::default() };
//! let (engine, mut shards) = Engine::driven(config, Instant::now())?;
//! let everyone = engine.namespace();
//! let lengths = Lengths(everyone.clone());
//!
//! let (ours, mut peer) = UnixStream::pair()?; // a server passes a `TcpStream` after the handshake
//! let connection = NewConnection {
//!     socket: ours.into(),
//!     received: Default::default(),
//!     handler: Box::new(|_| Box::new(lengths)), // called on the shard, once the connection has an id
//!     config: Arc::new(ConnectionConfig::default()),
//!     encoding: Encoding::PLAIN,
//!     permit: engine.admit(None).expect("below `max_connections`"),
//!     rate_limit: None,
//!     user: None,
//!     first_message: None,
//!     expires_at: None,
//! };
//! block_on(everyone.adopt(connection))?;
//! shards[0].turn(Instant::now())?;
//!
//! peer.write_all(b"\x81\x85\0\0\0\0hello")?; // a masked text frame
//! shards[0].turn(Instant::now())?;
//! # while shards[0].has_work() { shards[0].turn(Instant::now())?; }
//! let mut received = [0; 64];
//! let count = peer.read(&mut received)?; // a ping may precede the answer
//! assert!(received[..count].ends_with(b"\x81\x075 bytes"));
//! # Ok(())
//! # }
//! ```

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "macos", target_os = "freebsd")))]
compile_error!("shardcast does not support this system: build it for Linux, macOS, FreeBSD or Android");

mod admission;
mod attendance;
mod batch;
mod beacon;
mod changes;
mod close_code;
mod close_reason;
mod command;
mod config;
mod connection;
mod connections;
mod deadlines;
mod decoder;
mod directory;
mod drop_notice;
#[cfg(feature = "serde")]
mod duration_text;
mod engine;
mod engine_core;
mod entry;
mod fanout;
mod flush_schedule;
mod frame;
mod group;
mod handler;
mod handshake;
mod heartbeat;
mod held;
mod id;
mod limiter;
mod local_queue;
mod log;
mod mailbox;
mod mask;
mod metrics;
mod namespace;
mod outbox;
mod outq;
mod payload;
mod pinning;
mod policy;
mod position;
mod presence;
mod publication;
mod publisher;
mod rate;
mod receipt;
mod rendition;
#[cfg(all(feature = "io-uring", target_os = "linux"))]
mod send_batch;
mod shard;
mod shard_set;
mod shutdown;
mod socket;
mod sync;
mod tally;
#[cfg(feature = "tls")]
mod tls_session;
mod trim;
mod user_limits;
mod utf8;
mod wait_list;
mod watchdog;
mod wheel;

pub use admission::{ConnectionPermit, TooManyUpgrades};
pub use changes::NamespaceChange;
pub use close_code::{CloseCode, InvalidCloseCode};
pub use close_reason::CloseReason;
pub use command::FirstMessage;
pub use config::{ConfigError, ConnectionConfig, EngineConfig, UserLimit};
pub use decoder::{Decoder, Event, Limits};
pub use drop_notice::DropNotice;
pub use engine::{Engine, StartError};
pub use frame::{ControlFrame, Frame, FrameError, Header, MessageKind, Opcode};
pub use handler::{Context, Control, Handler, MakeHandler, Message};
pub use handshake::accept_key;
pub use heartbeat::Rtt;
pub use id::{ConnectionId, InvalidConnectionId};
pub use mask::unmask;
pub use metrics::{ConnectionMetrics, GroupMetrics, Metrics};
pub use namespace::{AdoptError, GroupCount, Namespace, NewConnection, PendingWake};
pub use payload::Payload;
pub use policy::Policy;
pub use position::{InvalidPosition, Position};
pub use presence::{PresenceChange, PresenceKind, PresenceObserver, Present, User};
pub use publication::{Address, Delivery, Publication};
pub use publisher::{Enqueued, PublishError, TryPublishError, Wants};
pub use publisher::{GROUP_NAME_BYTES_MAX, METADATA_BYTES_MAX, USER_NAME_BYTES_MAX};
pub use rate::{OverLimit, Rate, RateLimit, SharedRateLimit};
pub use receipt::Receipt;
pub use rendition::{Encoding, TooManyEncodings};
pub use shard::Shard;
#[cfg(feature = "audit")]
#[doc(hidden)]
pub use shard::audit::{Audit, ConnectionAudit, Footprint, GroupAudit, footprint};
pub use shutdown::{EngineState, Shutdown, ShutdownReport};
pub use socket::{BridgeProgress, Socket, prepare_tcp};
#[cfg(all(feature = "audit", not(loom)))]
#[doc(hidden)]
pub use sync::counted::{AtomicUse, record};
pub use tally::{DropCause, Drops, Tally};
#[cfg(feature = "tls")]
pub use tls_session::{TlsEnd, TlsSession};
pub use utf8::{InvalidUtf8, Utf8Checker};
