//! Messages and control frames, as the application reads and writes them.
//!
//! Plain values under the names that Axum gave them. Text is UTF-8 by its type and shares its bytes. Does not know
//! sockets.

use std::fmt;
use std::ops::Deref;
use std::str::Utf8Error;

use axum::Error;
use bytes::Bytes;
use bytestring::ByteString;

/// What a WebSocket carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A text message.
    Text(Utf8Bytes),
    /// A binary message.
    Binary(Bytes),
    /// A ping of at most 125 bytes; of a longer one only these are sent. Those that arrive have been answered already.
    Ping(Bytes),
    /// A pong of at most 125 bytes; of a longer one only these are sent. One that nobody asked for is a heartbeat in one
    /// direction (RFC 6455, section 5.5.3).
    Pong(Bytes),
    /// A Close frame. One that arrives has been answered, and nothing follows it.
    ///
    /// One that is sent ends the sending: what follows it is an error. The client's messages can be read until it
    /// answers, which it must do within [`close_timeout`](crate::WsHubConfig::close_timeout) (5 s); its answer is the
    /// last thing that is read.
    Close(Option<CloseFrame>),
}

impl Message {
    /// A text message.
    pub fn text(text: impl Into<Utf8Bytes>) -> Self {
        Self::Text(text.into())
    }

    /// A binary message.
    pub fn binary(bytes: impl Into<Bytes>) -> Self {
        Self::Binary(bytes.into())
    }

    /// Its bytes; of a Close frame those of its reason.
    pub fn into_data(self) -> Bytes {
        match self {
            Self::Text(text) => text.into(),
            Self::Binary(bytes) | Self::Ping(bytes) | Self::Pong(bytes) => bytes,
            Self::Close(close) => close.map_or_else(Bytes::new, |close| close.reason.into()),
        }
    }

    /// Its bytes as text; of a Close frame its reason.
    ///
    /// # Errors
    /// Bytes that are not UTF-8.
    pub fn into_text(self) -> Result<Utf8Bytes, Error> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Binary(bytes) | Self::Ping(bytes) | Self::Pong(bytes) => {
                bytes.try_into().map_err(Error::new)
            }
            Self::Close(close) => Ok(close.map_or_else(Utf8Bytes::default, |close| close.reason)),
        }
    }

    /// Its bytes as text; of a Close frame its reason.
    ///
    /// # Errors
    /// Bytes that are not UTF-8.
    pub fn to_text(&self) -> Result<&str, Error> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Binary(bytes) | Self::Ping(bytes) | Self::Pong(bytes) => {
                std::str::from_utf8(bytes).map_err(Error::new)
            }
            Self::Close(close) => Ok(close.as_ref().map_or("", |close| &close.reason)),
        }
    }
}

impl From<String> for Message {
    fn from(text: String) -> Self {
        Self::text(text)
    }
}

impl From<&str> for Message {
    fn from(text: &str) -> Self {
        Self::text(text)
    }
}

impl From<&[u8]> for Message {
    fn from(bytes: &[u8]) -> Self {
        Self::Binary(Bytes::copy_from_slice(bytes))
    }
}

impl From<Bytes> for Message {
    fn from(bytes: Bytes) -> Self {
        Self::Binary(bytes)
    }
}

impl From<Vec<u8>> for Message {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Binary(bytes.into())
    }
}

impl From<Message> for Vec<u8> {
    fn from(message: Message) -> Self {
        message.into_data().into()
    }
}

/// The number in a Close frame: see [`close_code`].
pub type CloseCode = u16;

/// What a Close frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloseFrame {
    /// Why the connection ends. One that must not be sent (1005, 1006, 1015, …) is left out, and the reason with it.
    pub code: CloseCode,
    /// The reason; at most 123 bytes of it are sent.
    pub reason: Utf8Bytes,
}

/// Close codes by name (RFC 6455, section 7.4).
pub mod close_code {
    use super::CloseCode;

    /// The purpose of the connection is fulfilled.
    pub const NORMAL: CloseCode = 1000;
    /// The server shuts down, or the page was left.
    pub const AWAY: CloseCode = 1001;
    /// The other side broke the protocol.
    pub const PROTOCOL: CloseCode = 1002;
    /// A kind of message that is not accepted here.
    pub const UNSUPPORTED: CloseCode = 1003;
    /// The Close frame had no code. Only reported, never sent.
    pub const STATUS: CloseCode = 1005;
    /// There was no Close frame. Only reported, never sent.
    pub const ABNORMAL: CloseCode = 1006;
    /// A payload that contradicts its kind, such as text that is not UTF-8.
    pub const INVALID: CloseCode = 1007;
    /// A rule of this server was broken.
    pub const POLICY: CloseCode = 1008;
    /// A message is too long.
    pub const SIZE: CloseCode = 1009;
    /// The client requires an extension that was not negotiated.
    pub const EXTENSION: CloseCode = 1010;
    /// The server failed.
    pub const ERROR: CloseCode = 1011;
    /// The server restarts.
    pub const RESTART: CloseCode = 1012;
    /// The server is overloaded: try again later.
    pub const AGAIN: CloseCode = 1013;
}

/// Bytes that are UTF-8. A clone shares them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Utf8Bytes(ByteString);

impl Utf8Bytes {
    /// A text that lives as long as the program.
    #[must_use]
    pub const fn from_static(text: &'static str) -> Self {
        Self(ByteString::from_static(text))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Utf8Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

impl fmt::Display for Utf8Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Deref for Utf8Bytes {
    type Target = str;

    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl AsRef<[u8]> for Utf8Bytes {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl From<String> for Utf8Bytes {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl From<&String> for Utf8Bytes {
    fn from(text: &String) -> Self {
        text.as_str().into()
    }
}

impl From<&str> for Utf8Bytes {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl TryFrom<Bytes> for Utf8Bytes {
    type Error = Utf8Error;

    fn try_from(bytes: Bytes) -> Result<Self, Utf8Error> {
        bytes.try_into().map(Self)
    }
}

impl TryFrom<Vec<u8>> for Utf8Bytes {
    type Error = Utf8Error;

    fn try_from(bytes: Vec<u8>) -> Result<Self, Utf8Error> {
        Self::try_from(Bytes::from(bytes))
    }
}

impl From<Utf8Bytes> for Bytes {
    fn from(text: Utf8Bytes) -> Self {
        text.0.into_bytes()
    }
}

impl<T> PartialEq<T> for Utf8Bytes
where
    for<'a> &'a str: PartialEq<T>,
{
    fn eq(&self, other: &T) -> bool {
        self.as_str() == *other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_has_its_bytes_and_its_text() {
        let close = CloseFrame { code: close_code::NORMAL, reason: "bye".into() };
        let messages = [
            (Message::text("abc"), "abc"),
            (Message::binary(vec![b'a']), "a"),
            (Message::Ping(Bytes::from_static(b"p")), "p"),
            (Message::Pong(Bytes::from_static(b"q")), "q"),
            (Message::Close(Some(close)), "bye"),
            (Message::Close(None), ""),
        ];
        for (message, text) in messages {
            assert_eq!(message.to_text().ok(), Some(text));
            assert_eq!(message.clone().into_text().ok().as_deref(), Some(text));
            assert_eq!(message.into_data(), text);
        }
        assert!(Message::binary(vec![0xFF]).to_text().is_err());
        assert!(Message::binary(vec![0xFF]).into_text().is_err());
        assert!(Utf8Bytes::try_from(vec![b'a', 0xFF]).is_err());
    }

    #[test]
    fn a_text_compares_with_every_kind_of_text() {
        let text = Utf8Bytes::from_static("abc");
        assert_eq!(text, "abc");
        assert_eq!(text, "abc".to_owned());
        assert_eq!(text, std::borrow::Cow::from("abc"));
        assert_eq!(format!("{text} {text:?} {:>4}", text), "abc \"abc\"  abc");
    }
}
