//! Bounded waits of the test kit, by the system's clock.
//!
//! The clock of a test may be paused, and a test that waits for something that does not happen must fail all the same.
//! In memory a wait goes by the naps of the driver, during which no time passes. Knows nothing else.

use std::pin::pin;
use std::time::{Duration, Instant};

use super::driver::Driver;

/// How long an assertion waits, unless the test says something else.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
/// How late a wait that fails may end.
const NAP: Duration = Duration::from_millis(5);

/// What a wait depends on.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) timeout: Duration,
    /// For an engine in memory.
    pub(super) driver: Option<Driver>,
}

impl Waiting {
    /// The output; none after the timeout.
    pub(super) async fn within<F: Future>(&self, future: F) -> Option<F::Output> {
        let _waits = self.driver.as_ref().map(Driver::wait);
        let deadline = Instant::now() + self.timeout;
        let mut future = pin!(future);
        loop {
            tokio::select! {
                biased;
                output = &mut future => return Some(output),
                () = self.nap() => {}
            }
            if Instant::now() >= deadline {
                return None;
            }
        }
    }

    /// The same, with what is left until the deadline.
    pub(super) fn until_deadline(&self, deadline: Instant) -> Self {
        let timeout = deadline.saturating_duration_since(Instant::now());
        Self { timeout, driver: self.driver.clone() }
    }

    /// Whether the condition is met within the timeout.
    pub(super) async fn until(&self, mut is_met: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + self.timeout;
        let _waits = self.driver.as_ref().map(Driver::wait);
        loop {
            if is_met() {
                return true;
            }
            if let Some(driver) = &self.driver {
                driver.settle().await;
                if is_met() {
                    return true;
                }
            }
            if Instant::now() >= deadline {
                return false;
            }
            self.nap().await;
        }
    }

    async fn nap(&self) {
        match &self.driver {
            Some(driver) => driver.nap().await,
            None => tokio::time::sleep(NAP).await,
        }
    }
}
