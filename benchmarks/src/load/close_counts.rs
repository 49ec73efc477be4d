//! How the server closed the connections, where its shutdown is expected.
//!
//! An orderly shutdown is a Close frame with 1001 (going away) or 1012 (service restart), and then the end of TCP by
//! the server. Does not know what the connections had received by then; the delivery tracker does.

use std::collections::BTreeMap;

use super::connection::Ended;

const ORDERLY: [u16; 2] = [1001, 1012];

/// How many watched connections ended how.
#[derive(Debug, Default)]
pub(crate) struct CloseCounts {
    /// By close code, or by the word for what happened instead, see `Report::ends`.
    counts: BTreeMap<String, u64>,
}

impl CloseCounts {
    /// Counts the end of a connection; true when it was orderly.
    pub(crate) fn note(&mut self, ended: &Ended) -> bool {
        match ended {
            Ended::Closed(code) => {
                self.add(&code.to_string(), 1);
                return ORDERLY.contains(code);
            }
            Ended::Disconnected | Ended::Io(_) | Ended::ClosedByBoth => self.add("gone", 1),
            Ended::Masked | Ended::Unnumbered | Ended::Frame(_) => self.add("broken", 1),
        }
        false
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// `open` connections got no Close frame, and of those that did the server did not close `unclosed` sockets.
    pub(crate) fn report(mut self, open: usize, unclosed: usize) -> BTreeMap<String, u64> {
        self.add("open", open as u64);
        self.add("unclosed", unclosed as u64);
        self.counts
    }

    fn add(&mut self, cause: &str, more: u64) {
        if more > 0 {
            *self.counts.entry(cause.to_owned()).or_default() += more;
        }
    }
}

/// At least one end, and all of them orderly.
pub(crate) fn is_orderly(ends: &BTreeMap<String, u64>) -> bool {
    !ends.is_empty() && ends.keys().all(|end| end.parse().is_ok_and(|code: u16| ORDERLY.contains(&code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_1001_and_1012_followed_by_the_end_of_tcp_are_orderly() {
        let count = |ended: &[Ended], open, unclosed| {
            let mut counts = CloseCounts::default();
            let orderly = ended.iter().filter(|ended| counts.note(ended)).count();
            (orderly, counts.report(open, unclosed))
        };
        let (orderly, ends) = count(&[Ended::Closed(1001), Ended::Closed(1012), Ended::Closed(1001)], 0, 0);
        assert_eq!((orderly, ends["1001"], ends["1012"]), (3, 2, 1));
        assert!(is_orderly(&ends));
        for (_, ends) in [
            count(&[Ended::Closed(1001), Ended::Closed(1011)], 0, 0),
            count(&[Ended::Closed(1001), Ended::Disconnected], 0, 0),
            count(&[Ended::Closed(1001)], 1, 0),
            count(&[Ended::Closed(1001)], 0, 1),
            count(&[], 0, 0),
        ] {
            assert!(!is_orderly(&ends), "{ends:?}");
        }
    }
}
