//! An engine with an audience: peers that take everything at once and say nothing.
//!
//! What the benches share. [`Running`](running::Running) has an engine with its threads, [`Driven`](driven::Driven) one whose shards are turned by
//! hand. The peers are sinks: connections like any other, with an outbox, groups and counters, but without a file
//! descriptor, so that no kernel is measured. They answer no pings, so they are asked for none within a day. Knows
//! the engine. Does not know what is measured.

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

/// What holds for a sink. First pings are spread over the interval, so some come early; the time for their answers
/// is what keeps everybody here. Some are in more groups than the default allows.
pub(crate) fn config() -> ConnectionConfig {
    ConnectionConfig {
        heartbeat_interval: DAY,
        pong_timeout: DAY,
        close_timeout: CLOSE_TIMEOUT,
        max_groups: 1 << 20,
        ..ConnectionConfig::default()
    }
}

/// Somebody new; `on_id` is told the id, on the shard.
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
        permit: engine.admit(None).expect("there is a place for everybody"),
    }
}

/// Publishes to everyone; while the log is full, lets others run.
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

/// That everybody is still here, and that everything which was published reached everybody.
fn check_books(metrics: &Metrics, members: u64, deliveries: u64) {
    check_losses(metrics);
    assert_eq!(metrics.connections, members, "{metrics:?}");
    assert_eq!((metrics.tally.offered, metrics.tally.written), (deliveries, deliveries), "{metrics:?}");
}

/// That nobody has been ended and nothing dropped.
fn check_losses(metrics: &Metrics) {
    let losses = metrics.tally.dropped.total() + metrics.tally.discarded + metrics.ended;
    assert_eq!(losses, 0, "{metrics:?}");
}

/// Has nothing to answer.
struct Silent;

impl Handler for Silent {
    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}
