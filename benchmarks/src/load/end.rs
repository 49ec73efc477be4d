//! The server's end, when it is expected: who was told so, with which code, and who was not.
//!
//! An orderly end is a close frame with 1001 (going away) or 1012 (service restart), and then the server's closing
//! of TCP. Knows how connections ended. What they had received by then is the ledger's.

use std::collections::BTreeMap;

use super::connection::Ended;

const ORDERLY: [u16; 2] = [1001, 1012];

/// How the watched connections ended.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    /// By close code, or by what happened in its place.
    counts: BTreeMap<String, u64>,
}

impl Ends {
    /// A watched connection has ended; true when it was told in an orderly way.
    pub(crate) fn note(&mut self, ended: &Ended) -> bool {
        match ended {
            Ended::Closed(code) => {
                self.count(&code.to_string(), 1);
                ORDERLY.contains(code)
            }
            Ended::Gone | Ended::Io(_) | Ended::Parted => {
                self.count("gone", 1);
                false
            }
            Ended::Masked | Ended::Unnumbered | Ended::Frame(_) => {
                self.count("broken", 1);
                false
            }
        }
    }

    pub(crate) fn any(&self) -> bool {
        !self.counts.is_empty()
    }

    /// `open` were never told, and of those who were the server kept the sockets of `unclosed`.
    pub(crate) fn report(mut self, open: usize, unclosed: usize) -> BTreeMap<String, u64> {
        self.count("open", open as u64);
        self.count("unclosed", unclosed as u64);
        self.counts
    }

    fn count(&mut self, cause: &str, more: u64) {
        if more > 0 {
            *self.counts.entry(cause.to_owned()).or_default() += more;
        }
    }
}

/// Nothing but orderly ends, and at least one.
pub(crate) fn is_orderly(ends: &BTreeMap<String, u64>) -> bool {
    !ends.is_empty() && ends.keys().all(|end| end.parse().is_ok_and(|code: u16| ORDERLY.contains(&code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_going_away_and_restart_are_an_orderly_end() {
        let ends = |ended: &[Ended], open, unclosed| {
            let mut ends = Ends::default();
            let told = ended.iter().filter(|ended| ends.note(ended)).count();
            (told, ends.report(open, unclosed))
        };
        let (told, counts) = ends(&[Ended::Closed(1001), Ended::Closed(1012), Ended::Closed(1001)], 0, 0);
        assert_eq!((told, counts["1001"], counts["1012"]), (3, 2, 1));
        assert!(is_orderly(&counts));
        for other in [
            ends(&[Ended::Closed(1001), Ended::Closed(1011)], 0, 0),
            ends(&[Ended::Closed(1001), Ended::Gone], 0, 0),
            ends(&[Ended::Closed(1001)], 1, 0),
            ends(&[Ended::Closed(1001)], 0, 1),
            ends(&[], 0, 0),
        ] {
            assert!(!is_orderly(&other.1), "{:?}", other.1);
        }
    }
}
