//! The identifiers of an engine: connection ids and group keys.
//!
//! Plain numbers, so that hot paths compare and hash words instead of strings. A connection's id encodes its
//! location (shard and slot) and the generation of the slot, so no shared table of ids is needed, and the id
//! of a connection that has disconnected reaches no other one. Knows nothing else.

use std::fmt;
use std::str::FromStr;

/// Identifies one connection of one engine. In practice never reused for another one (the same slot would
/// have to be used 2^28 times).
///
/// Displayed, parsed and, with the feature `serde`, serialized as 16 hexadecimal digits. It is not a secret.
///
/// ```
/// # use shardcast_engine::ConnectionId;
/// let id: ConnectionId = "0010000020000003".parse()?;
/// assert_eq!(id.to_string(), "0010000020000003");
/// # Ok::<(), shardcast_engine::InvalidConnectionId>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(u64);

const SLOT_BITS: u32 = 24;
const GENERATION_BITS: u32 = 28;
/// The number of shards that an id can distinguish.
pub(crate) const SHARDS_MAX: usize = 1 << (64 - SLOT_BITS - GENERATION_BITS);
/// The number of connections that one shard can hold at a time.
pub(crate) const SLOTS_MAX: usize = 1 << SLOT_BITS;

impl ConnectionId {
    /// The id of no connection: it addresses nobody.
    pub const NOBODY: Self = Self(u64::MAX);

    /// `generation` wraps at 2^28.
    pub(crate) fn new(shard: usize, slot: Slot, generation: u64) -> Self {
        debug_assert!(shard < SHARDS_MAX && slot.index() < SLOTS_MAX);
        let generation = generation & ((1 << GENERATION_BITS) - 1);
        Self((shard as u64) << (SLOT_BITS + GENERATION_BITS) | generation << SLOT_BITS | slot.index() as u64)
    }

    /// The index of the shard that owns the connection.
    pub fn shard(self) -> usize {
        (self.0 >> (SLOT_BITS + GENERATION_BITS)) as usize
    }

    #[cfg(test)]
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(crate) fn slot(self) -> Slot {
        Slot((self.0 & ((1 << SLOT_BITS) - 1)) as u32)
    }
}

/// A connection's index in its shard. Another connection in the same slot has another generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(u32);

impl Slot {
    pub(crate) fn new(index: usize) -> Self {
        Self(index as u32)
    }

    #[inline]
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }

    /// A number in [0, 1), far apart for neighbouring slots: the golden ratio spreads them.
    pub(crate) fn spread(self) -> f64 {
        (f64::from(self.0) * 0.618_033_988_749_895).fract()
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnectionId({self})")
    }
}

/// The text is not a connection id. An id has 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a connection id: expected 16 hexadecimal digits")]
pub struct InvalidConnectionId;

impl FromStr for ConnectionId {
    type Err = InvalidConnectionId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 16 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(InvalidConnectionId);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| InvalidConnectionId)
    }
}

/// Serialized as text: JavaScript's numbers cannot hold it.
#[cfg(feature = "serde")]
impl serde::Serialize for ConnectionId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for ConnectionId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'_, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Identifies one group for as long as it has members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct GroupKey(pub(crate) u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_returns_its_parts() {
        let id = ConnectionId::new(SHARDS_MAX - 1, Slot::new(SLOTS_MAX - 1), u64::MAX);
        assert_eq!((id.shard(), id.slot().index()), (SHARDS_MAX - 1, SLOTS_MAX - 1));
        assert_eq!(id.to_string().parse(), Ok(id));
        let slot = Slot::new(7);
        assert_ne!(ConnectionId::new(0, slot, 1), ConnectionId::new(0, slot, 2));
    }

    #[test]
    fn what_is_not_an_id_is_refused() {
        for text in ["", "1", "+00000000000000f", "00000000000000000", "000000000000000g"] {
            assert_eq!(text.parse::<ConnectionId>(), Err(InvalidConnectionId), "{text}");
        }
    }
}
