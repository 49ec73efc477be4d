//! Latencies of messages or handshakes. All are kept and sorted once, so that percentiles are exact; eight bytes each.

use std::time::Duration;

use serde::{Deserialize, Serialize};

#[derive(Debug, Default)]
pub(crate) struct Latencies(Vec<u64>);

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct LatencySummary {
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) max_us: f64,
}

impl Latencies {
    pub(crate) fn record(&mut self, latency: Duration) {
        self.0.push(latency.as_nanos() as u64);
    }

    /// `None` when nothing was recorded.
    pub(crate) fn summary(mut self) -> Option<LatencySummary> {
        self.0.sort_unstable();
        let last = self.0.len().checked_sub(1)?;
        let at = |share: f64| self.0[(share * last as f64).round() as usize] as f64 / 1e3;
        Some(LatencySummary { p50_us: at(0.5), p99_us: at(0.99), max_us: at(1.0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_sorted_latencies() {
        let mut latencies = Latencies::default();
        (0..=100).rev().for_each(|us| latencies.record(Duration::from_micros(us)));
        assert_eq!(latencies.summary(), Some(LatencySummary { p50_us: 50.0, p99_us: 99.0, max_us: 100.0 }));
        assert_eq!(Latencies::default().summary(), None);
    }
}
