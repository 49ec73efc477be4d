//! Typed WebSocket hubs for Axum on a sharded fan-out engine.
//!
#![doc = include_str!("guide.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]

/// The README's programs compile.
#[cfg(all(doctest, feature = "client"))]
#[doc = include_str!("../README.md")]
struct Readme;

mod address;
pub mod auth;
pub mod backplane;
mod bridge;
#[cfg(feature = "client")]
pub mod client;
mod clients;
mod clock;
mod codec;
mod connection_id;
mod context;
mod default_engine;
mod engine;
mod first_message;
#[cfg(any(doc, doctest))]
pub mod guide;
pub mod handler;
mod handshake;
mod hub;
mod hub_handler;
mod listen;
mod log_limit;
mod origin;
mod peer_address;
mod presence;
mod receipt;
mod serve;
mod serve_hub;
mod stateful_hub;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "tls")]
pub mod tls;
mod turn_away;
mod upgrade;
mod verdict;
pub mod ws;

#[cfg(feature = "client")]
pub use client::{HubClient, HubClientBuilder};
pub use clients::{Clients, Prepared, PublishError, Target, ThisNode, TryPublishError};
pub use codec::{
    BinaryCodec, CodecError, DEPTH_MAX, Decode, Encode, JsonCodec, RawCodec, RawMessage, deserialize_bounded,
};
pub use connection_id::{ConnectionId, InvalidConnectionId};
pub use context::MessageContext;
pub use engine::Engine;
pub use first_message::Accepted;
pub use hub::{
    ConnectionRequest, DisconnectRequest, Dropped, Hub, HubContext, JoinError, Refusal, RunOn, WsHub,
};
pub use listen::listen;
pub use origin::{AllowedOrigins, InvalidOrigin};
pub use peer_address::{InvalidNetwork, TrustedProxies};
pub use presence::{Metadata, MetadataError, PresenceChange, PresenceChanges, PresenceEvent, Present};
pub use receipt::Receipt;
pub use serve::{Serve, ServeError};
pub use serve_hub::serve_hub;
pub use shardcast_engine::ConnectionConfig as WsHubConfig;
pub use shardcast_engine::Policy as BroadcastPolicy;
pub use shardcast_engine::{
    AdoptError, CloseCode, CloseReason, ConfigError, ConnectionMetrics, DropCause, Drops, EngineConfig,
    EngineState, FrameError, GROUP_NAME_BYTES_MAX, GroupCount, GroupMetrics, InvalidCloseCode,
    InvalidPosition, METADATA_BYTES_MAX, MessageKind, Metrics, OverLimit, Position, PresenceKind, Rate,
    RateLimit, Rtt, SharedRateLimit, Shutdown, ShutdownReport, StartError, Tally, USER_NAME_BYTES_MAX,
    UserLimit, prepare_tcp,
};
pub use stateful_hub::{Stateful, StatefulHub};
pub use upgrade::{UpgradeRejection, WebSocket, WebSocketUpgrade};
