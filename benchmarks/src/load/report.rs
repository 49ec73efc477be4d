//! The report of one run: for people as text, for `compare` as JSON.
//!
//! A number that was not measured is absent, never zero. Knows what is told; measures nothing.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Mode, latency::Summary};

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

/// What idle connections weigh in the server: its resident memory, without the kernel's.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Memory {
    pub(crate) empty_bytes: u64,
    pub(crate) full_bytes: u64,
    pub(crate) bytes_per_connection: f64,
}

/// One run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Report {
    pub(crate) setup: Setup,
    pub(crate) traffic: Option<Traffic>,
    pub(crate) memory: Option<Memory>,
    pub(crate) disconnections: u64,
    /// The first few causes of disconnections.
    pub(crate) causes: Vec<String>,
}

impl Traffic {
    /// Judges by the client's share of a core and the server's, running and waiting together.
    pub(crate) fn client_is_the_limit(client: f64, server: Option<f64>) -> bool {
        client > CLIENT_LIMIT && server.is_none_or(|share| share < SERVER_LIMIT)
    }

    pub(crate) fn is_faultless(&self) -> bool {
        self.received == self.expected && self.duplicates + self.order_violations + self.strays == 0
    }
}

impl Report {
    /// Everything once, in one order, to everybody, and nobody thrown out.
    pub(crate) fn is_faultless(&self) -> bool {
        self.disconnections == 0 && self.traffic.as_ref().is_none_or(Traffic::is_faultless)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let setup = &self.setup;
        write!(f, "{:?} at {}: {} connections", setup.mode, setup.url, setup.connections)?;
        match (setup.mode, setup.rate, setup.in_flight) {
            (Mode::Idle, ..) => writeln!(f)?,
            (_, Some(rate), _) => writeln!(f, ", {} senders, {rate} messages/s", setup.senders)?,
            (_, None, in_flight) => {
                writeln!(f, ", {} senders, {} in flight", setup.senders, in_flight.unwrap_or(0))?;
            }
        }
        if let Some(traffic) = &self.traffic {
            write!(f, "{traffic}")?;
        }
        if let Some(memory) = &self.memory {
            let (empty, full) = (memory.empty_bytes / 1024, memory.full_bytes / 1024);
            writeln!(f, "  memory          {empty} KiB empty, {full} KiB full")?;
            writeln!(f, "                  {:.0} bytes per connection", memory.bytes_per_connection)?;
        }
        writeln!(f, "  disconnections  {}", self.disconnections)?;
        for cause in &self.causes {
            writeln!(f, "                  {cause}")?;
        }
        writeln!(f, "  verdict         {}", if self.is_faultless() { "faultless" } else { "FAULTY" })
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  deliveries/s    {:.0}", self.deliveries_per_second)?;
        writeln!(f, "  messages/s      {:.0}", self.messages_per_second)?;
        let (percent, received, expected) = (100.0 * self.delivery_ratio, self.received, self.expected);
        writeln!(f, "  delivered       {percent:.4} % ({received} of {expected})")?;
        writeln!(f, "  duplicates      {}", self.duplicates)?;
        writeln!(f, "  out of order    {}", self.order_violations)?;
        writeln!(f, "  strays          {}", self.strays)?;
        if self.sender_reorders > 0 {
            writeln!(f, "  reordered       {} within a sender (not a fault)", self.sender_reorders)?;
        }
        if let Some(Summary { p50_us, p99_us, max_us }) = self.latency {
            writeln!(f, "  latency µs      p50 {p50_us:.0}, p99 {p99_us:.0}, max {max_us:.0}")?;
        }
        if let (Some(cost), Some(share), Some(waiting)) =
            (self.server_cpu_us_per_delivery, self.server_cpu_share, self.server_waiting_share)
        {
            let (share, waiting) = (100.0 * share, 100.0 * waiting);
            writeln!(
                f,
                "  server CPU      {cost:.3} µs per delivery, {share:.0} % of a core, {waiting:.0} % waiting for one"
            )?;
        }
        let limit = if self.client_was_the_limit { " — THE CLIENT WAS THE LIMIT" } else { "" };
        let (share, waiting) = (100.0 * self.client_cpu_share, 100.0 * self.client_waiting_share);
        writeln!(f, "  client CPU      {share:.0} % of a core, {waiting:.0} % waiting for one{limit}")
    }
}
