//! Settings, each with its unit, default, range and the consequence of its limit.
//!
//! Read once, when an engine starts or a connection is adopted. Does not know what uses them.

use std::time::Duration;

use crate::id::SHARDS_MAX;
use crate::policy::Policy;
use crate::rate::{Rate, RateLimit, SharedRateLimit};

/// The settings of an engine. All fields have defaults.
///
/// ```
/// # use shardcast_engine::EngineConfig;
/// let config = EngineConfig { shards: Some(2), pin: false, ..EngineConfig::default() };
/// assert!(config.validate().is_ok());
/// ```
///
/// With the feature `serde` it can be read from a file or the environment. Missing fields have their
/// defaults, unknown fields are refused, and durations are text such as `"5ms"`, `"15s"` or `"1h"`; an
/// optional duration is turned off by `"none"`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct EngineConfig {
    /// Number of shards, each one thread: 1 to 4096. Default: none, which means one for each CPU that this
    /// process may use (affinity and container quota considered).
    pub shards: Option<usize>,
    /// Whether each shard is pinned to one of the allowed CPUs. Default: true. With more shards than CPUs,
    /// shards share CPUs; where the system refuses, the shard runs unpinned and logs that. Linux only: on
    /// other systems no shard is pinned.
    ///
    /// A shard is bound to its CPU only while it waits for work, so threads and processes that a handler
    /// starts may use all of the process's CPUs. Engines avoid CPUs that other engines use: each shard holds a
    /// claim, an abstract Unix socket named `shardcast/cpu/NUMBER/CLAIM`, which engines in other processes of
    /// the same network namespace see; where all CPUs are claimed, shards share those with the fewest claims.
    /// A shard restores its own affinity, so change a running process's CPUs by its cpuset, not by `taskset`.
    pub pin: bool,
    /// How long a handler's call may block its shard before a warning with the namespace's name is logged and
    /// the call is counted ([`Metrics::blocked`](crate::Metrics::blocked)): 10 ms to 1 hour, or none for
    /// neither. Default: 100 ms. It is detected up to half as long later, and logged at most once a minute
    /// for the same namespace. Work that takes this long belongs on another thread: the shard's other
    /// connections wait until it is done.
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::blocked_after"))]
    pub blocked_after: Option<Duration>,
    /// Publications that the log holds until every shard has read them: 2 to 1,048,576, rounded up to a power
    /// of two. Default: 4096. At the limit publishers wait for the slowest shard.
    pub log_capacity: usize,
    /// Commands (adoptions, unicasts, joins, leaves, closes) that one shard's mailbox holds: 1 to 1,048,576.
    /// Default: 4096. At the limit their senders wait for the shard. What the shard's own handlers send to it during
    /// their calls does not count, up to 128 commands.
    pub mailbox_capacity: usize,
    /// Publishers that may wait for room in the log, and in each mailbox: 1 to 16,777,216. Default: 65,536.
    /// At the limit a publisher gets the error `Overloaded` instead of waiting.
    pub publishers_waiting_max: usize,
    /// How long a shard may delay its writes to coalesce more frames into each: 0 to 1 s, in effect whole
    /// milliseconds, rounded up. Default: 0, which means that it writes as soon as it has nothing else to do.
    /// Every frame is delayed by at most this time, answers and pongs too; in return, messages that arrive
    /// one at a time share a write.
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::coalesce"))]
    pub coalesce: Duration,
    /// Whether a shard passes what one flush writes to many connections to the kernel in one system call, by
    /// io_uring, instead of one for each connection. Default: false. Needs the feature `io-uring` and Linux. Where the
    /// kernel or the container forbids it, or the feature is missing, the shards write to each connection by itself, and
    /// the engine logs that when it starts. TLS sessions, streams over a bridge and flushes of fewer than 32 connections
    /// are always written by themselves. Costs two file descriptors for each shard, and a small allocation for each
    /// connection.
    pub io_uring: bool,
    /// Bytes that a shard reads at once: 1 KiB to 16 MiB. Default: 65,536. One buffer per shard, not per connection.
    pub read_buffer_bytes: usize,
    /// Bytes of memory that all outboxes together may keep: 1 MiB to 1 TiB. Default: 1 GiB. A frame that is sent
    /// to many connections counts once for each shard. Above the limit the engine ends connections (1013) whose
    /// sockets accept nothing for now, those with the largest backlogs first. If that frees too little, because
    /// they share a long frame or are in the middle of one, their sockets are closed at once. Checked in each
    /// turn of a shard in which a socket accepts nothing more, and whenever the kept memory has grown by 1/64.
    pub backlog_bytes_max: usize,
    /// Bytes of memory for all incoming messages that are incomplete or wait for their handler: 1 MiB to 1
    /// TiB. Default: 1 GiB. Above the limit the connections that hold the most are ended (1013).
    pub unfinished_bytes_max: usize,
    /// Connections from one client address: 1 to 1,073,741,824 and at most `max_connections`, or none.
    /// Default: none. At the limit no more from that address are admitted: `shardcast` answers the upgrade
    /// with 503. IPv6 counts by its first 64 bits, and IPv4 in an IPv6 form (`::ffff:192.0.2.1`) as IPv4.
    /// Clients whose address is not known are not counted, which `shardcast` logs as an error.
    pub max_connections_per_address: Option<usize>,
    /// Upgrades from one client address, counted as for `max_connections_per_address`: a [`Rate`], or none. Default:
    /// none. Above it `shardcast` answers the upgrade with 429 and a `Retry-After`. At most 262,144 addresses that have
    /// recently upgraded are remembered; above that, further ones are not counted.
    pub max_upgrades_per_address: Option<Rate>,
    /// Connections in total: 1 to 1,073,741,824. Default: 1,048,576. At the limit no more are admitted:
    /// `shardcast` answers the upgrade with 503.
    pub max_connections: usize,
    /// Whether free memory of the heap is returned to the system after many connections have opened or ended: some 25
    /// KB that each handshake needed, in HTTP's buffers, which glibc otherwise keeps for the next storm. Default: false,
    /// because it concerns the whole process: `malloc_trim(0)`, on the engine's watchdog, when at least 256 connections
    /// have opened or ended since the last time and none has for 2 s, at most every 10 s. It takes some milliseconds
    /// for 100 MB of free memory; in a program whose heap is large and fragmented more (0.3 s for a gigabyte in pieces of
    /// 9 KB), and meanwhile other threads may wait for the allocator. Linux with glibc's allocator only; elsewhere it has
    /// no effect.
    pub trim_heap: bool,
    #[doc(hidden)]
    #[cfg_attr(feature = "serde", serde(skip))]
    pub __non_exhaustive: (),
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            shards: None,
            pin: true,
            blocked_after: Some(Duration::from_millis(100)),
            log_capacity: 4096,
            mailbox_capacity: 4096,
            publishers_waiting_max: 65_536,
            coalesce: Duration::ZERO,
            io_uring: false,
            read_buffer_bytes: 65_536,
            backlog_bytes_max: 1 << 30,
            unfinished_bytes_max: 1 << 30,
            max_connections_per_address: None,
            max_upgrades_per_address: None,
            max_connections: 1 << 20,
            trim_heap: false,
            __non_exhaustive: (),
        }
    }
}

impl EngineConfig {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`ConfigError`] for the first field that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let shards = self.shards.unwrap_or(1);
        ConfigError::check("shards", shards, 1, SHARDS_MAX)?;
        if let Some(after) = self.blocked_after {
            ConfigError::check("blocked_after", after, Duration::from_millis(10), Duration::from_secs(3600))?;
        }
        ConfigError::check("log_capacity", self.log_capacity, 2, 1 << 20)?;
        ConfigError::check("mailbox_capacity", self.mailbox_capacity, 1, 1 << 20)?;
        ConfigError::check("publishers_waiting_max", self.publishers_waiting_max, 1, 1 << 24)?;
        ConfigError::check("coalesce", self.coalesce, Duration::ZERO, Duration::from_secs(1))?;
        ConfigError::check("read_buffer_bytes", self.read_buffer_bytes, 1024, 16 << 20)?;
        ConfigError::check("backlog_bytes_max", self.backlog_bytes_max, 1 << 20, 1 << 40)?;
        ConfigError::check("unfinished_bytes_max", self.unfinished_bytes_max, 1 << 20, 1 << 40)?;
        ConfigError::check("max_connections", self.max_connections, 1, 1 << 30)?;
        // A limit per address above the total limit would have no effect.
        let per_address = self.max_connections_per_address.unwrap_or(1);
        ConfigError::check("max_connections_per_address", per_address, 1, self.max_connections)?;
        self.max_upgrades_per_address.map_or(Ok(()), |rate| rate.validate())
    }

    /// Checks a connection's settings, also against these: the most that one connection may hold must not
    /// exceed the limit for all.
    ///
    /// # Errors
    /// [`ConfigError`] for the first field that is out of range.
    pub(crate) fn validate_with(&self, connection: &ConnectionConfig) -> Result<(), ConfigError> {
        connection.validate()?;
        ConfigError::check("max_message_bytes", connection.max_message_bytes, 1, self.unfinished_bytes_max)
    }
}

/// The settings of a connection. Connections with the same settings share one value. All fields have
/// defaults, and all can be read with the feature `serde`, as in [`EngineConfig`].
///
/// ```
/// # use shardcast_engine::ConnectionConfig;
/// let config = ConnectionConfig { max_message_bytes: 1 << 20, ..ConnectionConfig::default() };
/// assert!(config.validate().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct ConnectionConfig {
    /// What happens to frames for which the outbox has no room. Default: [`Policy::Block`].
    pub policy: Policy,
    /// Frames that the outbox holds for a slow consumer: 1 to 16,777,216. Default: 1024. Above it the policy decides.
    /// The smallest outbox of all connections so far limits how much a namespace's publishers may have in flight
    /// without waiting for the shards.
    pub outbox_frames: usize,
    /// Bytes that the outbox holds for a slow consumer: 1 KiB to 1 GiB. Default: 1 MiB. Above it the policy
    /// decides. An empty outbox takes one frame of any size.
    pub outbox_bytes: usize,
    /// Frames that may wait for room in the outbox: 0 to 16,777,216. Default: 65,536. At the limit frames
    /// that the policy may drop are dropped at once; under a policy that drops none, the connection is ended
    /// as a slow consumer (1013).
    pub overflow_frames: usize,
    /// Bytes that may wait for room in the outbox: 0 to 16 GiB. Default: 16 MiB. At the limit the same
    /// happens as for `overflow_frames`. One frame of any size may wait if no other waits.
    pub overflow_bytes: usize,
    /// How long a client may take no byte while something waits for it: 10 ms to 1 hour, or none. Default: 10
    /// s. After it the client is disconnected as a slow consumer (1013), whatever it sends and whatever its
    /// handler does. A client that takes one byte in this time makes progress and stays connected. On systems
    /// that do not report what the client has taken (Linux does), room for another write counts as progress.
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::stall_timeout"))]
    pub stall_timeout: Option<Duration>,
    /// Bytes of one incoming message, all its fragments together: 1 to 1 GiB, and at most the engine's
    /// [`unfinished_bytes_max`](EngineConfig::unfinished_bytes_max). Default: 64 KiB. A longer message ends the
    /// connection (1009).
    pub max_message_bytes: usize,
    /// Fragments of one incoming message: 1 to 16,777,216. Default: 1024. More end the connection (1008).
    pub max_fragments: u32,
    /// Bytes of one incoming frame: 1 to 1 GiB. Default: 1 GiB, so that `max_message_bytes` is the limit. A longer frame
    /// ends the connection (1009).
    pub max_frame_bytes: usize,
    /// Whether frames are accepted that are not masked, which RFC 6455 (5.1) forbids to clients: a server of a protocol
    /// of one's own may have clients that cannot mask. Default: false; such a frame ends the connection (1002).
    pub accept_unmasked_frames: bool,
    /// Control frames that a client may send in one second: 1 to 65,535. Default: 200. More end the connection (1008).
    pub control_frames_per_second: u16,
    /// Messages and bytes that a client may send in a time, and what happens above that. Default: no limit.
    pub rate_limit: RateLimit,
    /// Time between two pings: 10 ms to 1 day, or none for no pings. Default: 15 s. A ping is never early and at most
    /// 1/64 of this time late, but no more than 100 ms, or 25 ms if that is more: so those of many connections share a
    /// wake of their shard. Without pings a client that has vanished is noticed only by a timeout or when something is
    /// sent to it, and round trips are not measured.
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::heartbeat_interval"))]
    pub heartbeat_interval: Option<Duration>,
    /// Time within which a ping must be answered, from when it was written: 10 ms to 1 day. Default: 10 s.
    /// After it the client counts as dead (1011). Every whole message, every ping and the ping's pong is an
    /// answer. The time is extended by the same amount, up to 250 times in a row, if meanwhile the client has
    /// taken some of what was written before the ping, or has sent at least 256 bytes of an unfinished message.
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::pong_timeout"))]
    pub pong_timeout: Duration,
    /// Time without a byte from the client, pongs included: 10 ms to 1 year, or none. Default: none. After it
    /// the connection ends (1001). Browsers answer pings whatever their page does. To end clients that send
    /// no messages, see [`message_timeout`](Self::message_timeout).
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::idle_timeout"))]
    pub idle_timeout: Option<Duration>,
    /// Time without a message from the client; pings and pongs do not count: 10 ms to 1 year, or none.
    /// Default: none. After it the connection ends (1001).
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::message_timeout"))]
    pub message_timeout: Option<Duration>,
    /// How long a connection may last: 10 ms to 1 year, or none. Default: none. After it the connection ends
    /// (1012). The time is shortened by up to a tenth, at random, so that clients that connected together do
    /// not reconnect together.
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::max_connection_duration"))]
    pub max_connection_duration: Option<Duration>,
    /// Groups that a connection may be in at a time: 1 to 1,048,576. Default: 10,000. A connection that joins
    /// one more is ended (1008).
    pub max_groups: usize,
    /// Connections that one user may have at a time, and what happens to one more: [`UserLimit`], from 1 to 65,536, or
    /// none. Default: none. Connections without a user are not limited.
    pub max_connections_per_user: Option<UserLimit>,
    /// How long a user whose last connection has left a group (or the namespace) still counts as present: 0 to 1 hour.
    /// Default: 5 s. A user who is back by then was neither announced as having left nor as having joined; 0 announces
    /// at once. The setting of the connection that left last counts. At most 65,536 users in groups are waited for at
    /// the same time on one shard; beyond that, those that have waited longest are announced early.
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::presence_grace"))]
    pub presence_grace: Duration,
    /// Time for the closing handshake, including what remains to be sent: 10 ms to 1 hour. Default: 5 s.
    /// After half of it the messages that still wait are discarded, so that the Close frame gets through;
    /// after all of it the socket is closed.
    #[cfg_attr(feature = "serde", serde(with = "crate::duration_text::close_timeout"))]
    pub close_timeout: Duration,
    #[doc(hidden)]
    #[cfg_attr(feature = "serde", serde(skip))]
    pub __non_exhaustive: (),
}

impl Default for ConnectionConfig {
    fn default() -> Self {
        Self {
            outbox_frames: 1024,
            outbox_bytes: 1 << 20,
            overflow_frames: 65_536,
            overflow_bytes: 16 << 20,
            stall_timeout: Some(Duration::from_secs(10)),
            policy: Policy::Block,
            max_message_bytes: 64 << 10,
            max_fragments: 1024,
            max_frame_bytes: 1 << 30,
            accept_unmasked_frames: false,
            control_frames_per_second: 200,
            rate_limit: RateLimit::default(),
            heartbeat_interval: Some(Duration::from_secs(15)),
            pong_timeout: Duration::from_secs(10),
            idle_timeout: None,
            message_timeout: None,
            max_connection_duration: None,
            max_groups: 10_000,
            max_connections_per_user: None,
            presence_grace: Duration::from_secs(5),
            close_timeout: Duration::from_secs(5),
            __non_exhaustive: (),
        }
    }
}

impl ConnectionConfig {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`ConfigError`] for the first field that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        const SHORTEST: Duration = Duration::from_millis(10);
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        const YEAR: Duration = Duration::from_secs(366 * 24 * 60 * 60); // "1year" is longer than 365 days
        ConfigError::check("outbox_frames", self.outbox_frames, 1, 1 << 24)?;
        ConfigError::check("outbox_bytes", self.outbox_bytes, 1024, 1 << 30)?;
        ConfigError::check("overflow_frames", self.overflow_frames, 0, 1 << 24)?;
        ConfigError::check("overflow_bytes", self.overflow_bytes, 0, 16 << 30)?;
        ConfigError::check("max_message_bytes", self.max_message_bytes, 1, 1 << 30)?;
        ConfigError::check("max_fragments", self.max_fragments, 1, 1 << 24)?;
        ConfigError::check("max_frame_bytes", self.max_frame_bytes, 1, 1 << 30)?;
        ConfigError::check("control_frames_per_second", self.control_frames_per_second, 1, u16::MAX)?;
        self.policy.validate()?;
        self.rate_limit.validate()?;
        if let Some(interval) = self.heartbeat_interval {
            ConfigError::check("heartbeat_interval", interval, SHORTEST, DAY)?;
        }
        ConfigError::check("pong_timeout", self.pong_timeout, SHORTEST, DAY)?;
        if let Some(max) = self.policy.max_rtt() {
            // A longer round trip is a pong timeout, and is never measured.
            ConfigError::check("max_rtt", max, Duration::from_millis(1), self.pong_timeout)?;
        }
        ConfigError::check("close_timeout", self.close_timeout, SHORTEST, Duration::from_secs(3600))?;
        ConfigError::check("max_groups", self.max_groups, 1, 1 << 20)?;
        let per_user = self.max_connections_per_user.map_or(1, UserLimit::max);
        ConfigError::check("max_connections_per_user", per_user, 1, 1 << 16)?;
        ConfigError::check("presence_grace", self.presence_grace, Duration::ZERO, Duration::from_secs(3600))?;
        if let Some(timeout) = self.stall_timeout {
            ConfigError::check("stall_timeout", timeout, SHORTEST, Duration::from_secs(3600))?;
        }
        for (field, timeout) in
            [("idle_timeout", self.idle_timeout), ("message_timeout", self.message_timeout)]
        {
            if let Some(timeout) = timeout {
                ConfigError::check(field, timeout, SHORTEST, YEAR)?;
            }
        }
        if let Some(duration) = self.max_connection_duration {
            ConfigError::check("max_connection_duration", duration, SHORTEST, YEAR)?;
        }
        Ok(())
    }
}

/// How many connections a user may have, and which of them remain at the limit.
///
/// The limit is exact, whichever shards the connections are on, and applies to the connection that arrives: its own
/// setting counts. A connection counts from its adoption until its end is decided.
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum UserLimit {
    /// At most this many connections; one more is refused with
    /// [`AdoptError::TooManyConnectionsOfUser`](crate::AdoptError) (`shardcast` sends a Close frame with 1008). A page
    /// that is reloaded may be refused if its old connection's end has not been noticed yet.
    OldestStays(u32),
    /// At most this many connections; one more is accepted, and the user's oldest connection is closed with
    /// [`CloseReason::Replaced`](crate::CloseReason::Replaced) (1008, which does not invite the client to return). The
    /// oldest is of those that were adopted under this kind of limit.
    NewestWins(u32),
}

impl UserLimit {
    /// The number of connections.
    #[must_use]
    pub fn max(self) -> u32 {
        match self {
            Self::OldestStays(max) | Self::NewestWins(max) => max,
        }
    }
}

impl Policy {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`ConfigError`] for the first field that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        const HOUR: Duration = Duration::from_secs(3600);
        if let Some(timeout) = self.timeout() {
            ConfigError::check("timeout", timeout, Duration::ZERO, HOUR)?;
        }
        match *self {
            Self::DropConnection { max_drops, .. } => ConfigError::check("max_drops", max_drops, 1, u32::MAX),
            Self::DropOnHighRtt { max_rtt, rtt_samples } => {
                ConfigError::check("max_rtt", max_rtt, Duration::from_millis(1), HOUR)?;
                ConfigError::check("rtt_samples", rtt_samples, 1, 1024)
            }
            Self::Block | Self::DropMessage { .. } => Ok(()),
        }
    }
}

impl Rate {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`ConfigError`] for the first field that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        ConfigError::check("period", self.period, Duration::from_millis(1), DAY)?;
        // More than one in a nanosecond could not be counted.
        let nanos = u32::try_from(self.period.as_nanos()).unwrap_or(u32::MAX);
        ConfigError::check("count", self.count, 1, nanos.min(1 << 30))?;
        ConfigError::check("burst", self.burst, 1, 1 << 30)
    }
}

impl RateLimit {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// [`ConfigError`] for the first field that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        [self.messages, self.bytes, self.user_messages, self.user_bytes]
            .iter()
            .flatten()
            .try_for_each(Rate::validate)
    }
}

impl SharedRateLimit {
    /// A limit on the messages and on the bytes of all connections that are given a clone of it. Either may be none.
    ///
    /// ```
    /// # use shardcast_engine::{Rate, SharedRateLimit};
    /// let limit = SharedRateLimit::new(Some(Rate::per_second(20)), None)?;
    /// # Ok::<(), shardcast_engine::ConfigError>(())
    /// ```
    ///
    /// # Errors
    /// [`ConfigError`] for the first field of a rate that is out of range.
    pub fn new(messages: Option<Rate>, bytes: Option<Rate>) -> Result<Self, ConfigError> {
        [messages, bytes].iter().flatten().try_for_each(Rate::validate)?;
        Ok(Self::of(messages, bytes))
    }
}

/// A setting is out of range. Names the field, its value and its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` is {value}, but must be from {lowest} to {highest}")]
pub struct ConfigError {
    /// The field's name.
    pub field: &'static str,
    /// What it was set to.
    pub value: String,
    /// The lowest value allowed.
    pub lowest: String,
    /// The highest value allowed.
    pub highest: String,
}

impl ConfigError {
    /// Checks that a setting is within its range.
    ///
    /// # Errors
    /// If it is not.
    pub fn check<T: PartialOrd + std::fmt::Debug>(
        field: &'static str,
        value: T,
        lowest: T,
        highest: T,
    ) -> Result<(), Self> {
        if value >= lowest && value <= highest {
            return Ok(());
        }
        let show = |value: T| format!("{value:?}");
        Err(Self { field, value: show(value), lowest: show(lowest), highest: show(highest) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_in_range() {
        assert_eq!(EngineConfig::default().validate(), Ok(()));
        assert_eq!(ConnectionConfig::default().validate(), Ok(()));
    }

    #[test]
    fn an_impossible_setting_is_named_with_its_range() {
        let error = EngineConfig { shards: Some(0), ..Default::default() }.validate().unwrap_err();
        assert_eq!(error.to_string(), "`shards` is 0, but must be from 1 to 4096");
        let config = ConnectionConfig { pong_timeout: Duration::ZERO, ..Default::default() };
        assert_eq!(config.validate().unwrap_err().field, "pong_timeout");
        let engine =
            EngineConfig { max_upgrades_per_address: Some(Rate::per_second(0)), ..Default::default() };
        let error = engine.validate().unwrap_err();
        assert_eq!(error.to_string(), "`count` is 0, but must be from 1 to 1000000000");
        let messages = Some(Rate::new(1, Duration::from_secs(60)).with_burst(0));
        let rate_limit = RateLimit { messages, ..RateLimit::default() };
        let user_rate_limit = RateLimit { user_bytes: messages, ..RateLimit::default() };
        assert_eq!(user_rate_limit.validate(), rate_limit.validate());
        let config = ConnectionConfig { rate_limit, ..Default::default() };
        assert_eq!(config.validate().unwrap_err().field, "burst");
        let endless = Rate::new(1, Duration::from_secs(1_000_000));
        assert_eq!(SharedRateLimit::new(None, Some(endless)).unwrap_err().field, "period");
    }
}
