//! What was sent, and who has received it: for the pace, for latencies, and in the end for the faults.
//!
//! A message has landed at a node when all connected clients of its group there have received it. Latencies are those of
//! messages at the node of their publisher and at the other one, from the time at which they were due. Faults are found
//! from the histories at the end; the counts here decide only what is sent next, and when the run is over. Does not know
//! sockets.

use std::time::{Duration, Instant};

use super::{
    NODES,
    faults::{Faults, Member, Part},
    histories::Histories,
};
use crate::load::latencies::Latencies;

#[derive(Debug)]
struct Sent {
    due: Instant,
    /// How many connected clients of each node have not received it.
    awaited: [u32; NODES],
    has_landed: bool,
    given_up: bool,
}

/// A pair of values: for the publisher's node and for the other one.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize, serde::Serialize)]
pub(crate) struct ByNode<T> {
    pub(crate) own: T,
    pub(crate) other: T,
}

impl<T> ByNode<T> {
    fn of(&mut self, is_own: bool) -> &mut T {
        if is_own { &mut self.own } else { &mut self.other }
    }

    pub(crate) fn map<U>(self, mut map: impl FnMut(T) -> U) -> ByNode<U> {
        ByNode { own: map(self.own), other: map(self.other) }
    }
}

#[derive(Debug)]
pub(super) struct Ledger {
    /// The number of the first message on the wire.
    first: u64,
    members: Vec<Member>,
    /// By group and node.
    connected: Vec<[u32; NODES]>,
    publishers: Vec<usize>,
    sent: Vec<Sent>,
    histories: Histories,
    strays: u64,
    pub(super) received: u64,
    /// Messages that have landed everywhere.
    pub(super) landed: u64,
    in_flight: usize,
    given_up_to: usize,
    /// Messages that have landed at a node since the last call of `follow`.
    arrived: Vec<(u32, usize)>,
    /// Whether anything has arrived since then.
    heard: ByNode<bool>,
    latencies: Option<ByNode<Latencies>>,
}

impl Ledger {
    pub(super) fn new(members: Vec<Member>, first: u64) -> Self {
        let groups: Vec<usize> = members.iter().map(|member| member.group).collect();
        let mut connected = vec![[0; NODES]; groups.iter().max().map_or(0, |last| last + 1)];
        members.iter().for_each(|member| connected[member.group][member.node] += 1);
        Self {
            first,
            connected,
            histories: Histories::new(&groups),
            members,
            publishers: Vec::new(),
            sent: Vec::new(),
            strays: 0,
            received: 0,
            landed: 0,
            in_flight: 0,
            given_up_to: 0,
            arrived: Vec::new(),
            heard: ByNode::default(),
            latencies: None,
        }
    }

    /// Records latencies from now on.
    pub(super) fn begin(&mut self) {
        self.latencies = Some(ByNode::default());
    }

    /// Ends the recording.
    pub(super) fn take_latencies(&mut self) -> ByNode<Latencies> {
        self.latencies.take().unwrap_or_default()
    }

    /// Adds a message; returns its number on the wire.
    pub(super) fn send(&mut self, publisher: usize, due: Instant) -> u64 {
        let awaited = self.connected[self.members[publisher].group];
        self.publishers.push(publisher);
        self.sent.push(Sent { due, awaited, has_landed: false, given_up: false });
        self.in_flight += 1;
        self.first + self.sent.len() as u64 - 1
    }

    /// A client has received a number.
    #[inline]
    pub(super) fn receive(&mut self, client: usize, seq: u64) {
        // Earlier numbers are probes.
        let Some(index) = seq.checked_sub(self.first) else { return };
        let (Some(sent), Some(&publisher)) =
            (self.sent.get_mut(index as usize), self.publishers.get(index as usize))
        else {
            self.strays += 1;
            return;
        };
        let (member, publisher) = (self.members[client], self.members[publisher]);
        if member.group != publisher.group {
            self.strays += 1;
            return;
        }
        self.received += 1;
        self.histories.receive(client, index as u32);
        *self.heard.of(member.node == publisher.node) = true;
        // A duplicate may come when nobody awaits it any more.
        let awaited = &mut sent.awaited[member.node];
        if *awaited > 0 {
            *awaited -= 1;
            if *awaited == 0 {
                self.arrived.push((index as u32, member.node));
            }
        }
    }

    /// Records what has landed since the last call; `next` gets the publisher of each message that has landed everywhere
    /// and was not given up. Returns whether anything was received.
    pub(super) fn follow(&mut self, now: Instant, mut next: impl FnMut(usize)) -> ByNode<bool> {
        for (index, node) in self.arrived.drain(..) {
            let (sent, publisher) = (&mut self.sent[index as usize], self.publishers[index as usize]);
            if let Some(latencies) = &mut self.latencies {
                let latency = now.saturating_duration_since(sent.due);
                latencies.of(node == self.members[publisher].node).record(latency);
            }
            if sent.awaited == [0; NODES] && !std::mem::replace(&mut sent.has_landed, true) {
                self.landed += 1;
                if !sent.given_up {
                    self.in_flight -= 1;
                    next(publisher);
                }
            }
        }
        std::mem::take(&mut self.heard)
    }

    /// A client has disconnected: it is awaited no longer.
    pub(super) fn leave(&mut self, client: usize) {
        if !std::mem::replace(&mut self.members[client].is_connected, false) {
            return;
        }
        let Member { node, group, .. } = self.members[client];
        self.connected[group][node] -= 1;
        let mut received = vec![false; self.sent.len()];
        for message in self.histories.messages(self.histories.cursor(client)) {
            received[message as usize] = true;
        }
        for (index, sent) in self.sent.iter_mut().enumerate() {
            let is_awaited = !received[index] && self.members[self.publishers[index]].group == group;
            if is_awaited && sent.awaited[node] > 0 {
                sent.awaited[node] -= 1;
                if sent.awaited == [0; NODES] && !std::mem::replace(&mut sent.has_landed, true) {
                    self.in_flight -= usize::from(!sent.given_up);
                }
            }
        }
    }

    /// A client has disconnected because its node is being replaced.
    pub(super) fn leave_for_another(&mut self, client: usize) {
        self.leave(client);
        self.members[client].part = Part::Before;
    }

    pub(super) fn has_moved(&self, client: usize) -> bool {
        self.members[client].part == Part::Before
    }

    pub(super) fn node(&self, client: usize) -> usize {
        self.members[client].node
    }

    /// Whether all clients of the node have left.
    pub(super) fn is_empty(&self, node: usize) -> bool {
        self.connected.iter().all(|connected| connected[node] == 0)
    }

    /// A client that had left is back, under another index.
    pub(super) fn come_back(&mut self, of: usize) {
        let Member { node, group, .. } = self.members[of];
        self.members.push(Member { part: Part::After { of }, ..Member::new(node, group) });
        self.connected[group][node] += 1;
        self.histories.add(group);
    }

    /// Gives up messages that were due before `deadline` and have not landed; `next` gets their publishers.
    pub(super) fn give_up(&mut self, deadline: Instant, mut next: impl FnMut(usize)) {
        while let Some(sent) = self.sent.get_mut(self.given_up_to).filter(|sent| sent.due < deadline) {
            if sent.awaited != [0; NODES] {
                sent.given_up = true;
                self.in_flight -= 1;
                next(self.publishers[self.given_up_to]);
            }
            self.given_up_to += 1;
        }
    }

    /// No message is in flight.
    pub(super) fn is_settled(&self) -> bool {
        self.in_flight == 0
    }

    pub(super) fn sent(&self) -> u64 {
        self.sent.len() as u64
    }

    pub(super) fn faults(&self) -> Faults {
        let mut faults = Faults::find(&self.members, &self.publishers, &self.histories);
        faults.strays += self.strays;
        faults
    }
}

/// The longest times in which nothing was received.
#[derive(Debug)]
pub(super) struct Silences {
    last: ByNode<Instant>,
    longest: ByNode<Duration>,
}

impl Silences {
    pub(super) fn since(now: Instant) -> Self {
        Self { last: ByNode { own: now, other: now }, longest: ByNode::default() }
    }

    pub(super) fn note(&mut self, heard: ByNode<bool>, now: Instant) {
        for (is_own, heard) in [(true, heard.own), (false, heard.other)] {
            if heard {
                let silence = now - std::mem::replace(self.last.of(is_own), now);
                let longest = self.longest.of(is_own);
                *longest = silence.max(*longest);
            }
        }
    }

    /// Those that have not ended are included.
    pub(super) fn longest(mut self, now: Instant) -> ByNode<Duration> {
        self.note(ByNode { own: true, other: true }, now);
        self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: u64 = 1000;

    /// Two clients on each node.
    fn ledger() -> Ledger {
        let member = |index| Member::new(index % NODES, 0);
        let mut ledger = Ledger::new((0..4).map(member).collect(), FIRST);
        ledger.begin();
        ledger
    }

    fn follow(ledger: &mut Ledger, now: Instant) -> (Vec<usize>, ByNode<bool>) {
        let mut publishers = Vec::new();
        let heard = ledger.follow(now, |publisher| publishers.push(publisher));
        (publishers, heard)
    }

    #[test]
    fn a_message_lands_at_each_node_with_its_last_client_there() {
        let (mut ledger, due) = (ledger(), Instant::now());
        let seq = ledger.send(1, due);
        [1, 0, 3].into_iter().for_each(|client| ledger.receive(client, seq));
        let millis = |count| due + Duration::from_millis(count);
        assert_eq!(follow(&mut ledger, millis(2)), (vec![], ByNode { own: true, other: true }));
        ledger.receive(2, seq);
        assert_eq!(follow(&mut ledger, millis(5)), (vec![1], ByNode { own: false, other: true }));
        let latencies = ledger.take_latencies().map(|latencies| latencies.summary().unwrap().max_us);
        assert_eq!(latencies, ByNode { own: 2000.0, other: 5000.0 });
        assert!(ledger.is_settled() && ledger.faults().is_none());
        assert_eq!((ledger.received, ledger.landed, ledger.sent()), (4, 1, 1));
    }

    #[test]
    fn nothing_is_awaited_of_a_client_that_has_left_or_for_ever() {
        let (mut ledger, due) = (ledger(), Instant::now());
        let seqs = [0, 1].map(|publisher| ledger.send(publisher, due));
        [0, 1, 2, 3].into_iter().for_each(|client| ledger.receive(client, seqs[0]));
        [0, 1, 2].into_iter().for_each(|client| ledger.receive(client, seqs[1]));
        assert_eq!(follow(&mut ledger, due).0, [0]);
        ledger.leave(3);
        ledger.leave(3);
        assert!(ledger.is_settled() && ledger.faults().is_none());
        let seq = ledger.send(2, due);
        ledger.receive(0, seq);
        let mut given_up = Vec::new();
        ledger.give_up(due + Duration::from_secs(1), |publisher| given_up.push(publisher));
        assert_eq!((given_up, ledger.is_settled()), (vec![2], true));
        // It lands after all, but is replaced already.
        [1, 2].into_iter().for_each(|client| ledger.receive(client, seq));
        assert_eq!((follow(&mut ledger, due).0, ledger.landed), (vec![], 2));
    }

    #[test]
    fn probes_are_ignored_and_numbers_that_were_not_sent_are_strays() {
        let mut ledger = ledger();
        ledger.receive(0, FIRST - 1);
        assert_eq!(ledger.faults().strays, 0);
        ledger.receive(0, FIRST);
        assert_eq!(ledger.faults().strays, 1);
    }

    #[test]
    fn a_silence_lasts_until_something_is_received_or_the_run_ends() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut silences = Silences::since(start);
        silences.note(ByNode { own: true, other: false }, at(3));
        silences.note(ByNode { own: true, other: true }, at(4));
        assert_eq!(silences.longest(at(9)).map(|longest| longest.as_secs()), ByNode { own: 5, other: 5 });
    }
}
