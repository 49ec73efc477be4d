//! Random histories against a model of one order.
//!
//! The engine is driven shard by shard in any sequence, with a clock of the test's own; shards sleep and are woken
//! as their threads would be. All that is done from outside is done on this thread, so what is accepted is in one
//! sequence, and each connection must see exactly its part of it: the model keeps that part for each.
//!
//! `HIST_FROM`, `HIST_COUNT`: which seeds. `HIST_SEED`: this one only, and tell what happens.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use shardcast_engine::{
    Audit, CloseCode, CloseReason, ConnectionConfig, ConnectionId, Context, Engine, EngineConfig, Flow,
    Frame, GroupMetrics, Handler, Message, Namespace, Newcomer, Policy, Receipt, SendError, Shard, Shutdown,
    ShutdownReport, To,
};

const GROUPS: [&str; 3] = ["a", "b", "c"];

// ---- Chance -----------------------------------------------------------------------------------------------------

struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
    fn of<T: Copy>(&mut self, among: &[T]) -> T {
        among[self.below(among.len())]
    }
}

// ---- The model --------------------------------------------------------------------------------------------------

#[derive(Debug, Clone)]
enum Target {
    Everyone,
    Groups(Vec<usize>),
    One(usize),
}

#[derive(Debug, Default)]
struct ModelConn {
    space: usize,
    /// It is among everyone: the engine has taken the adoption, and `on_open` is done.
    has_entered: bool,
    id: Option<ConnectionId>,
    groups: BTreeSet<usize>,
    /// Frames for it, in the order in which they were accepted.
    expected: Vec<u32>,
    /// How many of them were accepted before its end was commanded.
    closed_at: Option<usize>,
    /// The same, where the end may come earlier.
    soft_closed_at: Option<usize>,
    /// Frames may be dropped for it.
    may_drop: bool,
}

#[derive(Debug, Default)]
struct FrameInfo {
    targets: Vec<usize>,
    receipt: Option<Receipt>,
    accepted: bool,
    blocks: Option<bool>,
    /// Who published has been let go.
    has_returned: bool,
}

#[derive(Debug, Default)]
struct Model {
    conns: Vec<ModelConn>,
    frames: Vec<FrameInfo>,
    wrong: Vec<String>,
    trace: bool,
}

impl Model {
    fn targets(&self, space: usize, target: &Target, except: &[usize]) -> Vec<usize> {
        let is_target = |index: usize, conn: &ModelConn| match target {
            Target::Everyone => conn.space == space && conn.has_entered,
            Target::Groups(groups) => {
                conn.space == space && groups.iter().any(|group| conn.groups.contains(group))
            }
            Target::One(one) => *one == index && conn.space == space,
        };
        let all = self.conns.iter().enumerate().filter(|(index, conn)| is_target(*index, conn));
        all.map(|(index, _)| index).filter(|index| !except.contains(index)).collect()
    }
    fn frame_accepted(&mut self, number: u32, space: usize, target: &Target, except: &[usize], drops: bool) {
        let targets = self.targets(space, target, except);
        for index in &targets {
            let conn = &mut self.conns[*index];
            if conn.closed_at.is_none() && conn.soft_closed_at.is_none() {
                conn.expected.push(number);
                conn.may_drop |= drops;
            }
        }
        let info = &mut self.frames[number as usize];
        info.targets = targets;
        info.accepted = true;
    }
    fn close_accepted(&mut self, space: usize, target: &Target, except: &[usize]) {
        for index in self.targets(space, target, except) {
            let conn = &mut self.conns[index];
            let at = conn.expected.len();
            if conn.soft_closed_at.is_none() {
                conn.closed_at.get_or_insert(at);
            }
        }
    }
    fn new_frame(&mut self) -> u32 {
        self.frames.push(FrameInfo::default());
        (self.frames.len() - 1) as u32
    }
}

type Shared<T> = Arc<Mutex<T>>;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

// ---- The handler ------------------------------------------------------------------------------------------------

#[derive(Debug, Default)]
struct Rec {
    messages: Vec<u32>,
    drops: u64,
    ends: Vec<CloseReason>,
    busy: bool,
    waker: Option<Waker>,
    is_gone: bool,
    waits_at_open: bool,
    waits_at_drop: bool,
    waits_at_close: bool,
    wakes_early: bool,
    is_opening: bool,
}

struct Actor {
    tag: usize,
    rec: Shared<Rec>,
    model: Shared<Model>,
    spaces: Vec<Namespace>,
}

impl Actor {
    fn called(&self, what: &str) {
        let rec = lock(&self.rec);
        if rec.busy {
            lock(&self.model).wrong.push(format!("{what} of {} while it is busy", self.tag));
        }
        if !rec.ends.is_empty() {
            lock(&self.model).wrong.push(format!("{what} of {} after on_close", self.tag));
        }
    }
    fn wait(&self, context: &mut Context<'_>) -> Flow {
        let mut rec = lock(&self.rec);
        rec.busy = true;
        let waker = context.waker();
        if rec.wakes_early {
            waker.wake_by_ref(); // before the shard knows that it is busy
        }
        rec.waker = Some(waker);
        Flow::Pending
    }
    fn publish(&self, target: Target, bytes: usize) {
        let mut model = lock(&self.model);
        let space = model.conns[self.tag].space;
        let number = model.new_frame();
        let id = model.conns[self.tag].id.unwrap();
        let to = match &target {
            Target::Everyone => To::Everyone,
            Target::Groups(groups) => To::Group(GROUPS[groups[0]]),
            Target::One(_) => To::Connection(id),
        };
        // The model's lock is not needed by the engine.
        if self.spaces[space].try_publish(to, &[], frame(number, bytes)).is_ok() {
            model.frame_accepted(number, space, &target, &[], false);
        }
    }
}

impl Handler for Actor {
    fn on_open(&mut self, context: &mut Context<'_>) -> Flow {
        self.called("on_open");
        lock(&self.model).conns[self.tag].id = Some(context.id());
        let waits = lock(&self.rec).waits_at_open;
        lock(&self.rec).is_opening = waits;
        if waits { self.wait(context) } else { Flow::Ready }
    }
    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Flow {
        self.called("on_message");
        let number = u32::from_be_bytes(message.payload[..4].try_into().unwrap());
        let action = message.payload[4];
        lock(&self.rec).messages.push(number);
        match action {
            1 => return self.wait(context),
            2 => {
                let mut model = lock(&self.model);
                let conn = &mut model.conns[self.tag];
                let at = conn.expected.len();
                if conn.closed_at.is_none() {
                    conn.soft_closed_at.get_or_insert(at);
                }
                drop(model);
                context.close(CloseReason::Application { code: CloseCode(4001), text: "handler".into() });
            }
            3 => panic!("as it was told"),
            4 => self.publish(Target::Everyone, 40),
            5 => self.publish(Target::One(self.tag), 300),
            6 => self.publish(Target::Groups(vec![0]), 3000),
            7 => {
                self.publish(Target::Everyone, 10);
                return self.wait(context);
            }
            _ => {}
        }
        Flow::Ready
    }
    fn on_drop(&mut self, frames: u32, context: &mut Context<'_>) -> Flow {
        self.called("on_drop");
        lock(&self.rec).drops += u64::from(frames);
        let waits = lock(&self.rec).waits_at_drop;
        if waits { self.wait(context) } else { Flow::Ready }
    }
    fn on_resume(&mut self, context: &mut Context<'_>) -> Flow {
        let mut rec = lock(&self.rec);
        if rec.waker.is_some() {
            let _ = context.waker();
            return Flow::Pending;
        }
        if !rec.busy {
            lock(&self.model).wrong.push(format!("on_resume of {} while it is not busy", self.tag));
        }
        rec.busy = false;
        if std::mem::take(&mut rec.is_opening) {
            lock(&self.model).conns[self.tag].has_entered = true;
        }
        Flow::Ready
    }
    fn on_close(&mut self, reason: &CloseReason, context: &mut Context<'_>) -> Flow {
        self.called("on_close");
        lock(&self.rec).ends.push(reason.clone());
        let waits = lock(&self.rec).waits_at_close;
        if waits { self.wait(context) } else { Flow::Ready }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        lock(&self.rec).is_gone = true;
    }
}

// ---- The peer ---------------------------------------------------------------------------------------------------

#[derive(Debug)]
struct Peer {
    stream: Option<UnixStream>,
    bytes: Vec<u8>,
    heard: Vec<u32>,
    pings: Vec<Vec<u8>>,
    pongs: Vec<u32>,
    closes: Vec<Option<u16>>,
    is_over: bool,
    /// What the kernel has not taken.
    unsent: Vec<u8>,
    /// Messages, all said before the Close.
    said: u32,
    said_in_fragments: Option<u32>,
    has_said_close: bool,
    /// Frames that were expected when it said Close.
    expected_at_close: usize,
    is_faulty: bool,
    pings_said: u32,
    is_broken: bool,
    /// Reads and answers at once, and its handler is never busy.
    is_good: bool,
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        stream.set_nonblocking(true).unwrap();
        Self {
            stream: Some(stream),
            bytes: Vec::new(),
            heard: Vec::new(),
            pings: Vec::new(),
            pongs: Vec::new(),
            closes: Vec::new(),
            is_over: false,
            unsent: Vec::new(),
            said: 0,
            said_in_fragments: None,
            has_said_close: false,
            expected_at_close: 0,
            is_faulty: false,
            pings_said: 0,
            is_broken: false,
            is_good: false,
        }
    }
    fn say(&mut self, first: u8, payload: &[u8]) {
        let mut out = vec![first];
        match payload.len() {
            length @ 0..126 => out.push(0x80 | length as u8),
            length => {
                out.push(0x80 | 126);
                out.extend((length as u16).to_be_bytes());
            }
        }
        let mask = [0x12, 0x34, 0x56, 0x78];
        out.extend(mask);
        out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
        self.unsent.extend(out);
        self.send(usize::MAX);
    }
    fn send(&mut self, max: usize) {
        let Some(stream) = &mut self.stream else { return self.unsent.clear() };
        while !self.unsent.is_empty() {
            let end = self.unsent.len().min(max);
            match stream.write(&self.unsent[..end]) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.is_broken = true;
                    return self.unsent.clear();
                }
            }
            if max < usize::MAX {
                return;
            }
        }
    }
    /// Takes at most `max` bytes from the kernel.
    fn read(&mut self, max: usize) {
        let Some(stream) = &mut self.stream else { return };
        let mut buffer = vec![0; max.min(1 << 16)];
        let mut left = max;
        while left > 0 {
            let end = left.min(buffer.len());
            match stream.read(&mut buffer[..end]) {
                Ok(0) => {
                    self.is_over = true;
                    break;
                }
                Ok(count) => {
                    self.bytes.extend_from_slice(&buffer[..count]);
                    left -= count;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.is_over = true;
                    break;
                }
            }
        }
        let mut at = 0;
        while let Some((first, payload, end)) = parse(&self.bytes, at) {
            match first {
                0x82 => {
                    assert!(self.closes.is_empty(), "data after Close");
                    let number = u32::from_be_bytes(payload[..4].try_into().unwrap());
                    assert!(
                        payload[4..].iter().all(|byte| *byte == number as u8),
                        "a frame's bytes are mixed up"
                    );
                    self.heard.push(number);
                }
                0x88 => {
                    let code = payload.get(..2).map(|code| u16::from_be_bytes([code[0], code[1]]));
                    self.closes.push(code);
                }
                0x89 => self.pings.push(payload.to_vec()),
                0x8A => self.pongs.push(u32::from_be_bytes(payload[..4].try_into().unwrap())),
                other => panic!("first byte {other:x}"),
            }
            at = end;
        }
        self.bytes.drain(..at);
    }
    fn answer_pings(&mut self) {
        for ping in std::mem::take(&mut self.pings) {
            if !self.has_said_close {
                self.say(0x8A, &ping);
            }
        }
    }
}

fn parse(bytes: &[u8], at: usize) -> Option<(u8, &[u8], usize)> {
    let bytes_left = &bytes[at..];
    let (first, second) = (*bytes_left.first()?, *bytes_left.get(1)?);
    let (start, length) = match second {
        126 => (4, u16::from_be_bytes(bytes_left.get(2..4)?.try_into().unwrap()) as usize),
        127 => (10, u64::from_be_bytes(bytes_left.get(2..10)?.try_into().unwrap()) as usize),
        length => (2, length as usize),
    };
    assert!(length < 1 << 20, "a length that nobody sends");
    Some((first, bytes_left.get(start..start + length)?, at + start + length))
}

fn frame(number: u32, bytes: usize) -> Frame {
    let mut payload = number.to_be_bytes().to_vec();
    payload.resize(4 + bytes, number as u8);
    Frame::binary(&payload)
}

// ---- Publishers -------------------------------------------------------------------------------------------------

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

#[derive(Debug)]
enum Outcome {
    Done(Result<(), SendError>),
    Receipt(Result<Receipt, SendError>),
    Adopted(bool),
    Report(ShutdownReport),
}

#[derive(Debug, Clone)]
enum Effect {
    Frame { number: u32, space: usize, target: Target, except: Vec<usize>, drops: bool, awaited: bool },
    Join { conn: usize, group: usize },
    Leave { conn: usize, group: usize },
    Close { space: usize, target: Target, except: Vec<usize> },
    Adopt { conn: usize },
    Nothing,
    Shutdown,
}

struct Job {
    future: Pin<Box<dyn Future<Output = Outcome>>>,
    woken: Arc<Flag>,
    effect: Effect,
    accepted: bool,
    has_waited: bool,
}

// ---- The world --------------------------------------------------------------------------------------------------

struct World {
    chance: Chance,
    engine: Option<Engine>,
    shards: Vec<Option<Shard>>,
    /// None: it runs. Some(due): it sleeps, until then at the latest.
    asleep: Vec<Option<Option<Instant>>>,
    spaces: Vec<Namespace>,
    model: Shared<Model>,
    peers: Vec<Peer>,
    recs: Vec<Shared<Rec>>,
    configs: Vec<Arc<ConnectionConfig>>,
    jobs: Vec<Job>,
    now: Instant,
    start: Instant,
    engine_config: EngineConfig,
    send_buffer: usize,
    report: Option<ShutdownReport>,
    stopping: bool,
    hurried_stop: bool,
    /// Connections that must have ended, because a target that contains them was found empty.
    presumed_dead: Vec<(usize, String)>,
    surveys: Vec<(Shared<Vec<GroupMetrics>>, usize)>,
    in_flight_adoptions: usize,
    trace: bool,
    cancelled: bool,
}

macro_rules! tell {
    ($world:expr, $($arg:tt)*) => { if $world.trace { println!("  {}", format!($($arg)*)); } };
}

impl World {
    fn new(seed: u64, trace: bool) -> Self {
        let mut chance = Chance(seed.wrapping_mul(0x1234_5678_9ABC_DEF1) ^ 0x5555);
        let shards = 1 + chance.below(4);
        let tight = chance.one_in(2);
        let engine_config = EngineConfig {
            shards: Some(shards),
            pin: false,
            log_capacity: if tight { chance.of(&[2, 2, 4, 8]) } else { chance.of(&[16, 64, 4096]) },
            mailbox_capacity: if tight { chance.of(&[1, 2, 4, 64]) } else { chance.of(&[64, 4096]) },
            publishers_waiting_max: 65_536,
            coalesce: chance.of(&[Duration::ZERO, Duration::ZERO, Duration::ZERO, Duration::from_millis(3)]),
            read_buffer_bytes: chance.of(&[1024, 1024, 4096]),
            backlog_bytes_max: chance.of(&[1 << 20, 1 << 30, 1 << 30]),
            unfinished_bytes_max: chance.of(&[1 << 20, 1 << 30, 1 << 30]),
            blocked_after: None,
            max_connections_per_address: None,
            max_connections: chance.of(&[4, 1 << 20, 1 << 20]),
        };
        let now = Instant::now();
        let (engine, shards) = Engine::driven(engine_config.clone(), now).unwrap();
        let spaces = vec![engine.namespace(), engine.namespace()];
        let count = shards.len();
        let model = Arc::new(Mutex::new(Model { trace, ..Model::default() }));
        if trace {
            println!("{engine_config:?}");
        }
        Self {
            chance,
            engine: Some(engine),
            shards: shards.into_iter().map(Some).collect(),
            asleep: vec![None; count],
            spaces,
            model,
            peers: Vec::new(),
            recs: Vec::new(),
            configs: Vec::new(),
            jobs: Vec::new(),
            now,
            start: now,
            engine_config,
            send_buffer: 0,
            report: None,
            stopping: false,
            hurried_stop: false,
            presumed_dead: Vec::new(),
            surveys: Vec::new(),
            in_flight_adoptions: 0,
            trace,
            cancelled: false,
        }
    }

    fn wrong(&self, text: String) {
        lock(&self.model).wrong.push(text);
    }

    fn policy(&mut self) -> Policy {
        let ms = Duration::from_millis;
        match self.chance.below(8) {
            0..=2 => Policy::Block,
            3 => Policy::DropMessage { timeout: Duration::ZERO },
            4 => Policy::DropMessage { timeout: ms(self.chance.of(&[1, 10, 40])) },
            5 => Policy::DropConnection {
                timeout: ms(self.chance.of(&[0, 5, 30])),
                max_drops: self.chance.of(&[1, 3, 10]),
            },
            6 => Policy::DropOnHighRtt {
                max_rtt: ms(self.chance.of(&[5, 15])),
                rtt_samples: self.chance.of(&[1, 3]),
            },
            _ => Policy::DropMessage { timeout: ms(1000) },
        }
    }

    fn may_drop(policy: &Policy) -> bool {
        matches!(policy, Policy::DropMessage { .. } | Policy::DropConnection { .. })
    }

    // ---- Operations ----

    fn adopt(&mut self) {
        let engine = self.engine.clone().unwrap();
        let Some(place) = engine.admit(None) else { return };
        let ms = Duration::from_millis;
        let calm = self.chance.one_in(2);
        let policy = self.policy();
        let c = &mut self.chance;
        let config = ConnectionConfig {
            outbox_frames: c.of(&[1, 2, 4, 16, 64, 1024]),
            outbox_bytes: c.of(&[1024, 4096, 30_000, 1 << 20]),
            waiting_frames: c.of(&[0, 1, 4, 64, 65_536, 65_536]),
            waiting_bytes: c.of(&[0, 5000, 60_000, 16 << 20, 16 << 20]),
            policy,
            max_message_bytes: c.of(&[200, 65_536]),
            max_fragments: c.of(&[3, 1024]),
            control_frames_per_second: if calm { 1000 } else { c.of(&[5, 200]) },
            heartbeat_interval: if calm { ms(15_000) } else { c.of(&[ms(20), ms(100)]) },
            pong_timeout: if calm { ms(10_000) } else { c.of(&[ms(15), ms(80), ms(300)]) },
            idle_timeout: if calm { None } else { c.of(&[None, Some(ms(60)), Some(ms(400))]) },
            max_connection_duration: if calm { None } else { c.of(&[None, None, Some(ms(250))]) },
            message_timeout: if calm { None } else { c.of(&[None, None, Some(ms(90))]) },
            stall_timeout: c.of(&[None, Some(ms(10_000)), Some(ms(50))]),
            max_groups: c.of(&[1, 10_000, 10_000, 10_000, 10_000]),
            close_timeout: c.of(&[ms(10), ms(60), ms(5000)]),
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.send_buffer = self.chance.of(&[4096, 4096, 16_384, 65_536]);
        socket2::SockRef::from(&ours).set_send_buffer_size(self.send_buffer).unwrap();
        socket2::SockRef::from(&theirs).set_send_buffer_size(self.chance.of(&[4096, 200_000])).unwrap();
        let tag = self.peers.len();
        let space = usize::from(self.chance.one_in(5));
        let is_good = self.chance.one_in(3);
        let rec = Arc::new(Mutex::new(Rec {
            waits_at_open: self.chance.one_in(8),
            waits_at_drop: self.chance.one_in(6),
            waits_at_close: self.chance.one_in(6),
            wakes_early: self.chance.one_in(4),
            ..Rec::default()
        }));
        let may_drop = Self::may_drop(&policy);
        lock(&self.model).conns.push(ModelConn { space, may_drop, ..ModelConn::default() });
        let (model, spaces, record) = (self.model.clone(), self.spaces.clone(), rec.clone());
        let mut peer = Peer::new(theirs);
        peer.is_good = is_good;
        let mut received = Vec::new();
        if self.chance.one_in(4) {
            // The first message comes together with the handshake.
            received = vec![0x82, 0x85, 0, 0, 0, 0];
            received.extend(0u32.to_be_bytes());
            received.push(0);
            peer.said = 1;
        }
        tell!(self, "adopt {tag} in {space}: {config:?} send buffer {}", self.send_buffer);
        let config = Arc::new(config);
        self.peers.push(peer);
        self.recs.push(rec);
        self.configs.push(config.clone());
        let newcomer = Newcomer {
            socket: ours.into(),
            received: Bytes::from(received),
            handler: Box::new(move |_| Box::new(Actor { tag, rec: record, model, spaces })),
            config,
            place,
        };
        let namespace = self.spaces[space].clone();
        self.in_flight_adoptions += 1;
        self.job(Effect::Adopt { conn: tag }, async move {
            Outcome::Adopted(namespace.adopt(newcomer).await.is_ok())
        });
    }

    fn job(&mut self, effect: Effect, future: impl Future<Output = Outcome> + 'static) {
        let woken = Arc::new(Flag(AtomicBool::new(true)));
        self.jobs.push(Job { future: Box::pin(future), woken, effect, accepted: false, has_waited: false });
        self.poll(self.jobs.len() - 1);
    }

    /// Polls a job if it was woken; true if it is over (and has been removed).
    fn poll(&mut self, index: usize) -> bool {
        if !self.jobs[index].woken.0.swap(false, SeqCst) {
            return false;
        }
        let before = self.engine.as_ref().map(Engine::audit_accepted);
        let job = &mut self.jobs[index];
        let waker = Waker::from(job.woken.clone());
        let polled = job.future.as_mut().poll(&mut TaskContext::from_waker(&waker));
        let after = self.engine.as_ref().map(Engine::audit_accepted);
        if before < after && !job.accepted {
            job.accepted = true;
            let effect = job.effect.clone();
            self.accepted(&effect);
        }
        let job = &mut self.jobs[index];
        job.has_waited = true;
        let Poll::Ready(outcome) = polled else { return false };
        let job = self.jobs.swap_remove(index);
        self.over(&job, outcome);
        true
    }

    fn accepted(&mut self, effect: &Effect) {
        let mut model = lock(&self.model);
        match effect {
            Effect::Frame { number, space, target, except, drops, .. } => {
                model.frame_accepted(*number, *space, target, except, *drops);
            }
            Effect::Join { conn, group } => {
                let max = self.configs[*conn].max_groups;
                let conn = &mut model.conns[*conn];
                conn.groups.insert(*group);
                if conn.groups.len() > max && conn.closed_at.is_none() {
                    conn.soft_closed_at.get_or_insert(conn.expected.len());
                }
            }
            Effect::Leave { conn, group } => drop(model.conns[*conn].groups.remove(group)),
            Effect::Close { space, target, except } => model.close_accepted(*space, target, except),
            Effect::Adopt { conn } => {
                model.conns[*conn].has_entered = !lock(&self.recs[*conn]).waits_at_open;
            }
            Effect::Nothing | Effect::Shutdown => {}
        }
        drop(model);
        tell!(self, "accepted: {effect:?}");
    }

    fn over(&mut self, job: &Job, outcome: Outcome) {
        tell!(self, "over: {:?} {outcome:?}", job.effect);
        let is_closed = self.engine.as_ref().is_none_or(Engine::audit_is_closed);
        match (&job.effect, outcome) {
            (_, Outcome::Done(Err(SendError::Closed)) | Outcome::Receipt(Err(SendError::Closed))) => {
                if !is_closed && self.shards.iter().all(Option::is_some) {
                    self.wrong(format!("{:?} is told Closed while the engine is not", job.effect));
                }
            }
            (_, Outcome::Done(Err(error)) | Outcome::Receipt(Err(error))) => {
                self.wrong(format!("{:?}: {error}", job.effect));
            }
            (Effect::Adopt { .. }, Outcome::Adopted(adopted)) => {
                self.in_flight_adoptions -= 1;
                if !adopted && !is_closed && self.shards.iter().all(Option::is_some) {
                    self.wrong("an adoption was refused".into());
                }
            }
            (Effect::Shutdown, Outcome::Report(report)) => self.report = Some(report),
            (Effect::Frame { number, space, target, except, .. }, outcome) => {
                if !job.accepted {
                    // Nobody was there.
                    let targets = lock(&self.model).targets(*space, target, except);
                    for conn in targets {
                        self.presumed_dead.push((conn, format!("{:?} found nobody", job.effect)));
                    }
                }
                if matches!(outcome, Outcome::Done(Ok(()))) && job.accepted {
                    lock(&self.model).frames[*number as usize].has_returned = true;
                    tell!(self, "returned {number}");
                    let audits: Vec<_> = self.shards.iter().flatten().map(Shard::audit).collect();
                    audits.iter().for_each(|audit| self.check_early(audit, true));
                }
                if let Outcome::Receipt(Ok(receipt)) = outcome {
                    lock(&self.model).frames[*number as usize].receipt = Some(receipt);
                    let lost = receipt.dropped_timeout + receipt.dropped_overflow + receipt.disconnected;
                    if receipt.waited > receipt.targets || lost > receipt.waited {
                        self.wrong(format!("a receipt that does not add up: {receipt:?}"));
                    }
                }
            }
            (Effect::Leave { conn, group }, Outcome::Done(Ok(()))) if !job.accepted => {
                let mut model = lock(&self.model);
                let was = model.conns[*conn].groups.remove(group);
                drop(model);
                if was {
                    self.presumed_dead.push((*conn, format!("{:?} found no group", job.effect)));
                }
            }
            (Effect::Close { space, target, except }, Outcome::Done(Ok(()))) if !job.accepted => {
                let targets = lock(&self.model).targets(*space, target, except);
                for conn in targets {
                    self.presumed_dead.push((conn, format!("{:?} found nobody", job.effect)));
                }
            }
            _ => {}
        }
    }

    fn pick_conn(&mut self) -> Option<usize> {
        if self.peers.is_empty() {
            return None;
        }
        Some(self.chance.below(self.peers.len()))
    }

    fn pick_open(&mut self) -> Option<usize> {
        let conn = self.pick_conn()?;
        lock(&self.model).conns[conn].id.map(|_| conn)
    }

    fn target(&mut self) -> Option<(usize, Target)> {
        Some(match self.chance.below(10) {
            0..=3 => (usize::from(self.chance.one_in(6)), Target::Everyone),
            4 | 5 => (usize::from(self.chance.one_in(6)), Target::Groups(vec![self.chance.below(3)])),
            6 => {
                let groups = (0..1 + self.chance.below(3)).map(|_| self.chance.below(3)).collect();
                (usize::from(self.chance.one_in(6)), Target::Groups(groups))
            }
            _ => {
                let conn = self.pick_open()?;
                let space = lock(&self.model).conns[conn].space;
                (if self.chance.one_in(20) { 1 - space } else { space }, Target::One(conn))
            }
        })
    }

    fn except(&mut self) -> Vec<usize> {
        let count = if self.chance.one_in(3) { 1 + self.chance.below(3) } else { 0 };
        (0..count).filter_map(|_| self.pick_open()).collect()
    }

    fn ids(&self, tags: &[usize]) -> Vec<ConnectionId> {
        let model = lock(&self.model);
        tags.iter().filter_map(|tag| model.conns[*tag].id).collect()
    }

    fn publish(&mut self) {
        let Some((space, target)) = self.target() else { return };
        let except = self.except();
        let ids = self.ids(&except);
        let over = self.chance.one_in(4).then(|| self.policy());
        let number = lock(&self.model).new_frame();
        let bytes = self.chance.of(&[0, 1, 20, 121, 122, 130, 300, 1000, 2000, 9000, 30_000]);
        let how = self.chance.below(3);
        let namespace = match over {
            Some(policy) => self.spaces[space].with_policy(policy).unwrap(),
            None => self.spaces[space].clone(),
        };
        let one = match &target {
            Target::One(conn) => lock(&self.model).conns[*conn].id,
            _ => None,
        };
        let names: Vec<&'static str> = match &target {
            Target::Groups(groups) => groups.iter().map(|group| GROUPS[*group]).collect(),
            _ => Vec::new(),
        };
        let drops = over.as_ref().is_some_and(Self::may_drop);
        let blocks = match (&over, &target) {
            (Some(policy), _) => Some(matches!(policy, Policy::Block)),
            (None, Target::One(_)) => Some(true),
            (None, _) => None,
        };
        lock(&self.model).frames[number as usize].blocks = blocks;
        let frame = frame(number, bytes);
        tell!(
            self,
            "frame {number} of {bytes} to {target:?} in {space} except {except:?} policy {over:?} how {how}"
        );
        let effect = Effect::Frame {
            number,
            space,
            target: target.clone(),
            except: except.clone(),
            drops,
            awaited: how == 2,
        };
        match how {
            0 => {
                let to = to(&target, one, &names);
                let before = self.engine.as_ref().map(Engine::audit_accepted);
                let result = namespace.try_publish(to, &ids, frame);
                let after = self.engine.as_ref().map(Engine::audit_accepted);
                if before < after {
                    assert!(result.is_ok());
                    self.accepted(&effect);
                } else if result.is_ok() {
                    let targets = lock(&self.model).targets(space, &target, &except);
                    for conn in targets {
                        self.presumed_dead.push((conn, format!("{effect:?} found nobody")));
                    }
                }
            }
            1 => self.job(effect, async move {
                Outcome::Done(namespace.publish(to(&target, one, &names), &ids, frame).await)
            }),
            _ => self.job(effect, async move {
                Outcome::Receipt(namespace.send(to(&target, one, &names), &ids, frame).await)
            }),
        }
    }

    fn join_or_leave(&mut self) {
        let Some(conn) = self.pick_open() else { return };
        let group = self.chance.below(3);
        // Two that are on their way at once may come in either order.
        let is_concurrent = self.jobs.iter().any(|job| match &job.effect {
            Effect::Join { conn: c, group: g } | Effect::Leave { conn: c, group: g } => {
                (*c, *g) == (conn, group)
            }
            _ => false,
        });
        if is_concurrent {
            return;
        }
        let (space, id) = {
            let model = lock(&self.model);
            (model.conns[conn].space, model.conns[conn].id.unwrap())
        };
        let namespace = self.spaces[space].clone();
        if self.chance.below(5) < 3 {
            self.job(Effect::Join { conn, group }, async move {
                Outcome::Done(namespace.join(id, GROUPS[group]).await)
            });
        } else {
            self.job(Effect::Leave { conn, group }, async move {
                Outcome::Done(namespace.leave(id, GROUPS[group]).await)
            });
        }
    }

    fn close(&mut self) {
        let Some((space, target)) = self.target() else { return };
        let except = self.except();
        let ids = self.ids(&except);
        let namespace = self.spaces[space].clone();
        let one = match &target {
            Target::One(conn) => lock(&self.model).conns[*conn].id,
            _ => None,
        };
        let names: Vec<&'static str> = match &target {
            Target::Groups(groups) => groups.iter().map(|group| GROUPS[*group]).collect(),
            _ => Vec::new(),
        };
        let effect = Effect::Close { space, target: target.clone(), except };
        self.job(effect, async move {
            Outcome::Done(namespace.close(to(&target, one, &names), &ids, CloseCode(4000), "cmd").await)
        });
    }

    fn survey(&mut self) {
        let space = self.chance.below(2);
        let namespace = self.spaces[space].clone();
        let parts: Shared<Vec<GroupMetrics>> = Shared::default();
        let result = parts.clone();
        let group = self.chance.below(4);
        let one = if self.chance.one_in(3) { self.pick_open() } else { None };
        let one = one.map(|conn| lock(&self.model).conns[conn].id.unwrap());
        self.surveys.push((parts, 0));
        self.job(Effect::Nothing, async move {
            let to = match (one, group) {
                (Some(id), _) => To::Connection(id),
                (None, 3) => To::Everyone,
                (None, group) => To::Group(GROUPS[group]),
            };
            Outcome::Done(namespace.survey(to, &[], move |part| lock(&result).push(part)).await)
        });
    }

    fn shutdown(&mut self) {
        if self.stopping {
            return;
        }
        let engine = self.engine.clone().unwrap();
        self.stopping = true;
        // Its plan counts from the real time, while ours has gone ahead.
        let ahead = self.now - self.start;
        let more = self.chance.of(&[0, 20, 200, 60_000, 60_000]);
        self.hurried_stop = more < 60_000;
        let within = ahead + Duration::from_millis(more);
        let spread = self.chance.of(&[Duration::ZERO, Duration::from_millis(50), within]);
        let code = self.chance.of(&[CloseCode::GOING_AWAY, CloseCode::SERVICE_RESTART]);
        let shutdown = Shutdown { within, spread, code };
        tell!(self, "shutdown {shutdown:?}");
        self.job(Effect::Shutdown, async move {
            Outcome::Report(engine.shutdown(shutdown).await.expect("a code that can be sent"))
        });
    }

    fn peer_acts(&mut self) {
        let Some(conn) = self.pick_conn() else { return };
        let act = self.chance.below(40);
        let bytes = self.chance.of(&[1, 7, 100, 1000, 5000, 40_000]);
        let action =
            if self.chance.one_in(2) { 0 } else { self.chance.of(&[1, 1, 2, 4, 5, 6, 7, 0, 0, 0, 4, 5, 6]) };
        let action = if self.chance.one_in(60) { 3 } else { action };
        let filler = self.chance.of(&[0, 0, 3, 120, 180, 3000]);
        let expected = lock(&self.model).conns[conn].expected.len();
        let max_message = self.configs[conn].max_message_bytes;
        tell!(self, "peer {conn} act {act} bytes {bytes} action {action} filler {filler}");
        let peer = &mut self.peers[conn];
        match act {
            0..=13 => {
                peer.read(bytes);
                if bytes > 100 {
                    peer.answer_pings();
                }
            }
            14..=17 => {
                peer.read(usize::MAX);
                peer.answer_pings();
            }
            18..=26 if !peer.has_said_close && peer.said_in_fragments.is_none() => {
                let number = peer.said;
                peer.said += 1;
                let mut payload = number.to_be_bytes().to_vec();
                payload.push(action);
                payload.resize(5 + filler, 0);
                peer.is_faulty |= payload.len() > max_message;
                peer.say(0x82, &payload);
            }
            27..=29 if !peer.has_said_close => match peer.said_in_fragments.take() {
                None => {
                    peer.said_in_fragments = Some(peer.said);
                    let number = peer.said;
                    peer.say(0x02, &number.to_be_bytes());
                }
                Some(number) => {
                    peer.said = number + 1;
                    peer.say(0x80, &[0]);
                }
            },
            30 | 31 if !peer.has_said_close => {
                let number = peer.pings_said;
                peer.pings_said += 1;
                peer.say(0x89, &number.to_be_bytes());
            }
            32 if !peer.has_said_close && peer.said_in_fragments.is_none() => {
                peer.has_said_close = true;
                peer.expected_at_close = expected;
                peer.say(0x88, if action == 1 { &[] } else { &[0x03, 0xE8] });
            }
            33 if action == 4 => {
                peer.is_faulty = true;
                peer.say(0x83, b"x");
            }
            34 if action == 2 => {
                if let Some(stream) = &peer.stream {
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                    peer.is_broken = true;
                }
            }
            35 if action == 1 => {
                if let Some(stream) = &peer.stream {
                    let _ = stream.shutdown(std::net::Shutdown::Write);
                    peer.is_broken = true;
                }
            }
            36 if action == 7 => {
                peer.stream = None;
                peer.is_broken = true;
                peer.is_over = true;
            }
            37 => peer.send(3),
            _ => peer.send(usize::MAX),
        }
    }

    fn release(&mut self) {
        let Some(conn) = self.pick_conn() else { return };
        self.release_one(conn);
    }

    fn release_one(&mut self, conn: usize) {
        let waker = lock(&self.recs[conn]).waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    // ---- Turns ----

    /// Gives a shard the processor, if its thread would run. True if it took a turn.
    fn turn(&mut self, index: usize) -> bool {
        let Some(shard) = &mut self.shards[index] else { return false };
        if let Some(due) = self.asleep[index] {
            let is_due = due.is_some_and(|due| due <= self.now);
            if !is_due && !is_readable(shard.poll_fd()) {
                return false;
            }
        }
        shard.turn(self.now).unwrap();
        let audit = shard.audit();
        if shard.is_over() {
            tell!(self, "shard {index} is over");
            self.shards[index] = None;
            self.asleep[index] = Some(None);
            return true;
        }
        let bound = shard.doze(self.now);
        self.asleep[index] = match bound {
            Some(Duration::ZERO) => None,
            bound => Some(bound.map(|bound| self.now + bound)),
        };
        self.check_audit(&audit);
        self.check_early(&audit, false);
        true
    }

    /// Nothing waits that is not waited for: frames of those who have been let go are within the bounds.
    fn check_early(&self, audit: &Audit, at_return: bool) {
        let mut model = lock(&self.model);
        let mut wrong = Vec::new();
        for conn in audit.conns.iter().filter(|conn| conn.open && conn.waiting > 0) {
            let Some(tag) = model.conns.iter().position(|known| known.id == Some(conn.id)) else { continue };
            let known = &model.conns[tag];
            if known.may_drop || conn.offered as usize > known.expected.len() {
                continue;
            }
            let waiting = &known.expected[(conn.offered - conn.waiting) as usize..conn.offered as usize];
            for number in waiting {
                let info = &model.frames[*number as usize];
                let own = matches!(self.configs[tag].policy, Policy::Block);
                if info.has_returned && info.blocks.unwrap_or(own) {
                    wrong.push(format!(
                        "early: frame {number} has returned and waits for {tag}, at return {at_return}"
                    ));
                }
            }
        }
        model.wrong.extend(wrong);
    }

    fn check_audit(&self, audit: &Audit) {
        let mut model = lock(&self.model);
        if std::env::var_os("HIST_BLIND").is_none() {
            model.wrong.extend(audit.errors.iter().cloned());
        }
        for conn in &audit.conns {
            let within = conn.queued as usize <= conn.outbox_frames
                && (conn.queued_bytes <= conn.outbox_bytes || conn.queued == 1);
            let waits_within = conn.waiting as usize <= conn.waiting_frames_max
                && (conn.waiting_bytes <= conn.waiting_bytes_max || conn.waiting == 1);
            if !within || !waits_within {
                model.wrong.push(format!("beyond the bounds: {conn:?}"));
            }
        }
    }

    fn check_all(&self) {
        if std::env::var_os("HIST_BLIND").is_some() {
            return; // only what can be seen from outside
        }
        let mut groups: BTreeMap<usize, ([u64; 3], [u64; 3])> = BTreeMap::new();
        for shard in self.shards.iter().flatten() {
            for group in shard.audit().groups {
                let sums = groups.entry(group.ptr).or_default();
                sums.0[0] += group.members;
                sums.0[1] += group.congested;
                sums.0[2] += group.blocking;
                sums.1 = [group.shared_members, group.shared_congested, group.shared_blocking];
            }
        }
        for (local, shared) in groups.values() {
            if local[1..] != shared[1..] || local[0] > shared[0] {
                self.wrong(format!("a group's shards count {local:?} and all together {shared:?}"));
            }
        }
    }

    /// Everybody acts until nothing happens any more.
    fn settle(&mut self, reads: bool, passes: bool) {
        let mut quiet = 0;
        for round in 0..3000 {
            let mut acted = false;
            for index in 0..self.shards.len() {
                let turned = self.turn(index);
                acted |= turned;
                if turned && round > 2990 {
                    let shard = self.shards[index].as_ref();
                    tell!(
                        self,
                        "shard {index} turns at {:?}: {:?} {:?}",
                        self.now - self.start,
                        shard.map(Shard::has_work),
                        self.asleep[index]
                    );
                    tell!(self, "{:?}", shard.map(Shard::audit));
                }
            }
            let mut index = 0;
            while index < self.jobs.len() {
                let is_woken = self.jobs[index].woken.0.load(SeqCst);
                acted |= is_woken;
                if is_woken && round > 2990 {
                    tell!(self, "woken: {:?}", self.jobs[index].effect);
                }
                if !self.poll(index) {
                    index += 1;
                }
            }
            if reads {
                for conn in 0..self.peers.len() {
                    let peer = &mut self.peers[conn];
                    let before = (peer.heard.len(), peer.bytes.len(), peer.unsent.len(), peer.is_over);
                    peer.read(usize::MAX);
                    peer.answer_pings();
                    peer.send(usize::MAX);
                    acted |= before != (peer.heard.len(), peer.bytes.len(), peer.unsent.len(), peer.is_over);
                    let waits = lock(&self.recs[conn]).waker.is_some();
                    acted |= waits;
                    if round > 2990 {
                        let peer = &self.peers[conn];
                        tell!(
                            self,
                            "{conn} {before:?} {:?} {waits} {:?}",
                            (peer.heard.len(), peer.bytes.len(), peer.unsent.len(), peer.is_over),
                            lock(&self.recs[conn])
                        );
                    }
                    self.release_one(conn);
                }
            }
            quiet = if acted { 0 } else { quiet + 1 };
            if quiet == 2 {
                // Frames that are held back to be gathered, and the like.
                let due = self.asleep.iter().filter_map(|asleep| asleep.flatten()).min();
                match due {
                    Some(due) if passes && due <= self.now + Duration::from_millis(4) => {
                        self.now = self.now.max(due);
                        quiet = 0;
                    }
                    _ => return,
                }
            }
            if round == 2999 {
                self.wrong("does not come to rest".into());
            }
        }
    }

    fn step(&mut self) {
        match self.chance.below(100) {
            0..=29 => {
                let index = self.chance.below(self.shards.len());
                self.turn(index);
            }
            30..=36 => (0..self.shards.len()).for_each(|index| drop(self.turn(index))),
            37..=40 if self.peers.len() < 9 => self.adopt(),
            41..=58 => self.publish(),
            59..=65 => self.join_or_leave(),
            66 if self.chance.one_in(3) => self.close(),
            67 => self.survey(),
            68 if !self.jobs.is_empty() && self.chance.one_in(3) => {
                let index = self.chance.below(self.jobs.len());
                if !matches!(self.jobs[index].effect, Effect::Shutdown) {
                    tell!(self, "dropped: {:?}", self.jobs[index].effect);
                    let job = self.jobs.swap_remove(index);
                    if matches!(job.effect, Effect::Adopt { .. }) {
                        self.in_flight_adoptions -= 1;
                    }
                    self.cancelled = true;
                }
            }
            69..=75 => {
                if !self.jobs.is_empty() {
                    let index = self.chance.below(self.jobs.len());
                    self.poll(index);
                }
            }
            76..=90 => self.peer_acts(),
            91..=95 => self.release(),
            96..=98 => {
                let millis = self.chance.of(&[0, 1, 3, 10, 30]);
                self.now += Duration::from_millis(millis);
                tell!(self, "{millis} ms pass: {:?}", self.now - self.start);
            }
            99 if self.chance.one_in(12) => self.shutdown(),
            _ => {}
        }
    }

    /// Good peers take everything and answer, and do not end for want of that.
    fn be_good(&mut self) {
        for conn in 0..self.peers.len() {
            let peer = &mut self.peers[conn];
            if !peer.is_good {
                continue;
            }
            peer.read(usize::MAX);
            // A pong may come between fragments.
            for ping in std::mem::take(&mut peer.pings) {
                if !peer.has_said_close {
                    peer.say(0x8A, &ping);
                }
            }
            peer.send(usize::MAX);
        }
    }

    fn check_reasons(&self) {
        for (tag, rec) in self.recs.iter().enumerate() {
            let (peer, rec, config) = (&self.peers[tag], lock(rec), &self.configs[tag]);
            let Some(reason) = rec.ends.first() else { continue };
            let is_justified = match reason {
                CloseReason::PongTimeout => !peer.is_good || peer.is_broken,
                CloseReason::IdleTimeout => config.idle_timeout.is_some() || config.message_timeout.is_some(),
                CloseReason::MaxDuration => config.max_connection_duration.is_some(),
                CloseReason::Peer { .. } => peer.has_said_close,
                CloseReason::Vanished => peer.is_broken,
                CloseReason::Transport(_) => peer.is_broken,
                CloseReason::Protocol(_) => peer.is_faulty || config.max_fragments < 1024,
                CloseReason::HighRtt => true,
                CloseReason::SlowConsumer => {
                    let is_tight = config.waiting_frames < 65_536 || config.waiting_bytes < 1 << 20;
                    is_tight || (config.stall_timeout.is_some() && !peer.is_good)
                }
                CloseReason::UnfinishedShed => self.engine_config.unfinished_bytes_max == 1 << 20,
                CloseReason::TooManyGroups => config.max_groups == 1,
                CloseReason::Shed => self.engine_config.backlog_bytes_max == 1 << 20,
                CloseReason::ControlFlood => config.control_frames_per_second < 1000,
                _ => true,
            };
            if !is_justified {
                self.wrong(format!("{tag} ended by {reason:?}: {peer:?}"));
            }
        }
    }

    // ---- The end ----

    fn finish(&mut self) {
        self.settle(true, true);
        let reads = |world: &mut Self| world.settle(true, true);
        // What is on its way when the first have gone may make others go.
        for _ in 0..3 {
            reads(self);
        }
        self.check_all();
        // Everybody reads, nobody is busy: nobody has to wait.
        for job in &self.jobs {
            let is_shutdown = matches!(job.effect, Effect::Shutdown);
            if !is_shutdown {
                self.wrong(format!("waits for ever: {:?} accepted {}", job.effect, job.accepted));
            }
        }
        if self.in_flight_adoptions > 0 {
            self.wrong("an adoption does not end".into());
        }
        self.check_reasons();
        self.check_orders();
        self.check_books();
        self.go();
    }

    fn has_ended(&self, conn: usize) -> bool {
        !lock(&self.recs[conn]).ends.is_empty() || lock(&self.recs[conn]).is_gone
    }

    fn check_orders(&mut self) {
        let mut audits = BTreeMap::new();
        for shard in self.shards.iter().flatten() {
            for conn in shard.audit().conns {
                audits.insert(conn.id.to_string(), conn);
            }
        }
        let model = lock(&self.model);
        let mut wrong = Vec::new();
        let is_stopping = self.stopping;
        for (tag, conn) in model.conns.iter().enumerate() {
            let (peer, rec) = (&self.peers[tag], lock(&self.recs[tag]));
            let heard = &peer.heard;
            let expected = &conn.expected;
            // One order, and nothing that is for others, and nothing twice.
            let mut rest = expected.iter();
            if !heard.iter().all(|number| rest.any(|expected| expected == number)) {
                wrong.push(format!("{tag} heard {heard:?}, which is no part of {expected:?}"));
                continue;
            }
            if !conn.may_drop && heard[..] != expected[..heard.len()] {
                wrong.push(format!("{tag} heard {heard:?} and not the beginning of {expected:?}"));
            }
            let is_open = conn.id.is_some() && rec.ends.is_empty() && !is_stopping;
            if is_open && peer.stream.is_some() {
                let Some(audit) = audits.get(&conn.id.unwrap().to_string()) else {
                    wrong.push(format!("{tag} is open and not there"));
                    continue;
                };
                if audit.pending > 0 || audit.discarded > 0 {
                    wrong.push(format!("{tag} is open, and has not got all: {audit:?}"));
                }
                if expected.len() != audit.offered as usize {
                    wrong.push(format!("{tag} was offered {} of {expected:?}", audit.offered));
                }
                if rec.drops != audit.dropped {
                    wrong.push(format!("{tag} was told of {} drops of {}", rec.drops, audit.dropped));
                }
                let lost = heard.len() + audit.dropped as usize;
                if expected.len() != lost {
                    wrong.push(format!(
                        "{tag} heard {} and lost {} of {}: {heard:?} of {expected:?}",
                        heard.len(),
                        audit.dropped,
                        expected.len()
                    ));
                }
                if rec.messages.len() as u32 != peer.said {
                    wrong.push(format!("{tag} said {} and the handler got {:?}", peer.said, rec.messages));
                }
                if peer.has_said_close || peer.is_broken && !peer.is_over || peer.is_faulty {
                    wrong.push(format!("{tag} should have ended: {peer:?}"));
                }
                if conn.closed_at.is_some() || conn.soft_closed_at.is_some() {
                    wrong.push(format!("{tag} was closed and is open"));
                }
                if peer.pongs.last().map_or(0, |last| last + 1) != peer.pings_said && audit.open {
                    wrong.push(format!("{tag} said {} pings and got {:?}", peer.pings_said, peer.pongs));
                }
                if !peer.closes.is_empty() || peer.is_over {
                    wrong.push(format!("{tag} is open and heard its end"));
                }
            }
            if !rec.messages.iter().copied().eq(0..rec.messages.len() as u32) {
                wrong.push(format!("{tag}'s messages were handled as {:?}", rec.messages));
            }
            if !peer.pongs.is_sorted() {
                wrong.push(format!("{tag}'s pongs: {:?}", peer.pongs));
            }
            if peer.closes.len() > 1 {
                wrong.push(format!("{tag} heard {:?}", peer.closes));
            }
            // A Close frame comes behind all that was sent before the end.
            if let (Some(code), Some(reason)) = (peer.closes.first(), rec.ends.first()) {
                let want = reason.close_frame().map(|(code, _)| code.0);
                let is_empty = matches!(reason, CloseReason::Peer { code: None, .. });
                if *code != want && !(is_empty && code.is_none()) {
                    wrong.push(format!("{tag} ended by {reason:?} and heard {code:?}"));
                }
                // Half of the time for the closing handshake is for what is queued; then it is discarded.
                let has_time = self.configs[tag].close_timeout >= Duration::from_secs(5);
                if !conn.may_drop && !self.hurried_stop && has_time {
                    let all = match reason {
                        CloseReason::Application { text, .. } if text == "cmd" => conn.closed_at,
                        CloseReason::Application { text, .. } if text == "handler" => conn.soft_closed_at,
                        CloseReason::Shutdown { .. } => Some(expected.len()),
                        _ => None,
                    };
                    if all.is_some_and(|all| all != heard.len()) {
                        wrong.push(format!(
                            "{tag} ended by {reason:?} heard {heard:?} of {expected:?}: {all:?}"
                        ));
                    }
                    let is_peer = matches!(reason, CloseReason::Peer { .. });
                    if is_peer && heard.len() < peer.expected_at_close {
                        wrong.push(format!(
                            "{tag} closed, heard {heard:?} of {expected:?}: {}",
                            peer.expected_at_close
                        ));
                    }
                }
                let is_peer = matches!(reason, CloseReason::Peer { .. }) && !is_stopping;
                if is_peer && rec.messages.len() as u32 != peer.said {
                    wrong.push(format!(
                        "{tag} said {} before it closed, handled {:?}",
                        peer.said, rec.messages
                    ));
                }
            }
            if rec.ends.len() > 1 {
                wrong.push(format!("{tag} ended as {:?}", rec.ends));
            }
        }
        for (conn, why) in &self.presumed_dead {
            let has_ended = self.has_ended_locked(*conn);
            let is_adopted = model.conns[*conn].id.is_some();
            if !has_ended && is_adopted && !is_stopping {
                wrong.push(format!("{conn} lives, but {why}"));
            }
        }
        // Receipts against what arrived.
        for (number, info) in model.frames.iter().enumerate() {
            let Some(receipt) = info.receipt else { continue };
            if receipt.targets > info.targets.len() as u64 {
                wrong.push(format!("frame {number}: {receipt:?}, targets {:?}", info.targets));
            }
            let all_live = info
                .targets
                .iter()
                .all(|conn| !self.has_ended_locked(*conn) && model.conns[*conn].id.is_some());
            if all_live && !is_stopping {
                let missing =
                    info.targets.iter().filter(|conn| !self.peers[**conn].heard.contains(&(number as u32)));
                let missing = missing.count() as u64;
                if receipt.targets != info.targets.len() as u64
                    || receipt.disconnected != 0
                    || missing != receipt.dropped_timeout + receipt.dropped_overflow
                {
                    wrong.push(format!(
                        "frame {number}: {receipt:?}, targets {:?}, missing {missing}",
                        info.targets
                    ));
                }
            }
        }
        drop(model);
        lock(&self.model).wrong.extend(wrong);
        // What was asked in between adds up as well.
        for (parts, _) in &self.surveys {
            for part in lock(parts).iter() {
                let accounted = part.written
                    + part.dropped_timeout
                    + part.dropped_overflow
                    + part.discarded
                    + part.pending;
                if part.offered != accounted {
                    self.wrong(format!("a survey does not add up: {part:?}"));
                }
            }
        }
    }

    fn has_ended_locked(&self, conn: usize) -> bool {
        let rec = lock(&self.recs[conn]);
        !rec.ends.is_empty() || rec.is_gone
    }

    fn check_books(&mut self) {
        if self.stopping {
            return;
        }
        let mut sum = GroupMetrics::default();
        for space in 0..2 {
            let parts: Shared<Vec<GroupMetrics>> = Shared::default();
            let result = parts.clone();
            let namespace = self.spaces[space].clone();
            self.job(Effect::Nothing, async move {
                Outcome::Done(namespace.survey(To::Everyone, &[], move |part| lock(&result).push(part)).await)
            });
            self.settle(true, true);
            let parts = lock(&parts);
            if parts.len() != self.shards.len() {
                self.wrong(format!("a survey was answered by {} shards", parts.len()));
            }
            parts.iter().for_each(|part| sum += *part);
        }
        // Turn all once more, so that what is published is of now.
        self.asleep.fill(None);
        self.shards.iter_mut().flatten().for_each(|shard| shard.turn(self.now).unwrap());
        let all = self.engine.as_ref().unwrap().metrics();
        let engine = [
            all.offered,
            all.written,
            all.dropped_timeout,
            all.dropped_overflow,
            all.discarded,
            all.pending,
            all.pending_bytes,
            all.received,
            all.connections,
        ];
        let spaces = [
            sum.offered,
            sum.written,
            sum.dropped_timeout,
            sum.dropped_overflow,
            sum.discarded,
            sum.pending,
            sum.pending_bytes,
            sum.received,
            sum.connections,
        ];
        if engine != spaces {
            self.wrong(format!("the engine counts {engine:?} and its namespaces {spaces:?}"));
        }
        if all.offered
            != all.written + all.dropped_timeout + all.dropped_overflow + all.discarded + all.pending
        {
            self.wrong(format!("the engine's books: {all:?}"));
        }
        if all.pending_bytes as usize > self.engine_config.backlog_bytes_max {
            self.wrong("beyond the budget".into());
        }
    }

    /// All go, and nothing is left.
    fn go(&mut self) {
        let way = self.chance.below(3);
        tell!(self, "all go, way {way}");
        if !self.stopping && way == 0 {
            self.shutdown();
        }
        if way != 0 || self.hurried_stop {
            for peer in &mut self.peers {
                peer.stream = None;
            }
        }
        let adopted = |world: &Self| {
            let model = lock(&world.model);
            model.conns.iter().filter(|conn| conn.id.is_some()).count()
        };
        for _ in 0..40 {
            self.settle(true, true);
            self.now += Duration::from_millis(200);
        }
        if self.stopping {
            // Those that are over have been dropped; the rest is given its time.
            for _ in 0..20 {
                self.now += Duration::from_secs(10);
                self.settle(true, true);
            }
            if self.shards.iter().any(Option::is_some) {
                let asleep: Vec<_> =
                    self.asleep.iter().map(|due| due.map(|due| due.map(|due| due - self.start))).collect();
                let audits: Vec<_> = self
                    .shards
                    .iter()
                    .map(|shard| {
                        shard
                            .as_ref()
                            .map(|shard| (shard.has_work(), is_readable(shard.poll_fd()), shard.audit()))
                    })
                    .collect();
                self.wrong(format!(
                    "a shard does not end: {asleep:?} at {:?} {audits:?}",
                    self.now - self.start
                ));
            }
            if let Some(report) = &self.report {
                let all = report.flushed + report.cut_off;
                if all > adopted(self) as u64 {
                    self.wrong(format!("{report:?} of {} connections", adopted(self)));
                }
                if !self.hurried_stop && way == 0 && report.left_over > 0 {
                    self.wrong(format!("{report:?} though nobody was in a hurry"));
                }
            } else {
                self.wrong("no report".into());
            }
        }
        for job in &self.jobs {
            self.wrong(format!("waits for ever when all have gone: {:?}", job.effect));
        }
        let engine = self.engine.as_ref().unwrap();
        let all = engine.metrics();
        if (all.connections, all.pending, all.pending_bytes) != (0, 0, 0) && !self.stopping {
            self.wrong(format!("left over: {all:?}"));
        }
        if all.adopted != all.ended || all.adopted != adopted(self) as u64 {
            self.wrong(format!("{} adopted, {} ended, {} opened", all.adopted, all.ended, adopted(self)));
        }
        if all.offered != all.written + all.dropped_timeout + all.dropped_overflow + all.discarded {
            self.wrong(format!("the engine's books at the end: {all:?}"));
        }
        let jobs_hold = self.jobs.len();
        if engine.connections() != jobs_hold {
            self.wrong(format!("{} places are taken", engine.connections()));
        }
        for space in &self.spaces {
            if (space.len(), space.groups()) != (0, 0) {
                self.wrong(format!("{} members, {} groups are left", space.len(), space.groups()));
            }
        }
        for shard in self.shards.iter().flatten() {
            let audit = shard.audit();
            if !audit.conns.is_empty() || !audit.groups.is_empty() || audit.deadlines > 0 {
                // Deadlines of connections that have gone are taken out when they are due.
                if !audit.conns.is_empty() || !audit.groups.is_empty() {
                    self.wrong(format!("a shard keeps {audit:?}"));
                }
            }
        }
        for (tag, rec) in self.recs.iter().enumerate() {
            let rec = lock(rec);
            let was_open = lock(&self.model).conns[tag].id.is_some();
            let is_left_over = self.stopping && rec.ends.is_empty();
            if was_open && !(rec.ends.len() == 1 || is_left_over && self.hurried_stop) {
                self.wrong(format!("{tag} ended {:?}", rec.ends));
            }
            if was_open && !rec.is_gone {
                self.wrong(format!("the handler of {tag} is not dropped"));
            }
        }
    }
}

fn to<'a>(target: &Target, one: Option<ConnectionId>, names: &'a [&'a str]) -> To<'a> {
    match target {
        Target::Everyone => To::Everyone,
        Target::Groups(_) if names.len() == 1 => To::Group(names[0]),
        Target::Groups(_) => To::Groups(names),
        Target::One(_) => To::Connection(one.unwrap()),
    }
}

fn is_readable(fd: i32) -> bool {
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

fn live(seed: u64, trace: bool) -> Vec<String> {
    let mut world = World::new(seed, trace);
    let steps = 20 + world.chance.below(180);
    for _ in 0..1 + world.chance.below(4) {
        world.adopt();
    }
    for step in 0..steps {
        world.step();
        world.be_good();
        if step % 16 == 0 {
            world.check_all();
        }
        if !lock(&world.model).wrong.is_empty() {
            break;
        }
    }
    if lock(&world.model).wrong.is_empty() {
        world.finish();
    }
    let wrong = lock(&world.model).wrong.clone();
    wrong
}

#[test]
fn random_histories_are_what_the_model_says() {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
    };
    if let Ok(seed) = std::env::var("HIST_SEED") {
        let wrong = live(seed.parse().unwrap(), true);
        assert!(wrong.is_empty(), "{wrong:#?}");
        return;
    }
    std::panic::set_hook(Box::new(|info| {
        let text = info.payload().downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| info.payload().downcast_ref::<String>().cloned()).unwrap_or_default();
        if text != "as it was told" {
            eprintln!("panic at {:?}: {text}", info.location().map(ToString::to_string));
        }
    }));
    let (from, count, threads) =
        (number("HIST_FROM", 0), number("HIST_COUNT", 2000), number("HIST_THREADS", 2));
    let failures: Mutex<Vec<(u64, String)>> = Mutex::default();
    let began = Instant::now();
    let done = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (failures, done) = (&failures, &done);
            scope.spawn(move || {
                for seed in (from..from + count).filter(|seed| seed % threads == thread) {
                    let wrong = catch_unwind(AssertUnwindSafe(|| live(seed, false)));
                    let wrong = wrong.unwrap_or_else(|panic| {
                        let text = panic.downcast_ref::<String>().cloned();
                        vec![format!(
                            "panicked: {:?}",
                            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                        )]
                    });
                    done.fetch_add(1, SeqCst);
                    if let Some(first) = wrong.first() {
                        let mut failures = lock(failures);
                        eprintln!("HIST_SEED={seed}: {}", first.chars().take(600).collect::<String>());
                        failures.push((seed, first.clone()));
                        if failures.len() >= 40 {
                            return;
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    println!("{} histories in {:?}, {} failed", done.load(SeqCst), began.elapsed(), failures.len());
    assert!(failures.is_empty(), "{} failures", failures.len());
}
