//! One history: an engine, its shards, clients and publishers, and their random actions.
//!
//! Every step is random: a shard takes a turn, a publisher publishes, a connection joins or closes, a client
//! reads, sends or disconnects, time passes. What the engine accepts enters the model at that moment. The
//! checks at the end are in `checks.rs`.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use shardcast_engine::{
    Address, AdoptError, Audit, CloseCode, ConnectionConfig, ConnectionId, Delivery, Encoding, Engine,
    EngineConfig, GroupMetrics, Namespace, NewConnection, Policy, Publication, PublishError, Rate, RateLimit,
    Receipt, Shard, Shutdown, ShutdownReport, User, UserLimit,
};
use testkit::rig::is_readable;
use testkit::time::ms;
use testkit::{Task, lock};

use super::handler::{Obedient, Record, action};
use super::model::{GROUPS, Model, ModelClient, Observer, Shared, Target, USERS};
use super::peer::{PREFIXES, Peer, numbered_frame, prefixed};
use super::random::Random;

/// Rounds of turns and actions after which a history that has not settled never will.
const ROUNDS_MAX: usize = 3000;
const CLIENTS_MAX: usize = 9;
/// The longest time that a user may take to come back.
pub(crate) const GRACE_MAX: Duration = ms(40);

// ---- Publishers -------------------------------------------------------------------------------------------------

/// How a job ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done(Result<(), PublishError>),
    Receipt(Result<Receipt, PublishError>),
    Adopted(Result<(), AdoptError>),
    Report(ShutdownReport),
}

impl Outcome {
    fn error(&self) -> Option<PublishError> {
        match self {
            Self::Done(Err(error)) | Self::Receipt(Err(error)) => Some(*error),
            Self::Adopted(Err(AdoptError::Refused(error))) => Some(*error),
            _ => None,
        }
    }
}

/// The effect of a job on the model once the engine has accepted it.
#[derive(Debug, Clone)]
pub(crate) enum Effect {
    Frame { number: u32, namespace: usize, target: Target, except: Vec<usize> },
    Join { client: usize, group: usize },
    Leave { client: usize, group: usize },
    Close { namespace: usize, target: Target, except: Vec<usize> },
    Adopt { client: usize },
    Survey { number: usize },
    Shutdown,
}

/// The queue at which a job waits for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Log,
    Mailbox(usize),
    /// One of several mailboxes.
    SomeMailbox,
    Nowhere,
}

/// A future outside the engine, which is polled when it was woken.
pub(crate) struct Job {
    task: Task<'static, Outcome>,
    pub(crate) effect: Effect,
    place: Place,
    pub(crate) is_accepted: bool,
}

impl Job {
    pub(crate) fn is_shutdown(&self) -> bool {
        matches!(self.effect, Effect::Shutdown)
    }

    /// Whether it waits for room, and nothing has woken it.
    fn waits_for_room(&self) -> bool {
        let may_wait = !self.is_accepted || matches!(self.effect, Effect::Survey { .. });
        may_wait && !self.task.is_woken()
    }
}

/// The answers to a query, and what had been accepted for each client when it was asked and when it was accepted.
#[derive(Debug, Default)]
pub(crate) struct SurveyOf {
    pub(crate) namespace: usize,
    pub(crate) is_of_everyone: bool,
    pub(crate) parts: Shared<Vec<GroupMetrics>>,
    pub(crate) asked_at: Option<Vec<usize>>,
    pub(crate) over_at: Option<Vec<usize>>,
}

/// A shard that waits in its poll: at most until then, or for as long as nothing wakes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sleep {
    pub(crate) until: Option<Instant>,
}

// ---- The history ------------------------------------------------------------------------------------------------

pub(crate) struct History {
    pub(crate) random: Random,
    pub(crate) engine: Engine,
    /// The encodings that clients may use, and the length of their prefix.
    encodings: Vec<(Encoding, usize)>,
    pub(crate) engine_config: EngineConfig,
    /// None for shards that have ended.
    pub(crate) shards: Vec<Option<Shard>>,
    /// None for shards that are awake.
    pub(crate) asleep: Vec<Option<Sleep>>,
    pub(crate) namespaces: Vec<Namespace>,
    /// Of all connections.
    pub(crate) user_limit: Option<UserLimit>,
    /// How many changes of presence the observers take.
    pub(crate) room: Arc<AtomicUsize>,
    pub(crate) model: Shared<Model>,
    pub(crate) peers: Vec<Peer>,
    pub(crate) records: Vec<Shared<Record>>,
    pub(crate) configs: Vec<Arc<ConnectionConfig>>,
    pub(crate) jobs: Vec<Job>,
    pub(crate) now: Instant,
    pub(crate) start: Instant,
    pub(crate) is_stopping: bool,
    /// The shutdown has little time, so connections may be cut off and handlers left over.
    pub(crate) is_hurried: bool,
    pub(crate) report: Option<ShutdownReport>,
    /// Connections with a socket on each shard, when the shard first took part in the shutdown.
    pub(crate) open_at_stop: Vec<Option<u64>>,
    /// Connections that must have ended, because a target that contains them was found empty; and the reason.
    pub(crate) presumed_ended: Vec<(usize, String)>,
    pub(crate) surveys: Vec<SurveyOf>,
    pub(crate) adoptions_under_way: usize,
    /// A frame has a policy that ends connections for high round trips, or for drops.
    pub(crate) has_frame_with_rtt: bool,
    pub(crate) has_frame_with_drops: bool,
    looks_inside: bool,
    /// The events are printed.
    pub(crate) is_told: bool,
}

macro_rules! tell {
    ($history:expr, $($text:tt)*) => { if $history.is_told { println!("  {}", format!($($text)*)); } };
}
pub(crate) use tell;

impl History {
    pub(crate) fn new(seed: u64, is_told: bool) -> Self {
        let mut random = Random::new(seed);
        let shards = 1 + random.below(4);
        let is_tight = random.one_in(2);
        let engine_config = EngineConfig {
            shards: Some(shards),
            pin: false,
            blocked_after: None,
            log_capacity: if is_tight { random.of(&[2, 2, 4, 8]) } else { random.of(&[16, 64, 4096]) },
            mailbox_capacity: if is_tight { random.of(&[1, 2, 4, 64]) } else { random.of(&[64, 4096]) },
            publishers_waiting_max: random.of(&[1, 2, 65_536, 65_536]),
            coalesce: random.of(&[ms(0), ms(0), ms(0), ms(3)]),
            io_uring: testkit::uses_io_uring(),
            read_buffer_bytes: random.of(&[1024, 1024, 4096]),
            backlog_bytes_max: random.of(&[1 << 20, 1 << 30, 1 << 30]),
            unfinished_bytes_max: random.of(&[1 << 20, 1 << 30, 1 << 30]),
            max_connections_per_address: None,
            max_upgrades_per_address: None,
            trim_heap: false,
            max_connections: random.of(&[4, 1 << 20, 1 << 20]),
            __non_exhaustive: (),
        };
        let now = Instant::now();
        let (engine, shards) = Engine::driven(engine_config.clone(), now).unwrap();
        let mut encodings = vec![(Encoding::PLAIN, 0)];
        if random.one_in(2) {
            encodings
                .extend(PREFIXES.map(|bytes| (engine.register_encoding(prefixed(bytes)).unwrap(), bytes)));
        }
        if is_told {
            println!("{engine_config:?}");
        }
        let user_limit = match random.below(6) {
            0 => Some(UserLimit::OldestStays(random.of(&[1, 2]))),
            1 => Some(UserLimit::NewestWins(random.of(&[1, 2]))),
            _ => None,
        };
        let namespaces = vec![engine.namespace(), engine.namespace()];
        let (model, room) = (Shared::default(), Arc::new(AtomicUsize::new(usize::MAX)));
        for (number, namespace) in namespaces.iter().enumerate() {
            let (model, room) = (Arc::clone(&model), room.clone());
            assert!(namespace.observe_presence(Observer { namespace: number, model, room }));
        }
        Self {
            random,
            namespaces,
            user_limit,
            room,
            engine,
            encodings,
            engine_config,
            asleep: vec![None; shards.len()],
            open_at_stop: vec![None; shards.len()],
            shards: shards.into_iter().map(Some).collect(),
            model,
            peers: Vec::new(),
            records: Vec::new(),
            configs: Vec::new(),
            jobs: Vec::new(),
            now,
            start: now,
            is_stopping: false,
            is_hurried: false,
            report: None,
            presumed_ended: Vec::new(),
            surveys: Vec::new(),
            adoptions_under_way: 0,
            has_frame_with_rtt: false,
            has_frame_with_drops: false,
            looks_inside: std::env::var_os("HISTORIES_OUTSIDE").is_none(),
            is_told,
        }
    }

    pub(crate) fn run(&mut self) {
        let steps = 20 + self.random.below(180);
        for _ in 0..1 + self.random.below(4) {
            self.adopt();
        }
        for step in 0..steps {
            self.step();
            self.good_peers_act();
            self.check_users();
            if step % 16 == 0 {
                self.check_groups();
            }
            if self.has_faults() {
                return;
            }
        }
        self.finish();
    }

    pub(crate) fn into_faults(self) -> Vec<String> {
        std::mem::take(&mut lock(&self.model).faults)
    }

    fn has_faults(&self) -> bool {
        !lock(&self.model).faults.is_empty()
    }

    pub(crate) fn fault(&self, text: String) {
        lock(&self.model).faults.push(text);
    }

    pub(crate) fn has_ended(&self, client: usize) -> bool {
        lock(&self.records[client]).has_ended()
    }

    fn all_shards_live(&self) -> bool {
        self.shards.iter().all(Option::is_some)
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..=29 => {
                let index = self.random.below(self.shards.len());
                self.turn(index);
            }
            30..=36 => {
                for index in 0..self.shards.len() {
                    self.turn(index);
                }
            }
            37..=40 if self.peers.len() < CLIENTS_MAX => self.adopt(),
            41..=58 => self.publish(),
            59..=65 => self.join_or_leave(),
            66 if self.random.one_in(3) => self.close(),
            67 => self.survey(),
            68 if !self.jobs.is_empty() && self.random.one_in(3) => self.give_up(),
            69..=75 if !self.jobs.is_empty() => {
                let index = self.random.below(self.jobs.len());
                self.poll(index);
            }
            76..=90 => self.peer_acts(),
            91..=95 => {
                if let Some(client) = self.any_client() {
                    self.release(client);
                }
            }
            96..=98 => {
                let millis = self.random.of(&[0, 1, 3, 10, 30]);
                self.now += ms(millis);
                tell!(self, "{millis} ms pass: {:?}", self.now - self.start);
            }
            99 if self.random.one_in(12) => self.shut_down(),
            99 => {
                let room = self.random.of(&[0, 1, usize::MAX]);
                tell!(self, "room for {room} changes");
                self.room.store(room, Relaxed);
            }
            _ => {}
        }
    }

    // ---- Choices ----

    fn policy(&mut self) -> Policy {
        match self.random.below(8) {
            0..=2 => Policy::Block,
            3 => Policy::DropMessage { timeout: Duration::ZERO },
            4 => Policy::DropMessage { timeout: ms(self.random.of(&[1, 10, 40])) },
            5 => Policy::DropConnection {
                timeout: ms(self.random.of(&[0, 5, 30])),
                max_drops: self.random.of(&[1, 3, 10]),
            },
            6 => Policy::DropOnHighRtt {
                max_rtt: ms(self.random.of(&[5, 15])),
                rtt_samples: self.random.of(&[1, 3]),
            },
            _ => Policy::DropMessage { timeout: ms(1000) },
        }
    }

    fn any_client(&mut self) -> Option<usize> {
        (!self.peers.is_empty()).then(|| self.random.below(self.peers.len()))
    }

    /// A client that has been open, and its id.
    fn any_known_client(&mut self) -> Option<(usize, ConnectionId)> {
        let client = self.any_client()?;
        let id = lock(&self.model).clients[client].id;
        id.map(|id| (client, id))
    }

    fn any_namespace(&mut self) -> usize {
        usize::from(self.random.one_in(6))
    }

    fn target(&mut self) -> Option<(usize, Target)> {
        Some(match self.random.below(12) {
            10 => (self.any_namespace(), Target::Users(vec![self.random.below(2)])),
            11 => (self.any_namespace(), Target::Users(vec![0, 1])),
            0..=3 => (self.any_namespace(), Target::Everyone),
            4 | 5 => (self.any_namespace(), Target::Groups(vec![self.random.below(3)])),
            6 => {
                let groups = (0..1 + self.random.below(3)).map(|_| self.random.below(3)).collect();
                (self.any_namespace(), Target::Groups(groups))
            }
            _ => {
                let (client, _) = self.any_known_client()?;
                let namespace = lock(&self.model).clients[client].namespace;
                let is_strange = self.random.one_in(20);
                (if is_strange { 1 - namespace } else { namespace }, Target::Client(client))
            }
        })
    }

    /// The excepted clients, and their ids.
    fn except(&mut self) -> (Vec<usize>, Vec<ConnectionId>) {
        let count = if self.random.one_in(3) { 1 + self.random.below(3) } else { 0 };
        (0..count).filter_map(|_| self.any_known_client()).unzip()
    }

    fn id_of(&self, client: usize) -> ConnectionId {
        lock(&self.model).clients[client].id.unwrap()
    }

    // ---- Actions from outside ----

    fn adopt(&mut self) {
        let Some(permit) = self.engine.admit(None) else { return };
        let is_calm = self.random.one_in(2);
        let policy = self.policy();
        let random = &mut self.random;
        let messages = Rate::per_second(random.of(&[40, 200, 1000])).with_burst(random.of(&[1, 3]));
        let bytes = Rate::per_second(random.of(&[500, 20_000])).with_burst(random.of(&[20, 4000]));
        let rate_limit = RateLimit {
            messages: random.one_in(6).then_some(messages),
            bytes: random.one_in(10).then_some(bytes),
            ..RateLimit::default()
        };
        let config = Arc::new(ConnectionConfig {
            outbox_frames: random.of(&[1, 2, 4, 16, 64, 1024]),
            outbox_bytes: random.of(&[1024, 4096, 30_000, 1 << 20]),
            overflow_frames: random.of(&[0, 1, 4, 64, 65_536, 65_536]),
            overflow_bytes: random.of(&[0, 5000, 60_000, 16 << 20, 16 << 20]),
            policy,
            max_message_bytes: random.of(&[200, 65_536]),
            max_fragments: random.of(&[3, 1024]),
            rate_limit,
            max_frame_bytes: 1 << 30,
            accept_unmasked_frames: false,
            control_frames_per_second: if is_calm { 1000 } else { random.of(&[5, 200]) },
            heartbeat_interval: Some(if is_calm { ms(15_000) } else { random.of(&[ms(20), ms(100)]) }),
            pong_timeout: if is_calm { ms(10_000) } else { random.of(&[ms(15), ms(80), ms(300)]) },
            idle_timeout: if is_calm { None } else { random.of(&[None, Some(ms(60)), Some(ms(400))]) },
            max_connection_duration: if is_calm { None } else { random.of(&[None, None, Some(ms(250))]) },
            message_timeout: if is_calm { None } else { random.of(&[None, None, Some(ms(90))]) },
            stall_timeout: random.of(&[None, Some(ms(10_000)), Some(ms(50))]),
            max_groups: random.of(&[1, 10_000, 10_000, 10_000, 10_000]),
            max_connections_per_user: self.user_limit,
            presence_grace: random.of(&[ms(0), ms(0), ms(5), GRACE_MAX]),
            close_timeout: random.of(&[ms(10), ms(60), ms(5000)]),
            __non_exhaustive: (),
        });
        let (ours, theirs) = UnixStream::pair().unwrap();
        let send_buffer = self.random.of(&[4096, 4096, 16_384, 65_536]);
        socket2::SockRef::from(&ours).set_send_buffer_size(send_buffer).unwrap();
        socket2::SockRef::from(&theirs).set_send_buffer_size(self.random.of(&[4096, 200_000])).unwrap();
        let client = self.peers.len();
        let namespace = usize::from(self.random.one_in(5));
        let (encoding, prefix_bytes) = self.random.of(&self.encodings);
        let mut peer = Peer::new(theirs, self.random.one_in(3), prefix_bytes);
        let record = Arc::new(Mutex::new(Record {
            waits_at_open: self.random.one_in(8),
            waits_at_drop: self.random.one_in(6),
            waits_at_close: self.random.one_in(6),
            wakes_early: self.random.one_in(4),
            ..Record::default()
        }));
        let mut received = Vec::new();
        if self.random.one_in(4) {
            // The first message arrives together with the handshake, masked by zeros.
            received = vec![0x82, 0x85, 0, 0, 0, 0];
            received.extend(0u32.to_be_bytes());
            received.push(action::NOTHING);
            peer.said = 1;
        }
        let user = self.random.of(&[None, Some(0), Some(0), Some(1)]);
        tell!(
            self,
            "adopt {client} in {namespace} of user {user:?}: {config:?} send buffer {send_buffer} prefix {prefix_bytes}"
        );
        lock(&self.model).clients.push(ModelClient {
            namespace,
            user,
            config: config.clone(),
            has_entered: false,
            id: None,
            groups: Default::default(),
            expected: Vec::new(),
            closed_at: None,
            may_close_at: None,
        });
        self.peers.push(peer);
        self.records.push(record.clone());
        self.configs.push(config.clone());
        let (model, namespaces) = (self.model.clone(), self.namespaces.clone());
        let connection = NewConnection {
            socket: ours.into(),
            received: Bytes::from(received),
            handler: Box::new(move |_| Box::new(Obedient { client, record, model, namespaces })),
            config,
            encoding,
            permit,
            rate_limit: None,
            user: user.map(|user| User::new(USERS[user])),
            first_message: None,
            expires_at: None,
        };
        let namespace = self.namespaces[namespace].clone();
        self.adoptions_under_way += 1;
        self.begin(Effect::Adopt { client }, Place::SomeMailbox, async move {
            Outcome::Adopted(namespace.adopt(connection).await)
        });
    }

    fn publish(&mut self) {
        let Some((namespace, target)) = self.target() else { return };
        let (except, except_ids) = self.except();
        let policy = self.random.one_in(4).then(|| self.policy());
        self.has_frame_with_rtt |= matches!(policy, Some(Policy::DropOnHighRtt { .. }));
        self.has_frame_with_drops |= matches!(policy, Some(Policy::DropConnection { .. }));
        let bytes = self.random.of(&[0, 1, 20, 121, 122, 130, 300, 1000, 2000, 9000, 30_000]);
        let way = self.random.below(3);
        let handle = self.namespaces[namespace].clone();
        let delivery = policy.map_or_else(Delivery::default, |policy| Delivery::with_policy(policy).unwrap());
        // A message to one connection blocks by default, whatever the connection's own policy is.
        let is_unicast = matches!(target, Target::Client(_));
        let number = lock(&self.model).new_frame(policy.or(is_unicast.then_some(Policy::Block)));
        tell!(
            self,
            "frame {number} of {bytes} to {target:?} in {namespace} except {except:?} policy {policy:?} way {way}"
        );
        let (address, place) = (self.address(&target), self.place_of(&target));
        let publication = Publication::message(address, numbered_frame(number, bytes))
            .except(&except_ids)
            .with_delivery(delivery);
        let effect = Effect::Frame { number, namespace, target, except };
        match way {
            0 => {
                let before = self.engine.audit_accepted();
                let result = handle.try_publish(publication);
                if before < self.engine.audit_accepted() {
                    assert!(result.is_ok(), "a frame was accepted and refused");
                    self.note_accepted(&effect);
                } else if result.is_ok() {
                    self.found_nobody(&effect);
                }
            }
            1 => self.begin(effect, place, async move { Outcome::Done(handle.publish(publication).await) }),
            _ => {
                self.begin(effect, place, async move { Outcome::Receipt(handle.deliver(publication).await) })
            }
        }
    }

    fn join_or_leave(&mut self) {
        let Some((client, id)) = self.any_known_client() else { return };
        let group = self.random.below(3);
        // Two that are in flight at the same time may be accepted in either order.
        let is_concurrent = self.jobs.iter().any(|job| match job.effect {
            Effect::Join { client: other, group: its } | Effect::Leave { client: other, group: its } => {
                (other, its) == (client, group)
            }
            _ => false,
        });
        if is_concurrent {
            return;
        }
        let namespace = self.namespaces[lock(&self.model).clients[client].namespace].clone();
        let place = Place::Mailbox(id.shard());
        if self.random.below(5) < 3 {
            self.begin(Effect::Join { client, group }, place, async move {
                Outcome::Done(namespace.join(id, GROUPS[group]).await.map(drop))
            });
        } else {
            self.begin(Effect::Leave { client, group }, place, async move {
                Outcome::Done(namespace.leave(id, GROUPS[group]).await)
            });
        }
    }

    fn close(&mut self) {
        let Some((namespace, target)) = self.target() else { return };
        let (except, except_ids) = self.except();
        let handle = self.namespaces[namespace].clone();
        let (address, place) = (self.address(&target), self.place_of(&target));
        let publication =
            Publication::close(address, CloseCode(4000), "command").unwrap().except(&except_ids);
        self.begin(Effect::Close { namespace, target, except }, place, async move {
            Outcome::Done(handle.publish(publication).await)
        });
    }

    fn survey(&mut self) {
        let namespace = self.random.below(2);
        let group = self.random.below(4);
        let one = if self.random.one_in(3) { self.any_known_client() } else { None };
        let place = one.map_or(Place::SomeMailbox, |(_, id)| Place::Mailbox(id.shard()));
        let address = match (one, group) {
            (Some((_, id)), _) => Address::Connection(id),
            (None, 3) => Address::Everyone,
            (None, group) => Address::group(GROUPS[group]),
        };
        self.begin_survey(namespace, address, place);
    }

    /// Queries the counters of a whole namespace.
    pub(crate) fn survey_everyone(&mut self, namespace: usize) -> Shared<Vec<GroupMetrics>> {
        let survey = self.surveys.len();
        self.begin_survey(namespace, Address::Everyone, Place::SomeMailbox);
        self.surveys[survey].parts.clone()
    }

    fn begin_survey(&mut self, namespace: usize, address: Address, place: Place) {
        let parts: Shared<Vec<GroupMetrics>> = Shared::default();
        let is_of_everyone = matches!(address, Address::Everyone);
        let (number, told) = (self.surveys.len(), parts.clone());
        self.surveys.push(SurveyOf { namespace, is_of_everyone, parts, asked_at: None, over_at: None });
        let handle = self.namespaces[namespace].clone();
        self.begin(Effect::Survey { number }, place, async move {
            Outcome::Done(handle.collect_metrics(&address, &[], move |part| lock(&told).push(part)).await)
        });
    }

    pub(crate) fn shut_down(&mut self) {
        if self.is_stopping {
            return;
        }
        self.is_stopping = true;
        // Its time counts from the real clock, which the test's clock has overtaken.
        let ahead = self.now - self.start;
        let more = self.random.of(&[0, 20, 200, 60_000, 60_000]);
        self.is_hurried = more < 60_000;
        let within = ahead + ms(more);
        let spread = self.random.of(&[Duration::ZERO, ms(50), within]);
        let code = self.random.of(&[CloseCode::GOING_AWAY, CloseCode::SERVICE_RESTART]);
        let (engine, shutdown) = (self.engine.clone(), Shutdown { within, close_window: spread, code });
        tell!(self, "shutdown {shutdown:?}");
        self.begin(Effect::Shutdown, Place::Nowhere, async move {
            Outcome::Report(engine.shutdown(shutdown).await.expect("a code that can be sent"))
        });
    }

    // ---- Jobs ----

    fn begin(&mut self, effect: Effect, place: Place, future: impl Future<Output = Outcome> + 'static) {
        self.jobs.push(Job { task: Task::new(future), effect, place, is_accepted: false });
        self.poll(self.jobs.len() - 1);
    }

    /// A waiting job is dropped, as a timeout around it would do.
    fn give_up(&mut self) {
        let index = self.random.below(self.jobs.len());
        if !self.jobs[index].is_shutdown() {
            tell!(self, "given up: {:?}", self.jobs[index].effect);
            let job = self.jobs.swap_remove(index);
            self.adoptions_under_way -= usize::from(matches!(job.effect, Effect::Adopt { .. }));
        }
    }

    pub(crate) fn is_woken(&self, index: usize) -> bool {
        self.jobs[index].task.is_woken()
    }

    /// Polls a job if it was woken; returns whether it is over, and has been removed.
    pub(crate) fn poll(&mut self, index: usize) -> bool {
        if !self.is_woken(index) {
            return false;
        }
        let before = self.engine.audit_accepted();
        let outcome = self.jobs[index].task.poll();
        if before < self.engine.audit_accepted() && !self.jobs[index].is_accepted {
            self.jobs[index].is_accepted = true;
            let effect = self.jobs[index].effect.clone();
            self.note_accepted(&effect);
        }
        match outcome {
            None => {
                self.check_waiting(index);
                false
            }
            Some(outcome) => {
                let job = self.jobs.swap_remove(index);
                self.note_over(&job, outcome);
                true
            }
        }
    }

    /// Other jobs that wait for room at the same queue: those known to, and those that may.
    fn waiting_at(&self, place: Place, but: Option<usize>) -> (usize, usize) {
        let others = self.jobs.iter().enumerate().filter(|(index, _)| Some(*index) != but);
        let others = others.map(|(_, job)| job).filter(|job| job.waits_for_room());
        let is_mailbox = |place| matches!(place, Place::Mailbox(_) | Place::SomeMailbox);
        let (mut known, mut unknown) = (0, 0);
        for other in others {
            match (place, other.place) {
                (Place::Log, Place::Log) => known += 1,
                (Place::Mailbox(one), Place::Mailbox(other)) if one == other => known += 1,
                (Place::Mailbox(_), Place::Mailbox(_)) => {}
                (one, other) if is_mailbox(one) && is_mailbox(other) => unknown += 1,
                _ => {}
            }
        }
        (known, unknown)
    }

    /// No more jobs wait than the limit allows.
    fn check_waiting(&self, index: usize) {
        let job = &self.jobs[index];
        if job.waits_for_room() && matches!(job.place, Place::Log | Place::Mailbox(_)) {
            let (known, _) = self.waiting_at(job.place, Some(index));
            if known >= self.engine_config.publishers_waiting_max {
                self.fault(format!("{:?} waits, as {known} others do", job.effect));
            }
        }
    }

    fn note_accepted(&mut self, effect: &Effect) {
        let mut model = lock(&self.model);
        match effect {
            Effect::Frame { number, namespace, target, except } => {
                model.frame_accepted(*number, *namespace, target, except);
            }
            Effect::Join { client, group } => {
                model.clients[*client].groups.insert(*group);
                if model.clients[*client].groups.len() > self.configs[*client].max_groups {
                    model.may_close(*client);
                }
            }
            Effect::Leave { client, group } => {
                model.clients[*client].groups.remove(group);
            }
            Effect::Close { namespace, target, except } => model.close_accepted(*namespace, target, except),
            Effect::Adopt { client } => {
                model.clients[*client].has_entered = !lock(&self.records[*client]).waits_at_open;
            }
            Effect::Survey { number } => {
                let accepted = model.clients.iter().map(|client| client.expected.len()).collect();
                self.surveys[*number].asked_at = Some(accepted);
            }
            Effect::Shutdown => {}
        }
        drop(model);
        tell!(self, "accepted: {effect:?}");
    }

    /// The target was found empty: connections that should be in it must have ended.
    fn found_nobody(&mut self, effect: &Effect) {
        let (Effect::Frame { namespace, target, except, .. } | Effect::Close { namespace, target, except }) =
            effect
        else {
            return;
        };
        for client in lock(&self.model).recipients(*namespace, target, except) {
            self.presumed_ended.push((client, format!("{effect:?} found nobody")));
        }
    }

    fn note_over(&mut self, job: &Job, outcome: Outcome) {
        tell!(self, "over: {:?} {outcome:?}", job.effect);
        let effect = &job.effect;
        self.adoptions_under_way -= usize::from(matches!(effect, Effect::Adopt { .. }));
        match outcome.error() {
            Some(PublishError::Closed) => {
                if !self.engine.audit_is_closed() && self.all_shards_live() {
                    self.fault(format!("{effect:?} is told Closed while the engine is not"));
                }
                return;
            }
            Some(PublishError::Overloaded) => {
                let (known, unknown) = self.waiting_at(job.place, None);
                if known + unknown < self.engine_config.publishers_waiting_max {
                    self.fault(format!(
                        "{effect:?} is told Overloaded, and only {known} to {unknown} more wait"
                    ));
                }
                if job.is_accepted && !matches!(effect, Effect::Survey { .. }) {
                    self.fault(format!("{effect:?} was accepted and told Overloaded"));
                }
                return;
            }
            Some(error) => return self.fault(format!("{effect:?}: {error}")),
            None => {}
        }
        match (effect, outcome) {
            (Effect::Adopt { client }, Outcome::Adopted(Err(AdoptError::TooManyConnectionsOfUser))) => {
                self.check_refused(*client);
            }
            (Effect::Adopt { .. }, Outcome::Adopted(Err(error))) => {
                self.fault(format!("{effect:?}: {error}"))
            }
            (Effect::Shutdown, Outcome::Report(report)) => self.report = Some(report),
            (Effect::Survey { number }, _) => {
                let model = lock(&self.model);
                let accepted = model.clients.iter().map(|client| client.expected.len()).collect();
                self.surveys[*number].over_at = Some(accepted);
            }
            (Effect::Frame { .. } | Effect::Close { .. }, _) if !job.is_accepted => self.found_nobody(effect),
            (Effect::Frame { number, .. }, Outcome::Receipt(Ok(receipt))) => {
                lock(&self.model).frames[*number as usize].receipt = Some(receipt);
                let lost = receipt.dropped.total() + receipt.disconnected;
                if receipt.delayed > receipt.recipients || lost > receipt.delayed {
                    self.fault(format!("a receipt that does not add up: {receipt:?}"));
                }
            }
            (Effect::Frame { number, .. }, Outcome::Done(Ok(()))) => {
                lock(&self.model).frames[*number as usize].has_returned = true;
                let audits: Vec<_> = self.shards.iter().flatten().map(Shard::audit).collect();
                audits.iter().for_each(|audit| self.check_returned(audit));
            }
            (Effect::Leave { client, group }, _) if !job.is_accepted => {
                let was_member = lock(&self.model).clients[*client].groups.remove(group);
                let why = || format!("{effect:?} found no group");
                self.presumed_ended.extend(was_member.then(|| (*client, why())));
            }
            _ => {}
        }
    }

    // ---- Clients ----

    fn peer_acts(&mut self) {
        let Some(client) = self.any_client() else { return };
        let act = self.random.below(40);
        let bytes = self.random.of(&[1, 7, 100, 1000, 5000, 40_000]);
        let mut asks = self.random.of(&[1, 1, 2, 4, 5, 6, 7, 0, 0, 0, 4, 5, 6]);
        if self.random.one_in(2) {
            asks = action::NOTHING;
        }
        if self.random.one_in(60) {
            asks = action::PANIC;
        }
        let filler = self.random.of(&[0, 0, 3, 120, 180, 3000]);
        let chance = self.random.below(8);
        let expected = lock(&self.model).clients[client].expected.len();
        let max_message_bytes = self.configs[client].max_message_bytes;
        tell!(self, "peer {client} act {act} bytes {bytes} asks {asks} filler {filler} chance {chance}");
        let peer = &mut self.peers[client];
        let may_speak = !peer.has_said_close;
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
            18..=26 if may_speak && peer.in_fragments.is_none() => {
                let mut payload = peer.said.to_be_bytes().to_vec();
                payload.push(asks);
                payload.resize(5 + filler, 0);
                peer.said += 1;
                peer.is_faulty |= payload.len() > max_message_bytes;
                peer.asked_for_panic |= asks == action::PANIC;
                peer.say(0x82, &payload);
            }
            27..=29 if may_speak => match peer.in_fragments.take() {
                None => {
                    peer.in_fragments = Some(peer.said);
                    let number = peer.said;
                    peer.say(0x02, &number.to_be_bytes());
                }
                Some(number) => {
                    peer.said = number + 1;
                    peer.say(0x80, &[action::NOTHING]);
                }
            },
            30 | 31 if may_speak => {
                let number = peer.pings_said;
                peer.pings_said += 1;
                peer.say(0x89, &number.to_be_bytes());
            }
            32 if may_speak && peer.in_fragments.is_none() => {
                peer.has_said_close = true;
                peer.expected_at_close = expected;
                peer.say(0x88, if chance == 0 { &[] } else { &[0x03, 0xE8] });
            }
            33 if chance == 0 => {
                peer.is_faulty = true;
                peer.say(0x83, b"x");
            }
            34 | 35 if chance == 0 => {
                let half = if act == 34 { std::net::Shutdown::Both } else { std::net::Shutdown::Write };
                if let Some(stream) = &peer.stream {
                    let _ = stream.shutdown(half);
                    peer.is_broken = true;
                }
            }
            36 if chance == 0 => {
                peer.stream = None;
                (peer.is_broken, peer.is_over) = (true, true);
            }
            37 => {
                peer.send_some(3);
            }
            _ => peer.send(),
        }
    }

    /// Good clients take everything and answer at once.
    fn good_peers_act(&mut self) {
        for peer in self.peers.iter_mut().filter(|peer| peer.is_good) {
            peer.read(usize::MAX);
            peer.answer_pings();
            peer.send();
        }
    }

    /// Wakes a handler that waits.
    fn release(&mut self, client: usize) {
        let waker = lock(&self.records[client]).waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    // ---- Shards ----

    /// Gives a shard a turn if its thread would run; returns whether it took one.
    pub(crate) fn turn(&mut self, index: usize) -> bool {
        let Some(shard) = &mut self.shards[index] else { return false };
        if let Some(Sleep { until }) = self.asleep[index] {
            let is_due = until.is_some_and(|until| until <= self.now);
            if !is_due && !is_readable(shard) {
                return false;
            }
        }
        shard.turn(self.now).unwrap();
        let audit = shard.audit();
        if self.is_stopping && self.open_at_stop[index].is_none() {
            let open = audit.connections.iter().filter(|connection| connection.has_socket).count();
            self.open_at_stop[index] = Some(open as u64);
        }
        if shard.is_over() {
            tell!(self, "shard {index} is over");
            self.shards[index] = None;
            self.asleep[index] = Some(Sleep { until: None });
            return true;
        }
        self.asleep[index] = match shard.doze(self.now) {
            Some(Duration::ZERO) => None,
            bound => Some(Sleep { until: bound.map(|bound| self.now + bound) }),
        };
        if self.looks_inside {
            self.check_shard(&audit);
            self.check_returned(&audit);
        }
        true
    }

    /// No frame waits for a client if its publisher, which had to wait for it, has returned.
    fn check_returned(&self, audit: &Audit) {
        let mut model = lock(&self.model);
        let mut faults = Vec::new();
        for connection in audit.connections.iter().filter(|one| one.is_open && one.waiting > 0) {
            let known = model.clients.iter().position(|client| client.id == Some(connection.id));
            let Some(client) = known else { continue };
            let expected = &model.clients[client].expected;
            if expected.iter().any(|number| model.may_lose(*number, client)) {
                continue; // then the last that were offered are not the ones that wait
            }
            let offered = connection.tally.offered as usize;
            let Some(waiting) = expected.get(offered - connection.waiting as usize..offered) else {
                continue;
            };
            let is_waited_for = |number: &&u32| matches!(model.policy(**number, client), Policy::Block);
            let has_returned = |number: &&u32| model.frames[**number as usize].has_returned;
            for number in waiting.iter().filter(is_waited_for).filter(has_returned) {
                faults.push(format!("the publish of {number} has returned, and it waits for {client}"));
            }
        }
        model.faults.extend(faults);
    }

    /// Checks the invariants of one shard after each turn.
    fn check_shard(&self, audit: &Audit) {
        let mut model = lock(&self.model);
        model.faults.extend(audit.errors.iter().cloned());
        for connection in &audit.connections {
            let is_within = connection.queued as usize <= connection.outbox_frames
                && (connection.queued_bytes <= connection.outbox_bytes || connection.queued == 1);
            let waits_within = connection.waiting as usize <= connection.waiting_frames_max
                && (connection.overflow_bytes <= connection.waiting_bytes_max || connection.waiting == 1);
            if !is_within || !waits_within {
                model.faults.push(format!("beyond the bounds: {connection:?}"));
            }
        }
    }

    /// Checks the invariants of all shards together.
    pub(crate) fn check_groups(&self) {
        if !self.looks_inside {
            return;
        }
        let mut groups: BTreeMap<usize, ([u64; 3], [u64; 3])> = BTreeMap::new();
        for group in self.shards.iter().flatten().flat_map(|shard| shard.audit().groups) {
            let (local, shared) = groups.entry(group.address).or_default();
            for (sum, part) in local.iter_mut().zip([group.members, group.congested, group.blocking]) {
                *sum += part;
            }
            *shared = [group.shared_members, group.shared_congested, group.shared_blocking];
        }
        for (local, shared) in groups.values() {
            // Members with a join in flight are already counted in the shared counters.
            if local[1..] != shared[1..] || local[0] > shared[0] {
                self.fault(format!("a group's shards count {local:?} and all together {shared:?}"));
            }
        }
    }

    /// Lets all parts act until nothing happens any more.
    pub(crate) fn settle(&mut self) {
        let mut quiet = 0;
        for round in 0..ROUNDS_MAX {
            let mut has_acted = false;
            for index in 0..self.shards.len() {
                has_acted |= self.turn(index);
            }
            let mut index = 0;
            while index < self.jobs.len() {
                has_acted |= self.is_woken(index);
                if !self.poll(index) {
                    index += 1;
                }
            }
            for client in 0..self.peers.len() {
                let peer = &mut self.peers[client];
                let before = peer.progress();
                peer.read(usize::MAX);
                peer.answer_pings();
                peer.send();
                has_acted |= before != peer.progress();
                has_acted |= lock(&self.records[client]).waker.is_some();
                self.release(client);
            }
            if round + 5 > ROUNDS_MAX {
                self.tell_unrest();
            }
            quiet = if has_acted { 0 } else { quiet + 1 };
            if quiet == 2 {
                // Frames that are delayed by coalescing, and the like.
                let due = self.asleep.iter().flatten().filter_map(|sleep| sleep.until).min();
                match due {
                    Some(due) if due <= self.now + ms(4) => {
                        self.now = self.now.max(due);
                        quiet = 0;
                    }
                    _ => return,
                }
            }
        }
        self.fault("it does not come to rest".into());
    }

    /// The parts that still act, although everything should have settled.
    fn tell_unrest(&self) {
        tell!(self, "at {:?}, asleep {:?}", self.now - self.start, self.asleep);
        for shard in self.shards.iter().flatten() {
            tell!(self, "{shard:?} has work: {}, {:?}", shard.has_work(), shard.audit());
        }
        for index in (0..self.jobs.len()).filter(|index| self.is_woken(*index)) {
            tell!(self, "woken: {:?}", self.jobs[index].effect);
        }
        for (client, record) in self.records.iter().enumerate() {
            tell!(self, "{client}: {:?} {:?}", self.peers[client].progress(), lock(record));
        }
    }

    // ---- Users ----

    /// No user has more connections than the limit that refuses them.
    fn check_users(&self) {
        let Some(UserLimit::OldestStays(max)) = self.user_limit else { return };
        for (namespace, user) in
            self.namespaces.iter().flat_map(|namespace| USERS.map(|user| (namespace, user)))
        {
            if namespace.user_len(user) > max as usize {
                self.fault(format!("{user} has {} connections of {max}", namespace.user_len(user)));
            }
        }
    }

    /// Nobody is refused below the limit.
    fn check_refused(&self, client: usize) {
        let model = lock(&self.model);
        let refused = &model.clients[client];
        let others = model.clients.iter().enumerate().filter(|(other, one)| {
            *other != client && one.namespace == refused.namespace && one.user == refused.user
        });
        let lives = others.filter(|(other, _)| !self.has_ended(*other)).count();
        drop(model);
        match self.user_limit {
            Some(UserLimit::OldestStays(max)) if lives >= max as usize => {}
            limit => self.fault(format!("{client} was refused beside {lives}: {limit:?}")),
        }
    }

    // ---- Addresses ----

    fn address(&self, target: &Target) -> Address {
        match target {
            Target::Everyone => Address::Everyone,
            Target::Groups(groups) => match groups[..] {
                [group] => Address::group(GROUPS[group]),
                _ => Address::groups(groups.iter().map(|group| GROUPS[*group])),
            },
            Target::Users(users) => match users[..] {
                [user] => Address::user(USERS[user]),
                _ => Address::users(users.iter().map(|user| USERS[*user])),
            },
            Target::Client(client) => Address::Connection(self.id_of(*client)),
        }
    }

    fn place_of(&self, target: &Target) -> Place {
        match target {
            Target::Everyone | Target::Groups(_) | Target::Users(_) => Place::Log,
            Target::Client(client) => Place::Mailbox(self.id_of(*client).shard()),
        }
    }
}
