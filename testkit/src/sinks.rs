//! An engine whose clients are sinks: they take everything at once and send nothing.
//!
//! For benches. [`Running`] has an engine with its threads, [`Driven`] one whose shards take turns by hand. A sink is a
//! connection like any other, with an outbox, groups and counters, but without a file descriptor, so that no kernel is
//! measured. It answers no pings, so none are due within a day.

mod driven;
mod running;

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use shardcast_engine::{
    Address, ConnectionConfig, ConnectionId, Context, Engine, Handler, Message, Metrics, Namespace,
    NewConnection, Payload, Publication, Socket, TryPublishError,
};

pub use driven::Driven;
pub use running::Running;

use crate::client::connection_on;
use crate::time::ms;

/// Short, because a sink never answers a Close frame.
pub const CLOSE_TIMEOUT: Duration = ms(10);

/// The settings of a sink, which answers no pings. Some benches need more groups than the default allows.
pub fn config() -> ConnectionConfig {
    ConnectionConfig {
        heartbeat_interval: None,
        close_timeout: CLOSE_TIMEOUT,
        max_groups: 1 << 20,
        ..ConnectionConfig::default()
    }
}

/// A connection that ignores what it receives; `on_id` gets its id, on the shard.
fn silent_connection(
    engine: &Engine,
    socket: Socket,
    config: &Arc<ConnectionConfig>,
    on_id: impl FnOnce(ConnectionId) + Send + 'static,
) -> NewConnection {
    let handler = |id| {
        on_id(id);
        Box::new(Silent) as Box<dyn Handler>
    };
    connection_on(socket, engine, config, Box::new(handler))
}

/// Publishes to everyone; lets other threads run while the log is full.
pub fn publish(everyone: &Namespace, payload: Payload) {
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

/// Panics unless there are `members` connections, and `deliveries` frames were offered and written.
fn check_counters(metrics: &Metrics, members: u64, deliveries: u64) {
    check_losses(metrics);
    assert_eq!(metrics.connections, members, "{metrics:?}");
    assert_eq!((metrics.tally.offered, metrics.tally.written), (deliveries, deliveries), "{metrics:?}");
}

/// Panics if a connection was ended or a frame lost.
fn check_losses(metrics: &Metrics) {
    let losses = metrics.tally.dropped.total() + metrics.tally.discarded + metrics.ended;
    assert_eq!(losses, 0, "{metrics:?}");
}

struct Silent;

impl Handler for Silent {
    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}
