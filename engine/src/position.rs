//! Positions: points in the total order of an engine's publications.
//!
//! Plain values, assigned by the log. Does not know what was published.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

/// A point in the order of all publications of one engine: after this number of them.
///
/// Receipts have one, and so do handlers' calls and [`Namespace::join`](crate::Namespace::join). Two positions can
/// be compared if their epochs are equal; otherwise neither precedes the other. Displayed, parsed and, with the
/// feature `serde`, serialized as the epoch in 16 hexadecimal digits, a hyphen and the sequence in decimal digits.
///
/// ```
/// # use shardcast_engine::Position;
/// let position: Position = "00000000000000ab-12".parse()?;
/// assert_eq!((position.epoch, position.sequence), (0xab, 12));
/// assert!(position < Position { sequence: 13, ..position });
/// assert_eq!(position.partial_cmp(&Position { epoch: 1, ..position }), None);
/// # Ok::<(), shardcast_engine::InvalidPosition>(())
/// ```
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    /// Identifies one run of one engine: random at its start.
    pub epoch: u64,
    /// Number of publications before this point, since the engine's start. A message to a single connection
    /// is not counted; its point is between two publications.
    pub sequence: u64,
}

impl PartialOrd for Position {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        (self.epoch == other.epoch).then(|| self.sequence.cmp(&other.sequence))
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}", self.epoch, self.sequence)
    }
}

/// The text is not a position. A position is 16 hexadecimal digits, a hyphen and a decimal number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a position: expected 16 hexadecimal digits, a hyphen and a decimal number")]
pub struct InvalidPosition;

impl FromStr for Position {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (epoch, sequence) = text.split_once('-').ok_or(InvalidPosition)?;
        let is_epoch = epoch.len() == 16 && epoch.bytes().all(|digit| digit.is_ascii_hexdigit());
        if !is_epoch || !sequence.bytes().all(|digit| digit.is_ascii_digit()) {
            return Err(InvalidPosition);
        }
        let epoch = u64::from_str_radix(epoch, 16).map_err(|_| InvalidPosition)?;
        let sequence = sequence.parse().map_err(|_| InvalidPosition)?;
        Ok(Self { epoch, sequence })
    }
}

/// Serialized as text: JavaScript's numbers cannot hold the epoch.
#[cfg(feature = "serde")]
impl serde::Serialize for Position {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Position {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'_, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_position_is_refused() {
        let whole = Position { epoch: u64::MAX, sequence: u64::MAX };
        assert_eq!(whole.to_string().parse(), Ok(whole));
        for text in [
            "",
            "-",
            "00000000000000ab",
            "00000000000000ab-",
            "00000000000000ab-+1",
            "ab-1",
            "00000000000000ab-1x",
        ] {
            assert_eq!(text.parse::<Position>(), Err(InvalidPosition), "{text}");
        }
        let too_much = format!("{:016x}-{}0", 1, u64::MAX);
        assert_eq!(too_much.parse::<Position>(), Err(InvalidPosition));
    }
}
