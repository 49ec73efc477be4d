//! The log limit: at most one line in a second of a kind that clients can cause as often as they like.
//!
//! Clients do not choose the length of a line either. The times of the last lines are static, because the log belongs
//! to the process and no engine is known where these lines are written. Knows the wall clock's seconds. Does not know
//! what is logged.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{SystemTime, UNIX_EPOCH},
};

/// A connection was refused by a limit on connections.
pub(crate) static CONNECTION_LIMIT: LogLimit = LogLimit::new();
/// An address upgrades too often.
pub(crate) static UPGRADE_RATE: LogLimit = LogLimit::new();
/// A connection could not be adopted.
pub(crate) static NOT_TAKEN_OVER: LogLimit = LogLimit::new();
/// The answer to a handshake was not sent.
pub(crate) static NOT_SENT: LogLimit = LogLimit::new();
/// A client was turned away without being waited for.
pub(crate) static NOT_WAITED_FOR: LogLimit = LogLimit::new();
/// An origin was refused.
pub(crate) static FORBIDDEN_ORIGIN: LogLimit = LogLimit::new();
/// A list of origins is wrong.
pub(crate) static INVALID_ORIGIN: LogLimit = LogLimit::new();
/// No subprotocol was selected.
pub(crate) static NO_SUBPROTOCOL: LogLimit = LogLimit::new();

/// The config of a connection is out of range.
pub(crate) static INVALID_CONFIG: LogLimit = LogLimit::new();
/// A short form of a hub's context failed.
pub(crate) static SHORT_FORM: LogLimit = LogLimit::new();
/// A connection's handler failed.
pub(crate) static HANDLER_FAILED: LogLimit = LogLimit::new();
/// A text that should be a connection id is not one.
pub(crate) static NO_ID: LogLimit = LogLimit::new();

/// One kind of line.
#[derive(Debug)]
pub(crate) struct LogLimit {
    /// The second in which the last line was written.
    last: AtomicU64,
    /// How many lines were left out since.
    left_out: AtomicU64,
}

impl LogLimit {
    const fn new() -> Self {
        Self { last: AtomicU64::new(0), left_out: AtomicU64::new(0) }
    }

    /// Whether a line may be written, and how many were left out since the last one.
    pub(crate) fn allows(&self) -> Option<u64> {
        let second = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.allows_in(second)
    }

    fn allows_in(&self, second: u64) -> Option<u64> {
        // Relaxed: counters that order nothing; a line too many or too few does no harm.
        if self.last.swap(second, Relaxed) == second {
            self.left_out.fetch_add(1, Relaxed);
            return None;
        }
        Some(self.left_out.swap(0, Relaxed))
    }
}

/// Bytes from a client as a log line shows them: the first 256, escaped.
pub(crate) struct Excerpt<'a>(pub(crate) &'a [u8]);

impl fmt::Debug for Excerpt<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN_BYTES: usize = 256;
        let shown = &self.0[..self.0.len().min(SHOWN_BYTES)];
        write!(formatter, "\"{}\"", shown.escape_ascii())?;
        match self.0.len() - shown.len() {
            0 => Ok(()),
            more => write!(formatter, " and {more} bytes more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_shows_little_of_what_a_stranger_has_sent_and_nothing_that_is_no_text() {
        assert_eq!(format!("{:?}", Excerpt(b"https://a.test")), "\"https://a.test\"");
        assert_eq!(format!("{:?}", Excerpt(b"a\n\"\xff")), r#""a\n\"\xff""#);
        let long = format!("{:?}", Excerpt(&[b'x'; 400_000]));
        assert_eq!(long, format!("\"{}\" and 399744 bytes more", "x".repeat(256)));
    }

    #[test]
    fn a_second_has_one_line_and_the_next_line_tells_how_many_were_left_out() {
        let limit = LogLimit::new();
        assert_eq!(limit.allows_in(7), Some(0));
        assert_eq!(limit.allows_in(7), None);
        assert_eq!(limit.allows_in(7), None);
        assert_eq!(limit.allows_in(9), Some(2));
        assert_eq!(limit.allows_in(10), Some(0));
    }
}
