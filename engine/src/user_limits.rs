//! The rate limits of users: one for all connections of each user in a namespace.
//!
//! Owned by the directory. A limit outlives its user's connections until what was counted is paid for, or a client could
//! begin anew by reconnecting. Such limits are removed when limits are added, so their number is bounded by that of
//! the users who have connections or had some lately. The lock is taken when a connection of a user opens; no message takes
//! it. Does not know connections or what happens above a limit (`limiter.rs`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::rate::{RateLimit, SharedRateLimit};

/// Limits below which none is looked for that could be removed.
const SWEEP_MIN: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct UserLimits(Mutex<Limits>);

#[derive(Debug, Default)]
struct Limits {
    by_user: HashMap<Arc<str>, SharedRateLimit>,
    /// How many there may be until the next sweep.
    sweep_at: usize,
}

impl UserLimits {
    /// The limit of a user, if users are limited; made with these rates if there is none yet.
    pub(crate) fn of(&self, user: &Arc<str>, limit: &RateLimit, now: Instant) -> Option<SharedRateLimit> {
        if limit.user_messages.is_none() && limit.user_bytes.is_none() {
            return None;
        }
        let mut limits = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(limit) = limits.by_user.get(user) {
            return Some(limit.clone());
        }
        if limits.by_user.len() >= limits.sweep_at.max(SWEEP_MIN) {
            limits.by_user.retain(|_, limit| limit.is_shared() || !limit.is_paid(now));
            limits.sweep_at = limits.by_user.len() * 2;
        }
        let limit = SharedRateLimit::of(limit.user_messages, limit.user_bytes);
        limits.by_user.insert(user.clone(), limit.clone());
        Some(limit)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::rate::Rate;

    #[test]
    fn a_user_keeps_its_limit_until_everything_counted_is_paid_for_and_no_longer() {
        let rates = RateLimit { user_messages: Some(Rate::per_second(1)), ..RateLimit::default() };
        let (limits, start) = (UserLimits::default(), Instant::now());
        let later = start + Duration::from_secs(3600);
        let of = |user: usize, now| limits.of(&user.to_string().into(), &rates, now).expect("a limit");

        let ada = of(0, start);
        ada.offset(start);
        let now = 3600 * 1_000_000_000;
        assert!(ada.take(1, now) && !ada.take(1, now));
        drop(ada);
        assert!(!of(0, later).take(1, now), "a new connection does not begin anew");

        let bob = of(1, start);
        (2..SWEEP_MIN + 1).for_each(|user| drop(of(user, later)));
        let kept = limits.0.lock().expect("no panic").by_user.len();
        assert_eq!(kept, 3, "of Ada, who still pays, of Bob, who is connected, and the last");
        assert!(!of(0, later).take(1, now), "Ada still pays");
        drop(bob);
    }

    #[test]
    fn users_are_not_limited_by_default() {
        assert!(UserLimits::default().of(&"ada".into(), &RateLimit::default(), Instant::now()).is_none());
    }
}
