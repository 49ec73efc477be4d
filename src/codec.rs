//! Codecs: value ↔ payload.
//!
//! A codec is a type without state or owner, named by a hub and its clients. The traits are generic over the message,
//! so that a codec can require what it needs (serde, protobuf, nothing) and a hub only the messages that it uses.
//! Knows values and payloads, and limits how deep and how long a payload makes a decoder work (`codec/bounded.rs`).
//! Does not know frames, sockets, hubs or how long a message may be.

mod bounded;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use shardcast_engine::MessageKind;
use thiserror::Error;

pub use bounded::{DEPTH_MAX, deserialize_bounded};

/// The most elements without bytes, such as those of a `Vec<()>`, that [`BinaryCodec`] reads in one message.
const EMPTY_ELEMENTS_MAX: usize = 1 << 16;

/// Turns a value into the payload of one WebSocket message.
///
/// Implemented by a codec for every message type that it can write. A broadcast encodes its value once, regardless of
/// how many connections it reaches.
///
/// # A codec of your own
///
/// ```
/// use shardcast::{CodecError, Decode, Encode, MessageKind};
///
/// struct Celsius(f32);
///
/// /// Sends numbers as big-endian binary messages.
/// struct Network;
///
/// impl Encode<Celsius> for Network {
///     fn encode(value: &Celsius, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
///         payload.extend_from_slice(&value.0.to_be_bytes());
///         Ok(MessageKind::Binary)
///     }
/// }
///
/// impl Decode<Celsius> for Network {
///     fn decode(kind: MessageKind, payload: &[u8]) -> Result<Celsius, CodecError> {
///         CodecError::require(kind, MessageKind::Binary)?;
///         let bytes = payload.try_into().map_err(CodecError::decode)?;
///         Ok(Celsius(f32::from_be_bytes(bytes)))
///     }
/// }
///
/// let mut payload = Vec::new();
/// let kind = Network::encode(&Celsius(36.6), &mut payload)?;
/// assert_eq!(Network::decode(kind, &payload)?.0, 36.6);
/// assert!(Network::decode(MessageKind::Text, &payload).is_err());
/// # Ok::<(), CodecError>(())
/// ```
///
/// One implementation can cover a whole family of types, as [`JsonCodec`] does for every `Serialize` type:
/// `impl<M: prost::Message + Default> Encode<M> for Protobuf` is as short as the example.
pub trait Encode<T>: Send + Sync + 'static {
    /// Appends the encoded `value` to `payload` and returns the kind of the message.
    ///
    /// The bytes that are already in `payload` must not change: the caller may have reserved a frame header there.
    ///
    /// # Errors
    /// [`CodecError::Encode`] if the value has no representation. The caller discards what was appended before the
    /// error.
    fn encode(value: &T, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError>;
}

/// Turns the payload of one WebSocket message into a value; see [`Encode`] for an example.
///
/// # What a codec of your own must guarantee
/// A payload comes from an untrusted client, and `decode` runs on a shard's thread, or on tokio's in a `HubClient`:
///
/// - It must not recurse without a limit. A stack overflow ends the *process* and cannot be caught; the stack has
///   8 MiB on a shard, and 2 MiB by default on tokio's threads. [`deserialize_bounded`] limits a serde format to [`DEPTH_MAX`] levels; do not rely on the
///   format, which may limit sequences and not enums.
/// - It must not allocate or loop in proportion to a length that the payload only claims.
/// - It must return an error for a payload that it does not understand. A panic is caught and ends the connection
///   (1011), but is logged as a fault of the program.
/// - It must not block: until it returns, the shard's other connections wait.
///
/// The codecs of this crate guarantee all of this for every message type that derives `Deserialize`, except some that
/// serde reads through a buffer.
///
/// # Untagged enums, `flatten` and internal tags
/// With `#[serde(untagged)]`, `#[serde(flatten)]` and `#[serde(tag = "…")]` without `content`, serde first reads a
/// value into its own buffer, and then the message type from the buffer. [`BinaryCodec`] refuses such types. With
/// [`JsonCodec`], and every other codec that uses [`deserialize_bounded`]:
///
/// - The buffer is bounded. It nests at most [`DEPTH_MAX`] levels, including the levels around it, and is allocated as
///   it fills: 32 bytes for each value, which is 16 times the length of a JSON array of digits.
/// - Recursion while reading from the buffer is not counted. It ends with the buffer, and fits the stack, if each
///   step of the type into itself needs a list, a map or a field in the message. It does **not end** in an untagged
///   enum or a flattened struct that contains itself directly, or only through options and newtypes
///   (`Wrap(Box<Self>)`, untagged): one short message overflows the stack and ends the process.
/// - Time is **not bounded** in an untagged enum that contains itself. Its variants are tried in order, with a copy of
///   the rest of the buffer on each level. If two of them contain the enum under the same name, each level doubles the
///   work, and 500 bytes keep a shard busy for days.
///
/// So do not make a message type that contains itself `untagged` or flattened. A recursive enum that is externally
/// tagged (serde's default), adjacently tagged (`tag` and `content`) or internally tagged (`tag`) is bounded: each step
/// is a level of the message, and only the matching variant is tried. Types that do not contain themselves are bounded
/// in every form.
pub trait Decode<T>: Send + Sync + 'static {
    /// Reads a value that fills `payload` exactly. The payload of a text message has been checked to be UTF-8.
    ///
    /// # Errors
    /// [`CodecError::WrongKind`] if the codec does not support messages of this `kind`, [`CodecError::Decode`] or
    /// [`CodecError::TrailingBytes`] if the payload is not exactly one value.
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<T, CodecError>;
}

/// Why a value could not become a payload, or a payload a value.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The message is text but the codec expects binary, or the reverse.
    #[error("expected a {} message", kind_name(*.expected))]
    WrongKind {
        /// The kind that the codec expects.
        expected: MessageKind,
    },
    /// The value has no representation in this codec.
    #[error("the value cannot be encoded")]
    Encode(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The payload does not describe a value.
    #[error("the payload cannot be decoded")]
    Decode(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The payload has more bytes after the value.
    #[error("{count} bytes left over after the value")]
    TrailingBytes {
        /// How many bytes follow the value.
        count: usize,
    },
}

impl CodecError {
    /// A [`CodecError::Encode`] around `cause`; fits `map_err`. A `&str` or `String` is a cause, too.
    pub fn encode(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Encode(cause.into())
    }

    /// A [`CodecError::Decode`] around `cause`; fits `map_err`. A `&str` or `String` is a cause, too.
    pub fn decode(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Decode(cause.into())
    }

    /// Checks the kind of a message, for codecs that support only one.
    ///
    /// # Errors
    /// [`CodecError::WrongKind`] if `kind` is not `expected`.
    pub fn require(kind: MessageKind, expected: MessageKind) -> Result<(), Self> {
        if kind == expected { Ok(()) } else { Err(Self::WrongKind { expected }) }
    }
}

fn kind_name(kind: MessageKind) -> &'static str {
    match kind {
        MessageKind::Text => "text",
        MessageKind::Binary => "binary",
    }
}

/// JSON. Writes text messages; reads text and binary messages, since many clients do not distinguish them. A message
/// may be nested [`DEPTH_MAX`] levels (128) deep; a deeper one is a [`CodecError::Decode`]. A message type that
/// contains itself must not be `untagged` or flattened: see
/// [`Decode`](Decode#untagged-enums-flatten-and-internal-tags).
///
/// ```
/// use shardcast::{Decode, Encode, JsonCodec, MessageKind};
///
/// let mut payload = Vec::new();
/// assert_eq!(JsonCodec::encode(&("answer", 42), &mut payload)?, MessageKind::Text);
/// assert_eq!(payload, br#"["answer",42]"#);
/// let value: (String, u32) = JsonCodec::decode(MessageKind::Text, &payload)?;
/// assert_eq!(value, ("answer".to_owned(), 42));
/// # Ok::<(), shardcast::CodecError>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct JsonCodec;

impl<T: Serialize> Encode<T> for JsonCodec {
    fn encode(value: &T, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        serde_json::to_writer(payload, value).map_err(CodecError::encode)?;
        Ok(MessageKind::Text)
    }
}

impl<T: DeserializeOwned> Decode<T> for JsonCodec {
    fn decode(_: MessageKind, payload: &[u8]) -> Result<T, CodecError> {
        // All of it is checked at once, which is faster than each of its strings. A binary message may fail that check
        // in a part that nobody reads.
        match simdutf8::basic::from_utf8(payload) {
            Ok(text) => decode_json(serde_json::Deserializer::from_str(text)),
            Err(_) => decode_json(serde_json::Deserializer::from_slice(payload)),
        }
    }
}

fn decode_json<'de, R: serde_json::de::Read<'de>, T: DeserializeOwned>(
    mut deserializer: serde_json::Deserializer<R>,
) -> Result<T, CodecError> {
    let value = deserialize_bounded(&mut deserializer)?;
    deserializer.end().map_err(CodecError::decode)?;
    Ok(value)
}

/// [`postcard`], a compact binary format for serde types. Writes and reads binary messages only. Both sides must have
/// the same types, since the format carries no names.
///
/// A message may be nested [`DEPTH_MAX`] levels (128) deep and have at most 65,536 elements that take no bytes (those
/// of a `Vec<()>`): beyond that it is refused with a [`CodecError::Decode`]. A message type with `untagged`, `flatten`
/// or internal tags (`tag` without `content`) is refused in the same way, because the format does not contain the types
/// of its values.
///
/// ```
/// use shardcast::{BinaryCodec, Decode, Encode, MessageKind};
///
/// let mut payload = Vec::new();
/// assert_eq!(BinaryCodec::encode(&("answer", 42_u32), &mut payload)?, MessageKind::Binary);
/// assert_eq!(payload, b"\x06answer\x2a");
/// let value: (String, u32) = BinaryCodec::decode(MessageKind::Binary, &payload)?;
/// assert_eq!(value, ("answer".to_owned(), 42));
/// # Ok::<(), shardcast::CodecError>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct BinaryCodec;

impl<T: Serialize> Encode<T> for BinaryCodec {
    fn encode(value: &T, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        postcard::serialize_with_flavor(value, Append { payload }).map_err(CodecError::encode)?;
        Ok(MessageKind::Binary)
    }
}

impl<T: DeserializeOwned> Decode<T> for BinaryCodec {
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<T, CodecError> {
        CodecError::require(kind, MessageKind::Binary)?;
        let mut deserializer = postcard::Deserializer::from_bytes(payload);
        // Every element that takes bytes takes at least one, so the payload's length bounds their number.
        let elements_max = payload.len().saturating_add(EMPTY_ELEMENTS_MAX);
        let value = bounded::deserialize_counted(&mut deserializer, elements_max)?;
        let rest = deserializer.finalize().map_err(CodecError::decode)?;
        if !rest.is_empty() {
            return Err(CodecError::TrailingBytes { count: rest.len() });
        }
        Ok(value)
    }
}

/// Makes postcard append to a borrowed buffer.
struct Append<'a> {
    payload: &'a mut Vec<u8>,
}

impl postcard::ser_flavors::Flavor for Append<'_> {
    type Output = ();

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.payload.extend_from_slice(bytes);
        Ok(())
    }

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.payload.push(byte);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// No encoding: the payload is the message.
///
/// Supports [`RawMessage`] for both kinds, `String` for text only, and `Vec<u8>` or `Bytes` for binary only.
///
/// ```
/// use shardcast::{Decode, Encode, MessageKind, RawCodec, RawMessage};
///
/// let message: RawMessage = RawCodec::decode(MessageKind::Text, b"hello")?;
/// assert_eq!(message, RawMessage::Text("hello".to_owned()));
///
/// let refused: Result<String, _> = RawCodec::decode(MessageKind::Binary, b"hello");
/// assert!(refused.is_err());
/// # Ok::<(), shardcast::CodecError>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct RawCodec;

/// A message that is not encoded; see [`RawCodec`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RawMessage {
    /// A text message.
    Text(String),
    /// A binary message.
    Binary(Bytes),
}

impl From<String> for RawMessage {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for RawMessage {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<Bytes> for RawMessage {
    fn from(bytes: Bytes) -> Self {
        Self::Binary(bytes)
    }
}

impl From<Vec<u8>> for RawMessage {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Binary(bytes.into())
    }
}

impl Encode<RawMessage> for RawCodec {
    fn encode(value: &RawMessage, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        match value {
            RawMessage::Text(text) => Self::encode(text, payload),
            RawMessage::Binary(bytes) => Self::encode(bytes, payload),
        }
    }
}

impl Decode<RawMessage> for RawCodec {
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<RawMessage, CodecError> {
        match kind {
            MessageKind::Text => Self::decode(kind, payload).map(RawMessage::Text),
            MessageKind::Binary => Self::decode(kind, payload).map(RawMessage::Binary),
        }
    }
}

impl Encode<String> for RawCodec {
    fn encode(value: &String, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        payload.extend_from_slice(value.as_bytes());
        Ok(MessageKind::Text)
    }
}

impl Decode<String> for RawCodec {
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<String, CodecError> {
        CodecError::require(kind, MessageKind::Text)?;
        std::str::from_utf8(payload).map(str::to_owned).map_err(CodecError::decode)
    }
}

impl Encode<Bytes> for RawCodec {
    fn encode(value: &Bytes, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        payload.extend_from_slice(value);
        Ok(MessageKind::Binary)
    }
}

impl Decode<Bytes> for RawCodec {
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<Bytes, CodecError> {
        CodecError::require(kind, MessageKind::Binary)?;
        Ok(Bytes::copy_from_slice(payload))
    }
}

impl Encode<Vec<u8>> for RawCodec {
    fn encode(value: &Vec<u8>, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        payload.extend_from_slice(value);
        Ok(MessageKind::Binary)
    }
}

impl Decode<Vec<u8>> for RawCodec {
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<Vec<u8>, CodecError> {
        CodecError::require(kind, MessageKind::Binary)?;
        Ok(payload.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, fmt::Debug};

    use serde::Deserialize;

    use super::*;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    enum Event {
        Joined { name: String, room: Option<u32> },
        Said(String, Vec<i64>),
        Left,
    }

    fn events() -> [Event; 4] {
        [
            Event::Joined { name: "Zoë \u{1F980} \"quoted\"".to_owned(), room: None },
            Event::Joined { name: String::new(), room: Some(u32::MAX) },
            Event::Said("x".repeat(300), vec![i64::MIN, -1, 0, i64::MAX]),
            Event::Left,
        ]
    }

    fn comes_back<C: Encode<T> + Decode<T>, T: PartialEq + Debug>(value: &T, expected: MessageKind) {
        let mut payload = b"header".to_vec();
        let kind = C::encode(value, &mut payload).unwrap();
        assert_eq!(kind, expected);
        assert_eq!(&payload[..6], b"header", "what was in the buffer stays");
        assert_eq!(&C::decode(kind, &payload[6..]).unwrap(), value);
    }

    #[test]
    fn every_codec_gives_back_what_it_was_given_and_only_appends() {
        for event in events() {
            comes_back::<JsonCodec, _>(&event, MessageKind::Text);
            comes_back::<BinaryCodec, _>(&event, MessageKind::Binary);
        }
        comes_back::<RawCodec, _>(&RawMessage::from("žluťoučký"), MessageKind::Text);
        comes_back::<RawCodec, _>(&RawMessage::from(vec![0xff, 0, 0xfe]), MessageKind::Binary);
        comes_back::<RawCodec, _>(&String::from("text"), MessageKind::Text);
        comes_back::<RawCodec, _>(&Bytes::from_static(b"\xff"), MessageKind::Binary);
        comes_back::<RawCodec, _>(&vec![0xff_u8], MessageKind::Binary);
    }

    #[test]
    fn json_is_read_from_text_and_from_binary_messages() {
        for kind in [MessageKind::Text, MessageKind::Binary] {
            let event: Event = JsonCodec::decode(kind, br#" {"Said":["hi",[1]]} "#).unwrap();
            assert_eq!(event, Event::Said("hi".to_owned(), vec![1]));
        }
    }

    #[test]
    fn json_that_goes_on_after_the_value_is_refused() {
        let refused: Result<Event, _> = JsonCodec::decode(MessageKind::Text, br#""Left" "Left""#);
        assert!(matches!(refused, Err(CodecError::Decode(_))), "{refused:?}");
    }

    #[test]
    fn postcard_refuses_text() {
        let refused: Result<Event, _> = BinaryCodec::decode(MessageKind::Text, &[2]);
        assert!(
            matches!(refused, Err(CodecError::WrongKind { expected: MessageKind::Binary })),
            "{refused:?}"
        );
    }

    #[test]
    fn postcard_refuses_bytes_after_the_value() {
        let refused: Result<Event, _> = BinaryCodec::decode(MessageKind::Binary, &[2, 0, 0]);
        assert!(matches!(refused, Err(CodecError::TrailingBytes { count: 2 })), "{refused:?}");
    }

    #[test]
    fn a_truncated_payload_is_refused_at_every_length() {
        for event in events() {
            let mut payload = Vec::new();
            let kind = BinaryCodec::encode(&event, &mut payload).unwrap();
            for length in 0..payload.len() {
                let refused: Result<Event, _> = BinaryCodec::decode(kind, &payload[..length]);
                assert!(matches!(refused, Err(CodecError::Decode(_))), "{length}: {refused:?}");
            }
        }
    }

    #[test]
    fn a_length_that_lies_allocates_nothing_and_is_refused() {
        let four_gigabytes = [0xff, 0xff, 0xff, 0xff, 0x0f];
        let refused: Result<Vec<u8>, _> = BinaryCodec::decode(MessageKind::Binary, &four_gigabytes);
        assert!(matches!(refused, Err(CodecError::Decode(_))), "{refused:?}");
    }

    #[test]
    fn a_value_without_a_representation_is_an_encode_error() {
        let map = HashMap::from([((1, 2), 3)]);
        let refused = JsonCodec::encode(&map, &mut Vec::new());
        assert!(matches!(refused, Err(CodecError::Encode(_))), "{refused:?}");
    }

    #[test]
    fn raw_text_refuses_binary_and_raw_bytes_refuse_text() {
        let refused: Result<String, _> = RawCodec::decode(MessageKind::Binary, b"x");
        assert!(matches!(refused, Err(CodecError::WrongKind { expected: MessageKind::Text })), "{refused:?}");
        let refused: Result<Bytes, _> = RawCodec::decode(MessageKind::Text, b"x");
        assert!(
            matches!(refused, Err(CodecError::WrongKind { expected: MessageKind::Binary })),
            "{refused:?}"
        );
    }

    #[test]
    fn errors_read_as_one_clause_and_name_their_cause() {
        let wrong_kind = CodecError::require(MessageKind::Text, MessageKind::Binary).unwrap_err();
        assert_eq!(wrong_kind.to_string(), "expected a binary message");
        let error = CodecError::decode("odd length");
        assert_eq!(error.to_string(), "the payload cannot be decoded");
        assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "odd length");
    }
}
