//! The reconnect policy, and the delays that follow from it.
//!
//! Pure: it is told how connections ended and answers how long to wait, or that the client stays closed. The delays are
//! exponential with full jitter, so that clients that lost their server together do not come back together. Does not know
//! sockets, clocks or messages.

use std::{
    collections::hash_map::RandomState,
    fmt,
    hash::{BuildHasher as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use super::error::ClientClose;

const INITIAL_DELAY: Duration = Duration::from_secs(2);
/// When a server can be reached again after a long time, all of its clients are back within this, spread over it.
const DELAY_MAX: Duration = Duration::from_secs(10);
const RESET_AFTER: Duration = Duration::from_secs(10);

type Condition = Arc<dyn Fn(&ClientClose) -> bool + Send + Sync>;

/// When a client reconnects, and after which delays; for
/// [`with_reconnect`](super::HubClientBuilder::with_reconnect).
///
/// The delay before attempt *n* (1, 2, …) is drawn uniformly from zero to *initial delay* × 2^(*n* − 1), but at most the
/// *maximum delay* ("full jitter"). With the defaults that is up to 2 s, 4 s, 8 s and then 10 s, without a limit on
/// attempts: however long a server was away, its clients are back within 10 s.
///
/// A `Retry-After` of the server is waited for first, and the random delay is added to it. It is then at most what is
/// left of the maximum delay, or the initial delay if that is more.
///
/// ```
/// use std::time::Duration;
/// use shardcast::client::{ClientClose, ReconnectPolicy};
///
/// let policy = ReconnectPolicy::new()
///     .with_delay_max(Duration::from_secs(60))
///     .with_attempts_max(20)
///     .with_first_connect(true)
///     // Also after 4000, which this application's server sends before maintenance.
///     .with_condition(|close| {
///         close.should_reconnect() || matches!(close, ClientClose::ByServer { code: 4000, .. })
///     });
/// ```
#[derive(Clone)]
#[must_use]
pub struct ReconnectPolicy {
    initial_delay: Duration,
    delay_max: Duration,
    attempts_max: Option<u32>,
    reset_after: Duration,
    is_for_first_connect: bool,
    condition: Option<Condition>,
}

impl ReconnectPolicy {
    /// The defaults: delays up to 2 s, growing to 10 s, any number of attempts, not for the first connect.
    pub fn new() -> Self {
        Self {
            initial_delay: INITIAL_DELAY,
            delay_max: DELAY_MAX,
            attempts_max: None,
            reset_after: RESET_AFTER,
            is_for_first_connect: false,
            condition: None,
        }
    }

    /// The longest delay before the first attempt: 2 s by default. It doubles with every attempt that fails. Zero makes
    /// [`connect`](super::HubClient::connect) fail: a client without delays would flood a server that is down.
    pub fn with_initial_delay(mut self, delay: Duration) -> Self {
        self.initial_delay = delay;
        self
    }

    /// The longest delay before any attempt: 10 s by default. It is also the limit for the initial delay, and zero makes
    /// [`connect`](super::HubClient::connect) fail.
    pub fn with_delay_max(mut self, delay: Duration) -> Self {
        self.delay_max = delay;
        self
    }

    /// How many attempts may follow each other: without limit by default (`None`). After the last one has failed, the
    /// client is closed with [`ClientClose::ConnectFailed`]. With 0 the client never reconnects.
    pub fn with_attempts_max(mut self, attempts: impl Into<Option<u32>>) -> Self {
        self.attempts_max = attempts.into();
        self
    }

    /// How long a connection must be open for attempts and delays to start again from the first: 10 s by default. The
    /// attempts of a server that accepts connections and closes them at once therefore count as failed.
    pub fn with_reset_after(mut self, open: Duration) -> Self {
        self.reset_after = open;
        self
    }

    /// Whether [`connect`](super::HubClient::connect) retries, too: no by default. If so, it returns when the connection
    /// is open, or with the error after which the policy allows no further attempt, and messages can be queued in the
    /// meantime by a [`sender`](super::HubClient::sender).
    pub fn with_first_connect(mut self, retries: bool) -> Self {
        self.is_for_first_connect = retries;
        self
    }

    /// Decides after what the client reconnects, in place of [`ClientClose::should_reconnect`]. It is called in the
    /// client's task and must not block. It is not asked when the application itself closed, or when the request is
    /// invalid: the client never reconnects then. If it panics, the client does not reconnect.
    pub fn with_condition(
        mut self,
        condition: impl Fn(&ClientClose) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.condition = Some(Arc::new(condition));
        self
    }

    /// What is wrong with the settings, if anything.
    pub(super) fn fault(&self) -> Option<&'static str> {
        (self.initial_delay.is_zero() || self.delay_max.is_zero())
            .then_some("a delay of the reconnect policy is zero: set a longer one")
    }

    pub(super) fn is_for_first_connect(&self) -> bool {
        self.is_for_first_connect
    }

    fn reconnects_after(&self, close: &ClientClose) -> bool {
        if close.is_irrevocable() {
            return false;
        }
        let Some(condition) = &self.condition else { return close.should_reconnect() };
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| condition(close))).unwrap_or_else(|_| {
            tracing::error!(%close, "the condition of the reconnect policy panicked: the client does not reconnect");
            false
        })
    }

    /// The longest delay before an attempt; attempts count from 1.
    fn ceiling(&self, attempt: u32) -> Duration {
        let factor = 1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        self.initial_delay.saturating_mul(factor).min(self.delay_max)
    }
}

impl Default for ReconnectPolicy {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for ReconnectPolicy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ReconnectPolicy")
            .field("initial_delay", &self.initial_delay)
            .field("delay_max", &self.delay_max)
            .field("attempts_max", &self.attempts_max)
            .field("reset_after", &self.reset_after)
            .field("is_for_first_connect", &self.is_for_first_connect)
            .field("has_condition", &self.condition.is_some())
            .finish()
    }
}

/// The attempts of one client since its connection was last stable.
#[derive(Debug)]
pub(super) struct Attempts {
    policy: Option<ReconnectPolicy>,
    made: u32,
}

/// An attempt that is due after a delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attempt {
    pub(super) number: u32,
    pub(super) delay: Duration,
}

impl Attempts {
    /// Without a policy there are none.
    pub(super) fn new(policy: Option<ReconnectPolicy>) -> Self {
        Self { policy, made: 0 }
    }

    pub(super) fn made(&self) -> u32 {
        self.made
    }

    /// A connection was open for this long.
    pub(super) fn was_open(&mut self, open: Duration) {
        if self.policy.as_ref().is_some_and(|policy| open >= policy.reset_after) {
            self.made = 0;
        }
    }

    /// The next attempt, or `None` if the client stays closed.
    pub(super) fn next(&mut self, close: &ClientClose) -> Option<Attempt> {
        // Each hasher has random keys, which suffices to spread clients.
        self.next_with(close, RandomState::new().build_hasher().finish())
    }

    fn next_with(&mut self, close: &ClientClose, random: u64) -> Option<Attempt> {
        let policy = self.policy.as_ref()?;
        if policy.attempts_max.is_some_and(|max| self.made >= max) || !policy.reconnects_after(close) {
            return None;
        }
        self.made = self.made.saturating_add(1);
        let least = match close {
            ClientClose::ConnectFailed { error, .. } => error.retry_after().unwrap_or_default(),
            _ => Duration::ZERO,
        };
        // The jitter is added: a date, or the same number of seconds, is told to many clients.
        let left = policy.delay_max.saturating_sub(least).max(policy.ceiling(1));
        let jitter = fraction(policy.ceiling(self.made).min(left), random);
        Some(Attempt { number: self.made, delay: least.saturating_add(jitter) })
    }
}

/// From zero for 0 to `whole` for the largest number, uniformly.
fn fraction(whole: Duration, random: u64) -> Duration {
    let nanos = whole.as_nanos().min(u128::from(u64::MAX));
    let part = (nanos * u128::from(random)) >> 64;
    Duration::from_nanos(u64::try_from(part).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use http::Response;

    use super::*;
    use crate::client::error::ClientError;

    const LONGEST: u64 = u64::MAX;

    fn lost() -> ClientClose {
        ClientClose::lost("a test")
    }

    fn refused(retry_after: &str) -> ClientClose {
        let response = Response::builder().status(503).header("retry-after", retry_after);
        let error = ClientError::Refused(Arc::new(response.body(Vec::new()).unwrap()));
        ClientClose::ConnectFailed { attempts: 0, error }
    }

    /// In milliseconds, rounded.
    fn millis(attempt: Option<Attempt>) -> Option<u128> {
        attempt.map(|attempt| (attempt.delay.as_nanos() + 500_000) / 1_000_000)
    }

    #[test]
    fn delays_double_up_to_their_limit_and_are_anything_from_zero() {
        let mut attempts = Attempts::new(Some(ReconnectPolicy::new()));
        let longest: Vec<_> = (0..7).map(|_| millis(attempts.next_with(&lost(), LONGEST)).unwrap()).collect();
        assert_eq!(longest, [2000, 4000, 8000, 10000, 10000, 10000, 10000]);
        for (random, expected) in [(0, 0), (1 << 62, 2500), (1 << 63, 5000)] {
            assert_eq!(millis(attempts.next_with(&lost(), random)), Some(expected));
        }
    }

    #[test]
    fn no_number_of_attempts_overflows() {
        let policy = ReconnectPolicy::new().with_initial_delay(Duration::MAX).with_delay_max(Duration::MAX);
        let mut attempts = Attempts { policy: Some(policy), made: u32::MAX - 1 };
        for _ in 0..3 {
            let attempt = attempts.next_with(&lost(), LONGEST).unwrap();
            assert_eq!(attempt.number, u32::MAX);
            assert!(attempt.delay > Duration::from_secs(500 * 365 * 24 * 60 * 60), "{attempt:?}");
        }
        assert!(attempts.next_with(&refused(&u64::MAX.to_string()), LONGEST).is_some());
    }

    #[test]
    fn clients_that_lost_their_server_together_come_back_spread_over_the_delay() {
        const CLIENTS: usize = 2000;
        let mut quarters = [0; 4];
        for _ in 0..CLIENTS {
            let delay = Attempts::new(Some(ReconnectPolicy::new())).next(&lost()).unwrap().delay;
            quarters[(delay.as_millis() / 500).min(3) as usize] += 1;
        }
        // 500 each on average; with a fair draw, fewer than 300 occur less than once in 10^20 runs.
        assert!(quarters.iter().all(|&clients| clients > 300), "{quarters:?}");
    }

    #[test]
    fn retry_after_is_waited_for_at_least_and_the_jitter_is_added_within_the_longest_delay() {
        let mut attempts = Attempts::new(Some(ReconnectPolicy::new()));
        assert_eq!(millis(attempts.next_with(&refused("7"), 0)), Some(7000));
        assert_eq!(millis(attempts.next_with(&refused("3"), LONGEST)), Some(7000), "up to 4 s");
        assert_eq!(
            millis(attempts.next_with(&refused("7"), LONGEST)),
            Some(10000),
            "up to 3 s instead of 8 s"
        );
        assert_eq!(millis(attempts.next_with(&refused("60"), LONGEST)), Some(62000), "never less than 2 s");
        assert_eq!(millis(attempts.next_with(&refused("tomorrow"), 0)), Some(0));
    }

    #[test]
    fn attempts_end_at_their_limit_and_start_anew_after_a_stable_connection() {
        let mut attempts = Attempts::new(Some(ReconnectPolicy::new().with_attempts_max(2)));
        assert_eq!(attempts.next_with(&lost(), 0).unwrap().number, 1);
        attempts.was_open(Duration::from_secs(9));
        assert_eq!(attempts.next_with(&lost(), 0).unwrap().number, 2);
        attempts.was_open(Duration::from_secs(9));
        assert_eq!(attempts.next_with(&lost(), 0), None);
        attempts.was_open(Duration::from_secs(10));
        assert_eq!(attempts.next_with(&lost(), 0).unwrap().number, 1);
        assert_eq!(
            Attempts::new(Some(ReconnectPolicy::new().with_attempts_max(0))).next_with(&lost(), 0),
            None
        );
        assert_eq!(Attempts::new(None).next_with(&lost(), 0), None);
    }

    #[test]
    fn a_condition_decides_unless_the_application_closed_or_the_request_is_invalid() {
        let refused_by_policy = ClientClose::ByServer { code: 1008, reason: String::new() };
        let invalid = ClientClose::ConnectFailed { attempts: 0, error: ClientError::invalid("no URL") };
        let mut by_default = Attempts::new(Some(ReconnectPolicy::new()));
        assert!(by_default.next(&refused_by_policy).is_none());
        let mut always = Attempts::new(Some(ReconnectPolicy::new().with_condition(|_| true)));
        assert!(always.next(&refused_by_policy).is_some());
        for close in
            [ClientClose::ByClient, ClientClose::Unanswered, ClientClose::Abandoned { unsent: 1 }, invalid]
        {
            assert!(always.next(&close).is_none(), "{close}");
        }
        let mut never = Attempts::new(Some(ReconnectPolicy::new().with_condition(|_| false)));
        assert!(never.next(&lost()).is_none());
        let mut panics = Attempts::new(Some(ReconnectPolicy::new().with_condition(|_| panic!("expected"))));
        assert!(panics.next(&lost()).is_none());
    }
}
