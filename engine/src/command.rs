//! What travels to the shards: publications through the log, commands through a mailbox.
//!
//! Plain data. Made by publishers, carried out by a shard. Knows groups, frames and
//! tickets. Does not know how either is carried out.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::admission::Place;
use crate::close_reason::CloseReason;
use crate::config::ConnectionConfig;
use crate::directory::{Directory, Entrance, Group, Oversized};
use crate::frame::Frame;
use crate::handler::MakeHandler;
use crate::id::{ConnectionId, GroupKey};
use crate::log::Weigh;
use crate::metrics::{ConnectionMetrics, GroupMetrics};
use crate::policy::Policy;
use crate::receipt::Ticket;
use crate::socket::Socket;

/// One frame for all members of a group or of several.
#[derive(Debug)]
pub(crate) struct Publication {
    pub(crate) target: Target,
    pub(crate) except: SmallVec<[ConnectionId; 1]>,
    pub(crate) payload: Payload,
    /// Instead of each connection's own.
    pub(crate) policy: Option<Policy>,
    /// There if the publisher waits.
    pub(crate) ticket: Option<Ticket>,
}

#[derive(Debug)]
pub(crate) enum Payload {
    Frame(Frame),
    /// Not a frame, but their end, at this place of the order.
    End(CloseReason),
}

#[derive(Debug, Clone)]
pub(crate) enum Target {
    One(Arc<Group>),
    /// Each connection once.
    Several(Arc<[Named]>),
}

/// One of several groups.
#[derive(Debug)]
pub(crate) enum Named {
    Group(Arc<Group>),
    /// It had no members when the publisher looked, but may have some when the log takes the publication.
    Absent {
        directory: Arc<Directory>,
        name: Box<str>,
    },
}

impl Named {
    /// The group's entry as of now, if it has one.
    pub(crate) fn find(&self) -> Option<Arc<Group>> {
        match self {
            Self::Group(group) => Some(group.clone()),
            Self::Absent { directory, name } => directory.find(name),
        }
    }

    /// The key under which a shard has the group's members now.
    pub(crate) fn current_key(&self) -> Option<GroupKey> {
        match self {
            Self::Group(group) => group.current_key(),
            Self::Absent { .. } => self.find().map(|group| group.key),
        }
    }
}

impl Weigh for Publication {
    fn bytes(&self) -> u64 {
        self.payload.bytes()
    }
}

impl Payload {
    /// What it takes in an outbox.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Frame(frame) => frame.len() as u64,
            Self::End(_) => 0,
        }
    }
}

impl Publication {
    /// The name of the one group that it is for; none for everyone.
    pub(crate) fn group(&self) -> Option<&Arc<str>> {
        match &self.target {
            Target::One(group) => group.name(),
            Target::Several(_) => None,
        }
    }

    pub(crate) fn frame(&self) -> Option<&Frame> {
        match &self.payload {
            Payload::Frame(frame) => Some(frame),
            Payload::End(_) => None,
        }
    }

    /// Whether it may share a piece of memory with its neighbours in the log: the same frames for the same
    /// connections, and nobody waits for one of them alone.
    pub(crate) fn joins(&self, first: &Self) -> bool {
        let plain = |publication: &Self| {
            let is_frame = publication.frame().is_some();
            is_frame
                && publication.except.is_empty()
                && publication.ticket.is_none()
                && publication.policy.is_none()
        };
        match (&self.target, &first.target) {
            (Target::One(mine), Target::One(theirs)) => {
                Arc::ptr_eq(mine, theirs) && plain(self) && plain(first)
            }
            _ => false,
        }
    }
}

/// What one shard is to do.
#[derive(Debug)]
pub(crate) enum Command {
    Adopt(Box<Adoption>),
    Survey(Box<Survey>),
    For {
        id: ConnectionId,
        /// An id of another namespace names nobody here.
        namespace: GroupKey,
        action: Action,
    },
}

/// A question to all shards: what have these connections counted together?
pub(crate) struct Survey {
    pub(crate) directory: Arc<Directory>,
    /// None for everyone.
    pub(crate) groups: Option<Arc<[Named]>>,
    pub(crate) except: SmallVec<[ConnectionId; 1]>,
    pub(crate) on_metrics: Arc<dyn Fn(GroupMetrics) + Send + Sync>,
}

impl std::fmt::Debug for Survey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Survey").field("groups", &self.groups).finish_non_exhaustive()
    }
}

pub(crate) enum Action {
    Send { frame: Frame, policy: Policy, ticket: Option<Ticket>, oversized: Option<Oversized> },
    Join(Entrance),
    Leave { group: Arc<Group> },
    Close(CloseReason),
    Inspect(Box<dyn FnOnce(ConnectionMetrics) + Send>),
}

impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Send { .. } => "Send",
            Self::Join(_) => "Join",
            Self::Leave { .. } => "Leave",
            Self::Close(_) => "Close",
            Self::Inspect(_) => "Inspect",
        })
    }
}

/// A socket that changes its owner.
pub(crate) struct Adoption {
    pub(crate) socket: Socket,
    /// What the peer sent together with its handshake.
    pub(crate) received: Bytes,
    pub(crate) handler: MakeHandler,
    pub(crate) config: Arc<ConnectionConfig>,
    pub(crate) directory: Arc<Directory>,
    pub(crate) place: Place,
    pub(crate) entrance: Entrance,
}

impl std::fmt::Debug for Adoption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adoption").field("socket", &self.socket).finish_non_exhaustive()
    }
}
