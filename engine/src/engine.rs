//! The engine: shards, and the threads that run them.
//!
//! Starts the threads, binds each shard to its CPU, and ends the threads when the last handle is dropped. The
//! watchdog's thread joins the shards' threads, so that ending an engine never waits for a shard that is
//! stuck. Nothing is global: a process may have several engines. Does not know what shards do.

use std::future::poll_fn;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use mio::{Poll, Waker};

use crate::admission::{ConnectionPermit, TooManyUpgrades};
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

/// How long a dropped engine waits for its clients to take the bytes that are queued for them.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// The stack of a shard's thread. An application's methods and decoders run on it, so it has room for deep
/// nesting, in debug builds too. Only the part that is used takes memory.
const STACK_BYTES: usize = 8 << 20;

/// A handle to a running engine. A clone is another handle to the same engine. When the last handle is
/// dropped, the shards close their connections with 1001 and end; the drop waits for that, slightly more than
/// one second at most. On one of the engine's own threads the drop does not wait.
#[derive(Debug, Clone)]
pub struct Engine {
    owner: Arc<Owner>,
}

/// Ends the shards when the last handle is dropped.
#[derive(Debug)]
struct Owner {
    core: Arc<EngineCore>,
    /// None for an engine that is driven by its caller.
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
    /// The system did not provide a poll, a waker or a thread.
    #[error("the system refused a shard's poll, waker or thread: check the limits on open files and threads")]
    System(#[from] std::io::Error),
}

impl Engine {
    /// Starts the shards' threads.
    ///
    /// # Errors
    /// [`StartError::Config`] for a setting that is out of range, [`StartError::System`] if the system does
    /// not provide file descriptors or threads. No shard is left running then.
    pub fn start(config: EngineConfig) -> Result<Self, StartError> {
        Self::start_within(config, |shard| shard())
    }

    /// Like [`start`](Self::start), but each shard's thread calls `around` with a function that runs the shard
    /// until it ends, so that handlers can rely on what `around` sets up: an entered runtime, a thread-local.
    ///
    /// # Errors
    /// As for `start`.
    pub fn start_within(
        config: EngineConfig,
        around: impl Fn(&mut dyn FnMut()) + Clone + Send + 'static,
    ) -> Result<Self, StartError> {
        let pin = config.pin;
        let (core, parts) = prepare(config, Instant::now(), Instant::now)?;
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
                    let _ = threads.send((index, thread)); // the watchdog runs as long as any shard
                }
                Err(error) => {
                    failure = failure.or(error);
                    owner.core.shutdown.shard_has_ended(index, &ShutdownReport::default());
                }
            }
        }
        let _ = owner.shards.set(ids);
        match failure {
            None => Ok(Self { owner: Arc::new(owner) }),
            Some(error) => Err(error.into()), // dropping `owner` ends the threads that were started
        }
    }

    /// Creates an engine without threads: the caller drives the shards turn by turn and supplies the time.
    /// For tests, and for embedding the engine into another event loop.
    ///
    /// Outside of turns the time is the system's: in [`shutdown`](Self::shutdown),
    /// [`count_upgrade`](Self::count_upgrade) and [`Namespace::now`]. See [`driven_by`](Self::driven_by).
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn driven(config: EngineConfig, now: Instant) -> Result<(Self, Vec<Shard>), StartError> {
        Self::drive(config, now, Instant::now)
    }

    /// Like [`driven`](Self::driven), with a clock of the caller's own for the time outside of turns. It is
    /// read from any thread, and must not go back.
    ///
    /// # Errors
    /// As for [`start`](Self::start).
    pub fn driven_by(config: EngineConfig, clock: fn() -> Instant) -> Result<(Self, Vec<Shard>), StartError> {
        Self::drive(config, clock(), clock)
    }

    fn drive(
        config: EngineConfig,
        now: Instant,
        clock: fn() -> Instant,
    ) -> Result<(Self, Vec<Shard>), StartError> {
        let (core, parts) = prepare(config, now, clock)?;
        let owner = Owner { core, watchdog: None, shards: OnceLock::new() };
        let shards = parts.into_iter().map(|parts| Shard::new(parts, now)).collect();
        Ok((Self { owner: Arc::new(owner) }, shards))
    }

    /// Creates a namespace: a set of connections that can be addressed together. It does not keep the engine
    /// alive. Its log lines name it `unnamed`.
    pub fn namespace(&self) -> Namespace {
        self.namespace_named("unnamed")
    }

    /// Like [`namespace`](Self::namespace), with a name for log lines. Names need not be unique.
    pub fn namespace_named(&self, name: &str) -> Namespace {
        Namespace::new(self.owner.core.clone(), name)
    }

    /// Checks a connection's settings, also against the engine's own: `max_message_bytes` must not exceed
    /// [`unfinished_bytes_max`](EngineConfig::unfinished_bytes_max).
    ///
    /// # Errors
    /// [`ConfigError`] for the first field that is out of range.
    pub fn check(&self, config: &ConnectionConfig) -> Result<(), ConfigError> {
        self.owner.core.config.validate_with(config)
    }

    /// Registers an encoding: connections can be adopted with it from now on, and `render` makes their frames
    /// from published payloads.
    ///
    /// Publishers call `render` once for each publication to several connections while a connection of the
    /// namespace uses the encoding; shards call it for publications that have no rendition yet. It must be
    /// quick, and its frame must not be longer than [`Frame::BYTES_MAX`](crate::Frame::BYTES_MAX). If it
    /// panics, the connections that should have received the frame are closed (1011).
    ///
    /// # Errors
    /// [`TooManyEncodings`] if 8 encodings are registered, [`Encoding::PLAIN`] included.
    pub fn register_encoding(
        &self,
        render: impl Fn(&Payload) -> Frame + Send + Sync + 'static,
    ) -> Result<Encoding, TooManyEncodings> {
        self.owner.core.encodings.register(Box::new(render))
    }

    /// Takes a permit for one more connection. None if `max_connections` connections are open, or
    /// `max_connections_per_address` from this address, or if the engine is shutting down. Call it before the
    /// handshake is answered.
    pub fn admit(&self, address: Option<IpAddr>) -> Option<ConnectionPermit> {
        if self.owner.core.shutdown.is_asked() { None } else { self.owner.core.admission.admit(address) }
    }

    /// Counts an upgrade from this address, if [`max_upgrades_per_address`](EngineConfig::max_upgrades_per_address) is
    /// set. Call it before [`admit`](Self::admit), for a client whose address is known.
    ///
    /// # Errors
    /// [`TooManyUpgrades`] if the address is above the rate. The upgrade is not counted then.
    pub fn count_upgrade(&self, address: IpAddr) -> Result<(), TooManyUpgrades> {
        self.owner.core.admission.count_upgrade(address, self.owner.core.now())
    }

    /// Shuts the engine down gracefully: admits no more connections, reads no more messages, lets handlers
    /// finish, writes out everything that was published, closes the connections, ends the threads, and
    /// reports the result. A further call waits for the same shutdown.
    ///
    /// It completes within the given time, whatever a handler does. A shard that a handler blocks until then
    /// counts as stuck 200 ms later, and no shard is waited for longer than one second beyond the given time.
    /// A stuck shard is logged as an error and abandoned ([`ShutdownReport::stuck`]). Where the caller drives
    /// the shards, the shutdown completes when all of them have been dropped.
    ///
    /// # Errors
    /// [`InvalidCloseCode`] for a close code that may not be sent; the engine keeps running then.
    pub async fn shutdown(&self, shutdown: Shutdown) -> Result<ShutdownReport, InvalidCloseCode> {
        if !shutdown.code.is_valid_on_wire() {
            return Err(InvalidCloseCode(shutdown.code));
        }
        let core = &self.owner.core;
        core.shut_down(shutdown, core.now());
        let mut registration = Registration::default();
        Ok(poll_fn(|context| core.shutdown.poll(&mut registration, context.waker())).await)
    }

    /// Waits until the engine has ended, for any reason: [`EngineState::Ended`] or [`EngineState::Failed`].
    /// Neither ends the engine nor keeps it alive.
    pub fn ended(&self) -> impl Future<Output = EngineState> + Send + use<> {
        let core = self.owner.core.clone();
        async move {
            let mut registration = Registration::default();
            let _ = poll_fn(|context| core.shutdown.poll(&mut registration, context.waker())).await;
            core.shutdown.state()
        }
    }

    /// The engine's current state. It never goes back to an earlier one.
    pub fn state(&self) -> EngineState {
        self.owner.core.shutdown.state()
    }

    /// Whether the engine is ending or has ended, for any reason: it admits no more connections.
    pub fn is_stopping(&self) -> bool {
        self.owner.core.shutdown.is_asked()
    }

    /// The number of connections, including those that their shard has not adopted yet.
    pub fn connection_count(&self) -> usize {
        self.owner.core.admission.taken()
    }

    /// The number of shards.
    pub fn shard_count(&self) -> usize {
        self.owner.core.mailboxes.len()
    }

    /// The counters of each shard as of its last turn, but [`lag_micros`](Metrics::lag_micros) and
    /// [`blocked`](Metrics::blocked) as of now, even while a shard is blocked.
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

    /// The sum of all shards' counters.
    pub fn metrics(&self) -> Metrics {
        self.shard_metrics().into_iter().fold(Metrics::default(), |mut sum, metrics| {
            sum += metrics;
            sum
        })
    }
}

/// The state that an engine's threads share, and the parts from which each shard is made.
fn prepare(
    config: EngineConfig,
    now: Instant,
    clock: fn() -> Instant,
) -> Result<(Arc<EngineCore>, Vec<Parts>), StartError> {
    config.validate()?;
    let count = match config.shards {
        Some(count) => count,
        None => thread::available_parallelism().map_or(1, usize::from),
    };
    let (log, readers) = Log::new(config.log_capacity, count, config.publishers_waiting_max);
    let polls = (0..count).map(|_| Poll::new()).collect::<Result<Vec<_>, _>>()?;
    let mailboxes = polls.iter().map(|poll| {
        let poll_waker = Waker::new(poll.registry(), WAKE_TOKEN)?;
        Ok(Mailbox::new(config.mailbox_capacity, config.publishers_waiting_max, poll_waker))
    });
    let mailboxes = mailboxes.collect::<Result<Box<[_]>, std::io::Error>>()?;
    let core = Arc::new(EngineCore::new(config, log, mailboxes, Beacons::new(count, now), clock));
    let parts = polls.into_iter().zip(readers).enumerate();
    let parts = parts.map(|(index, (poll, reader))| Parts { index, core: core.clone(), poll, reader });
    let parts = parts.collect();
    Ok((core, parts))
}

/// For the random histories in `tests/`.
#[cfg(feature = "audit")]
#[allow(missing_docs)]
impl Engine {
    /// Grows by one with each publication or command that is accepted, as long as no shard takes a turn.
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
        self.core.stop(STOP_GRACE, self.core.now());
        let Some(watchdog) = self.watchdog.take() else { return };
        // The last handle may be dropped by a handler, on a shard, or by a task that the watchdog wakes. A
        // thread cannot join itself; the threads end on their own.
        let this = thread::current().id();
        let is_own = watchdog.thread().id() == this;
        if !is_own && !self.shards.get().is_some_and(|shards| shards.contains(&this)) {
            let _ = watchdog.join(); // it waits for a stuck shard at most one second
        }
    }
}
