//! The model: what has been accepted, in one sequence, and what each client must hear of it.
//!
//! Clients are known by the number in which they came, frames by theirs. Knows targets and
//! policies. Does not know the engine.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shardcast_engine::{ConnectionConfig, ConnectionId, Policy, Receipt};

pub(crate) const GROUPS: [&str; 3] = ["a", "b", "c"];

pub(crate) type Shared<T> = Arc<Mutex<T>>;

/// Whom something is for.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Everyone,
    /// By their place in `GROUPS`.
    Groups(Vec<usize>),
    Client(usize),
}

#[derive(Debug)]
pub(crate) struct ModelClient {
    /// Which of the two namespaces it is in.
    pub(crate) namespace: usize,
    pub(crate) config: Arc<ConnectionConfig>,
    /// It is among everyone: the engine has taken it over, and its `on_open` is done.
    pub(crate) has_entered: bool,
    pub(crate) id: Option<ConnectionId>,
    pub(crate) groups: BTreeSet<usize>,
    /// Frames for it, in the order in which they were accepted.
    pub(crate) expected: Vec<u32>,
    /// How many of them were accepted before its end was commanded.
    pub(crate) closed_at: Option<usize>,
    /// The same, where the end may come earlier.
    pub(crate) may_close_at: Option<usize>,
}

#[derive(Debug, Default)]
pub(crate) struct ModelFrame {
    pub(crate) targets: Vec<usize>,
    pub(crate) receipt: Option<Receipt>,
    /// The policy of this frame; none where each client's own holds.
    pub(crate) policy: Option<Policy>,
    /// Its `publish` has returned.
    pub(crate) has_returned: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) clients: Vec<ModelClient>,
    pub(crate) frames: Vec<ModelFrame>,
    /// What was found to be wrong.
    pub(crate) faults: Vec<String>,
}

impl Model {
    pub(crate) fn targets(&self, namespace: usize, target: &Target, except: &[usize]) -> Vec<usize> {
        let is_target = |number: usize, client: &ModelClient| {
            client.namespace == namespace
                && match target {
                    Target::Everyone => client.has_entered,
                    Target::Groups(groups) => groups.iter().any(|group| client.groups.contains(group)),
                    Target::Client(one) => *one == number,
                }
        };
        let all = self.clients.iter().enumerate().filter(|(number, client)| is_target(*number, client));
        all.map(|(number, _)| number).filter(|number| !except.contains(number)).collect()
    }

    /// A frame is going to be sent; its number.
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
        let targets = self.targets(namespace, target, except);
        for target in &targets {
            let client = &mut self.clients[*target];
            if client.closed_at.is_none() && client.may_close_at.is_none() {
                client.expected.push(number);
            }
        }
        self.frames[number as usize].targets = targets;
    }

    pub(crate) fn close_accepted(&mut self, namespace: usize, target: &Target, except: &[usize]) {
        for target in self.targets(namespace, target, except) {
            let client = &mut self.clients[target];
            if client.may_close_at.is_none() {
                client.closed_at.get_or_insert(client.expected.len());
            }
        }
    }

    /// Its end is on its way, and may come earlier or later than what is accepted now.
    pub(crate) fn may_close(&mut self, client: usize) {
        let client = &mut self.clients[client];
        if client.closed_at.is_none() {
            client.may_close_at.get_or_insert(client.expected.len());
        }
    }

    /// The policy that a frame is held to on its way to a client.
    pub(crate) fn policy(&self, number: u32, client: usize) -> Policy {
        self.frames[number as usize].policy.unwrap_or(self.clients[client].config.policy)
    }

    /// How a frame may be lost on its way to a client that lives.
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

    /// Whether a frame may be lost on its way to a client that lives.
    pub(crate) fn may_lose(&self, number: u32, client: usize) -> bool {
        let losses = self.losses(number, client);
        losses.by_timeout || losses.by_overflow
    }
}

/// How a frame may be lost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Losses {
    /// It may wait, and then its time is over.
    pub(crate) by_timeout: bool,
    /// It may not wait, or no more may.
    pub(crate) by_overflow: bool,
}
