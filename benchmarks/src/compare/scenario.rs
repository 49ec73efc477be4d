//! The scenarios: what the load generator is told, on which route, and what is looked at afterwards.

use std::fmt;

use super::table::{self, Column};
use crate::trial::Load;

/// One question to a server.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum, serde::Serialize)]
pub(crate) enum Scenario {
    /// What does a broadcast cost when nothing can be joined with it?
    #[value(name = "fanout-1")]
    #[serde(rename = "fanout-1")]
    FanoutOne,
    /// What can be gained when messages come faster than they go out?
    #[value(name = "fanout-64")]
    #[serde(rename = "fanout-64")]
    FanoutMany,
    /// Does it hold for a crowd?
    #[value(name = "fanout-10k")]
    #[serde(rename = "fanout-10k")]
    FanoutCrowd,
    /// How long does a message take at a rate that leaves a server time? Its share of the core says whether it did.
    #[serde(rename = "steady")]
    Steady,
    /// What does a message cost from one socket back to the same?
    #[serde(rename = "echo")]
    Echo,
    /// What does a connection weigh?
    #[serde(rename = "idle")]
    Idle,
}

/// How large, and for how long.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Extent {
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    pub(crate) warmup_seconds: f64,
    pub(crate) payload_bytes: usize,
    pub(crate) connections: usize,
    pub(crate) crowd_connections: usize,
    pub(crate) echo_connections: usize,
    pub(crate) idle_connections: usize,
}

const CROWD_IN_FLIGHT: usize = 4;
const STEADY_PER_SECOND: usize = 100;

impl Scenario {
    pub(crate) const ALL: [Self; 6] =
        [Self::FanoutOne, Self::FanoutMany, Self::FanoutCrowd, Self::Steady, Self::Echo, Self::Idle];

    pub(crate) fn connections(self, extent: &Extent) -> usize {
        match self {
            Self::FanoutOne | Self::FanoutMany | Self::Steady => extent.connections,
            Self::FanoutCrowd => extent.crowd_connections,
            Self::Echo => extent.echo_connections,
            Self::Idle => extent.idle_connections,
        }
    }

    pub(crate) fn load(self, extent: &Extent) -> Load {
        let (path, mode) = match self {
            Self::Echo => ("/echo", "echo"),
            Self::Idle => ("/ws", "idle"),
            Self::FanoutOne | Self::FanoutMany | Self::FanoutCrowd | Self::Steady => ("/ws", "fanout"),
        };
        let mut flags = vec![
            ("--mode", mode.to_owned()),
            ("--connections", self.connections(extent).to_string()),
            ("--seconds", extent.seconds.to_string()),
            ("--warmup", extent.warmup_seconds.to_string()),
            ("--payload", extent.payload_bytes.to_string()),
        ];
        flags.push(match self {
            Self::Steady => ("--rate", STEADY_PER_SECOND.to_string()),
            // As many senders as messages in flight is what the load generator takes for itself.
            Self::FanoutOne | Self::Idle => ("--in-flight", "1".to_owned()),
            Self::FanoutMany => ("--in-flight", "64".to_owned()),
            Self::FanoutCrowd => ("--in-flight", CROWD_IN_FLIGHT.to_string()),
            Self::Echo => ("--in-flight", extent.echo_connections.to_string()),
        });
        Load { path, flags }
    }

    /// Whether all servers are tried together, in turns: where what is to be told apart is less than what the machine does
    /// from one minute to the next. A crowd at each server would be more sockets than a process may have.
    pub(crate) fn is_in_turns(self) -> bool {
        matches!(self, Self::FanoutOne | Self::Steady | Self::Echo)
    }

    /// The columns of its table.
    pub(crate) fn columns(self) -> &'static [Column] {
        match self {
            Self::Idle => &table::MEMORY,
            Self::Steady => &table::LATENCY,
            Self::FanoutOne | Self::FanoutMany | Self::FanoutCrowd | Self::Echo => &table::TRAFFIC,
        }
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FanoutOne => f.write_str("fan-out, 1 in flight"),
            Self::FanoutMany => f.write_str("fan-out, 64 in flight"),
            Self::FanoutCrowd => write!(f, "fan-out to a crowd, {CROWD_IN_FLIGHT} in flight"),
            Self::Steady => write!(f, "steady, {STEADY_PER_SECOND} messages/s"),
            Self::Echo => f.write_str("echo, 1 in flight per connection"),
            Self::Idle => f.write_str("idle memory"),
        }
    }
}
