//! The report of one run: as JSON for `compare` and scripts, as text for people (in `text`).
//!
//! A number that was not measured is absent, never zero. Knows what is told; measures nothing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Mode, Options, connection::Ended, end, latency::Summary};

/// Of what went wrong in the same way, only the first few cases are told.
pub(crate) const CAUSES_TOLD: usize = 3;

/// Above this share of a core the client may have been the limit,
const CLIENT_LIMIT: f64 = 0.9;
/// unless the server had no core to spare either. A server on several cores is taken for busy too soon: look at the
/// shares.
const SERVER_LIMIT: f64 = 0.95;

/// What was asked for.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) url: String,
    pub(crate) connections: usize,
    pub(crate) senders: usize,
    pub(crate) in_flight: Option<usize>,
    pub(crate) rate: Option<f64>,
    pub(crate) payload_bytes: usize,
    #[serde(default = "one")]
    pub(crate) groups: usize,
    /// Losses are no fault.
    #[serde(default)]
    pub(crate) lossy: bool,
}

fn one() -> usize {
    1
}

/// What the messages did. The rates are those of the measured time, the faults those of the whole run.
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
    /// Sent, but seen by nobody before everybody had left. Where the server's end is expected these count as not
    /// accepted, and are not among the expected.
    #[serde(default)]
    pub(crate) unseen: u64,
    pub(crate) latency: Option<Summary>,
    pub(crate) server_cpu_us_per_delivery: Option<f64>,
    /// Of one core; above 1 when it used several.
    pub(crate) server_cpu_share: Option<f64>,
    /// Ready to run but kept waiting by others, as a share of the time.
    pub(crate) server_waiting_share: Option<f64>,
    pub(crate) client_cpu_share: f64,
    pub(crate) client_waiting_share: f64,
    pub(crate) client_was_the_limit: bool,
}

/// What the server's memory did: resident, that is without the kernel's. Empty is before the first connection, full
/// after the settling, and the end that of the measurement.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Memory {
    pub(crate) empty_bytes: u64,
    pub(crate) full_bytes: u64,
    /// From empty to full.
    pub(crate) bytes_per_connection: f64,
    /// The highest of samples once a second.
    #[serde(default)]
    pub(crate) peak_bytes: Option<u64>,
    #[serde(default)]
    pub(crate) end_bytes: Option<u64>,
    #[serde(default)]
    pub(crate) kernel: Option<KernelMemory>,
    /// The kernel's memory for the server's sockets alone, where `ss` tells it.
    #[serde(default)]
    pub(crate) sockets_full_bytes: Option<u64>,
    #[serde(default)]
    pub(crate) sockets_end_bytes: Option<u64>,
}

/// The kernel's memory for all TCP sockets of the machine: over the loopback, those of both ends.
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

/// Those who read little or nothing.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Slow {
    pub(crate) stalled: usize,
    pub(crate) slow: usize,
    pub(crate) slow_bytes_per_second: u32,
    /// How many of them the server has ended.
    pub(crate) disconnected: u64,
    /// Messages they got, those included that were read out after the run.
    pub(crate) received: u64,
}

/// What the killing of some did to the others.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Kill {
    pub(crate) killed: usize,
    /// The longest latency of a message in flight at the killing, or sent within 2 s after it.
    pub(crate) max_gap_ms: Option<f64>,
}

/// Those who came and went.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Churn {
    pub(crate) joined: u64,
    pub(crate) left: u64,
    /// Handshakes that failed, newcomers that were ended, leavers that got no answer.
    pub(crate) failed: u64,
    /// Newcomers that heard nothing for 5 s while their group did.
    pub(crate) deaf: u64,
    pub(crate) handshake: Option<Summary>,
    /// The first few causes of failures.
    pub(crate) causes: Vec<String>,
}

/// Many who connect at once, again and again.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Storm {
    pub(crate) at_once: usize,
    pub(crate) rounds: u64,
    pub(crate) opened: u64,
    /// While connecting; the closing between the rounds is not in it.
    pub(crate) connections_per_second: f64,
    pub(crate) handshake: Option<Summary>,
    /// The longest time a round took to close all its connections.
    pub(crate) closing_ms_max: f64,
    pub(crate) server_cpu_us_per_connection: Option<f64>,
    /// How many, by cause.
    pub(crate) failures: BTreeMap<String, u64>,
}

/// One run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    pub(crate) setup: Setup,
    pub(crate) traffic: Option<Traffic>,
    pub(crate) memory: Option<Memory>,
    #[serde(default)]
    pub(crate) slow: Option<Slow>,
    #[serde(default)]
    pub(crate) kill: Option<Kill>,
    #[serde(default)]
    pub(crate) churn: Option<Churn>,
    #[serde(default)]
    pub(crate) storm: Option<Storm>,
    /// Where the server's end was expected: how connections ended, by close code, `gone` (no close frame), `broken`
    /// (no WebSocket any more), `open` (not ended) or `unclosed` (told, but left open; they are under their code too).
    #[serde(default)]
    pub(crate) ends: Option<BTreeMap<String, u64>>,
    pub(crate) disconnections: u64,
    /// The first few causes of disconnections.
    pub(crate) causes: Vec<String>,
}

impl Traffic {
    /// Judges by the client's share of a core and the server's, running and waiting together.
    pub(crate) fn client_is_the_limit(client: f64, server: Option<f64>) -> bool {
        client > CLIENT_LIMIT && server.is_none_or(|share| share < SERVER_LIMIT)
    }

    fn is_faultless(&self, lossy: bool) -> bool {
        let lost = self.received != self.expected;
        // Once something is lost, nobody can say which order was meant.
        let disordered = self.order_violations > 0 && !(lossy && lost);
        self.duplicates + self.strays == 0 && !disordered && (lossy || !lost)
    }
}

impl Report {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            setup: options.setup(),
            traffic: None,
            memory: None,
            slow: None,
            kill: None,
            churn: None,
            storm: None,
            ends: None,
            disconnections: 0,
            causes: Vec::new(),
        }
    }

    /// A watched connection has ended that should not have.
    pub(crate) fn disconnected(&mut self, index: usize, ended: &Ended) {
        self.disconnections += 1;
        if self.causes.len() < CAUSES_TOLD {
            self.causes.push(format!("connection {index}: {ended}"));
        }
    }

    /// Everything once, in one order, to everybody who is watched, nobody thrown out, nobody kept out, and an end
    /// that was expected an orderly one.
    pub(crate) fn is_faultless(&self) -> bool {
        self.disconnections == 0
            && self.traffic.as_ref().is_none_or(|traffic| traffic.is_faultless(self.setup.lossy))
            && self.churn.as_ref().is_none_or(|churn| churn.failed + churn.deaf == 0)
            && self.storm.as_ref().is_none_or(|storm| storm.failures.is_empty())
            && self.ends.as_ref().is_none_or(end::is_orderly)
    }
}
