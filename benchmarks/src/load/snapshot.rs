//! What stood in the books at one moment, and what the difference of two moments says.

use std::time::{Duration, Instant};

use super::{latency::Latencies, ledger::Tally, report};
use crate::process::{CpuTime, Process, ProcessError};

/// What stood in the books at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Snapshot {
    pub(crate) at: Instant,
    tally: Tally,
    /// Absent when nobody asked, or when the server has ended.
    server_cpu: Option<CpuTime>,
    client_cpu: CpuTime,
    spun: Duration,
}

impl Snapshot {
    /// `spun` is how long the client has polled for nothing so far.
    pub(crate) fn take(server: Option<Process>, tally: Tally, spun: Duration) -> Result<Self, ProcessError> {
        Ok(Self {
            server_cpu: server.and_then(|server| server.cpu_time().ok()),
            client_cpu: Process::current().cpu_time()?,
            spun,
            tally,
            at: Instant::now(),
        })
    }

    /// What the messages did between two moments; the faults are those of the whole run, which ended with `total`.
    pub(crate) fn compare(
        before: &Self,
        after: &Self,
        total: Tally,
        latencies: Latencies,
    ) -> report::Traffic {
        let seconds = (after.at - before.at).as_secs_f64();
        let deliveries = (after.tally.received - before.tally.received) as f64;
        let messages = (after.tally.landed - before.tally.landed) as f64;
        // Threads that have ended took their time with them: what is left would be no measurement.
        let server = before
            .server_cpu
            .zip(after.server_cpu)
            .filter(|(before, after)| after.running >= before.running)
            .map(|(before, after)| after.since(before));
        let server_cpu = server.map(|time| time.running.as_secs_f64());
        let client = after.client_cpu.since(before.client_cpu);
        let worked = client.running.saturating_sub(after.spun - before.spun).as_secs_f64();
        let client_cpu_share = worked / seconds;
        report::Traffic {
            seconds,
            deliveries_per_second: deliveries / seconds,
            messages_per_second: messages / seconds,
            expected: total.expected,
            received: total.received,
            delivery_ratio: total.received as f64 / total.expected.max(1) as f64,
            duplicates: total.duplicates,
            order_violations: total.order_violations,
            sender_reorders: total.sender_reorders,
            strays: total.strays,
            unseen: total.unseen,
            latency: latencies.summary(),
            server_cpu_us_per_delivery: server_cpu
                .filter(|_| deliveries > 0.0)
                .map(|cpu| 1e6 * cpu / deliveries),
            server_cpu_share: server_cpu.map(|cpu| cpu / seconds),
            server_waiting_share: server.map(|time| time.waiting.as_secs_f64() / seconds),
            client_cpu_share,
            client_waiting_share: client.waiting.as_secs_f64() / seconds,
            client_was_the_limit: report::Traffic::client_is_the_limit(
                client_cpu_share,
                server.map(|time| (time.running + time.waiting).as_secs_f64() / seconds),
            ),
        }
    }
}
