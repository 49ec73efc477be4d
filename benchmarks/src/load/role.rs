//! The cast: which connection does what, decided before the first one is opened.
//!
//! Every part is spread evenly over the crowd, because servers serve connections in some order of their own and a
//! block of neighbours would be treated alike. Knows indexes and counts. Does not know sockets or time.

/// What one connection is there for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Role {
    /// Sends, and is watched.
    Sender,
    /// Only receives, and is watched; may be killed or leave.
    Plain,
    /// Reads nothing while the measurement runs; not watched.
    Stalled,
    /// Reads a few bytes a second while the measurement runs; not watched.
    Slow,
}

/// All parts.
#[derive(Clone, Debug)]
pub(crate) struct Cast {
    groups: usize,
    roles: Vec<Role>,
    senders: Vec<usize>,
}

impl Cast {
    /// Everybody plain but `senders`, `stalled` and `slow` of them, which together are at most `connections`.
    /// Connection i is in group i % `groups`, and sender k in group k % `groups`.
    pub(crate) fn new(
        connections: usize,
        groups: usize,
        senders: usize,
        stalled: usize,
        slow: usize,
    ) -> Self {
        let mut roles = vec![Role::Plain; connections];
        let sender = |k: usize| {
            let (group, turn) = (k % groups, k / groups);
            let members = (connections - group).div_ceil(groups);
            let sending = (senders - group).div_ceil(groups);
            turn * members / sending * groups + group
        };
        let senders: Vec<usize> = (0..senders).map(sender).collect();
        senders.iter().for_each(|&index| roles[index] = Role::Sender);
        let mut cast = Self { groups, roles, senders };
        let unwatched = spread(stalled + slow, &cast.all(Role::Plain));
        unwatched.iter().for_each(|&index| cast.roles[index] = Role::Slow);
        spread(stalled, &unwatched).iter().for_each(|&index| cast.roles[index] = Role::Stalled);
        cast
    }

    pub(crate) fn len(&self) -> usize {
        self.roles.len()
    }

    pub(crate) fn groups(&self) -> usize {
        self.groups
    }

    pub(crate) fn group(&self, index: usize) -> usize {
        index % self.groups
    }

    pub(crate) fn role(&self, index: usize) -> Role {
        self.roles[index]
    }

    pub(crate) fn senders(&self) -> &[usize] {
        &self.senders
    }

    /// All that have a role, ascending.
    pub(crate) fn all(&self, role: Role) -> Vec<usize> {
        (0..self.roles.len()).filter(|&index| self.roles[index] == role).collect()
    }
}

/// Takes `count` evenly from a list that has at least as many.
pub(crate) fn spread(count: usize, list: &[usize]) -> Vec<usize> {
    (0..count).map(|k| list[k * list.len() / count]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senders_are_spread_over_the_crowd_and_over_the_groups() {
        assert_eq!(Cast::new(1000, 1, 4, 0, 0).senders(), [0, 250, 500, 750]);
        assert_eq!(Cast::new(12, 3, 6, 0, 0).senders(), [0, 1, 2, 6, 7, 8]);
        // Eleven connections: the last group has three members, the others four.
        assert_eq!(Cast::new(11, 3, 11, 0, 0).senders(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn every_part_has_as_many_as_were_asked_for_and_nobody_has_two() {
        for (senders, stalled, slow) in [(1, 0, 0), (1, 5, 4), (4, 3, 0), (4, 0, 6), (2, 4, 4)] {
            let cast = Cast::new(10, 2, senders, stalled, slow);
            let count = |role| cast.all(role).len();
            assert_eq!(
                (count(Role::Sender), count(Role::Stalled), count(Role::Slow)),
                (senders, stalled, slow)
            );
            assert_eq!(count(Role::Plain), 10 - senders - stalled - slow);
        }
    }
}
