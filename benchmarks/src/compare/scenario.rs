//! The scenarios: what the load generator is told, and on which route.

use std::fmt;

/// One question to a server.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Scenario {
    /// What does a broadcast cost when nothing can be joined with it?
    #[value(name = "fanout-1")]
    FanoutOne,
    /// What can be gained when messages come faster than they go out?
    #[value(name = "fanout-64")]
    FanoutMany,
    /// What does a message cost from one socket back to the same?
    Echo,
    /// What does a connection weigh?
    Idle,
}

/// How large, and for how long.
#[derive(Debug)]
pub(crate) struct Scale {
    pub(crate) fanout: usize,
    pub(crate) echo: usize,
    pub(crate) idle: usize,
    pub(crate) seconds: f64,
    pub(crate) payload: usize,
}

impl Scenario {
    pub(crate) const ALL: [Self; 4] = [Self::FanoutOne, Self::FanoutMany, Self::Echo, Self::Idle];

    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Echo => "/echo",
            Self::FanoutOne | Self::FanoutMany | Self::Idle => "/ws",
        }
    }

    pub(crate) fn connections(self, scale: &Scale) -> usize {
        match self {
            Self::FanoutOne | Self::FanoutMany => scale.fanout,
            Self::Echo => scale.echo,
            Self::Idle => scale.idle,
        }
    }

    pub(crate) fn in_flight(self, scale: &Scale) -> usize {
        match self {
            Self::FanoutOne | Self::Idle => 1,
            Self::FanoutMany => 64,
            Self::Echo => scale.echo,
        }
    }

    pub(crate) fn arguments(self, scale: &Scale) -> Vec<String> {
        let mode = match self {
            Self::FanoutOne | Self::FanoutMany => "fanout",
            Self::Echo => "echo",
            Self::Idle => "idle",
        };
        [
            ("--mode", mode.to_owned()),
            ("--connections", self.connections(scale).to_string()),
            ("--in-flight", self.in_flight(scale).to_string()),
            ("--seconds", scale.seconds.to_string()),
            ("--payload", scale.payload.to_string()),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FanoutOne => "fan-out, 1 in flight",
            Self::FanoutMany => "fan-out, 64 in flight",
            Self::Echo => "echo, 1 in flight per connection",
            Self::Idle => "idle memory",
        })
    }
}
