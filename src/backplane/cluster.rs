//! A node's share in the log: how hubs get messages into it, and what is known of the nodes.
//!
//! One for each engine with a backplane, shared by its hubs' clients. Does not know which broker it is: that is a matter of
//! the tasks (`ingest.rs`, `answers.rs`) behind the channels here. Does not keep the engine alive.

use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use shardcast_backplane::{ClusterLog, EntryError, NodeId, TryAppendError};
use shardcast_engine::{Enqueued, Namespace, Publication, PublishError as EngineError, Wants};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

use super::announcer::Announcer;
use super::answers::{Expected, Question};
use super::entry::{AnswerContent, Command, Entry, Published};
use super::hub_state::HubState;
use super::{BackplaneConfig, BackplaneError, MissedMessages, OutagePolicy};
use crate::address::To;
use crate::connection_id::ConnectionId;
use crate::presence::PresenceChange;
use crate::receipt::Receipt;

/// Whether a node takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackplaneState {
    /// The broker has not been reached yet, or its log has not been read yet.
    Joining,
    /// The broker can be reached.
    Connected,
    /// The connection to the broker is lost, and being made again.
    Disconnected,
    /// The broker refuses to be read: this node gets no messages of others any more. Start another engine.
    Failed,
    /// The engine has ended.
    Left,
}

/// What a node has counted since [`Engine::backplane`](crate::Engine::backplane).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackplaneMetrics {
    /// Entries of the log that were read, of all nodes.
    pub entries: u64,
    /// How often this node has missed entries: see [`WsHub::on_gap`](crate::WsHub::on_gap).
    pub gaps: u64,
    /// Entries that could not be used: of another release of the program, or for a hub that this node does not have.
    pub skipped: u64,
    /// How often reading had to wait, because a shard lagged and the publication log was full.
    pub waits: u64,
    /// For how long in all, in microseconds.
    pub waited_micros: u64,
    /// The time from when this node's last heartbeat was given to the log until this node has read it, in microseconds:
    /// how late messages are. 0 before the first one.
    pub round_trip_micros: u64,
    /// Bytes of messages that wait to be appended or to be read back.
    pub queued_bytes: u64,
}

/// The counters behind [`BackplaneMetrics`].
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) entries: AtomicU64,
    pub(super) gaps: AtomicU64,
    pub(super) skipped: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) waited_micros: AtomicU64,
    pub(super) round_trip_micros: AtomicU64,
}

/// What this node keeps of an entry of its own until it has read it back.
#[derive(Debug)]
pub(super) struct Origin {
    /// What its publisher wants to wait for on this node.
    pub(super) wants: Wants,
    pub(super) told: oneshot::Sender<Ingested>,
}

impl Origin {
    /// Of an entry that nobody waits for.
    pub(super) fn of_nobody() -> Self {
        Self { wants: Wants::Nothing, told: oneshot::channel().0 }
    }
}

/// An entry of this node has been read back.
#[derive(Debug)]
pub(super) struct Ingested {
    /// None if it was no publication.
    pub(super) enqueued: Option<Result<Enqueued, EngineError>>,
    /// The other nodes that were alive then.
    pub(super) others: Arc<[NodeId]>,
}

/// What the ingest task must know of a hub.
pub(super) struct Registration {
    pub(super) name: Arc<str>,
    pub(super) hooks: Hooks,
    pub(super) state: Arc<HubState>,
}

/// The connections of a hub on this node; none when the hub is gone.
pub(crate) type FindNamespace = Arc<dyn Fn() -> Option<Namespace> + Send + Sync>;

/// How the ingest task reaches a hub, without keeping it alive.
pub(crate) struct Hooks {
    pub(crate) namespace: FindNamespace,
    /// Tells the hub that messages were missed.
    pub(crate) on_gap: Box<dyn Fn(MissedMessages) + Send + Sync>,
    /// Passes a change of presence on; true if this node tells the hub.
    pub(crate) on_presence: Box<dyn Fn(PresenceChange, bool) + Send + Sync>,
}

/// A node's share in the log. A clone is another handle.
#[derive(Debug, Clone)]
pub(crate) struct Cluster(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    node: NodeId,
    config: BackplaneConfig,
    /// None until the broker was reached.
    log: watch::Receiver<Option<ClusterLog<Origin>>>,
    state: watch::Receiver<BackplaneState>,
    nodes: watch::Receiver<Arc<[NodeId]>>,
    hubs: mpsc::UnboundedSender<Registration>,
    /// How many hubs have been made under each name.
    names: Mutex<HashMap<String, usize>>,
    questions: mpsc::UnboundedSender<Question>,
    last_question: AtomicU64,
    counters: Arc<Counters>,
    /// Where this node's tasks run.
    runtime: Handle,
}

/// The other ends of a [`Cluster`]'s channels.
pub(super) struct Tasks {
    pub(super) log: watch::Sender<Option<ClusterLog<Origin>>>,
    pub(super) state: watch::Sender<BackplaneState>,
    pub(super) nodes: watch::Sender<Arc<[NodeId]>>,
    pub(super) hubs: mpsc::UnboundedReceiver<Registration>,
    pub(super) questions: mpsc::UnboundedReceiver<Question>,
    pub(super) counters: Arc<Counters>,
}

/// A hub's way to the other nodes.
#[derive(Debug, Clone)]
pub(crate) struct HubLink {
    cluster: Cluster,
    /// The hub's name, by which the nodes' hubs belong together.
    name: Arc<str>,
    state: Arc<HubState>,
}

/// A message on its way to all nodes: encoded, and what this node publishes if it stays alone.
pub(crate) struct Outgoing {
    entry: Result<Bytes, BackplaneError>,
    alone: Publication,
}

impl Outgoing {
    /// `alone` is what this node publishes if there are no others.
    pub(crate) fn new(published: Published<'_>, alone: Publication) -> Self {
        Self { entry: encode(&Entry::Published(published)), alone }
    }
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registration").field("name", &self.name).finish_non_exhaustive()
    }
}

impl From<EntryError> for BackplaneError {
    fn from(error: EntryError) -> Self {
        match error {
            EntryError::TooLong { len, max } => Self::TooLong { len, max },
            EntryError::Refused(error) => Self::Refused(error.to_string()),
            _ => Self::Left,
        }
    }
}

/// A message was not accepted by all nodes, or not by this one.
#[derive(Debug)]
pub(crate) enum ClusterError {
    Backplane(BackplaneError),
    Engine(EngineError),
}

impl From<BackplaneError> for ClusterError {
    fn from(error: BackplaneError) -> Self {
        Self::Backplane(error)
    }
}

impl From<EngineError> for ClusterError {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

impl Cluster {
    pub(super) fn new(node: NodeId, config: BackplaneConfig) -> (Self, Tasks) {
        let (log_sender, log) = watch::channel(None);
        let (state_sender, state) = watch::channel(BackplaneState::Joining);
        let (nodes_sender, nodes) = watch::channel(Arc::from([node]));
        let (hubs, hubs_receiver) = mpsc::unbounded_channel();
        let (questions, questions_receiver) = mpsc::unbounded_channel();
        let counters = Arc::new(Counters::default());
        let tasks = Tasks {
            log: log_sender,
            state: state_sender,
            nodes: nodes_sender,
            hubs: hubs_receiver,
            questions: questions_receiver,
            counters: counters.clone(),
        };
        let (names, last_question) = (Mutex::default(), AtomicU64::new(0));
        let runtime = Handle::current();
        let shared = Shared {
            node,
            config,
            log,
            state,
            nodes,
            hubs,
            names,
            questions,
            last_question,
            counters,
            runtime,
        };
        (Self(Arc::new(shared)), tasks)
    }

    pub(crate) fn node(&self) -> NodeId {
        self.0.node
    }

    pub(crate) fn state(&self) -> watch::Receiver<BackplaneState> {
        self.0.state.clone()
    }

    pub(crate) fn nodes(&self) -> watch::Receiver<Arc<[NodeId]>> {
        self.0.nodes.clone()
    }

    pub(crate) fn metrics(&self) -> BackplaneMetrics {
        let Counters { entries, gaps, skipped, waits, waited_micros, round_trip_micros } = &*self.0.counters;
        // Relaxed: each stands for itself.
        BackplaneMetrics {
            entries: entries.load(Relaxed),
            gaps: gaps.load(Relaxed),
            skipped: skipped.load(Relaxed),
            waits: waits.load(Relaxed),
            waited_micros: waited_micros.load(Relaxed),
            round_trip_micros: round_trip_micros.load(Relaxed),
            queued_bytes: self.0.log.borrow().as_ref().map_or(0, |log| log.queued_bytes() as u64),
        }
    }

    pub(super) fn heartbeat_interval(&self) -> Duration {
        self.0.config.heartbeat_interval
    }

    /// Where this node's tasks run.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.0.runtime
    }

    /// The way to the other nodes of a hub that is being made.
    pub(crate) fn link(&self, name: &str) -> HubLink {
        let number = {
            let mut names = self.0.names.lock().unwrap_or_else(PoisonError::into_inner);
            let number = names.entry(name.to_owned()).or_default();
            *number += 1;
            *number
        };
        let name: Arc<str> = if number == 1 { name.into() } else { format!("{name}#{number}").into() };
        HubLink { cluster: self.clone(), name, state: Arc::new(HubState::new(self.0.node)) }
    }

    /// Appends an entry that nobody waits for. Returns when there was room for it.
    pub(super) async fn announce(&self, entry: &Entry<'_>) -> Result<(), BackplaneError> {
        let appending = self.log().await?.enqueue_from(encode(entry)?, Origin::of_nobody()).await?;
        drop(appending); // it goes on
        Ok(())
    }

    /// A number under which answers arrive at `expected`, as long as that is kept.
    fn ask(&self) -> (u64, Expected) {
        let number = self.0.last_question.fetch_add(1, Relaxed) + 1; // Relaxed: only unique
        let (question, expected) = Question::new(number);
        let _ = self.0.questions.send(question); // fails when the node has left
        (number, expected)
    }

    fn is_connected(&self) -> bool {
        *self.0.state.borrow() == BackplaneState::Connected
    }

    /// The log, as soon as the broker was reached.
    async fn log(&self) -> Result<ClusterLog<Origin>, BackplaneError> {
        let mut log = self.0.log.clone();
        let log = log.wait_for(Option::is_some).await.map_err(|_| BackplaneError::Left)?;
        log.clone().ok_or(BackplaneError::Left)
    }

    /// Returns when it is known that the broker cannot be reached.
    async fn is_cut_off(&self) {
        let mut state = self.0.state.clone();
        // Fails when the node has left, which the log says, too.
        if state.wait_for(|state| *state != BackplaneState::Connected).await.is_err() {
            std::future::pending().await
        }
    }

    /// Appends an entry, and returns when this node has read it back.
    async fn append(&self, entry: Bytes, wants: Wants) -> Result<Ingested, BackplaneError> {
        let appended = async {
            let (told, ingested) = oneshot::channel();
            self.log().await?.append_from(entry, Origin { wants, told }).await?;
            ingested.await.map_err(|_| BackplaneError::Left)
        };
        let bounded = async {
            timeout(self.0.config.publish_timeout, appended).await.unwrap_or(Err(BackplaneError::Unavailable))
        };
        if self.0.config.outage != OutagePolicy::Fail {
            return bounded.await;
        }
        tokio::select! {
            biased; // cut off from the start, nothing is sent
            () = self.is_cut_off() => Err(BackplaneError::Unavailable),
            done = bounded => done,
        }
    }
}

impl HubLink {
    pub(crate) fn node(&self) -> NodeId {
        self.cluster.0.node
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The hub is made: entries that are read from now on reach it by its hooks, and its state on this node, such as the
    /// `changes` of presence, is told to the others.
    pub(crate) fn begin(&self, hooks: Hooks, changes: mpsc::Receiver<PresenceChange>) {
        let Self { cluster, name, state } = self.clone();
        let announcer = Announcer::new(cluster.clone(), name.clone(), state.clone(), hooks.namespace.clone());
        let registration = Registration { name, hooks, state };
        let _ = cluster.0.hubs.send(registration); // fails when the node has left
        cluster.0.runtime.spawn(announcer.run(changes));
    }

    /// The state of the hub on all nodes, as far as this one knows.
    pub(crate) fn state(&self) -> &HubState {
        &self.state
    }

    /// The same, once the others have told a node that has just begun; but not while the broker cannot be reached.
    pub(crate) async fn complete_state(&self) -> &HubState {
        if self.cluster.is_connected() {
            let _ = timeout(self.cluster.0.config.publish_timeout, self.state.is_complete()).await;
        }
        &self.state
    }

    /// The number under which nodes answer with their receipts, and these.
    pub(crate) fn expect_receipts(&self) -> (u64, Expected) {
        self.cluster.ask()
    }

    /// Publishes on all nodes. Returns when this node has accepted the message.
    async fn enqueue(
        &self,
        namespace: &Namespace,
        outgoing: Outgoing,
        wants: Wants,
    ) -> Result<(Enqueued, Arc<[NodeId]>), ClusterError> {
        let Outgoing { entry, alone } = outgoing;
        if self.cluster.0.config.outage == OutagePolicy::ThisNode && !self.cluster.is_connected() {
            return Ok((namespace.enqueue(alone, wants).await?, Arc::default()));
        }
        let Ingested { enqueued, others } = self.cluster.append(entry?, wants).await?;
        Ok((enqueued.ok_or(BackplaneError::Left)??, others))
    }

    /// Publishes on all nodes. Returns when every client of this node has room.
    pub(crate) async fn publish(self, namespace: Namespace, outgoing: Outgoing) -> Result<(), ClusterError> {
        let (enqueued, _) = self.enqueue(&namespace, outgoing, Wants::Room).await?;
        enqueued.outcome().await.map(drop)?;
        Ok(())
    }

    /// Publishes on all nodes, and collects the outcomes.
    pub(crate) async fn deliver(
        self,
        namespace: Namespace,
        outgoing: Outgoing,
        mut answers: Expected,
    ) -> Result<Receipt, ClusterError> {
        let (enqueued, others) = self.enqueue(&namespace, outgoing, Wants::Outcome).await?;
        let deadline = Instant::now() + self.cluster.0.config.answer_timeout;
        let mut receipt = Receipt::from(enqueued.outcome().await?);
        receipt.nodes_asked += others.len() as u64;
        let add = |_, content| {
            let AnswerContent::Receipt { recipients, delayed, timeout, overflow, disconnected } = content
            else {
                return false;
            };
            let mut part =
                Receipt { recipients, delayed, disconnected, nodes_answered: 1, ..Receipt::default() };
            (part.dropped.timeout, part.dropped.overflow) = (timeout, overflow);
            receipt.add(&part);
            true
        };
        let _ = answers.of_each(&others, deadline, add).await; // the receipt says how many have answered
        Ok(receipt)
    }

    /// Publishes on all nodes without waiting.
    pub(crate) fn try_publish(&self, outgoing: Outgoing) -> Result<(), TrySent> {
        let Outgoing { entry, alone } = outgoing;
        let cluster = &self.cluster;
        match cluster.0.config.outage {
            OutagePolicy::ThisNode if !cluster.is_connected() => return Err(TrySent::Alone(alone)),
            OutagePolicy::Fail if !cluster.is_connected() => {
                return Err(BackplaneError::Unavailable.into());
            }
            _ => {}
        }
        let log = cluster.0.log.borrow().clone().ok_or(BackplaneError::Unavailable)?;
        match log.try_append_from(entry?, Origin::of_nobody()) {
            Ok(appending) => {
                drop(appending); // it goes on
                Ok(())
            }
            Err(TryAppendError::Full(_)) => Err(TrySent::Full),
            Err(TryAppendError::Entry(error)) => Err(BackplaneError::from(error).into()),
        }
    }

    /// Does something for a connection of another node. Returns when this node has read that, so that what is published
    /// afterwards follows it everywhere.
    pub(crate) async fn command(&self, id: ConnectionId, command: Command<'_>) -> Result<(), BackplaneError> {
        let entry = encode(&Entry::Command { hub: &self.name, id, command })?;
        self.cluster.append(entry, Wants::Nothing).await.map(drop)
    }

    /// The connections of a target on other nodes.
    pub(crate) async fn members(&self, to: &To) -> Result<Vec<ConnectionId>, BackplaneError> {
        let (question, mut answers) = self.cluster.ask();
        let entry = encode(&Entry::ListMembers { hub: &self.name, to: to.clone(), question })?;
        let Ingested { others, .. } = self.cluster.append(entry, Wants::Nothing).await?;
        let deadline = Instant::now() + self.cluster.0.config.answer_timeout;
        let mut members = Vec::new();
        let add = |node, content| {
            let AnswerContent::Members { ids, is_last } = content else { return false };
            members.extend(ids.into_iter().map(|id| ConnectionId::new(Some(node), id)));
            is_last
        };
        answers.of_each(&others, deadline, add).await?;
        Ok(members)
    }

    /// The groups of a connection of another node; none if it has disconnected.
    pub(crate) async fn groups_of(&self, id: ConnectionId) -> Result<Option<Vec<Arc<str>>>, BackplaneError> {
        let (question, mut answers) = self.cluster.ask();
        self.command(id, Command::ListGroups { question }).await?;
        let answer = timeout(self.cluster.0.config.answer_timeout, answers.next()).await;
        match answer {
            Ok(Some((_, AnswerContent::Groups(groups)))) => {
                Ok(groups.map(|groups| groups.into_iter().map(Arc::from).collect()))
            }
            _ => Err(BackplaneError::Unavailable),
        }
    }
}

/// Why a message is not on its way to the other nodes.
pub(crate) enum TrySent {
    /// The broker cannot be reached: it goes to the clients of this node only.
    Alone(Publication),
    /// Too much waits.
    Full,
    Failed(BackplaneError),
}

impl From<BackplaneError> for TrySent {
    fn from(error: BackplaneError) -> Self {
        Self::Failed(error)
    }
}

fn encode(entry: &Entry<'_>) -> Result<Bytes, BackplaneError> {
    entry.encode().map_err(|error| BackplaneError::Refused(error.to_string()))
}

/// The time in microseconds, as counters have it.
pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
