//! The axes: what is varied, through which values, around one base.
//!
//! Alone: everything but the varied number is the base's, and the messages in flight are the same along an axis.

use std::fmt;

use crate::{
    message,
    trial::{Contender, Load},
};

/// What is varied.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Axis {
    /// Connections, all of which get every message.
    Connections,
    /// Shards of the server, each a thread.
    Shards,
    /// Bytes of a message.
    Payload,
    /// Groups that share the connections evenly; a message goes to one.
    Groups,
}

/// What is held while something else is varied.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Base {
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    pub(crate) warmup_seconds: f64,
    pub(crate) connections: usize,
    pub(crate) payload_bytes: usize,
}

const IN_FLIGHT: usize = 64;
/// 64 messages of 64 KiB to 1,000 connections would be 4 GiB on their way: memory would be measured.
const PAYLOADS_IN_FLIGHT: usize = 4;

impl Axis {
    pub(crate) const ALL: [Self; 4] = [Self::Connections, Self::Shards, Self::Payload, Self::Groups];

    /// The values, ascending. A brief run has only what its few connections allow.
    pub(crate) fn values(self, brief: bool) -> Vec<usize> {
        match self {
            Self::Connections if brief => vec![10, 50],
            Self::Connections => vec![10, 100, 1_000, 10_000],
            Self::Shards => vec![1, 2, 4],
            // The least is a message with nothing but its number.
            Self::Payload => vec![message::BYTES_MIN, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10],
            Self::Groups if brief => vec![1, 10, 50],
            Self::Groups => vec![1, 10, 100, 1_000],
        }
    }

    /// The floor has one thread and no groups.
    pub(crate) fn servers(self) -> &'static [Contender] {
        match self {
            Self::Connections | Self::Payload => &[Contender::Floor, Contender::Shardcast],
            Self::Shards | Self::Groups => &[Contender::Shardcast],
        }
    }

    pub(crate) fn shards(self, value: usize) -> usize {
        if self == Self::Shards { value } else { 1 }
    }

    pub(crate) fn in_flight(self) -> usize {
        if self == Self::Payload { PAYLOADS_IN_FLIGHT } else { IN_FLIGHT }
    }

    pub(crate) fn load(self, value: usize, base: &Base) -> Load {
        let held = |axis: Self, held: usize| if self == axis { value } else { held };
        let mut flags = vec![
            ("--mode", "fanout".to_owned()),
            ("--connections", held(Self::Connections, base.connections).to_string()),
            ("--payload", held(Self::Payload, base.payload_bytes).to_string()),
            ("--in-flight", self.in_flight().to_string()),
            ("--seconds", base.seconds.to_string()),
            ("--warmup", base.warmup_seconds.to_string()),
        ];
        if self != Self::Groups {
            return Load { path: "/ws", flags };
        }
        // A sender in every group, or some would have no traffic.
        let senders = value.max(IN_FLIGHT).min(base.connections);
        flags.extend([("--groups", value.to_string()), ("--senders", senders.to_string())]);
        Load { path: "/group/{group}", flags }
    }

    /// What it counts.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Shards => "shards",
            Self::Payload => "bytes of a JSON message",
            Self::Groups => "groups",
        }
    }

    /// The base and what is in flight, in words.
    pub(crate) fn held(self, base: &Base) -> String {
        let mut held = Vec::new();
        if self != Self::Connections {
            held.push(format!("{} connections", base.connections));
        }
        if self != Self::Shards {
            held.push("1 shard".to_owned());
        }
        if self != Self::Payload {
            held.push(format!("{}-byte JSON messages", base.payload_bytes));
        }
        held.push(
            if self == Self::Groups { "a message goes to one group" } else { "everyone gets all" }.to_owned(),
        );
        held.push(format!("{} in flight", self.in_flight()));
        held.join(", ")
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connections => "connections",
            Self::Shards => "shards",
            Self::Payload => "payload",
            Self::Groups => "groups",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(axis: Axis, value: usize) -> Vec<(&'static str, String)> {
        let base =
            Base { rounds: 1, seconds: 1.0, warmup_seconds: 0.5, connections: 1_000, payload_bytes: 64 };
        axis.load(value, &base).flags
    }

    #[test]
    fn only_what_is_varied_differs_along_an_axis() {
        for axis in Axis::ALL {
            let values = axis.values(false);
            let first = flags(axis, values[0]);
            for &value in &values[1..] {
                let differing = first.iter().zip(flags(axis, value)).filter(|(one, other)| *one != other);
                let names: Vec<_> = differing.map(|(_, (name, _))| name).collect();
                let expected: &[&str] = match axis {
                    Axis::Connections => &["--connections"],
                    Axis::Shards => &[],
                    Axis::Payload => &["--payload"],
                    Axis::Groups if value <= IN_FLIGHT => &["--groups"],
                    Axis::Groups => &["--groups", "--senders"],
                };
                assert_eq!(names, expected, "{axis} {value}");
            }
        }
        assert_eq!((Axis::Shards.shards(4), Axis::Groups.shards(4)), (4, 1));
    }
}
