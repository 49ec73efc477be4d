//! Attendance: the users of one group, with the number of their connections and what was announced of them.
//!
//! Owned by the group's entry in the directory, behind a lock, because a user's connections are on several shards.
//! Every first join and last leave of a user is decided here. Announcing is left to one shard (the watcher), which
//! compares what is with what was announced last: so changes alternate, however joins and leaves are interleaved, and
//! those that cancel each other out are never seen. Pure. Does not know shards, groups or the log.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::presence::{PresenceKind, Present};

/// Users for which a map keeps its memory when they have left.
const CAPACITY_KEPT: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Attendance {
    users: HashMap<Arc<str>, Attendee>,
}

/// One user of the group.
#[derive(Debug)]
struct Attendee {
    connections: usize,
    /// `Joined` was announced, and `Left` was not since.
    is_shown: bool,
    /// The watcher knows of it and will look at it again.
    is_watched: bool,
    since: Instant,
    /// When a user without connections is no longer present.
    until: Instant,
    metadata: Option<Arc<[u8]>>,
}

/// What the watcher must do about a user.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing; it is not watched any more.
    Settled,
    /// Look again then.
    Wait(Instant),
    /// Announce it, and then say so by `announced`.
    Announce { kind: PresenceKind, since: Instant, metadata: Option<Arc<[u8]>> },
}

impl Attendance {
    /// Users that count as present.
    pub(crate) fn len(&self) -> usize {
        self.users.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// A connection of the user has joined; true if the watcher must be told. `is_observed`: changes are announced.
    pub(crate) fn join(
        &mut self,
        user: &Arc<str>,
        metadata: Option<Arc<[u8]>>,
        now: Instant,
        is_observed: bool,
    ) -> bool {
        let attendee = self.users.entry(user.clone()).or_insert_with(|| Attendee {
            connections: 0,
            is_shown: false,
            is_watched: false,
            since: now,
            until: now,
            metadata: None,
        });
        attendee.connections += 1;
        if metadata.is_some() {
            attendee.metadata = metadata;
        }
        let is_first = attendee.connections == 1;
        let is_news = is_observed && is_first && !attendee.is_shown && !attendee.is_watched;
        attendee.is_watched |= is_news;
        is_news
    }

    /// A connection of the user has left; true if the watcher must be told. The user counts as present until `until`, if
    /// `Joined` was announced.
    pub(crate) fn leave(&mut self, user: &str, until: Instant) -> bool {
        let Some(attendee) = self.users.get_mut(user) else { return false };
        attendee.connections = attendee.connections.saturating_sub(1);
        if attendee.connections > 0 {
            return false;
        }
        attendee.until = until;
        if attendee.is_shown || attendee.is_watched {
            return !std::mem::replace(&mut attendee.is_watched, true);
        }
        self.remove(user);
        false
    }

    /// The watcher could not be told of the user.
    pub(crate) fn unwatch(&mut self, user: &str) {
        let Some(attendee) = self.users.get_mut(user) else { return };
        attendee.is_watched = false;
        if attendee.connections == 0 && !attendee.is_shown {
            self.remove(user);
        }
    }

    /// What to do about a watched user now.
    pub(crate) fn look(&mut self, user: &str, now: Instant) -> Verdict {
        let Some(attendee) = self.users.get_mut(user) else { return Verdict::Settled };
        let announce =
            |kind| Verdict::Announce { kind, since: attendee.since, metadata: attendee.metadata.clone() };
        match (attendee.connections > 0, attendee.is_shown) {
            (true, false) => announce(PresenceKind::Joined),
            (false, true) if attendee.until > now => Verdict::Wait(attendee.until),
            (false, true) => announce(PresenceKind::Left),
            (true, true) => {
                attendee.is_watched = false;
                Verdict::Settled
            }
            (false, false) => {
                self.remove(user);
                Verdict::Settled
            }
        }
    }

    /// The change that `look` returned was announced. The user is not watched any more.
    pub(crate) fn announced(&mut self, user: &str, kind: PresenceKind) {
        match kind {
            PresenceKind::Joined => {
                if let Some(attendee) = self.users.get_mut(user) {
                    (attendee.is_shown, attendee.is_watched) = (true, false);
                }
            }
            PresenceKind::Left => {
                self.remove(user);
            }
        }
    }

    /// Watches every user of whom something must be announced and that is not watched; returns these. Removes users who
    /// have left and were never announced.
    pub(crate) fn watch_all(&mut self) -> Vec<Arc<str>> {
        self.users.retain(|_, attendee| attendee.connections > 0 || attendee.is_shown || attendee.is_watched);
        let is_due = |(_, attendee): &(&Arc<str>, &mut Attendee)| {
            !attendee.is_watched && attendee.is_shown != (attendee.connections > 0)
        };
        let watched = |(user, attendee): (&Arc<str>, &mut Attendee)| {
            attendee.is_watched = true;
            user.clone()
        };
        self.users.iter_mut().filter(is_due).map(watched).collect()
    }

    fn remove(&mut self, user: &str) {
        self.users.remove(user);
        // A map does not shrink by itself.
        if self.users.capacity() > CAPACITY_KEPT && self.users.len() < self.users.capacity() / 4 {
            self.users.shrink_to(self.users.len() * 2);
        }
    }

    pub(crate) fn set_metadata(&mut self, user: &str, metadata: &Arc<[u8]>) {
        if let Some(attendee) = self.users.get_mut(user) {
            attendee.metadata = Some(metadata.clone());
        }
    }

    pub(crate) fn metadata_of(&self, user: &str) -> Option<Arc<[u8]>> {
        self.users.get(user)?.metadata.clone()
    }

    /// Everyone who is present.
    pub(crate) fn list(&self) -> Vec<Present> {
        let present = |(user, attendee): (&Arc<str>, &Attendee)| Present {
            user: user.clone(),
            connections: attendee.connections,
            since: attendee.since,
            metadata: attendee.metadata.clone(),
        };
        self.users.iter().map(present).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What happens to one user's attendance.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        Join,
        Leave,
        /// The watcher looks, with room for a change or without.
        Look(bool),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::Join),
            3 => Just(Step::Leave),
            2 => any::<bool>().prop_map(Step::Look),
            1 => (0u64..8).prop_map(Step::Wait),
        ]
    }

    proptest! {
        #[test]
        fn changes_alternate_and_end_with_what_is_so(steps in prop::collection::vec(step(), 1..200)) {
            let user: Arc<str> = "ada".into();
            let (mut attendance, mut now) = (Attendance::default(), Instant::now());
            let (mut connections, mut announced, mut is_watched) = (0, Vec::new(), false);
            let grace = std::time::Duration::from_millis(4);
            let mut look = |attendance: &mut Attendance, now, has_room, is_watched: &mut bool| {
                match attendance.look(&user, now) {
                    Verdict::Settled => *is_watched = false,
                    Verdict::Announce { kind, .. } if has_room => {
                        attendance.announced(&user, kind);
                        announced.push(kind);
                        *is_watched = false;
                    }
                    Verdict::Announce { .. } | Verdict::Wait(_) => {}
                }
            };
            for step in steps {
                match step {
                    Step::Join => {
                        connections += 1;
                        let is_news = attendance.join(&user, None, now, true);
                        prop_assert!(!is_news || !is_watched, "it is told once");
                        is_watched |= is_news;
                    }
                    Step::Leave if connections > 0 => {
                        connections -= 1;
                        let is_news = attendance.leave(&user, now + grace);
                        prop_assert!(!is_news || !is_watched, "it is told once");
                        is_watched |= is_news;
                    }
                    Step::Look(has_room) if is_watched => look(&mut attendance, now, has_room, &mut is_watched),
                    Step::Wait(millis) => now += std::time::Duration::from_millis(millis),
                    Step::Leave | Step::Look(_) => {}
                }
                prop_assert_eq!(attendance.list().iter().map(|one| one.connections).sum::<usize>(), connections);
            }
            now += grace;
            while is_watched {
                look(&mut attendance, now, true, &mut is_watched);
            }
            for (index, kind) in announced.iter().enumerate() {
                prop_assert_eq!(*kind == PresenceKind::Joined, index % 2 == 0, "{:?}", announced);
            }
            prop_assert_eq!(announced.len() % 2 == 1, connections > 0);
            prop_assert_eq!(attendance.is_empty(), connections == 0);
            prop_assert!(attendance.watch_all().is_empty(), "nothing was missed");
        }
    }

    #[test]
    fn a_user_of_whom_nobody_could_be_told_is_found_again_or_forgotten() {
        let (now, user): (_, Arc<str>) = (Instant::now(), "ada".into());
        let mut attendance = Attendance::default();
        assert!(attendance.join(&user, None, now, true));
        attendance.unwatch(&user);
        assert_eq!(attendance.watch_all(), std::slice::from_ref(&user));
        attendance.unwatch(&user);
        assert!(!attendance.leave(&user, now) && attendance.is_empty(), "it was never announced");
        assert!(attendance.join(&user, None, now, true) && !attendance.leave(&user, now));
        attendance.unwatch(&user);
        assert!(attendance.is_empty());
    }
}
