//! Sinks on an engine with threads, one pinned to each CPU as in a service.
//!
//! Counts the deliveries that it owes, waits until all of them are written, and panics if one is lost or nothing happens
//! any more. Reads the clock only to give up.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shardcast_engine::{Engine, EngineConfig, Metrics, Namespace, Payload, Socket};

use crate::task::block_on;
use crate::time::ms;

/// After this time the engine is considered to hang.
const TEST_TIMEOUT: Duration = Duration::from_secs(120);
/// A wait that is longer than this looks rarely, because looking all the time takes a CPU from the shards. It ends at
/// most some 3 % too late, beside what the system adds to a sleep (on Linux 50 µs).
const SHORT: Duration = ms(1);

/// An engine with threads, and its sinks.
#[derive(Debug)]
pub struct Running {
    engine: Engine,
    everyone: Namespace,
    members: u64,
    /// Deliveries: publications times members.
    owed: u64,
}

impl Running {
    /// Without connections.
    pub fn start(shards: usize) -> Self {
        let config = EngineConfig { shards: Some(shards), pin: true, ..EngineConfig::default() };
        let engine = Engine::start(config).expect("an engine starts");
        Self { everyone: engine.namespace(), engine, members: 0, owed: 0 }
    }

    /// The namespace of all connections.
    pub fn everyone(&self) -> &Namespace {
        &self.everyone
    }

    /// Connects sinks until there are `members`; they are spread evenly over the shards.
    pub fn connect_up_to(&mut self, members: usize) {
        let config = Arc::new(super::config());
        for _ in self.members..members as u64 {
            let connection = super::silent_connection(&self.engine, Socket::sink(), &config, |_| {});
            block_on(self.everyone.adopt(connection)).expect("a running engine adopts");
        }
        self.members = self.members.max(members as u64);
        self.wait_until("all are connected", |metrics| metrics.connections >= self.members);
    }

    /// Publishes the payload `count` times to everyone.
    pub fn publish(&mut self, payload: &Payload, count: u64) {
        self.owe(count);
        for _ in 0..count {
            super::publish(&self.everyone, payload.clone());
        }
    }

    /// Others will publish `count` times to everyone.
    pub fn owe(&mut self, count: u64) {
        self.owed += count * self.members;
    }

    /// Waits until everything that was published is written to everyone.
    pub fn settle(&self) {
        self.wait_until("everything is written", |metrics| metrics.tally.written >= self.owed);
    }

    /// Panics if a connection was ended or a frame lost.
    pub fn check(&self) {
        super::check_counters(&self.engine.metrics(), self.members, self.owed);
    }

    fn wait_until(&self, what: &str, is_so: impl Fn(&Metrics) -> bool) {
        let started = Instant::now();
        loop {
            let metrics = self.engine.metrics();
            if is_so(&metrics) {
                return;
            }
            super::check_losses(&metrics); // what is lost need not be waited for
            let waited = started.elapsed();
            assert!(waited < TEST_TIMEOUT, "{TEST_TIMEOUT:?} and not yet: {what}; {metrics:?}");
            if waited < SHORT {
                thread::yield_now(); // shards that share this CPU need it
            } else {
                thread::sleep(waited / 32);
            }
        }
    }
}
