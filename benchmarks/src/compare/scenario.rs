//! The scenarios: the load generator's flags, the route, and the columns of the table.

use std::fmt;

use super::column::{self, Column};
use crate::trial::{Load, Subject};

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
    /// What do messages cost that go to two connections each, when many are in flight?
    #[value(name = "groups-2")]
    #[serde(rename = "groups-2")]
    GroupsOfTwo,
    /// And to twenty?
    #[value(name = "groups-20")]
    #[serde(rename = "groups-20")]
    GroupsOfTwenty,
    /// The first questions again, over TLS.
    #[value(name = "tls-fanout-1")]
    #[serde(rename = "tls-fanout-1")]
    TlsFanoutOne,
    #[value(name = "tls-fanout-64")]
    #[serde(rename = "tls-fanout-64")]
    TlsFanoutMany,
    TlsEcho,
    TlsIdle,
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
    pub(crate) groups: usize,
    pub(crate) tls_connections: usize,
    pub(crate) tls_idle_connections: usize,
}

const LARGE_IN_FLIGHT: usize = 4;
const STEADY_PER_SECOND: usize = 100;
const GROUPS_IN_FLIGHT: usize = 1024;

impl Scenario {
    pub(crate) const ALL: [Self; 12] = [
        Self::FanoutOne,
        Self::FanoutMany,
        Self::FanoutLarge,
        Self::Steady,
        Self::Echo,
        Self::Idle,
        Self::GroupsOfTwo,
        Self::GroupsOfTwenty,
        Self::TlsFanoutOne,
        Self::TlsFanoutMany,
        Self::TlsEcho,
        Self::TlsIdle,
    ];

    pub(crate) fn is_tls(self) -> bool {
        matches!(self, Self::TlsFanoutOne | Self::TlsFanoutMany | Self::TlsEcho | Self::TlsIdle)
    }

    /// The members of each group, where there are groups.
    fn members(self) -> Option<usize> {
        match self {
            Self::GroupsOfTwo => Some(2),
            Self::GroupsOfTwenty => Some(20),
            _ => None,
        }
    }

    /// Whether a server takes part: those of the other libraries have no groups, and over TLS the fastest ones suffice,
    /// and the one that most begin with.
    pub(crate) fn includes(self, server: Subject) -> bool {
        match server {
            Subject::Floor | Subject::Shardcast => true,
            Subject::ShardcastBridge => self.is_tls(),
            Subject::TokioWebsockets | Subject::Fastwebsockets | Subject::Tutorial => {
                self.members().is_none()
            }
            Subject::AxumSignal | Subject::Socketioxide => self.members().is_none() && !self.is_tls(),
        }
    }

    pub(crate) fn connections(self, extent: &Extent) -> usize {
        match self {
            Self::FanoutOne | Self::FanoutMany | Self::Steady => extent.connections,
            Self::FanoutLarge => extent.large_connections,
            Self::Echo => extent.echo_connections,
            Self::Idle => extent.idle_connections,
            Self::GroupsOfTwo => 2 * extent.groups,
            Self::GroupsOfTwenty => 20 * extent.groups,
            Self::TlsFanoutOne | Self::TlsFanoutMany | Self::TlsEcho => extent.tls_connections,
            Self::TlsIdle => extent.tls_idle_connections,
        }
    }

    pub(crate) fn load(self, extent: &Extent) -> Load {
        let (path, mode) = match self {
            Self::Echo | Self::TlsEcho => ("/echo", "echo"),
            Self::Idle | Self::TlsIdle => ("/ws", "idle"),
            Self::GroupsOfTwo | Self::GroupsOfTwenty => ("/group/{group}", "fanout"),
            Self::FanoutOne | Self::FanoutMany | Self::FanoutLarge | Self::Steady => ("/ws", "fanout"),
            Self::TlsFanoutOne | Self::TlsFanoutMany => ("/ws", "fanout"),
        };
        let mut flags = vec![
            ("--mode", mode.to_owned()),
            ("--connections", self.connections(extent).to_string()),
            ("--seconds", extent.seconds.to_string()),
            ("--warmup", extent.warmup_seconds.to_string()),
            ("--payload", extent.payload_bytes.to_string()),
            match self {
                Self::Steady => ("--rate", STEADY_PER_SECOND.to_string()),
                Self::FanoutOne | Self::Idle | Self::TlsFanoutOne | Self::TlsIdle => {
                    ("--in-flight", "1".to_owned())
                }
                Self::FanoutMany | Self::TlsFanoutMany => ("--in-flight", "64".to_owned()),
                Self::FanoutLarge => ("--in-flight", LARGE_IN_FLIGHT.to_string()),
                Self::GroupsOfTwo | Self::GroupsOfTwenty => ("--in-flight", GROUPS_IN_FLIGHT.to_string()),
                Self::Echo | Self::TlsEcho => ("--in-flight", self.connections(extent).to_string()),
            },
        ];
        if self.members().is_some() {
            flags.push(("--groups", extent.groups.to_string()));
        }
        Load { path, flags, is_tls: self.is_tls() }
    }

    /// Whether all servers run at once and take turns: where the differences are smaller than what the machine varies by
    /// from one minute to the next. 10,000 connections to each server would be more sockets than a process may have.
    pub(crate) fn is_in_turns(self) -> bool {
        matches!(
            self,
            Self::FanoutOne
                | Self::Steady
                | Self::Echo
                | Self::GroupsOfTwo
                | Self::TlsFanoutOne
                | Self::TlsFanoutMany
                | Self::TlsEcho
        )
    }

    pub(crate) fn columns(self) -> &'static [Column] {
        match self {
            Self::Idle | Self::TlsIdle => &column::MEMORY,
            Self::Steady => &column::LATENCY,
            _ => &column::TRAFFIC,
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
            Self::GroupsOfTwo => write!(f, "groups of 2, {GROUPS_IN_FLIGHT} in flight"),
            Self::GroupsOfTwenty => write!(f, "groups of 20, {GROUPS_IN_FLIGHT} in flight"),
            Self::TlsFanoutOne => f.write_str("TLS, fan-out, 1 in flight"),
            Self::TlsFanoutMany => f.write_str("TLS, fan-out, 64 in flight"),
            Self::TlsEcho => f.write_str("TLS, echo, 1 in flight per connection"),
            Self::TlsIdle => f.write_str("TLS, idle memory"),
        }
    }
}
