//! Presence: announces when users join and leave groups, and executes what other shards have sent.
//!
//! For each namespace one shard is the *watcher*. Shards that see a user's first connection join a group, or the last
//! one leave it, tell the watcher, which looks at the group's attendance: what it announced last, and what is so now.
//! The difference goes into the log as an entry, which gives it a position, and when the watcher reads the entry, the
//! observer is told. One shard announces, so changes alternate; it looks instead of being told what has changed, so
//! nothing is lost when it cannot keep up, and changes that cancel each other out are not announced.
//!
//! A user whose last connection has left is looked at again when its time to come back is over. If the observer or the
//! log has no room, the change waits here. Does not know what observers do.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::command::Command;
use crate::directory::{Directory, Group, Look, Observation};
use crate::engine_core::EngineCore;
use crate::entry::{Entry, Target};
use crate::position::Position;
use crate::presence::PresenceChange;
use crate::publication::Publication;
use crate::rendition::Renditions;
use crate::wait_list::Refused;

use super::Shard;

/// Commands from other shards, and users, that are looked at in one turn.
const PER_TURN: usize = 4096;
/// Users who may come back that are waited for. Beyond it, those that have waited longest are announced.
const RETURNING_MAX: usize = 65_536;
/// When to try again if the log or the observer has no room.
const RETRY: Duration = Duration::from_millis(5);

/// The users whom this shard watches.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// To look at, in the order in which they became known; with whether they are given no more time.
    due: VecDeque<(Arc<Group>, Arc<str>, bool)>,
    /// Those who have left and may come back, by the end of their time and a number.
    returning: BTreeMap<(Duration, u64), (Arc<Group>, Arc<str>)>,
    number: u64,
    /// There was no room for some of those that are due.
    retry_at: Option<Duration>,
}

impl Watch {
    /// Whether a turn can look at some of them now.
    pub(super) fn has_work(&self) -> bool {
        !self.due.is_empty() && self.retry_at.is_none()
    }

    pub(super) fn next_due(&self) -> Option<Duration> {
        let returning = self.returning.first_key_value().map(|((due, _), _)| *due);
        returning.into_iter().chain(self.retry_at).min()
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

impl Shard {
    /// Tells the watcher of the group's namespace that something may have to be announced of a user.
    pub(super) fn tell_watcher(&self, group: Arc<Group>, user: Arc<str>) {
        if let Some(directory) = group.directory() {
            self.core.watch(&directory, group, user);
        }
    }

    /// Executes what other shards have sent, and announces what is due.
    pub(super) fn advance_presence(&mut self) {
        for _ in 0..PER_TURN {
            let Some(command) = self.mailbox().pop_internal() else { break };
            self.execute_internal(command);
        }
        self.announce();
    }

    pub(super) fn execute_internal(&mut self, command: Command) {
        match command {
            Command::Watch { group, user } => {
                if let Some(directory) = group.directory()
                    && let Some(observation) = directory.observation()
                {
                    observation.take_news();
                }
                self.watch.due.push_back((group, user, false));
            }
            Command::WatchAll(directory) => {
                let all = directory.watch_all().into_iter();
                self.watch.due.extend(all.map(|(group, user)| (group, user, false)));
            }
            Command::For { id, namespace, action } => {
                if self.find(id).is_some_and(|connection| connection.directory().key() == namespace) {
                    self.act(id, action);
                }
            }
            Command::Adopt(_) | Command::Ask(_) => debug_assert!(false, "shards do not send these"),
        }
    }

    fn announce(&mut self) {
        let (now, watch) = (self.fanout.now, &mut self.watch);
        while let Some(first) = watch.returning.first_entry() {
            let is_over = first.key().0 <= now;
            if !is_over && watch.returning.len() <= RETURNING_MAX {
                break;
            }
            if let Some((_, (group, user))) = watch.returning.pop_first() {
                watch.due.push_back((group, user, !is_over));
            }
        }
        if watch.due.is_empty() || watch.retry_at.is_some_and(|at| at > now) {
            return;
        }
        watch.retry_at = None;
        for _ in 0..watch.due.len().min(PER_TURN) {
            let Some((group, user, is_final)) = watch.due.pop_front() else { break };
            let Some(directory) = group.directory() else { continue };
            let Some(observation) = directory.observation() else { continue };
            let mut failure = None;
            let look = if has_room(observation) {
                let at =
                    self.started + now + if is_final { Duration::from_secs(3600) } else { Duration::ZERO };
                group.look(&user, at, |change| {
                    let change = PresenceChange {
                        group: group.name().cloned(),
                        user: user.clone(),
                        kind: change.kind,
                        since: change.since,
                        metadata: change.metadata,
                        position: Position::default(), // known when it is read
                    };
                    let entry = Entry {
                        publication: Publication::presence(change),
                        target: Target::One(group.clone()),
                        renditions: Renditions::default(),
                        tickets: None,
                    };
                    failure = self.core.try_announce(entry).err();
                    failure.is_none()
                })
            } else {
                Look::NoRoom
            };
            match (look, failure) {
                (Look::Settled, _) => {}
                (Look::Announced, _) => {
                    observation.in_flight.fetch_add(1, Relaxed); // Relaxed: used by this shard only
                }
                (Look::Wait(until), _) => {
                    watch.number += 1;
                    let due = until.saturating_duration_since(self.started);
                    watch.returning.insert((due, watch.number), (group, user));
                }
                (Look::NoRoom, Some(Refused::Closed(()))) => return watch.clear(),
                (Look::NoRoom, failure) => {
                    watch.retry_at = Some(now + RETRY);
                    if failure.is_some() {
                        watch.due.push_front((group, user, is_final));
                        self.core.wake_laggards(1);
                        return;
                    }
                    // Another namespace's observer may have room. A whole pass keeps the order.
                    watch.due.push_back((group, user, is_final));
                }
            }
        }
    }
}

/// Whether the observer has room for one more change than there are in the log.
fn has_room(observation: &Observation) -> bool {
    let room = catch_unwind(AssertUnwindSafe(|| observation.observer.room())).unwrap_or(0);
    room > observation.in_flight.load(Relaxed) // Relaxed: as above
}

/// Tells the observer of a change that has been read from the log, on the watcher.
pub(super) fn deliver(
    core: &EngineCore,
    shard: usize,
    directory: &Directory,
    change: &PresenceChange,
    position: Position,
) {
    let Some(observation) = directory.observation() else { return };
    observation.in_flight.fetch_sub(1, Relaxed); // Relaxed: as above
    let _call = core.beacons.call(shard, directory.key());
    let change = PresenceChange { position, ..change.clone() };
    if catch_unwind(AssertUnwindSafe(|| observation.observer.on_change(change))).is_err() {
        tracing::error!(shard, "an observer of presence panicked");
    }
}
