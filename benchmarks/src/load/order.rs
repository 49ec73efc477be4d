//! One connection's place in the order that all connections must share.
//!
//! The first connection that sees a message gives it its place; for everybody else the k-th message must be the one
//! with place k. While that holds the check is one comparison. A message that comes too early leaves a gap behind:
//! a gap that is filled later was a change of order, one that stays is a loss, and a place that is passed twice is
//! a duplicate. Knows places, not messages.

use std::ops::Range;

/// What a message at a place means for the connection that sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// The next one, or a later one: what was skipped may still come.
    Forward,
    /// One that should have come before.
    OutOfOrder,
    /// One that has come already.
    Duplicate,
}

/// How far one connection has come.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cursor {
    next: u32,
    /// Skipped places, ascending; nothing allocated while the order holds.
    gaps: Vec<Range<u32>>,
}

impl Cursor {
    /// One that has come as far as `place`.
    pub(crate) fn after(place: u32) -> Self {
        Self { next: place + 1, gaps: Vec::new() }
    }

    #[inline]
    pub(crate) fn pass(&mut self, place: u32) -> Verdict {
        if place == self.next {
            self.next += 1;
            return Verdict::Forward;
        }
        self.stray(place)
    }

    pub(crate) fn has_passed(&self, place: u32) -> bool {
        place < self.next && !self.gaps.iter().any(|gap| gap.contains(&place))
    }

    #[cold]
    fn stray(&mut self, place: u32) -> Verdict {
        if place > self.next {
            self.gaps.push(self.next..place);
            self.next = place + 1;
            return Verdict::Forward;
        }
        let Some(index) = self.gaps.iter().position(|gap| gap.contains(&place)) else {
            return Verdict::Duplicate;
        };
        let gap = self.gaps.remove(index);
        let rest = [gap.start..place, place + 1..gap.end];
        self.gaps.splice(index..index, rest.into_iter().filter(|gap| !gap.is_empty()));
        Verdict::OutOfOrder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(places: &[u32]) -> (Vec<Verdict>, Cursor) {
        let mut cursor = Cursor::default();
        (places.iter().map(|&place| cursor.pass(place)).collect(), cursor)
    }

    #[test]
    fn a_connection_in_order_has_no_gaps() {
        let (verdicts, cursor) = verdicts(&[0, 1, 2, 3]);
        assert!(verdicts.iter().all(|&verdict| verdict == Verdict::Forward) && cursor.gaps.is_empty());
    }

    #[test]
    fn a_swap_is_out_of_order() {
        let (verdicts, cursor) = verdicts(&[0, 2, 1, 3]);
        assert_eq!(verdicts[2], Verdict::OutOfOrder);
        assert!(cursor.gaps.is_empty() && cursor.has_passed(1));
    }

    #[test]
    fn a_place_passed_twice_is_a_duplicate() {
        assert_eq!(verdicts(&[0, 1, 1]).0[2], Verdict::Duplicate);
        assert_eq!(verdicts(&[0, 2, 1, 1]).0[3], Verdict::Duplicate);
    }

    #[test]
    fn a_loss_stays_a_gap() {
        let (_, cursor) = verdicts(&[0, 1, 5, 3]);
        assert_eq!(cursor.gaps, [2..3, 4..5]);
        assert!(
            !cursor.has_passed(2) && cursor.has_passed(3) && !cursor.has_passed(4) && !cursor.has_passed(6)
        );
    }
}
