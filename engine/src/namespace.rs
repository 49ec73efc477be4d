//! A namespace: connections that can be addressed together, and their groups.
//!
//! The handle through which everything is sent. Cloneable, usable from any thread and
//! any task; needs no particular runtime. There is one path: a target is resolved to
//! groups, the frame goes through the log (or, for one connection, through its shard's
//! mailbox), and who must wait waits here. Does not know sockets, nor what payloads mean.
//!
//! When a publisher waits: only for members whose policy is `Block`, or for a receipt. While no member of the target is more than
//! half behind its bound and fewer than `window` publications are on their way, every
//! member surely has room, so publishing ends when the log has taken the frame. Else the
//! publication carries a ticket and ends when every target has taken it or has gone.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::admission::Place;
use crate::close_code::CloseCode;
use crate::close_reason::CloseReason;
use crate::command::{Action, Adoption, Command, Payload, Publication, Survey, Target};
use crate::config::{ConfigError, ConnectionConfig};
use crate::directory::{Directory, Group};
use crate::frame::Frame;
use crate::handler::MakeHandler;
use crate::id::ConnectionId;
use crate::metrics::{ConnectionMetrics, GroupMetrics};
use crate::policy::Policy;
use crate::publisher::Shared;
use crate::receipt::{self, Receipt, Ticket};
use crate::socket::Socket;
use crate::wait_list::{self, Refused, WaitList};

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

/// Connections that can be addressed together. See the [crate] documentation for an example.
#[derive(Debug, Clone)]
pub struct Namespace {
    shared: Arc<Shared>,
    directory: Arc<Directory>,
    window: Arc<Window>,
    /// Instead of what holds by itself: for several connections each one's own policy, for one connection `Block`.
    policy: Option<Policy>,
}

/// How much may be on its way without anybody asking whether there is room: half of the
/// smallest outbox that a connection of the namespace was adopted with.
#[derive(Debug)]
struct Window {
    frames: AtomicU64,
    bytes: AtomicU64,
}

/// A frame could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The engine is stopping or has ended.
    #[error("the engine has ended")]
    Closed,
    /// `publishers_waiting_max` publishers wait for room already.
    #[error("too many publishers wait for room already")]
    Overloaded,
    /// The frame is longer than [`Frame::BYTES_MAX`] (4 GiB − 1 B): send it in parts.
    #[error("the frame is longer than {max} bytes: send it in parts", max = Frame::BYTES_MAX)]
    TooLong,
}

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

impl Namespace {
    pub(crate) fn new(shared: Arc<Shared>, name: &str) -> Self {
        let directory = Directory::new(name, shared.mailboxes.len(), shared.next_group.clone());
        shared.beacons.name(directory.key(), directory.name());
        let window = Window { frames: AtomicU64::new(u64::MAX), bytes: AtomicU64::new(u64::MAX) };
        Self { shared, directory: Arc::new(directory), window: Arc::new(window), policy: None }
    }

    /// A handle to the same connections whose publications follow `policy`, whatever a connection's own is.
    ///
    /// # Errors
    /// A setting out of range.
    pub fn with_policy(&self, policy: Policy) -> Result<Self, ConfigError> {
        policy.validate()?;
        Ok(Self { policy: Some(policy), ..self.clone() })
    }

    /// Sends `frame` to all of `to` but `except`. Ends when every target has taken it or has gone; while
    /// nobody is behind whose policy is `Block`, that is as soon as the log has it.
    ///
    /// Frames sent one after the other reach every connection in that order.
    ///
    /// # Errors
    /// [`SendError::Closed`] if the engine has ended, [`SendError::Overloaded`] if too many publishers wait,
    /// [`SendError::TooLong`] for a frame that no outbox can hold.
    pub async fn publish(&self, to: To<'_>, except: &[ConnectionId], frame: Frame) -> Result<(), SendError> {
        let awaited = if self.has_room(&to, frame.len()) { None } else { Some(receipt::ticket(false)) };
        let (ticket, awaited) = awaited.unzip();
        if let Some(room) = self.dispatch(to, except, Payload::Frame(frame), ticket)? {
            room.await?;
        }
        if let Some(awaited) = awaited {
            let _ = poll_fn(|context| awaited.poll(context.waker())).await;
        }
        Ok(())
    }

    /// Like [`publish`](Self::publish), but always ends only when every target has taken the frame or has gone,
    /// and tells how many there were.
    ///
    /// # Errors
    /// As for `publish`.
    pub async fn send(
        &self,
        to: To<'_>,
        except: &[ConnectionId],
        frame: Frame,
    ) -> Result<Receipt, SendError> {
        let (ticket, awaited) = receipt::ticket(true);
        if let Some(room) = self.dispatch(to, except, Payload::Frame(frame), Some(ticket))? {
            room.await?;
        }
        Ok(poll_fn(|context| awaited.poll(context.waker())).await)
    }

    /// Like [`publish`](Self::publish), but never waits: for code that is not async. A peer that is behind
    /// gets the frame when it has room.
    ///
    /// # Errors
    /// [`TrySendError::Full`] if the log (for one connection: its shard's mailbox) is full; otherwise as for
    /// [`publish`](Self::publish).
    pub fn try_publish(&self, to: To<'_>, except: &[ConnectionId], frame: Frame) -> Result<(), TrySendError> {
        if frame.len() > Frame::BYTES_MAX {
            return Err(TrySendError::TooLong(frame));
        }
        let destination = self.resolve(to, except);
        // Looked at last: where nobody is there any more, that may be because the end has come.
        if self.shared.stopping.is_closed() {
            return Err(TrySendError::Closed(frame));
        }
        let Some(destination) = destination else { return Ok(()) };
        let parcel = self.parcel(destination, except, Payload::Frame(frame), None);
        self.try_dispatch(parcel).map_err(|refused| match refused {
            Refused::Full(parcel) => {
                self.shared.wake_laggards(1);
                TrySendError::Full(parcel.into_frame())
            }
            Refused::Closed(parcel) => TrySendError::Closed(parcel.into_frame()),
        })
    }

    /// Makes the connection a member of the group. When this has returned, the next publication by anyone
    /// includes it; earlier ones do not. Joining twice is joining once; a connection that has gone joins nothing.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn join(&self, id: ConnectionId, group: &str) -> Result<(), SendError> {
        if id.shard() >= self.shared.mailboxes.len() {
            return Ok(());
        }
        self.command(id, Action::Join(self.directory.enter(group, id.shard()))).await
    }

    /// Ends the connection's membership of the group: publications after this do not reach it, earlier ones do.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn leave(&self, id: ConnectionId, group: &str) -> Result<(), SendError> {
        match self.directory.find(group) {
            Some(group) => self.command(id, Action::Leave { group }).await,
            None => Ok(()),
        }
    }

    /// Ends all connections of `to` but `except` with a close code and reason, after what was sent to them before.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn close(
        &self,
        to: To<'_>,
        except: &[ConnectionId],
        code: CloseCode,
        text: impl Into<std::borrow::Cow<'static, str>>,
    ) -> Result<(), SendError> {
        let reason = CloseReason::Application { code, text: text.into() };
        match self.dispatch(to, except, Payload::End(reason), None)? {
            Some(room) => room.await,
            None => Ok(()),
        }
    }

    /// What a connection has counted, after everything that was sent before; `on_metrics` is called on its
    /// shard, or never if the connection has gone.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn inspect(
        &self,
        id: ConnectionId,
        on_metrics: impl FnOnce(ConnectionMetrics) + Send + 'static,
    ) -> Result<(), SendError> {
        self.command(id, Action::Inspect(Box::new(on_metrics))).await
    }

    /// What all of `to` but `except` have counted together, after everything that was sent before. `on_metrics` is
    /// called once on each shard, with that shard's part; when it is dropped, all parts have come. Costs each shard
    /// a look at each of its connections (for groups: at each member).
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn survey(
        &self,
        to: To<'_>,
        except: &[ConnectionId],
        on_metrics: impl Fn(GroupMetrics) + Send + Sync + 'static,
    ) -> Result<(), SendError> {
        let key = |name: &&str| self.directory.find(name).map(|group| group.key);
        let groups = match to {
            To::Connection(id) if except.contains(&id) => return Ok(()),
            To::Connection(id) => return self.inspect(id, move |metrics| on_metrics(metrics.into())).await,
            To::Everyone => None,
            To::Group(name) => Some(key(&name).into_iter().collect::<Box<[_]>>()),
            To::Groups(names) => Some(names.iter().filter_map(key).collect()),
        };
        let on_metrics: Arc<dyn Fn(GroupMetrics) + Send + Sync> = Arc::new(on_metrics);
        for shard in 0..self.shared.mailboxes.len() {
            let survey = Survey {
                directory: self.directory.clone(),
                groups: groups.clone(),
                except: SmallVec::from_slice(except),
                on_metrics: on_metrics.clone(),
            };
            if let Some(room) = self.deliver(Parcel::Command(shard, Command::Survey(Box::new(survey))))? {
                room.await?;
            }
        }
        Ok(())
    }

    /// Connections in the namespace.
    pub fn len(&self) -> usize {
        self.directory.everyone().len()
    }

    /// Whether there are no connections.
    pub fn is_empty(&self) -> bool {
        self.directory.everyone().is_empty()
    }

    /// Members of a group.
    pub fn group_len(&self, group: &str) -> usize {
        self.directory.find(group).map_or(0, |group| group.len())
    }

    /// Groups that have members.
    pub fn groups(&self) -> usize {
        self.directory.len()
    }

    /// Hands a connection over to the least loaded shard, which owns it from then on. The handshake is over;
    /// `received` is what the peer has sent since.
    ///
    /// # Errors
    /// A setting out of range, a socket that cannot be prepared, an engine that has ended, too many waiting.
    pub async fn adopt(&self, newcomer: Newcomer) -> Result<(), AdoptError> {
        let Newcomer { socket, received, handler, config, mut place } = newcomer;
        config.validate()?;
        socket.prepare()?;
        self.window.frames.fetch_min(config.outbox_frames as u64 / 2, Relaxed); // Relaxed: a hint
        self.window.bytes.fetch_min(config.outbox_bytes as u64 / 2, Relaxed);
        let shard = place.choose_shard();
        let entrance = self.directory.enter_everyone(shard);
        let directory = self.directory.clone();
        let adoption = Adoption { socket, received, handler, config, directory, place, entrance };
        let parcel = Parcel::Command(shard, Command::Adopt(Box::new(adoption)));
        match self.deliver(parcel)? {
            Some(room) => Ok(room.await?),
            None => Ok(()),
        }
    }

    /// Whether every target surely has room for one more frame of `bytes`.
    fn has_room(&self, to: &To<'_>, bytes: usize) -> bool {
        let on_their_way = match to {
            To::Connection(id) => {
                self.shared.mailboxes.get(id.shard()).map_or(0, |mailbox| mailbox.len() as u64)
            }
            _ => self.shared.log.in_flight(),
        };
        // Relaxed: a hint; a connection with a smaller outbox than all before is just being adopted.
        let within = on_their_way < self.window.frames.load(Relaxed)
            && (on_their_way + 1).saturating_mul(bytes as u64) <= self.window.bytes.load(Relaxed);
        let find = |name: &&str| self.directory.find(name);
        // For one connection `Block` holds, whatever its own policy is.
        let (waits, for_any) = match (self.policy, to) {
            (Some(policy), _) => (policy.blocks(), true),
            (None, To::Connection(_)) => (true, true),
            (None, _) => (true, false),
        };
        let is_behind = |group: &Group| if for_any { group.is_congested() } else { group.is_blocking() };
        let is_waited_for = match to {
            To::Everyone | To::Connection(_) => is_behind(self.directory.everyone()),
            To::Group(name) => find(name).is_some_and(|group| is_behind(&group)),
            To::Groups(names) => names.iter().filter_map(find).any(|group| is_behind(&group)),
        };
        within && !(waits && is_waited_for)
    }

    /// Sends to a target, if there is room; otherwise gives the future that does it as soon as there is.
    fn dispatch(
        &self,
        to: To<'_>,
        except: &[ConnectionId],
        payload: Payload,
        ticket: Option<Ticket>,
    ) -> Result<Option<Room<'_>>, SendError> {
        if matches!(&payload, Payload::Frame(frame) if frame.len() > Frame::BYTES_MAX) {
            return Err(SendError::TooLong);
        }
        let destination = self.resolve(to, except);
        // Looked at last: where nobody is there any more, that may be because the end has come.
        if self.shared.stopping.is_closed() {
            return Err(SendError::Closed);
        }
        let Some(destination) = destination else { return Ok(None) };
        self.deliver(self.parcel(destination, except, payload, ticket))
    }

    /// Where a target's members are; none if nobody is there.
    fn resolve(&self, to: To<'_>, except: &[ConnectionId]) -> Option<Destination> {
        let occupied = |group: &Arc<Group>| !group.is_empty();
        Some(match to {
            To::Connection(id) => {
                let is_here = id.shard() < self.shared.mailboxes.len();
                Destination::Shard(Some(id).filter(|id| is_here && !except.contains(id))?)
            }
            To::Everyone => {
                let everyone = Some(self.directory.everyone()).filter(|group| occupied(group))?;
                Destination::Log(Target::One(everyone.clone()))
            }
            To::Group(name) => Destination::Log(Target::One(self.directory.find(name).filter(occupied)?)),
            To::Groups(names) => {
                let find = |name: &&str| self.directory.find(name).filter(occupied);
                let groups: Box<[_]> = names.iter().filter_map(find).collect();
                if groups.is_empty() {
                    return None;
                }
                Destination::Log(Target::Several(groups))
            }
        })
    }

    fn parcel(
        &self,
        destination: Destination,
        except: &[ConnectionId],
        payload: Payload,
        ticket: Option<Ticket>,
    ) -> Parcel {
        match destination {
            Destination::Shard(id) => {
                let action = match payload {
                    Payload::Frame(frame) => {
                        Action::Send { frame, policy: self.policy.unwrap_or_default(), ticket }
                    }
                    Payload::End(reason) => Action::Close(reason),
                };
                let command = Command::For { id, namespace: self.directory.key(), action };
                Parcel::Command(id.shard(), command)
            }
            Destination::Log(target) => {
                let except = SmallVec::from_slice(except);
                Parcel::Publication(Publication { target, except, payload, policy: self.policy, ticket })
            }
        }
    }

    fn try_dispatch(&self, parcel: Parcel) -> Result<(), Refused<Parcel>> {
        match parcel {
            Parcel::Publication(publication) => {
                self.shared.try_publish(publication).map_err(|refused| refused.map(Parcel::Publication))
            }
            Parcel::Command(shard, command) => self
                .shared
                .try_command(shard, command)
                .map_err(|refused| refused.map(|command| Parcel::Command(shard, command))),
        }
    }

    async fn command(&self, id: ConnectionId, action: Action) -> Result<(), SendError> {
        if id.shard() >= self.shared.mailboxes.len() {
            return Ok(()); // an id of another engine: nobody here has it
        }
        let command = Command::For { id, namespace: self.directory.key(), action };
        match self.deliver(Parcel::Command(id.shard(), command))? {
            Some(room) => room.await,
            None => Ok(()),
        }
    }

    fn deliver(&self, parcel: Parcel) -> Result<Option<Room<'_>>, SendError> {
        match self.try_dispatch(parcel) {
            Ok(()) => Ok(None),
            Err(Refused::Full(parcel)) => Ok(Some(Box::pin(self.wait_for_room(parcel)))),
            Err(Refused::Closed(_)) => Err(SendError::Closed),
        }
    }

    async fn wait_for_room(&self, parcel: Parcel) -> Result<(), SendError> {
        let mut parcel = Some(parcel);
        let mut place = wait_list::Ticket::default();
        poll_fn(|context| {
            // Twice: what makes room between the first try and the registration wakes nobody.
            for registered in [false, true] {
                let Some(taken) = parcel.take() else { return Poll::Ready(Ok(())) };
                match self.try_dispatch(taken) {
                    Ok(()) => return Poll::Ready(Ok(())),
                    Err(Refused::Closed(_)) => return Poll::Ready(Err(SendError::Closed)),
                    Err(Refused::Full(refused)) => {
                        let full = self.wait_list(&refused);
                        parcel = Some(refused);
                        if !registered && !full.register(&mut place, context.waker()) {
                            return Poll::Ready(Err(SendError::Overloaded));
                        }
                    }
                }
            }
            self.shared.wake_laggards(1);
            Poll::Pending
        })
        .await
    }

    fn wait_list(&self, parcel: &Parcel) -> &WaitList {
        match parcel {
            Parcel::Publication(_) => &self.shared.log.waiting,
            Parcel::Command(shard, _) => &self.shared.mailboxes[*shard].waiting,
        }
    }
}

/// Ends when there was room for a parcel. Boxed, because it is rare and large: held by value, it would make the
/// futures of all who publish as large.
type Room<'a> = Pin<Box<dyn Future<Output = Result<(), SendError>> + Send + 'a>>;

/// Where something is to go: to one connection's shard, or through the log.
enum Destination {
    Shard(ConnectionId),
    Log(Target),
}

/// What is on its way to a shard or to all.
enum Parcel {
    Publication(Publication),
    Command(usize, Command),
}

impl Parcel {
    fn into_frame(self) -> Frame {
        match self {
            Self::Publication(Publication { payload: Payload::Frame(frame), .. })
            | Self::Command(_, Command::For { action: Action::Send { frame, .. }, .. }) => frame,
            Self::Publication(_) | Self::Command(..) => unreachable!("only frames are given back"),
        }
    }
}

/// A connection whose handshake is over, and what an engine needs to own it.
pub struct Newcomer {
    /// The socket; nobody else reads or writes it from now on.
    pub socket: Socket,
    /// What the peer has sent behind its handshake.
    pub received: Bytes,
    /// Makes its handler, on the shard that owns it from then on: what lives long is allocated there.
    pub handler: MakeHandler,
    /// What holds for it; shared with others of the same settings.
    pub config: Arc<ConnectionConfig>,
    /// Its place in the engine, taken before the handshake was answered.
    pub place: Place,
}

impl std::fmt::Debug for Newcomer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Newcomer").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// A connection could not be handed over; its socket has been closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// A setting is out of range.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The socket could not be prepared.
    #[error("the socket could not be prepared")]
    Socket(#[from] std::io::Error),
    /// The engine did not take it.
    #[error(transparent)]
    Send(#[from] SendError),
}
