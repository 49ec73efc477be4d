//! The driver: gives the shards of an engine in memory their turns, on the test's own thread.
//!
//! One task for each engine, on the runtime of the test, which must be a current-thread one: shards do not leave their
//! thread, so they are kept in it by a thread-local map, and the task finds them there by a key. The engine's clock is
//! tokio's, which is paused.
//!
//! *Rest*: the driver gives turns, and yields to the runtime after each, until several in a row have changed nothing.
//! Each yield runs every task that is ready and asks the kernel for events, so all that can happen without time has
//! happened then. *Time*: tokio moves a paused clock to the next timer whenever its thread would sleep, in some versions
//! even if an event has just arrived. So the thread must not sleep while there is something to do: the driver spins until
//! rest, and then naps on a blocking thread, which keeps the clock where it is. Only when time is to pass the driver waits
//! for the next timer of its shards, which lets the thread sleep and the clock move, and rests again after each timer and
//! each event.
//! Knows shards and tokio's clock. Does not know clients or hubs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::{pending, poll_fn};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::task::Poll;
use std::time::Duration;

use shardcast_engine::{EngineConfig, EngineState, Shard, StartError};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle, spawn_blocking, yield_now};
use tokio::time::{Instant, sleep_until};

use crate::engine::Engine;

/// Turns in a row that have changed nothing, after which all is at rest.
const QUIET_TURNS: u32 = 8;
/// Turns after which a server that is still busy is considered to be busy for ever.
const TURNS_MAX: u32 = 2_000_000;
/// How often a driver at rest looks whether another thread, or the test itself, has published something.
const NAP: Duration = Duration::from_millis(1);
/// The grain of tokio's clock.
const TICK: Duration = Duration::from_millis(1);
/// Naps in a row after which the test is considered to wait for a timer of its own.
const NAPS_MAX: u32 = 250;

thread_local! {
    /// The shards of this thread's engines.
    static SHARDS: RefCell<HashMap<usize, Vec<Shard>>> = RefCell::default();
}

/// A handle to the task that gives the turns. The task ends with the [`Driving`].
#[derive(Debug, Clone)]
pub(super) struct Driver {
    signals: Arc<Signals>,
    requests: mpsc::UnboundedSender<Request>,
}

/// Ends the task when it is dropped.
#[derive(Debug)]
pub(super) struct Driving(AbortHandle);

impl Drop for Driving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug, Default)]
struct Signals {
    /// Something was sent or received.
    kick: Notify,
    /// Grows with each of those.
    activity: AtomicU64,
    /// Waits of the test kit, during which no time passes.
    waits: AtomicUsize,
    /// A nap is over.
    tick: Notify,
}

#[derive(Debug)]
enum Request {
    Rest(oneshot::Sender<()>),
    Time { passes: Duration, done: oneshot::Sender<()> },
}

/// A wait of the test kit, until this is dropped.
#[derive(Debug)]
pub(super) struct Wait<'a>(&'a Signals);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.waits.fetch_sub(1, Relaxed); // Relaxed, here and below: all of it is on one thread
    }
}

/// Starts an engine without threads, and the task that drives it. Pauses tokio's clock, if asked.
///
/// # Panics
/// Outside of a current-thread runtime.
pub(super) fn start(
    config: EngineConfig,
    pauses_clock: bool,
) -> Result<(Engine, Driver, Driving), StartError> {
    let runtime = Handle::current();
    assert!(
        runtime.runtime_flavor() == RuntimeFlavor::CurrentThread,
        "an engine in memory runs on the test's own thread: use `#[tokio::test]` without a flavor"
    );
    if pauses_clock && !is_paused() {
        tokio::time::pause();
    }
    let (engine, shards) = Engine::driven(config, || Instant::now().into_std())?;
    let (requests, received) = mpsc::unbounded_channel();
    let signals = Arc::<Signals>::default();
    let events = shards.iter().map(events_of).collect::<Result<_, _>>().map_err(StartError::System)?;
    let key = Arc::as_ptr(&signals) as usize;
    SHARDS.with_borrow_mut(|all| all.insert(key, shards));
    let task = Task {
        events,
        signals: signals.clone(),
        shards: Shards { key },
        engine: engine.inner().clone(),
        requests: received,
        nap: None,
    };
    let task = runtime.spawn(tokio::task::unconstrained(task.run()));
    Ok((engine, Driver { signals, requests }, Driving(task.abort_handle())))
}

/// A nap, on a blocking thread.
fn doze() {
    std::thread::park_timeout(NAP);
}

/// The events of a shard's poll, which must be dropped before the shard.
#[allow(deprecated, reason = "what replaces it needs a descriptor with a lifetime, and a newer tokio")]
fn events_of(shard: &Shard) -> std::io::Result<AsyncFd<RawFd>> {
    AsyncFd::with_interest(shard.poll_fd(), Interest::READABLE)
}

/// Whether tokio's clock is paused: then it does not move while the system's does.
fn is_paused() -> bool {
    let (before, system) = (Instant::now(), std::time::Instant::now());
    while std::time::Instant::now() == system {}
    Instant::now() == before
}

impl Driver {
    /// Something was sent or received.
    pub(super) fn kick(&self) {
        self.signals.activity.fetch_add(1, Relaxed);
        self.signals.kick.notify_one();
    }

    /// Returns when all is at rest.
    pub(super) async fn settle(&self) {
        let _waits = self.wait();
        let (done, rest) = oneshot::channel();
        self.ask(Request::Rest(done), rest).await;
    }

    /// Lets time pass, with rest at each timer.
    pub(super) async fn advance(&self, passes: Duration) {
        assert!(is_paused(), "tokio's clock is not paused, so no time can be made to pass");
        let (done, passed) = oneshot::channel();
        self.ask(Request::Time { passes, done }, passed).await;
    }

    async fn ask(&self, request: Request, done: oneshot::Receiver<()>) {
        let is_done = self.requests.send(request).is_ok() && done.await.is_ok();
        assert!(
            is_done,
            "the engine in memory has ended: its server was dropped, or it panicked (see above)"
        );
    }

    /// Begins a wait of the test kit.
    pub(super) fn wait(&self) -> Wait<'_> {
        self.signals.waits.fetch_add(1, Relaxed);
        self.signals.kick.notify_one(); // no time passes any more
        Wait(&self.signals)
    }

    /// Returns when nothing has happened for about a millisecond of the system's clock.
    pub(super) async fn nap(&self) {
        tokio::select! {
            biased;
            () = self.requests.closed() => drop(spawn_blocking(doze).await), // its server was dropped
            () = self.signals.tick.notified() => {}
        }
    }
}

struct Task {
    /// Of each shard's poll. Before the shards, which close them when they are dropped.
    events: Vec<AsyncFd<RawFd>>,
    signals: Arc<Signals>,
    shards: Shards,
    engine: shardcast_engine::Engine,
    requests: mpsc::UnboundedReceiver<Request>,
    /// The nap, on a blocking thread. There is only one at a time, however often it is interrupted.
    nap: Option<JoinHandle<()>>,
}

/// The key of shards on this thread, which are dropped with it.
struct Shards {
    key: usize,
}

impl Shards {
    /// Not within the map, because a hub's method may start another engine.
    fn with<T>(&self, call: impl FnOnce(&mut Vec<Shard>) -> T) -> T {
        let mut shards = SHARDS.with_borrow_mut(|all| all.remove(&self.key)).unwrap_or_default();
        let result = call(&mut shards);
        SHARDS.with_borrow_mut(|all| all.insert(self.key, shards));
        result
    }
}

impl Drop for Shards {
    fn drop(&mut self) {
        // Elsewhere than on their thread they stay until that ends.
        let _ = SHARDS.try_with(|all| all.try_borrow_mut().map(|mut all| all.remove(&self.key)));
    }
}

impl Task {
    async fn run(mut self) {
        let mut naps = 0;
        let mut asked = None;
        loop {
            self.rest().await;
            match asked.take() {
                Some(Request::Rest(done)) => drop(done.send(())), // nobody may wait for it any more
                Some(Request::Time { passes, done }) => {
                    self.pass(passes).await;
                    let _ = done.send(());
                }
                None => {}
            }
            let nap = self.nap.get_or_insert_with(|| spawn_blocking(doze));
            asked = tokio::select! {
                biased;
                request = self.requests.recv() => request,
                () = self.signals.kick.notified() => None,
                _ = nap => {
                    self.nap = None;
                    self.signals.tick.notify_waiters();
                    naps += 1;
                    if naps > NAPS_MAX && self.signals.waits.load(Relaxed) == 0 && is_paused() {
                        // The test waits for something that the test kit does not know: a timer, perhaps.
                        tokio::select! {
                            biased;
                            request = self.requests.recv() => request,
                            () = sleep_once(&self.signals, &self.shards, &self.events, None) => None,
                        }
                    } else {
                        continue;
                    }
                }
            };
            naps = 0;
        }
    }

    /// Gives turns until nothing happens any more.
    async fn rest(&mut self) {
        let (mut quiet, mut before) = (0, None);
        for _ in 0..TURNS_MAX {
            let has_work = self.turn();
            yield_now().await;
            let mut counted = self.engine.metrics();
            (counted.turns, counted.lag_micros) = (0, 0);
            let now = Some((counted, self.signals.activity.load(Relaxed)));
            quiet = if has_work || now != before { 0 } else { quiet + 1 };
            before = now;
            if quiet == QUIET_TURNS {
                return;
            }
        }
        panic!("the engine in memory does not come to rest: two parties answer each other for ever");
    }

    /// One turn of each shard; whether another has something to do. Shards that have stopped are dropped.
    fn turn(&mut self) -> bool {
        let now = Instant::now().into_std();
        let is_stopping = self.engine.state() != EngineState::Running;
        let events = &mut self.events;
        self.shards.with(|shards| {
            for shard in &mut *shards {
                shard.turn(now).expect("the shard's sockets can be polled");
            }
            let has_work = shards.iter().any(Shard::has_work);
            if is_stopping && shards.iter().all(Shard::has_stopped) {
                events.clear();
                shards.clear();
            }
            has_work
        })
    }

    /// Lets time pass; at rest before and afterwards.
    async fn pass(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            sleep_once(&self.signals, &self.shards, &self.events, Some(end)).await;
            self.rest().await;
        }
    }
}

/// Lets the runtime's thread sleep, and thereby the clock move, until a timer of a shard, something happens, or `end`.
async fn sleep_once(signals: &Signals, shards: &Shards, events: &[AsyncFd<RawFd>], end: Option<Instant>) {
    let now = Instant::now();
    let (has_work, due) = shards.with(|shards| {
        // Whatever a task of the application does to a shard wakes the runtime from now on.
        for shard in &*shards {
            shard.doze(now.into_std());
        }
        let due = shards.iter().flat_map(|shard| [shard.next_due(), shard.next_stop_due()]).flatten().min();
        (shards.iter().any(Shard::has_work), due)
    });
    if has_work {
        return;
    }
    let due = due.map(|due| Instant::from_std(due).max(now + TICK));
    let timer = async {
        match due.into_iter().chain(end).min() {
            Some(until) => sleep_until(until).await,
            None => pending().await,
        }
    };
    tokio::select! {
        biased;
        () = timer => {}
        () = signals.kick.notified() => {}
        () = any_readable(events) => {}
    }
}

/// Waits for an event of one of these polls.
async fn any_readable(polls: &[AsyncFd<RawFd>]) {
    poll_fn(|context| {
        let mut readable = Poll::Pending;
        for poll in polls {
            if let Poll::Ready(Ok(mut guard)) = poll.poll_read_ready(context) {
                guard.clear_ready(); // the shard's next turn takes its events
                readable = Poll::Ready(());
            }
        }
        readable
    })
    .await;
}
