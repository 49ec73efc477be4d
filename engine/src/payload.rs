//! The payload: the bytes of one message to clients.
//!
//! Shared, never copied for a receiver. Stored with the header of its plain frame in front, because most
//! connections use that frame: the publisher makes it once. Does not know its receivers, nor other encodings.

use std::fmt;

use crate::frame::{Frame, MessageKind};

/// The bytes of one message, and whether they are text.
///
/// A clone shares the bytes. The value itself takes 32 bytes.
///
/// ```
/// # use shardcast_engine::{MessageKind, Payload};
/// let payload = Payload::text("hello");
/// assert_eq!((payload.kind(), payload.bytes()), (MessageKind::Text, &b"hello"[..]));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Payload {
    plain: Frame,
}

impl Payload {
    /// The longest payload, in bytes: 4 GiB less the longest frame header. Publishing a longer one is refused.
    pub const BYTES_MAX: usize = Frame::BYTES_MAX - Frame::HEADER_BYTES_MAX;

    /// A text payload. One allocation, one copy.
    #[must_use]
    pub fn text(text: &str) -> Self {
        Frame::text(text).into()
    }

    /// A binary payload. One allocation, one copy.
    #[must_use]
    pub fn binary(bytes: &[u8]) -> Self {
        Frame::binary(bytes).into()
    }

    /// The bytes that `write` appends to the vector that it is given, which starts with room for a frame
    /// header; see [`Frame::build`].
    ///
    /// # Errors
    /// Those of `write`.
    ///
    /// # Panics
    /// If `write` makes the vector shorter than it was.
    pub fn build<E>(
        bytes_hint: usize,
        write: impl FnOnce(&mut Vec<u8>) -> Result<MessageKind, E>,
    ) -> Result<Self, E> {
        Frame::build(bytes_hint, write).map(Self::from)
    }

    /// Whether it is text.
    #[must_use]
    pub fn kind(&self) -> MessageKind {
        self.plain.kind()
    }

    /// The message's bytes. Valid UTF-8 if the kind is text, unless `build` wrote something else.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.plain.payload()
    }

    pub(crate) fn into_plain_frame(self) -> Frame {
        self.plain
    }

    /// The payload in one unmasked frame without extensions.
    #[must_use]
    pub fn plain_frame(&self) -> &Frame {
        &self.plain
    }
}

impl From<Frame> for Payload {
    /// The frame's payload; nothing is copied.
    fn from(plain: Frame) -> Self {
        Self { plain }
    }
}

/// Serialized as `{ "text": "…" }` or `{ "binary": […] }`.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Serialized<'a> {
    Text(std::borrow::Cow<'a, str>),
    Binary(std::borrow::Cow<'a, [u8]>),
}

#[cfg(feature = "serde")]
impl serde::Serialize for Payload {
    /// An error if it was built as text and is not UTF-8.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let serialized = match self.kind() {
            MessageKind::Text => {
                let text = std::str::from_utf8(self.bytes()).map_err(serde::ser::Error::custom)?;
                Serialized::Text(text.into())
            }
            MessageKind::Binary => Serialized::Binary(self.bytes().into()),
        };
        serialized.serialize(serializer)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Payload {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match Serialized::deserialize(deserializer)? {
            Serialized::Text(text) => Self::text(&text),
            Serialized::Binary(bytes) => Self::binary(&bytes),
        })
    }
}

impl fmt::Debug for Payload {
    /// Kind and length only: a payload is the users' business, and can be long.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Payload").field("kind", &self.kind()).field("len", &self.bytes().len()).finish()
    }
}
