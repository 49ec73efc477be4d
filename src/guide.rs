//! The guide: one chapter for each question that a user has.
//!
//! Begin with [`hubs`]. The crate's [front page](crate) explains the words and lists the chapters by question.
//!
//! These modules are documentation and contain no code. They exist for rustdoc and for the tests of the programs in
//! them, and are not compiled into the library.

// Links in the chapters are resolved here.
#[allow(unused_imports)]
use crate::*;

#[doc = include_str!("guide/hubs.md")]
pub mod hubs {}
#[doc = include_str!("guide/messages.md")]
pub mod messages {}
#[doc = include_str!("guide/publishing.md")]
pub mod publishing {}
#[doc = include_str!("guide/groups.md")]
pub mod groups {}
#[doc = include_str!("guide/users.md")]
pub mod users {}
#[doc = include_str!("guide/slow_clients.md")]
pub mod slow_clients {}
#[doc = include_str!("guide/limits.md")]
pub mod limits {}
#[doc = include_str!("guide/liveness.md")]
pub mod liveness {}
#[doc = include_str!("guide/authentication.md")]
pub mod authentication {}
#[doc = include_str!("guide/clients.md")]
pub mod clients {}
#[doc = include_str!("guide/sockets.md")]
pub mod sockets {}
#[doc = include_str!("guide/tls_and_proxies.md")]
pub mod tls_and_proxies {}
#[doc = include_str!("guide/deployment.md")]
pub mod deployment {}
#[doc = include_str!("guide/nodes.md")]
pub mod nodes {}
#[doc = include_str!("guide/shards.md")]
pub mod shards {}
#[doc = include_str!("guide/metrics_and_logs.md")]
pub mod metrics_and_logs {}
#[doc = include_str!("guide/shutdown.md")]
pub mod shutdown {}
#[doc = include_str!("guide/close_codes.md")]
pub mod close_codes {}
#[cfg_attr(feature = "testing", doc = include_str!("guide/testing.md"))]
#[cfg_attr(not(feature = "testing"), doc = "This chapter needs the feature `testing`.")]
pub mod testing {}
#[doc = include_str!("guide/troubleshooting.md")]
pub mod troubleshooting {}
#[doc = include_str!("guide/coming_from.md")]
pub mod coming_from {
    // Links in the pages below are resolved here.
    #[allow(unused_imports)]
    use crate::*;

    #[doc = include_str!("guide/coming_from/axum_ws.md")]
    pub mod axum_ws {}
    #[doc = include_str!("guide/coming_from/axum_signal.md")]
    pub mod axum_signal {}
    #[doc = include_str!("guide/coming_from/websocket_builder.md")]
    pub mod websocket_builder {}
    #[doc = include_str!("guide/coming_from/tokio_broadcast.md")]
    pub mod tokio_broadcast {}
    #[doc = include_str!("guide/coming_from/socketioxide.md")]
    pub mod socketioxide {}
    #[doc = include_str!("guide/coming_from/signalr.md")]
    pub mod signalr {}
}
