//! What went wrong with the messages of a run: losses, duplicates, and messages in another order.
//!
//! Decided at the end from everything that was sent and received, so it is exact whatever was lost. For the one order
//! over all clients, each client's sequence is compared with that of the client that has received most: of the messages
//! that both have received, how many would have to be moved to have the reference's order? That is their number
//! without the longest increasing subsequence, so a message that comes much too late counts once and not for all that
//! it comes after. Knows numbers, and not sockets or time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::{Add, AddAssign},
};

use serde::{Deserialize, Serialize};

use super::{NODES, histories::Histories};

/// Who receives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) node: usize,
    pub(super) group: usize,
    pub(super) is_connected: bool,
    pub(super) part: Part,
}

/// The part of the run in which a member receives.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Part {
    Whole,
    /// Until its node was replaced.
    Before,
    /// Since then: it continues this member, and has missed what came in between.
    After {
        of: usize,
    },
}

impl Member {
    pub(super) fn new(node: usize, group: usize) -> Self {
        Self { node, group, is_connected: true, part: Part::Whole }
    }

    /// Whether it must have received everything.
    fn counts(&self) -> bool {
        self.is_connected && self.part == Part::Whole
    }
}

/// Counts of a whole run.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(crate) struct Faults {
    /// Messages that no connected client has received.
    pub(crate) lost_everywhere: u64,
    /// Messages that all connected clients of their publisher's node have received, and none of the other node.
    pub(crate) lost_elsewhere: u64,
    /// Messages that some other part of the connected clients has not received.
    pub(crate) lost_in_part: u64,
    /// Deliveries that are missing because of all these.
    pub(crate) missing: u64,
    /// Deliveries of a message to a client that had it already.
    pub(crate) duplicates: u64,
    /// Deliveries of a message after a later one of the same publisher.
    pub(crate) publisher_order: u64,
    /// How many deliveries would have to be moved so that all clients agree on one order.
    pub(crate) order: u64,
    /// The most for one client,
    pub(crate) order_worst: u64,
    /// and the most messages that a client has received.
    pub(crate) received_most: u64,
    /// Deliveries of messages that were not sent, or not to this client.
    pub(crate) strays: u64,
    /// Deliveries that are missing between others, to clients whose node was replaced.
    pub(crate) holes: u64,
    /// Clients whose node was replaced,
    pub(crate) moved: u64,
    /// the most messages that one of them has missed between its connections,
    pub(crate) missed_most: u64,
    /// and the last messages of those that publish, which nobody has received. None of this is a fault.
    pub(crate) unaccepted: u64,
}

impl Faults {
    pub(crate) fn is_none(&self) -> bool {
        let Self { missing, duplicates, publisher_order, order, strays, holes, .. } = *self;
        missing + duplicates + publisher_order + order + strays + holes == 0
    }

    /// Messages that were lost for some client.
    pub(crate) fn lost(&self) -> u64 {
        self.lost_everywhere + self.lost_elsewhere + self.lost_in_part
    }

    /// Compares what the members have received with what was sent. `publishers` has the publisher of each message, an
    /// index of a member; a later message of one publisher has a higher number.
    pub(super) fn find(members: &[Member], publishers: &[usize], histories: &Histories) -> Self {
        let mut groups = BTreeMap::<usize, Vec<usize>>::new();
        for (index, member) in members.iter().enumerate() {
            groups.entry(member.group).or_default().push(index);
        }
        let mut sent = BTreeMap::<usize, Vec<u32>>::new();
        for (message, &publisher) in publishers.iter().enumerate() {
            sent.entry(members[publisher].group).or_default().push(message as u32);
        }
        let mut scratch = Scratch::new(members.len(), publishers);
        let none = Vec::new();
        groups.iter().fold(Self::default(), |faults, (group, clients)| {
            let sent = sent.get(group).unwrap_or(&none);
            faults + scratch.find_in_group(members, clients, sent, histories)
        })
    }
}

impl Add for Faults {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl AddAssign for Faults {
    fn add_assign(&mut self, other: Self) {
        self.lost_everywhere += other.lost_everywhere;
        self.lost_elsewhere += other.lost_elsewhere;
        self.lost_in_part += other.lost_in_part;
        self.missing += other.missing;
        self.duplicates += other.duplicates;
        self.publisher_order += other.publisher_order;
        self.order += other.order;
        self.order_worst = self.order_worst.max(other.order_worst);
        self.received_most = self.received_most.max(other.received_most);
        self.strays += other.strays;
        self.holes += other.holes;
        self.moved += other.moved;
        self.missed_most = self.missed_most.max(other.missed_most);
        self.unaccepted += other.unaccepted;
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lost_everywhere, lost_elsewhere, lost_in_part, missing, .. } = self;
        writeln!(
            f,
            "  lost            {} messages: {lost_everywhere} for all, {lost_elsewhere} on the other node, \
             {lost_in_part} in part; {missing} deliveries",
            self.lost()
        )?;
        writeln!(f, "  duplicates      {}", self.duplicates)?;
        writeln!(f, "  out of order    {} within a publisher", self.publisher_order)?;
        let Self { order, order_worst, received_most, .. } = self;
        writeln!(
            f,
            "                  {order} between clients; at most {order_worst} of {received_most} at one"
        )?;
        writeln!(f, "  strays          {}", self.strays)?;
        let Self { holes, moved, missed_most, unaccepted, .. } = self;
        if *moved > 0 {
            writeln!(
                f,
                "  moved           {moved} clients to another node, which missed at most {missed_most} messages \
                 meanwhile, and {holes} at another time; {unaccepted} of their own were not accepted"
            )?;
        }
        Ok(())
    }
}

const NEVER: u32 = u32::MAX;

/// Tables by message or publisher, which all groups use.
struct Scratch<'a> {
    publishers: &'a [usize],
    /// The sequence in which a message was found last.
    seen: Vec<u32>,
    sequences: u32,
    /// Its place in the reference.
    places: Vec<u32>,
    /// How many connected clients have received it, by node.
    receivers: Vec<[u32; NODES]>,
    /// By publisher: its last message in this sequence.
    latest: Vec<Option<u32>>,
}

impl<'a> Scratch<'a> {
    fn new(members: usize, publishers: &'a [usize]) -> Self {
        let count = publishers.len();
        Self {
            publishers,
            seen: vec![NEVER; count],
            sequences: 0,
            places: vec![NEVER; count],
            receivers: vec![[0; NODES]; count],
            latest: vec![None; members],
        }
    }

    fn find_in_group(
        &mut self,
        members: &[Member],
        clients: &[usize],
        sent: &[u32],
        histories: &Histories,
    ) -> Faults {
        let mut faults = Faults::default();
        let mut watched = [0; NODES];
        let mut alike = BTreeMap::<_, Vec<usize>>::new();
        for &client in clients {
            alike.entry(histories.cursor(client)).or_default().push(client);
            watched[members[client].node] += u32::from(members[client].counts());
        }
        let mut sequences = Vec::new();
        for (cursor, clients) in alike {
            let mut connected = [0; NODES];
            for client in clients.iter().map(|&client| members[client]).filter(Member::counts) {
                connected[client.node] += 1;
            }
            let (distinct, duplicates, disorder) = self.scan(&histories.messages(cursor), connected);
            faults.duplicates += clients.len() as u64 * duplicates;
            faults.publisher_order += clients.len() as u64 * disorder;
            sequences.push((clients, distinct));
        }
        self.count_losses(members, sent, watched, &mut faults);
        // The first of the longest.
        let longest = sequences.iter().rev().max_by_key(|(_, distinct)| distinct.len());
        let Some((_, reference)) = longest else { return faults };
        faults.received_most = reference.len() as u64;
        for (place, &message) in reference.iter().enumerate() {
            self.places[message as usize] = place as u32;
        }
        let mut spans = BTreeMap::new();
        for (clients, sequence) in &sequences {
            let places = sequence.iter().map(|&message| self.places[message as usize]);
            let places = places.filter(|&place| place != NEVER);
            let moved = moves(places.clone());
            faults.order += clients.len() as u64 * moved;
            faults.order_worst = faults.order_worst.max(moved);
            let span = Span::of(places);
            spans.extend(clients.iter().map(|&client| (client, span)));
        }
        self.look_at_moved(members, clients, &spans, &mut faults);
        faults
    }

    /// A client whose node was replaced has received everything until a place, and everything from a later one on.
    fn look_at_moved(
        &self,
        members: &[Member],
        clients: &[usize],
        spans: &BTreeMap<usize, Span>,
        faults: &mut Faults,
    ) {
        let end = faults.received_most;
        for client in clients {
            let span = spans[client];
            match members[*client].part {
                Part::Whole => {}
                Part::Before => faults.holes += span.end - span.count,
                Part::After { of } => {
                    let begin = span.begin.unwrap_or(end);
                    faults.holes += end - begin - span.count;
                    let before = spans[&of].end;
                    faults.duplicates += before.saturating_sub(begin);
                    faults.missed_most = faults.missed_most.max(begin.saturating_sub(before));
                    faults.moved += 1;
                }
            }
        }
    }

    /// The messages without duplicates, how many duplicates there are, and how many messages follow a later one of their
    /// publisher.
    fn scan(&mut self, messages: &[u32], connected: [u32; NODES]) -> (Vec<u32>, u64, u64) {
        let sequence = self.sequences;
        self.sequences += 1;
        self.latest.fill(None);
        let (mut distinct, mut disorder) = (Vec::with_capacity(messages.len()), 0);
        for &message in messages {
            let index = message as usize;
            if std::mem::replace(&mut self.seen[index], sequence) == sequence {
                continue;
            }
            distinct.push(message);
            let receivers = self.receivers[index].iter_mut().zip(connected);
            receivers.for_each(|(receivers, connected)| *receivers += connected);
            let latest = &mut self.latest[self.publishers[index]];
            disorder += u64::from(*latest > Some(message));
            *latest = (*latest).max(Some(message));
        }
        let duplicates = (messages.len() - distinct.len()) as u64;
        (distinct, duplicates, disorder)
    }

    fn count_losses(&self, members: &[Member], sent: &[u32], watched: [u32; NODES], faults: &mut Faults) {
        let all: u32 = watched.iter().sum();
        let mut has_accepted = BTreeSet::new();
        for &message in sent.iter().rev() {
            let receivers = self.receivers[message as usize];
            let got: u32 = receivers.iter().sum();
            let publisher = self.publishers[message as usize];
            if got > 0 {
                has_accepted.insert(publisher);
            }
            if got == all {
                continue;
            }
            if members[publisher].part == Part::Before && !has_accepted.contains(&publisher) {
                faults.unaccepted += 1; // it was on its way when the node ended
                continue;
            }
            faults.missing += u64::from(all - got);
            let home = members[publisher].node;
            if got == 0 {
                faults.lost_everywhere += 1;
            } else if got == receivers[home] && got == watched[home] {
                faults.lost_elsewhere += 1;
            } else {
                faults.lost_in_part += 1;
            }
        }
    }
}

/// Where a sequence lies in the reference: from its first place to the one after its last.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    begin: Option<u64>,
    end: u64,
    count: u64,
}

impl Span {
    fn of(places: impl Iterator<Item = u32>) -> Self {
        places.map(u64::from).fold(Self::default(), |span, place| Self {
            begin: Some(span.begin.map_or(place, |begin| begin.min(place))),
            end: span.end.max(place + 1),
            count: span.count + 1,
        })
    }
}

/// How many elements must be moved so that the sequence increases.
fn moves(sequence: impl Iterator<Item = u32>) -> u64 {
    // By length: the least last element of an increasing subsequence (patience sorting).
    let mut lasts: Vec<u32> = Vec::new();
    let mut count = 0;
    for element in sequence {
        count += 1;
        match lasts.last() {
            Some(&last) if last >= element => {
                let at = lasts.partition_point(|&last| last < element);
                lasts[at] = element;
            }
            _ => lasts.push(element),
        }
    }
    count - lasts.len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two clients on each node, the first of each node publishes: even messages on node 0 and odd ones on node 1.
    fn faults(received: [&[u32]; 4], disconnected: Option<usize>) -> Faults {
        let member =
            |index| Member { is_connected: disconnected != Some(index), ..Member::new(index % NODES, 0) };
        let members: Vec<Member> = (0..4).map(member).collect();
        let mut histories = Histories::new(&[0; 4]);
        for (client, messages) in received.iter().enumerate() {
            messages.iter().for_each(|&message| histories.receive(client, message));
        }
        Faults::find(&members, &[0, 1, 0, 1, 0, 1], &histories)
    }

    const ALL: &[u32] = &[1, 0, 2, 3, 5, 4];

    #[test]
    fn any_order_that_all_share_and_that_keeps_each_publishers_is_faultless() {
        let found = faults([ALL; 4], None);
        assert!(found.is_none(), "{found}");
        assert_eq!(found.received_most, 6);
    }

    #[test]
    fn a_loss_is_found_with_who_has_lost_it_and_is_no_change_of_order() {
        let without_2: &[u32] = &[1, 0, 3, 5, 4];
        for (received, everywhere, elsewhere, in_part, missing) in [
            ([without_2; 4], 1, 0, 0, 4),
            ([ALL, without_2, ALL, without_2], 0, 1, 0, 2),
            ([without_2, ALL, without_2, ALL], 0, 0, 1, 2),
            ([ALL, ALL, ALL, without_2], 0, 0, 1, 1),
            ([ALL, without_2, without_2, without_2], 0, 0, 1, 3),
        ] {
            let found = faults(received, None);
            let lost = [found.lost_everywhere, found.lost_elsewhere, found.lost_in_part, found.missing];
            assert_eq!(lost, [everywhere, elsewhere, in_part, missing], "{received:?}");
            assert_eq!((found.order, found.publisher_order, found.duplicates), (0, 0, 0), "{received:?}");
            assert!(!found.is_none());
        }
    }

    #[test]
    fn a_disconnected_client_misses_nothing_but_must_not_contradict() {
        let until_then: &[u32] = &[1, 0, 2];
        assert!(faults([ALL, ALL, ALL, until_then], Some(3)).is_none());
        assert_eq!(faults([ALL, ALL, ALL, until_then], None).missing, 3);
        assert_eq!(faults([ALL, ALL, ALL, &[0, 1, 2]], Some(3)).order, 1);
    }

    #[test]
    fn a_message_twice_is_a_duplicate_wherever_the_second_one_is() {
        let twice: &[u32] = &[1, 0, 2, 3, 1, 5, 4];
        let found = faults([ALL, twice, ALL, twice], None);
        assert_eq!((found.duplicates, found.missing, found.order, found.publisher_order), (2, 0, 0, 0));
    }

    #[test]
    fn nodes_that_see_two_orders_are_found_and_each_message_counts_once() {
        // Each node sends its own message before it receives the other's.
        let (left, right): (&[u32], &[u32]) = (&[0, 1, 2, 3, 4, 5], &[1, 0, 3, 2, 5, 4]);
        let found = faults([left, right, left, right], None);
        assert_eq!((found.order, found.order_worst, found.publisher_order), (6, 3, 0));
        assert_eq!(found.lost() + found.duplicates, 0);
        // One message that comes much too late is one violation.
        let late: &[u32] = &[0, 2, 3, 4, 5, 1];
        assert_eq!(faults([left, left, left, late], None).order, 1);
    }

    #[test]
    fn two_orders_are_found_also_where_messages_are_lost() {
        let (left, right): (&[u32], &[u32]) = (&[0, 1, 2, 4, 5], &[1, 0, 2, 3, 5]);
        let found = faults([left, right, left, right], None);
        assert_eq!((found.order_worst, found.order), (1, 2));
        assert_eq!((found.lost_elsewhere, found.missing), (2, 4));
    }

    #[test]
    fn a_publishers_messages_in_another_order_are_found_though_all_agree() {
        let swapped: &[u32] = &[1, 2, 0, 3, 5, 4];
        let found = faults([swapped; 4], None);
        assert_eq!((found.publisher_order, found.order), (4, 0));
    }

    #[test]
    fn groups_have_orders_of_their_own() {
        let member = |index: usize| Member::new(index % NODES, index / NODES);
        let members: Vec<Member> = (0..4).map(member).collect();
        let mut histories = Histories::new(&[0, 0, 1, 1]);
        for (client, message) in [(0, 0), (0, 2), (1, 2), (1, 0), (2, 1), (3, 1)] {
            histories.receive(client, message);
        }
        let found = Faults::find(&members, &[0, 3, 1], &histories);
        assert_eq!((found.order, found.missing, found.received_most), (1, 0, 2));
    }

    /// Client 0 stays on node 0 and publishes even messages; client 1 publishes odd ones until its node is replaced, and
    /// goes on as client 2.
    fn moved(received: [&[u32]; 3]) -> Faults {
        let before = Member { is_connected: false, part: Part::Before, ..Member::new(1, 0) };
        let after = Member { part: Part::After { of: 1 }, ..Member::new(1, 0) };
        let mut histories = Histories::new(&[0; 3]);
        for (client, messages) in received.iter().enumerate() {
            messages.iter().for_each(|&message| histories.receive(client, message));
        }
        Faults::find(&[Member::new(0, 0), before, after], &[0, 1, 0, 1, 0, 2], &histories)
    }

    #[test]
    fn a_client_whose_node_is_replaced_misses_what_comes_in_between_and_nothing_else() {
        let found = moved([&[0, 1, 2, 4, 5], &[0, 1], &[4, 5]]);
        assert!(found.is_none(), "{found}");
        assert_eq!((found.moved, found.missed_most, found.unaccepted), (1, 1, 1));
        assert_eq!(moved([&[0, 1, 2, 4, 5], &[0, 2], &[4, 5]]).holes, 1);
        assert_eq!(moved([&[0, 1, 2, 4, 5], &[0, 1], &[2, 5]]).holes, 1);
        assert_eq!(moved([&[0, 1, 2, 4, 5], &[0, 1], &[2, 4]]).holes, 1, "to the end");
        assert_eq!(moved([&[0, 1, 2, 4, 5], &[0, 1, 2], &[2, 4, 5]]).duplicates, 1);
        assert_eq!(moved([&[0, 1, 2, 4, 5], &[0, 1], &[]]).missed_most, 3);
        // Message 1 is not the last of its publisher, and its publisher of message 4 has stayed.
        assert_eq!(moved([&[0, 2, 3, 4, 5], &[0], &[4, 5]]).lost(), 1);
        assert_eq!(moved([&[0, 1, 2, 3, 5], &[0], &[5]]).lost(), 1);
    }

    #[test]
    fn the_fewest_moves_are_counted() {
        let counts = [&[1, 2, 3][..], &[2, 3, 1], &[3, 2, 1], &[1, 4, 2, 3, 5], &[]];
        assert_eq!(counts.map(|sequence| moves(sequence.iter().copied())), [0, 1, 2, 1, 0]);
    }
}
