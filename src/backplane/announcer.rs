//! What this node tells the others of one hub: who is present here, and how many connections there are.
//!
//! One task for each hub. Changes of presence are told at once, as the engine announces them; counts and metadata that have
//! changed once for each heartbeat, whatever the number of joins; and everything to a node that asks, in an order with the
//! rest. The task waits for room in the log, and for nothing else. Ends with the hub. Does not know what others tell.

use std::collections::HashMap;
use std::sync::Arc;

use shardcast_engine::{Namespace, NamespaceChange, PresenceKind};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::cluster::{Cluster, FindNamespace};
use super::entry::{Entry, NodeCounts, PresenceNews, UserState};
use super::hub_state::HubState;
use super::roster::Attendee;
use crate::presence::{Metadata, PresenceChange};

/// Bytes of names and metadata in one entry.
const PART_BYTES: usize = 32 << 10;

/// A user in a group, or in the hub.
type Who = (Option<Arc<str>>, Arc<str>);

/// The task's state.
pub(super) struct Announcer {
    cluster: Cluster,
    hub: Arc<str>,
    state: Arc<HubState>,
    namespace: FindNamespace,
    /// What has been announced of this node.
    announced: HashMap<Who, Attendee>,
    /// The number of connections that was told last.
    told_connections: usize,
}

impl Announcer {
    pub(super) fn new(
        cluster: Cluster,
        hub: Arc<str>,
        state: Arc<HubState>,
        namespace: FindNamespace,
    ) -> Self {
        Self { cluster, hub, state, namespace, announced: HashMap::new(), told_connections: 0 }
    }

    pub(super) async fn run(mut self, mut changes: mpsc::Receiver<PresenceChange>) {
        self.state.ask_again();
        let mut complete = self.state.watch_complete();
        // Before it is, this node announces nobody: who is here may be present elsewhere.
        let mut is_complete = false;
        let mut ticks = interval(self.cluster.heartbeat_interval());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = self.state.must_ask() => {
                    self.append(&Entry::AskState { hub: &self.hub }).await; // this node is asked, too
                }
                () = self.state.is_asked() => self.tell_all(is_complete).await,
                () = is_true(&mut complete), if !is_complete => {
                    is_complete = true;
                    self.tell_all(true).await;
                }
                _ = ticks.tick() => self.tell_changes(is_complete).await,
                change = changes.recv() => {
                    let Some(change) = change else { return };
                    self.note(change, is_complete).await;
                }
            }
        }
    }

    /// Tells of a user who has joined or left.
    async fn note(&mut self, change: PresenceChange, tells: bool) {
        let PresenceChange { group, user, kind, since, metadata, .. } = change;
        let is_present = kind == PresenceKind::Joined;
        // The engine announces the metadata of the join; it may have been set again since then.
        let metadata =
            if is_present { self.metadata_of(group.as_deref(), &user).or(metadata) } else { metadata };
        let attendee = Attendee { group, user, since, metadata };
        if tells {
            self.tell_presence(is_present, &attendee).await;
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

    fn metadata_of(&self, group: Option<&str>, user: &str) -> Option<Metadata> {
        Metadata::from_json(&(self.namespace)()?.metadata_in(group, user)?)
    }

    /// Tells what has changed since it was told last.
    async fn tell_changes(&mut self, tells_presence: bool) {
        let Some(namespace) = (self.namespace)() else { return };
        let Some(changes) = namespace.take_changes() else {
            self.look_at_metadata(&namespace);
            return self.tell_all(tells_presence).await;
        };
        let (mut groups, mut users, mut set) = (HashMap::new(), HashMap::new(), HashMap::new());
        for change in changes {
            match change {
                NamespaceChange::Members { group, connections } => drop(groups.insert(group, connections)),
                NamespaceChange::Connections { user, connections } => drop(users.insert(user, connections)),
                NamespaceChange::Metadata { group, user, metadata } => {
                    drop(set.insert((group, user), metadata))
                }
                _ => {}
            }
        }
        for (who, metadata) in set {
            if self.has_other_metadata(&who, &metadata) && tells_presence {
                self.tell_presence(true, &self.announced[&who]).await;
            }
        }
        let connections = namespace.len();
        if groups.is_empty() && users.is_empty() && connections == self.told_connections {
            return;
        }
        self.told_connections = connections;
        let mut parts = Parts::new(connections);
        for (name, count) in &groups {
            parts.of_group(name, *count);
        }
        for (name, count) in &users {
            parts.of_user(name, *count);
        }
        for Part { counts, .. } in parts.end() {
            self.append(&Entry::CountChanges { hub: &self.hub, counts }).await;
        }
    }

    /// Keeps the metadata of an announced user; true if it is another one than before.
    fn has_other_metadata(&mut self, who: &Who, json: &[u8]) -> bool {
        let Some(attendee) = self.announced.get_mut(who) else { return false };
        let now = Metadata::from_json(json);
        let is_other = now.is_some() && now != attendee.metadata;
        if is_other {
            attendee.metadata = now;
        }
        is_other
    }

    /// Keeps the metadata of all announced users.
    fn look_at_metadata(&mut self, namespace: &Namespace) {
        for who in self.announced.keys().cloned().collect::<Vec<_>>() {
            if let Some(json) = namespace.metadata_in(who.0.as_deref(), &who.1) {
                self.has_other_metadata(&who, &json);
            }
        }
    }

    async fn tell_presence(&self, is_present: bool, attendee: &Attendee) {
        let state = UserState::from(attendee);
        self.append(&Entry::PresenceChange(PresenceNews { hub: &self.hub, is_present, state })).await;
    }

    /// Tells the whole state of this node: all counts, and, if `tells_presence`, all users who are present.
    async fn tell_all(&mut self, tells_presence: bool) {
        let Some(namespace) = (self.namespace)() else { return };
        self.told_connections = namespace.len();
        let (groups, users) = (namespace.groups(), namespace.users());
        let mut parts = Parts::new(self.told_connections);
        for attendee in self.announced.values().filter(|_| tells_presence) {
            parts.of_attendee(attendee);
        }
        for group in &groups {
            parts.of_group(&group.name, group.connections);
        }
        for (name, count) in &users {
            parts.of_user(name, *count);
        }
        let (hub, mut is_first) = (&*self.hub, true);
        let mut parts = parts.end().into_iter().peekable();
        while let Some(Part { users, counts, .. }) = parts.next() {
            let is_last = parts.peek().is_none();
            self.append(&Entry::State { hub, is_first, is_last, users, counts }).await;
            is_first = false;
        }
    }

    /// Appends an entry, in its order with the others. Waits for room, and not until it was read back.
    async fn append(&self, entry: &Entry<'_>) {
        if let Err(error) = self.cluster.announce(entry).await {
            tracing::debug!(%error, hub = &*self.hub, "the state of this node is not told to other nodes");
        }
    }
}

/// Returns when the value is true.
async fn is_true(value: &mut watch::Receiver<bool>) {
    let _ = value.wait_for(|is| *is).await; // its sender is kept
}

/// What is told in one entry.
struct Part<'a> {
    users: Vec<UserState<'a>>,
    counts: NodeCounts<'a>,
    bytes: usize,
}

/// What is told, in parts of a bounded size: at least one.
struct Parts<'a> {
    full: Vec<Part<'a>>,
    last: Part<'a>,
}

impl<'a> Parts<'a> {
    fn new(connections: usize) -> Self {
        Self { full: Vec::new(), last: Part::new(connections as u64) }
    }

    fn of_attendee(&mut self, attendee: &'a Attendee) {
        let state = UserState::from(attendee);
        let names = state.user.len() + state.group.map_or(0, str::len);
        self.add(names + state.metadata.map_or(0, <[u8]>::len)).users.push(state);
    }

    fn of_group(&mut self, name: &'a str, connections: usize) {
        self.add(name.len()).counts.groups.push((name, connections as u64));
    }

    fn of_user(&mut self, name: &'a str, connections: usize) {
        self.add(name.len()).counts.users.push((name, connections as u64));
    }

    /// The part to which something of so many bytes belongs.
    fn add(&mut self, bytes: usize) -> &mut Part<'a> {
        if self.last.bytes >= PART_BYTES {
            let next = Part::new(self.last.counts.connections);
            self.full.push(std::mem::replace(&mut self.last, next));
        }
        self.last.bytes += bytes + size_of::<u64>();
        &mut self.last
    }

    fn end(mut self) -> Vec<Part<'a>> {
        self.full.push(self.last);
        self.full
    }
}

impl Part<'_> {
    fn new(connections: u64) -> Self {
        let counts = NodeCounts { connections, groups: Vec::new(), users: Vec::new() };
        Self { users: Vec::new(), counts, bytes: 0 }
    }
}
