//! Sinks on an engine whose shards take turns by hand: what a turn costs, without threads and wakes.
//!
//! Time passes only by [`pass`](Driven::pass).

use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use shardcast_engine::{
    Address, CloseCode, ConnectionConfig, ConnectionId, Metrics, Namespace, Payload, Publication, Shard,
    Socket,
};

use crate::rig::Rig;

/// A [`Rig`] and its sinks. Does not compare metrics between turns, which would cost more than the turns.
#[allow(missing_debug_implementations, reason = "shards cannot be shown")]
pub struct Driven {
    rig: Rig,
    ids: (Sender<ConnectionId>, Receiver<ConnectionId>),
}

impl Driven {
    /// Without connections.
    pub fn new(shards: usize) -> Self {
        Self { rig: Rig::new(shards), ids: channel() }
    }

    /// From now on a shard takes a turn only if its thread would.
    #[cfg(feature = "audit")]
    #[must_use]
    pub fn sleepy(self) -> Self {
        Self { rig: self.rig.sleepy(), ..self }
    }

    /// The engine and its shards.
    pub fn rig(&mut self) -> &mut Rig {
        &mut self.rig
    }

    /// The namespace of all connections.
    pub fn everyone(&self) -> &Namespace {
        &self.rig.everyone
    }

    /// Connects so many sinks.
    pub fn connect(&mut self, count: usize) -> Vec<ConnectionId> {
        self.adopt(std::iter::repeat_with(Socket::sink).take(count), super::config())
    }

    /// Connects clients that have these sockets.
    pub fn adopt(
        &mut self,
        sockets: impl Iterator<Item = Socket>,
        config: ConnectionConfig,
    ) -> Vec<ConnectionId> {
        let config = Arc::new(config);
        for socket in sockets {
            let ids = self.ids.0.clone();
            let on_id = move |id| ids.send(id).expect("the receiver is beside it");
            let connection = super::silent_connection(&self.rig.engine, socket, &config, on_id);
            drive(&mut self.rig.shards, self.rig.now, self.rig.everyone.adopt(connection))
                .expect("a running engine adopts");
        }
        self.settle();
        self.ids.1.try_iter().collect()
    }

    /// Asks for a membership; it begins in the next turn.
    pub fn join(&mut self, id: ConnectionId, group: &str) {
        drive(&mut self.rig.shards, self.rig.now, self.rig.everyone.join(id, group))
            .expect("the engine runs");
    }

    /// Asks for the end of a membership; it ends in the next turn.
    pub fn leave(&mut self, id: ConnectionId, group: &str) {
        drive(&mut self.rig.shards, self.rig.now, self.rig.everyone.leave(id, group))
            .expect("the engine runs");
    }

    /// Asks for the end of a connection; it ends in the next turn.
    pub fn close(&mut self, id: ConnectionId) {
        let close =
            Publication::close(Address::Connection(id), CloseCode::NORMAL, "").expect("1000 may be sent");
        drive(&mut self.rig.shards, self.rig.now, self.rig.everyone.publish(close)).expect("the engine runs");
    }

    /// Publishes the payload `count` times to everyone.
    pub fn publish(&self, payload: &Payload, count: u64) {
        for _ in 0..count {
            super::publish(&self.rig.everyone, payload.clone());
        }
    }

    /// Gives the shards turns until nothing is left to do.
    pub fn settle(&mut self) {
        while (0..self.rig.shards.len()).any(|index| self.rig.would_work(index)) {
            self.rig.turn();
        }
    }

    /// Lets time pass.
    pub fn pass(&mut self, time: Duration) {
        self.rig.now += time;
        self.rig.turn();
        self.settle();
    }

    /// The engine's counters.
    pub fn metrics(&self) -> Metrics {
        self.rig.engine.metrics()
    }

    /// Panics unless there are `members` connections that all got `publications`.
    pub fn check(&self, members: u64, publications: u64) {
        super::check_counters(&self.metrics(), members, members * publications);
    }
}

/// Polls the future to its end, and gives the shards turns while it waits for them.
fn drive<F: Future>(shards: &mut [Shard], now: Instant, future: F) -> F::Output {
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => return output,
            Poll::Pending => shards.iter_mut().for_each(|shard| shard.turn(now).expect("a turn")),
        }
    }
}
