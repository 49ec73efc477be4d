//! An engine without threads: its shards take a turn when a test says so, at the time that the test says.
//!
//! Nothing here sleeps or reads a clock after the start. A [`Rig`] gives every shard a turn whenever it is asked to. Made
//! `sleepy` (feature `audit`), it gives a turn only to shards whose threads would run: that shows wakes that are missing.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shardcast_engine::{
    Address, CloseReason, ConnectionConfig, ConnectionId, ConnectionMetrics, Engine, EngineConfig,
    GroupMetrics, MakeHandler, Metrics, Namespace, Shard,
};

use crate::client::{Client, new_connection, new_connection_with};
use crate::handler::Broadcaster;
use crate::raw_client::RawClient;
use crate::task::{at_once, lock};

/// Turns after which an engine that still has something to do is considered to spin for ever.
const TURNS_MAX: usize = 100_000;

/// An engine without threads, and its clock.
#[allow(missing_debug_implementations, reason = "shards cannot be shown")]
pub struct Rig {
    /// The engine.
    pub engine: Engine,
    /// Its shards, in their order.
    pub shards: Vec<Shard>,
    /// The namespace of the connections that the rig makes.
    pub everyone: Namespace,
    /// The settings of those connections.
    pub config: Arc<ConnectionConfig>,
    /// The time at which the shards take their turns.
    pub now: Instant,
    /// How many bytes the kernel keeps for a client that does not read; Linux doubles it.
    pub send_buffer: usize,
    /// How each shard sleeps, if it does; none where shards do not sleep.
    #[cfg(feature = "audit")]
    asleep: Option<Vec<Option<Sleep>>>,
}

/// A shard that waits in its poll: until that time at the latest, or until something wakes it.
#[cfg(feature = "audit")]
#[derive(Debug, Clone, Copy)]
struct Sleep {
    until: Option<Instant>,
}

/// Whether engines of tests write by io_uring: if the variable `SHARDCAST_TEST_IO_URING` is set, and the engine has the
/// feature `io-uring`.
pub fn uses_io_uring() -> bool {
    std::env::var_os("SHARDCAST_TEST_IO_URING").is_some()
}

impl Rig {
    /// With default settings.
    pub fn new(shards: usize) -> Self {
        Self::with(
            EngineConfig { shards: Some(shards), ..EngineConfig::default() },
            ConnectionConfig::default(),
        )
    }

    /// With these settings. Panics if they are not valid.
    pub fn with(engine: EngineConfig, connection: ConnectionConfig) -> Self {
        let now = Instant::now();
        let engine = EngineConfig { io_uring: engine.io_uring || uses_io_uring(), ..engine };
        let (engine, shards) = Engine::driven(engine, now).expect("a valid configuration");
        let everyone = engine.namespace();
        Self {
            engine,
            shards,
            everyone,
            config: Arc::new(connection),
            now,
            send_buffer: 4096,
            #[cfg(feature = "audit")]
            asleep: None,
        }
    }

    /// With one shard, and connections with these settings.
    pub fn one(connection: ConnectionConfig) -> Self {
        Self::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, connection)
    }

    /// From now on a shard takes a turn only if its thread would: it has work, its reminder is due, or something has
    /// woken it.
    #[cfg(feature = "audit")]
    pub fn sleepy(mut self) -> Self {
        self.asleep = Some(vec![None; self.shards.len()]);
        self
    }

    /// One turn of each shard.
    pub fn turn(&mut self) {
        (0..self.shards.len()).for_each(|index| self.turn_of(index));
    }

    /// One turn of one shard, if it is awake.
    pub fn turn_of(&mut self, index: usize) {
        #[cfg(feature = "audit")]
        if self.is_asleep(index) {
            return;
        }
        self.shards[index].turn(self.now).expect("a turn");
        #[cfg(feature = "audit")]
        if let Some(asleep) = &mut self.asleep {
            asleep[index] = match self.shards[index].doze(self.now) {
                Some(Duration::ZERO) => None,
                bound => Some(Sleep { until: bound.map(|bound| self.now + bound) }),
            };
        }
    }

    /// Whether the shard's thread would not run now.
    #[cfg(feature = "audit")]
    fn is_asleep(&self, index: usize) -> bool {
        let sleep = self.asleep.as_ref().and_then(|asleep| asleep[index]);
        sleep.is_some_and(|Sleep { until }| {
            let is_due = until.is_some_and(|until| until <= self.now);
            !is_due && !is_readable(&self.shards[index])
        })
    }

    /// Whether a turn of this shard would have something to do.
    pub fn would_work(&self, index: usize) -> bool {
        #[cfg(feature = "audit")]
        if self.asleep.is_some() {
            return !self.is_asleep(index);
        }
        self.shards[index].has_work()
    }

    /// Gives turns until nothing happens any more. Panics if that takes too many.
    pub fn settle(&mut self) {
        let (mut quiet, mut before) = (0, Metrics::default());
        for _ in 0..TURNS_MAX {
            self.turn();
            let mut metrics = self.engine.metrics();
            metrics.turns = 0;
            let is_quiet = metrics == before && !(0..self.shards.len()).any(|index| self.would_work(index));
            quiet = if is_quiet { quiet + 1 } else { 0 };
            before = metrics;
            if quiet == 3 {
                return;
            }
        }
        panic!("the engine does not come to rest");
    }

    /// Lets time pass, and settles at each reminder on the way.
    pub fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.shards.iter().filter_map(Shard::next_due).min().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.settle();
        }
        self.now = end;
        self.settle();
    }

    /// A client whose connection is open, and whose handler records its calls.
    pub fn connect(&mut self) -> Client {
        let client = self.connect_at_once();
        self.settle();
        client
    }

    /// A client whose connection was handed over, without a turn.
    pub fn connect_at_once(&mut self) -> Client {
        let (new_connection, client) = new_connection(&self.engine, &self.config, self.send_buffer);
        at_once(self.everyone.adopt(new_connection)).expect("adopted");
        client
    }

    /// A client whose handler publishes to everyone what it receives, and the reasons for which its connection ended.
    pub fn connect_broadcaster(&mut self) -> (RawClient, Arc<Mutex<Vec<CloseReason>>>) {
        let ends = Arc::new(Mutex::new(Vec::new()));
        let (everyone, told) = (self.everyone.clone(), ends.clone());
        let handler: MakeHandler = Box::new(|_| Box::new(Broadcaster::new(everyone, told)));
        (self.connect_handler(handler), ends)
    }

    /// A client whose connection has a handler of the test.
    pub fn connect_handler(&mut self, handler: MakeHandler) -> RawClient {
        let (new_connection, peer) =
            new_connection_with(&self.engine, &self.config, self.send_buffer, handler);
        at_once(self.everyone.adopt(new_connection)).expect("adopted");
        self.settle();
        peer
    }

    /// A client whose handler is still in `on_open`.
    pub fn connect_opening(&mut self) -> Client {
        let (new_connection, client) = new_connection(&self.engine, &self.config, self.send_buffer);
        lock(&client.record).waits_at_open = true;
        at_once(self.everyone.adopt(new_connection)).expect("adopted");
        self.settle();
        client
    }

    /// So many clients, one after the other.
    pub fn connect_many(&mut self, count: usize) -> Vec<Client> {
        (0..count).map(|_| self.connect()).collect()
    }

    /// The metrics of a connection; none if it has ended.
    pub fn metrics_of(&mut self, id: ConnectionId) -> Option<ConnectionMetrics> {
        let found = Arc::new(Mutex::new(None));
        let result = found.clone();
        at_once(self.everyone.connection_metrics(id, move |metrics| *lock(&result) = Some(metrics)))
            .expect("asked");
        self.settle();
        *lock(&found)
    }

    /// The metrics of the connections that the address means, without those in `except`.
    pub fn collect_metrics(&mut self, to: &Address, except: &[ConnectionId]) -> GroupMetrics {
        let sum = Arc::new(Mutex::new(GroupMetrics::default()));
        let result = sum.clone();
        at_once(self.everyone.collect_metrics(to, except, move |part| *lock(&result) += part))
            .expect("asked");
        self.settle();
        assert_eq!(Arc::strong_count(&sum), 1, "every shard has answered");
        *lock(&sum)
    }
}

/// Whether a poll of the shard would return at once.
#[cfg(feature = "audit")]
pub fn is_readable(shard: &Shard) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    // SAFETY: the descriptor is the shard's own, and the shard is borrowed meanwhile.
    let descriptor = unsafe { std::os::fd::BorrowedFd::borrow_raw(shard.poll_fd()) };
    let mut descriptors = [PollFd::new(&descriptor, PollFlags::IN)];
    poll(&mut descriptors, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("a poll") > 0
}
