//! The name of a node.
//!
//! A value. Does not know which nodes there are.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;

/// Identifies one run of one process: a node that is started again is another one.
///
/// Displayed and parsed as 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

/// A text is not the id of a node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the id of a node has 16 hexadecimal digits")]
pub struct InvalidNodeId;

impl NodeId {
    /// A new id, at random.
    pub fn random() -> Self {
        Self(RandomState::new().hash_one(std::process::id()).max(1)) // 0 means none
    }

    /// The id with this number.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Its number.
    pub const fn to_bits(self) -> u64 {
        self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}

impl FromStr for NodeId {
    type Err = InvalidNodeId;

    fn from_str(text: &str) -> Result<Self, InvalidNodeId> {
        let is_valid = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let bits = is_valid.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        bits.map(Self).ok_or(InvalidNodeId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_is_written() {
        let id = NodeId::from_bits(0xAB);
        assert_eq!(id.to_string(), "00000000000000ab");
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in ["", "ab", "+0000000000000ab", "00000000000000ag", "00000000000000ab0"] {
            assert_eq!(wrong.parse::<NodeId>(), Err(InvalidNodeId), "{wrong}");
        }
        assert_ne!(NodeId::random(), NodeId::random());
    }
}
