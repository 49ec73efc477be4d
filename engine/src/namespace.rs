//! A namespace: connections that can be addressed together, and their groups.
//!
//! The handle through which everything is sent. Cloneable, usable from any thread and any
//! task. Does not know how things get to the shards (`publisher.rs`), sockets, or what
//! payloads mean.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::admission::Place;
use crate::close_code::{CloseCode, InvalidCloseCode};
use crate::close_reason::CloseReason;
use crate::command::{Action, Adoption, Command, Payload, Survey};
use crate::config::{ConfigError, ConnectionConfig};
use crate::engine_core::EngineCore;
use crate::frame::Frame;
use crate::handler::MakeHandler;
use crate::id::ConnectionId;
use crate::metrics::{ConnectionMetrics, GroupMetrics};
use crate::policy::Policy;
use crate::position::Position;
use crate::publisher::{GROUP_NAME_BYTES_MAX, Publisher, SendError, To, TrySendError, Wants};
use crate::receipt::Receipt;
use crate::socket::Socket;
use crate::wait_list::Refused;

/// Connections that can be addressed together. See the [crate] documentation for an example.
#[derive(Debug, Clone)]
pub struct Namespace {
    publisher: Publisher,
}

impl Namespace {
    pub(crate) fn new(core: Arc<EngineCore>, name: &str) -> Self {
        Self { publisher: Publisher::new(core, name) }
    }

    /// A handle to the same connections whose publications follow `policy`, whatever a connection's own is.
    ///
    /// # Errors
    /// A setting out of range.
    pub fn with_policy(&self, policy: Policy) -> Result<Self, ConfigError> {
        policy.validate()?;
        Ok(Self { publisher: self.publisher.with_policy(policy) })
    }

    /// Sends `frame` to all of `to` but `except`. Ends when every target has taken it or has gone; while
    /// nobody is behind whose policy is `Block`, that is as soon as the log has it.
    ///
    /// Frames sent one after the other reach every connection in that order. Dropping this future, as a timeout
    /// around it does, does not take the frame back: once it was accepted it is delivered, so sending it again may send
    /// it twice.
    ///
    /// # Errors
    /// [`SendError::Closed`] if the engine has ended, [`SendError::Overloaded`] if too many publishers wait,
    /// [`SendError::TooLong`] for a frame that no outbox can hold.
    pub async fn publish(&self, to: To<'_>, except: &[ConnectionId], frame: Frame) -> Result<(), SendError> {
        self.publisher.submit(to, except, Payload::Frame(frame), Wants::Room).await.map(drop)
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
        self.publisher.submit(to, except, Payload::Frame(frame), Wants::Outcome).await
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
        self.publisher.try_submit(to, except, Payload::Frame(frame), Wants::Nothing).map(drop).map_err(
            |refused| match refused.map(Payload::into_frame) {
                Refused::Full(frame) => {
                    self.publisher.core().wake_laggards(1);
                    TrySendError::Full(frame)
                }
                Refused::Closed(frame) => TrySendError::Closed(frame),
            },
        )
    }

    /// Makes the connection a member of the group. When this has returned, the next publication by anyone
    /// includes it; earlier ones do not. Joining twice is joining once; a connection that has gone joins nothing.
    /// One that is in [`max_groups`](ConnectionConfig::max_groups) groups already is ended. Returns a place in the order:
    /// every publication behind it includes the connection; of those before, only some that were published during this call
    /// may. Everyone has a connection as
    /// a member only when its [`on_open`](crate::Handler::on_open) is done; groups have it at once.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish), and [`SendError::GroupNameTooLong`].
    pub async fn join(&self, id: ConnectionId, group: &str) -> Result<Position, SendError> {
        if group.len() > GROUP_NAME_BYTES_MAX {
            return Err(SendError::GroupNameTooLong);
        }
        if id.shard() >= self.publisher.shards() {
            return Ok(self.publisher.core().tail());
        }
        self.publisher.command(id, Action::Join(self.publisher.directory().enter(group, id.shard()))).await
    }

    /// Ends the connection's membership of the group: publications after this do not reach it, earlier ones do.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish).
    pub async fn leave(&self, id: ConnectionId, group: &str) -> Result<(), SendError> {
        match self.publisher.directory().find(group) {
            Some(group) => self.publisher.command(id, Action::Leave { group }).await.map(drop),
            None => Ok(()),
        }
    }

    /// Ends all connections of `to` but `except` with a close code and reason, after what was sent to them before.
    ///
    /// # Errors
    /// As for [`publish`](Self::publish), and [`SendError::InvalidCloseCode`]: then nobody is ended.
    pub async fn close(
        &self,
        to: To<'_>,
        except: &[ConnectionId],
        code: CloseCode,
        text: impl Into<std::borrow::Cow<'static, str>>,
    ) -> Result<(), SendError> {
        if !code.is_valid_on_wire() {
            return Err(InvalidCloseCode(code).into());
        }
        let reason = CloseReason::Application { code, text: text.into() };
        self.publisher.submit(to, except, Payload::End(reason), Wants::Nothing).await.map(drop)
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
        self.publisher.command(id, Action::Inspect(Box::new(on_metrics))).await.map(drop)
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
        let groups = match to {
            To::Connection(id) if except.contains(&id) => return Ok(()),
            To::Connection(id) => return self.inspect(id, move |metrics| on_metrics(metrics.into())).await,
            To::Everyone => None,
            To::Group(name) => Some(self.publisher.named(&[name])),
            To::Groups(names) => Some(self.publisher.named(names)),
        };
        let on_metrics: Arc<dyn Fn(GroupMetrics) + Send + Sync> = Arc::new(on_metrics);
        for shard in 0..self.publisher.shards() {
            let survey = Survey {
                directory: self.publisher.directory().clone(),
                groups: groups.clone(),
                except: SmallVec::from_slice(except),
                on_metrics: on_metrics.clone(),
            };
            self.publisher.submit_command(shard, Command::Survey(Box::new(survey))).await?;
        }
        Ok(())
    }

    /// Connections in the namespace.
    pub fn len(&self) -> usize {
        self.publisher.directory().everyone().len()
    }

    /// Whether there are no connections.
    pub fn is_empty(&self) -> bool {
        self.publisher.directory().everyone().is_empty()
    }

    /// Members of a group.
    pub fn group_len(&self, group: &str) -> usize {
        self.publisher.directory().find(group).map_or(0, |group| group.len())
    }

    /// Groups that have members.
    pub fn groups(&self) -> usize {
        self.publisher.directory().len()
    }

    /// Hands a connection over to the least loaded shard, which owns it from then on. The handshake is over;
    /// `received` is what the peer has sent since.
    ///
    /// # Errors
    /// A setting out of range, a socket that cannot be prepared, an engine that has ended, too many waiting.
    pub async fn adopt(&self, newcomer: Newcomer) -> Result<(), AdoptError> {
        let Newcomer { socket, received, handler, config, mut place } = newcomer;
        self.publisher.core().config.validate_with(&config)?;
        socket.prepare()?;
        self.publisher.expect(&config);
        let shard = place.choose_shard();
        let entrance = self.publisher.directory().enter_everyone(shard);
        let directory = self.publisher.directory().clone();
        let adoption = Adoption { socket, received, handler, config, directory, place, entrance };
        self.publisher.submit_command(shard, Command::Adopt(Box::new(adoption))).await?;
        Ok(())
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
