//! The publisher: how something gets from any thread to the shards, and who waits for what.
//!
//! Owned by a namespace's handles; needs no particular runtime. There is one path: a target is
//! resolved to groups, the frame goes through the log (or, for one connection, through its
//! shard's mailbox), and who must wait waits here. A publisher that waits for room in the log
//! resolves its target anew with each try, because members come and go meanwhile. Does not
//! know sockets, nor what payloads mean.
//!
//! When a publisher waits: only for members whose policy is `Block`, or for a receipt.
//! While no outbox of the target is more than a quarter full, and what is on its way takes
//! at most half of the smallest outbox in the log and a quarter in its shard's mailbox
//! (the *window*), every member has room, so publishing ends when the log has taken the
//! frame. Otherwise the publication carries a ticket, and publishing ends when every target
//! has taken it or has gone. A publisher reserves its bytes before it looks at the window,
//! so two that act at once do not both take the last of it. What others push between that
//! look and its own push, in the same instant, it does not see: then its frame may wait
//! although it has returned.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;

use smallvec::SmallVec;

use crate::close_code::InvalidCloseCode;
use crate::command::{Action, Command, Named, Payload, Publication, Target};
use crate::config::ConnectionConfig;
use crate::directory::{Directory, Group, Oversized};
use crate::engine_core::EngineCore;
use crate::frame::Frame;
use crate::id::ConnectionId;
use crate::log::Log;
use crate::mailbox::Mailbox;
use crate::policy::Policy;
use crate::position::Position;
use crate::receipt::{self, Awaited, Receipt, Ticket};
use crate::wait_list::{Refused, Registration, WaitList};

/// Whom a frame is for.
#[derive(Debug, Clone, Copy)]
pub enum To<'a> {
    /// Every connection of the namespace.
    Everyone,
    /// The members of one group. A group without members is no error: nobody gets it.
    Group(&'a str),
    /// The members of several groups, each connection once.
    Groups(&'a [&'a str]),
    /// One connection. If it has gone, nobody gets it.
    Connection(ConnectionId),
}

/// A frame could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The engine is stopping or has ended. Who awaited a receipt gets this as well if a shard was left behind
    /// ([`ShutdownReport::stuck`](crate::ShutdownReport::stuck)) that has not said what became of the frame.
    #[error("the engine has ended")]
    Closed,
    /// `publishers_waiting_max` publishers wait for room already.
    #[error("too many publishers wait for room already")]
    Overloaded,
    /// The frame is longer than [`Frame::BYTES_MAX`] (4 GiB − 1 B): send it in parts.
    #[error("the frame is longer than {max} bytes: send it in parts", max = Frame::BYTES_MAX)]
    TooLong,
    /// The group's name is longer than [`GROUP_NAME_BYTES_MAX`].
    #[error("the group's name is longer than {GROUP_NAME_BYTES_MAX} bytes")]
    GroupNameTooLong,
    /// The close code may not stand in a Close frame.
    #[error(transparent)]
    InvalidCloseCode(#[from] InvalidCloseCode),
}

/// The longest name of a group, in bytes. A name is kept once, however many members the group has.
pub const GROUP_NAME_BYTES_MAX: usize = 1024;

/// A frame was not sent, and is given back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrySendError {
    /// The log or the connection's mailbox is full: its shard is behind. Nobody got the frame.
    #[error("the log or the mailbox is full")]
    Full(Frame),
    /// The engine is stopping or has ended.
    #[error("the engine has ended")]
    Closed(Frame),
    /// The frame is longer than [`Frame::BYTES_MAX`] (4 GiB − 1 B): send it in parts.
    #[error("the frame is longer than {max} bytes: send it in parts", max = Frame::BYTES_MAX)]
    TooLong(Frame),
}

/// Sends to the connections of one namespace.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    core: Arc<EngineCore>,
    directory: Arc<Directory>,
    window: Arc<Window>,
    /// Overrides the default: each connection's own policy for several connections, `Block` for one.
    policy: Option<Policy>,
}

/// How much may be on its way without anybody asking whether there is room: parts of the
/// smallest outbox that a connection of the namespace was adopted with.
#[derive(Debug)]
struct Window {
    frames: AtomicU64,
    bytes: AtomicU64,
}

impl Publisher {
    pub(crate) fn new(core: Arc<EngineCore>, name: &str) -> Self {
        let directory = Directory::new(name, core.mailboxes.len(), core.next_group.clone());
        core.beacons.name(directory.key(), directory.name());
        let window = Window { frames: AtomicU64::new(u64::MAX), bytes: AtomicU64::new(u64::MAX) };
        Self { core, directory: Arc::new(directory), window: Arc::new(window), policy: None }
    }

    pub(crate) fn with_policy(&self, policy: Policy) -> Self {
        Self { policy: Some(policy), ..self.clone() }
    }

    pub(crate) fn core(&self) -> &EngineCore {
        &self.core
    }

    pub(crate) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    pub(crate) fn shards(&self) -> usize {
        self.core.mailboxes.len()
    }

    /// A connection with these settings is about to be handed over.
    pub(crate) fn expect(&self, config: &ConnectionConfig) {
        // Relaxed: the push into the mailbox, before which the connection is no target, makes this visible.
        self.window.frames.fetch_min(config.outbox_frames as u64, Relaxed);
        self.window.bytes.fetch_min(config.outbox_bytes as u64, Relaxed);
    }

    /// Sends to a target as soon as there is room in the log or the mailbox, and waits for what it `wants` to know.
    pub(crate) async fn submit(
        &self,
        to: To<'_>,
        except: &[ConnectionId],
        payload: Payload,
        wants: Wants,
    ) -> Result<Receipt, SendError> {
        if matches!(&payload, Payload::Frame(frame) if frame.len() > Frame::BYTES_MAX) {
            return Err(SendError::TooLong);
        }
        let (position, awaited) = match self.try_submit(to, except, payload, wants) {
            Ok(submitted) => submitted,
            Err(Refused::Closed(_)) => return Err(SendError::Closed),
            Err(Refused::Full(payload)) => {
                let narrow: &(dyn Narrow + Sync) = match to {
                    To::Connection(id) => &self.core.mailboxes[id.shard()],
                    _ => &*self.core.log,
                };
                let attempt = move |payload| self.try_submit(to, except, payload, wants);
                let room: Room<'_, _> = Box::pin(self.wait_for_room(narrow, payload, attempt));
                room.await?
            }
        };
        match awaited {
            Some(awaited) => Ok(Receipt { position, ..self.outcome(awaited).await? }),
            None => Ok(Receipt { position, ..Receipt::default() }),
        }
    }

    /// Waits until every target has taken the frame or has gone.
    async fn outcome(&self, awaited: Awaited) -> Result<Receipt, SendError> {
        let mut registration = Registration::default();
        poll_fn(|context| {
            let outcome = awaited.poll(context.waker()).map(Ok);
            let is_lost = outcome.is_pending()
                && self.core.stopping.has_left_behind(awaited.number(), &mut registration, context.waker());
            if !is_lost {
                return outcome;
            }
            // A shard that was left behind at the engine's end never says what became of it.
            match awaited.poll(context.waker()) {
                Poll::Ready(receipt) => Poll::Ready(Ok(receipt)),
                Poll::Pending => Poll::Ready(Err(SendError::Closed)),
            }
        })
        .await
    }

    /// Tries once: resolves the target as it is now, decides whether anybody must be waited for, and hands the payload
    /// over. Returns nothing if the target has no members or nobody must be waited for.
    pub(crate) fn try_submit(
        &self,
        to: To<'_>,
        except: &[ConnectionId],
        payload: Payload,
        wants: Wants,
    ) -> Result<Submitted, Refused<Payload>> {
        let destination = self.resolve(to, except);
        // Looked at last: where nobody is there any more, that may be because the end has come.
        if self.core.stopping.is_closed() {
            return Err(Refused::Closed(payload));
        }
        match destination {
            None => Ok((self.core.tail(), None)),
            Some(Destination::Shard(id)) => self.attempt_one(id, payload, wants),
            Some(Destination::Log(target)) => self.attempt_many(target, except, payload, wants),
        }
    }

    fn attempt_one(
        &self,
        id: ConnectionId,
        payload: Payload,
        wants: Wants,
    ) -> Result<Submitted, Refused<Payload>> {
        let (shard, mailbox, bytes) = (id.shard(), &self.core.mailboxes[id.shard()], payload.bytes());
        let (action, awaited) = match payload {
            Payload::End(reason) => (Action::Close(reason), None),
            Payload::Frame(frame) => {
                let is_within = self.window.holds(4, mailbox.len() as u64 + 1, mailbox.reserve(bytes))
                    && self.window.holds(2, self.core.log.in_flight(), self.core.log.bytes_in_flight());
                let oversized = (!is_within).then(|| Oversized::new(self.directory.clone()));
                // For one connection `Block` holds, whatever its own policy is.
                let policy = self.policy.unwrap_or_default();
                let has_room = is_within && !self.directory.everyone().is_congested();
                let (ticket, awaited) = wants.ticket(has_room || !policy.blocks());
                (Action::Send { frame, policy, ticket, oversized }, awaited)
            }
        };
        let command = Command::For { id, namespace: self.directory.key(), action };
        self.core.try_command(shard, command).map(|position| (position, awaited)).map_err(|refused| {
            mailbox.release(bytes);
            refused.map(|command| match command {
                Command::For { action: Action::Send { frame, .. }, .. } => Payload::Frame(frame),
                Command::For { action: Action::Close(reason), .. } => Payload::End(reason),
                _ => unreachable!("what is refused is given back"),
            })
        })
    }

    fn attempt_many(
        &self,
        target: Target,
        except: &[ConnectionId],
        payload: Payload,
        wants: Wants,
    ) -> Result<Submitted, Refused<Payload>> {
        let (log, bytes) = (&self.core.log, payload.bytes());
        log.reserve(bytes);
        let has_room = || {
            self.window.holds(2, log.in_flight() + 1, log.bytes_in_flight())
                && !self.directory.has_oversized()
                && !self.must_be_waited_for(&target)
        };
        let blocks = self.policy.is_none_or(|policy| policy.blocks());
        let (ticket, awaited) = wants.ticket(!blocks || wants == Wants::Room && has_room());
        let except = SmallVec::from_slice(except);
        let publication = Publication { target, except, payload, policy: self.policy, ticket };
        self.core.try_publish(publication).map(|position| (position, awaited)).map_err(|refused| {
            log.unreserve(bytes);
            refused.map(|publication| publication.payload)
        })
    }

    /// Whether a member for which publishers wait is congested.
    fn must_be_waited_for(&self, target: &Target) -> bool {
        let for_any = self.policy.is_some();
        let is_behind = |group: &Group| if for_any { group.is_congested() } else { group.is_blocking() };
        match target {
            Target::One(group) => is_behind(group),
            Target::Several(groups) => groups.iter().filter_map(Named::find).any(|group| is_behind(&group)),
        }
    }

    /// Where a target's members are; none if nobody is there.
    fn resolve(&self, to: To<'_>, except: &[ConnectionId]) -> Option<Destination> {
        let occupied = |group: &Arc<Group>| !group.is_empty();
        Some(match to {
            To::Connection(id) => {
                let is_here = id.shard() < self.core.mailboxes.len();
                Destination::Shard(Some(id).filter(|id| is_here && !except.contains(id))?)
            }
            To::Everyone => {
                let everyone = Some(self.directory.everyone()).filter(|group| occupied(group))?;
                Destination::Log(Target::One(everyone.clone()))
            }
            To::Group(name) => Destination::Log(Target::One(self.directory.find(name).filter(occupied)?)),
            To::Groups(names) => {
                let groups = self.named(names);
                if !groups.iter().any(|named| matches!(named, Named::Group(_))) {
                    return None;
                }
                Destination::Log(Target::Several(groups))
            }
        })
    }

    /// These groups, wherever their members will be when a shard looks.
    pub(crate) fn named(&self, names: &[&str]) -> Arc<[Named]> {
        // No group has a longer name.
        let names = names.iter().filter(|name| name.len() <= GROUP_NAME_BYTES_MAX);
        let find = |name: &&str| match self.directory.find(name).filter(|group| !group.is_empty()) {
            Some(group) => Named::Group(group),
            None => Named::Absent { directory: self.directory.clone(), name: (*name).into() },
        };
        names.map(find).collect()
    }

    pub(crate) async fn command(&self, id: ConnectionId, action: Action) -> Result<Position, SendError> {
        if id.shard() >= self.core.mailboxes.len() {
            return Ok(self.core.tail()); // an id of another engine: nobody here has it
        }
        let command = Command::For { id, namespace: self.directory.key(), action };
        self.submit_command(id.shard(), command).await
    }

    /// Puts a command into a shard's mailbox, as soon as there is room.
    pub(crate) async fn submit_command(&self, shard: usize, command: Command) -> Result<Position, SendError> {
        let attempt = move |command| {
            if self.core.stopping.is_closed() {
                return Err(Refused::Closed(command));
            }
            self.core.try_command(shard, command)
        };
        match attempt(command) {
            Ok(position) => Ok(position),
            Err(Refused::Closed(_)) => Err(SendError::Closed),
            Err(Refused::Full(command)) => {
                let mailbox = &self.core.mailboxes[shard];
                let room: Room<'_, _> = Box::pin(self.wait_for_room(mailbox, command, attempt));
                room.await
            }
        }
    }

    /// Tries again whenever there may be room.
    async fn wait_for_room<T, U>(
        &self,
        narrow: &(dyn Narrow + Sync),
        value: T,
        mut attempt: impl FnMut(T) -> Result<U, Refused<T>>,
    ) -> Result<U, SendError> {
        let mut value = Some(value);
        let mut registration = Registration::default();
        poll_fn(|context| {
            // Twice: what makes room between the first try and the registration wakes nobody.
            for registered in [false, true] {
                // An attempt costs a look at each member group, and everybody is woken when there is room for one.
                if !narrow.is_full() {
                    let Some(taken) = value.take() else { return Poll::Ready(Err(SendError::Closed)) };
                    match attempt(taken) {
                        Ok(done) => return Poll::Ready(Ok(done)),
                        Err(Refused::Closed(_)) => return Poll::Ready(Err(SendError::Closed)),
                        Err(Refused::Full(refused)) => value = Some(refused),
                    }
                }
                if !registered && !narrow.waiting().register(&mut registration, context.waker()) {
                    return Poll::Ready(Err(SendError::Overloaded));
                }
            }
            self.core.wake_laggards(1);
            Poll::Pending
        })
        .await
    }
}

/// What publishers wait at: the log, or a mailbox.
trait Narrow {
    /// Whether it has no room now. Not once it is closed.
    fn is_full(&self) -> bool;

    fn waiting(&self) -> &WaitList;
}

impl Narrow for Log<Publication> {
    fn is_full(&self) -> bool {
        Self::is_full(self)
    }

    fn waiting(&self) -> &WaitList {
        &self.waiting
    }
}

impl Narrow for Mailbox<Command, mio::Waker> {
    fn is_full(&self) -> bool {
        Self::is_full(self)
    }

    fn waiting(&self) -> &WaitList {
        &self.waiting
    }
}

/// Ends when there was room. Boxed, because it is rare and large: held by value, it would make the
/// futures of all who publish as large.
type Room<'a, T> = Pin<Box<dyn Future<Output = Result<T, SendError>> + Send + 'a>>;

/// Its position, and the outcome to wait for, if the publisher wants one.
type Submitted = (Position, Option<Awaited>);

/// Where something is to go: to one connection's shard, or through the log.
enum Destination {
    Shard(ConnectionId),
    Log(Target),
}

/// What a publisher waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wants {
    Nothing,
    /// That every target has room, which it may have already.
    Room,
    /// What became of the frame.
    Outcome,
}

impl Wants {
    /// The ticket for the frame, if its publisher waits.
    fn ticket(self, has_room: bool) -> (Option<Ticket>, Option<Awaited>) {
        match self {
            Self::Nothing => None,
            Self::Room => (!has_room).then(|| receipt::ticket(false)),
            Self::Outcome => Some(receipt::ticket(true)),
        }
        .unzip()
    }
}

impl Window {
    /// Whether so much is at most one `part`th of every outbox.
    fn holds(&self, part: u64, frames: u64, bytes: u64) -> bool {
        // Relaxed: see `expect`.
        frames <= self.frames.load(Relaxed) / part && bytes <= self.bytes.load(Relaxed) / part
    }
}

impl Payload {
    pub(crate) fn into_frame(self) -> Frame {
        match self {
            Self::Frame(frame) => frame,
            Self::End(_) => unreachable!("a frame was tried to be sent"),
        }
    }
}
