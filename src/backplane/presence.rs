//! The presence of one hub over all nodes.
//!
//! The engine announces which users join and leave on this node. A task for each hub, the *announcer*, writes that into the
//! log; the ingest task reads what all nodes have written, in one order, and keeps the [`Roster`]; the hub's clients ask it.
//! A node that begins, or has missed a part of the log, asks all nodes to tell everything, and announces nothing before they
//! have, so that nobody is announced who was present elsewhere. Does not know engines.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use shardcast_backplane::NodeId;
use shardcast_engine::PresenceKind;
use tokio::sync::{Notify, mpsc, watch};

use super::cluster::Cluster;
use super::entry::{Entry, PresenceNews, UserState};
use super::roster::{Attendee, Change, Roster};
use crate::presence::{Metadata, PresenceChange, Present};

/// Bytes of names and metadata in one entry, when a node tells everything.
const PART_BYTES: usize = 32 << 10;

/// After so many heartbeats of this node, the others' answers are complete if each has answered: by then they are known.
const TICKS_MIN: u64 = 2;
/// After so many, a node that does not answer is not waited for any more.
const TICKS_MAX: u64 = 10;

/// The presence of one hub, as clients and tasks of this node share it.
#[derive(Debug)]
pub(crate) struct HubPresence {
    state: Mutex<State>,
    /// The announcer must ask all nodes, and tell everything itself.
    must_ask: Notify,
    /// The announcer must tell everything.
    is_asked: Notify,
    /// Whether this node knows who is present elsewhere.
    is_complete: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    roster: Roster,
    /// By this node's heartbeats: when it has asked.
    asked: Option<u64>,
    /// The nodes that have told everything since.
    answered: BTreeSet<NodeId>,
}

impl HubPresence {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            must_ask: Notify::new(),
            is_asked: Notify::new(),
            is_complete: watch::Sender::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- What the ingest task has read ----

    /// A node has asked; the same for this node, at this number of its heartbeats.
    pub(super) fn asked(&self, by_this_node_at: Option<u64>) {
        if let Some(tick) = by_this_node_at {
            let mut state = self.lock();
            (state.asked, state.answered) = (Some(tick), BTreeSet::new());
        }
        self.is_asked.notify_one();
    }

    /// This node has read its heartbeat of that number; the others that are alive.
    pub(super) fn tick(&self, tick: u64, others: &[NodeId]) {
        if *self.is_complete.borrow() {
            return;
        }
        let state = self.lock();
        let Some(since) = state.asked.map(|asked| tick.saturating_sub(asked)) else { return };
        let have_answered = || others.iter().all(|other| state.answered.contains(other));
        if since >= TICKS_MAX || (since >= TICKS_MIN && have_answered()) {
            drop(state);
            self.is_complete.send_replace(true);
        }
    }

    pub(super) fn told_all(
        &self,
        node: NodeId,
        is_first: bool,
        is_last: bool,
        users: Vec<UserState<'_>>,
    ) -> Vec<Change> {
        let mut state = self.lock();
        if is_last {
            state.answered.insert(node);
        }
        state.roster.tell_all(node, is_first, is_last, users.into_iter().map(Attendee::from).collect())
    }

    pub(super) fn changed(&self, node: NodeId, news: PresenceNews<'_>) -> Option<Change> {
        let attendee = Attendee::from(news.state);
        let roster = &mut self.lock().roster;
        if news.is_present {
            roster.join(node, attendee)
        } else {
            roster.leave(node, attendee.group.as_ref(), &attendee.user)
        }
    }

    pub(super) fn forget(&self, node: NodeId) -> Vec<Change> {
        self.lock().roster.forget(node)
    }

    /// This node has missed a part of the log, or the others have forgotten its users.
    pub(super) fn ask_again(&self) {
        self.must_ask.notify_one();
    }

    // ---- What clients ask ----

    /// Returns when this node knows who is present elsewhere.
    pub(super) async fn is_complete(&self) {
        is_true(&mut self.is_complete.subscribe()).await;
    }

    /// How many users are present, on all nodes.
    pub(crate) fn len(&self, group: Option<&str>) -> usize {
        self.lock().roster.len(group)
    }

    /// Adds the users who are present on other nodes to those of this one.
    pub(crate) fn add_others(&self, here: NodeId, group: Option<&str>, present: &mut Vec<Present>) {
        let elsewhere = self.lock().roster.elsewhere(here, group);
        let mut by_user: HashMap<Arc<str>, usize> =
            present.iter().enumerate().map(|(index, present)| (present.user.clone(), index)).collect();
        for (nodes, Attendee { user, since, metadata, .. }) in elsewhere {
            match by_user.remove(&user) {
                Some(index) => {
                    let known = &mut present[index];
                    known.connections += nodes;
                    known.since = known.since.min(since);
                }
                None => present.push(Present { user, connections: nodes, since, metadata }),
            }
        }
    }
}

impl From<UserState<'_>> for Attendee {
    fn from(state: UserState<'_>) -> Self {
        Self {
            group: state.group.map(Arc::from),
            user: state.user.into(),
            since: SystemTime::UNIX_EPOCH + Duration::from_millis(state.since),
            metadata: state.metadata.and_then(Metadata::from_json),
        }
    }
}

impl<'a> From<&'a Attendee> for UserState<'a> {
    fn from(attendee: &'a Attendee) -> Self {
        let since = attendee.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            group: attendee.group.as_deref(),
            user: &attendee.user,
            since: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            metadata: attendee.metadata.as_ref().map(|metadata| metadata.as_json().as_bytes()),
        }
    }
}

/// Returns when the value is true.
async fn is_true(value: &mut watch::Receiver<bool>) {
    let _ = value.wait_for(|is| *is).await; // its sender is kept
}

/// Writes into the log who is present on this node in one hub, as the engine announces it. Ends with the hub.
pub(super) struct Announcer {
    pub(super) cluster: Cluster,
    pub(super) hub: Arc<str>,
    pub(super) presence: Arc<HubPresence>,
    /// What has been announced of this node, by group and user.
    pub(super) announced: HashMap<(Option<Arc<str>>, Arc<str>), Attendee>,
}

impl Announcer {
    pub(super) async fn run(mut self, mut changes: mpsc::Receiver<PresenceChange>) {
        self.presence.ask_again();
        let mut complete = self.presence.is_complete.subscribe();
        let mut is_complete = false;
        loop {
            tokio::select! {
                biased;
                () = self.presence.must_ask.notified() => {
                    self.append(&Entry::AskPresence { hub: &self.hub }).await; // this node is asked, too
                }
                () = self.presence.is_asked.notified() => self.tell_all(is_complete).await,
                () = is_true(&mut complete), if !is_complete => {
                    is_complete = true;
                    self.tell_all(true).await;
                }
                change = changes.recv() => {
                    let Some(change) = change else { return };
                    self.note(change, is_complete).await;
                }
            }
        }
    }

    async fn note(&mut self, change: PresenceChange, tells: bool) {
        let PresenceChange { group, user, kind, since, metadata, .. } = change;
        let attendee = Attendee { group, user, since, metadata };
        let is_present = kind == PresenceKind::Joined;
        if tells {
            let state = UserState::from(&attendee);
            self.append(&Entry::PresenceChange(PresenceNews { hub: &self.hub, is_present, state })).await;
        }
        let key = (attendee.group.clone(), attendee.user.clone());
        if is_present {
            self.announced.insert(key, attendee);
        } else {
            self.announced.remove(&key);
        }
        if self.announced.capacity() > 64 && self.announced.len() < self.announced.capacity() / 4 {
            self.announced.shrink_to(2 * self.announced.len()); // a map does not shrink by itself
        }
    }

    /// Tells who is present on this node; before it `tells` anything, that is nobody.
    async fn tell_all(&self, tells: bool) {
        let (mut users, mut bytes, mut is_first) = (Vec::new(), 0, true);
        for attendee in self.announced.values().filter(|_| tells) {
            let state = UserState::from(attendee);
            bytes += state.user.len()
                + state.group.map_or(0, str::len)
                + state.metadata.map_or(0, <[u8]>::len)
                + size_of::<u64>();
            users.push(state);
            if bytes >= PART_BYTES {
                let users = std::mem::take(&mut users);
                self.append(&Entry::Present { hub: &self.hub, is_first, is_last: false, users }).await;
                (bytes, is_first) = (0, false);
            }
        }
        self.append(&Entry::Present { hub: &self.hub, is_first, is_last: true, users }).await;
    }

    /// Appends an entry, in its order with the others. Waits for room, and not until it was read back.
    async fn append(&self, entry: &Entry<'_>) {
        if let Err(error) = self.cluster.announce(entry).await {
            tracing::debug!(%error, hub = &*self.hub, "who is present is not told to other nodes");
        }
    }
}
