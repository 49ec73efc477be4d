//! The engine: shards, and the threads that run them.
//!
//! Starts the threads, gives each shard its CPU, and ends them when the last handle is gone. The
//! watchdog's thread collects the shards', so that nobody who ends an engine waits for one that
//! is stuck. Nothing is global: a process may have several engines. Does not know what shards
//! do.

use std::future::poll_fn;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use mio::{Poll, Waker};

use crate::admission::ConnectionPermit;
use crate::beacon::Beacons;
use crate::close_code::InvalidCloseCode;
use crate::config::{ConfigError, ConnectionConfig, EngineConfig};
use crate::engine_core::EngineCore;
use crate::frame::Frame;
use crate::log::Log;
use crate::mailbox::Mailbox;
use crate::metrics::{Metrics, PublishedMetrics};
use crate::namespace::Namespace;
use crate::payload::Payload;
use crate::pinning::Cpus;
use crate::rendition::{Encoding, TooManyEncodings};
use crate::shard::{Parts, Shard, WAKE_TOKEN};
use crate::shutdown::{EngineState, Shutdown, ShutdownReport};
use crate::wait_list::Registration;
use crate::watchdog::Watchdog;

/// How long an engine that is dropped waits for its peers to take what is theirs.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// The stack of a shard, on which an application's methods and decoders run: room for what nests deeply, in debug builds,
/// too. Only what is used takes memory.
const STACK_BYTES: usize = 8 << 20;

/// A running engine. Cloning gives another handle to the same one; when the last handle is dropped, the
/// shards close their connections with 1001 and end. That drop waits for it, a second and a little at most; on one of the
/// engine's own threads it does not wait.
#[derive(Debug, Clone)]
pub struct Engine {
    owner: Arc<Owner>,
}

/// Ends the shards when the last handle goes.
#[derive(Debug)]
struct Owner {
    core: Arc<EngineCore>,
    /// None for an engine that is driven.
    watchdog: Option<JoinHandle<()>>,
    /// The threads of the shards, once all have been started.
    shards: OnceLock<Vec<ThreadId>>,
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
        let (core, parts) = prepare(config, Instant::now())?;
        let (threads, started) = mpsc::channel();
        let watchdog = Watchdog::new(core.clone(), started);
        let watchdog = thread::Builder::new().name("shard-watchdog".to_owned()).spawn(|| watchdog.run())?;
        core.shutdown.set_watchdog(watchdog.thread().clone());
        core.beacons.set_watchdog(watchdog.thread().clone());
        let owner = Owner { core, watchdog: Some(watchdog), shards: OnceLock::new() };

        let mut cpus = pin.then(Cpus::allowed);
        let (mut ids, mut failure) = (Vec::new(), None);
        for parts in parts {
            let (index, pin) = (parts.index, cpus.as_mut().and_then(Cpus::take));
            let around = around.clone();
            let body = move || {
                let mut shard = Some((Shard::new(parts, Instant::now()), pin));
                around(&mut || {
                    if let Some((shard, pin)) = shard.take() {
                        shard.run(pin);
                    }
                });
            };
            let spawned = match failure {
                None => {
                    let builder =
                        thread::Builder::new().name(format!("shard-{index}")).stack_size(STACK_BYTES);
                    builder.spawn(body).map_err(Some)
                }
                Some(_) => Err(None),
            };
            match spawned {
                Ok(thread) => {
                    ids.push(thread.thread().id());
                    let _ = threads.send((index, thread)); // the watchdog lives as long as shards do
                }
                Err(error) => {
                    failure = failure.or(error);
                    owner.core.shutdown.notify_closed(index, &ShutdownReport::default());
                }
            }
        }
        let _ = owner.shards.set(ids);
        match failure {
            None => Ok(Self { owner: Arc::new(owner) }),
            Some(error) => Err(error.into()), // dropping `owner` ends the threads that were started
        }
    }

    /// An engine without threads: the caller drives the shards turn by turn and says what time it is.
    /// For tests and for embedding into a loop of one's own.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn driven(config: EngineConfig, now: Instant) -> Result<(Self, Vec<Shard>), StartError> {
        let (core, parts) = prepare(config, now)?;
        let owner = Owner { core, watchdog: None, shards: OnceLock::new() };
        let shards = parts.into_iter().map(|parts| Shard::new(parts, now)).collect();
        Ok((Self { owner: Arc::new(owner) }, shards))
    }

    /// A new namespace: connections that can be addressed together. It does not keep the engine alive.
    pub fn namespace(&self) -> Namespace {
        self.namespace_named("unnamed")
    }

    /// The same with a name, by which log lines speak of it. Names need not differ.
    pub fn namespace_named(&self, name: &str) -> Namespace {
        Namespace::new(self.owner.core.clone(), name)
    }

    /// Checks settings that connections are to be handed over with, also against the engine's own: a message must not be
    /// allowed to be longer than [`unfinished_bytes_max`](EngineConfig::unfinished_bytes_max).
    ///
    /// # Errors
    /// The first field that is out of range, by name.
    pub fn check(&self, config: &ConnectionConfig) -> Result<(), ConfigError> {
        self.owner.core.config.validate_with(config)
    }

    /// Registers an encoding: from now on connections may be handed over with it, and `render` makes the frames that they
    /// get of the payloads that are published.
    ///
    /// `render` is called by publishers, once for each publication to several connections while some connection of the
    /// namespace uses the encoding, and by shards for what they find not rendered. It must be quick, and the frame that it
    /// returns must not be longer than [`Frame::BYTES_MAX`](crate::Frame::BYTES_MAX). If it panics, the connections that would
    /// have got the frame are closed (1011).
    ///
    /// # Errors
    /// There are 8 encodings, [`Encoding::PLAIN`] included.
    pub fn register_encoding(
        &self,
        render: impl Fn(&Payload) -> Frame + Send + Sync + 'static,
    ) -> Result<Encoding, TooManyEncodings> {
        self.owner.core.encodings.register(Box::new(render))
    }

    /// A place for one more connection, or none if `max_connections` are here, or `max_connections_per_address` of
    /// its address, or the engine is shutdown. Ask before the handshake is answered.
    pub fn admit(&self, address: Option<IpAddr>) -> Option<ConnectionPermit> {
        if self.owner.core.shutdown.is_asked() { None } else { self.owner.core.admission.admit(address) }
    }

    /// Ends the engine in order: admits no more connections, reads no more messages, lets handlers finish, writes
    /// out everything that was published, closes the connections, ends the threads, and says how that went. Called
    /// again, it waits for the same end.
    ///
    /// It is over within the time given, whatever a handler does. A shard that a handler holds up until then counts as
    /// stuck 200 ms later, and no shard is waited for longer than a second beyond the time; what is stuck is logged as
    /// an error and left behind ([`ShutdownReport::stuck`]). Where shards are driven by hand, it is over when all
    /// have been dropped.
    ///
    /// # Errors
    /// A close code that may not be sent; nothing has happened then.
    pub async fn shutdown(&self, shutdown: Shutdown) -> Result<ShutdownReport, InvalidCloseCode> {
        if !shutdown.code.is_valid_on_wire() {
            return Err(InvalidCloseCode(shutdown.code));
        }
        let core = &self.owner.core;
        core.shut_down(shutdown, Instant::now());
        let mut registration = Registration::default();
        Ok(poll_fn(|context| core.shutdown.poll(&mut registration, context.waker())).await)
    }

    /// Waits until the engine has ended, for whatever reason: [`EngineState::Ended`] or [`EngineState::Failed`]. Does
    /// not end it, nor keep it alive.
    pub fn ended(&self) -> impl Future<Output = EngineState> + Send + use<> {
        let core = self.owner.core.clone();
        async move {
            let mut registration = Registration::default();
            let _ = poll_fn(|context| core.shutdown.poll(&mut registration, context.waker())).await;
            core.shutdown.state()
        }
    }

    /// What the engine is doing. Never goes back.
    pub fn state(&self) -> EngineState {
        self.owner.core.shutdown.state()
    }

    /// Whether the engine ends or has ended, for whatever reason: it takes no more connections.
    pub fn is_stopping(&self) -> bool {
        self.owner.core.shutdown.is_asked()
    }

    /// The number of connections, those on their way to their shard included.
    pub fn connection_count(&self) -> usize {
        self.owner.core.admission.taken()
    }

    /// The number of shards.
    pub fn shard_count(&self) -> usize {
        self.owner.core.mailboxes.len()
    }

    /// What each shard has counted, as of its last turn; [`lag_micros`](Metrics::lag_micros) and
    /// [`blocked`](Metrics::blocked) as of now, also of a shard that is held up.
    pub fn shard_metrics(&self) -> Vec<Metrics> {
        let EngineCore { metrics, beacons, .. } = &*self.owner.core;
        let now = Instant::now();
        let seen = |(shard, metrics): (usize, &PublishedMetrics)| {
            let metrics = metrics.read();
            let turn =
                beacons.turn_of(shard).map_or(Duration::ZERO, |turn| now.saturating_duration_since(turn));
            let lag_micros = metrics.lag_micros.max(turn.as_micros() as u64);
            Metrics { lag_micros, blocked: beacons.blocked(shard), ..metrics }
        };
        metrics.iter().enumerate().map(seen).collect()
    }

    /// What all shards have counted together.
    pub fn metrics(&self) -> Metrics {
        self.shard_metrics().into_iter().fold(Metrics::default(), |mut sum, metrics| {
            sum += metrics;
            sum
        })
    }
}

/// What an engine's threads share, and what each shard is made of.
fn prepare(config: EngineConfig, now: Instant) -> Result<(Arc<EngineCore>, Vec<Parts>), StartError> {
    config.validate()?;
    let count = match config.shards {
        Some(count) => count,
        None => thread::available_parallelism().map_or(1, usize::from),
    };
    let (log, readers) = Log::new(config.log_capacity, count, config.publishers_waiting_max);
    let polls = (0..count).map(|_| Poll::new()).collect::<Result<Vec<_>, _>>()?;
    let mailboxes = polls.iter().map(|poll| {
        let bell = Waker::new(poll.registry(), WAKE_TOKEN)?;
        Ok(Mailbox::new(config.mailbox_capacity, config.publishers_waiting_max, bell))
    });
    let mailboxes = mailboxes.collect::<Result<Box<[_]>, std::io::Error>>()?;
    let core = Arc::new(EngineCore::new(config, log, mailboxes, Beacons::new(count, now)));
    let parts = polls.into_iter().zip(readers).enumerate();
    let parts = parts.map(|(index, (poll, reader))| Parts { index, core: core.clone(), poll, reader });
    let parts = parts.collect();
    Ok((core, parts))
}

/// For the random histories in `tests/`.
#[cfg(feature = "audit")]
#[allow(missing_docs)]
impl Engine {
    /// Grows by one with each publication or command that is taken, as long as no shard takes a turn.
    pub fn audit_accepted(&self) -> u64 {
        let core = &self.owner.core;
        core.log.tail() + core.mailboxes.iter().map(|mailbox| mailbox.len() as u64).sum::<u64>()
    }

    pub fn audit_is_closed(&self) -> bool {
        self.owner.core.shutdown.is_closed()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.core.stop(STOP_GRACE, Instant::now());
        let Some(watchdog) = self.watchdog.take() else { return };
        // The last handle may be dropped by a handler, on a shard, or by a task that the watchdog wakes. A thread
        // cannot wait for itself; they end on their own.
        let this = thread::current().id();
        let is_own = watchdog.thread().id() == this;
        if !is_own && !self.shards.get().is_some_and(|shards| shards.contains(&this)) {
            let _ = watchdog.join(); // it waits for a stuck shard no longer than a second
        }
    }
}
