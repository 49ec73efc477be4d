//! The state of one hub over all nodes, as this one knows it: who is present, and how many connections there are.
//!
//! The ingest task reads what all nodes have told (`announcer.rs`), in one order, and keeps it here; the hub's clients ask.
//! A node that begins, or has missed a part of the log, asks all nodes to tell everything, and announces nothing before they
//! have, so that nobody is announced who was present elsewhere. Does not know engines.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use shardcast_backplane::NodeId;
use shardcast_engine::GroupCount;
use tokio::sync::{Notify, watch};

use super::counts::Counts;
use super::entry::{NodeCounts, PresenceNews, UserState};
use super::roster::{Attendee, Change, Roster};
use crate::presence::{Metadata, Present};

/// After so many heartbeats of this node, the others' answers are complete if each has answered: by then they are known.
const TICKS_MIN: u64 = 2;
/// After so many, a node that does not answer is not waited for any more.
const TICKS_MAX: u64 = 10;

/// The state of one hub, as clients and tasks of this node share it.
#[derive(Debug)]
pub(crate) struct HubState {
    state: Mutex<State>,
    /// The announcer must ask all nodes, and tell everything itself.
    must_ask: Notify,
    /// The announcer must tell everything.
    is_asked: Notify,
    /// Whether this node knows the state of the others.
    is_complete: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    roster: Roster,
    counts: Counts,
    /// By this node's heartbeats: when it has asked.
    asked: Option<u64>,
    /// The nodes that have told everything since.
    answered: BTreeSet<NodeId>,
}

impl HubState {
    pub(super) fn new(this_node: NodeId) -> Self {
        let (roster, counts) = (Roster::default(), Counts::new(this_node));
        Self {
            state: Mutex::new(State { roster, counts, asked: None, answered: BTreeSet::new() }),
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
        counts: &NodeCounts<'_>,
    ) -> Vec<Change> {
        let mut state = self.lock();
        state.counts.tell_all(node, is_first, is_last, counts);
        if is_last {
            state.answered.insert(node);
        }
        state.roster.tell_all(node, is_first, is_last, users.into_iter().map(Attendee::from).collect())
    }

    pub(super) fn counts_changed(&self, node: NodeId, counts: &NodeCounts<'_>) {
        self.lock().counts.change(node, counts);
    }

    /// These other nodes are alive.
    pub(super) fn are_alive(&self, others: Arc<[NodeId]>) {
        self.lock().counts.are_alive(others);
    }

    pub(super) fn presence_changed(&self, node: NodeId, news: PresenceNews<'_>) -> Option<Change> {
        let attendee = Attendee::from(news.state);
        let roster = &mut self.lock().roster;
        if news.is_present {
            roster.join(node, attendee)
        } else {
            roster.leave(node, attendee.group.as_ref(), &attendee.user)
        }
    }

    pub(super) fn forget(&self, node: NodeId) -> Vec<Change> {
        let mut state = self.lock();
        state.counts.forget(node);
        state.roster.forget(node)
    }

    /// This node has missed a part of the log, or the others have forgotten its users.
    pub(super) fn ask_again(&self) {
        self.must_ask.notify_one();
    }

    // ---- What the announcer waits for ----

    pub(super) async fn must_ask(&self) {
        self.must_ask.notified().await;
    }

    pub(super) async fn is_asked(&self) {
        self.is_asked.notified().await;
    }

    pub(super) fn watch_complete(&self) -> watch::Receiver<bool> {
        self.is_complete.subscribe()
    }

    // ---- What clients ask ----

    /// Returns when this node knows the state of the others.
    pub(super) async fn is_complete(&self) {
        let _ = self.watch_complete().wait_for(|is| *is).await; // its sender is kept
    }

    /// Connections to other nodes.
    pub(crate) fn connections_elsewhere(&self) -> usize {
        self.lock().counts.connections()
    }

    /// Members of a group on other nodes.
    pub(crate) fn members_elsewhere(&self, group: &str) -> usize {
        self.lock().counts.members(group)
    }

    /// A user's connections to other nodes.
    pub(crate) fn connections_elsewhere_of(&self, user: &str) -> usize {
        self.lock().counts.connections_of(user)
    }

    /// Adds the groups of other nodes to those of this one.
    pub(crate) fn add_groups(&self, groups: &mut Vec<GroupCount>) {
        let mut members: HashMap<_, _> =
            groups.drain(..).map(|group| (group.name, group.connections)).collect();
        let state = self.lock();
        state.counts.add_groups(&mut members);
        groups.extend(members.into_iter().map(|(name, connections)| {
            let users = state.roster.len(Some(&name));
            GroupCount::new(name, connections, users)
        }));
    }

    /// Adds the users of other nodes to those of this one.
    pub(crate) fn add_users(&self, users: &mut Vec<(Arc<str>, usize)>) {
        let mut connections: HashMap<_, _> = users.drain(..).collect();
        self.lock().counts.add_users(&mut connections);
        users.extend(connections);
    }

    /// How many users are present, on all nodes.
    pub(crate) fn present_len(&self, group: Option<&str>) -> usize {
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
