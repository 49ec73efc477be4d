//! The scenarios: the load generator's flags, the route, and the columns of the table.

use std::fmt;

use super::column::{self, Column};
use crate::trial::Load;

/// One question to a server.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scenario {
    /// What does a broadcast cost when no other message can be coalesced with it?
    #[value(name = "fanout-1")]
    #[serde(rename = "fanout-1")]
    FanoutOne,
    /// How much does a server gain when messages arrive faster than they are sent?
    #[value(name = "fanout-64")]
    #[serde(rename = "fanout-64")]
    FanoutMany,
    /// How does it do with ten times the connections?
    #[value(name = "fanout-10k")]
    #[serde(rename = "fanout-10k")]
    FanoutLarge,
    /// How late is a message at a rate far below the server's maximum? Its share of the core tells whether it was.
    Steady,
    /// What does a message cost from one socket back to the same?
    Echo,
    /// How much memory does a connection take?
    Idle,
}

/// Sizes and durations of a comparison.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Extent {
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    pub(crate) warmup_seconds: f64,
    pub(crate) payload_bytes: usize,
    pub(crate) connections: usize,
    pub(crate) large_connections: usize,
    pub(crate) echo_connections: usize,
    pub(crate) idle_connections: usize,
}

const LARGE_IN_FLIGHT: usize = 4;
const STEADY_PER_SECOND: usize = 100;

impl Scenario {
    pub(crate) const ALL: [Self; 6] =
        [Self::FanoutOne, Self::FanoutMany, Self::FanoutLarge, Self::Steady, Self::Echo, Self::Idle];

    pub(crate) fn connections(self, extent: &Extent) -> usize {
        match self {
            Self::FanoutOne | Self::FanoutMany | Self::Steady => extent.connections,
            Self::FanoutLarge => extent.large_connections,
            Self::Echo => extent.echo_connections,
            Self::Idle => extent.idle_connections,
        }
    }

    pub(crate) fn load(self, extent: &Extent) -> Load {
        let (path, mode) = match self {
            Self::Echo => ("/echo", "echo"),
            Self::Idle => ("/ws", "idle"),
            Self::FanoutOne | Self::FanoutMany | Self::FanoutLarge | Self::Steady => ("/ws", "fanout"),
        };
        let flags = vec![
            ("--mode", mode.to_owned()),
            ("--connections", self.connections(extent).to_string()),
            ("--seconds", extent.seconds.to_string()),
            ("--warmup", extent.warmup_seconds.to_string()),
            ("--payload", extent.payload_bytes.to_string()),
            match self {
                Self::Steady => ("--rate", STEADY_PER_SECOND.to_string()),
                Self::FanoutOne | Self::Idle => ("--in-flight", "1".to_owned()),
                Self::FanoutMany => ("--in-flight", "64".to_owned()),
                Self::FanoutLarge => ("--in-flight", LARGE_IN_FLIGHT.to_string()),
                Self::Echo => ("--in-flight", extent.echo_connections.to_string()),
            },
        ];
        Load { path, flags }
    }

    /// Whether all servers run at once and take turns: where the differences are smaller than what the machine varies by
    /// from one minute to the next. 10,000 connections to each server would be more sockets than a process may have.
    pub(crate) fn is_in_turns(self) -> bool {
        matches!(self, Self::FanoutOne | Self::Steady | Self::Echo)
    }

    pub(crate) fn columns(self) -> &'static [Column] {
        match self {
            Self::Idle => &column::MEMORY,
            Self::Steady => &column::LATENCY,
            Self::FanoutOne | Self::FanoutMany | Self::FanoutLarge | Self::Echo => &column::TRAFFIC,
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FanoutOne => f.write_str("fan-out, 1 in flight"),
            Self::FanoutMany => f.write_str("fan-out, 64 in flight"),
            Self::FanoutLarge => write!(f, "large fan-out, {LARGE_IN_FLIGHT} in flight"),
            Self::Steady => write!(f, "steady, {STEADY_PER_SECOND} messages/s"),
            Self::Echo => f.write_str("echo, 1 in flight per connection"),
            Self::Idle => f.write_str("idle memory"),
        }
    }
}
