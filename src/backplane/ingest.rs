//! From the log that all nodes share into the engine of this one.
//!
//! One task for each node reads every entry and publishes it, those of this node too. It waits for room in the engine's
//! publication log, and never for a client: that is left to the publishers on this node, and to receipts. So a client that
//! has stopped reading delays no other node, and a shard that lags delays the reading, which is counted. Owned by the
//! runtime on which the engine got its backplane; ends with the engine. Does not know sockets, nor which broker it is.

use std::collections::HashMap;
use std::future::{pending, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::Duration;

use shardcast_backplane::{
    Backplane, ClusterLog, ClusterLogConfig, Connection, Entries, EntryPosition, Error, Event, GapCause,
    NodeId, Start,
};
use shardcast_engine::{Address, Enqueued, Namespace, PublishError, Wants};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use super::answers;
use super::cluster::{Cluster, Counters, Ingested, Origin, Registration, Tasks, micros};
use super::entry::{Answer, AnswerContent, Command, Entry, Place, Published};
use super::roster::{Attendee, Change};
use super::{BackplaneConfig, BackplaneState, MissedCause, MissedMessages, OutagePolicy};
use crate::address::on_or_nobody;
use crate::clock::instant_of;
use crate::connection_id::ConnectionId;
use crate::presence::PresenceChange;

/// Between two attempts to reach the broker.
pub(super) const RETRY: Duration = Duration::from_millis(200);

/// Ids of connections in one answer: far fewer bytes than brokers take in a message.
const MEMBERS_PER_PART: usize = 8192;

/// For how long a node that leaves tries to say so.
const FAREWELL: Duration = Duration::from_secs(1);

impl Cluster {
    /// Takes part in the log from now on, on the current runtime, until the engine has `ended`.
    pub(crate) fn start<B, F>(
        mut connect: impl FnMut() -> F + Send + 'static,
        config: BackplaneConfig,
        ended: impl Future<Output = ()> + Send + 'static,
    ) -> Self
    where
        B: Backplane,
        F: Future<Output = Result<B, Error>> + Send,
    {
        let node = NodeId::random();
        let (cluster, Tasks { log, state, nodes, hubs, questions, counters }) =
            Self::new(node, config.clone());
        tokio::spawn(async move {
            let took_part = async {
                let Some(backplane) = until_reached(node, config.outage, &mut connect).await else { return };
                let answers = answers::pass_on(backplane.clone(), node, questions);
                let ingest = Ingest::new(backplane, node, config, (hubs, nodes, counters));
                tokio::select! {
                    () = ingest.take_part(&log, &state) => {}
                    () = async { answers.await; pending().await } => {}
                }
            };
            let end = {
                let mut took_part = pin!(took_part);
                tokio::select! {
                    biased;
                    () = ended => {
                        let farewell = say_farewell(log.borrow().clone());
                        tokio::select! {
                            () = farewell => {}
                            () = &mut took_part => {}
                        }
                        BackplaneState::Left
                    }
                    () = &mut took_part => BackplaneState::Failed,
                }
            };
            state.send_replace(end);
        });
        cluster
    }
}

/// Repeats an attempt to reach the broker until it succeeds. None if the broker refuses.
async fn until_reached<T, F: Future<Output = Result<T, Error>>>(
    node: NodeId,
    outage: OutagePolicy,
    mut attempt: impl FnMut() -> F,
) -> Option<T> {
    let mut is_told = false;
    loop {
        match attempt().await {
            Ok(reached) => return Some(reached),
            Err(error) if error.is_retryable() => {
                if !std::mem::replace(&mut is_told, true) {
                    tracing::warn!(
                        %node,
                        %error,
                        ?outage,
                        "the backplane's broker cannot be reached: this node is alone until it can"
                    );
                }
                sleep(RETRY).await;
            }
            Err(error) => {
                tracing::error!(%node, %error, "the backplane's broker refuses: this node stays alone");
                return None;
            }
        }
    }
}

/// Tells the others that this node leaves, so that nobody waits for its answers.
async fn say_farewell(log: Option<ClusterLog<Origin>>) {
    let entry = Entry::Heartbeat { is_leaving: true }.encode();
    let (Some(log), Ok(entry)) = (log, entry) else { return };
    if let Ok(appending) = log.try_append_from(entry, Origin::of_nobody()) {
        let _ = timeout(FAREWELL, appending).await; // otherwise the others find out by its silence
    }
}

/// The task's state.
struct Ingest<B> {
    backplane: B,
    node: NodeId,
    config: BackplaneConfig,
    hubs: HashMap<Arc<str>, Registration>,
    new_hubs: mpsc::UnboundedReceiver<Registration>,
    alive: Alive,
    /// Nodes that are not alive any more, and whose users may still come back: until this heartbeat of this node.
    absent: HashMap<NodeId, u64>,
    /// The last entry of each node.
    read_last: HashMap<NodeId, EntryPosition>,
    /// The other nodes that are alive.
    others: Arc<[NodeId]>,
    nodes: watch::Sender<Arc<[NodeId]>>,
    counters: Arc<Counters>,
}

impl<B: Backplane> Ingest<B> {
    fn new(
        backplane: B,
        node: NodeId,
        config: BackplaneConfig,
        (new_hubs, nodes, counters): (
            mpsc::UnboundedReceiver<Registration>,
            watch::Sender<Arc<[NodeId]>>,
            Arc<Counters>,
        ),
    ) -> Self {
        let ticks_max = config.node_timeout.div_duration_f64(config.heartbeat_interval).ceil() as u64;
        Self {
            backplane,
            node,
            config,
            hubs: HashMap::new(),
            new_hubs,
            alive: Alive::new(node, ticks_max),
            absent: HashMap::new(),
            read_last: HashMap::new(),
            others: Arc::default(),
            nodes,
            counters,
        }
    }

    /// Returns only if the broker refuses to be read.
    async fn take_part(
        mut self,
        log: &watch::Sender<Option<ClusterLog<Origin>>>,
        state: &watch::Sender<BackplaneState>,
    ) {
        let config = ClusterLogConfig {
            batch_bytes_max: self.config.batch_bytes_max,
            queue_bytes_max: self.config.queue_bytes_max,
        };
        let join = || ClusterLog::join(self.backplane.clone(), self.node, Start::Tail, config.clone());
        let Some((joined, entries)) = until_reached(self.node, self.config.outage, join).await else {
            return;
        };
        log.send_replace(Some(joined.clone()));
        tracing::info!(node = %self.node, "this node takes part in the backplane");
        let report = report(self.backplane.connection(), state);
        let beat = beat(joined.clone(), self.config.heartbeat_interval, self.counters.clone());
        tokio::select! {
            () = self.read(entries, joined) => {}
            () = report => {}
            () = beat => {}
        }
    }

    /// Reads every entry. Returns only if the broker refuses.
    async fn read(&mut self, mut entries: Entries<B::Reader, Origin>, log: ClusterLog<Origin>) {
        loop {
            let event = entries.next().await;
            while let Ok(registration) = self.new_hubs.try_recv() {
                registration.state.are_alive(self.others.clone());
                self.hubs.insert(registration.name.clone(), registration);
            }
            match event {
                Ok(Event::Entry { node, payload, origin, position }) => {
                    self.counters.entries.fetch_add(1, Relaxed); // Relaxed: a counter, as all here
                    self.has_read(node, position);
                    match Entry::decode(&payload) {
                        Ok(entry) => self.execute(node, entry, origin, &log).await,
                        Err(error) => {
                            self.counters.skipped.fetch_add(1, Relaxed);
                            tracing::debug!(%node, %error, "an entry of the log cannot be used");
                        }
                    }
                }
                Ok(Event::Gap(gap)) => self.tell_of_gap(match gap.cause {
                    GapCause::Retention => MissedCause::Retention,
                    GapCause::Epoch => MissedCause::BrokerLoss,
                }),
                Ok(Event::Missing { .. }) => self.tell_of_gap(MissedCause::BrokerLoss),
                Err(error) => {
                    tracing::error!(node = %self.node, %error, "the backplane cannot be read: this node is alone");
                    return;
                }
            }
        }
    }

    /// Whatever a node writes is a sign of its life.
    fn has_read(&mut self, node: NodeId, position: EntryPosition) {
        self.read_last.insert(node, position);
        self.absent.remove(&node);
        if self.alive.heard(node) {
            self.publish_nodes();
        }
    }

    async fn execute(
        &mut self,
        node: NodeId,
        entry: Entry<'_>,
        origin: Option<Origin>,
        log: &ClusterLog<Origin>,
    ) {
        let mut enqueued = None;
        match entry {
            Entry::Heartbeat { is_leaving: true } => {
                if self.alive.left(node) {
                    self.are_gone(&[node]);
                }
            }
            Entry::Heartbeat { is_leaving: false } => {
                if node == self.node {
                    self.tick(log);
                }
            }
            Entry::ListMembers { hub, to, question } => {
                if node != self.node {
                    self.list_members(node, hub, &to.on(Some(self.node)), question).await;
                }
            }
            Entry::Forget { node: gone, read_last } => {
                let gone = NodeId::from_bits(gone);
                // Every node decides alike, because all read the same entries before this one.
                if self.read_last.get(&gone).is_none_or(|last| place_of(*last) <= read_last) {
                    self.forget(gone, node);
                }
            }
            Entry::AskState { hub } => {
                if let Some(hub) = self.hubs.get(hub) {
                    hub.state.asked((node == self.node).then_some(self.alive.tick));
                }
            }
            Entry::State { hub, is_first, is_last, users, counts } => {
                if let Some(hub) = self.hubs.get(hub) {
                    let changes = hub.state.told_all(node, is_first, is_last, users, &counts);
                    self.announce(hub, changes, node);
                }
            }
            Entry::CountChanges { hub, counts } => {
                if let Some(hub) = self.hubs.get(hub) {
                    hub.state.counts_changed(node, &counts);
                }
            }
            Entry::PresenceChange(news) => {
                if let Some(hub) = self.hubs.get(news.hub) {
                    let change = hub.state.presence_changed(node, news);
                    self.announce(hub, change, node);
                }
            }
            Entry::Published(published) => {
                let wants = match &origin {
                    Some(origin) => origin.wants,
                    None if published.receipt.is_some() => Wants::Outcome,
                    None => Wants::Nothing,
                };
                let accepted = self.publish(&published, wants).await;
                if let (None, Some(question)) = (&origin, published.receipt) {
                    self.answer_receipt(node, question, accepted);
                } else {
                    enqueued = accepted;
                }
            }
            Entry::Command { hub, id, command } => self.carry_out(node, hub, id, command).await,
        }
        if let Some(Origin { told, .. }) = origin {
            let _ = told.send(Ingested { enqueued, others: self.others.clone() }); // nobody may wait any more
        }
    }

    /// Publishes in the engine. None if there is no such hub here, or nothing that may be published.
    async fn publish(
        &self,
        published: &Published<'_>,
        wants: Wants,
    ) -> Option<Result<Enqueued, PublishError>> {
        let (namespace, publication) = (self.namespace(published.hub), published.on(self.node));
        let (Some(namespace), Ok(publication)) = (namespace, publication) else {
            self.counters.skipped.fetch_add(1, Relaxed);
            tracing::debug!(hub = published.hub, "a message of the log is for no hub of this node");
            return None;
        };
        Some(self.wait_for_room(|| namespace.enqueue(publication.clone(), wants)).await)
    }

    /// Repeats what has found no place in the queue for room, which publishers of this node fill.
    async fn wait_for_room<T, F: Future<Output = Result<T, PublishError>>>(
        &self,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, PublishError> {
        let mut began = None;
        let result = loop {
            let mut attempt = pin!(attempt());
            let mut polled = poll_fn(|context| Poll::Ready(attempt.as_mut().poll(context))).await;
            if polled.is_pending() {
                began.get_or_insert_with(Instant::now);
                polled = Poll::Ready(attempt.await);
            }
            match polled {
                Poll::Ready(Err(PublishError::Overloaded)) => {
                    began.get_or_insert_with(Instant::now);
                    sleep(Duration::from_millis(1)).await;
                }
                Poll::Ready(result) => break result,
                Poll::Pending => {}
            }
        };
        if let Some(began) = began {
            self.counters.waits.fetch_add(1, Relaxed);
            self.counters.waited_micros.fetch_add(micros(began.elapsed()), Relaxed);
        }
        result
    }

    /// Does something for a connection, if it is one of this node.
    async fn carry_out(&self, asker: NodeId, hub: &str, id: ConnectionId, command: Command<'_>) {
        if id.node() != Some(self.node) {
            return;
        }
        let Some(namespace) = self.namespace(hub) else {
            self.counters.skipped.fetch_add(1, Relaxed);
            return;
        };
        let id = on_or_nobody(id, Some(self.node));
        let result = match command {
            Command::Join(groups) => self.wait_for_room(|| namespace.join_all(id, &groups)).await.map(drop),
            Command::Leave(groups) => self.wait_for_room(|| namespace.leave_all(id, &groups)).await,
            Command::ExpireAt(at) => {
                let at = at.map(|at| instant_of(at, namespace.now()));
                self.wait_for_room(|| namespace.expire_at(id, at)).await
            }
            Command::SetMetadata(metadata) => {
                let metadata: Arc<[u8]> = metadata.into();
                self.wait_for_room(|| namespace.set_metadata(id, metadata.clone())).await
            }
            Command::ListGroups { question } => {
                let ask = || {
                    let (sender, groups) = oneshot::channel();
                    let send = move |groups: Vec<Arc<str>>| drop(sender.send(groups));
                    let asked = namespace.groups_of(id, send);
                    async move { asked.await.map(|()| groups) }
                };
                self.wait_for_room(ask).await.map(|groups| {
                    let names = |groups: Vec<Arc<str>>| groups.iter().map(ToString::to_string).collect();
                    let content = async move { Some(AnswerContent::Groups(groups.await.ok().map(names))) };
                    self.answer(asker, question, content);
                })
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "a command of another node was not carried out");
        }
    }

    /// Answers with the connections that the address has here, in parts.
    async fn list_members(&self, asker: NodeId, hub: &str, to: &Address, question: u64) {
        let (sender, mut parts) = mpsc::unbounded_channel();
        if let Some(namespace) = self.namespace(hub) {
            let collect = || {
                let sender = sender.clone();
                namespace.collect_members(to, move |ids| drop(sender.send(ids)))
            };
            if let Err(error) = self.wait_for_room(collect).await {
                tracing::debug!(%error, "the members of a target are not listed for another node");
                return;
            }
        }
        drop(sender);
        let (backplane, node) = (self.backplane.clone(), self.node);
        tokio::spawn(async move {
            while let Some(ids) = parts.recv().await {
                for ids in ids.chunks(MEMBERS_PER_PART) {
                    let content = AnswerContent::Members { ids: ids.to_vec(), is_last: false };
                    tell(&backplane, node, asker, question, content).await;
                }
            }
            let last = AnswerContent::Members { ids: Vec::new(), is_last: true };
            tell(&backplane, node, asker, question, last).await;
        });
    }

    fn answer_receipt(&self, asker: NodeId, question: u64, accepted: Option<Result<Enqueued, PublishError>>) {
        self.answer(asker, question, async move {
            let receipt = match accepted {
                Some(enqueued) => enqueued.ok()?.outcome().await.ok()?,
                None => Default::default(), // no client of this node was asked for
            };
            Some(receipt.into())
        });
    }

    /// Tells a node the answer to its question, if there is one.
    fn answer(
        &self,
        asker: NodeId,
        question: u64,
        content: impl Future<Output = Option<AnswerContent>> + Send + 'static,
    ) {
        let (backplane, node) = (self.backplane.clone(), self.node);
        tokio::spawn(async move {
            if let Some(content) = content.await {
                tell(&backplane, node, asker, question, content).await;
            }
        });
    }

    /// The connections of a hub of this node.
    fn namespace(&self, hub: &str) -> Option<Namespace> {
        (self.hubs.get(hub)?.hooks.namespace)()
    }

    /// This node has read its own heartbeat: who is silent, and whose time to come back is over?
    fn tick(&mut self, log: &ClusterLog<Origin>) {
        let silent = self.alive.tick();
        self.are_gone(&silent);
        let tick = self.alive.tick;
        for gone in self.absent.extract_if(|_, due| *due <= tick).map(|(node, _)| node) {
            let read_last = self.read_last.get(&gone).copied().map(place_of).unwrap_or_default();
            let entry = Entry::Forget { node: gone.to_bits(), read_last }.encode();
            // If there is no room, another node does it, or the users stay until somebody asks.
            let _ = entry.map(|entry| drop(log.try_append_from(entry, Origin::of_nobody())));
        }
        self.hubs.retain(|_, hub| (hub.hooks.namespace)().is_some());
        for hub in self.hubs.values() {
            hub.state.tick(tick, &self.others);
        }
    }

    /// These nodes are not alive any more.
    fn are_gone(&mut self, nodes: &[NodeId]) {
        if nodes.is_empty() {
            return;
        }
        let interval = self.config.heartbeat_interval;
        let ticks = self.config.absent_users_timeout.div_duration_f64(interval).ceil() as u64;
        let due = self.alive.tick + ticks;
        self.absent.extend(nodes.iter().map(|node| (*node, due)));
        self.publish_nodes();
    }

    /// The users of a node are not present any more, as `teller` says.
    fn forget(&mut self, gone: NodeId, teller: NodeId) {
        self.absent.remove(&gone);
        if gone != self.node {
            self.read_last.remove(&gone);
        }
        for hub in self.hubs.values() {
            let changes = hub.state.forget(gone);
            self.announce(hub, changes, teller);
            if gone == self.node {
                hub.state.ask_again(); // this node was away, and its users are here
            }
        }
    }

    /// Passes changes of presence on, which `teller` has told.
    fn announce(&self, hub: &Registration, changes: impl IntoIterator<Item = Change>, teller: NodeId) {
        let Some(namespace) = (hub.hooks.namespace)() else { return };
        for Change { attendee: Attendee { group, user, since, metadata }, kind } in changes {
            let change =
                PresenceChange { group, user, kind, since, metadata, position: namespace.position() };
            (hub.hooks.on_presence)(change, teller == self.node);
        }
    }

    fn tell_of_gap(&mut self, cause: MissedCause) {
        self.counters.gaps.fetch_add(1, Relaxed);
        tracing::warn!(node = %self.node, ?cause, "this node has missed messages of the backplane");
        for hub in self.hubs.values() {
            (hub.hooks.on_gap)(MissedMessages { cause });
            hub.state.ask_again();
        }
    }

    fn publish_nodes(&mut self) {
        let nodes: Arc<[NodeId]> = self.alive.nodes().collect();
        self.others = nodes.iter().copied().filter(|node| *node != self.node).collect();
        self.nodes.send_replace(nodes);
        for hub in self.hubs.values() {
            hub.state.are_alive(self.others.clone());
        }
    }
}

/// Tells a node an answer to its question, at best effort.
async fn tell<B: Backplane>(
    backplane: &B,
    node: NodeId,
    asker: NodeId,
    question: u64,
    content: AnswerContent,
) {
    let Ok(answer) = (Answer { question, node: node.to_bits(), content }).encode() else { return };
    if let Err(error) = backplane.tell(asker, answer).await {
        tracing::debug!(%error, %asker, "an answer was not sent");
    }
}

/// As entries name it.
fn place_of(position: EntryPosition) -> Place {
    (position.record.epoch, position.record.sequence, position.index)
}

/// Reports whether the broker can be reached, for ever.
async fn report(mut connection: watch::Receiver<Connection>, state: &watch::Sender<BackplaneState>) {
    loop {
        let now = match *connection.borrow_and_update() {
            Connection::Connected => BackplaneState::Connected,
            Connection::Disconnected => BackplaneState::Disconnected,
        };
        state.send_if_modified(|state| std::mem::replace(state, now) != now);
        if connection.changed().await.is_err() {
            return pending().await; // it tells no more
        }
    }
}

/// Says at each interval that this node is alive, for ever, and measures how long that takes.
async fn beat(log: ClusterLog<Origin>, interval: Duration, counters: Arc<Counters>) {
    loop {
        let began = Instant::now();
        let entry = Entry::Heartbeat { is_leaving: false }.encode();
        let Ok(entry) = entry else { return pending().await };
        if log.append_from(entry, Origin::of_nobody()).await.is_ok() {
            counters.round_trip_micros.store(micros(began.elapsed()).max(1), Relaxed);
        }
        tokio::time::sleep_until(began + interval).await;
    }
}

/// Which nodes are alive, by their entries in the log. Time is counted by this node's own heartbeats: while it cannot
/// read, nobody is silent.
#[derive(Debug)]
struct Alive {
    node: NodeId,
    ticks_max: u64,
    tick: u64,
    /// When each was heard last.
    heard: HashMap<NodeId, u64>,
}

impl Alive {
    fn new(node: NodeId, ticks_max: u64) -> Self {
        Self { node, ticks_max, tick: 0, heard: HashMap::from([(node, 0)]) }
    }

    /// An entry of the node was read; true if it was not known.
    fn heard(&mut self, node: NodeId) -> bool {
        self.heard.insert(node, self.tick).is_none()
    }

    /// The node says that it leaves; true if it was known.
    fn left(&mut self, node: NodeId) -> bool {
        node != self.node && self.heard.remove(&node).is_some()
    }

    /// This node has read its own heartbeat. Returns the nodes that count as gone now.
    fn tick(&mut self) -> Vec<NodeId> {
        self.tick += 1;
        let (this, tick, ticks_max) = (self.node, self.tick, self.ticks_max);
        let is_silent = |node: &NodeId, heard: &mut u64| *node != this && tick - *heard > ticks_max;
        self.heard.extract_if(is_silent).map(|(node, _)| node).collect()
    }

    /// In the order of their ids.
    fn nodes(&self) -> impl Iterator<Item = NodeId> {
        let mut nodes: Vec<_> = self.heard.keys().copied().collect();
        nodes.sort_unstable();
        nodes.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_silent_while_this_one_reads_is_gone() {
        let [here, there, other] = [1, 2, 3].map(NodeId::from_bits);
        let mut alive = Alive::new(here, 3);
        assert!(alive.heard(there) && alive.heard(other) && !alive.heard(there));
        for _ in 0..3 {
            assert_eq!(alive.tick(), []);
            assert!(!alive.heard(other));
        }
        assert_eq!(alive.tick(), [there]);
        assert!(alive.nodes().eq([here, other]));
        assert!(alive.left(other) && !alive.left(other) && !alive.left(here));
        assert!(alive.nodes().eq([here]));
        assert!(alive.heard(there), "it is back");
    }
}
