//! Waiting with a bound, so that a test that hangs fails and names its line.

use std::fmt::Debug;
use std::panic::Location;
use std::time::{Duration, Instant};

/// How long a test waits for what must happen. Generous: a busy machine must not break a test.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Awaits something that must happen. Panics after [`TEST_TIMEOUT`], at the caller's line.
#[track_caller]
pub fn within_timeout<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let caller = Location::caller();
    async move {
        match tokio::time::timeout(TEST_TIMEOUT, future).await {
            Ok(output) => output,
            Err(_) => panic!("nothing happened within {TEST_TIMEOUT:?} at {caller}"),
        }
    }
}

/// Suspends a hub's method. On a shard the first yield of a method does not.
pub async fn yield_twice() {
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
}

/// Waits until something that sends no event, such as a counter, has this value. Panics after [`TEST_TIMEOUT`].
#[track_caller]
pub fn eventually<T: PartialEq + Debug>(
    expected: T,
    mut actual: impl FnMut() -> T,
) -> impl Future<Output = ()> {
    let caller = Location::caller();
    async move {
        let deadline = Instant::now() + TEST_TIMEOUT;
        loop {
            let now = actual();
            if now == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{now:?} never became {expected:?} at {caller}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
