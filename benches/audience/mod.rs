//! An engine with clients that accept every frame at once and send nothing.
//!
//! Shared by the benches. [`Running`](running::Running) has an engine with its threads, [`Driven`](driven::Driven) one
//! whose shards the bench drives itself. The clients are sinks: connections like any other, with an outbox, groups and
//! counters, but without a file descriptor, so that the kernel is not measured. They do not answer pings, so the
//! heartbeat interval is a day. Knows the engine. Does not know what is measured.

#![allow(dead_code)] // each bench uses a part

pub(crate) mod driven;
pub(crate) mod running;

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use shardcast_engine::{
    Address, ConnectionConfig, ConnectionId, Context, Encoding, Engine, Handler, Message, Metrics, Namespace,
    NewConnection, Payload, Publication, Socket, TryPublishError,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Short, because a sink never answers a Close frame.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_millis(10);

/// The config of a sink. First pings are spread over the interval, so some are sent early; the long pong timeout keeps
/// those connections open. Some sinks are in more groups than the default allows.
pub(crate) fn config() -> ConnectionConfig {
    ConnectionConfig {
        heartbeat_interval: DAY,
        pong_timeout: DAY,
        close_timeout: CLOSE_TIMEOUT,
        max_groups: 1 << 20,
        ..ConnectionConfig::default()
    }
}

/// A new connection. Its shard calls `on_id` with the id.
fn connection(
    engine: &Engine,
    socket: Socket,
    config: &Arc<ConnectionConfig>,
    on_id: impl FnOnce(ConnectionId) + Send + 'static,
) -> NewConnection {
    NewConnection {
        socket,
        received: Default::default(),
        handler: Box::new(|id| {
            on_id(id);
            Box::new(Silent)
        }),
        config: config.clone(),
        encoding: Encoding::PLAIN,
        permit: engine.admit(None).expect("there is no connection limit"),
    }
}

/// Publishes to all connections; while the log is full, yields to other threads.
pub(crate) fn publish(everyone: &Namespace, payload: Payload) {
    let mut publication = Publication::message(Address::Everyone, payload);
    loop {
        match everyone.try_publish(publication) {
            Ok(()) => return,
            Err(TryPublishError::Full(refused)) => publication = refused,
            Err(error) => panic!("{error}"),
        }
        std::thread::yield_now();
    }
}

/// Panics unless all connections are open and each got every publication.
fn check_deliveries(metrics: &Metrics, members: u64, deliveries: u64) {
    check_losses(metrics);
    assert_eq!(metrics.connections, members, "{metrics:?}");
    assert_eq!((metrics.tally.offered, metrics.tally.written), (deliveries, deliveries), "{metrics:?}");
}

/// Panics if a connection ended or a frame was dropped.
fn check_losses(metrics: &Metrics) {
    let losses = metrics.tally.dropped.total() + metrics.tally.discarded + metrics.ended;
    assert_eq!(losses, 0, "{metrics:?}");
}

/// Ignores messages.
struct Silent;

impl Handler for Silent {
    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}
