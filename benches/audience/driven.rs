//! An engine whose shards the bench drives itself: the cost of a turn, without threads and wakes.
//!
//! Owned by one case. Time advances only by [`pass`](Driven::pass). Does not know the clock.

use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use shardcast_engine::{
    Address, CloseCode, ConnectionConfig, ConnectionId, Engine, EngineConfig, Metrics, Namespace, Payload,
    Publication, Shard, Socket,
};

pub(crate) struct Driven {
    engine: Engine,
    shards: Vec<Shard>,
    now: Instant,
    pub(crate) everyone: Namespace,
    ids: (Sender<ConnectionId>, Receiver<ConnectionId>),
}

impl Driven {
    /// An engine without connections.
    pub(crate) fn new(shards: usize) -> Self {
        let now = Instant::now();
        let config = EngineConfig { shards: Some(shards), ..EngineConfig::default() };
        let (engine, shards) = Engine::driven(config, now).expect("an engine can be made");
        Self { everyone: engine.namespace(), engine, shards, now, ids: channel() }
    }

    /// Connects `count` sinks.
    pub(crate) fn add_sinks(&mut self, count: usize) -> Vec<ConnectionId> {
        self.adopt(std::iter::repeat_with(Socket::sink).take(count), super::config())
    }

    /// Adopts these sockets.
    pub(crate) fn adopt(
        &mut self,
        sockets: impl Iterator<Item = Socket>,
        config: ConnectionConfig,
    ) -> Vec<ConnectionId> {
        let config = Arc::new(config);
        for socket in sockets {
            let ids = self.ids.0.clone();
            let on_id = move |id| ids.send(id).expect("the receiver is kept");
            let connection = super::connection(&self.engine, socket, &config, on_id);
            let adopting = self.everyone.adopt(connection);
            drive(&mut self.shards, self.now, adopting).expect("an engine that runs adopts");
        }
        self.settle();
        self.ids.1.try_iter().collect()
    }

    /// Submits a join; it takes effect in the next turn.
    pub(crate) fn join(&mut self, id: ConnectionId, group: &str) {
        drive(&mut self.shards, self.now, self.everyone.join(id, group)).expect("the engine runs");
    }

    /// Submits a leave; it takes effect in the next turn.
    pub(crate) fn leave(&mut self, id: ConnectionId, group: &str) {
        drive(&mut self.shards, self.now, self.everyone.leave(id, group)).expect("the engine runs");
    }

    /// Submits a close; the connection ends in the next turn.
    pub(crate) fn close(&mut self, id: ConnectionId) {
        let closing = self.everyone.publish(
            Publication::close(Address::Connection(id), CloseCode::NORMAL, "").expect("1000 may be sent"),
        );
        drive(&mut self.shards, self.now, closing).expect("the engine runs");
    }

    /// Publishes the frame `count` times to all connections.
    pub(crate) fn publish(&self, frame: &Payload, count: u64) {
        for _ in 0..count {
            super::publish(&self.everyone, frame.clone());
        }
    }

    /// Drives the shards until no work is left.
    pub(crate) fn settle(&mut self) {
        while self.shards.iter().any(Shard::has_work) {
            turn(&mut self.shards, self.now);
        }
    }

    /// Advances the time.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        turn(&mut self.shards, self.now);
        self.settle();
    }

    pub(crate) fn metrics(&self) -> Metrics {
        self.engine.metrics()
    }

    /// Panics unless there are `members` connections and each got all `publications`.
    pub(crate) fn check(&self, members: u64, publications: u64) {
        super::check_deliveries(&self.metrics(), members, members * publications);
    }
}

fn turn(shards: &mut [Shard], now: Instant) {
    shards.iter_mut().for_each(|shard| shard.turn(now).expect("a shard turns"));
}

/// Polls the future until it is ready, and drives the shards while it is pending.
fn drive<F: Future>(shards: &mut [Shard], now: Instant, future: F) -> F::Output {
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => return output,
            Poll::Pending => turn(shards, now),
        }
    }
}
