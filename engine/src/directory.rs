//! The directory: what all threads can see of groups.
//!
//! Group name → shared entry, and in the entry: which shards have members, how many members there are, how
//! many of them are congested. Publishers read it, the members' shards update it. The lists of members are in
//! the shards. Guards of the concurrent map never leave a function of this file.
//!
//! An entry lives from the first `enter` to the last `exit`. The race between the two is decided by the
//! member count: 0 changes to `CLOSED` once, and a thread that finds an entry closed makes a new one. So no
//! member can be in an entry that nobody finds.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Weak};

use crate::id::GroupKey;
use crate::metrics::EndedTally;
use crate::rendition::{ENCODINGS_MAX, Encoding};

const CLOSED: u64 = u64::MAX;

/// The shared entry of one group.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) key: GroupKey,
    /// None for everyone, which is in no map and never closed.
    name: Option<Arc<str>>,
    /// The directory that contains it, to find the entry that replaces this one.
    directory: Weak<Directory>,
    /// Members on all shards, including those whose join has not been executed yet; or `CLOSED`.
    members: AtomicU64,
    /// Members whose outbox is more than a quarter full; and of these, those whose policy is `Block`.
    congested: AtomicU32,
    blocking: AtomicU32,
    /// Members whose join has not been executed yet: they may be congested and are not counted as such. Not
    /// used for everyone: a connection that is opening is counted there, or it joins with an empty outbox.
    arriving: AtomicU32,
    /// One bit per shard: set before a join returns, cleared only by the shard itself.
    ///
    /// A shard may clear the bit while a join is in its mailbox. That is safe, because it is awake then, and
    /// before it sleeps it looks at its mailbox and at the log.
    interest: Box<[AtomicU64]>,
}

impl Group {
    fn new(key: GroupKey, name: Option<Arc<str>>, directory: Weak<Directory>, shards: usize) -> Self {
        let interest = (0..shards.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self {
            key,
            name,
            directory,
            members: AtomicU64::new(0),
            congested: AtomicU32::new(0),
            blocking: AtomicU32::new(0),
            arriving: AtomicU32::new(0),
            interest,
        }
    }

    /// None for everyone.
    pub(crate) fn name(&self) -> Option<&Arc<str>> {
        self.name.as_ref()
    }

    fn try_enter(&self) -> bool {
        // AcqRel/Acquire: later callers see the count; the partner is `exit`.
        self.members.fetch_update(AcqRel, Acquire, |count| (count != CLOSED).then(|| count + 1)).is_ok()
    }

    /// The entry of the same name that has replaced this closed one, if there is one. At most one entry of a
    /// name is not closed, and that entry has all members.
    #[cold]
    fn successor(&self) -> Option<Arc<Group>> {
        self.directory.upgrade()?.find(self.name.as_deref()?)
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
        matches!(self.members.load(Acquire), 0 | CLOSED)
    }

    /// Members on all shards now.
    pub(crate) fn len(&self) -> usize {
        match self.members.load(Acquire) {
            CLOSED => 0,
            count => count as usize,
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

    /// Calls `wake` for each shard that may have members.
    pub(crate) fn interested(&self, mut wake: impl FnMut(usize)) {
        for (word, bits) in self.interest.iter().enumerate() {
            let mut bits = bits.load(SeqCst);
            while bits != 0 {
                wake(word * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
    }

    #[cfg(feature = "audit")]
    pub(crate) fn audit_counts(&self) -> (u64, u64, u64) {
        let (congested, blocking) = (self.congested.load(Relaxed), self.blocking.load(Relaxed));
        (self.members.load(Relaxed), congested.into(), blocking.into())
    }

    #[cfg(feature = "audit")]
    pub(crate) fn audit_interest(&self, shard: usize) -> bool {
        self.interest[shard / 64].load(SeqCst) & (1 << (shard % 64)) != 0
    }

    /// Whether some member is congested.
    pub(crate) fn is_congested(&self) -> bool {
        // Relaxed: ordered by the log's cursors, see `Log::in_flight`.
        self.congested.load(Relaxed) > 0 || self.arriving.load(Acquire) > 0
    }

    /// Whether some member is congested for which publishers must wait.
    pub(crate) fn is_blocking(&self) -> bool {
        self.blocking.load(Relaxed) > 0 || self.arriving.load(Acquire) > 0 // Relaxed: as above
    }

    /// A join has been executed, so the member is counted if it is congested; or the join was dropped before.
    fn has_arrived(&self) {
        if self.name.is_some() {
            self.arriving.fetch_sub(1, Release); // pairs with the loads above
        }
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

/// The groups of one namespace.
#[derive(Debug)]
pub(crate) struct Directory {
    /// The namespace's name, for log lines.
    name: Arc<str>,
    everyone: Arc<Group>,
    groups: papaya::HashMap<Arc<str>, Arc<Group>>,
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
    pub(crate) fn new(name: &str, shards: usize, next_key: Arc<AtomicU64>) -> Self {
        let everyone = Arc::new(Group::new(new_key(&next_key), None, Weak::new(), shards));
        let (ended, oversized) = ((0..shards).map(|_| EndedTally::default()).collect(), AtomicU32::new(0));
        Self {
            name: name.into(),
            everyone,
            groups: papaya::HashMap::new(),
            next_key,
            oversized,
            ended,
            encodings: Default::default(),
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
        self.everyone.try_enter();
        self.everyone.add_interest(shard);
        PendingJoin { directory: self.clone(), group: self.everyone.clone(), arrived: false }
    }

    pub(crate) fn find(&self, name: &str) -> Option<Arc<Group>> {
        self.groups.pin().get(name).cloned()
    }

    pub(crate) fn len(&self) -> usize {
        self.groups.len()
    }

    /// Each group's name and number of members.
    pub(crate) fn list(&self) -> Vec<(Arc<str>, usize)> {
        let groups = self.groups.pin();
        let all = groups.iter().map(|(name, group)| (name.clone(), group.len()));
        all.filter(|(_, members)| *members > 0).collect()
    }

    /// Counts one more member of `name`, on `shard`; makes the entry if there is none.
    pub(crate) fn enter(self: &Arc<Self>, name: &str, shard: usize) -> PendingJoin {
        let groups = self.groups.pin();
        loop {
            let group = match groups.get(name) {
                Some(group) => group.clone(),
                None => {
                    let name: Arc<str> = name.into();
                    let (key, shards) = (new_key(&self.next_key), self.ended.len());
                    let fresh = Group::new(key, Some(name.clone()), Arc::downgrade(self), shards);
                    let fresh = Arc::new(fresh);
                    groups.get_or_insert(name, fresh).clone()
                }
            };
            if group.try_enter() {
                group.arriving.fetch_add(1, Relaxed); // Relaxed: visible to every thread that sees the join's return
                group.add_interest(shard);
                return PendingJoin { directory: self.clone(), group, arrived: false };
            }
            self.forget(&group);
        }
    }

    /// Counts one member less.
    pub(crate) fn exit(&self, group: &Arc<Group>) {
        let left = group.members.fetch_sub(1, AcqRel) - 1; // the partner is `try_enter`
        let last = left == 0 && group.name.is_some();
        if last && group.members.compare_exchange(0, CLOSED, Release, Relaxed).is_ok() {
            self.forget(group);
        }
    }

    fn forget(&self, group: &Arc<Group>) {
        if let Some(name) = &group.name {
            let _ = self.groups.pin().remove_if(name, |_, found| Arc::ptr_eq(found, group));
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
        Arc::new(Directory::new("test", 70, Arc::new(AtomicU64::new(0))))
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
        assert_eq!(directory.find("room").map(|group| group.len()), Some(1));
        drop(again);
        assert!(directory.find("room").is_none() && directory.len() == 0);
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
                        let found = directory.find("room").expect("a member is in it");
                        assert!(Arc::ptr_eq(&found, join.group()));
                    }
                });
            }
        });
        assert_eq!(directory.len(), 0);
    }
}
