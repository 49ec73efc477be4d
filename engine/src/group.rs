//! The group index of one shard: which of its connections are in which group.
//!
//! Owned by one shard, plain single-threaded data. Join and leave cost the same for a group of two and of a
//! million, for a connection in one group and in a thousand: each side stores its index in the other's list,
//! and the last element fills a gap. Removing a connection costs as much as the number of its groups. Knows
//! slots and keys. Does not know connections, sockets, or what the shared entry `G` of a group is for.

use rustc_hash::FxHashMap;
use slab::Slab;
use smallvec::SmallVec;

use crate::id::{GroupKey, Slot};

/// The first entries of a slot's own list, which are searched one by one.
const SCANNED: usize = 8;

#[derive(Debug)]
pub(crate) struct GroupIndex<G> {
    groups: Slab<LocalGroup<G>>,
    by_key: FxHashMap<GroupKey, u32>,
    /// (group, slot) → index in the slot's own list, for the indexes from `SCANNED` on: most connections are
    /// in few groups, and an entry here for each would take more memory than the rest of their membership.
    indexes: FxHashMap<(u32, Slot), u32>,
    slots: Vec<SlotGroups>,
    /// The last union that counted each slot. As long as the slots that unions have met.
    marks: Vec<u32>,
    epoch: u32,
}

#[derive(Debug)]
struct LocalGroup<G> {
    key: GroupKey,
    shared: G,
    members: Vec<Member>,
}

/// Identifies a group within one index, while it has members there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LocalKey(u32);

#[derive(Debug, Clone, Copy)]
struct Member {
    slot: Slot,
    /// The index of this group in the member's own list.
    own: u32,
}

#[cfg(feature = "audit")]
pub(crate) const MEMBER_BYTES: usize = size_of::<Member>();

#[derive(Debug, Default)]
struct SlotGroups {
    own: SmallVec<[Membership; 1]>,
}

#[derive(Debug, Clone, Copy)]
struct Membership {
    group: u32,
    position: u32,
}

impl<G> GroupIndex<G> {
    pub(crate) fn new() -> Self {
        Self {
            groups: Slab::new(),
            by_key: FxHashMap::default(),
            indexes: FxHashMap::default(),
            slots: Vec::new(),
            marks: Vec::new(),
            epoch: 0,
        }
    }

    /// Adds a member; false if it already is one (`shared` is dropped then).
    pub(crate) fn join(&mut self, key: GroupKey, shared: G, slot: Slot) -> bool {
        let group = *self
            .by_key
            .entry(key)
            .or_insert_with(|| self.groups.insert(LocalGroup { key, shared, members: Vec::new() }) as u32);
        if self.slots.len() <= slot.index() {
            self.slots.resize_with(slot.index() + 1, SlotGroups::default);
        }
        if self.index(group, slot).is_some() {
            return false;
        }
        let own = &mut self.slots[slot.index()].own;
        let index = own.len() as u32;
        if index as usize >= SCANNED {
            self.indexes.insert((group, slot), index);
        }
        let members = &mut self.groups[group as usize].members;
        own.push(Membership { group, position: members.len() as u32 });
        members.push(Member { slot, own: index });
        true
    }

    /// Removes a member.
    pub(crate) fn leave(&mut self, key: GroupKey, slot: Slot) -> Left {
        match self.by_key.get(&key).and_then(|group| self.index(*group, slot)) {
            Some(index) => self.remove(slot, index),
            None => Left::WasNoMember,
        }
    }

    /// The index of the group in the slot's own list.
    fn index(&self, group: u32, slot: Slot) -> Option<u32> {
        let own = &self.slots.get(slot.index())?.own;
        let near = own.iter().take(SCANNED).position(|membership| membership.group == group);
        match near {
            Some(index) => Some(index as u32),
            None if own.len() > SCANNED => self.indexes.get(&(group, slot)).copied(),
            None => None,
        }
    }

    /// The shared entry of each group that the slot is in.
    pub(crate) fn groups_of(&self, slot: Slot) -> impl Iterator<Item = &G> {
        let own = self.slots.get(slot.index()).map_or(&[][..], |slot| &slot.own);
        own.iter().map(|membership| &self.groups[membership.group as usize].shared)
    }

    /// Removes the slot from one of its groups; none if it is in no group.
    pub(crate) fn leave_any(&mut self, slot: Slot) -> Option<(G, Left)>
    where
        G: Clone,
    {
        let own = &self.slots.get(slot.index())?.own;
        let index = own.len().checked_sub(1)?;
        let shared = self.groups[own[index].group as usize].shared.clone();
        Some((shared, self.remove(slot, index as u32)))
    }

    /// The group, if it has members on this shard.
    #[inline]
    pub(crate) fn find(&self, key: GroupKey) -> Option<LocalKey> {
        self.by_key.get(&key).copied().map(LocalKey)
    }

    /// The number of members on this shard.
    #[inline]
    pub(crate) fn len(&self, group: LocalKey) -> usize {
        self.groups[group.0 as usize].members.len()
    }

    /// The slot of the member at `index`.
    #[inline]
    pub(crate) fn member(&self, group: LocalKey, index: usize) -> Slot {
        self.groups[group.0 as usize].members[index].slot
    }

    /// The members of several groups, each slot once.
    pub(crate) fn union(&mut self, keys: impl Iterator<Item = GroupKey>, slots: &mut Vec<Slot>) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            self.marks.fill(0);
            self.epoch = 1;
        }
        slots.clear();
        self.marks.resize(self.slots.len(), 0);
        for key in keys {
            let Some(group) = self.by_key.get(&key) else { continue };
            for member in &self.groups[*group as usize].members {
                let mark = &mut self.marks[member.slot.index()];
                if *mark != self.epoch {
                    *mark = self.epoch;
                    slots.push(member.slot);
                }
            }
        }
    }

    /// The number of groups that the slot is in.
    pub(crate) fn count(&self, slot: Slot) -> usize {
        self.slots.get(slot.index()).map_or(0, |groups| groups.own.len())
    }

    #[cfg(feature = "audit")]
    pub(crate) fn audit(&self) -> impl Iterator<Item = (&G, Vec<Slot>)> {
        self.groups
            .iter()
            .map(|(_, group)| (&group.shared, group.members.iter().map(|member| member.slot).collect()))
    }

    fn remove(&mut self, slot: Slot, index: u32) -> Left {
        let own = &mut self.slots[slot.index()].own;
        let Membership { group, position } = own.swap_remove(index as usize);
        let last = own.len();
        if index as usize >= SCANNED {
            self.indexes.remove(&(group, slot));
        }
        if let Some(moved) = own.get(index as usize).copied() {
            if index as usize >= SCANNED {
                self.indexes.insert((moved.group, slot), index);
            } else if last >= SCANNED {
                self.indexes.remove(&(moved.group, slot));
            }
            self.groups[moved.group as usize].members[moved.position as usize].own = index;
        }
        let members = &mut self.groups[group as usize].members;
        members.swap_remove(position as usize);
        if let Some(moved) = members.get(position as usize).copied() {
            self.slots[moved.slot.index()].own[moved.own as usize].position = position;
        }
        if !self.groups[group as usize].members.is_empty() {
            return Left::OthersStay;
        }
        let LocalGroup { key, .. } = self.groups.remove(group as usize);
        self.by_key.remove(&key);
        Left::WasLast
    }
}

/// The result of `leave`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    WasNoMember,
    OthersStay,
    /// The group has no members on this shard any more.
    WasLast,
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn members(index: &GroupIndex<u64>, key: u64) -> BTreeSet<Slot> {
        let Some(group) = index.find(GroupKey(key)) else { return BTreeSet::new() };
        (0..index.len(group)).map(|member| index.member(group, member)).collect()
    }

    #[test]
    fn a_union_counts_each_member_once() {
        let mut index = GroupIndex::new();
        for (key, slot) in [(1, 5), (1, 6), (2, 6), (2, 7), (3, 8)] {
            assert!(index.join(GroupKey(key), key, Slot::new(slot)));
        }
        let mut slots = Vec::new();
        index.union([1, 2, 9].map(GroupKey).into_iter(), &mut slots);
        slots.sort_unstable();
        assert_eq!(slots, [5, 6, 7].map(Slot::new));
    }

    proptest! {
        #[test]
        fn the_index_agrees_with_a_plain_map_of_sets(
            steps in prop::collection::vec((0u8..10, 0u64..24, 0usize..4), 1..300)
        ) {
            let mut index = GroupIndex::new();
            let mut model: BTreeMap<u64, BTreeSet<Slot>> = BTreeMap::new();
            for (step, key, slot) in steps {
                let slot = Slot::new(slot);
                match step {
                    0..=5 => {
                        let new = model.entry(key).or_default().insert(slot);
                        prop_assert_eq!(index.join(GroupKey(key), key, slot), new);
                    }
                    6..=8 => {
                        let was = model.get_mut(&key).is_some_and(|set| set.remove(&slot));
                        let left = index.leave(GroupKey(key), slot);
                        prop_assert_eq!(left != Left::WasNoMember, was);
                        if was {
                            prop_assert_eq!(left == Left::WasLast, model[&key].is_empty());
                        }
                    }
                    _ => {
                        while let Some((key, _)) = index.leave_any(slot) {
                            prop_assert!(model.get_mut(&key).is_some_and(|set| set.remove(&slot)));
                        }
                        prop_assert!(model.values().all(|set| !set.contains(&slot)));
                    }
                }
                for key in 0..24 {
                    prop_assert_eq!(members(&index, key), model.get(&key).cloned().unwrap_or_default());
                }
                let beyond = index.slots.iter().map(|slot| slot.own.len().saturating_sub(SCANNED));
                prop_assert_eq!(index.indexes.len(), beyond.sum::<usize>());
            }
            for slot in (0..12).map(Slot::new) {
                while index.leave_any(slot).is_some() {}
            }
            prop_assert!(index.groups.is_empty() && index.by_key.is_empty() && index.indexes.is_empty());
        }
    }
}
