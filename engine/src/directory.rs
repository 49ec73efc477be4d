//! The directory: what all threads can see of groups and users.
//!
//! Name → shared entry, and in the entry: which shards have members, how many members there are, how many of
//! them are congested, which users they belong to. Publishers read it, the members' shards update it. The lists of
//! members are in the shards. A user's connections are a group of their own kind: a user and a group of the same name
//! never meet. Guards of the concurrent maps never leave a function of this file.
//!
//! An entry lives from the first `enter` to the last `exit`, and longer while users who have left it still count as
//! present. The race between `enter` and `exit` is decided by the member count: 0 changes to `CLOSED` once, and a
//! thread that finds an entry closed makes a new one. So no member can be in an entry that nobody finds.
//!
//! Locks: an entry's attendance is locked by shards when a connection *with a user* joins or leaves, and by queries; a
//! limited user's list of connections when one of them opens or ends. No message takes a lock.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use crate::attendance::{Attendance, Verdict};
use crate::changes::{Changes, NamespaceChange};
use crate::id::{ConnectionId, GroupKey};
use crate::metrics::EndedTally;
use crate::presence::{PresenceKind, PresenceObserver, Present};
use crate::rendition::{ENCODINGS_MAX, Encoding};
use crate::sync::plain::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};
use crate::user_limits::UserLimits;

const CLOSED: u64 = u64::MAX;
/// A bit of the member count: users are present, so the entry must stay although it may have no members.
const ATTENDED: u64 = 1 << 62;

/// Users in groups that the shard which announces changes was told of and has not looked at yet, for each namespace.
/// Beyond it that shard looks at all of them.
const NEWS_MAX: usize = 65_536;

/// What a name is the name of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Group,
    User,
}

/// The shared entry of one group.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) key: GroupKey,
    /// None for everyone, which is in no map and never closed.
    name: Option<(Kind, Arc<str>)>,
    /// The directory that contains it, to find the entry that replaces this one.
    directory: Weak<Directory>,
    /// Members on all shards, including those whose join has not been executed yet, and `ATTENDED`; or `CLOSED`.
    members: AtomicU64,
    /// Users who are present; the number of those in `attendance`.
    users: AtomicU32,
    /// It waits in the directory's `changes`.
    is_changed: AtomicBool,
    /// The users of its members. Not for a user.
    attendance: OnceLock<Box<Mutex<Attendance>>>,
    /// A user's connections under a limit that ends the oldest, the oldest first.
    limited: OnceLock<Box<Mutex<Vec<ConnectionId>>>>,
    /// Members whose outbox is more than a quarter full; and of these, those whose policy is `Block`.
    congested: AtomicU32,
    blocking: AtomicU32,
    /// Members whose join has not been executed yet.
    arriving: AtomicU32,
    /// One bit per shard: set before a join returns, cleared only by the shard itself.
    ///
    /// A shard may clear the bit while a join is in its mailbox. It need not be woken then, because it is awake, and
    /// before it sleeps it looks at its mailbox and at the log. Who must know it nevertheless asks `has_arriving` first.
    interest: Box<[AtomicU64]>,
}

impl Group {
    fn new(key: GroupKey, name: Option<(Kind, Arc<str>)>, directory: Weak<Directory>, shards: usize) -> Self {
        let interest = (0..shards.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self {
            key,
            name,
            directory,
            members: AtomicU64::new(0),
            users: AtomicU32::new(0),
            is_changed: AtomicBool::new(false),
            attendance: OnceLock::new(),
            limited: OnceLock::new(),
            congested: AtomicU32::new(0),
            blocking: AtomicU32::new(0),
            arriving: AtomicU32::new(0),
            interest,
        }
    }

    /// The name of a group; none for everyone and for a user.
    pub(crate) fn name(&self) -> Option<&Arc<str>> {
        self.name.as_ref().filter(|(kind, _)| *kind == Kind::Group).map(|(_, name)| name)
    }

    fn is_user(&self) -> bool {
        matches!(self.name, Some((Kind::User, _)))
    }

    /// Counts one more member, unless the entry is closed or has `max` members.
    fn try_enter(&self, max: u64) -> Result<(), Refusal> {
        // AcqRel/Acquire: later callers see the count; the partner is `exit`.
        let one_more = |count: u64| (count != CLOSED && count & !ATTENDED < max).then(|| count + 1);
        match self.members.fetch_update(AcqRel, Acquire, one_more) {
            Ok(before) => {
                if before & !ATTENDED == 0 {
                    self.count_occupied(1);
                }
                Ok(())
            }
            Err(CLOSED) => Err(Refusal::Closed),
            Err(_) => Err(Refusal::Full),
        }
    }

    /// Adds to the number of groups that have members.
    fn count_occupied(&self, change: isize) {
        if self.name().is_some()
            && let Some(directory) = self.directory.upgrade()
        {
            directory.occupied.fetch_add(change as usize, Relaxed); // Relaxed: a counter; it wraps around to subtract
        }
    }

    /// The entry of the same name that has replaced this closed one, if there is one. At most one entry of a
    /// name is not closed, and that entry has all members.
    #[cold]
    fn successor(&self) -> Option<Arc<Group>> {
        let (kind, name) = self.name.as_ref()?;
        self.directory.upgrade()?.find(*kind, name)
    }

    /// Whether this entry is closed. Members that have joined since are in another one.
    pub(crate) fn is_closed(&self) -> bool {
        self.members.load(Acquire) == CLOSED
    }

    /// The key under which a shard has the group's members now.
    pub(crate) fn current_key(&self) -> Option<GroupKey> {
        if self.is_closed() { self.successor().map(|group| group.key) } else { Some(self.key) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Members on all shards now.
    pub(crate) fn len(&self) -> usize {
        match self.members.load(Acquire) {
            CLOSED => 0,
            count => (count & !ATTENDED) as usize,
        }
    }

    /// The directory that contains it; none while the namespace is being dropped.
    pub(crate) fn directory(&self) -> Option<Arc<Directory>> {
        self.directory.upgrade()
    }

    /// Users who are present.
    pub(crate) fn users(&self) -> usize {
        self.users.load(Relaxed) as usize // Relaxed: a counter
    }

    /// Everyone who is present, at one moment. Joins and leaves of the group wait meanwhile.
    pub(crate) fn present(&self) -> Vec<Present> {
        self.attendance.get().map_or_else(Vec::new, |attendance| lock(attendance).list())
    }

    /// Changes the attendance, and what follows from its size.
    fn attend<T>(&self, change: impl FnOnce(&mut Attendance) -> T) -> T {
        let attendance = self.attendance.get_or_init(Box::default);
        let mut attendance = lock(attendance);
        let was_empty = attendance.is_empty();
        let result = change(&mut attendance);
        self.users.store(attendance.len() as u32, Relaxed); // Relaxed: a counter, written under the lock only
        match (was_empty, attendance.is_empty()) {
            // A member has been counted, so the entry is not closed.
            (true, false) => self.members.fetch_or(ATTENDED, AcqRel),
            (false, true) => self.members.fetch_and(!ATTENDED, AcqRel),
            _ => return result,
        };
        drop(attendance);
        if let Some(directory) = self.directory.upgrade() {
            directory.close_if_empty(self);
        }
        result
    }

    /// A connection of the user has joined; true if the watcher must be told. Called after the join is counted.
    pub(crate) fn user_joins(&self, user: &Arc<str>, metadata: Option<Arc<[u8]>>, now: Instant) -> bool {
        if self.is_user() {
            return false;
        }
        let is_observed = self.directory.upgrade().is_some_and(|directory| directory.observation().is_some());
        self.attend(|attendance| attendance.join(user, metadata, now, is_observed))
    }

    /// A connection of the user has left; true if the watcher must be told. Called before the leave is counted.
    pub(crate) fn user_leaves(&self, user: &str, until: Instant) -> bool {
        !self.is_user() && self.attend(|attendance| attendance.leave(user, until))
    }

    /// The watcher could not be told.
    pub(crate) fn unwatch(&self, user: &str) {
        self.attend(|attendance| attendance.unwatch(user));
    }

    /// Decides what the watcher must do about a user. `announce` is called under the lock, and returns whether the
    /// change was announced.
    pub(crate) fn look(&self, user: &str, now: Instant, announce: impl FnOnce(Change) -> bool) -> Look {
        self.attend(|attendance| match attendance.look(user, now) {
            Verdict::Settled => Look::Settled,
            Verdict::Wait(until) => Look::Wait(until),
            Verdict::Announce { kind, since, metadata } => {
                if !announce(Change { kind, since, metadata }) {
                    return Look::NoRoom;
                }
                attendance.announced(user, kind);
                Look::Announced
            }
        })
    }

    pub(crate) fn set_metadata(self: &Arc<Self>, user: &Arc<str>, metadata: &Arc<[u8]>) {
        let Some(attendance) = self.attendance.get() else { return };
        lock(attendance).set_metadata(user, metadata);
        if let Some(directory) = self.directory.upgrade()
            && let Some(changes) = directory.changes.get()
        {
            changes.add(Changed::Metadata(self.clone(), user.clone()));
        }
    }

    /// What presence shows of a user besides the name.
    fn metadata_of(&self, user: &str) -> Option<Arc<[u8]>> {
        lock(self.attendance.get()?).metadata_of(user)
    }

    /// Adds a connection of this user, and returns those that it replaces: the oldest beyond `max`.
    pub(crate) fn replace_oldest(&self, id: ConnectionId, max: usize) -> Vec<ConnectionId> {
        let mut ids = lock(self.limited.get_or_init(Box::default));
        ids.push(id);
        let beyond = ids.len().saturating_sub(max);
        ids.drain(..beyond).collect()
    }

    /// The end of this user's connection is decided.
    pub(crate) fn forget_connection(&self, id: ConnectionId) {
        if let Some(ids) = self.limited.get() {
            lock(ids).retain(|other| *other != id);
        }
    }

    pub(crate) fn add_interest(&self, shard: usize) {
        // SeqCst: publishers read it after their claim, so they see every join that has returned.
        self.interest[shard / 64].fetch_or(1 << (shard % 64), SeqCst);
    }

    /// Called only by the shard itself, while it is awake.
    pub(crate) fn remove_interest(&self, shard: usize) {
        self.interest[shard / 64].fetch_and(!(1 << (shard % 64)), SeqCst);
    }

    /// Calls `each` for each shard that may have members.
    pub(crate) fn interested(&self, mut each: impl FnMut(usize)) {
        for (word, bits) in self.interest.iter().enumerate() {
            let mut bits = bits.load(SeqCst);
            while bits != 0 {
                each(word * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }

    #[cfg(feature = "audit")]
    pub(crate) fn audit_counts(&self) -> (u64, u64, u64) {
        let (congested, blocking) = (self.congested.load(Relaxed), self.blocking.load(Relaxed));
        (self.len() as u64, congested.into(), blocking.into())
    }

    #[cfg(feature = "audit")]
    pub(crate) fn audit_interest(&self, shard: usize) -> bool {
        self.interest[shard / 64].load(SeqCst) & (1 << (shard % 64)) != 0
    }

    /// Whether some member is congested.
    pub(crate) fn is_congested(&self) -> bool {
        // Relaxed: ordered by the log's cursors, see `Log::in_flight`.
        self.congested.load(Relaxed) > 0 || self.may_grow_congested()
    }

    /// Whether some member is congested for which publishers must wait.
    pub(crate) fn is_blocking(&self) -> bool {
        self.blocking.load(Relaxed) > 0 || self.may_grow_congested() // Relaxed: as above
    }

    /// Whether a member that joins may be congested: it is not counted as such before the join has been executed. Not
    /// in everyone: a connection that is opening is counted there, or it joins with an empty outbox.
    fn may_grow_congested(&self) -> bool {
        self.name.is_some() && self.has_arriving()
    }

    /// Whether joins have not been executed yet. If not, every join that has returned is in `interest` and in
    /// `congested`.
    pub(crate) fn has_arriving(&self) -> bool {
        self.arriving.load(Acquire) > 0 // pairs with `has_arrived`
    }

    /// A join has been executed: its shard is in `interest`, and the member is counted if it is congested. Or the join
    /// was dropped before.
    fn has_arrived(&self) {
        self.arriving.fetch_sub(1, Release); // pairs with the load above
    }

    pub(crate) fn add_congested(&self, blocks: bool) {
        self.congested.fetch_add(1, Relaxed); // Relaxed: as above
        self.blocking.fetch_add(blocks.into(), Relaxed);
    }

    pub(crate) fn remove_congested(&self, blocks: bool) {
        self.congested.fetch_sub(1, Relaxed); // Relaxed: as above
        self.blocking.fetch_sub(blocks.into(), Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a member was not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Closed,
    Full,
}

/// A change of presence to announce.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) kind: PresenceKind,
    pub(crate) since: Instant,
    pub(crate) metadata: Option<Arc<[u8]>>,
}

/// The watcher's next step for a user in a group.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Look {
    Settled,
    Wait(Instant),
    Announced,
    /// The change was not announced.
    NoRoom,
}

/// Who is told of changes of presence.
#[derive(Debug)]
pub(crate) struct Observation {
    pub(crate) observer: Box<dyn PresenceObserver>,
    /// Changes in the log that the observer has not been told of.
    pub(crate) in_flight: AtomicUsize,
    /// Users in groups that the watcher has not looked at yet.
    news: AtomicUsize,
    /// There were more.
    has_overflowed: AtomicBool,
}

impl Observation {
    /// Counts a user of whom the watcher is told; false if there are too many, and it must look at all.
    pub(crate) fn add_news(&self) -> bool {
        // Relaxed: a bound that need not be exact; the queue orders what it counts.
        let has_room = self.news.load(Relaxed) < NEWS_MAX;
        self.news.fetch_add(has_room.into(), Relaxed);
        has_room
    }

    /// The watcher has taken one of them.
    pub(crate) fn take_news(&self) {
        self.news.fetch_sub(1, Relaxed); // Relaxed: as above
    }

    /// There were too many of them; true if the watcher must be told to look at all.
    pub(crate) fn overflows(&self) -> bool {
        !self.has_overflowed.swap(true, AcqRel) // pairs with `watch_all`
    }
}

/// What waits in a directory's `changes`.
#[derive(Debug)]
enum Changed {
    /// The number of an entry's members.
    Members(Arc<Group>),
    /// The metadata of a user in a group.
    Metadata(Arc<Group>, Arc<str>),
}

/// The groups and users of one namespace.
#[derive(Debug)]
pub(crate) struct Directory {
    /// The namespace's name, for log lines.
    name: Arc<str>,
    everyone: Arc<Group>,
    groups: papaya::HashMap<Arc<str>, Arc<Group>>,
    users: papaya::HashMap<Arc<str>, Arc<Group>>,
    /// The rate limits of users.
    user_limits: UserLimits,
    /// Groups that have members.
    occupied: AtomicUsize,
    observation: OnceLock<Observation>,
    /// What has changed since it was taken last, for an application that asks for it.
    changes: OnceLock<Changes<Changed>>,
    next_key: Arc<AtomicU64>,
    /// Frames in flight to single connections that did not fit into the window.
    oversized: AtomicU32,
    /// For each shard: the sum of the namespace's connections that have ended there. Written only by that shard.
    ended: Box<[EndedTally]>,
    /// Connections that use each encoding.
    encodings: [AtomicU32; ENCODINGS_MAX],
}

impl Directory {
    /// `next_key` is shared by all directories of an engine, so that keys are unique there.
    pub(crate) fn new(name: &str, shards: usize, next_key: Arc<AtomicU64>) -> Arc<Self> {
        Arc::new_cyclic(|directory| {
            let everyone = Arc::new(Group::new(new_key(&next_key), None, directory.clone(), shards));
            let (ended, oversized) =
                ((0..shards).map(|_| EndedTally::default()).collect(), AtomicU32::new(0));
            Self {
                name: name.into(),
                everyone,
                groups: papaya::HashMap::new(),
                users: papaya::HashMap::new(),
                user_limits: UserLimits::default(),
                occupied: AtomicUsize::new(0),
                observation: OnceLock::new(),
                changes: OnceLock::new(),
                next_key,
                oversized,
                ended,
                encodings: Default::default(),
            }
        })
    }

    pub(crate) fn user_limits(&self) -> &UserLimits {
        &self.user_limits
    }

    /// The shard that watches the presence of users and announces its changes.
    pub(crate) fn watcher(&self) -> usize {
        self.key().0 as usize % self.ended.len()
    }

    pub(crate) fn observation(&self) -> Option<&Observation> {
        self.observation.get()
    }

    /// Sets who is told of changes of presence; false if it was set before.
    pub(crate) fn observe(&self, observer: Box<dyn PresenceObserver>) -> bool {
        let observation = Observation {
            observer,
            in_flight: AtomicUsize::new(0),
            news: AtomicUsize::new(0),
            has_overflowed: AtomicBool::new(false),
        };
        self.observation.set(observation).is_ok()
    }

    /// Watches all users of whom a change must be announced, and that are not watched; returns them.
    pub(crate) fn watch_all(&self) -> Vec<(Arc<Group>, Arc<str>)> {
        if let Some(observation) = self.observation() {
            // Before looking: what is not seen now is told again. Pairs with `overflows`.
            observation.has_overflowed.swap(false, AcqRel);
        }
        let mut groups: Vec<Arc<Group>> = self.groups.pin().values().cloned().collect();
        groups.push(self.everyone.clone());
        let mut found = Vec::new();
        for group in groups.into_iter().filter(|group| group.attendance.get().is_some()) {
            let users = group.attend(Attendance::watch_all);
            found.extend(users.into_iter().map(|user| (group.clone(), user)));
        }
        found
    }

    /// Keeps what changes from now on, until it is taken.
    pub(crate) fn track_changes(&self) {
        self.changes.get_or_init(Changes::new);
    }

    /// What has changed since the last call, as it is now; none if that were too many changes, or are not tracked.
    pub(crate) fn take_changes(&self) -> Option<Vec<NamespaceChange>> {
        let mut taken = Vec::new();
        let is_complete = self.changes.get()?.take_all(|changed| taken.extend(self.now(changed)));
        is_complete.then_some(taken)
    }

    /// What holds now of something that has changed.
    fn now(&self, changed: Changed) -> Option<NamespaceChange> {
        match changed {
            Changed::Members(entry) => {
                entry.is_changed.swap(false, AcqRel); // before looking; pairs with `members_change`
                let (kind, name) = entry.name.clone()?;
                // The entry may be closed, and another one have its name.
                let connections = self.find(kind, &name).map_or(0, |entry| entry.len());
                Some(match kind {
                    Kind::Group => NamespaceChange::Members { group: name, connections },
                    Kind::User => NamespaceChange::Connections { user: name, connections },
                })
            }
            Changed::Metadata(group, user) => {
                let metadata = group.metadata_of(&user)?;
                Some(NamespaceChange::Metadata { group: group.name().cloned(), user, metadata })
            }
        }
    }

    /// The number of an entry's members has changed.
    fn members_change(&self, entry: &Arc<Group>) {
        if let Some(changes) = self.changes.get()
            && entry.name.is_some()
            && !entry.is_changed.swap(true, AcqRel) // pairs with `now`
            && !changes.add(Changed::Members(entry.clone()))
        {
            entry.is_changed.swap(false, AcqRel); // it does not wait, so the next change may
        }
    }

    /// What presence shows of a user in a group, or in everyone, besides the name.
    pub(crate) fn metadata_in(&self, group: Option<&str>, user: &str) -> Option<Arc<[u8]>> {
        match group {
            None => self.everyone.metadata_of(user),
            Some(group) => self.find(Kind::Group, group)?.metadata_of(user),
        }
    }

    /// The group of all connections; its key also identifies the namespace.
    pub(crate) fn everyone(&self) -> &Arc<Group> {
        &self.everyone
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(crate) fn key(&self) -> GroupKey {
        self.everyone.key
    }

    pub(crate) fn ended(&self, shard: usize) -> &EndedTally {
        &self.ended[shard]
    }

    /// Whether frames are in flight that may make some outbox congested.
    pub(crate) fn has_oversized(&self) -> bool {
        self.oversized.load(Acquire) > 0 // pairs with the drop of `Oversized`
    }

    /// One more connection uses the encoding.
    pub(crate) fn add_encoding(&self, encoding: Encoding) {
        // Relaxed: a hint for publishers. A shard makes the renditions that they have not made.
        self.encodings[encoding.index()].fetch_add(1, Relaxed);
    }

    pub(crate) fn remove_encoding(&self, encoding: Encoding) {
        self.encodings[encoding.index()].fetch_sub(1, Relaxed); // Relaxed: as above
    }

    /// The encodings that connections use now, except the plain one.
    pub(crate) fn encodings_in_use(&self) -> impl Iterator<Item = Encoding> {
        let others = self.encodings.iter().enumerate().skip(1);
        others.filter(|(_, users)| users.load(Relaxed) > 0).map(|(index, _)| Encoding::from_index(index))
    }

    /// Counts one more connection, on `shard`.
    pub(crate) fn enter_everyone(self: &Arc<Self>, shard: usize) -> PendingJoin {
        let entered = self.everyone.try_enter(u64::MAX);
        debug_assert_eq!(entered, Ok(()), "everyone is never closed");
        self.everyone.arriving.fetch_add(1, Relaxed); // Relaxed: as in `enter_below`
        self.everyone.add_interest(shard);
        PendingJoin { directory: self.clone(), group: self.everyone.clone(), arrived: false }
    }

    fn map(&self, kind: Kind) -> &papaya::HashMap<Arc<str>, Arc<Group>> {
        match kind {
            Kind::Group => &self.groups,
            Kind::User => &self.users,
        }
    }

    pub(crate) fn find(&self, kind: Kind, name: &str) -> Option<Arc<Group>> {
        self.map(kind).pin().get(name).cloned()
    }

    /// The number of groups that have members.
    pub(crate) fn len(&self) -> usize {
        self.occupied.load(Relaxed) // Relaxed: a counter
    }

    /// The number of users who have connections.
    pub(crate) fn user_count(&self) -> usize {
        self.users.len()
    }

    /// Each group's or user's name, with the number of members and of users among them.
    pub(crate) fn list(&self, kind: Kind) -> Vec<(Arc<str>, usize, usize)> {
        let groups = self.map(kind).pin();
        let all = groups.iter().map(|(name, group)| (name.clone(), group.len(), group.users()));
        all.filter(|(_, members, _)| *members > 0).collect()
    }

    /// Counts one more member of `name`, on `shard`; makes the entry if there is none.
    pub(crate) fn enter(self: &Arc<Self>, name: &str, shard: usize) -> PendingJoin {
        let joined = self.enter_below(Kind::Group, name, shard, u64::MAX);
        joined.expect("a group has no limit on its members")
    }

    /// Counts one more connection of a user, on `shard`; none if the user has `max` connections.
    pub(crate) fn enter_user(self: &Arc<Self>, name: &str, shard: usize, max: u64) -> Option<PendingJoin> {
        self.enter_below(Kind::User, name, shard, max)
    }

    fn enter_below(self: &Arc<Self>, kind: Kind, name: &str, shard: usize, max: u64) -> Option<PendingJoin> {
        let groups = self.map(kind).pin();
        loop {
            let group = match groups.get(name) {
                Some(group) => group.clone(),
                None => {
                    let name: Arc<str> = name.into();
                    let (key, shards) = (new_key(&self.next_key), self.ended.len());
                    let fresh = Group::new(key, Some((kind, name.clone())), Arc::downgrade(self), shards);
                    let fresh = Arc::new(fresh);
                    groups.get_or_insert(name, fresh).clone()
                }
            };
            match group.try_enter(max) {
                Ok(()) => {
                    self.members_change(&group);
                    group.arriving.fetch_add(1, Relaxed); // Relaxed: visible to every thread that sees the join's return
                    group.add_interest(shard);
                    return Some(PendingJoin { directory: self.clone(), group, arrived: false });
                }
                Err(Refusal::Full) => return None,
                Err(Refusal::Closed) => self.forget(&group),
            }
        }
    }

    /// Counts one member less.
    pub(crate) fn exit(&self, group: &Arc<Group>) {
        let left = group.members.fetch_sub(1, AcqRel) - 1; // the partner is `try_enter`
        if left & !ATTENDED == 0 {
            group.count_occupied(-1);
        }
        self.members_change(group);
        if left == 0 {
            self.close_if_empty(group);
        }
    }

    /// Closes the entry if it has neither members nor users who are present.
    fn close_if_empty(&self, group: &Group) {
        if group.name.is_some() && group.members.compare_exchange(0, CLOSED, Release, Relaxed).is_ok() {
            self.forget(group);
        }
    }

    fn forget(&self, group: &Group) {
        if let Some((kind, name)) = &group.name {
            let is_it = |_: &Arc<str>, found: &Arc<Group>| std::ptr::eq(&**found, group);
            let _ = self.map(*kind).pin().remove_if(name, is_it);
        }
    }
}

/// Held by a frame in flight to one connection that did not fit into the window, until the frame is in its outbox.
#[derive(Debug)]
pub(crate) struct Oversized(Arc<Directory>);

impl Oversized {
    pub(crate) fn new(directory: Arc<Directory>) -> Self {
        directory.oversized.fetch_add(1, AcqRel);
        Self(directory)
    }
}

impl Drop for Oversized {
    fn drop(&mut self) {
        self.0.oversized.fetch_sub(1, AcqRel); // pairs with `has_oversized`: a congested outbox was counted before
    }
}

/// A member that is counted, but not yet in its shard's index. Dropping it without `commit` reverts the count.
#[derive(Debug)]
pub(crate) struct PendingJoin {
    directory: Arc<Directory>,
    group: Arc<Group>,
    arrived: bool,
}

impl PendingJoin {
    pub(crate) fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// The member is in its shard's index now. `exit` must be called when it leaves.
    pub(crate) fn commit(mut self) {
        self.arrived = true;
        self.group.has_arrived();
    }
}

impl Drop for PendingJoin {
    fn drop(&mut self) {
        if !self.arrived {
            self.group.has_arrived();
            self.directory.exit(&self.group);
        }
    }
}

fn new_key(next: &AtomicU64) -> GroupKey {
    GroupKey(next.fetch_add(1, Relaxed)) // Relaxed: only uniqueness matters
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> Arc<Directory> {
        Directory::new("test", 70, Arc::new(AtomicU64::new(0)))
    }

    #[test]
    fn a_group_lives_from_its_first_member_to_its_last() {
        let directory = directory();
        let first = directory.enter("room", 3);
        let again = directory.enter("room", 69);
        assert!(Arc::ptr_eq(first.group(), again.group()));
        let key = first.group().key;
        let mut shards = Vec::new();
        first.group().interested(|shard| shards.push(shard));
        assert_eq!(shards, [3, 69]);
        drop(first);
        assert_eq!(directory.find(Kind::Group, "room").map(|group| group.len()), Some(1));
        drop(again);
        assert!(directory.find(Kind::Group, "room").is_none() && directory.len() == 0);
        assert_ne!(directory.enter("room", 0).group().key, key);
    }

    #[test]
    fn concurrent_joins_and_leaves_never_lose_a_member_in_a_closed_entry() {
        let directory = directory();
        std::thread::scope(|scope| {
            for shard in 0..4 {
                let directory = &directory;
                scope.spawn(move || {
                    for _ in 0..10_000 {
                        let join = directory.enter("room", shard);
                        let found = directory.find(Kind::Group, "room").expect("a member is in it");
                        assert!(Arc::ptr_eq(&found, join.group()));
                    }
                });
            }
        });
        assert_eq!(directory.len(), 0);
    }
}
