//! Commands: messages to one shard, through its mailbox.
//!
//! Plain data. Made by publishers, executed by the shard. Knows groups, payloads and tickets. Does not know
//! how they are executed.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

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
use crate::presence::{Present, User};
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
    /// Something may have to be announced of a user in a group. From shard to shard.
    Watch {
        group: Arc<Group>,
        user: Arc<str>,
    },
    /// There are more of these than are kept. From shard to shard.
    WatchAll(Arc<Directory>),
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
    /// The users who are present in a group, by its name, or among everyone. The last shard to get there answers for
    /// all.
    Presence {
        group: Option<Arc<str>>,
        shards_left: Arc<AtomicUsize>,
        on_presence: Arc<dyn Fn(Vec<Present>) + Send + Sync>,
    },
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
    /// Gives a user to a connection that is opening.
    Identify(Box<(User, PendingJoin)>),
    ExpireAt(Option<Instant>),
    /// A ping or a pong.
    Control(Box<ControlFrame>),
    Inspect(Box<dyn FnOnce(ConnectionMetrics) + Send>),
    SetMetadata(Arc<[u8]>),
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
            Self::Identify(_) => "Identify",
            Self::ExpireAt(_) => "ExpireAt",
            Self::Control(_) => "Control",
            Self::Inspect(_) => "Inspect",
            Self::SetMetadata(_) => "SetMetadata",
            Self::ListGroups(_) => "ListGroups",
            Self::IfMember(_) => "IfMember",
        })
    }
}

/// How long, and in how many bytes, a client may say who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstMessage {
    /// The time for its first message, from the adoption. After it the connection ends (1008).
    pub within: Duration,
    /// The longest first message, in bytes; at most the connection's `max_message_bytes`. A longer one ends the
    /// connection (1009) as soon as its header has arrived.
    pub max_bytes: usize,
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
    pub(crate) user: Option<(User, PendingJoin)>,
    pub(crate) first_message: Option<FirstMessage>,
    pub(crate) expires_at: Option<Instant>,
}

impl std::fmt::Debug for Adoption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adoption").field("socket", &self.socket).finish_non_exhaustive()
    }
}
