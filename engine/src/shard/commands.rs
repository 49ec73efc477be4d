//! From the mailbox: commands to single connections, and new connections.
//!
//! Executes commands, each after the publications that it must come after, and keeps the list of what the
//! shard itself must do after everything that a handler has sent. Does not write to sockets.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::AcqRel;
use std::task::Poll;

use mio::Token;

use crate::close_code::CloseCode;
use crate::close_reason::CloseReason;
use crate::command::{Action, Adoption, Answer, Command, FirstMessage, Query};
use crate::config::UserLimit;
use crate::connection::{Awaited, Connection, ConnectionUser, Listed, Opening};
use crate::directory::{Kind, PendingJoin};
use crate::engine_core::sent_by_this_thread;
use crate::frame::ControlFrame;
use crate::id::{ConnectionId, GroupKey, Slot};
use crate::presence::User;
use crate::socket::Socket;

use super::{Later, Shard, Step};

const COMMANDS_PER_TURN: usize = 4096;
/// Reads of 4 KiB each, at most, of what a refused client has sent.
const TURN_AWAY_READS: usize = 16;

impl Shard {
    /// Executes the commands that were in the mailbox and the local queue when it began; false if some of them are
    /// left.
    pub(super) fn drain_mailbox(&mut self) -> bool {
        let queued = self.mailbox().len();
        let (mut left, mut local_left) = (queued.min(COMMANDS_PER_TURN), self.local.len());
        let (mut made_room, mut bytes) = (false, 0);
        let is_held_up = loop {
            if self.blocked_command.is_none()
                && self.later.front().is_some_and(|later| later.commands <= self.commands)
            {
                if self.carry_out_later() { continue } else { break true }
            }
            let entry = match self.blocked_command.take() {
                Some(entry) => entry,
                None if self.local.is_due() => {
                    // What has been sent since it began comes after everything that is executed now.
                    let Some(entry) = (local_left > 0).then(|| self.local.pop()).flatten() else {
                        break false;
                    };
                    local_left -= 1;
                    self.mailbox().tell_local(self.local.len());
                    self.commands += 1;
                    entry
                }
                None if left == 0 => break false,
                None => match self.mailbox().pop() {
                    Some(entry) => {
                        left -= 1;
                        made_room = true;
                        self.commands += 1;
                        self.local.took_other();
                        entry
                    }
                    None => break false,
                },
            };
            if !self.run_log(entry.after) {
                self.blocked_command = Some(entry);
                break true;
            }
            match entry.command {
                Command::Adopt(adoption) => self.adopt(*adoption),
                Command::Ask(query) => {
                    self.answer_query(&query);
                    drop_guarded(query);
                }
                command @ (Command::Watch { .. } | Command::WatchAll(_)) => self.execute_internal(command),
                Command::For { id, namespace, action } => {
                    if let Action::Send { payload, .. } = &action {
                        bytes += payload.plain_frame().len() as u64;
                    }
                    let found =
                        self.find(id).is_some_and(|connection| connection.directory().key() == namespace);
                    if found {
                        self.act(id, action);
                    } else {
                        drop_guarded(action);
                    }
                }
            }
        };
        if bytes > 0 {
            self.mailbox().release(bytes);
        }
        if made_room {
            self.mailbox().waiting.wake_all();
        }
        !is_held_up && queued <= COMMANDS_PER_TURN
    }

    fn answer_query(&mut self, query: &Query) {
        let key = query.directory.key();
        match &query.answer {
            Answer::Metrics(on_metrics) => {
                let metrics = self.fanout.sum_metrics(query, self.index);
                self.call_back(key, || on_metrics(metrics));
            }
            Answer::Presence { group, shards_left, on_presence } => {
                // AcqRel: the last shard sees what the others have executed.
                if shards_left.fetch_sub(1, AcqRel) == 1 {
                    let present = match group {
                        None => query.directory.everyone().present(),
                        Some(name) => {
                            let group = query.directory.find(Kind::Group, name);
                            group.map_or_else(Vec::new, |group| group.present())
                        }
                    };
                    self.call_back(key, || on_presence(present));
                }
            }
            Answer::Members(on_members) => {
                let members = self.fanout.members(query);
                self.call_back(key, || on_members(members));
            }
        }
    }

    /// Calls an application's callback on this shard.
    fn call_back(&self, namespace: GroupKey, call: impl FnOnce()) {
        let _call = self.core.beacons.call(self.index, namespace);
        if catch_unwind(AssertUnwindSafe(call)).is_err() {
            tracing::error!(shard = self.index, "a callback for metrics, members or groups panicked");
        }
    }

    /// Adds a step to the list, after everything that has been sent so far.
    pub(super) fn do_later(&mut self, id: ConnectionId, step: Step) {
        // The tail first, as in `EngineCore::try_command`.
        let (after, queued) = (self.core.log.tail(), self.mailbox().len() + self.local.len());
        let commands = self.commands + queued as u64;
        self.later.push_back(Later { after, commands, id, step });
    }

    /// Takes the first step of the list; false if the log cannot be run that far yet.
    fn carry_out_later(&mut self) -> bool {
        let Some(after) = self.later.front().map(|later| later.after) else { return true };
        if !self.run_log(after) {
            return false;
        }
        let Some(Later { id, step, .. }) = self.later.pop_front() else { return true };
        if self.find(id).is_some() {
            match step {
                Step::Enter => self.enter(id.slot()),
                Step::End(reason) => self.end(id.slot(), reason),
            }
        }
        true
    }

    pub(super) fn act(&mut self, id: ConnectionId, action: Action) {
        let slot = id.slot();
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let is_open = connection.is_open();
        match action {
            Action::Send { payload, delivery, ticket, oversized } if is_open => {
                self.offer_one(slot, payload, delivery, ticket);
                drop(oversized); // a congested outbox has been counted by now
            }
            Action::Join(joins) if is_open => {
                joins.into_iter().for_each(|join| self.join(slot, join));
            }
            Action::SetMetadata(metadata) if is_open => {
                connection.set_metadata(metadata.clone());
                if let Some(user) = connection.user().map(|user| user.name.clone()) {
                    self.fanout.groups.groups_of(slot).for_each(|group| group.set_metadata(&user, &metadata));
                }
            }
            Action::Leave(groups) => {
                let user = connection.presence();
                let congestion = connection.congestion();
                let directory = connection.directory().clone();
                for group in groups {
                    let left = self.fanout.groups.leave(group.key, slot);
                    self.has_left(&directory, &group, left, congestion, user.as_ref());
                }
            }
            Action::Close { reason, ticket } => {
                if let Some(ticket) = ticket.filter(|_| is_open) {
                    ticket.count(1, 0);
                }
                self.end(slot, reason);
            }
            Action::Identify(identity) if is_open && connection.is_anonymous_and_opening() => {
                let (user, join) = *identity;
                let join = self.set_user(slot, user, join);
                if let Some(opening) = self.fanout.connections[slot].opening_mut() {
                    opening.user = Some(join);
                }
            }
            Action::ExpireAt(at) if is_open => {
                connection.expire_at(at.map(|at| at.saturating_duration_since(self.started)));
                self.beat(slot);
            }
            Action::CloseAndListen { reason } => self.end_and_drain(slot, reason),
            Action::Control(frame) if is_open => {
                if connection.push_control(&frame) {
                    self.fanout.mark_dirty(slot);
                }
            }
            Action::Inspect(on_metrics) => {
                self.fanout.settle(slot);
                let connection = &self.fanout.connections[slot];
                let (metrics, key) = (connection.metrics(), connection.directory().key());
                self.call_back(key, || on_metrics(metrics));
            }
            Action::ListGroups(on_groups) => {
                let key = connection.directory().key();
                let names =
                    self.fanout.groups.groups_of(slot).filter_map(|group| group.name().cloned()).collect();
                self.call_back(key, || on_groups(names));
            }
            Action::IfMember(on_member) if is_open && connection.opening().is_none() => {
                let key = connection.directory().key();
                self.call_back(key, on_member);
            }
            action => drop_guarded(action),
        }
    }

    fn join(&mut self, slot: Slot, join: PendingJoin) {
        let open = self.fanout.connections.get_mut(slot).filter(|connection| connection.is_open());
        let Some(connection) = open else { return };
        // Without everyone and its user's group, which it joins together.
        let own =
            if connection.opening().is_some() { 0 } else { 1 + usize::from(connection.user().is_some()) };
        let max = connection.config().max_groups + own;
        let user = connection.user().cloned();
        let (group, congestion) = (join.group().clone(), connection.congestion());
        group.add_interest(self.index); // it may have been cleared since the join was sent
        if self.fanout.groups.join(group.key, group.clone(), slot) {
            if let Some(blocks) = congestion {
                group.add_congested(blocks);
            }
            join.commit();
            if let Some(user) = user
                && group.user_joins(&user.name, user.metadata, self.started + self.fanout.now)
            {
                self.tell_watcher(group, user.name);
            }
        }
        if self.fanout.groups.count(slot) > max {
            self.end(slot, CloseReason::TooManyGroups);
        }
    }

    /// The handler has finished `on_open`: the connection joins everyone, after everything that was sent meanwhile.
    pub(super) fn enter_in_order(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let (id, is_refused) = (connection.id(), connection.is_over());
        if let Some(opening) = connection.opening_mut() {
            opening.is_done = true;
            if !is_refused {
                self.do_later(id, Step::Enter);
            }
        }
    }

    fn enter(&mut self, slot: Slot) {
        let Some(connection) = self.fanout.connections.get_mut(slot) else { return };
        let Some(opening) = connection.take_opening() else { return };
        self.join(slot, opening.everyone);
        opening.user.into_iter().for_each(|join| self.join(slot, join));
        if self.fanout.connections.get(slot).is_some_and(Connection::is_idle) {
            self.go_on(slot);
        }
    }

    fn adopt(&mut self, adoption: Adoption) {
        let Adoption {
            mut socket,
            received,
            handler,
            config,
            encoding,
            directory,
            permit,
            join,
            rate_limit,
            user,
            first_message,
            expires_at,
        } = adoption;
        if self.shutdown.is_some() {
            drop_guarded(handler);
            return turn_away(&mut socket, CloseCode::GOING_AWAY);
        }
        let Some(slot) = self.fanout.connections.vacant() else {
            tracing::warn!(shard = self.index, "the shard is full: a connection was refused");
            drop_guarded(handler);
            return turn_away(&mut socket, CloseCode::TRY_AGAIN_LATER);
        };
        self.generations += 1;
        let id = ConnectionId::new(self.index, slot, self.generations);
        #[cfg(all(feature = "io-uring", target_os = "linux"))]
        if self.send_batch.is_some() {
            socket = socket.into_shared();
        }
        if let Err(error) = socket.register(self.poll.registry(), Token(slot.index())) {
            tracing::warn!(shard = self.index, %error, "a socket could not be registered: its connection was refused");
            drop_guarded(handler);
            return turn_away(&mut socket, CloseCode::TRY_AGAIN_LATER);
        }
        let shown = self.core.beacons.call(self.index, directory.key());
        let handler = match catch_unwind(AssertUnwindSafe(|| handler(id))) {
            Ok(handler) => handler,
            Err(_) => {
                tracing::error!(%id, "a handler panicked when it was made: its connection was refused");
                return turn_away(&mut socket, CloseCode::INTERNAL_ERROR);
            }
        };
        drop(shown);
        let now = self.fanout.now;
        let mut connection = Connection::open(id, socket, config, encoding, directory, handler, permit, now);
        if let Some(limit) = rate_limit {
            connection.share_rate_limit(limit, self.started);
        }
        connection.directory().add_encoding(encoding);
        self.fanout.connections.insert(connection);
        let user = user.map(|(user, join)| self.set_user(slot, user, join));
        if expires_at.is_some() {
            let at = expires_at.map(|at| at.saturating_duration_since(self.started));
            self.fanout.connections[slot].expire_at(at);
        }
        self.fanout.metrics.adopted += 1;
        self.fanout.flushes.adopt_outbox(self.fanout.connections[slot].config().outbox_frames);
        self.beat(slot);
        if let Some(FirstMessage { within, max_bytes }) = first_message {
            let awaits = Some(Awaited { by: self.fanout.now + within, max_bytes });
            let opening = Opening { everyone: join, user, is_done: false, awaits };
            self.fanout.connections[slot].begin_opening(opening);
            self.beat(slot);
            if !received.is_empty() {
                self.receive_early(slot, received);
            }
            return;
        }
        let before = sent_by_this_thread();
        let flow = self.call(slot, |handler, context| handler.on_open(context));
        if flow == Poll::Ready(()) && sent_by_this_thread() == before {
            // Nothing was sent meanwhile that must not reach this connection.
            if !self.fanout.connections[slot].is_over() {
                self.join(slot, join);
                user.into_iter().for_each(|join| self.join(slot, join));
            }
        } else {
            let opening = Opening { everyone: join, user, is_done: false, awaits: None };
            self.fanout.connections[slot].begin_opening(opening);
            if flow == Poll::Ready(()) {
                self.enter_in_order(slot);
            }
        }
        if !received.is_empty() {
            self.receive_early(slot, received);
        }
    }
}

impl Shard {
    /// Sets the user of a new connection, and ends the user's connections that it replaces.
    fn set_user(&mut self, slot: Slot, user: User, join: PendingJoin) -> PendingJoin {
        let connection = &mut self.fanout.connections[slot];
        let now = self.started + self.fanout.now;
        let rates = &connection.config().rate_limit;
        if let Some(limit) = connection.directory().user_limits().of(&user.name, rates, now) {
            connection.share_rate_limit(limit, self.started);
        }
        let (id, namespace, mut listed) = (connection.id(), connection.directory().key(), None);
        let mut replaced = Vec::new();
        if let Some(UserLimit::NewestWins(max)) = connection.config().max_connections_per_user {
            replaced = join.group().replace_oldest(id, max as usize);
            listed = Some(Listed { id, group: join.group().clone() });
        }
        connection.set_user(ConnectionUser { user, listed });
        for id in replaced {
            // At most one for each connection: it is not in the list any more.
            let action = Action::Close { reason: CloseReason::Replaced, ticket: None };
            self.core.mailboxes[id.shard()].push_internal(Command::For { id, namespace, action });
        }
        join
    }
}

/// Drops something that an application has given, whose drop may panic.
pub(super) fn drop_guarded<T>(value: T) {
    if catch_unwind(AssertUnwindSafe(|| drop(value))).is_err() {
        tracing::error!("a handler or a callback that was not called panicked when it was dropped");
    }
}

/// Sends a Close frame to a client whose connection is refused. One attempt: an unused socket has room for it.
fn turn_away(socket: &mut Socket, code: CloseCode) {
    let _ = socket.write(ControlFrame::close(code, "").as_bytes());
    socket.finish();
    // Dropping a socket with unread bytes resets it, and the Close frame is lost.
    let mut unread = [0; 4096];
    for _ in 0..TURN_AWAY_READS {
        if socket.read(&mut unread).unwrap_or(0) < unread.len() {
            break;
        }
    }
}
