//! An engine with threads, one pinned to each CPU as in a service, and its connections.
//!
//! Owned by one case. Counts the deliveries that it expects, waits until all are written, and panics if one was lost or
//! there is no progress before a timeout. Uses the clock only for that timeout.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shardcast_engine::{Engine, EngineConfig, Metrics, Namespace, Payload, Socket};

/// The time without a result after which the engine counts as hanging.
const TEST_TIMEOUT: Duration = Duration::from_secs(120);
/// After this time a wait sleeps between checks, because constant polling takes a CPU from the shards. It then ends at
/// most about 3 % late, plus what the system adds to a sleep (50 µs on Linux).
const SHORT: Duration = Duration::from_millis(1);

pub(crate) struct Running {
    engine: Engine,
    pub(crate) everyone: Namespace,
    members: u64,
    /// Deliveries: publications times members.
    expected: u64,
}

impl Running {
    /// An engine without connections.
    pub(crate) fn start(shards: usize) -> Self {
        let config = EngineConfig { shards: Some(shards), pin: true, ..EngineConfig::default() };
        let engine = Engine::start(config).expect("an engine starts");
        Self { everyone: engine.namespace(), engine, members: 0, expected: 0 }
    }

    /// Connects sinks until there are `members`, spread evenly over the shards.
    pub(crate) fn grow(&mut self, members: usize) {
        let config = Arc::new(super::config());
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime can be built");
        runtime.block_on(async {
            for _ in self.members..members as u64 {
                let connection = super::connection(&self.engine, Socket::sink(), &config, |_| {});
                self.everyone.adopt(connection).await.expect("an engine that runs adopts");
            }
        });
        self.members = self.members.max(members as u64);
        self.wait_until("all sinks are connected", |metrics| metrics.connections >= self.members);
    }

    /// Publishes the frame `count` times to all connections.
    pub(crate) fn publish(&mut self, frame: &Payload, count: u64) {
        self.expect_publications(count);
        for _ in 0..count {
            super::publish(&self.everyone, frame.clone());
        }
    }

    /// Expects `count` publications to all connections, by other publishers.
    pub(crate) fn expect_publications(&mut self, count: u64) {
        self.expected += count * self.members;
    }

    /// Waits until every publication is written to all connections.
    pub(crate) fn settle(&self) {
        self.wait_until("all deliveries are written", |metrics| metrics.tally.written >= self.expected);
    }

    /// Panics if a connection ended or a delivery was lost.
    pub(crate) fn check(&self) {
        super::check_deliveries(&self.engine.metrics(), self.members, self.expected);
    }

    fn wait_until(&self, what: &str, is_so: impl Fn(&Metrics) -> bool) {
        let started = Instant::now();
        loop {
            let metrics = self.engine.metrics();
            if is_so(&metrics) {
                return;
            }
            super::check_losses(&metrics); // after a loss the wait could not succeed
            let waited = started.elapsed();
            assert!(waited < TEST_TIMEOUT, "{TEST_TIMEOUT:?} and not yet: {what}; {metrics:?}");
            if waited < SHORT {
                thread::yield_now(); // a shard may share this CPU
            } else {
                thread::sleep(waited / 32);
            }
        }
    }
}
