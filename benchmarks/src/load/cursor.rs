//! How far one connection is in the order that all connections must share.
//!
//! The first connection that sees a message gives it its position; for all others the k-th message must be the one with
//! position k. While that holds, the check is one comparison. A message that arrives too early leaves a gap: a gap that
//! is filled later was a change of order, one that remains is a loss, and a position that is passed twice is a
//! duplicate. Knows positions, not messages.

use std::ops::Range;

/// What a message at a position means for the connection that receives it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// The next one, or a later one: what was skipped may still arrive.
    Forward,
    /// One that should have arrived before.
    OutOfOrder,
    /// One that has arrived before.
    Duplicate,
}

/// How far one connection is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cursor {
    next: u32,
    /// Skipped positions, ascending; nothing is allocated while the order holds.
    gaps: Vec<Range<u32>>,
}

impl Cursor {
    #[inline]
    pub(crate) fn pass(&mut self, position: u32) -> Verdict {
        if position == self.next {
            self.next += 1;
            return Verdict::Forward;
        }
        self.pass_unordered(position)
    }

    pub(crate) fn has_passed(&self, position: u32) -> bool {
        position < self.next && !self.gaps.iter().any(|gap| gap.contains(&position))
    }

    #[cold]
    fn pass_unordered(&mut self, position: u32) -> Verdict {
        if position > self.next {
            self.gaps.push(self.next..position);
            self.next = position + 1;
            return Verdict::Forward;
        }
        let Some(index) = self.gaps.iter().position(|gap| gap.contains(&position)) else {
            return Verdict::Duplicate;
        };
        let gap = self.gaps.remove(index);
        let rest = [gap.start..position, position + 1..gap.end];
        self.gaps.splice(index..index, rest.into_iter().filter(|gap| !gap.is_empty()));
        Verdict::OutOfOrder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(positions: &[u32]) -> (Vec<Verdict>, Cursor) {
        let mut cursor = Cursor::default();
        (positions.iter().map(|&position| cursor.pass(position)).collect(), cursor)
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
    fn a_position_passed_twice_is_a_duplicate() {
        assert_eq!(verdicts(&[0, 1, 1]).0[2], Verdict::Duplicate);
        assert_eq!(verdicts(&[0, 2, 1, 1]).0[3], Verdict::Duplicate);
    }

    #[test]
    fn a_loss_remains_a_gap() {
        let (_, cursor) = verdicts(&[0, 1, 5, 3]);
        assert_eq!(cursor.gaps, [2..3, 4..5]);
        assert!(
            !cursor.has_passed(2) && cursor.has_passed(3) && !cursor.has_passed(4) && !cursor.has_passed(6)
        );
    }
}
