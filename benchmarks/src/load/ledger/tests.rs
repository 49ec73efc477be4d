//! What the ledger promises.

use super::*;

const SIGHT: Order = Order::FirstSight;
const SENDING: Order = Order::Sending;

const FIRST: u64 = FIRST_SEQ + 10;

/// Three messages from connection 0; each connection sees what `seen` says, as offsets from the first.
fn tally(order: Order, seen: &[&[u64]]) -> (Tally, Ledger) {
    let groups: Vec<usize> = match order {
        Order::FirstSight => vec![0; seen.len()],
        Order::Sending => (0..seen.len()).collect(),
    };
    let mut ledger = Ledger::new(order, &groups, FIRST);
    for _ in 0..3 {
        ledger.send(0, Instant::now());
    }
    for (connection, offsets) in seen.iter().enumerate() {
        offsets.iter().for_each(|offset| ledger.arrive(connection, FIRST + offset));
    }
    while ledger.take_landed().is_some() {}
    (ledger.tally, ledger)
}

fn clean(connections: u64) -> Tally {
    Tally { expected: 3 * connections, received: 3 * connections, landed: 3, ..Tally::default() }
}

#[test]
fn everything_once_in_one_order_is_clean() {
    let (tally, ledger) = tally(SIGHT, &[&[0, 1, 2], &[0, 1, 2]]);
    assert_eq!(tally, clean(2));
    assert!(ledger.is_settled());
}

#[test]
fn a_swap_is_caught_whichever_connection_came_first() {
    for seen in [[&[0, 1, 2], &[1, 0, 2]], [&[1, 0, 2], &[0, 1, 2]]] {
        let tally = tally(SIGHT, &[seen[0], seen[1]]).0;
        assert_eq!((tally.order_violations, tally.received, tally.duplicates), (1, 6, 0));
    }
}

#[test]
fn an_order_that_all_share_is_no_violation_but_not_the_senders() {
    let tally = tally(SIGHT, &[&[1, 0, 2], &[1, 0, 2]]).0;
    assert_eq!(tally, Tally { sender_reorders: 1, ..clean(2) });
}

#[test]
fn a_duplicate_is_caught_before_and_after_landing() {
    let early = tally(SIGHT, &[&[0, 0, 1, 2], &[0, 1, 2]]).0;
    let late = tally(SIGHT, &[&[0, 1, 2], &[0, 1, 2, 1]]).0;
    assert_eq!((early, late), (Tally { duplicates: 1, ..clean(2) }, Tally { duplicates: 1, ..clean(2) }));
}

#[test]
fn a_loss_is_caught_and_is_no_violation_of_order() {
    let (tally, ledger) = tally(SIGHT, &[&[0, 1, 2], &[0, 2]]);
    assert_eq!((tally.expected, tally.received, tally.landed, tally.order_violations), (6, 5, 2, 0));
    assert!(!ledger.is_settled());
}

#[test]
fn a_duplicate_does_not_hide_a_loss() {
    let (tally, ledger) = tally(SIGHT, &[&[0, 1, 2], &[0, 2, 2]]);
    assert_eq!((tally.expected - tally.received, tally.duplicates), (1, 1));
    assert!(!ledger.is_settled());
}

#[test]
fn a_connection_that_leaves_is_not_waited_for_and_counts_as_a_loss() {
    let (_, mut ledger) = tally(SIGHT, &[&[0, 1, 2], &[0]]);
    assert!(!ledger.is_settled());
    ledger.leave(1, Leaving::Lost);
    assert!(ledger.is_settled());
    assert_eq!(ledger.tally.expected - ledger.tally.received, 2);
}

#[test]
fn probes_are_ignored_and_unsent_numbers_are_strays() {
    let mut ledger = Ledger::new(SIGHT, &[0], FIRST);
    ledger.arrive(0, FIRST - 1);
    assert_eq!(ledger.tally, Tally::default());
    ledger.arrive(0, FIRST);
    ledger.arrive(0, 7);
    assert_eq!(ledger.tally.strays, 2);
}

#[test]
fn an_echo_belongs_to_its_sender_and_keeps_the_order_of_sending() {
    assert_eq!(tally(SENDING, &[&[0, 1, 2], &[]]).0, clean(1));
    assert_eq!(tally(SENDING, &[&[0, 2, 1], &[]]).0.order_violations, 1);
    assert_eq!(tally(SENDING, &[&[0, 1, 2], &[1]]).0.duplicates, 1);
    assert_eq!(tally(SENDING, &[&[0], &[1]]).0.strays, 1);
}

#[test]
fn each_group_has_its_own_order_and_its_own_messages() {
    // Connections 0 and 2 are a group, 1 and 3 another; the numbers of both are mixed.
    let mut ledger = Ledger::new(SIGHT, &[0, 1, 0, 1], FIRST);
    let seqs: Vec<u64> = [0, 1, 2, 3].map(|sender| ledger.send(sender, Instant::now())).to_vec();
    assert_eq!(ledger.tally.expected, 8);
    for (connection, seen) in [(0, [2, 0]), (1, [1, 3]), (2, [2, 0]), (3, [1, 3])] {
        seen.iter().for_each(|&index| ledger.arrive(connection, seqs[index]));
    }
    assert_eq!((ledger.tally.received, ledger.tally.order_violations, ledger.tally.strays), (8, 0, 0));
    assert!(ledger.is_settled());
}

#[test]
fn a_message_in_the_wrong_group_is_a_stray_and_not_received() {
    let mut ledger = Ledger::new(SIGHT, &[0, 1], FIRST);
    let seq = ledger.send(0, Instant::now());
    ledger.arrive(1, seq);
    assert_eq!((ledger.tally.strays, ledger.tally.received, ledger.open()), (1, 0, 1));
}

#[test]
fn a_swap_within_a_group_is_caught() {
    let mut ledger = Ledger::new(SIGHT, &[0, 1, 0, 1], FIRST);
    let (a, b) = (ledger.send(1, Instant::now()), ledger.send(3, Instant::now()));
    for (connection, seq) in [(1, a), (1, b), (3, b), (3, a)] {
        ledger.arrive(connection, seq);
    }
    assert_eq!((ledger.tally.order_violations, ledger.tally.received), (1, 4));
}

#[test]
fn a_connection_that_is_released_is_owed_nothing_more() {
    let (_, mut ledger) = tally(SIGHT, &[&[0, 1, 2], &[0]]);
    ledger.leave(1, Leaving::Released);
    ledger.leave(1, Leaving::Released);
    assert_eq!((ledger.tally.expected, ledger.tally.received), (4, 4));
    assert!(ledger.is_settled());
    ledger.send(0, Instant::now());
    assert_eq!(ledger.tally.expected, 5);
}

#[test]
fn whom_the_server_has_ended_is_owed_all_that_anybody_sees_and_nothing_else() {
    // Both have seen the first; connection 1 is ended; connection 0 sees the second, nobody the third.
    let mut ledger = Ledger::new(SIGHT, &[0, 0], FIRST);
    let seqs = [0, 0, 0].map(|sender| ledger.send(sender, Instant::now()));
    ledger.arrive(0, seqs[0]);
    ledger.arrive(1, seqs[0]);
    ledger.leave(1, Leaving::Ended);
    assert_eq!((ledger.tally.expected, ledger.tally.received), (4, 2));
    ledger.arrive(0, seqs[1]);
    ledger.leave(0, Leaving::Ended);
    assert_eq!((ledger.tally.expected, ledger.tally.received, ledger.tally.unseen), (4, 3, 1));
    assert!(ledger.is_settled());
}

#[test]
fn what_is_sent_after_the_first_end_is_owed_to_the_ended_too_once_it_is_seen() {
    let mut ledger = Ledger::new(SIGHT, &[0, 0], FIRST);
    ledger.leave(1, Leaving::Ended);
    let seq = ledger.send(0, Instant::now());
    assert_eq!(ledger.tally.expected, 1);
    ledger.arrive(0, seq);
    assert_eq!((ledger.tally.expected, ledger.tally.received), (2, 1));
}

/// Connection 0 has seen all of six messages, connection 1 was replaced before any was sent.
fn with_newcomer(seen_by_member: usize) -> (Ledger, Vec<u64>) {
    let mut ledger = Ledger::new(SIGHT, &[0, 0], FIRST);
    ledger.expect_newcomers();
    ledger.leave(1, Leaving::Released);
    let seqs: Vec<u64> = (0..6).map(|_| ledger.send(0, Instant::now())).collect();
    seqs[..seen_by_member].iter().for_each(|&seq| ledger.arrive(0, seq));
    (ledger, seqs)
}

#[test]
fn a_newcomer_is_owed_everything_after_its_first_message() {
    let (mut ledger, seqs) = with_newcomer(6);
    assert!(ledger.is_settled());
    assert_eq!(ledger.greet(1, seqs[2]), Greeting::Welcome);
    assert_eq!((ledger.tally.expected, ledger.tally.received, ledger.open()), (10, 7, 3));
    seqs[3..].iter().for_each(|&seq| ledger.arrive(1, seq));
    assert_eq!(ledger.tally, Tally { expected: 10, received: 10, ..Tally::default() });
    assert!(ledger.is_settled());
    assert_eq!(std::iter::from_fn(|| ledger.take_landed()).count(), 6, "none lands twice");
}

#[test]
fn a_newcomers_gap_is_a_loss_and_its_repetition_a_duplicate() {
    let (mut ledger, seqs) = with_newcomer(6);
    ledger.greet(1, seqs[2]);
    [2, 3, 5].iter().for_each(|&index: &usize| ledger.arrive(1, seqs[index]));
    assert_eq!((ledger.tally.expected - ledger.tally.received, ledger.tally.duplicates), (1, 1));
    assert!(!ledger.is_settled());
}

#[test]
fn a_newcomer_waits_until_an_older_member_has_seen_its_first_message() {
    let (mut ledger, seqs) = with_newcomer(3);
    assert_eq!(ledger.greet(1, seqs[3]), Greeting::Early);
    ledger.arrive(0, seqs[3]);
    assert_eq!(ledger.greet(1, seqs[3]), Greeting::Welcome);
    assert_eq!(ledger.greet(1, FIRST - 1), Greeting::Stale);
    assert_eq!(ledger.greet(1, FIRST + 6), Greeting::Stray);
}

#[test]
fn a_message_given_up_is_still_owed_and_known_as_late_when_it_lands() {
    let mut ledger = Ledger::new(SIGHT, &[0], FIRST);
    let seq = ledger.send(0, Instant::now());
    assert_eq!(ledger.give_up(Instant::now()), 1);
    assert_eq!(ledger.give_up(Instant::now()), 0);
    assert_eq!((ledger.tally.expected, ledger.tally.received, ledger.open()), (1, 0, 1));
    ledger.arrive(0, seq);
    assert!(ledger.take_landed().is_some_and(|landed| landed.late));
    assert!(ledger.is_settled());
}
