//! Which faults the tracker finds, and what it must not take for one.

use super::*;

const SIGHT: Order = Order::FirstSight;
const SENDING: Order = Order::Sending;

const FIRST: u64 = FIRST_SEQ + 10;

/// Three messages from connection 0; `seen` are what each connection receives, as offsets from the first.
fn tally(order: Order, seen: &[&[u64]]) -> (Tally, DeliveryTracker) {
    let groups: Vec<usize> = match order {
        Order::FirstSight => vec![0; seen.len()],
        Order::Sending => (0..seen.len()).collect(),
    };
    let mut tracker = DeliveryTracker::new(order, &groups, FIRST);
    for _ in 0..3 {
        tracker.send(0, Instant::now());
    }
    for (connection, offsets) in seen.iter().enumerate() {
        offsets.iter().for_each(|offset| tracker.receive(connection, FIRST + offset));
    }
    while tracker.take_landed().is_some() {}
    (tracker.tally, tracker)
}

fn clean(connections: u64) -> Tally {
    Tally { expected: 3 * connections, received: 3 * connections, landed: 3, ..Tally::default() }
}

#[test]
fn everything_once_in_one_order_is_clean() {
    let (tally, tracker) = tally(SIGHT, &[&[0, 1, 2], &[0, 1, 2]]);
    assert_eq!(tally, clean(2));
    assert!(tracker.is_settled());
}

#[test]
fn a_swap_is_found_whichever_connection_is_first() {
    for seen in [[&[0, 1, 2], &[1, 0, 2]], [&[1, 0, 2], &[0, 1, 2]]] {
        let tally = tally(SIGHT, &[seen[0], seen[1]]).0;
        assert_eq!((tally.order_violations, tally.received, tally.duplicates), (1, 6, 0));
    }
}

#[test]
fn an_order_that_all_share_is_no_violation_even_if_it_is_not_the_senders() {
    let tally = tally(SIGHT, &[&[1, 0, 2], &[1, 0, 2]]).0;
    assert_eq!(tally, Tally { sender_reorders: 1, ..clean(2) });
}

#[test]
fn a_duplicate_is_found_before_and_after_landing() {
    let early = tally(SIGHT, &[&[0, 0, 1, 2], &[0, 1, 2]]).0;
    let late = tally(SIGHT, &[&[0, 1, 2], &[0, 1, 2, 1]]).0;
    assert_eq!((early, late), (Tally { duplicates: 1, ..clean(2) }, Tally { duplicates: 1, ..clean(2) }));
}

#[test]
fn a_loss_is_found_and_is_no_violation_of_order() {
    let (tally, tracker) = tally(SIGHT, &[&[0, 1, 2], &[0, 2]]);
    assert_eq!((tally.expected, tally.received, tally.landed, tally.order_violations), (6, 5, 2, 0));
    assert!(!tracker.is_settled());
}

#[test]
fn a_duplicate_does_not_hide_a_loss() {
    let (tally, tracker) = tally(SIGHT, &[&[0, 1, 2], &[0, 2, 2]]);
    assert_eq!((tally.expected - tally.received, tally.duplicates), (1, 1));
    assert!(!tracker.is_settled());
}

#[test]
fn a_lost_connection_is_not_waited_for_and_what_it_misses_is_lost() {
    let (_, mut tracker) = tally(SIGHT, &[&[0, 1, 2], &[0]]);
    assert!(!tracker.is_settled());
    tracker.leave(1, Leave::Lost);
    assert!(tracker.is_settled());
    assert_eq!(tracker.tally.expected - tracker.tally.received, 2);
}

#[test]
fn probes_are_ignored_and_unsent_numbers_are_strays() {
    let mut tracker = DeliveryTracker::new(SIGHT, &[0], FIRST);
    tracker.receive(0, FIRST - 1);
    assert_eq!(tracker.tally, Tally::default());
    tracker.receive(0, FIRST);
    tracker.receive(0, 7);
    assert_eq!(tracker.tally.strays, 2);
}

#[test]
fn an_echo_must_reach_its_sender_in_the_order_of_sending() {
    assert_eq!(tally(SENDING, &[&[0, 1, 2], &[]]).0, clean(1));
    assert_eq!(tally(SENDING, &[&[0, 2, 1], &[]]).0.order_violations, 1);
    assert_eq!(tally(SENDING, &[&[0, 1, 2], &[1]]).0.duplicates, 1);
    assert_eq!(tally(SENDING, &[&[0], &[1]]).0.strays, 1);
}

#[test]
fn each_group_has_its_own_order_and_its_own_messages() {
    // Connections 0 and 2 are a group, 1 and 3 another; the numbers of both are mixed.
    let mut tracker = DeliveryTracker::new(SIGHT, &[0, 1, 0, 1], FIRST);
    let seqs: Vec<u64> = [0, 1, 2, 3].map(|sender| tracker.send(sender, Instant::now())).to_vec();
    assert_eq!(tracker.tally.expected, 8);
    for (connection, seen) in [(0, [2, 0]), (1, [1, 3]), (2, [2, 0]), (3, [1, 3])] {
        seen.iter().for_each(|&index| tracker.receive(connection, seqs[index]));
    }
    assert_eq!((tracker.tally.received, tracker.tally.order_violations, tracker.tally.strays), (8, 0, 0));
    assert!(tracker.is_settled());
}

#[test]
fn a_message_in_the_wrong_group_is_a_stray_and_not_received() {
    let mut tracker = DeliveryTracker::new(SIGHT, &[0, 1], FIRST);
    let seq = tracker.send(0, Instant::now());
    tracker.receive(1, seq);
    assert_eq!((tracker.tally.strays, tracker.tally.received, tracker.in_flight), (1, 0, 1));
}

#[test]
fn a_swap_within_a_group_is_found() {
    let mut tracker = DeliveryTracker::new(SIGHT, &[0, 1, 0, 1], FIRST);
    let (a, b) = (tracker.send(1, Instant::now()), tracker.send(3, Instant::now()));
    for (connection, seq) in [(1, a), (1, b), (3, b), (3, a)] {
        tracker.receive(connection, seq);
    }
    assert_eq!((tracker.tally.order_violations, tracker.tally.received), (1, 4));
}

#[test]
fn nothing_more_is_expected_of_a_connection_that_is_not_watched() {
    let (_, mut tracker) = tally(SIGHT, &[&[0, 1, 2], &[0]]);
    tracker.leave(1, Leave::Unwatched);
    tracker.leave(1, Leave::Unwatched);
    assert_eq!((tracker.tally.expected, tracker.tally.received), (4, 4));
    assert!(tracker.is_settled());
    tracker.send(0, Instant::now());
    assert_eq!(tracker.tally.expected, 5);
}

#[test]
fn a_connection_closed_by_a_shutdown_must_have_received_what_any_other_receives() {
    // Both receive the first; connection 1 is closed; connection 0 receives the second, none the third.
    let mut tracker = DeliveryTracker::new(SIGHT, &[0, 0], FIRST);
    let seqs = [0, 0, 0].map(|sender| tracker.send(sender, Instant::now()));
    tracker.receive(0, seqs[0]);
    tracker.receive(1, seqs[0]);
    tracker.leave(1, Leave::Shutdown);
    assert_eq!((tracker.tally.expected, tracker.tally.received), (4, 2));
    tracker.receive(0, seqs[1]);
    tracker.leave(0, Leave::Shutdown);
    assert_eq!((tracker.tally.expected, tracker.tally.received, tracker.tally.unseen), (4, 3, 1));
    assert!(tracker.is_settled());
}

#[test]
fn a_message_sent_during_a_shutdown_and_received_by_one_is_missing_at_those_already_closed() {
    let mut tracker = DeliveryTracker::new(SIGHT, &[0, 0], FIRST);
    tracker.leave(1, Leave::Shutdown);
    let seq = tracker.send(0, Instant::now());
    assert_eq!(tracker.tally.expected, 1);
    tracker.receive(0, seq);
    assert_eq!((tracker.tally.expected, tracker.tally.received), (2, 1));
}

#[test]
fn a_message_that_was_given_up_is_still_expected_and_is_late_when_it_lands() {
    let mut tracker = DeliveryTracker::new(SIGHT, &[0], FIRST);
    let seq = tracker.send(0, Instant::now());
    assert_eq!(tracker.give_up(Instant::now()), 1);
    assert_eq!(tracker.give_up(Instant::now()), 0);
    assert_eq!((tracker.tally.expected, tracker.tally.received, tracker.in_flight), (1, 0, 1));
    tracker.receive(0, seq);
    assert!(tracker.take_landed().is_some_and(|landed| landed.late));
    assert!(tracker.is_settled());
}
