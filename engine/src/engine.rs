//! The engine: shards, and the threads that run them.
//!
//! Starts the threads, pins them, and ends them when the last handle is gone. Nothing is
//! global: a process may have several engines. Does not know what shards do.

use std::future::poll_fn;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mio::{Poll, Waker};

use crate::admission::Place;
use crate::config::{ConfigError, EngineConfig};
use crate::log::Log;
use crate::mailbox::Mailbox;
use crate::metrics::Metrics;
use crate::namespace::Namespace;
use crate::publisher::Shared;
use crate::shard::{BELL, Parts, Shard};
use crate::stopping::{Shutdown, ShutdownReport};

/// How long an engine that is dropped waits for its peers to take what is theirs.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// A running engine. Cloning gives another handle to the same one; when the last handle is dropped, the
/// shards close their connections with 1001 and end.
#[derive(Debug, Clone)]
pub struct Engine {
    owner: Arc<Owner>,
}

/// Ends the shards when the last handle goes.
#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// An engine could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A setting is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system gave no poll, no waker or no thread.
    #[error("the system refused what a shard needs")]
    System(#[from] std::io::Error),
}

impl Engine {
    /// Starts the shards' threads.
    ///
    /// # Errors
    /// A setting out of range; a system that gives no file descriptors or threads.
    pub fn start(config: EngineConfig) -> Result<Self, StartError> {
        Self::start_within(config, |shard| shard())
    }

    /// Like [`start`](Self::start), but each shard's thread calls `around` with the shard's whole life, so that
    /// handlers find there what they need: a runtime that was entered, a thread-local that was set.
    ///
    /// # Errors
    /// As for `start`.
    pub fn start_within(
        config: EngineConfig,
        around: impl Fn(&mut dyn FnMut()) + Clone + Send + 'static,
    ) -> Result<Self, StartError> {
        let pin = config.pin;
        let (engine, parts) = Self::prepare(config)?;
        let cpus = if pin { core_affinity::get_core_ids().unwrap_or_default() } else { Vec::new() };
        for parts in parts {
            let index = parts.index;
            let cpu = (!cpus.is_empty()).then(|| cpus[index % cpus.len()]);
            let around = around.clone();
            let body = move || {
                if let Some(cpu) = cpu
                    && !core_affinity::set_for_current(cpu)
                {
                    tracing::warn!(
                        shard = index,
                        cpu = cpu.id,
                        "the shard could not be pinned and runs unpinned"
                    );
                }
                let mut shard = Some(Shard::new(parts, Instant::now()));
                around(&mut || {
                    if let Some(shard) = shard.take() {
                        shard.run();
                    }
                });
            };
            // If this fails, dropping `engine` ends the threads that were started.
            let thread = thread::Builder::new().name(format!("shard-{index}")).spawn(body)?;
            engine.lock_threads().push(thread);
        }
        Ok(engine)
    }

    /// An engine without threads: the caller drives the shards turn by turn and says what time it is.
    /// For tests and for embedding into a loop of one's own.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn driven(config: EngineConfig, now: Instant) -> Result<(Self, Vec<Shard>), StartError> {
        let (engine, parts) = Self::prepare(config)?;
        Ok((engine, parts.into_iter().map(|parts| Shard::new(parts, now)).collect()))
    }

    fn prepare(config: EngineConfig) -> Result<(Self, Vec<Parts>), StartError> {
        config.validate()?;
        let count = match config.shards {
            Some(count) => count,
            None => thread::available_parallelism().map_or(1, usize::from),
        };
        let (log, readers) = Log::new(config.log_capacity, count, config.publishers_waiting_max);
        let polls = (0..count).map(|_| Poll::new()).collect::<Result<Vec<_>, _>>()?;
        let mailboxes = polls.iter().map(|poll| {
            let bell = Waker::new(poll.registry(), BELL)?;
            Ok(Mailbox::new(config.mailbox_capacity, config.publishers_waiting_max, bell))
        });
        let mailboxes = mailboxes.collect::<Result<Box<[_]>, std::io::Error>>()?;
        let shared = Arc::new(Shared::new(config, log, mailboxes));
        let parts = polls.into_iter().zip(readers).enumerate();
        let parts =
            parts.map(|(index, (poll, reader))| Parts { index, shared: shared.clone(), poll, reader });
        let parts = parts.collect();
        let owner = Arc::new(Owner { shared, threads: Mutex::new(Vec::new()) });
        Ok((Self { owner }, parts))
    }

    /// A new namespace: connections that can be addressed together. It does not keep the engine alive.
    pub fn namespace(&self) -> Namespace {
        Namespace::new(self.owner.shared.clone())
    }

    /// A place for one more connection, or none if `max_connections` are here, or `max_connections_per_address` of
    /// its address, or the engine is stopping. Ask before the handshake is answered.
    pub fn admit(&self, address: Option<IpAddr>) -> Option<Place> {
        if self.owner.shared.stopping.is_asked() { None } else { self.owner.shared.admission.admit(address) }
    }

    /// Ends the engine in order: admits no more connections, reads no more messages, lets handlers finish, writes
    /// out everything that was published, closes the connections, ends the threads, and says how that went. Called
    /// again, it waits for the same end.
    pub async fn shutdown(&self, shutdown: Shutdown) -> ShutdownReport {
        let shared = &self.owner.shared;
        shared.shut_down(shutdown, Instant::now());
        let report = poll_fn(|context| shared.stopping.poll(context.waker())).await;
        self.owner.join();
        report
    }

    /// Whether a shutdown has begun.
    pub fn is_stopping(&self) -> bool {
        self.owner.shared.stopping.is_asked()
    }

    /// Connections that are here or on their way.
    pub fn connections(&self) -> usize {
        self.owner.shared.admission.taken()
    }

    /// The number of shards.
    pub fn shards(&self) -> usize {
        self.owner.shared.mailboxes.len()
    }

    /// What each shard has counted, as of its last turn.
    pub fn shard_metrics(&self) -> Vec<Metrics> {
        self.owner.shared.metrics.iter().map(|metrics| metrics.read()).collect()
    }

    /// What all shards have counted together.
    pub fn metrics(&self) -> Metrics {
        self.shard_metrics().into_iter().fold(Metrics::default(), |mut sum, metrics| {
            sum += metrics;
            sum
        })
    }

    fn lock_threads(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.owner.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For the random histories in `tests/`.
#[cfg(feature = "audit")]
#[allow(missing_docs)]
impl Engine {
    /// Grows by one with each publication or command that is taken, as long as no shard takes a turn.
    pub fn audit_accepted(&self) -> u64 {
        let shared = &self.owner.shared;
        shared.log.tail() + shared.mailboxes.iter().map(|mailbox| mailbox.len() as u64).sum::<u64>()
    }

    pub fn audit_is_closed(&self) -> bool {
        self.owner.shared.stopping.is_closed()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.stop(STOP_GRACE, Instant::now());
        self.join();
    }
}

impl Owner {
    /// Waits for the threads, which are about to end.
    fn join(&self) {
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // The last handle may be dropped by a handler, on a shard: a thread cannot wait for itself.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                tracing::error!("a shard panicked");
            }
        }
    }
}
