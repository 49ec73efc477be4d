//! What each client has received, in its order: the messages of all clients, each common sequence stored once.
//!
//! A tree. Clients that receive the same in the same order share a branch, and to follow it is one comparison. A client
//! that receives something else than the others did at that place starts a branch of its own, or follows one that starts
//! there with the same message. So a cluster in which all agree needs four bytes for each message, one whose nodes
//! disagree four for each message and node, and only clients with losses of their own need as much each. Knows messages
//! by number, and not what was sent.

/// The messages of all clients.
#[derive(Debug)]
pub(super) struct Histories {
    branches: Vec<Branch>,
    cursors: Vec<Cursor>,
}

#[derive(Debug, Default)]
struct Branch {
    /// The branch that this one continues, and how many of its own messages precede this one.
    parent: Option<Cursor>,
    messages: Vec<u32>,
    /// The branches that continue this one before its end.
    forks: Vec<usize>,
}

/// A place in the tree: so many of a branch's own messages, and all that precede them.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(super) struct Cursor {
    branch: usize,
    at: usize,
}

impl Histories {
    /// Clients by index; each group has a tree of its own.
    pub(super) fn new(groups: &[usize]) -> Self {
        let count = groups.iter().max().map_or(0, |last| last + 1);
        Self {
            branches: (0..count).map(|_| Branch::default()).collect(),
            cursors: groups.iter().map(|&group| Cursor { branch: group, at: 0 }).collect(),
        }
    }

    /// Adds a client, with the next index.
    pub(super) fn add(&mut self, group: usize) {
        self.cursors.push(Cursor { branch: group, at: 0 });
    }

    /// A client has received a message.
    #[inline]
    pub(super) fn receive(&mut self, client: usize, message: u32) {
        let cursor = &mut self.cursors[client];
        let branch = &mut self.branches[cursor.branch];
        match branch.messages.get(cursor.at) {
            Some(&next) if next == message => cursor.at += 1,
            None => {
                branch.messages.push(message);
                cursor.at += 1;
            }
            Some(_) => self.fork(client, message),
        }
    }

    #[cold]
    fn fork(&mut self, client: usize, message: u32) {
        let here = self.cursors[client];
        let starts_so = |&&fork: &&usize| {
            let fork = &self.branches[fork];
            fork.parent == Some(here) && fork.messages.first() == Some(&message)
        };
        let branch = self.branches[here.branch].forks.iter().find(starts_so).copied().unwrap_or_else(|| {
            let branch = self.branches.len();
            self.branches[here.branch].forks.push(branch);
            self.branches.push(Branch { parent: Some(here), messages: vec![message], forks: Vec::new() });
            branch
        });
        self.cursors[client] = Cursor { branch, at: 1 };
    }

    /// Where a client is. Clients at the same place have received the same in the same order.
    pub(super) fn cursor(&self, client: usize) -> Cursor {
        self.cursors[client]
    }

    /// Everything that a client at this place has received, in its order.
    pub(super) fn messages(&self, cursor: Cursor) -> Vec<u32> {
        let mut parts = Vec::new();
        let mut next = Some(cursor);
        while let Some(Cursor { branch, at }) = next {
            let branch = &self.branches[branch];
            parts.push(&branch.messages[..at]);
            next = branch.parent;
        }
        parts.into_iter().rev().flatten().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histories(clients: &[&[u32]]) -> Histories {
        let mut histories = Histories::new(&vec![0; clients.len()]);
        let longest = clients.iter().map(|messages| messages.len()).max().unwrap_or(0);
        for at in 0..longest {
            for (client, messages) in clients.iter().enumerate() {
                messages.get(at).into_iter().for_each(|&message| histories.receive(client, message));
            }
        }
        histories
    }

    #[test]
    fn every_client_has_the_messages_that_it_received_in_its_order() {
        let clients: [&[u32]; 8] = [
            &[1, 2, 3, 4],
            &[1, 2, 3],
            &[2, 1, 3, 4],
            &[2, 1, 4, 3],
            &[1, 1, 2, 3],
            &[1, 9, 3],
            &[1, 2, 9],
            &[],
        ];
        let histories = histories(&clients);
        for (client, messages) in clients.iter().enumerate() {
            assert_eq!(&histories.messages(histories.cursor(client)), messages, "client {client}");
        }
    }

    #[test]
    fn clients_that_agree_share_what_they_received_also_after_they_left_the_others() {
        let [left, right] = [[1, 2, 3, 4], [1, 3, 2, 4]];
        let histories = histories(&[&left, &right, &left, &right, &right]);
        assert_eq!(histories.cursor(0), histories.cursor(2));
        assert!([3, 4].iter().all(|&client| histories.cursor(client) == histories.cursor(1)));
        let stored: usize = histories.branches.iter().map(|branch| branch.messages.len()).sum();
        assert_eq!(stored, left.len() + right.len() - 1, "the first message is common to all");
    }

    #[test]
    fn groups_share_nothing() {
        let mut histories = Histories::new(&[0, 1, 0]);
        [(0, 7), (1, 8), (2, 7)].into_iter().for_each(|(client, message)| histories.receive(client, message));
        let messages = |client| histories.messages(histories.cursor(client));
        assert_eq!([messages(0), messages(1), messages(2)], [[7], [8], [7]]);
    }
}
