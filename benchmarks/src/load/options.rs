//! The load generator's command line, and which of its options fit together.

use std::time::Duration;

use clap::{Args, FromArgMatches};

use super::{LoadError, plan::Plan, report::Setup, target::GROUP};

/// Senders of an open loop by default.
const OPEN_LOOP_SENDERS: usize = 64;

/// The command line of `load`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// The server: `ws://127.0.0.1:PORT/ws`, `…/echo` or, with --groups, `…/group/{group}`; with `wss://` over TLS, where
    /// any certificate is accepted.
    #[arg(long)]
    pub(crate) url: String,
    #[arg(long, value_enum, default_value_t = Mode::Fanout)]
    pub(crate) mode: Mode,
    /// How many connections to open, slow and stalled ones included.
    #[arg(long, default_value_t = 1000)]
    pub(crate) connections: usize,
    /// How many of the connections send, spread evenly over all and over the groups. By default as many as messages are
    /// in flight, in an open loop 64, and at least one for each group.
    #[arg(long)]
    pub(crate) senders: Option<usize>,
    /// Closed loop: messages in flight in total.
    #[arg(long, default_value_t = 1)]
    pub(crate) in_flight: usize,
    /// Open loop instead: messages per second in total, with the latency counted from the intended time of sending.
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    /// How long to measure, in seconds.
    #[arg(long, default_value_t = 3.0)]
    pub(crate) seconds: f64,
    /// How long to send before measuring, in seconds.
    #[arg(long, default_value_t = 0.5)]
    pub(crate) warmup: f64,
    /// Bytes of a whole JSON message.
    #[arg(long, default_value_t = 64)]
    pub(crate) payload: usize,
    /// How many groups there are: connection i joins group i % N by the URL's `{group}`, and a message is expected
    /// at all members of its sender's group, in one order for each group.
    #[arg(long, default_value_t = 1)]
    pub(crate) groups: usize,
    /// How many of the connections read nothing during the measurement, not even pings. They send nothing, no delivery
    /// to them is expected, and the server may close them.
    #[arg(long, default_value_t = 0)]
    pub(crate) stalled: usize,
    /// How many of the connections read slowly during the measurement. Otherwise like --stalled.
    #[arg(long, default_value_t = 0)]
    pub(crate) slow: usize,
    /// Bytes per second that each of --slow reads, in slices of 1/20 s.
    #[arg(long, default_value_t = 1024)]
    pub(crate) slow_rate: u32,
    /// The server must close all connections during the run, with close code 1001 or 1012; the run ends when it has.
    /// What one connection has received, all must have received, slow and stalled ones excepted. Anything else is a fault.
    #[arg(long)]
    pub(crate) expect_end: bool,
    /// Losses are reported but are no fault, for servers that drop by design. A closed loop waits for a message at most
    /// 500 ms, and latencies are those of messages that reached all. Duplicates remain faults, and so does another order
    /// where nothing was lost; after a loss the order is only reported, since the loss can make it seem wrong.
    #[arg(long)]
    pub(crate) lossy: bool,
    /// How many handshakes run at once: 100 by default; 16 in idle mode, because a server's memory for many simultaneous
    /// handshakes would be charged to its connections.
    #[arg(long)]
    at_once: Option<usize>,
    /// The server's process id, to measure its CPU and memory.
    #[arg(long)]
    pub(crate) server_pid: Option<u32>,
    /// The core to run on. By default any.
    #[arg(long)]
    pub(crate) cpu: Option<usize>,
    /// Poll without sleeping while a delivery is expected, for a client that has a core for itself: on the loopback a
    /// server pays for waking a client that sleeps, some 2 µs each time.
    #[arg(long)]
    pub(crate) spin: bool,
    /// Print one JSON object on stdout instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// Every message is expected at every connection, or at every member of its sender's group.
    Fanout,
    /// Every message is expected back at its sender.
    Echo,
    /// Nothing is sent: how much memory does a connection take?
    Idle,
}

impl Options {
    /// Parses what would follow `load` on a command line.
    pub(crate) fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, clap::Error> {
        let load = clap::Command::new("load").no_binary_name(true);
        Self::from_arg_matches(&Self::augment_args(load).try_get_matches_from(arguments)?)
    }

    pub(crate) fn check(&self) -> Result<(), LoadError> {
        let positive = |number: f64| number.is_finite() && number > 0.0;
        let has_unwatched = self.stalled + self.slow > 0;
        let too_many_parts = self.sender_count() + self.stalled + self.slow > self.connections;
        let rules = [
            (
                self.connections == 0
                    || self.in_flight == 0
                    || self.senders == Some(0)
                    || self.at_once == Some(0),
                "connections, senders, in-flight and at-once must be at least 1",
            ),
            (
                !positive(self.seconds) || !self.warmup.is_finite() || self.warmup < 0.0,
                "seconds must be above 0, and warmup at least 0",
            ),
            (self.rate.is_some_and(|rate| !positive(rate)), "rate must be above 0"),
            (
                self.slow > 0 && self.slow_rate == 0,
                "slow-rate must be above 0: to read nothing, use --stalled",
            ),
            (
                self.mode == Mode::Idle && self.server_pid.is_none(),
                "idle mode measures the server's memory and needs --server-pid",
            ),
            (
                self.mode != Mode::Fanout && (has_unwatched || self.groups != 1 || self.expect_end),
                "groups, stalled, slow and expect-end need --mode fanout",
            ),
            (
                self.groups == 0 || self.groups > self.connections,
                "there must be at least 1 group, and a connection for each",
            ),
            (self.groups > 1 && !self.url.contains(GROUP), "with --groups the URL must contain {group}"),
            (
                self.slow > 0 && self.url.starts_with("wss:"),
                "slow needs a ws:// URL: a TLS record cannot be read in part",
            ),
            (too_many_parts, "senders, stalled and slow are more than the connections"),
        ];
        match rules.into_iter().find(|(is_broken, _)| *is_broken) {
            Some((_, reason)) => Err(LoadError::Options(reason)),
            None => Ok(()),
        }
    }

    fn sender_count(&self) -> usize {
        let usual = if self.rate.is_some() { OPEN_LOOP_SENDERS } else { self.in_flight };
        let free = self.connections.saturating_sub(self.stalled + self.slow);
        let default = || usual.max(self.groups).min(free).max(1);
        self.senders.map_or_else(default, |senders| senders.min(self.connections))
    }

    pub(crate) fn plan(&self) -> Plan {
        Plan::new(self.connections, self.groups, self.sender_count(), self.stalled, self.slow)
    }

    pub(crate) fn at_once(&self) -> usize {
        self.at_once.unwrap_or(if self.mode == Mode::Idle { 16 } else { 100 })
    }

    pub(crate) fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    pub(crate) fn setup(&self) -> Setup {
        Setup {
            mode: self.mode,
            url: self.url.clone(),
            connections: self.connections,
            senders: self.sender_count(),
            in_flight: self.rate.is_none().then_some(self.in_flight),
            rate: self.rate,
            payload_bytes: self.payload,
            groups: self.groups,
            lossy: self.lossy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_accepted(arguments: &str) -> bool {
        let url = if arguments.contains("--url") { "" } else { "--url=ws://127.0.0.1:1/{group} " };
        let connections = if arguments.contains("--connections") { "" } else { "--connections=12 " };
        let arguments = format!("{url}{connections}{arguments}");
        Options::parse(arguments.split_whitespace().map(str::to_owned)).unwrap().check().is_ok()
    }

    #[test]
    fn options_that_do_not_fit_together_are_refused() {
        for arguments in [
            "--connections=0",
            "--groups=13",
            "--groups=0",
            "--groups=2 --url=ws://127.0.0.1:1/ws",
            "--mode=echo --stalled=1",
            "--mode=echo --groups=2",
            "--mode=echo --expect-end",
            "--mode=idle",
            "--senders=1 --stalled=6 --slow=6",
            "--slow=1 --slow-rate=0",
            "--rate=0",
            "--seconds=0",
        ] {
            assert!(!is_accepted(arguments), "{arguments}");
        }
        for arguments in ["", "--groups=12", "--stalled=5 --slow=6", "--rate=9 --senders=12 --expect-end"] {
            assert!(is_accepted(arguments), "{arguments}");
        }
    }
}
