//! CPU times and delivery counts at one moment, and their differences.

use std::time::{Duration, Instant};

use super::{delivery_tracker::Tally, latencies::Latencies, report};
use crate::process::{CpuTime, Process, ProcessError};

/// CPU times and counts at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    pub(crate) at: Instant,
    tally: Tally,
    /// `None` without --server-pid, or when the server has ended.
    server_cpu: Option<CpuTime>,
    client_cpu: CpuTime,
    spun: Duration,
}

impl Snapshot {
    /// `spun` is how long the client has polled without finding anything.
    pub(crate) fn take(server: Option<Process>, tally: Tally, spun: Duration) -> Result<Self, ProcessError> {
        Ok(Self {
            server_cpu: server.and_then(|server| server.cpu_time().ok()),
            client_cpu: Process::current().cpu_time()?,
            spun,
            tally,
            at: Instant::now(),
        })
    }

    pub(crate) fn since(&self, earlier: &Self) -> Interval {
        // The times of threads that have ended are missing: the difference would be wrong.
        let server_cpu = earlier
            .server_cpu
            .zip(self.server_cpu)
            .filter(|(before, after)| after.running >= before.running)
            .map(|(before, after)| after.since(before));
        Interval {
            seconds: (self.at - earlier.at).as_secs_f64(),
            deliveries: self.tally.received - earlier.tally.received,
            messages: self.tally.landed - earlier.tally.landed,
            server_cpu,
            client_cpu: self.client_cpu.since(earlier.client_cpu),
            spun: self.spun - earlier.spun,
        }
    }
}

/// What happened between two snapshots, or in several such intervals.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interval {
    seconds: f64,
    pub(crate) deliveries: u64,
    messages: u64,
    /// `None` unless it is known for all intervals of a sum.
    server_cpu: Option<CpuTime>,
    client_cpu: CpuTime,
    spun: Duration,
}

impl Interval {
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            seconds: self.seconds + other.seconds,
            deliveries: self.deliveries + other.deliveries,
            messages: self.messages + other.messages,
            server_cpu: self.server_cpu.zip(other.server_cpu).map(|(one, other)| one.and(other)),
            client_cpu: self.client_cpu.and(other.client_cpu),
            spun: self.spun + other.spun,
        }
    }

    /// The server's CPU per delivery, in microseconds.
    pub(crate) fn cost(&self) -> Option<f64> {
        let cpu = self.server_cpu.filter(|_| self.deliveries > 0)?;
        Some(1e6 * cpu.running.as_secs_f64() / self.deliveries as f64)
    }

    /// Rates from this interval, and the faults of the whole run from `total`.
    pub(crate) fn report(&self, total: Tally, latencies: Latencies) -> report::Traffic {
        let seconds = self.seconds;
        let worked = self.client_cpu.running.saturating_sub(self.spun).as_secs_f64();
        let client_cpu_share = worked / seconds;
        let server = self.server_cpu;
        report::Traffic {
            seconds,
            deliveries_per_second: self.deliveries as f64 / seconds,
            messages_per_second: self.messages as f64 / seconds,
            expected: total.expected,
            received: total.received,
            delivery_ratio: total.received as f64 / total.expected.max(1) as f64,
            duplicates: total.duplicates,
            order_violations: total.order_violations,
            sender_reorders: total.sender_reorders,
            strays: total.strays,
            unseen: total.unseen,
            latency: latencies.summary(),
            server_cpu_us_per_delivery: self.cost(),
            server_cpu_share: server.map(|time| time.running.as_secs_f64() / seconds),
            server_waiting_share: server.map(|time| time.waiting.as_secs_f64() / seconds),
            client_cpu_share,
            client_waiting_share: self.client_cpu.waiting.as_secs_f64() / seconds,
            client_was_the_limit: report::Traffic::client_is_the_limit(
                client_cpu_share,
                server.map(|time| (time.running + time.waiting).as_secs_f64() / seconds),
            ),
        }
    }
}
