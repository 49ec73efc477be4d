//! Commands: messages to one shard, through its mailbox.
//!
//! Plain data. Made by publishers, executed by the shard. Knows groups, payloads and tickets. Does not know
//! how they are executed.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::admission::ConnectionPermit;
use crate::close_reason::CloseReason;
use crate::config::ConnectionConfig;
use crate::directory::{Directory, Group, Oversized, PendingJoin};
use crate::entry::Named;
use crate::frame::ControlFrame;
use crate::handler::MakeHandler;
use crate::id::{ConnectionId, GroupKey};
use crate::metrics::{ConnectionMetrics, GroupMetrics};
use crate::payload::Payload;
use crate::publication::Delivery;
use crate::rate::SharedRateLimit;
use crate::receipt::Ticket;
use crate::rendition::Encoding;
use crate::socket::Socket;

/// What one shard must do.
#[derive(Debug)]
pub(crate) enum Command {
    Adopt(Box<Adoption>),
    Ask(Box<Query>),
    For {
        id: ConnectionId,
        /// An id of another namespace matches no connection here.
        namespace: GroupKey,
        action: Action,
    },
}

/// A query to all shards about some connections.
pub(crate) struct Query {
    pub(crate) directory: Arc<Directory>,
    /// None for everyone.
    pub(crate) groups: Option<Arc<[Named]>>,
    pub(crate) except: SmallVec<[ConnectionId; 1]>,
    pub(crate) answer: Answer,
}

/// What the query asks for, and the callback for each shard's part.
#[derive(Clone)]
pub(crate) enum Answer {
    /// The sum of their counters.
    Metrics(Arc<dyn Fn(GroupMetrics) + Send + Sync>),
    /// Which of them are open.
    Members(Arc<dyn Fn(Vec<ConnectionId>) + Send + Sync>),
}

impl std::fmt::Debug for Query {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Query").field("groups", &self.groups).finish_non_exhaustive()
    }
}

pub(crate) enum Action {
    Send {
        payload: Payload,
        delivery: Delivery,
        ticket: Option<Ticket>,
        oversized: Option<Oversized>,
    },
    Join(SmallVec<[PendingJoin; 1]>),
    Leave(SmallVec<[Arc<Group>; 1]>),
    Close {
        reason: CloseReason,
        ticket: Option<Ticket>,
    },
    /// Ends the connection, and goes on passing the client's messages to the handler.
    CloseAndListen {
        reason: CloseReason,
    },
    /// A ping or a pong.
    Control(ControlFrame),
    Inspect(Box<dyn FnOnce(ConnectionMetrics) + Send>),
    ListGroups(Box<dyn FnOnce(Vec<Arc<str>>) + Send>),
    /// Called if the connection is open and belongs to everyone.
    IfMember(Box<dyn FnOnce() + Send>),
}

impl std::fmt::Debug for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Send { .. } => "Send",
            Self::Join(_) => "Join",
            Self::Leave(_) => "Leave",
            Self::Close { .. } => "Close",
            Self::CloseAndListen { .. } => "CloseAndListen",
            Self::Control(_) => "Control",
            Self::Inspect(_) => "Inspect",
            Self::ListGroups(_) => "ListGroups",
            Self::IfMember(_) => "IfMember",
        })
    }
}

/// A socket that a shard adopts.
pub(crate) struct Adoption {
    pub(crate) socket: Socket,
    /// Bytes that the client sent together with its handshake.
    pub(crate) received: Bytes,
    pub(crate) handler: MakeHandler,
    pub(crate) config: Arc<ConnectionConfig>,
    pub(crate) encoding: Encoding,
    pub(crate) directory: Arc<Directory>,
    pub(crate) permit: ConnectionPermit,
    pub(crate) join: PendingJoin,
    pub(crate) rate_limit: Option<SharedRateLimit>,
}

impl std::fmt::Debug for Adoption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adoption").field("socket", &self.socket).finish_non_exhaustive()
    }
}
