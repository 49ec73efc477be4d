//! The decoder: a client's bytes in, its messages out.
//!
//! One per connection, owned by it. It works in place: a frame that is complete in the input is unmasked there
//! and returned as a slice of it, so the common case neither copies nor allocates, and an idle decoder is two
//! words. Only what is incomplete when the input ends is kept, in one box that is freed with the event it was
//! for. The client decides what arrives, so every limit is checked on the claimed length, memory is taken only
//! for what has arrived, and the first error is final. Does not know sockets, time, or what a message means.
//!
//! ```text
//!            header incomplete, payload incomplete, or fragments to come
//!       ┌──────┐ ─────────────────────────────────────────────▶ ┌─────────┐
//!  ────▶│ Idle │                                                │ Partial │
//!       └──────┘ ◀───────────────────────────────────────────── └─────────┘
//!          │      nothing kept any more, and the event given back    │
//!          ├──────────────────────────┬──────────────────────────────┤
//!          ▼ Close handed out         ▼ error                        ▼ either
//!       Closed: takes and discards    Failed: repeats it
//! ```

use std::fmt;
use std::ops::Range;

use crate::close_code::CloseCode;
use crate::frame::{CONTROL_PAYLOAD_BYTES_MAX, FrameError, Header, MessageKind, Opcode};
use crate::mask::unmask;
use crate::utf8::Utf8Checker;

/// The limits of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest message, in bytes of payload summed over its fragments (default 65,536). Checked when a
    /// frame's header claims a length, before any of the payload is kept: [`FrameError::MessageTooBig`].
    pub max_message_bytes: usize,
    /// The most fragments of one message (default 1,024). One more is [`FrameError::TooManyFragments`]. A
    /// message that is not fragmented has none, so 0 forbids fragmentation.
    pub max_fragments: u32,
    /// The longest frame of a message, in bytes of payload (default 1 GiB): [`FrameError::FrameTooBig`].
    pub max_frame_bytes: usize,
    /// Whether frames are accepted that are not masked (default false): [`FrameError::Unmasked`].
    pub accept_unmasked: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message_bytes: 64 * 1024,
            max_fragments: 1024,
            max_frame_bytes: 1 << 30,
            accept_unmasked: false,
        }
    }
}

/// What a client has sent. Borrows the input or the decoder, until the next call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A whole message.
    Message {
        /// Text or binary.
        kind: MessageKind,
        /// Its payload, at most [`Limits::max_message_bytes`] long. Validated UTF-8 if the kind is
        /// [`MessageKind::Text`].
        payload: &'a [u8],
    },
    /// A ping, which must be answered with the same payload (at most 125 bytes).
    Ping(&'a [u8]),
    /// A pong and its payload (at most 125 bytes).
    Pong(&'a [u8]),
    /// The client closes the connection: with a code that is valid on the wire and a reason of at most 123
    /// bytes, or without either. Everything that it sends afterwards is read and discarded.
    Close(Option<(CloseCode, &'a str)>),
}

/// An incremental decoder of masked client frames.
///
/// Takes bytes that are cut anywhere; the same bytes give the same events and the same error however they are cut.
///
/// An idle decoder keeps nothing on the heap. A decoder with something incomplete keeps about 250 bytes and
/// the part of the message that has arrived, in a buffer that grows by doubling but not beyond the limit. One that is
/// finished, by a Close or an error, keeps the 250 bytes until it is dropped.
/// Memory is never taken for a length that was only claimed.
///
/// ```
/// # use shardcast_engine::{Decoder, Event, FrameError, Limits, MessageKind};
/// # fn main() -> Result<(), FrameError> {
/// let mut read = *b"\x81\x85\0\0\0\0hello\x89\x80\0\0\0\0"; // as read from a socket: "hello", then a ping
/// let mut decoder = Decoder::new();
/// let (mut at, mut seen) = (0, Vec::new());
/// while let Some(event) = decoder.decode(&mut read[at..], &mut at, &Limits::default())? {
///     seen.push(match event {
///         Event::Message { kind: MessageKind::Text, payload } => payload.len(),
///         _ => 0,
///     });
/// }
/// assert_eq!((seen, at), (vec![5, 0], 17));
/// # Ok(())
/// # }
/// ```
#[derive(Default)]
pub struct Decoder {
    /// None between frames, outside a message, while nothing is lent. One word, because every connection has one.
    state: Option<Box<State>>,
}

enum State {
    Partial(Partial),
    /// The client has sent Close. RFC 6455, 1.4: what it sends afterwards is discarded.
    Closed,
    Failed(FrameError),
}

/// The state that is kept while something is incomplete.
struct Partial {
    /// The beginning of a header, if the input ended inside it: `header[..header_len]`.
    header: [u8; Header::BYTES_MAX],
    header_len: u8,
    /// The frame whose payload is arriving.
    open: Option<OpenFrame>,
    /// Number of fragments of the open message so far; 0 if no fragmented message is open.
    fragments: u32,
    /// The kind of the message that is being assembled.
    kind: MessageKind,
    utf8: Utf8Checker,
    /// The payload of the message so far, over all its fragments.
    message: Vec<u8>,
    /// The payload of a control frame so far, kept separately because it may arrive between fragments.
    control: [u8; CONTROL_PAYLOAD_BYTES_MAX],
    control_len: u8,
    /// The buffer that the last event borrows, to be freed at the next call.
    lent: Lent,
}

#[derive(Clone, Copy)]
struct OpenFrame {
    header: Header,
    /// Number of bytes of its payload that have arrived.
    arrived: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lent {
    Nothing,
    Message,
    Control,
    Close,
}

/// A complete event, without the borrow.
struct Ready {
    event_kind: EventKind,
    at: Location,
}

#[derive(Clone, Copy)]
enum EventKind {
    Message(MessageKind),
    Ping,
    Pong,
    Close(Option<CloseCode>),
}

enum Location {
    Input(Range<usize>),
    Kept,
}

impl Decoder {
    /// Creates a decoder at the start of a connection, after the handshake.
    #[must_use]
    pub const fn new() -> Self {
        Self { state: None }
    }

    /// Takes bytes off the front of `input` until one event is complete or the input is used up, and adds
    /// their number to `consumed`. `input[0]` is the first byte that no earlier call took.
    ///
    /// `None` means that all of the input was taken and more is needed. The bytes taken are overwritten
    /// (unmasked in place); the decoder never needs them again. After an event, the rest of the input may be
    /// passed to any later call, from this buffer or another.
    ///
    /// The memory of an event is freed at the next call, even if that has nothing new to decode, or by
    /// [`release`](Self::release).
    ///
    /// # Errors
    /// The first fault of the client's bytes, as soon as it can be known: a bad byte in a text is reported
    /// without waiting for the frame's end. The decoder is finished then: each further call returns the same
    /// error and takes nothing. `consumed` has no meaning after an error.
    pub fn decode<'a>(
        &'a mut self,
        input: &'a mut [u8],
        consumed: &mut usize,
        limits: &Limits,
    ) -> Result<Option<Event<'a>>, FrameError> {
        self.release();
        match self.state.as_deref() {
            Some(State::Failed(error)) => return Err(*error),
            Some(State::Closed) => {
                *consumed += input.len();
                return Ok(None);
            }
            None | Some(State::Partial(_)) => {}
        }
        let mut at = 0;
        match self.advance(input, &mut at, limits) {
            Ok(ready) => {
                *consumed += at;
                Ok(ready.map(|ready| self.event(ready, input)))
            }
            Err(error) => {
                self.state = Some(Box::new(State::Failed(error)));
                Err(error)
            }
        }
    }

    /// Frees the memory of the last event. Worth a call when the event has been handled and the next
    /// [`decode`](Self::decode) may be much later, as when reading pauses.
    pub fn release(&mut self) {
        let Some(State::Partial(partial)) = self.state.as_deref_mut() else { return };
        let is_over = match std::mem::replace(&mut partial.lent, Lent::Nothing) {
            Lent::Nothing => false,
            Lent::Message => true,
            Lent::Control => partial.fragments == 0,
            Lent::Close => {
                self.state = Some(Box::new(State::Closed));
                return;
            }
        };
        if is_over {
            self.state = None;
        }
    }

    /// Whether the decoder is between messages with nothing kept; false also after a Close or an error.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        self.state.is_none()
    }

    /// Bytes that the decoder has on the heap for something incomplete. Bounded: about 250, and at most twice what has
    /// arrived of the incomplete message, never more than [`Limits::max_message_bytes`] of it.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        match self.state.as_deref() {
            Some(State::Partial(partial)) => size_of::<State>() + partial.message.capacity(),
            _ => 0,
        }
    }

    /// `decode` without the borrow: headers and payloads, frame by frame, until an event is complete.
    fn advance(
        &mut self,
        input: &mut [u8],
        at: &mut usize,
        limits: &Limits,
    ) -> Result<Option<Ready>, FrameError> {
        loop {
            if !self.has_open_frame() {
                let Some(header) = self.take_header(input, at, limits.accept_unmasked)? else {
                    return Ok(None);
                };
                self.admit(&header, limits)?;
                if let Some(whole) = whole_payload(&header, input.len(), *at) {
                    *at = whole.end;
                    let payload = &mut input[whole.clone()];
                    unmask(payload, header.key, 0);
                    let event_kind = self.conclude_in_place(header.opcode, payload)?;
                    return Ok(Some(Ready { event_kind, at: Location::Input(whole) }));
                }
                self.partial().open_frame(header);
            }
            let partial = self.partial();
            *at += partial.take_payload(&mut input[*at..], limits)?;
            let Some(header) = partial.close_frame() else { return Ok(None) };
            if let Some(event_kind) = partial.conclude(&header)? {
                return Ok(Some(Ready { event_kind, at: Location::Kept }));
            }
        }
    }

    /// Reads the next frame's header, starting with the kept part of it. Keeps it if the input ends inside it.
    fn take_header(
        &mut self,
        input: &[u8],
        at: &mut usize,
        accept_unmasked: bool,
    ) -> Result<Option<Header>, FrameError> {
        let rest = &input[*at..];
        let kept = match self.state.as_deref() {
            Some(State::Partial(partial)) => usize::from(partial.header_len),
            _ => 0,
        };
        if kept == 0 {
            if let Some(header) = Header::parse(rest, accept_unmasked)? {
                *at += header.header_bytes;
                return Ok(Some(header));
            }
            if rest.is_empty() {
                return Ok(None);
            }
        }
        // Copied as if all of it were header; the surplus is overwritten by the next one.
        let partial = self.partial();
        let copied = rest.len().min(Header::BYTES_MAX - kept);
        partial.header[kept..kept + copied].copy_from_slice(&rest[..copied]);
        let header = Header::parse(&partial.header[..kept + copied], accept_unmasked)?;
        if let Some(header) = header {
            *at += header.header_bytes - kept;
            partial.header_len = 0;
        } else {
            *at += copied;
            partial.header_len = (kept + copied) as u8;
        }
        Ok(header)
    }

    /// Checks a header against the frames before it and against the limits.
    fn admit(&self, header: &Header, limits: &Limits) -> Result<(), FrameError> {
        if header.opcode.is_control() {
            return Ok(());
        }
        let (fragments, arrived) = match self.state.as_deref() {
            Some(State::Partial(partial)) => (partial.fragments, partial.message.len()),
            _ => (0, 0),
        };
        match (header.opcode, fragments) {
            (Opcode::Continuation, 0) => return Err(FrameError::UnexpectedContinuation),
            (Opcode::Continuation, _) | (_, 0) => {}
            _ => return Err(FrameError::ExpectedContinuation),
        }
        let is_fragment = fragments > 0 || !header.fin;
        if is_fragment && fragments >= limits.max_fragments {
            return Err(FrameError::TooManyFragments { limit: limits.max_fragments });
        }
        let room = limits.max_message_bytes.saturating_sub(arrived);
        if header.payload_bytes > room as u64 {
            return Err(FrameError::MessageTooBig { limit: limits.max_message_bytes });
        }
        if header.payload_bytes > limits.max_frame_bytes as u64 {
            return Err(FrameError::FrameTooBig { limit: limits.max_frame_bytes });
        }
        Ok(())
    }

    /// Checks a whole, unmasked payload in the input, and returns its kind of event.
    fn conclude_in_place(&mut self, opcode: Opcode, payload: &[u8]) -> Result<EventKind, FrameError> {
        let event_kind = match opcode {
            Opcode::Text => {
                if simdutf8::basic::from_utf8(payload).is_err() {
                    return Err(FrameError::InvalidUtf8);
                }
                EventKind::Message(MessageKind::Text)
            }
            Opcode::Binary | Opcode::Continuation => EventKind::Message(MessageKind::Binary),
            Opcode::Ping => EventKind::Ping,
            Opcode::Pong => EventKind::Pong,
            Opcode::Close => EventKind::Close(close_code_of(payload)?),
        };
        if let EventKind::Close(_) = event_kind {
            self.state = Some(Box::new(State::Closed));
        } else if matches!(self.state.as_deref(), Some(State::Partial(partial)) if partial.fragments == 0) {
            // Only this frame's header had been kept.
            self.state = None;
        }
        Ok(event_kind)
    }

    fn event<'a>(&'a self, ready: Ready, input: &'a [u8]) -> Event<'a> {
        let payload = match (ready.at, self.state.as_deref()) {
            (Location::Input(range), _) => &input[range],
            (Location::Kept, Some(State::Partial(partial))) => partial.lent_bytes(),
            (Location::Kept, _) => unreachable!("an event that was kept is kept in a partial"),
        };
        match ready.event_kind {
            EventKind::Message(kind) => Event::Message { kind, payload },
            EventKind::Ping => Event::Ping(payload),
            EventKind::Pong => Event::Pong(payload),
            EventKind::Close(None) => Event::Close(None),
            // Checked by `close_code_of`; at most 123 bytes are checked a second time.
            EventKind::Close(Some(code)) => {
                Event::Close(Some((code, std::str::from_utf8(&payload[2..]).unwrap_or_default())))
            }
        }
    }

    fn has_open_frame(&self) -> bool {
        matches!(self.state.as_deref(), Some(State::Partial(partial)) if partial.open.is_some())
    }

    /// The partial state; makes it if there is none.
    fn partial(&mut self) -> &mut Partial {
        if !matches!(self.state.as_deref(), Some(State::Partial(_))) {
            self.state = Some(Box::new(State::Partial(Partial::new())));
        }
        match self.state.as_deref_mut() {
            Some(State::Partial(partial)) => partial,
            _ => unreachable!("it was made above"),
        }
    }
}

impl fmt::Debug for Decoder {
    /// The state only: what a client sends does not belong in the log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Decoder");
        match self.state.as_deref() {
            None => out.field("state", &"idle"),
            Some(State::Partial(partial)) => {
                out.field("state", &"partial").field("message_bytes", &partial.message.len())
            }
            Some(State::Closed) => out.field("state", &"closed"),
            Some(State::Failed(error)) => out.field("state", error),
        }
        .finish()
    }
}

impl Partial {
    const fn new() -> Self {
        Self {
            header: [0; Header::BYTES_MAX],
            header_len: 0,
            open: None,
            fragments: 0,
            kind: MessageKind::Binary,
            utf8: Utf8Checker::new(),
            message: Vec::new(),
            control: [0; CONTROL_PAYLOAD_BYTES_MAX],
            control_len: 0,
            lent: Lent::Nothing,
        }
    }

    /// Begins an accepted frame whose payload cannot be returned as a slice of the input.
    fn open_frame(&mut self, header: Header) {
        match header.opcode {
            Opcode::Text => self.kind = MessageKind::Text,
            Opcode::Binary => self.kind = MessageKind::Binary,
            Opcode::Continuation => {}
            Opcode::Close | Opcode::Ping | Opcode::Pong => self.control_len = 0,
        }
        let is_fragment = !header.opcode.is_control() && (self.fragments > 0 || !header.fin);
        self.fragments += u32::from(is_fragment);
        self.open = Some(OpenFrame { header, arrived: 0 });
    }

    /// Takes the available part of the open frame's payload, and returns its length.
    fn take_payload(&mut self, input: &mut [u8], limits: &Limits) -> Result<usize, FrameError> {
        let Some(OpenFrame { header, arrived }) = self.open else { return Ok(0) };
        // Accepted frames fit into the limit, which is a `usize`.
        let missing = header.payload_bytes as usize - arrived;
        let taken = missing.min(input.len());
        let piece = &mut input[..taken];
        unmask(piece, header.key, arrived);

        if header.opcode.is_control() {
            let begin = usize::from(self.control_len);
            self.control[begin..begin + taken].copy_from_slice(piece);
            self.control_len += taken as u8;
        } else {
            if self.kind == MessageKind::Text {
                self.utf8.feed(piece)?;
            }
            let message_bytes_max =
                if header.fin { self.message.len() + missing } else { limits.max_message_bytes };
            self.keep(piece, message_bytes_max);
        }
        self.open = Some(OpenFrame { header, arrived: arrived + taken });
        Ok(taken)
    }

    /// Ends the open frame if all of its payload has arrived, and returns its header.
    fn close_frame(&mut self) -> Option<Header> {
        let complete = self.open.take_if(|open| open.arrived as u64 == open.header.payload_bytes)?;
        Some(complete.header)
    }

    /// The event that a complete frame ends, if it ends one. Notes which buffer the event borrows.
    fn conclude(&mut self, header: &Header) -> Result<Option<EventKind>, FrameError> {
        let (event_kind, lent) = match header.opcode {
            Opcode::Ping => (EventKind::Ping, Lent::Control),
            Opcode::Pong => (EventKind::Pong, Lent::Control),
            Opcode::Close => (EventKind::Close(close_code_of(self.control_bytes())?), Lent::Close),
            Opcode::Text | Opcode::Binary | Opcode::Continuation => {
                if !header.fin {
                    return Ok(None);
                }
                if self.kind == MessageKind::Text {
                    self.utf8.finish()?;
                }
                (EventKind::Message(self.kind), Lent::Message)
            }
        };
        self.lent = lent;
        Ok(Some(event_kind))
    }

    fn lent_bytes(&self) -> &[u8] {
        if self.lent == Lent::Message { &self.message } else { self.control_bytes() }
    }

    fn control_bytes(&self) -> &[u8] {
        &self.control[..usize::from(self.control_len)]
    }

    /// Appends to the message. Grows by doubling, so that a message in small pieces is copied O(1) times, but
    /// not beyond the length that the message may still reach.
    fn keep(&mut self, piece: &[u8], message_bytes_max: usize) {
        let needed = self.message.len() + piece.len();
        if needed > self.message.capacity() {
            let capacity = (self.message.capacity() * 2).min(message_bytes_max).max(needed);
            self.message.reserve_exact(capacity - self.message.len());
        }
        self.message.extend_from_slice(piece);
    }
}

/// The range of the payload in the input, if all of it is there and it can be returned by itself.
fn whole_payload(header: &Header, input_bytes: usize, at: usize) -> Option<Range<usize>> {
    let is_single = header.opcode.is_control() || (header.fin && header.opcode != Opcode::Continuation);
    let payload_bytes = usize::try_from(header.payload_bytes).ok()?;
    (is_single && payload_bytes <= input_bytes - at).then(|| at..at + payload_bytes)
}

/// Checks the payload of a Close frame; returns its code if it has one.
fn close_code_of(payload: &[u8]) -> Result<Option<CloseCode>, FrameError> {
    let Some((&code, reason)) = payload.split_first_chunk() else {
        return if payload.is_empty() { Ok(None) } else { Err(FrameError::InvalidClosePayload) };
    };
    // The reason before the code, as in tungstenite: of two faults both implementations report the same one.
    if std::str::from_utf8(reason).is_err() {
        return Err(FrameError::InvalidUtf8);
    }
    let code = CloseCode(u16::from_be_bytes(code));
    if code.is_valid_on_wire() { Ok(Some(code)) } else { Err(FrameError::InvalidCloseCode(code.0)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 4] = [0x11, 0x22, 0x33, 0x44];
    const FIN: u8 = 0x80;
    const LIMITS: Limits = Limits {
        max_message_bytes: 64 * 1024,
        max_fragments: 4,
        max_frame_bytes: 1 << 30,
        accept_unmasked: false,
    };

    /// A masked frame; `claimed` replaces the payload's own length in tests of claims.
    fn frame(first: u8, payload: &[u8], claimed: Option<u64>) -> Vec<u8> {
        let mut bytes = vec![first];
        match claimed.unwrap_or(payload.len() as u64) {
            length @ 0..126 => bytes.push(0x80 | length as u8),
            length => {
                bytes.push(0x80 | 127);
                bytes.extend(length.to_be_bytes());
            }
        }
        bytes.extend(KEY);
        bytes.extend(payload.iter().zip(KEY.iter().cycle()).map(|(byte, key)| byte ^ key));
        bytes
    }

    /// Feeds everything; returns the last event or error, without the borrow.
    fn last(decoder: &mut Decoder, bytes: &[u8]) -> Result<Option<(Opcode, Vec<u8>)>, FrameError> {
        let mut bytes = bytes.to_vec();
        let (mut at, mut last) = (0, None);
        while let Some(event) = decoder.decode(&mut bytes[at..], &mut at, &LIMITS)? {
            last = Some(match event {
                Event::Message { kind: MessageKind::Text, payload } => (Opcode::Text, payload.to_vec()),
                Event::Message { kind: MessageKind::Binary, payload } => (Opcode::Binary, payload.to_vec()),
                Event::Ping(payload) => (Opcode::Ping, payload.to_vec()),
                Event::Pong(payload) => (Opcode::Pong, payload.to_vec()),
                Event::Close(why) => {
                    (Opcode::Close, why.map(|(_, reason)| reason.as_bytes().to_vec()).unwrap_or_default())
                }
            });
        }
        assert_eq!(at, bytes.len(), "None means that everything was taken");
        Ok(last)
    }

    #[test]
    fn an_idle_decoder_is_two_words() {
        assert!(size_of::<Decoder>() <= 16, "{} bytes", size_of::<Decoder>());
    }

    #[test]
    fn a_partial_costs_what_the_documentation_says() {
        assert!(size_of::<Partial>() <= 256, "{} bytes", size_of::<Partial>());
    }

    #[test]
    fn a_whole_frame_is_returned_from_the_input_and_nothing_is_kept() {
        let mut bytes = frame(FIN | 0x2, b"in place", None);
        let payload_at = bytes[bytes.len() - 8..].as_ptr();
        let (mut decoder, mut at) = (Decoder::new(), 0);
        let event = decoder.decode(&mut bytes, &mut at, &LIMITS);
        let Ok(Some(Event::Message { payload, .. })) = event else { panic!("{event:?}") };
        assert_eq!((payload, payload.as_ptr()), (&b"in place"[..], payload_at));
        assert!(decoder.is_idle());
    }

    #[test]
    fn a_frame_with_a_split_header_is_still_returned_from_the_input() {
        let mut bytes = frame(FIN | 0x2, b"in place", None);
        let payload_at = bytes[bytes.len() - 8..].as_ptr();
        let (mut decoder, mut at) = (Decoder::new(), 0);
        assert_eq!(decoder.decode(&mut bytes[..3], &mut at, &LIMITS), Ok(None));
        let event = decoder.decode(&mut bytes[3..], &mut at, &LIMITS);
        let Ok(Some(Event::Message { payload, .. })) = event else { panic!("{event:?}") };
        assert_eq!((payload, payload.as_ptr(), at), (&b"in place"[..], payload_at, 14));
        assert!(decoder.is_idle());
    }

    #[test]
    fn a_claimed_length_takes_no_memory() {
        let mut decoder = Decoder::new();
        assert_eq!(last(&mut decoder, &frame(FIN | 0x2, b"ten bytes.", Some(60_000))), Ok(None));
        assert!(decoder.heap_bytes() <= size_of::<Partial>() + 2 * 10, "{}", decoder.heap_bytes());
    }

    #[test]
    fn memory_follows_what_has_arrived_and_ends_at_the_limit() {
        let mut decoder = Decoder::new();
        let bytes = frame(FIN | 0x2, &[7; 65_535], Some(65_536));
        for (count, piece) in bytes.chunks(100).enumerate() {
            assert_eq!(last(&mut decoder, piece), Ok(None));
            let message_bytes = decoder.heap_bytes() - size_of::<Partial>();
            assert!(message_bytes <= (2 * 100 * (count + 1)).min(65_536), "{message_bytes} after {count}");
        }
        assert_eq!(last(&mut decoder, &[7]).map(|event| event.is_some()), Ok(true));
        assert_eq!(decoder.heap_bytes(), 0);
    }

    #[test]
    fn the_memory_of_a_message_is_freed_after_its_event() {
        let mut decoder = Decoder::new();
        let mut bytes = frame(FIN | 0x2, &[7; 50_000], None);
        let (mut first, mut second) = (bytes.drain(..30_000).collect::<Vec<_>>(), bytes);
        let mut at = 0;
        assert_eq!(decoder.decode(&mut first, &mut at, &LIMITS), Ok(None));
        assert!(matches!(decoder.decode(&mut second, &mut at, &LIMITS), Ok(Some(Event::Message { .. }))));
        assert!(decoder.heap_bytes() > 50_000);
        decoder.release();
        assert_eq!(decoder.heap_bytes(), 0);
        assert!(decoder.is_idle());
    }

    #[test]
    fn releasing_takes_nothing_from_a_message_that_is_not_complete() {
        let mut decoder = Decoder::new();
        assert_eq!(last(&mut decoder, &frame(0x1, b"one ", None)), Ok(None));
        decoder.release();
        let ping = frame(FIN | 0x9, b"between", None);
        assert_eq!(last(&mut decoder, &ping[..9]), Ok(None));
        decoder.release();
        assert_eq!(last(&mut decoder, &ping[9..]), Ok(Some((Opcode::Ping, b"between".to_vec()))));
        decoder.release();
        assert_eq!(
            last(&mut decoder, &frame(FIN, b"message", None)),
            Ok(Some((Opcode::Text, b"one message".to_vec())))
        );
    }

    #[test]
    fn a_length_above_the_limit_is_refused_at_the_header() {
        let refused = Err(FrameError::MessageTooBig { limit: 65_536 });
        assert_eq!(last(&mut Decoder::new(), &frame(FIN | 0x2, b"", Some(65_537))), refused);
        assert_eq!(last(&mut Decoder::new(), &frame(FIN | 0x2, b"", Some(i64::MAX as u64))), refused);
        assert_eq!(
            last(&mut Decoder::new(), &frame(FIN | 0x2, b"", Some(1 << 63))),
            Err(FrameError::LengthOverflow)
        );

        let mut decoder = Decoder::new();
        assert_eq!(last(&mut decoder, &frame(0x2, &[1; 65_536], None)), Ok(None));
        assert_eq!(last(&mut decoder, &frame(FIN, b"", Some(1))), refused);
    }

    #[test]
    fn a_message_may_have_as_many_fragments_as_the_limit_says() {
        let mut decoder = Decoder::new();
        for _ in 0..2 {
            for first in [0x2, 0, 0] {
                assert_eq!(last(&mut decoder, &frame(first, b"", None)), Ok(None));
            }
            assert_eq!(last(&mut decoder, &frame(FIN, b"", None)), Ok(Some((Opcode::Binary, vec![]))));
        }
        for first in [0x2, 0, 0, 0] {
            assert_eq!(last(&mut decoder, &frame(first, b"", None)), Ok(None));
        }
        assert_eq!(
            last(&mut decoder, &frame(FIN, b"", None)),
            Err(FrameError::TooManyFragments { limit: 4 })
        );
    }

    #[test]
    fn the_first_error_is_final() {
        let mut decoder = Decoder::new();
        for _ in 0..3 {
            assert_eq!(last(&mut decoder, &frame(FIN | 0x3, b"", None)), Err(FrameError::ReservedOpcode(3)));
            assert_eq!(last(&mut decoder, &frame(FIN | 0x2, b"", None)), Err(FrameError::ReservedOpcode(3)));
        }
        assert_eq!(decoder.heap_bytes(), 0);
    }

    #[test]
    fn input_after_a_close_is_discarded() {
        let close = frame(FIN | 0x8, b"\x03\xe8bye", None);
        let behind = frame(FIN | 0x3, b"not even a frame", None);
        for cut in 0..=close.len() {
            let mut decoder = Decoder::new();
            assert!(last(&mut decoder, &close[..cut]).is_ok());
            let rest = [&close[cut..], &behind].concat();
            let seen = last(&mut decoder, &rest);
            if cut < close.len() {
                assert_eq!(seen, Ok(Some((Opcode::Close, b"bye".to_vec()))));
            }
            assert_eq!(last(&mut decoder, &behind), Ok(None));
            assert_eq!(decoder.heap_bytes(), 0);
        }
    }

    #[test]
    fn a_bad_byte_is_reported_before_the_frame_ends() {
        let bytes = frame(FIN | 0x1, b"good \xff", Some(60_000));
        let mut decoder = Decoder::new();
        assert_eq!(last(&mut decoder, &bytes[..bytes.len() - 1]), Ok(None));
        assert_eq!(last(&mut decoder, &bytes[bytes.len() - 1..]), Err(FrameError::InvalidUtf8));
    }
}
