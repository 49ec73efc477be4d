//! The engine's threads: on which CPUs they and what they start run, what happens to a shard that a handler
//! blocks, and how an engine reports that it has failed.
//!
//! Real threads and real time, because the tests are about these: each waits for the event that it needs,
//! however long that takes, and none measures how fast it was.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Poll, Wake, Waker};
use std::time::{Duration, Instant};

use shardcast_engine::{
    Address, CloseCode, CloseReason, ConnectionConfig, Context, Engine, EngineConfig, EngineState, Handler,
    InvalidCloseCode, Message, Namespace, Payload, Publication, PublishError, Shutdown, ShutdownReport,
};
use testkit::client::new_connection_with;
use testkit::{RawClient, Received, at_once, block_on};

/// After this time an awaited event counts as missing, however busy the machine is.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Waits for a condition that no event announces.
#[track_caller]
fn eventually(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + TEST_TIMEOUT;
    while !is_so() {
        assert!(Instant::now() < deadline, "the condition never became true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The result of `what` on a thread of its own within the tests' timeout; otherwise a failure, and the thread
/// is abandoned.
#[track_caller]
fn soon<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, over) = channel();
    std::thread::spawn(move || sender.send(what()));
    over.recv_timeout(TEST_TIMEOUT).expect("awaited in vain")
}

/// A gate that blocks every caller until it is opened, once and for all.
#[derive(Default)]
struct Gate {
    /// The shards that are or were blocked.
    held: Mutex<(Vec<usize>, bool)>,
    opened: Condvar,
}

impl Gate {
    fn hold(&self, shard: usize) {
        let mut held = self.held.lock().unwrap();
        held.0.push(shard);
        drop(self.opened.wait_while(held, |held| !held.1).unwrap());
    }

    fn held(&self) -> Vec<usize> {
        self.held.lock().unwrap().0.clone()
    }
}

/// Opens the gate also when a test fails, so that no thread stays blocked.
struct Open(Arc<Gate>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.held.lock().unwrap().1 = true;
        self.0.opened.notify_all();
    }
}

/// Blocks its shard when a message asks for it.
struct Holder(Arc<Gate>);

impl Handler for Holder {
    fn on_message(&mut self, _: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        self.0.hold(context.id().shard());
        Poll::Ready(())
    }
}

fn engine(shards: usize, pin: bool) -> Engine {
    Engine::start(EngineConfig { shards: Some(shards), pin, ..EngineConfig::default() }).unwrap()
}

fn adopt<H: Handler + Send + 'static>(engine: &Engine, namespace: &Namespace, handler: H) -> RawClient {
    let config = Arc::new(ConnectionConfig::default());
    let (new_connection, peer) =
        new_connection_with(engine, &config, 1 << 20, Box::new(|_| Box::new(handler)));
    block_on(namespace.adopt(new_connection)).unwrap();
    peer
}

fn shutdown(within: Duration) -> Shutdown {
    Shutdown { within, close_window: Duration::ZERO, code: CloseCode::GOING_AWAY }
}

/// The values that a callback returns on each shard.
fn on_shards<T: Send + 'static>(
    namespace: &Namespace,
    what: impl Fn() -> T + Send + Sync + 'static,
) -> Vec<T> {
    let (sender, receiver) = channel();
    let tell = move |_| sender.send(what()).unwrap();
    block_on(namespace.collect_metrics(&Address::Everyone, &[], tell)).unwrap();
    receiver.into_iter().collect()
}

#[cfg(target_os = "linux")]
mod cpus {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::{BufRead as _, BufReader};
    use std::process::{Command, Stdio};

    /// The CPUs of a thread or process, as the kernel lists them.
    fn allowed(status: &str) -> String {
        let status = std::fs::read_to_string(status).unwrap();
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
    }

    /// The CPUs of a thread and of a process that are started here.
    fn of_what_is_started() -> [String; 2] {
        let thread = std::thread::spawn(|| allowed("/proc/thread-self/status")).join().unwrap();
        let grep = Command::new("grep").args(["Cpus_allowed_list", "/proc/self/status"]).output().unwrap();
        let process = String::from_utf8(grep.stdout).unwrap();
        [thread, process.split_once(':').unwrap().1.trim().to_owned()]
    }

    /// Starts threads and processes wherever it is called.
    struct Starter(Sender<(&'static str, [String; 2])>);

    impl Starter {
        fn start(&self, place: &'static str) -> Poll<()> {
            self.0.send((place, of_what_is_started())).unwrap();
            Poll::Ready(())
        }
    }

    impl Handler for Starter {
        fn on_open(&mut self, _: &mut Context<'_>) -> Poll<()> {
            self.start("on_open")
        }

        fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
            self.start("on_message")
        }

        fn on_close(&mut self, _: &CloseReason, _: &mut Context<'_>) -> Poll<()> {
            self.start("on_close")
        }
    }

    impl Drop for Starter {
        fn drop(&mut self) {
            let _ = self.start("drop");
        }
    }

    /// The CPU to which the engine's one shard is bound while it sleeps. A shard that was bound a moment ago
    /// need not be bound for its next sleep, so it is woken now and then.
    fn cpu_of(namespace: &Namespace) -> usize {
        let status = format!("/proc/self/task/{}/status", threads(namespace)[0]);
        let cpu = std::cell::Cell::new(None);
        eventually(|| {
            std::thread::sleep(Duration::from_millis(20));
            threads(namespace);
            std::thread::sleep(Duration::from_millis(1));
            cpu.set(allowed(&status).parse().ok());
            cpu.get().is_some()
        });
        cpu.get().unwrap()
    }

    fn threads(namespace: &Namespace) -> Vec<i32> {
        on_shards(namespace, || rustix::thread::gettid().as_raw_nonzero().get())
    }

    #[test]
    fn threads_and_processes_of_a_handler_are_not_bound_to_its_shards_cpu() {
        let engine = engine(1, true);
        let namespace = engine.namespace();
        let ours = allowed("/proc/thread-self/status");
        let (sender, started) = channel();
        let mut peer = adopt(&engine, &namespace, Starter(sender.clone()));
        for _ in 0..20 {
            if ours.parse::<usize>().is_err() {
                cpu_of(&namespace); // it was bound when the message wakes it
            }
            peer.text("start");
            let (_, cpus) = started.iter().find(|(place, _)| *place == "on_message").unwrap();
            assert_eq!(cpus, [ours.clone(), ours.clone()]);
        }
        peer.close(1000);
        let in_callback = sender.clone();
        let tell = move |_| in_callback.send(("survey", of_what_is_started())).unwrap();
        block_on(namespace.collect_metrics(&Address::Everyone, &[], tell)).unwrap();
        drop(sender);
        let mut places = Vec::new();
        for (place, cpus) in started {
            assert_eq!(cpus, [ours.clone(), ours.clone()], "{place}");
            places.push(place);
        }
        places.sort_unstable();
        assert_eq!(places, ["drop", "on_close", "survey"]);
    }

    /// Claim → inode, of all processes; and the number of claims on each CPU.
    fn claims() -> (BTreeMap<String, String>, BTreeMap<usize, usize>) {
        let (mut claims, mut counts) = (BTreeMap::new(), BTreeMap::new());
        for line in std::fs::read_to_string("/proc/net/unix").unwrap().lines() {
            let mut columns = line.split_whitespace().skip(6);
            let (Some(inode), Some(name)) = (columns.next(), columns.next()) else { continue };
            let Some((cpu, _)) = name.strip_prefix("@shardcast/cpu/").and_then(|name| name.split_once('/'))
            else {
                continue;
            };
            *counts.entry(cpu.parse().unwrap()).or_default() += 1;
            claims.insert(name.to_owned(), inode.to_owned());
        }
        (claims, counts)
    }

    const CHILD: &str = "SHARDCAST_TEST_CHILD";

    /// What the tests below start as another process: an engine of one shard, until its standard input is closed.
    #[test]
    #[allow(clippy::print_stdout)] // how it talks to the test
    fn a_child_of_these_tests() {
        if std::env::var_os(CHILD).is_some() {
            let engine = engine(1, true);
            println!("\ncpu {}", cpu_of(&engine.namespace()));
            std::io::stdin().lines().for_each(drop);
        }
    }

    #[test]
    fn engines_in_one_process_and_in_others_take_the_cpus_with_the_fewest_shards() {
        let mine: Vec<usize> = {
            let set = rustix::thread::sched_getaffinity(None).unwrap();
            (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
        };
        if mine.len() < 2 {
            return; // there is nothing to choose, and no shard is bound
        }
        let deadline = Instant::now() + TEST_TIMEOUT;
        // Other tests and programs start and end engines meanwhile; then the test tries once more.
        loop {
            let (before, mut counts) = claims();
            let started: Vec<Engine> = (0..2).map(|_| engine(1, true)).collect();
            let mut cpus: Vec<usize> = started.iter().map(|engine| cpu_of(&engine.namespace())).collect();
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "--nocapture", "cpus::a_child_of_these_tests"])
                .env(CHILD, "1")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let said =
                lines.by_ref().map_while(Result::ok).find_map(|line| line.strip_prefix("cpu ")?.parse().ok());
            cpus.push(said.expect("the child says its CPU"));
            let (mut after, _) = claims();
            drop(child.stdin.take());
            assert!(child.wait().unwrap().success());
            let fresh = after.len() - before.len().min(after.len());
            after.retain(|name, inode| before.get(name) == Some(inode));
            if fresh == 3 && after == before {
                for cpu in &cpus {
                    let count = |cpu: &usize| counts.get(cpu).copied().unwrap_or(0);
                    let fewest = mine.iter().map(count).min().unwrap();
                    assert_eq!(count(cpu), fewest, "{cpus:?} after {before:?}");
                    *counts.entry(*cpu).or_default() += 1;
                }
                return;
            }
            assert!(Instant::now() < deadline, "other programs begin and end engines all the time");
        }
    }
}

/// An engine of two shards with a connection on each, one of which is blocked until `open` is dropped.
struct HeldUp {
    open: Open,
    engine: Engine,
    namespace: Namespace,
    shard: usize,
    held: RawClient,
    other: RawClient,
}

const NAME: &str = "the blocked namespace";

fn held_up() -> HeldUp {
    let gate = Arc::new(Gate::default());
    let open = Open(gate.clone());
    let engine = engine(2, false);
    let namespace = engine.namespace_named(NAME);
    let [mut held, other] = [0, 1].map(|_| adopt(&engine, &namespace, Holder(gate.clone())));
    eventually(|| engine.metrics().connections == 2);
    held.text("hold");
    eventually(|| gate.held().len() == 1);
    let shard = gate.held()[0];
    HeldUp { open, engine, namespace, shard, held, other }
}

fn hears_1001_and_the_end(mut peer: RawClient) {
    soon(move || {
        let received: Vec<Received> = std::iter::from_fn(|| {
            let received = peer.wait();
            if received == Received::Close(Some(1001)) {
                let _ = peer.stream.write_all(&testkit::frames::client_frame(0x88, &1001_u16.to_be_bytes())); // it may be late
            }
            Some(received)
        })
        .take_while(|received| *received != Received::End)
        .filter(|received| matches!(received, Received::Close(_)))
        .collect();
        assert_eq!(received, [Received::Close(Some(1001))]);
    });
}

#[test]
fn a_shutdown_keeps_its_time_while_a_handler_blocks_a_shard_and_reports_which() {
    let HeldUp { engine, shard, held, other, open, .. } = held_up();
    let within = Duration::from_millis(400);
    let began = Instant::now();
    let (ending, other) = (engine.clone(), std::thread::spawn(move || hears_1001_and_the_end(other)));
    let report = soon(move || block_on(ending.shutdown(shutdown(within)))).unwrap();
    assert!(began.elapsed() >= within, "it had all the time there was");
    assert_eq!((report.flushed, report.cut_off, report.left_over), (1, 1, 0), "{report:?}");
    assert_eq!(report.stuck, [shard]);
    assert_eq!(engine.state(), EngineState::Ended);
    assert_eq!(block_on(engine.ended()), EngineState::Ended);
    other.join().unwrap();
    let again = soon({
        let engine = engine.clone();
        move || block_on(engine.shutdown(shutdown(TEST_TIMEOUT)))
    });
    assert_eq!(again, Ok(report), "it is the same end");
    // When its handler returns, the shard notices the end and releases what it holds.
    drop(open);
    eventually(|| engine.connection_count() == 0);
    drop(held);
}

#[test]
fn publishers_that_wait_for_an_abandoned_shard_learn_that_the_engine_has_ended() {
    let HeldUp { engine, namespace, mut other, open, held, .. } = held_up();
    let receipt = {
        let namespace = namespace.clone();
        std::thread::spawn(move || {
            block_on(namespace.deliver(Publication::message(Address::Everyone, Payload::text("news"))))
        })
    };
    let received = soon(move || (other.wait(), other));
    assert_eq!(received.0, Received::Data("news".into()), "the other shard has dealt with it");
    // As many queries as a mailbox holds, and one that waits for room.
    let (asked, questions) = (Arc::new(AtomicUsize::new(0)), EngineConfig::default().mailbox_capacity);
    let room = {
        let asked = asked.clone();
        std::thread::spawn(move || {
            loop {
                block_on(namespace.collect_metrics(&Address::Everyone, &[], |_| {}))?;
                asked.fetch_add(1, SeqCst);
            }
        })
    };
    eventually(|| asked.load(SeqCst) == questions);
    let ending = engine.clone();
    let report = soon(move || block_on(ending.shutdown(shutdown(Duration::ZERO)))).unwrap();
    assert_eq!(report.stuck.len(), 1);
    assert_eq!(soon(|| receipt.join().unwrap()), Err(PublishError::Closed));
    let refused: Result<(), PublishError> = soon(|| room.join().unwrap());
    assert_eq!(refused, Err(PublishError::Closed));
    drop((open, held, received));
}

#[test]
fn a_dropped_wait_for_the_end_of_an_engine_leaves_no_waker() {
    let config = EngineConfig { shards: Some(1), ..EngineConfig::default() };
    let (engine, _shards) = Engine::driven(config, Instant::now()).unwrap();
    let nobody = Arc::new(Nobody);
    for _ in 0..1000 {
        let waker = Waker::from(nobody.clone());
        let mut ended = std::pin::pin!(engine.ended());
        assert!(ended.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending());
    }
    assert_eq!(Arc::strong_count(&nobody), 1, "no waker is kept");
}

struct Nobody;

impl Wake for Nobody {
    fn wake(self: Arc<Self>) {}
}

#[test]
fn dropping_the_last_handle_waits_for_no_shard_that_a_handler_holds() {
    let HeldUp { engine, namespace: _namespace, held, other, open, .. } = held_up();
    let ended = engine.ended();
    soon(move || drop(engine));
    assert_eq!(soon(|| block_on(ended)), EngineState::Ended);
    hears_1001_and_the_end(other);
    drop((open, held));
}

#[test]
fn a_handler_may_drop_the_last_handle_and_its_shard_ends_by_itself() {
    struct Last(Option<Engine>);
    impl Handler for Last {
        fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
            self.0 = None;
            Poll::Ready(())
        }
    }
    let engine = engine(2, false);
    let (namespace, ended) = (engine.namespace(), engine.ended());
    let mut peer = adopt(&engine, &namespace, Last(Some(engine.clone())));
    drop(engine);
    peer.text("drop it");
    hears_1001_and_the_end(peer);
    assert_eq!(soon(|| block_on(ended)), EngineState::Ended);
}

#[test]
fn a_shutdown_with_a_code_that_may_not_be_sent_is_refused_and_changes_nothing() {
    let (engine, _shards) = Engine::driven(EngineConfig::default(), Instant::now()).unwrap();
    for code in [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535].map(CloseCode) {
        let refused = at_once(engine.shutdown(Shutdown { code, ..Shutdown::within(TEST_TIMEOUT) }));
        assert_eq!(refused, Err(InvalidCloseCode(code)));
    }
    assert_eq!(engine.state(), EngineState::Running);
    assert!(engine.admit(None).is_some());
}

#[test]
fn an_engine_that_is_driven_is_over_when_its_shards_are_dropped() {
    let config = EngineConfig { shards: Some(2), ..EngineConfig::default() };
    let (engine, mut shards) = Engine::driven(config, Instant::now()).unwrap();
    let mut ending = testkit::Task::new(engine.shutdown(shutdown(Duration::ZERO)));
    while let Some(shard) = shards.pop() {
        assert_eq!((ending.poll(), engine.state()), (None, EngineState::Stopping));
        drop(shard);
    }
    assert_eq!(ending.poll(), Some(Ok(ShutdownReport::default())));
    assert_eq!(engine.state(), EngineState::Ended);
}

#[test]
fn an_engine_whose_shard_panicked_reports_it_and_ends() {
    let (panic, panics) = channel::<()>();
    let panics = Arc::new(Mutex::new(Some(panics)));
    let config = EngineConfig { shards: Some(2), pin: false, ..EngineConfig::default() };
    // One of the two shards never starts: its thread waits for a signal, and panics.
    let around = move |shard: &mut dyn FnMut()| match panics.lock().unwrap().take() {
        None => shard(),
        Some(panics) => {
            let _ = panics.recv();
            panic!("as it was told");
        }
    };
    let engine = Engine::start_within(config, around).unwrap();
    let ended = engine.ended();
    assert_eq!((engine.state(), engine.is_stopping()), (EngineState::Running, false));
    panic.send(()).unwrap();
    assert_eq!(soon(|| block_on(ended)), EngineState::Failed);
    assert_eq!((engine.state(), engine.is_stopping()), (EngineState::Failed, true));
    assert!(engine.admit(None).is_none());
    let report = soon(move || block_on(engine.shutdown(shutdown(TEST_TIMEOUT))));
    assert_eq!(report, Ok(ShutdownReport::default()));
}

/// Log lines of this process at `WARN` and above, as `field=value` pairs.
struct Lines(Mutex<Sender<String>>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{}={value:?} ", field.name());
            }
        }
        let mut text = Text(format!("{} ", event.metadata().level()));
        event.record(&mut text);
        let _ = self.0.lock().unwrap().send(text.0);
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_handler_that_blocks_its_shard_is_logged_counted_and_visible_in_the_lag_meanwhile() {
    let (sender, lines): (_, Receiver<String>) = channel();
    tracing::subscriber::set_global_default(Lines(Mutex::new(sender))).unwrap();
    let HeldUp { engine, namespace: _namespace, shard, held, other, open } = held_up();
    let of_this = |line: &String| line.contains("shard=") && line.contains("holds its shard");
    let line = soon(move || lines.into_iter().find(of_this).unwrap());
    assert!(line.starts_with("WARN "), "{line}");
    // Other tests block shards of namespaces with the same name, and only the name matters here.
    assert!(line.contains(&format!("namespace={NAME:?}")), "{line}");
    eventually(|| engine.shard_metrics()[shard].blocked == 1);
    eventually(|| engine.shard_metrics()[shard].lag_micros > 500_000);
    assert_eq!(engine.shard_metrics()[1 - shard].blocked, 0);
    drop((open, held, other));
    block_on(engine.shutdown(shutdown(TEST_TIMEOUT))).unwrap();
    assert_eq!(engine.metrics().blocked, 1);
}
