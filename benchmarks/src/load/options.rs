//! The load generator's command line, and what of it goes together.

use std::time::Duration;

use clap::{Args, FromArgMatches};

use super::{LoadError, report::Setup, role::Cast, target::GROUP};

/// Senders of an open loop, unless told otherwise.
const OPEN_LOOP_SENDERS: usize = 64;

/// What the load generator is told.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Where the server is: `ws://127.0.0.1:PORT/ws`, `…/echo` or, with --groups, `…/group/{group}`.
    #[arg(long)]
    pub(crate) url: String,
    #[arg(long, value_enum, default_value_t = Mode::Fanout)]
    pub(crate) mode: Mode,
    /// How many connections to open, all parts together.
    #[arg(long, default_value_t = 1000)]
    pub(crate) connections: usize,
    /// How many of the connections send, spread evenly over all and over the groups. By default as many as are in
    /// flight, in an open loop 64, and at least one for each group.
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
    /// How many of the connections read nothing from the start of the measurement on, not even pings. They send
    /// nothing, nothing is expected of them, and the server may end them.
    #[arg(long, default_value_t = 0)]
    pub(crate) stalled: usize,
    /// How many of the connections read slowly from the start of the measurement on. Otherwise like --stalled.
    #[arg(long, default_value_t = 0)]
    pub(crate) slow: usize,
    /// Bytes a second that each of --slow reads, in slices of 1/20 s.
    #[arg(long, default_value_t = 1024)]
    pub(crate) slow_rate: u32,
    /// How many of the connections end at once and without a word half way through the measurement, every second one
    /// with a reset. Senders are spared.
    #[arg(long)]
    pub(crate) kill: Option<usize>,
    /// Connections a second that leave, in turn by the closing handshake and abruptly, and as many that join in their
    /// places, from the start of the sending to the end of the measurement. Senders stay.
    #[arg(long)]
    pub(crate) churn: Option<f64>,
    /// The server is to end everybody during the run, with close code 1001 or 1012; the run ends when it has. Whatever
    /// one connection has seen, all watched ones must have seen. Anything else is a fault.
    #[arg(long)]
    pub(crate) expect_end: bool,
    /// Losses are told but are no fault, for servers that drop by design. A closed loop waits for a message no longer
    /// than 500 ms, and latencies are those of messages that came to all. Duplicates remain faults, and another order
    /// where nothing was lost; otherwise it is told only, since a loss can make the others' order seem another.
    #[arg(long)]
    pub(crate) lossy: bool,
    /// How many handshakes at once: 100 by default; 16 when idle, where the room that a server once took for many
    /// handshakes would else be charged to its connections.
    #[arg(long)]
    at_once: Option<usize>,
    /// The server's process, to measure its CPU and memory.
    #[arg(long)]
    pub(crate) server_pid: Option<u32>,
    /// The core to run on. By default any.
    #[arg(long)]
    pub(crate) cpu: Option<usize>,
    /// Polls without sleeping while something is expected, for a client with a core of its own: on the loopback a
    /// server pays for waking its client, some 2 µs each time that the client was quick enough to fall asleep.
    #[arg(long)]
    pub(crate) spin: bool,
    /// A line a second on stderr. By default only when stderr is a terminal and the measurement takes more than 5 s.
    #[arg(long)]
    pub(crate) progress: bool,
    /// One JSON object on stdout instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// Every message is expected at every connection, or at every one of its sender's group.
    Fanout,
    /// Every message is expected back at its sender.
    Echo,
    /// Nothing is sent: what does a connection cost in memory?
    Idle,
    /// Everybody connects as fast as the server answers, and leaves, again and again for --seconds.
    Storm,
}

impl Options {
    /// What these words say, as if they stood behind `load`.
    pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Self, clap::Error> {
        let load = clap::Command::new("load").no_binary_name(true);
        Self::from_arg_matches(&Self::augment_args(load).try_get_matches_from(words)?)
    }

    pub(crate) fn check(&self) -> Result<(), LoadError> {
        let refuse = |reason| Err(LoadError::Options(reason));
        let positive = |number: f64| number.is_finite() && number > 0.0;
        let special = self.stalled + self.slow > 0 || self.kill.is_some() || self.churn.is_some();
        if self.connections == 0 || self.in_flight == 0 || self.senders == Some(0) || self.at_once == Some(0)
        {
            return refuse("connections, senders, in-flight and at-once must be at least 1");
        }
        if !positive(self.seconds) || !self.warmup.is_finite() || self.warmup < 0.0 {
            return refuse("seconds must be above 0, and warmup not below");
        }
        if self.rate.is_some_and(|rate| !positive(rate)) || self.churn.is_some_and(|churn| !positive(churn)) {
            return refuse("the rate and the churn must be above 0");
        }
        if self.slow > 0 && self.slow_rate == 0 {
            return refuse("a slow-rate of 0 is stalled: use --stalled");
        }
        if self.mode == Mode::Idle && self.server_pid.is_none() {
            return refuse("idle measures the server's memory and needs --server-pid");
        }
        if self.mode != Mode::Fanout && (special || self.groups != 1 || self.expect_end) {
            return refuse("groups, stalled, slow, kill, churn and expect-end are for --mode fanout");
        }
        if self.groups == 0 || self.groups > self.connections {
            return refuse("there must be at least 1 group, and a connection for each");
        }
        if self.groups > 1 && !self.url.contains(GROUP) {
            return refuse("with --groups the URL must contain {group}");
        }
        if self.expect_end && (self.kill.is_some() || self.churn.is_some()) {
            return refuse(
                "expect-end goes neither with kill nor with churn: each ends connections of its own",
            );
        }
        let plain = self.connections.checked_sub(self.sender_count() + self.stalled + self.slow);
        match plain {
            None => refuse("senders, stalled and slow are more than the connections"),
            Some(plain) if self.kill.is_some_and(|kill| kill > plain) => {
                refuse("kill is more than the connections that neither send nor are slow")
            }
            Some(0) if self.churn.is_some() => {
                refuse("churn needs connections that neither send nor are slow")
            }
            Some(_) => Ok(()),
        }
    }

    fn sender_count(&self) -> usize {
        let usual = if self.rate.is_some() { OPEN_LOOP_SENDERS } else { self.in_flight };
        // One at least has to be left that may come and go.
        let spared = self.stalled + self.slow + self.kill.unwrap_or(0) + usize::from(self.churn.is_some());
        let default = || usual.max(self.groups).min(self.connections.saturating_sub(spared)).max(1);
        self.senders.map_or_else(default, |senders| senders.min(self.connections))
    }

    pub(crate) fn cast(&self) -> Cast {
        Cast::new(self.connections, self.groups, self.sender_count(), self.stalled, self.slow)
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
