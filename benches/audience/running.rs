//! An audience on an engine with threads, one pinned to each CPU as in a service.
//!
//! Counts what it owes to its members, waits until all of it is written, and panics if
//! something was lost or nothing comes any more. Knows no clock but for giving up.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shardcast_engine::{Engine, EngineConfig, Metrics, Namespace, Payload, Socket};

/// After which the engine is believed to hang.
const TEST_TIMEOUT: Duration = Duration::from_secs(120);
/// A wait that is longer looks rarely: who looks all the time takes a CPU from those who work. It then ends at most
/// some 3 % too late, and what the system adds to a sleep (on Linux 50 µs).
const SHORT: Duration = Duration::from_millis(1);

pub(crate) struct Running {
    engine: Engine,
    pub(crate) everyone: Namespace,
    members: u64,
    /// Deliveries: publications times members.
    owed: u64,
}

impl Running {
    /// An engine, and nobody there yet.
    pub(crate) fn start(shards: usize) -> Self {
        let config = EngineConfig { shards: Some(shards), pin: true, ..EngineConfig::default() };
        let engine = Engine::start(config).expect("an engine starts");
        Self { everyone: engine.namespace(), engine, members: 0, owed: 0 }
    }

    /// Lets sinks in until there are `members`; they spread evenly over the shards.
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
        self.wait_until("everybody is there", |metrics| metrics.connections >= self.members);
    }

    /// Publishes the frame `count` times to everyone.
    pub(crate) fn publish(&mut self, frame: &Payload, count: u64) {
        self.owe(count);
        for _ in 0..count {
            super::publish(&self.everyone, frame.clone());
        }
    }

    /// Others will publish `count` times to everyone.
    pub(crate) fn owe(&mut self, count: u64) {
        self.owed += count * self.members;
    }

    /// Waits until everything that was published is written to everybody.
    pub(crate) fn settle(&self) {
        self.wait_until("everything is written", |metrics| metrics.tally.written >= self.owed);
    }

    /// Panics if somebody has gone or something was lost.
    pub(crate) fn check(&self) {
        super::check_books(&self.engine.metrics(), self.members, self.owed);
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
                thread::yield_now(); // where shards share this CPU, it is theirs
            } else {
                thread::sleep(waited / 32);
            }
        }
    }
}
