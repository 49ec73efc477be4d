//! The brokers of the suite: real servers, of `testkit-broker`, and the one in memory.
//!
//! Does not know what is tested.

use std::num::NonZeroUsize;

use shardcast_backplane::Backplane;
use shardcast_backplane::memory::{MemoryBackplane, MemoryLog};
use shardcast_backplane::nats::{NatsBackplane, NatsConfig, Storage};
use shardcast_backplane::redis::{RedisBackplane, RedisConfig};
use testkit_broker::{Kind, Server};

/// What a broker keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keeps {
    /// Also over a restart.
    Everything,
    /// The last records.
    Little,
    /// Nothing over a restart.
    Nothing,
}

pub(crate) trait Broker: Sized {
    type Backplane: Backplane;

    async fn start(keeps: Keeps) -> Self;

    /// A node that is connected to it.
    async fn node(&self) -> Self::Backplane;

    /// Kills it (SIGKILL).
    fn kill(&mut self);

    /// Starts it again, at the same address, with what it has kept.
    async fn restart(&mut self);

    /// Notes what it has stored, for [`go_back`](Self::go_back).
    async fn remember(&mut self);

    /// Loses what it has stored since then, as in a crash before the last records were written.
    async fn go_back(&mut self);

    /// Drops old records, if the broker does not do so by itself.
    fn truncate(&self) {}
}

pub(crate) struct Memory {
    log: MemoryLog,
    keeps: Keeps,
}

impl Broker for Memory {
    type Backplane = MemoryBackplane;

    async fn start(keeps: Keeps) -> Self {
        Self { log: MemoryLog::new(), keeps }
    }

    async fn node(&self) -> MemoryBackplane {
        self.log.backplane()
    }

    fn kill(&mut self) {
        self.log.set_outage(true);
        if self.keeps == Keeps::Nothing {
            self.log.lose(usize::MAX);
        }
    }

    async fn restart(&mut self) {
        self.log.set_outage(false);
    }

    async fn remember(&mut self) {}

    async fn go_back(&mut self) {
        self.log.lose(10);
    }

    fn truncate(&self) {
        self.log.truncate(20);
    }
}

/// The operations of a broker that is a server.
macro_rules! server_calls {
    () => {
        fn kill(&mut self) {
            self.server.kill();
        }

        async fn restart(&mut self) {
            self.server.run().await;
        }

        async fn remember(&mut self) {
            self.server.remember().await;
        }

        async fn go_back(&mut self) {
            self.server.go_back().await;
        }
    };
}

pub(crate) struct Nats {
    server: Server,
    keeps: Keeps,
}

impl Broker for Nats {
    type Backplane = NatsBackplane;

    async fn start(keeps: Keeps) -> Self {
        Self { server: Server::start(Kind::Nats).await, keeps }
    }

    async fn node(&self) -> NatsBackplane {
        let config = NatsConfig {
            storage: if self.keeps == Keeps::Everything { Storage::File } else { Storage::Memory },
            max_bytes: if self.keeps == Keeps::Little { 100_000 } else { 64 << 20 },
            ..NatsConfig::default()
        };
        NatsBackplane::connect(&self.server.url(), config).await.expect("it has been started")
    }

    server_calls! {}
}

pub(crate) struct Redis {
    server: Server,
    keeps: Keeps,
}

impl Broker for Redis {
    type Backplane = RedisBackplane;

    async fn start(keeps: Keeps) -> Self {
        let kind = if keeps == Keeps::Nothing { Kind::ForgetfulRedis } else { Kind::Redis };
        Self { server: Server::start(kind).await, keeps }
    }

    async fn node(&self) -> RedisBackplane {
        let records_max = if self.keeps == Keeps::Little { 20 } else { 100_000 };
        let config =
            RedisConfig { records_max: NonZeroUsize::new(records_max).unwrap(), ..RedisConfig::default() };
        RedisBackplane::connect(&self.server.url(), config).await.expect("it has been started")
    }

    server_calls! {}
}
