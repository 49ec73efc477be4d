//! Why a broker did not do what it was asked.
//!
//! One type for all backplanes: who uses them only decides whether to try again. Does not know the brokers' own errors
//! beyond their text.

use std::error::Error as StdError;

/// The broker has not done what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The broker cannot be reached, or has not answered in time. A record may have been appended nevertheless.
    #[error("the broker cannot be reached or does not answer: {0}")]
    Unavailable(#[source] Box<dyn StdError + Send + Sync>),
    /// The record is longer than the broker takes.
    #[error(
        "a record of {len} bytes is longer than {max}, which is what the broker takes: publish less at once, or raise its limit"
    )]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The longest record, in bytes.
        max: usize,
    },
    /// The broker refuses it, and would refuse it again.
    #[error("the broker refuses: {0}")]
    Refused(#[source] Box<dyn StdError + Send + Sync>),
    /// A setting is wrong.
    #[error("{0}")]
    Config(String),
}

impl Error {
    /// Whether trying again may help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }

    #[cfg_attr(not(any(feature = "nats", feature = "redis")), allow(dead_code, reason = "for brokers"))]
    pub(crate) fn unavailable(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Unavailable(cause.into())
    }

    #[cfg(any(feature = "nats", feature = "redis"))]
    pub(crate) fn refused(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Refused(cause.into())
    }

    /// An error if the record is too long.
    pub(crate) fn check_length(len: usize, max: usize) -> Result<(), Self> {
        if len > max { Err(Self::TooLong { len, max }) } else { Ok(()) }
    }
}
