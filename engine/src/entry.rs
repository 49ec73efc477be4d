//! The entry: a publication as the log carries it to the shards.
//!
//! The publication, the groups to which its address was resolved when it was published, the renditions that
//! its publisher has made, and the tickets of a publisher that waits. Read in place by every shard. Does not
//! know outboxes or connections.

use std::sync::Arc;

use crate::directory::{Directory, Group, Kind};
use crate::id::GroupKey;
use crate::log::Weigh;
use crate::payload::Payload;
use crate::publication::{Content, Publication};
use crate::receipt::{ShardTickets, Ticket};
use crate::rendition::Renditions;

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) publication: Publication,
    pub(crate) target: Target,
    pub(crate) renditions: Renditions,
    /// Set if the publisher waits.
    pub(crate) tickets: Option<Box<ShardTickets>>,
}

/// The groups to which an address was resolved.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    One(Arc<Group>),
    /// Each connection once.
    Several(Arc<[Named]>),
}

impl Target {
    /// Calls `each` for each of the groups that exist now. One may be closed.
    pub(crate) fn for_each_group(&self, mut each: impl FnMut(&Group)) {
        match self {
            Self::One(group) => each(group),
            Self::Several(groups) => groups.iter().filter_map(Named::find).for_each(|group| each(&group)),
        }
    }
}

/// One of several groups.
#[derive(Debug)]
pub(crate) enum Named {
    Group(Arc<Group>),
    /// It had no members when the publisher looked, but may have some when the log accepts the publication.
    Absent {
        directory: Arc<Directory>,
        kind: Kind,
        name: Arc<str>,
    },
}

impl Named {
    /// The group as the publisher found it, which may be closed by now; an absent one as of now, if it exists.
    pub(crate) fn find(&self) -> Option<Arc<Group>> {
        match self {
            Self::Group(group) => Some(group.clone()),
            Self::Absent { directory, kind, name } => directory.find(*kind, name),
        }
    }

    /// The key under which a shard has the group's members now.
    pub(crate) fn current_key(&self) -> Option<GroupKey> {
        match self {
            Self::Group(group) => group.current_key(),
            Self::Absent { .. } => self.find().map(|group| group.key),
        }
    }
}

impl Weigh for Entry {
    fn bytes(&self) -> u64 {
        weight(&self.publication, &self.renditions)
    }
}

/// The bytes that a publication takes in an outbox. An upper bound, as far as its renditions are made.
pub(crate) fn weight(publication: &Publication, renditions: &Renditions) -> u64 {
    let plain = publication.payload().map_or(0, |payload| payload.plain_frame().len());
    plain.max(renditions.longest()) as u64
}

impl Entry {
    /// The name of the group that it was published to, if it was a single one; none for everyone, users and several.
    pub(crate) fn group(&self) -> Option<&Arc<str>> {
        match &self.target {
            Target::One(group) => group.name(),
            Target::Several(_) => None,
        }
    }

    /// The ticket of this shard, if the publisher waits for it. None if it has been taken.
    pub(crate) fn take_ticket(&self, shard: usize) -> Option<Ticket> {
        self.tickets.as_ref()?.take(shard)
    }

    pub(crate) fn payload(&self) -> Option<&Payload> {
        self.publication.payload()
    }

    /// Whether it may share a chunk with its neighbours in the log (a batch): messages for the same group but for
    /// at most `except_max` connections, delivered in the same way, of publishers that do not want the outcome of their own.
    pub(crate) fn joins(&self, first: &Self, except_max: usize) -> bool {
        let is_simple = |entry: &Self| {
            matches!(entry.publication.content, Content::Message(_))
                && entry.publication.except.len() <= except_max
                && entry.tickets.as_ref().is_none_or(|tickets| !tickets.want_outcome())
        };
        match (&self.target, &first.target) {
            (Target::One(mine), Target::One(theirs)) => {
                let is_alike = self.publication.delivery == first.publication.delivery;
                Arc::ptr_eq(mine, theirs) && is_alike && is_simple(self) && is_simple(first)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::id::ConnectionId;
    use crate::policy::Policy;
    use crate::publication::{Address, Delivery};
    use crate::receipt::ticket;

    #[test]
    fn messages_to_one_group_are_joined_unless_they_are_counted_differ_in_policy_or_leave_out_many() {
        let directory = Directory::new("test", 1, Arc::default());
        let entry = |wants_outcome: Option<bool>| Entry {
            publication: Publication::message(Address::Everyone, Payload::text("message")),
            target: Target::One(directory.everyone().clone()),
            renditions: Renditions::default(),
            tickets: wants_outcome.map(|wants| ShardTickets::new(ticket(wants).0, [0].into_iter().collect())),
        };
        let joins = |one: &Entry, other: &Entry| one.joins(other, 1) && other.joins(one, 1);
        let (free, waits, wants_outcome) = (entry(None), entry(Some(false)), entry(Some(true)));
        assert!(joins(&free, &waits) && joins(&waits, &waits));
        assert!([&free, &waits, &wants_outcome].iter().all(|other| !joins(other, &wants_outcome)));
        let with = |change: &dyn Fn(Publication) -> Publication| {
            let Entry { publication, target, renditions, tickets } = entry(None);
            Entry { publication: change(publication), target, renditions, tickets }
        };
        let ids = [1, 2].map(ConnectionId::from_bits);
        let (few, many) = (with(&|message| message.except(&ids[..1])), with(&|message| message.except(&ids)));
        assert!(joins(&few, &waits) && !joins(&many, &free) && !joins(&few, &many));
        let policy = Policy::DropMessage { timeout: Duration::ZERO };
        let delivery = Delivery::with_policy(policy).expect("it is valid");
        let own_policy = with(&|message| message.with_delivery(delivery));
        assert!(joins(&own_policy, &own_policy) && !joins(&own_policy, &free));
    }
}
