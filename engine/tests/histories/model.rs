//! The model: what has been accepted, in one sequence, and what each client must receive of it.
//!
//! Clients are identified by the order of their connections, frames by their number. Knows recipients and
//! policies. Does not know the engine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardcast_engine::{
    ConnectionConfig, ConnectionId, Policy, PresenceChange, PresenceKind, PresenceObserver, Receipt,
};
use testkit::lock;

pub(crate) const GROUPS: [&str; 3] = ["a", "b", "c"];

/// Names of groups, too: a user and a group of one name must not meet.
pub(crate) const USERS: [&str; 2] = ["a", "b"];

pub(crate) type Shared<T> = Arc<Mutex<T>>;

/// The target of a publication.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Everyone,
    /// By their index in `GROUPS`.
    Groups(Vec<usize>),
    /// By their index in `USERS`.
    Users(Vec<usize>),
    Client(usize),
}

#[derive(Debug)]
pub(crate) struct ModelClient {
    /// Which of the two namespaces it is in.
    pub(crate) namespace: usize,
    /// Its index in `USERS`.
    pub(crate) user: Option<usize>,
    pub(crate) config: Arc<ConnectionConfig>,
    /// It is a member of everyone: the engine has adopted it, and its `on_open` is done.
    pub(crate) has_entered: bool,
    pub(crate) id: Option<ConnectionId>,
    pub(crate) groups: BTreeSet<usize>,
    /// Frames that address it, in the order of acceptance.
    pub(crate) expected: Vec<u32>,
    /// How many of them were accepted before its end was commanded.
    pub(crate) closed_at: Option<usize>,
    /// The same, if the end may come earlier.
    pub(crate) may_close_at: Option<usize>,
}

#[derive(Debug, Default)]
pub(crate) struct ModelFrame {
    pub(crate) recipients: Vec<usize>,
    pub(crate) receipt: Option<Receipt>,
    /// The policy of this frame; none where each client's own applies.
    pub(crate) policy: Option<Policy>,
    /// Its `publish` has returned.
    pub(crate) has_returned: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) clients: Vec<ModelClient>,
    pub(crate) frames: Vec<ModelFrame>,
    /// Who was announced as having joined and not as having left, by namespace, group and user.
    pub(crate) shown: BTreeSet<(usize, String, String)>,
    /// The number of announced changes.
    pub(crate) changes: BTreeMap<PresenceKind, usize>,
    /// The faults found so far.
    pub(crate) faults: Vec<String>,
}

impl Model {
    pub(crate) fn recipients(&self, namespace: usize, target: &Target, except: &[usize]) -> Vec<usize> {
        let is_target = |number: usize, client: &ModelClient| {
            client.namespace == namespace
                && match target {
                    Target::Everyone => client.has_entered,
                    Target::Groups(groups) => groups.iter().any(|group| client.groups.contains(group)),
                    Target::Users(users) => {
                        client.has_entered && client.user.is_some_and(|user| users.contains(&user))
                    }
                    Target::Client(one) => *one == number,
                }
        };
        let all = self.clients.iter().enumerate().filter(|(number, client)| is_target(*number, client));
        all.map(|(number, _)| number).filter(|number| !except.contains(number)).collect()
    }

    /// A frame that is about to be sent; returns its number.
    pub(crate) fn new_frame(&mut self, policy: Option<Policy>) -> u32 {
        self.frames.push(ModelFrame { policy, ..ModelFrame::default() });
        (self.frames.len() - 1) as u32
    }

    pub(crate) fn frame_accepted(
        &mut self,
        number: u32,
        namespace: usize,
        target: &Target,
        except: &[usize],
    ) {
        let recipients = self.recipients(namespace, target, except);
        for target in &recipients {
            let client = &mut self.clients[*target];
            if client.closed_at.is_none() && client.may_close_at.is_none() {
                client.expected.push(number);
            }
        }
        self.frames[number as usize].recipients = recipients;
    }

    pub(crate) fn close_accepted(&mut self, namespace: usize, target: &Target, except: &[usize]) {
        for target in self.recipients(namespace, target, except) {
            let client = &mut self.clients[target];
            if client.may_close_at.is_none() {
                client.closed_at.get_or_insert(client.expected.len());
            }
        }
    }

    /// Its close is in flight, and may precede or follow what is accepted now.
    pub(crate) fn may_close(&mut self, client: usize) {
        let client = &mut self.clients[client];
        if client.closed_at.is_none() {
            client.may_close_at.get_or_insert(client.expected.len());
        }
    }

    /// The policy that applies to a frame for a client.
    pub(crate) fn policy(&self, number: u32, client: usize) -> Policy {
        self.frames[number as usize].policy.unwrap_or(self.clients[client].config.policy)
    }

    /// How a frame may be lost for an open client.
    pub(crate) fn losses(&self, number: u32, client: usize) -> Losses {
        let timeout = match self.policy(number, client) {
            Policy::DropMessage { timeout } | Policy::DropConnection { timeout, .. } => Some(timeout),
            Policy::Block | Policy::DropOnHighRtt { .. } => None,
            _ => unreachable!("no history has another policy"),
        };
        let config = &self.clients[client].config;
        let is_tight = config.overflow_frames < 65_536 || config.overflow_bytes < 16 << 20;
        Losses {
            by_timeout: timeout.is_some_and(|timeout| timeout > Duration::ZERO),
            by_overflow: timeout.is_some_and(|timeout| timeout.is_zero() || is_tight),
        }
    }

    /// Whether a frame may be lost for an open client.
    pub(crate) fn may_lose(&self, number: u32, client: usize) -> bool {
        let losses = self.losses(number, client);
        losses.by_timeout || losses.by_overflow
    }
}

/// Notes in the model who joins and leaves, and that both alternate.
#[derive(Debug)]
pub(crate) struct Observer {
    pub(crate) namespace: usize,
    pub(crate) model: Shared<Model>,
    pub(crate) room: Arc<AtomicUsize>,
}

impl PresenceObserver for Observer {
    fn room(&self) -> usize {
        self.room.load(Relaxed)
    }

    fn on_change(&self, change: PresenceChange) {
        let mut model = lock(&self.model);
        let group = change.group.as_deref().unwrap_or("everyone").to_owned();
        let pair = (self.namespace, group, change.user.to_string());
        *model.changes.entry(change.kind).or_default() += 1;
        let is_right = match change.kind {
            PresenceKind::Joined => model.shown.insert(pair),
            PresenceKind::Left => model.shown.remove(&pair),
        };
        if !is_right {
            model.faults.push(format!("announced twice: {change:?}"));
        }
    }
}

/// How a frame may be lost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Losses {
    /// It may wait, and then expire.
    pub(crate) by_timeout: bool,
    /// It may not wait, or the overflow is full.
    pub(crate) by_overflow: bool,
}
