//! The plan: which connection has which role and group, decided before the first one is opened.
//!
//! Every role is spread evenly over the connections, because servers serve connections in some order of their own and
//! would treat a block of neighbours alike. Knows indexes and counts. Does not know sockets or time.

/// What one connection does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Role {
    /// Sends and receives.
    Sender,
    /// Only receives.
    Receiver,
    /// Reads nothing during the measurement; no delivery is expected.
    Stalled,
    /// Reads a few bytes per second during the measurement; no delivery is expected.
    Slow,
}

/// The roles of all connections.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    groups: usize,
    roles: Vec<Role>,
    senders: Vec<usize>,
}

impl Plan {
    /// All are receivers but `senders`, `stalled` and `slow` of them, which together must be at most `connections`.
    /// Connection i is in group i % `groups`, and sender k in group k % `groups`.
    pub(crate) fn new(
        connections: usize,
        groups: usize,
        senders: usize,
        stalled: usize,
        slow: usize,
    ) -> Self {
        let mut roles = vec![Role::Receiver; connections];
        let sender = |k: usize| {
            let (group, turn) = (k % groups, k / groups);
            let members = (connections - group).div_ceil(groups);
            let sending = (senders - group).div_ceil(groups);
            turn * members / sending * groups + group
        };
        let senders: Vec<usize> = (0..senders).map(sender).collect();
        senders.iter().for_each(|&index| roles[index] = Role::Sender);
        let mut plan = Self { groups, roles, senders };
        let unwatched = spread(stalled + slow, &plan.all(Role::Receiver));
        unwatched.iter().for_each(|&index| plan.roles[index] = Role::Slow);
        spread(stalled, &unwatched).iter().for_each(|&index| plan.roles[index] = Role::Stalled);
        plan
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

    /// The connections with this role, ascending.
    pub(crate) fn all(&self, role: Role) -> Vec<usize> {
        (0..self.roles.len()).filter(|&index| self.roles[index] == role).collect()
    }
}

/// Takes `count` elements evenly from a list that has at least as many.
fn spread(count: usize, list: &[usize]) -> Vec<usize> {
    (0..count).map(|k| list[k * list.len() / count]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senders_are_spread_over_the_connections_and_over_the_groups() {
        assert_eq!(Plan::new(1000, 1, 4, 0, 0).senders(), [0, 250, 500, 750]);
        assert_eq!(Plan::new(12, 3, 6, 0, 0).senders(), [0, 1, 2, 6, 7, 8]);
        // Eleven connections: the last group has three members, the others four.
        assert_eq!(Plan::new(11, 3, 11, 0, 0).senders(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn every_role_has_as_many_connections_as_were_asked_for() {
        for (senders, stalled, slow) in [(1, 0, 0), (1, 5, 4), (4, 3, 0), (4, 0, 6), (2, 4, 4)] {
            let plan = Plan::new(10, 2, senders, stalled, slow);
            let counts = [Role::Sender, Role::Stalled, Role::Slow].map(|role| plan.all(role).len());
            assert_eq!(counts, [senders, stalled, slow]);
            assert_eq!(plan.all(Role::Receiver).len(), 10 - senders - stalled - slow);
        }
    }
}
