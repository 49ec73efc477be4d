//! The report of one run: as JSON for `compare` and scripts, as text for people (in `text`).
//!
//! A number that was not measured is absent, never zero.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Mode, Options, close_counts, connection::Ended, latencies::LatencySummary};

/// How many causes of disconnections are reported.
const CAUSES_MAX: usize = 3;

/// The client may have been the limit above this share of a core,
const CLIENT_LIMIT: f64 = 0.9;
/// unless the server used its core as well. For a server on several cores this is not exact: look at the shares.
const SERVER_LIMIT: f64 = 0.95;

/// The options of the run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) url: String,
    pub(crate) connections: usize,
    pub(crate) senders: usize,
    pub(crate) in_flight: Option<usize>,
    pub(crate) rate: Option<f64>,
    pub(crate) payload_bytes: usize,
    pub(crate) groups: usize,
    /// Losses are no fault.
    pub(crate) lossy: bool,
}

/// The opening of all connections, before the measurement.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Handshakes {
    pub(crate) at_once: usize,
    pub(crate) per_second: f64,
    /// From the start of TCP's handshake to the end of WebSocket's.
    pub(crate) latency: Option<LatencySummary>,
}

/// The deliveries. Rates are those of the measured time, faults those of the whole run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Traffic {
    pub(crate) seconds: f64,
    pub(crate) deliveries_per_second: f64,
    pub(crate) messages_per_second: f64,
    pub(crate) expected: u64,
    pub(crate) received: u64,
    pub(crate) delivery_ratio: f64,
    pub(crate) duplicates: u64,
    pub(crate) order_violations: u64,
    pub(crate) sender_reorders: u64,
    pub(crate) strays: u64,
    /// Sent, but received by no connection before all had ended. Where the server's shutdown is expected, these count
    /// as not accepted and are not expected.
    pub(crate) unseen: u64,
    pub(crate) latency: Option<LatencySummary>,
    pub(crate) server_cpu_us_per_delivery: Option<f64>,
    /// Of one core; above 1 when it used several.
    pub(crate) server_cpu_share: Option<f64>,
    /// Ready to run, but kept waiting by other processes.
    pub(crate) server_waiting_share: Option<f64>,
    pub(crate) client_cpu_share: f64,
    pub(crate) client_waiting_share: f64,
    pub(crate) client_was_the_limit: bool,
}

/// The server's resident memory, without the kernel's. Empty is before the first connection, full after the settling,
/// and the end is that of the measurement.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Memory {
    pub(crate) empty_bytes: u64,
    pub(crate) full_bytes: u64,
    /// From empty to full.
    pub(crate) bytes_per_connection: f64,
    /// Open files, from empty to full.
    pub(crate) descriptors_per_connection: f64,
    /// The highest of samples once a second.
    pub(crate) peak_bytes: u64,
    pub(crate) end_bytes: Option<u64>,
    pub(crate) kernel: Option<KernelMemory>,
    /// The kernel's memory for the server's sockets alone, where `ss` is installed.
    pub(crate) sockets_full_bytes: Option<u64>,
    pub(crate) sockets_end_bytes: Option<u64>,
}

/// The kernel's memory for all TCP sockets of the machine: on the loopback, those of both ends.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct KernelMemory {
    pub(crate) empty_bytes: u64,
    pub(crate) full_bytes: u64,
    pub(crate) peak_bytes: u64,
    pub(crate) end_bytes: Option<u64>,
    /// From empty to full.
    pub(crate) bytes_per_connection: f64,
    /// From empty to the peak.
    pub(crate) peak_bytes_per_connection: f64,
}

/// The connections that read little or nothing.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Slow {
    pub(crate) stalled: usize,
    pub(crate) slow: usize,
    pub(crate) slow_bytes_per_second: u32,
    /// How many of them the server has closed.
    pub(crate) disconnected: u64,
    /// Messages that they received, including those that were read after the run.
    pub(crate) received: u64,
}

/// One run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    pub(crate) setup: Setup,
    pub(crate) handshakes: Option<Handshakes>,
    pub(crate) traffic: Option<Traffic>,
    pub(crate) memory: Option<Memory>,
    pub(crate) slow: Option<Slow>,
    /// Where the server's shutdown was expected: how connections ended, by close code, `gone` (no Close frame), `broken`
    /// (invalid frames), `open` (not closed) or `unclosed` (got a Close frame, but TCP was not closed; also counted under
    /// the code).
    pub(crate) ends: Option<BTreeMap<String, u64>>,
    pub(crate) disconnections: u64,
    /// The first few causes of disconnections.
    pub(crate) causes: Vec<String>,
}

impl Traffic {
    /// Decides by the client's share of a core and the server's, which is its running and waiting together.
    pub(crate) fn client_is_the_limit(client: f64, server: Option<f64>) -> bool {
        client > CLIENT_LIMIT && server.is_none_or(|share| share < SERVER_LIMIT)
    }

    fn is_faultless(&self, lossy: bool) -> bool {
        let lost = self.received != self.expected;
        // After a loss the order cannot be decided.
        let disordered = self.order_violations > 0 && !(lossy && lost);
        self.duplicates + self.strays == 0 && !disordered && (lossy || !lost)
    }
}

impl Report {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            setup: options.setup(),
            handshakes: None,
            traffic: None,
            memory: None,
            slow: None,
            ends: None,
            disconnections: 0,
            causes: Vec::new(),
        }
    }

    /// Notes an unexpected end of a watched connection.
    pub(crate) fn disconnected(&mut self, index: usize, ended: &Ended) {
        self.disconnections += 1;
        if self.causes.len() < CAUSES_MAX {
            self.causes.push(format!("connection {index}: {ended}"));
        }
    }

    /// Every watched connection got everything once and in one order, none was disconnected, and a shutdown that was
    /// expected was an orderly one.
    pub(crate) fn is_faultless(&self) -> bool {
        self.disconnections == 0
            && self.traffic.as_ref().is_none_or(|traffic| traffic.is_faultless(self.setup.lossy))
            && self.ends.as_ref().is_none_or(close_counts::is_orderly)
    }
}
