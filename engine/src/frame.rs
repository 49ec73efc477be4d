//! The frame: the unit on the wire (RFC 6455, section 5.2).
//!
//! In three forms. [`Frame`] is a data message as the server sends it: header and payload in one shared buffer,
//! because server frames are unmasked, so one frame serves every connection of an encoding. [`ControlFrame`] is a ping, pong
//! or close: at most 127 bytes, on the stack, owned by the connection that sends it. [`Header`] is the beginning
//! of a client's frame, and [`FrameError`] a fault of such a frame. Does not know sockets, or earlier frames.

use std::cell::Cell;
use std::fmt;

use bytes::{Buf, Bytes};

use crate::close_code::CloseCode;
use crate::utf8::InvalidUtf8;

const FIN: u8 = 0b1000_0000;
const RESERVED_BITS: u8 = 0b0111_0000;
const OPCODE_BITS: u8 = 0b0000_1111;
const MASKED: u8 = 0b1000_0000;
const LENGTH_BITS: u8 = 0b0111_1111;
/// In the length bits: the length follows in two bytes.
const LENGTH_16: u8 = 126;
/// In the length bits: the length follows in eight bytes.
const LENGTH_64: u8 = 127;

/// The longest payload of a control frame, in bytes.
pub(crate) const CONTROL_PAYLOAD_BYTES_MAX: usize = 125;
/// The longest reason in a Close frame, in bytes: the room after the code.
pub(crate) const CLOSE_REASON_BYTES_MAX: usize = CONTROL_PAYLOAD_BYTES_MAX - 2;
/// The longest header of a server frame, in bytes: it has no mask.
const SERVER_HEADER_BYTES_MAX: usize = 10;
/// The longest frame that is moved into a buffer of its own size when it has been built, in bytes. With spare
/// room it would need a second allocation that records the room, which costs more than a short copy.
const COPIED_BYTES_MAX: usize = 1024;

/// The largest buffer that a thread keeps for the next frame, in bytes.
const KEPT_BYTES_MAX: usize = 4 * COPIED_BYTES_MAX;

thread_local! {
    /// Where short frames are built.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Whether a message is text (valid UTF-8) or plain bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MessageKind {
    /// The payload is UTF-8.
    Text,
    /// The payload is any bytes.
    Binary,
}

/// What a frame is, from the low four bits of its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// The next fragment of an open message.
    Continuation = 0x0,
    /// A text message, or its first fragment.
    Text = 0x1,
    /// A binary message, or its first fragment.
    Binary = 0x2,
    /// Begins or completes the closing handshake.
    Close = 0x8,
    /// Requests a pong.
    Ping = 0x9,
    /// The answer to a ping, or an unsolicited sign of life.
    Pong = 0xA,
}

impl Opcode {
    /// Reads an opcode from its number; `None` for the ten that are reserved and for anything above 15.
    #[must_use]
    pub const fn parse(number: u8) -> Option<Self> {
        Some(match number {
            0x0 => Self::Continuation,
            0x1 => Self::Text,
            0x2 => Self::Binary,
            0x8 => Self::Close,
            0x9 => Self::Ping,
            0xA => Self::Pong,
            _ => return None,
        })
    }

    /// Whether this is a close, ping or pong: never fragmented, at most 125 bytes, allowed between fragments.
    #[must_use]
    pub const fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// A fault of a client's bytes. One variant per cause; each ends the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A client frame without a mask.
    #[error("client frame is not masked")]
    Unmasked,
    /// A reserved bit is set, although no extension gives it a meaning.
    #[error("reserved bits are set")]
    ReservedBits,
    /// An opcode that the protocol does not define (3–7, 11–15).
    #[error("reserved opcode {0}")]
    ReservedOpcode(u8),
    /// A control frame with a fragment bit.
    #[error("control frame is fragmented")]
    FragmentedControl,
    /// A control frame with more than 125 bytes of payload.
    #[error("control frame is longer than 125 bytes")]
    ControlTooLong,
    /// A continuation, although no message is open.
    #[error("continuation without a message to continue")]
    UnexpectedContinuation,
    /// A new message inside a fragmented one.
    #[error("new message before the fragmented one ended")]
    ExpectedContinuation,
    /// A text message or a close reason that is not UTF-8.
    #[error("text is not valid UTF-8")]
    InvalidUtf8,
    /// The message, summed over its fragments, claims more than the limit.
    #[error("message is longer than {limit} bytes")]
    MessageTooBig {
        /// The limit, in bytes of payload.
        limit: usize,
    },
    /// The frame claims more than the limit.
    #[error("frame is longer than {limit} bytes")]
    FrameTooBig {
        /// The limit, in bytes of payload.
        limit: usize,
    },
    /// The message has more fragments than allowed.
    #[error("message has more than {limit} fragments")]
    TooManyFragments {
        /// The limit, in fragments of one message.
        limit: u32,
    },
    /// A close code that must not be sent in a Close frame.
    #[error("invalid close code {0}")]
    InvalidCloseCode(u16),
    /// A Close frame with a payload of one byte: a code has two.
    #[error("close frame of one byte")]
    InvalidClosePayload,
    /// A 64-bit length with its top bit set.
    #[error("frame length exceeds 63 bits")]
    LengthOverflow,
}

impl FrameError {
    /// The code for the Close frame that answers this error.
    ///
    /// 1007 for text that is not UTF-8, 1009 for a message above the size limit, 1008 for too many fragments
    /// (this server's rule, not the protocol's), 1002 for everything else.
    #[must_use]
    pub const fn close_code(&self) -> CloseCode {
        match self {
            Self::InvalidUtf8 => CloseCode::INVALID_PAYLOAD,
            Self::MessageTooBig { .. } | Self::FrameTooBig { .. } => CloseCode::MESSAGE_TOO_BIG,
            Self::TooManyFragments { .. } => CloseCode::POLICY_VIOLATION,
            _ => CloseCode::PROTOCOL_ERROR,
        }
    }
}

impl From<InvalidUtf8> for FrameError {
    fn from(_: InvalidUtf8) -> Self {
        Self::InvalidUtf8
    }
}

/// The header of a client's frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Whether the message ends with this frame.
    pub fin: bool,
    /// The frame's type.
    pub opcode: Opcode,
    /// The key with which its payload is masked; 0 for a frame that is not masked, which changes nothing.
    pub key: [u8; 4],
    /// The number of payload bytes that it claims, at most 2⁶³ − 1. At most 125 for a control frame.
    pub payload_bytes: u64,
    /// The length of the header itself, in bytes (2 to 14).
    pub header_bytes: usize,
}

impl Header {
    /// The longest header of a client frame, in bytes.
    pub const BYTES_MAX: usize = 14;

    /// Reads a header off the front of `bytes`; `None` if more bytes are needed, never with
    /// [`BYTES_MAX`](Self::BYTES_MAX) of them. A frame that is not masked is a fault unless `accept_unmasked`. A length written longer than necessary is accepted.
    ///
    /// # Errors
    /// The faults that this header alone shows, as soon as the bytes that show them have arrived. Of several
    /// faults the reported one does not depend on how many bytes are given: [`FrameError::ReservedOpcode`],
    /// [`Unmasked`](FrameError::Unmasked), [`ReservedBits`](FrameError::ReservedBits),
    /// [`FragmentedControl`](FrameError::FragmentedControl), [`LengthOverflow`](FrameError::LengthOverflow),
    /// [`ControlTooLong`](FrameError::ControlTooLong), in this order.
    pub fn parse(bytes: &[u8], accept_unmasked: bool) -> Result<Option<Self>, FrameError> {
        let Some((&first, rest)) = bytes.split_first() else { return Ok(None) };
        let opcode_number = first & OPCODE_BITS;
        let opcode = Opcode::parse(opcode_number).ok_or(FrameError::ReservedOpcode(opcode_number))?;

        let Some((&second, rest)) = rest.split_first() else { return Ok(None) };
        let is_masked = second & MASKED != 0;
        if !is_masked && !accept_unmasked {
            return Err(FrameError::Unmasked);
        }
        if first & RESERVED_BITS != 0 {
            return Err(FrameError::ReservedBits);
        }
        let fin = first & FIN != 0;
        if opcode.is_control() && !fin {
            return Err(FrameError::FragmentedControl);
        }

        let (payload_bytes, rest) = match second & LENGTH_BITS {
            LENGTH_16 => match rest.split_first_chunk() {
                Some((length, rest)) => (u64::from(u16::from_be_bytes(*length)), rest),
                None => return Ok(None),
            },
            LENGTH_64 => match rest.split_first_chunk() {
                Some((length, rest)) => (u64::from_be_bytes(*length), rest),
                None => return Ok(None),
            },
            length => (u64::from(length), rest),
        };
        if payload_bytes > i64::MAX as u64 {
            return Err(FrameError::LengthOverflow);
        }
        if opcode.is_control() && payload_bytes > CONTROL_PAYLOAD_BYTES_MAX as u64 {
            return Err(FrameError::ControlTooLong);
        }

        let (key, rest) = match rest.split_first_chunk() {
            _ if !is_masked => ([0; 4], rest),
            Some((&key, rest)) => (key, rest),
            None => return Ok(None),
        };
        Ok(Some(Self { fin, opcode, key, payload_bytes, header_bytes: bytes.len() - rest.len() }))
    }
}

/// One complete server frame, header included, ready to be written to any number of sockets.
///
/// The bytes are shared: a clone increments a count and copies nothing. The value itself takes 32 bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    bytes: Bytes,
}

impl Frame {
    /// The longest frame that can be sent, header included, in bytes: outboxes store the end of a frame in 32 bits.
    pub const BYTES_MAX: usize = u32::MAX as usize;
    /// The longest header of a frame to a client, in bytes.
    pub const HEADER_BYTES_MAX: usize = SERVER_HEADER_BYTES_MAX;

    /// A text message. One allocation, one copy.
    #[must_use]
    pub fn text(payload: &str) -> Self {
        Self::copied(MessageKind::Text, payload.as_bytes())
    }

    /// A binary message. One allocation, one copy.
    #[must_use]
    pub fn binary(payload: &[u8]) -> Self {
        Self::copied(MessageKind::Binary, payload)
    }

    /// A message whose payload is written directly into the frame's buffer, or, up to 1 KiB, copied from
    /// there into a buffer of its own size.
    ///
    /// `write` appends the payload to the vector that it is given and returns its kind; it must not change
    /// the bytes that are already there (they become the header). If it returns [`MessageKind::Text`], what
    /// it wrote must be UTF-8: that is not checked, and a client would end the connection.
    /// `payload_bytes_hint` is a guess of the payload's length; a good guess saves the vector from growing.
    ///
    /// # Errors
    /// Those of `write`.
    ///
    /// # Panics
    /// If `write` makes the vector shorter than it was.
    pub fn build<E>(
        payload_bytes_hint: usize,
        write: impl FnOnce(&mut Vec<u8>) -> Result<MessageKind, E>,
    ) -> Result<Self, E> {
        // The header's length depends on the payload's, so room for the longest is kept in front, and the
        // header ends where the payload begins.
        // A thread that ends may still build frames after its buffer has been dropped.
        let mut buffer = BUFFER.try_with(Cell::take).unwrap_or_default();
        buffer.clear();
        buffer.reserve(SERVER_HEADER_BYTES_MAX.saturating_add(payload_bytes_hint));
        buffer.extend_from_slice(&[0; SERVER_HEADER_BYTES_MAX]);
        let kind = write(&mut buffer)?;
        assert!(buffer.len() >= SERVER_HEADER_BYTES_MAX, "`write` may only append to the frame's buffer");

        let (header, header_bytes) = server_header(kind, buffer.len() - SERVER_HEADER_BYTES_MAX);
        let start = SERVER_HEADER_BYTES_MAX - header_bytes;
        buffer[start..SERVER_HEADER_BYTES_MAX].copy_from_slice(&header[..header_bytes]);

        if buffer.len() <= COPIED_BYTES_MAX {
            let bytes = Bytes::copy_from_slice(&buffer[start..]);
            if buffer.capacity() <= KEPT_BYTES_MAX {
                let _ = BUFFER.try_with(|kept| kept.set(buffer));
            }
            return Ok(Self { bytes });
        }
        // Outboxes count a frame by its length; a bad guess must not make it cost more than twice that.
        if buffer.capacity() > 2 * buffer.len() {
            buffer.shrink_to_fit();
        }
        let mut bytes = Bytes::from(buffer);
        bytes.advance(start);
        Ok(Self { bytes })
    }

    /// The bytes of the frame as written to the socket.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of the frame as written to the socket, shared.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.bytes.clone()
    }

    /// The number of bytes written to the socket, header included; at least 2.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a frame has at least a header")]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The message's bytes, without the header.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        let header_bytes = match self.bytes[1] & LENGTH_BITS {
            LENGTH_16 => 4,
            LENGTH_64 => 10,
            _ => 2,
        };
        &self.bytes[header_bytes..]
    }

    /// Whether the message is text or binary.
    #[must_use]
    pub fn kind(&self) -> MessageKind {
        if self.bytes[0] & OPCODE_BITS == Opcode::Text as u8 {
            MessageKind::Text
        } else {
            MessageKind::Binary
        }
    }

    fn copied(kind: MessageKind, payload: &[u8]) -> Self {
        let (header, header_bytes) = server_header(kind, payload.len());
        let mut buffer = Vec::with_capacity(header_bytes + payload.len());
        buffer.extend_from_slice(&header[..header_bytes]);
        buffer.extend_from_slice(payload);
        Self { bytes: buffer.into() }
    }
}

impl From<Frame> for Bytes {
    fn from(frame: Frame) -> Self {
        frame.bytes
    }
}

impl fmt::Debug for Frame {
    /// Kind and length only: a payload is the users' business, and can be long.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame").field("kind", &self.kind()).field("len", &self.len()).finish()
    }
}

/// The shortest header for a whole message of this length, and its length.
fn server_header(kind: MessageKind, payload_bytes: usize) -> ([u8; SERVER_HEADER_BYTES_MAX], usize) {
    let opcode = match kind {
        MessageKind::Text => Opcode::Text,
        MessageKind::Binary => Opcode::Binary,
    };
    let mut header = [0; SERVER_HEADER_BYTES_MAX];
    header[0] = FIN | opcode as u8;
    if payload_bytes < usize::from(LENGTH_16) {
        header[1] = payload_bytes as u8;
        (header, 2)
    } else if let Ok(length) = u16::try_from(payload_bytes) {
        header[1] = LENGTH_16;
        header[2..4].copy_from_slice(&length.to_be_bytes());
        (header, 4)
    } else {
        header[1] = LENGTH_64;
        header[2..10].copy_from_slice(&(payload_bytes as u64).to_be_bytes());
        (header, 10)
    }
}

/// One complete server control frame, header included. At most 127 bytes, on the stack.
#[derive(Clone, Copy)]
pub struct ControlFrame {
    bytes: [u8; 2 + CONTROL_PAYLOAD_BYTES_MAX],
    len: u8,
}

impl ControlFrame {
    /// A ping. Only the first 125 bytes of the payload are used; a control frame has room for no more.
    #[must_use]
    pub fn ping(payload: &[u8]) -> Self {
        Self::new(Opcode::Ping, &[], payload)
    }

    /// The answer to a ping, with that ping's payload. Only the first 125 bytes are used; no ping has more.
    #[must_use]
    pub fn pong(payload: &[u8]) -> Self {
        Self::new(Opcode::Pong, &[], payload)
    }

    /// A close with a code and a reason.
    ///
    /// A reason longer than 123 bytes is cut before the first character that does not fit. A code that may
    /// not be sent ([`CloseCode::is_valid_on_wire`]) gives [`close_empty`](Self::close_empty).
    #[must_use]
    pub fn close(code: CloseCode, reason: &str) -> Self {
        if !code.is_valid_on_wire() {
            return Self::close_empty();
        }
        let mut reason_bytes = reason.len().min(CLOSE_REASON_BYTES_MAX);
        while !reason.is_char_boundary(reason_bytes) {
            reason_bytes -= 1;
        }
        let reason = &reason[..reason_bytes];
        Self::new(Opcode::Close, &code.0.to_be_bytes(), reason.as_bytes())
    }

    /// A close without a code.
    #[must_use]
    pub fn close_empty() -> Self {
        Self::new(Opcode::Close, &[], &[])
    }

    /// The bytes of the frame as written to the socket.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    fn new(opcode: Opcode, front: &[u8], payload: &[u8]) -> Self {
        let payload = &payload[..payload.len().min(CONTROL_PAYLOAD_BYTES_MAX - front.len())];
        let payload_bytes = front.len() + payload.len();
        let mut bytes = [0; 2 + CONTROL_PAYLOAD_BYTES_MAX];
        bytes[0] = FIN | opcode as u8;
        bytes[1] = payload_bytes as u8;
        bytes[2..2 + front.len()].copy_from_slice(front);
        bytes[2 + front.len()..2 + payload_bytes].copy_from_slice(payload);
        Self { bytes, len: 2 + payload_bytes as u8 }
    }
}

impl AsRef<[u8]> for ControlFrame {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl fmt::Debug for ControlFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let opcode = Opcode::parse(self.bytes[0] & OPCODE_BITS);
        f.debug_struct("ControlFrame").field("opcode", &opcode).field("len", &self.len).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn the_header_is_the_shortest_one_for_each_length() {
        for (payload_bytes, header_bytes) in
            [(0, 2), (1, 2), (125, 2), (126, 4), (127, 4), (65_535, 4), (65_536, 10), (200_000, 10)]
        {
            let payload = vec![b'x'; payload_bytes];
            let frame = Frame::binary(&payload);
            assert_eq!(frame.len(), header_bytes + payload_bytes);
            assert_eq!(frame.payload(), payload);
            assert_eq!(frame.kind(), MessageKind::Binary);
        }
    }

    #[test]
    fn building_in_place_gives_the_same_bytes_as_copying() {
        for payload_bytes in [0, 125, 126, 65_535, 65_536] {
            let payload = "y".repeat(payload_bytes);
            for hint in [0, payload_bytes, 1 << 20] {
                let built = Frame::build(hint, |buffer| {
                    buffer.extend_from_slice(payload.as_bytes());
                    Ok::<_, Infallible>(MessageKind::Text)
                });
                assert_eq!(built, Ok(Frame::text(&payload)));
            }
        }
    }

    #[test]
    fn building_returns_the_writers_error() {
        assert_eq!(Frame::build(8, |_| Err("no")), Err("no"));
    }

    #[test]
    fn a_long_payload_stays_where_it_was_written() {
        let mut written_at = std::ptr::null();
        let frame = Frame::build(2000, |buffer| {
            let begin = buffer.len();
            buffer.extend_from_slice(&[7; 2000]);
            written_at = &raw const buffer[begin];
            Ok::<_, Infallible>(MessageKind::Binary)
        });
        assert_eq!(frame.map(|frame| frame.payload().as_ptr()), Ok(written_at));
    }

    #[test]
    fn a_clone_shares_the_bytes() {
        let frame = Frame::text("shared");
        assert_eq!(frame.clone().as_bytes().as_ptr(), frame.as_bytes().as_ptr());
        assert_eq!(frame.bytes().as_ptr(), frame.as_bytes().as_ptr());
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let close = ControlFrame::close(CloseCode::NORMAL, &"é".repeat(100));
        assert_eq!(close.as_bytes().len(), 2 + 2 + 122);
        assert_eq!(close.as_bytes()[1], 124);
        assert!(std::str::from_utf8(&close.as_bytes()[4..]).is_ok());
    }

    #[test]
    fn a_code_that_must_not_be_sent_is_not_sent() {
        assert_eq!(ControlFrame::close(CloseCode(1006), "lost").as_bytes(), [0x88, 0]);
    }

    #[test]
    fn a_control_frame_never_exceeds_127_bytes() {
        assert_eq!(ControlFrame::ping(&[1; 125]).as_bytes().len(), 127);
        assert_eq!(ControlFrame::pong(&[1; 200]).as_bytes().len(), 127);
    }

    #[test]
    fn a_header_is_read_only_when_it_is_complete() {
        let bytes = [0x82, 0xff, 0, 0, 0, 0, 0, 1, 0, 0, 9, 8, 7, 6, 0x55];
        for len in 0..Header::BYTES_MAX {
            assert_eq!(Header::parse(&bytes[..len], false), Ok(None), "{len} bytes");
        }
        let header = Header {
            fin: true,
            opcode: Opcode::Binary,
            key: [9, 8, 7, 6],
            payload_bytes: 65_536,
            header_bytes: 14,
        };
        assert_eq!(Header::parse(&bytes, false), Ok(Some(header)));
    }

    #[test]
    fn a_control_frame_may_claim_125_bytes_and_no_more() {
        let claims = |bytes: &[u8]| {
            Header::parse(bytes, false).map(|header| header.map(|header| header.payload_bytes))
        };
        assert_eq!(claims(&[0x89, 0x80 | 125, 0, 0, 0, 0]), Ok(Some(125)));
        // Written longer than necessary, but no longer than allowed.
        assert_eq!(claims(&[0x89, 0x80 | 126, 0, 125, 0, 0, 0, 0]), Ok(Some(125)));
        assert_eq!(claims(&[0x89, 0x80 | 126, 0, 126]), Err(FrameError::ControlTooLong));
        assert_eq!(claims(&[0x88, 0x80 | 127, 0, 0, 0, 0, 0, 1, 0, 0]), Err(FrameError::ControlTooLong));
    }

    #[test]
    fn each_error_has_the_close_code_of_its_cause() {
        assert_eq!(FrameError::Unmasked.close_code(), CloseCode::PROTOCOL_ERROR);
        assert_eq!(FrameError::InvalidUtf8.close_code(), CloseCode::INVALID_PAYLOAD);
        assert_eq!(FrameError::MessageTooBig { limit: 1 }.close_code(), CloseCode::MESSAGE_TOO_BIG);
        assert_eq!(FrameError::FrameTooBig { limit: 1 }.close_code(), CloseCode::MESSAGE_TOO_BIG);
        assert_eq!(FrameError::TooManyFragments { limit: 1 }.close_code(), CloseCode::POLICY_VIOLATION);
    }
}
