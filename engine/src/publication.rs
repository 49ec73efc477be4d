//! The publication: what is published, as a value.
//!
//! Its address by name, its content, and how slow consumers are treated. Owned and comparable, so that it can
//! be stored, repeated or sent elsewhere. Made by applications, resolved by the publisher. Does not know
//! which connections it addresses, frames on the wire, or its position in the order.

use std::borrow::Cow;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::close_code::{CloseCode, InvalidCloseCode};
use crate::config::ConfigError;
use crate::id::ConnectionId;
use crate::payload::Payload;
use crate::policy::Policy;
use crate::presence::PresenceChange;

/// The connections that a publication addresses.
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// Every connection of the namespace.
    Everyone,
    /// The members of one group. A group without members is not an error: no connection gets the publication.
    Group(Arc<str>),
    /// The members of several groups, each connection once.
    Groups(Arc<[Arc<str>]>),
    /// One connection. If it has disconnected, no connection gets the publication.
    Connection(ConnectionId),
    /// The connections of one user. A user without connections is not an error: no connection gets the publication. A
    /// connection belongs to its user from when it is a member of everyone until its end.
    User(Arc<str>),
    /// The connections of several users, each connection once.
    Users(Arc<[Arc<str>]>),
}

impl Address {
    /// The members of one group.
    pub fn group(name: impl Into<Arc<str>>) -> Self {
        Self::Group(name.into())
    }

    /// The members of several groups, each connection once.
    pub fn groups<N: Into<Arc<str>>>(names: impl IntoIterator<Item = N>) -> Self {
        Self::Groups(names.into_iter().map(Into::into).collect())
    }

    /// The connections of one user.
    pub fn user(name: impl Into<Arc<str>>) -> Self {
        Self::User(name.into())
    }

    /// The connections of several users, each connection once.
    pub fn users<N: Into<Arc<str>>>(names: impl IntoIterator<Item = N>) -> Self {
        Self::Users(names.into_iter().map(Into::into).collect())
    }
}

impl From<&Address> for Address {
    #[inline]
    fn from(address: &Address) -> Self {
        address.clone()
    }
}

impl From<ConnectionId> for Address {
    fn from(id: ConnectionId) -> Self {
        Self::Connection(id)
    }
}

/// How a publication is delivered.
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    #[cfg_attr(feature = "serde", serde(deserialize_with = "serialized::policy"))]
    policy: Option<Policy>,
}

impl Delivery {
    /// Uses this policy instead of the default, which is each connection's own policy for several connections
    /// and [`Policy::Block`] for one.
    ///
    /// # Errors
    /// [`ConfigError`] for the policy's first field that is out of range.
    pub fn with_policy(policy: Policy) -> Result<Self, ConfigError> {
        policy.validate()?;
        Ok(Self { policy: Some(policy) })
    }

    /// The policy that overrides the default.
    pub fn policy(&self) -> Option<Policy> {
        self.policy
    }
}

/// What a publication does to its connections.
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    Message(Payload),
    /// Closes them, at this position in the order.
    Close {
        #[cfg_attr(feature = "serde", serde(deserialize_with = "serialized::close_code"))]
        code: CloseCode,
        text: Cow<'static, str>,
    },
    /// Changes nothing for connections: it gives the change a position in the order. Made by shards only.
    #[cfg_attr(feature = "serde", serde(skip))]
    Presence(Arc<PresenceChange>),
}

impl Content {
    pub(crate) fn payload(&self) -> Option<&Payload> {
        match self {
            Self::Message(payload) => Some(payload),
            Self::Close { .. } | Self::Presence(_) => None,
        }
    }
}

/// A message or a close for the connections of a [`Namespace`](crate::Namespace).
///
/// ```
/// # use shardcast_engine::{Address, Delivery, Payload, Policy, Publication};
/// # use std::time::Duration;
/// let policy = Policy::DropMessage { timeout: Duration::from_millis(100) };
/// let publication = Publication::message(Address::group("lobby"), Payload::text("hello"))
///     .with_delivery(Delivery::with_policy(policy)?);
/// assert_eq!(publication.address(), &Address::group("lobby"));
/// # Ok::<(), shardcast_engine::ConfigError>(())
/// ```
///
/// With the feature `serde` it can be written and read, for instance to be kept or sent to another process. A policy out of
/// range and a close code that may not be sent are errors when it is read.
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    pub(crate) to: Address,
    pub(crate) except: SmallVec<[ConnectionId; 1]>,
    pub(crate) content: Content,
    pub(crate) delivery: Delivery,
}

impl Publication {
    /// A message.
    #[inline]
    pub fn message(to: impl Into<Address>, payload: Payload) -> Self {
        Self::new(to.into(), Content::Message(payload))
    }

    /// Closes these connections, each after what was published to it before, with a Close frame that carries
    /// `code` and at most 123 bytes of `text`.
    ///
    /// # Errors
    /// [`InvalidCloseCode`] for a code that may not be sent in a Close frame, such as 1006.
    pub fn close(
        to: impl Into<Address>,
        code: CloseCode,
        text: impl Into<Cow<'static, str>>,
    ) -> Result<Self, InvalidCloseCode> {
        if !code.is_valid_on_wire() {
            return Err(InvalidCloseCode(code));
        }
        Ok(Self::new(to.into(), Content::Close { code, text: text.into() }))
    }

    /// A change of presence, for the log. Its address is not used.
    pub(crate) fn presence(change: PresenceChange) -> Self {
        Self::new(Address::Everyone, Content::Presence(Arc::new(change)))
    }

    #[inline]
    fn new(to: Address, content: Content) -> Self {
        Self { to, except: SmallVec::new(), content, delivery: Delivery::default() }
    }

    /// Excludes these connections too.
    #[must_use]
    #[inline]
    pub fn except<'a>(mut self, ids: impl IntoIterator<Item = &'a ConnectionId>) -> Self {
        self.except.extend(ids.into_iter().copied());
        self
    }

    /// Sets how it is delivered.
    #[must_use]
    #[inline]
    pub fn with_delivery(self, delivery: Delivery) -> Self {
        Self { delivery, ..self }
    }

    /// The connections that it addresses, before exclusions.
    pub fn address(&self) -> &Address {
        &self.to
    }

    pub(crate) fn is_too_long(&self) -> bool {
        self.payload().is_some_and(|payload| payload.bytes().len() > Payload::BYTES_MAX)
    }

    /// The message; none if it closes connections.
    #[inline]
    pub fn payload(&self) -> Option<&Payload> {
        self.content.payload()
    }
}

/// What is read from outside is checked as what is made here.
#[cfg(feature = "serde")]
mod serialized {
    use serde::de::{Deserialize, Deserializer, Error};

    use super::{CloseCode, InvalidCloseCode, Policy};

    pub(super) fn policy<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Policy>, D::Error> {
        let policy = Option::<Policy>::deserialize(deserializer)?;
        policy.as_ref().map_or(Ok(()), Policy::validate).map_err(D::Error::custom)?;
        Ok(policy)
    }

    pub(super) fn close_code<'de, D: Deserializer<'de>>(deserializer: D) -> Result<CloseCode, D::Error> {
        let code = CloseCode::deserialize(deserializer)?;
        if code.is_valid_on_wire() { Ok(code) } else { Err(D::Error::custom(InvalidCloseCode(code))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_published_can_be_compared_and_repeated() {
        let said = |text| Publication::message(Address::groups(["a", "b"]), Payload::text(text));
        assert_eq!(said("x"), said("x").clone());
        assert_ne!(said("x"), said("y"));
        assert_ne!(said("x"), said("x").except(&[ConnectionId::from_bits(1)]));
    }

    #[test]
    fn a_code_that_may_not_be_sent_closes_no_connection() {
        let refused = Publication::close(Address::Everyone, CloseCode(1006), "");
        assert_eq!(refused, Err(InvalidCloseCode(CloseCode(1006))));
    }
}
