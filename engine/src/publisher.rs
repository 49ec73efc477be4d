//! The publisher: how publications and commands get from any thread to the shards, and where publishers wait.
//!
//! Owned by a namespace's handles; needs no particular runtime. There is one path: an address is resolved to
//! groups, the publication goes through the log (or, for one connection, through its shard's mailbox), and a
//! publisher that must wait waits here. A publisher that waits for room in the log resolves its address again
//! with each attempt, because members join and leave meanwhile. Does not know sockets, nor what payloads mean.
//!
//! When a publisher waits: only for members whose policy is `Block`, or for a receipt. While no outbox of a
//! recipient is more than a quarter full, and what is in flight takes at most half of the smallest outbox in the
//! log and a quarter in its shard's mailbox (the *window*), every member has room, so publishing ends when the
//! log has accepted the publication. Otherwise the publication carries a ticket, and publishing ends when every
//! recipient has accepted it or has disconnected. A publisher reserves its bytes before it looks at the window, so
//! that two concurrent publishers do not both take the last of it. It does not see what others push in the same
//! instant, between that look and its own push: its frame may then wait although the call has returned.
//!
//! A publication with a ticket is waited for on the shards that had members when it was published; only these are
//! woken. A connection that joins on another shard during the call gets the message, but is not waited for and is not
//! in the receipt: the publisher cannot tell whether it joined before or after.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};

use crate::close_reason::CloseReason;
use crate::command::{Action, Command};
use crate::config::ConnectionConfig;
use crate::directory::{Directory, Group, Kind, Oversized};
use crate::engine_core::EngineCore;
use crate::entry::{self, Entry, Named, Target};
use crate::id::ConnectionId;
use crate::log::Log;
use crate::mailbox::Mailbox;
use crate::payload::Payload;
use crate::policy::Policy;
use crate::position::Position;
use crate::publication::{Address, Content, Publication};
use crate::receipt::{self, Awaited, Receipt, ShardTickets, Ticket};
use crate::rendition::Renditions;
use crate::sync::plain::AtomicU64;
use crate::wait_list::{Refused, Registration, WaitList};

/// A publication or command was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The engine is stopping or has ended. A publisher that awaits a receipt also gets this if an abandoned shard
    /// ([`ShutdownReport::stuck`](crate::ShutdownReport::stuck)) has not reported the result of the message.
    #[error("the engine has ended")]
    Closed,
    /// [`publishers_waiting_max`](crate::EngineConfig::publishers_waiting_max) publishers already wait for room.
    #[error("too many publishers already wait for room: publish less, or raise `publishers_waiting_max`")]
    Overloaded,
    /// The payload is longer than [`Payload::BYTES_MAX`] (4 GiB less a frame header).
    #[error("the message is longer than {max} bytes: publish it in parts", max = Payload::BYTES_MAX)]
    TooLong,
    /// The group's name is longer than [`GROUP_NAME_BYTES_MAX`].
    #[error("the group's name is longer than {GROUP_NAME_BYTES_MAX} bytes: shorten it")]
    GroupNameTooLong,
    /// The metadata is longer than [`METADATA_BYTES_MAX`].
    #[error("the metadata is longer than {METADATA_BYTES_MAX} bytes: keep less of it here")]
    MetadataTooLong,
}

/// The longest name of a group, in bytes. A name is stored once, however many members the group has.
pub const GROUP_NAME_BYTES_MAX: usize = 1024;

/// The longest name of a user, in bytes.
pub const USER_NAME_BYTES_MAX: usize = GROUP_NAME_BYTES_MAX;

/// The longest metadata of a connection, in bytes.
pub const METADATA_BYTES_MAX: usize = 16 << 10;

/// A publication was not accepted, because it would have to wait or is impossible; the value is given back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TryPublishError<T> {
    /// The log is full (for one connection: its shard's mailbox), because a shard lags. No connection got the
    /// message.
    #[error("the log or the mailbox is full: try again later, or wait with `publish`")]
    Full(T),
    /// The engine is stopping or has ended.
    #[error("the engine has ended")]
    Closed(T),
    /// The payload is longer than [`Payload::BYTES_MAX`].
    #[error("the message is longer than {max} bytes: publish it in parts", max = Payload::BYTES_MAX)]
    TooLong(T),
}

impl<T> TryPublishError<T> {
    /// The value that was not published.
    pub fn into_inner(self) -> T {
        match self {
            Self::Full(value) | Self::Closed(value) | Self::TooLong(value) => value,
        }
    }

    /// Whether there was no room: a later attempt may succeed.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full(_))
    }

    /// Whether the engine is stopping or has ended: no later attempt will succeed.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed(_))
    }
}

/// Publishes and sends commands to the connections of one namespace.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    core: Arc<EngineCore>,
    directory: Arc<Directory>,
    window: Arc<Window>,
}

/// How much may be in flight before a publisher has to check for room: fractions of the smallest outbox with
/// which a connection of the namespace was adopted.
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
        Self { core, directory, window: Arc::new(window) }
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

    /// Notes the settings of a connection that is about to be adopted.
    pub(crate) fn expect(&self, config: &ConnectionConfig) {
        // Relaxed: made visible by the push into the mailbox, before which nobody can address the connection.
        self.window.frames.fetch_min(config.outbox_frames as u64, Relaxed);
        self.window.bytes.fetch_min(config.outbox_bytes as u64, Relaxed);
    }

    /// Publishes as soon as the log or the mailbox has room, and waits for the outcome that the caller `wants`.
    #[inline]
    pub(crate) fn submit(&self, publication: Publication, wants: Wants) -> Submission<'_> {
        Submission { publisher: self, wants, step: Step::Submit(publication) }
    }

    /// Publishes as soon as the log or the mailbox has room, and leaves the outcome that the caller `wants` to be awaited
    /// elsewhere.
    pub(crate) async fn enqueue(
        &self,
        publication: Publication,
        wants: Wants,
    ) -> Result<Enqueued, PublishError> {
        if publication.is_too_long() {
            return Err(PublishError::TooLong);
        }
        let (position, awaited) = match self.try_submit(publication.into(), wants) {
            Ok(submitted) => submitted,
            Err(Refused::Closed(_)) => return Err(PublishError::Closed),
            Err(Refused::Full(draft)) => self.room_for(draft, wants).await?,
        };
        Ok(Enqueued { publisher: self.clone(), wants, position, awaited })
    }

    /// Waits for room for the draft.
    fn room_for(&self, draft: Box<Draft>, wants: Wants) -> Room<'_, Submitted> {
        let bounded: &(dyn Bounded + Sync) = match draft.publication.to {
            Address::Connection(id) => &self.core.mailboxes[id.shard()],
            _ => &*self.core.log,
        };
        let attempt = move |draft: Box<Draft>| self.try_submit(*draft, wants);
        Box::pin(self.wait_for_room(bounded, draft, attempt))
    }

    /// Attempts once: resolves the address as of now, decides whether the publisher must wait for a member,
    /// and submits the publication. The result has nothing to await if there are no recipients, or if no member
    /// must be waited for.
    pub(crate) fn try_submit(&self, draft: Draft, wants: Wants) -> Result<Submitted, Refused<Box<Draft>>> {
        let destination = self.resolve(&draft.publication);
        // Checked after `resolve`: there may be no recipients because the engine has ended meanwhile.
        if self.core.shutdown.is_closed() {
            return Err(Refused::Closed(Box::new(draft)));
        }
        match destination {
            None => Ok((self.core.tail(), None)),
            Some(Destination::Shard(id)) => self.attempt_one(id, draft.publication, wants),
            Some(Destination::Log(target)) => self.attempt_many(target, draft, wants),
        }
    }

    /// Submits a publication to one connection. The shard renders it if need be, since only the shard knows
    /// the encoding.
    fn attempt_one(
        &self,
        id: ConnectionId,
        publication: Publication,
        wants: Wants,
    ) -> Result<Submitted, Refused<Box<Draft>>> {
        let Publication { to, except, content, delivery } = publication;
        let (shard, mailbox) = (id.shard(), &self.core.mailboxes[id.shard()]);
        let bytes = content.payload().map_or(0, |payload| payload.plain_frame().len() as u64);
        let (action, awaited) = match content {
            Content::Close { code, text } => {
                let (ticket, awaited) = wants.ticket(true);
                (Action::Close { reason: CloseReason::Application { code, text }, ticket }, awaited)
            }
            Content::Message(payload) => {
                // What the shard renders for another encoding may be longer: nobody knows yet whether it fits.
                let is_plain = self.directory.encodings_in_use().next().is_none();
                let is_within =
                    self.window.holds(4, mailbox.commands_in_flight() as u64 + 1, mailbox.reserve(bytes))
                        && is_plain
                        && self.window.holds(2, self.core.log.in_flight(), self.core.log.bytes_in_flight());
                let oversized = (!is_within).then(|| Oversized::new(self.directory.clone()));
                // A message to one connection blocks by default, whatever the connection's own policy is.
                let blocks = delivery.policy().unwrap_or_default().blocks();
                let has_room = is_within && !self.directory.everyone().is_congested();
                let (ticket, awaited) = wants.ticket(has_room || !blocks);
                (Action::Send { payload, delivery, ticket, oversized }, awaited)
            }
            Content::Presence(_) => return Ok((self.core.tail(), None)), // made by shards, which do not come here
        };
        let command = Command::For { id, namespace: self.directory.key(), action };
        self.core.try_command(shard, command).map(|position| (position, awaited)).map_err(|refused| {
            mailbox.release(bytes);
            refused.map(|command| {
                let content = match command {
                    Command::For { action: Action::Send { payload, .. }, .. } => Content::Message(payload),
                    Command::For {
                        action: Action::Close { reason: CloseReason::Application { code, text }, .. },
                        ..
                    } => Content::Close { code, text },
                    _ => unreachable!("what is refused is given back"),
                };
                Box::new(Publication { to, except, content, delivery }.into())
            })
        })
    }

    fn attempt_many(
        &self,
        target: Target,
        draft: Draft,
        wants: Wants,
    ) -> Result<Submitted, Refused<Box<Draft>>> {
        let log = &self.core.log;
        let must_render = draft.renditions.is_none() && self.directory.encodings_in_use().next().is_some();
        if must_render && log.is_full() {
            return Err(Refused::Full(Box::new(draft))); // an attempt that fails must not cost as much as one that succeeds
        }
        let Draft { publication, renditions } = draft;
        let renditions = renditions.unwrap_or_else(|| self.render(&publication));
        let bytes = entry::weight(&publication, &renditions);
        log.reserve(bytes);
        let policy = publication.delivery.policy();
        // A close does not wait for room.
        let is_message = publication.payload().is_some();
        let needs_room = wants == Wants::Room && is_message && policy.is_none_or(|policy| policy.blocks());
        let is_within = !needs_room || self.window.holds(2, log.in_flight() + 1, log.bytes_in_flight());
        let has_room = !needs_room
            || is_within && !self.directory.has_oversized() && !self.must_be_waited_for(&target, policy);
        let (ticket, awaited) = wants.ticket(has_room);
        let tickets = ticket.map(|ticket| ShardTickets::new(ticket, self.core.shards_of(&target)));
        let entry = Entry { publication, target, renditions, tickets };
        let position = self.core.try_publish(entry).map_err(|refused| {
            log.unreserve(bytes);
            refused.map(|entry| {
                let Entry { publication, renditions, .. } = *entry;
                Box::new(Draft { publication, renditions: Some(renditions) })
            })
        })?;
        if !is_within {
            // Sleeping shards may be all that keeps publications in flight. Only those that lag by half of the
            // window's content are woken, so that a wake is shared by many publications.
            self.core.wake_laggards((log.in_flight() / 2).max(1));
        }
        Ok((position, awaited))
    }

    /// The renditions for the encodings in use, besides the plain one.
    fn render(&self, publication: &Publication) -> Renditions {
        match publication.payload() {
            Some(payload) => {
                Renditions::make(&self.core.encodings, self.directory.encodings_in_use(), payload)
            }
            None => Renditions::default(),
        }
    }

    /// Whether a member for which publishers wait is congested.
    fn must_be_waited_for(&self, target: &Target, policy: Option<Policy>) -> bool {
        let for_any = policy.is_some();
        let is_behind = |group: &Group| if for_any { group.is_congested() } else { group.is_blocking() };
        match target {
            Target::One(group) => is_behind(group),
            Target::Several(groups) => groups.iter().filter_map(Named::find).any(|group| is_behind(&group)),
        }
    }

    /// Where to submit a publication; none if it has no recipients.
    fn resolve(&self, publication: &Publication) -> Option<Destination> {
        let occupied = |group: &Arc<Group>| !group.is_empty();
        Some(match &publication.to {
            Address::Connection(id) => {
                let is_here = id.shard() < self.core.mailboxes.len() && !publication.except.contains(id);
                Destination::Shard(Some(*id).filter(|_| is_here)?)
            }
            Address::Everyone => {
                let everyone = Some(self.directory.everyone()).filter(|group| occupied(group))?;
                Destination::Log(Target::One(everyone.clone()))
            }
            Address::Group(name) => {
                Destination::Log(Target::One(self.directory.find(Kind::Group, name).filter(occupied)?))
            }
            Address::User(name) => {
                Destination::Log(Target::One(self.directory.find(Kind::User, name).filter(occupied)?))
            }
            Address::Groups(names) => self.several(Kind::Group, names)?,
            Address::Users(names) => self.several(Kind::User, names)?,
        })
    }

    fn several(&self, kind: Kind, names: &[Arc<str>]) -> Option<Destination> {
        let groups = self.named(kind, names);
        let is_occupied = groups.iter().any(|named| matches!(named, Named::Group(_)));
        is_occupied.then_some(Destination::Log(Target::Several(groups)))
    }

    /// Resolves these groups. An absent one may be created before a shard reads the publication: the shard
    /// looks it up.
    pub(crate) fn named(&self, kind: Kind, names: &[Arc<str>]) -> Arc<[Named]> {
        // A longer name belongs to no group and no user.
        let names = names.iter().filter(|name| name.len() <= GROUP_NAME_BYTES_MAX);
        let find = |name: &Arc<str>| match self.directory.find(kind, name).filter(|group| !group.is_empty()) {
            Some(group) => Named::Group(group),
            None => Named::Absent { directory: self.directory.clone(), kind, name: name.clone() },
        };
        names.map(find).collect()
    }

    pub(crate) async fn command(&self, id: ConnectionId, action: Action) -> Result<Position, PublishError> {
        if id.shard() >= self.core.mailboxes.len() {
            return Ok(self.core.tail()); // an id of another engine: no connection here has it
        }
        let command = Command::For { id, namespace: self.directory.key(), action };
        self.submit_command(id.shard(), command).await
    }

    /// Puts a command into a shard's mailbox as soon as there is room.
    pub(crate) async fn submit_command(
        &self,
        shard: usize,
        command: Command,
    ) -> Result<Position, PublishError> {
        self.submit_by(shard, command, |command| self.core.try_command(shard, command)).await
    }

    /// The same, but the shard need not wake before the caller wakes it.
    pub(crate) async fn submit_without_wake(
        &self,
        shard: usize,
        command: Command,
    ) -> Result<(), PublishError> {
        self.submit_by(shard, command, |command| self.core.try_command_without_wake(shard, command)).await
    }

    async fn submit_by<T: Send>(
        &self,
        shard: usize,
        command: Command,
        push: impl Fn(Command) -> Result<T, Refused<Command>> + Send,
    ) -> Result<T, PublishError> {
        let attempt = move |command| {
            if self.core.shutdown.is_closed() {
                return Err(Refused::Closed(command));
            }
            push(command)
        };
        match attempt(command) {
            Ok(done) => Ok(done),
            Err(Refused::Closed(_)) => Err(PublishError::Closed),
            Err(Refused::Full(command)) => {
                let mailbox = &self.core.mailboxes[shard];
                let room: Room<'_, _> = Box::pin(self.wait_for_room(mailbox, command, attempt));
                room.await
            }
        }
    }

    /// Attempts again whenever there may be room.
    async fn wait_for_room<T, U>(
        &self,
        bounded: &(dyn Bounded + Sync),
        value: T,
        mut attempt: impl FnMut(T) -> Result<U, Refused<T>>,
    ) -> Result<U, PublishError> {
        let mut value = Some(value);
        let mut registration = Registration::default();
        poll_fn(|context| {
            // Two passes: room that is made between the first attempt and the registration wakes no waiter.
            for registered in [false, true] {
                // An attempt looks at each group of the target, and all waiters are woken when there is room for one.
                if !bounded.is_full() {
                    let Some(taken) = value.take() else { return Poll::Ready(Err(PublishError::Closed)) };
                    match attempt(taken) {
                        Ok(done) => return Poll::Ready(Ok(done)),
                        Err(Refused::Closed(_)) => return Poll::Ready(Err(PublishError::Closed)),
                        Err(Refused::Full(refused)) => value = Some(refused),
                    }
                }
                if !registered && !bounded.waiting().register(&mut registration, context.waker()) {
                    return Poll::Ready(Err(PublishError::Overloaded));
                }
            }
            self.core.wake_laggards(1);
            Poll::Pending
        })
        .await
    }
}

/// A publication in flight, as a future. Its first poll makes the first attempt.
///
/// Written by hand, because each async function in a chain keeps a copy of its argument for as long as it lives,
/// and an application's method is as large as the futures that it awaits.
#[must_use = "nothing is published before it is polled"]
pub(crate) struct Submission<'a> {
    publisher: &'a Publisher,
    wants: Wants,
    step: Step<'a>,
}

enum Step<'a> {
    Submit(Publication),
    WaitForRoom(Room<'a, Submitted>),
    AwaitOutcome { position: Position, awaited: Awaited, registration: Registration<'a> },
    Done,
}

impl<'a> Submission<'a> {
    /// Ends the submission of an accepted publication, or goes on to await its outcome.
    fn accepted(&mut self, (position, awaited): Submitted) -> Option<Receipt> {
        let Some(awaited) = awaited else { return Some(Receipt { position, ..Receipt::default() }) };
        self.step = Step::AwaitOutcome { position, awaited, registration: Registration::default() };
        None
    }

    /// The outcome, once every recipient has accepted the frame or has disconnected.
    fn poll_outcome(&mut self, context: &mut Context<'_>) -> Poll<Result<Receipt, PublishError>> {
        let Step::AwaitOutcome { position, awaited, registration } = &mut self.step else {
            return Poll::Pending;
        };
        let outcome = |receipt| Ok(Receipt { position: *position, ..receipt });
        let polled = awaited.poll(context.waker()).map(outcome);
        let shutdown = &self.publisher.core.shutdown;
        let is_lost =
            polled.is_pending() && shutdown.has_left_behind(awaited.number(), registration, context.waker());
        if !is_lost {
            return polled;
        }
        // A shard that was abandoned at the engine's end never reports the outcome.
        match awaited.poll(context.waker()) {
            Poll::Ready(receipt) => Poll::Ready(outcome(receipt)),
            Poll::Pending => Poll::Ready(Err(PublishError::Closed)),
        }
    }
}

impl Future for Submission<'_> {
    type Output = Result<Receipt, PublishError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Step::Submit(_) = this.step
            && let Step::Submit(publication) = std::mem::replace(&mut this.step, Step::Done)
        {
            if publication.is_too_long() {
                return Poll::Ready(Err(PublishError::TooLong));
            }
            match this.publisher.try_submit(publication.into(), this.wants) {
                Ok(submitted) => {
                    if let Some(receipt) = this.accepted(submitted) {
                        return Poll::Ready(Ok(receipt));
                    }
                }
                Err(Refused::Closed(_)) => return Poll::Ready(Err(PublishError::Closed)),
                Err(Refused::Full(draft)) => {
                    this.step = Step::WaitForRoom(this.publisher.room_for(draft, this.wants));
                }
            }
        }
        if let Step::WaitForRoom(room) = &mut this.step {
            let submitted = ready!(room.as_mut().poll(context));
            this.step = Step::Done;
            if let Some(receipt) = this.accepted(submitted?) {
                return Poll::Ready(Ok(receipt));
            }
        }
        assert!(!matches!(this.step, Step::Done), "a future was polled after it was ready");
        let outcome = ready!(this.poll_outcome(context));
        this.step = Step::Done;
        Poll::Ready(outcome)
    }
}

/// A publication that the log, or a shard's mailbox, has accepted: see [`Namespace::enqueue`](crate::Namespace::enqueue).
#[derive(Debug)]
#[must_use = "await its outcome, or drop it to wait for nobody"]
pub struct Enqueued {
    publisher: Publisher,
    wants: Wants,
    position: Position,
    awaited: Option<Awaited>,
}

impl Enqueued {
    /// Waits for the connections: see [`Wants`]. May be dropped, which withdraws nothing. The receipt counts connections
    /// only for [`Wants::Outcome`]; otherwise it has the position and nothing else.
    ///
    /// # Errors
    /// [`PublishError::Closed`] if a shard was abandoned when the engine ended.
    pub async fn outcome(self) -> Result<Receipt, PublishError> {
        let Self { publisher, wants, position, awaited } = self;
        let mut submission = Submission { publisher: &publisher, wants, step: Step::Done };
        match submission.accepted((position, awaited)) {
            Some(receipt) => Ok(receipt),
            None => submission.await,
        }
    }
}

/// A queue at which publishers wait for room: the log, or a mailbox.
trait Bounded {
    /// Whether it has no room now. Never once it is closed.
    fn is_full(&self) -> bool;

    fn waiting(&self) -> &WaitList;
}

impl Bounded for Log<Entry> {
    fn is_full(&self) -> bool {
        Self::is_full(self)
    }

    fn waiting(&self) -> &WaitList {
        &self.waiting
    }
}

impl Bounded for Mailbox<Command, mio::Waker> {
    fn is_full(&self) -> bool {
        Self::is_full(self)
    }

    fn waiting(&self) -> &WaitList {
        &self.waiting
    }
}

/// Completes when the value was accepted. Boxed, because waiting is rare and the future is large: inline, it
/// would enlarge the future of every publisher.
type Room<'a, T> = Pin<Box<dyn Future<Output = Result<T, PublishError>> + Send + 'a>>;

/// The position, and the outcome to await, if the publisher wants one.
type Submitted = (Position, Option<Awaited>);

/// A publication that has not been accepted yet. Its renditions are kept for the next attempt.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) publication: Publication,
    renditions: Option<Renditions>,
}

impl From<Publication> for Draft {
    fn from(publication: Publication) -> Self {
        Self { publication, renditions: None }
    }
}

/// Where a publication goes: to one connection's shard, or through the log.
enum Destination {
    Shard(ConnectionId),
    Log(Target),
}

/// What a publisher waits for after its publication was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// Nothing: a slow consumer gets the message when its outbox has room.
    Nothing,
    /// That every recipient has room. It may have it already, and then there is nothing to wait for.
    Room,
    /// How many recipients accepted the frame, dropped it or disconnected. For that, the message is delivered apart from
    /// its neighbours, which costs more.
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
    /// Whether this much is at most one `part`th of every outbox.
    fn holds(&self, part: u64, frames: u64, bytes: u64) -> bool {
        // Relaxed: see `expect`.
        frames <= self.frames.load(Relaxed) / part && bytes <= self.bytes.load(Relaxed) / part
    }
}
