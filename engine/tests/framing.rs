//! Framing, compared with tungstenite.
//!
//! A second, independent implementation is the reference: what it reads, the engine reads; what it refuses,
//! the engine refuses for the same cause; each reads what the other writes. Frames are generated at random,
//! corrupted at random, and cut at random.
//!
//! Deliberate differences, each covered by a test of its own:
//! - Close code 1014 is accepted (registered with IANA since RFC 6455); tungstenite 0.30 answers it as a violation.
//! - A 64-bit length with the top bit set is its own error; tungstenite calls it too long.
//! - Faults are reported as soon as they can be known; tungstenite waits for the frame's last byte. Covered
//!   by `a_spoiled_byte_is_reported_where_the_text_becomes_impossible` and by the decoder's own tests.
//! - If one frame has several faults and one of them is a claim above tungstenite's *frame* limit,
//!   tungstenite reports the claim. Not generated here: its frame limit is set far above any generated frame.

use std::convert::Infallible;
use std::io::{self, Cursor, Read, Write};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use shardcast_engine::{
    CloseCode, ControlFrame, Decoder, Event, Frame, FrameError, Limits, MessageKind, Utf8Checker, unmask,
};
use tungstenite::error::{CapacityError, Error, ProtocolError};
use tungstenite::protocol::{CloseFrame, Role, WebSocket, WebSocketConfig};
use tungstenite::{Message, protocol::frame::coding};

/// Small, so that generated messages often exceed it.
const LIMITS: Limits =
    Limits { max_message_bytes: 300, max_fragments: 1000, max_frame_bytes: 1 << 30, accept_unmasked: false };
/// Tungstenite's limit of one frame; it reserves a claimed length up to this, so not without bound.
const FRAME_BYTES_MAX: usize = 1 << 20;

// ---- Transcripts ------------------------------------------------------------------------------------------------

#[derive(Debug, Clone, PartialEq)]
enum Said {
    Text(String),
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(Option<(u16, String)>),
}

/// How a sequence of bytes ended.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    /// The decoder waits for more bytes.
    Open,
    Closed,
    Refused(Cause),
}

/// The causes that both implementations can report.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cause {
    Unmasked,
    ReservedBits,
    ReservedOpcode(u8),
    FragmentedControl,
    ControlTooLong,
    UnexpectedContinuation,
    ExpectedContinuation,
    Utf8,
    TooBig,
    CloseCode,
    ClosePayload,
}

type Transcript = (Vec<Said>, End);

fn our_cause(error: FrameError) -> Cause {
    match error {
        FrameError::Unmasked => Cause::Unmasked,
        FrameError::ReservedBits => Cause::ReservedBits,
        FrameError::ReservedOpcode(number) => Cause::ReservedOpcode(number),
        FrameError::FragmentedControl => Cause::FragmentedControl,
        FrameError::ControlTooLong => Cause::ControlTooLong,
        FrameError::UnexpectedContinuation => Cause::UnexpectedContinuation,
        FrameError::ExpectedContinuation => Cause::ExpectedContinuation,
        FrameError::InvalidUtf8 => Cause::Utf8,
        FrameError::MessageTooBig { .. } | FrameError::LengthOverflow => Cause::TooBig,
        FrameError::InvalidCloseCode(_) => Cause::CloseCode,
        FrameError::InvalidClosePayload => Cause::ClosePayload,
        other => panic!("tungstenite has no such cause: {other}"),
    }
}

fn their_cause(error: &Error) -> Cause {
    match error {
        Error::Utf8(_) => Cause::Utf8,
        Error::Capacity(CapacityError::MessageTooLong { .. }) => Cause::TooBig,
        Error::Protocol(protocol) => match protocol {
            ProtocolError::UnmaskedFrameFromClient => Cause::Unmasked,
            ProtocolError::NonZeroReservedBits => Cause::ReservedBits,
            ProtocolError::InvalidOpcode(number) => Cause::ReservedOpcode(*number),
            ProtocolError::FragmentedControlFrame => Cause::FragmentedControl,
            ProtocolError::ControlFrameTooBig => Cause::ControlTooLong,
            ProtocolError::UnexpectedContinueFrame => Cause::UnexpectedContinuation,
            ProtocolError::ExpectedFragment(_) => Cause::ExpectedContinuation,
            ProtocolError::InvalidCloseSequence => Cause::ClosePayload,
            other => panic!("not a cause of ours: {other}"),
        },
        other => panic!("not a cause of ours: {other}"),
    }
}

/// The engine's result for the pieces, each in a buffer that is overwritten after the call.
fn ours<'p>(pieces: impl IntoIterator<Item = &'p [u8]>, limits: &Limits) -> Transcript {
    let mut decoder = Decoder::new();
    let mut said = Vec::new();
    for piece in pieces {
        let mut buffer = piece.to_vec();
        let mut at = 0;
        loop {
            match decoder.decode(&mut buffer[at..], &mut at, limits) {
                Ok(Some(Event::Message { kind: MessageKind::Text, payload })) => {
                    said.push(Said::Text(std::str::from_utf8(payload).expect("promised").to_owned()));
                }
                Ok(Some(Event::Message { kind: MessageKind::Binary, payload })) => {
                    said.push(Said::Binary(payload.to_vec()));
                }
                Ok(Some(Event::Ping(payload))) => said.push(Said::Ping(payload.to_vec())),
                Ok(Some(Event::Pong(payload))) => said.push(Said::Pong(payload.to_vec())),
                Ok(Some(Event::Close(why))) => {
                    said.push(Said::Close(why.map(|(code, reason)| (code.into(), reason.to_owned()))));
                    return (said, End::Closed);
                }
                Ok(None) => break,
                Err(error) => return (said, End::Refused(our_cause(error))),
            }
        }
        assert_eq!(at, buffer.len(), "None means that everything was taken");
        buffer.fill(0xee);
    }
    (said, End::Open)
}

/// An in-memory stream: returns its input, accepts all output.
struct Wire(Cursor<Vec<u8>>);

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tungstenite's result for the same bytes.
fn theirs(bytes: &[u8], role: Role, message_bytes_max: usize) -> Transcript {
    let config = WebSocketConfig::default()
        .read_buffer_size(4096)
        .max_message_size(Some(message_bytes_max))
        .max_frame_size(Some(FRAME_BYTES_MAX));
    let mut socket = WebSocket::from_raw_socket(Wire(Cursor::new(bytes.to_vec())), role, Some(config));
    let mut said = Vec::new();
    loop {
        match socket.read() {
            Ok(Message::Text(text)) => said.push(Said::Text(text.to_string())),
            Ok(Message::Binary(payload)) => said.push(Said::Binary(payload.to_vec())),
            Ok(Message::Ping(payload)) => said.push(Said::Ping(payload.to_vec())),
            Ok(Message::Pong(payload)) => said.push(Said::Pong(payload.to_vec())),
            // This is how tungstenite returns a Close with a code that is not allowed.
            Ok(Message::Close(Some(CloseFrame { code: coding::CloseCode::Protocol, reason })))
                if reason.as_str() == "Protocol violation" =>
            {
                return (said, End::Refused(Cause::CloseCode));
            }
            Ok(Message::Close(why)) => {
                said.push(Said::Close(why.map(|close| (close.code.into(), close.reason.to_string()))));
                return (said, End::Closed);
            }
            Ok(Message::Frame(frame)) => panic!("tungstenite reads no raw frames: {frame}"),
            Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)) => return (said, End::Open),
            Err(error) => return (said, End::Refused(their_cause(&error))),
        }
    }
}

// ---- Generators -------------------------------------------------------------------------------------------------

/// A valid or invalid client frame.
#[derive(Debug, Clone)]
struct Drawn {
    fin: bool,
    reserved: u8,
    opcode: u8,
    masked: bool,
    key: [u8; 4],
    payload: Vec<u8>,
    /// The shortest form of the length: 0 in the second byte, 1 in two more, 2 in eight more.
    length_class: u8,
}

impl Drawn {
    fn write(&self, wire: &mut Vec<u8>) {
        wire.push(u8::from(self.fin) << 7 | self.reserved << 4 | self.opcode);
        let mask_bit = u8::from(self.masked) << 7;
        let length = self.payload.len();
        match (self.length_class, length) {
            (0, 0..126) => wire.push(mask_bit | length as u8),
            (0 | 1, 0..65_536) => {
                wire.push(mask_bit | 126);
                wire.extend((length as u16).to_be_bytes());
            }
            _ => {
                wire.push(mask_bit | 127);
                wire.extend((length as u64).to_be_bytes());
            }
        }
        if self.masked {
            wire.extend(self.key);
            wire.extend(self.payload.iter().zip(self.key.iter().cycle()).map(|(byte, key)| byte ^ key));
        } else {
            wire.extend(&self.payload);
        }
    }
}

fn on_the_wire(frames: &[Drawn]) -> Vec<u8> {
    let mut wire = Vec::new();
    frames.iter().for_each(|frame| frame.write(&mut wire));
    wire
}

fn good(opcode: u8, fin: bool, key: [u8; 4], payload: Vec<u8>) -> Drawn {
    Drawn { fin, reserved: 0, opcode, masked: true, key, payload, length_class: 0 }
}

fn bytes(size: impl Into<proptest::collection::SizeRange>) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), size)
}

/// Text with characters of every width, so that cuts fall inside them.
fn text(chars_max: usize) -> impl Strategy<Value = String> {
    let character = prop_oneof![
        4 => proptest::char::range('a', 'z'),
        1 => proptest::char::range('\u{80}', '\u{7ff}'),
        1 => proptest::char::range('\u{800}', '\u{d7ff}'),
        1 => proptest::char::range('\u{e000}', '\u{ffff}'),
        1 => proptest::char::range('\u{10000}', '\u{10ffff}'),
    ];
    vec(character, 0..chars_max).prop_map(String::from_iter)
}

fn control() -> impl Strategy<Value = Drawn> {
    // 126 is one too long.
    let payload = prop_oneof![12 => bytes(0..20), 1 => bytes(124..=126)];
    (select(vec![0x9u8, 0xA]), any::<[u8; 4]>(), payload)
        .prop_map(|(opcode, key, payload)| good(opcode, true, key, payload))
}

fn close() -> impl Strategy<Value = Drawn> {
    // 1014 is excluded: see the differences above.
    let code = prop_oneof![
        select(vec![1000u16, 1001, 1002, 1003, 1007, 1011, 1012, 1013, 3000, 4999]),
        select(vec![0u16, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535]),
        any::<u16>().prop_filter("1014", |&code| code != 1014),
    ];
    let reason = prop_oneof![4 => text(30).prop_map(String::into_bytes), 1 => bytes(1..10)];
    let payload = prop_oneof![
        1 => bytes(0..2),
        4 => (code, reason).prop_map(|(code, reason)| [&code.to_be_bytes()[..], &reason].concat()),
    ];
    (any::<[u8; 4]>(), payload).prop_map(|(key, payload)| good(0x8, true, key, payload))
}

/// One message in one or more fragments, with control frames anywhere between them.
fn message() -> impl Strategy<Value = Vec<Drawn>> {
    let said = prop_oneof![
        3 => text(40).prop_map(|text| (0x1, text.into_bytes())),
        2 => bytes(0..200).prop_map(|payload| (0x2, payload)),
        1 => bytes(250..350).prop_map(|payload| (0x2, payload)),
        1 => bytes(LIMITS.max_message_bytes - 1..=LIMITS.max_message_bytes + 1).prop_map(|payload| (0x2, payload)),
        1 => bytes(1..8).prop_map(|payload| (0x1, payload)),
    ];
    let cuts = prop_oneof![2 => vec(any::<Index>(), 0..1), 1 => vec(any::<Index>(), 1..5)];
    (said, cuts, vec((any::<Index>(), control()), 0..3), any::<[u8; 4]>()).prop_map(
        |((opcode, payload), cuts, controls, key)| {
            let pieces = cut(&payload, &cuts);
            let last = pieces.len() - 1;
            let mut frames: Vec<Drawn> = pieces
                .iter()
                .enumerate()
                .map(|(n, piece)| good(if n == 0 { opcode } else { 0 }, n == last, key, piece.to_vec()))
                .collect();
            for (place, control) in controls {
                frames.insert(place.index(frames.len() + 1), control);
            }
            frames
        },
    )
}

fn conversation() -> impl Strategy<Value = Vec<Drawn>> {
    let part = prop_oneof![6 => message(), 1 => close().prop_map(|close| vec![close])];
    vec(part, 1..5).prop_map(|parts| parts.concat())
}

/// One corruption of (or a rare form in) one frame.
#[derive(Debug, Clone)]
enum Spoil {
    ReservedBits(u8),
    Opcode(u8),
    Fin,
    Mask,
    LengthClass(u8),
    Byte(Index, u8),
    Grow(usize),
    Lose,
    Repeat,
}

fn spoil() -> impl Strategy<Value = (Index, Spoil)> {
    let spoil = prop_oneof![
        (1u8..8).prop_map(Spoil::ReservedBits),
        (0u8..16).prop_map(Spoil::Opcode),
        Just(Spoil::Fin),
        Just(Spoil::Mask),
        (0u8..3).prop_map(Spoil::LengthClass),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Spoil::Byte(at, byte)),
        select(vec![1usize, 120, 126, 300, 70_000]).prop_map(Spoil::Grow),
        Just(Spoil::Lose),
        Just(Spoil::Repeat),
    ];
    (any::<Index>(), spoil)
}

fn spoiled(mut frames: Vec<Drawn>, spoils: &[(Index, Spoil)]) -> Vec<Drawn> {
    for (which, spoil) in spoils {
        if frames.is_empty() {
            break;
        }
        let n = which.index(frames.len());
        let frame = &mut frames[n];
        match spoil {
            Spoil::ReservedBits(bits) => frame.reserved = *bits,
            Spoil::Opcode(number) => frame.opcode = *number,
            Spoil::Fin => frame.fin = !frame.fin,
            Spoil::Mask => frame.masked = !frame.masked,
            Spoil::LengthClass(class) => frame.length_class = *class,
            Spoil::Byte(at, byte) => {
                if !frame.payload.is_empty() {
                    let at = at.index(frame.payload.len());
                    frame.payload[at] = *byte;
                }
            }
            Spoil::Grow(by) => frame.payload.extend(std::iter::repeat_n(b'+', *by)),
            Spoil::Lose => {
                frames.remove(n);
            }
            Spoil::Repeat => {
                let twin = frame.clone();
                frames.insert(n, twin);
            }
        }
    }
    // The one difference that is not generated.
    frames.retain(|frame| frame.opcode != 0x8 || !frame.payload.starts_with(&1014u16.to_be_bytes()));
    frames
}

fn cut<'b>(bytes: &'b [u8], cuts: &[Index]) -> Vec<&'b [u8]> {
    let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    places.sort_unstable();
    let mut pieces = Vec::new();
    let mut begin = 0;
    for end in places {
        pieces.push(&bytes[begin..end]);
        begin = end;
    }
    pieces.push(&bytes[begin..]);
    pieces
}

// ---- Guarantees: reading ----------------------------------------------------------------------------------------

proptest! {
    #[test]
    fn the_decoder_accepts_and_refuses_the_same_frames_as_tungstenite(
        frames in conversation(),
        spoils in prop_oneof![1 => vec(spoil(), 0..1), 4 => vec(spoil(), 1..3)],
        cuts in vec(any::<Index>(), 0..8),
    ) {
        let wire = on_the_wire(&spoiled(frames, &spoils));
        let expected = theirs(&wire, Role::Server, LIMITS.max_message_bytes);
        prop_assert_eq!(ours(cut(&wire, &cuts), &LIMITS), expected);
    }

    #[test]
    fn the_same_bytes_cut_anywhere_give_the_same_messages(
        frames in conversation(),
        spoils in vec(spoil(), 0..3),
        cuts in vec(any::<Index>(), 0..20),
        end in any::<Index>(),
    ) {
        // The end is cut off too: it need not be at a frame boundary.
        let wire = on_the_wire(&spoiled(frames, &spoils));
        let wire = &wire[..end.index(wire.len() + 1)];
        let whole = ours([wire], &LIMITS);
        prop_assert_eq!(&ours(cut(wire, &cuts), &LIMITS), &whole);
        prop_assert_eq!(&ours(wire.chunks(1), &LIMITS), &whole);
    }

    #[test]
    fn bytes_that_were_never_frames_are_read_alike_however_cut(
        wire in bytes(0..400),
        cuts in vec(any::<Index>(), 0..20),
    ) {
        prop_assert_eq!(ours(cut(&wire, &cuts), &LIMITS), ours([&wire[..]], &LIMITS));
    }

    #[test]
    fn a_claim_above_the_limit_is_refused_like_tungstenite_does_but_at_the_header(
        frames in message(),
        claim in prop_oneof![(FRAME_BYTES_MAX as u64 + 1)..1 << 40, any::<u64>().prop_map(|n| n | 1 << 63)],
        key in any::<[u8; 4]>(),
    ) {
        // A message, then the header of one that is too long, and nothing after it.
        let mut wire = on_the_wire(&frames);
        let before = ours([&wire[..]], &LIMITS).1;
        wire.extend([0x82, 0xff]);
        wire.extend(claim.to_be_bytes());
        wire.extend(key);
        let seen = ours([&wire[..]], &LIMITS);
        if before == End::Open {
            prop_assert_eq!(seen.1, End::Refused(Cause::TooBig));
        }
        prop_assert_eq!(seen, theirs(&wire, Role::Server, LIMITS.max_message_bytes));
    }

    #[test]
    fn a_spoiled_byte_is_reported_where_the_text_becomes_impossible(
        text in text(60),
        at in any::<Index>(),
        byte in any::<u8>(),
        cuts in vec(any::<Index>(), 0..4),
        key in any::<[u8; 4]>(),
    ) {
        let mut payload = text.into_bytes();
        payload.push(byte);
        let last = payload.len() - 1;
        payload.swap(at.index(last + 1), last);

        // The verdict of std on each prefix: impossible, or merely incomplete.
        let lost_at = (1..=payload.len())
            .find(|&end| std::str::from_utf8(&payload[..end]).is_err_and(|error| error.error_len().is_some()));

        // The fragments, fed byte by byte; the last one never ends the message.
        let mut decoder = Decoder::new();
        let mut payload_bytes = 0;
        let mut reported_at = None;
        'feeding: for (n, piece) in cut(&payload, &cuts).into_iter().enumerate() {
            let wire = on_the_wire(&[good(u8::from(n == 0), false, key, piece.to_vec())]);
            for (m, &byte) in wire.iter().enumerate() {
                payload_bytes += usize::from(m >= wire.len() - piece.len());
                if let Err(error) = decoder.decode(&mut [byte], &mut 0, &Limits::default()) {
                    prop_assert_eq!(error, FrameError::InvalidUtf8);
                    reported_at = Some(payload_bytes);
                    break 'feeding;
                }
            }
        }
        prop_assert_eq!(reported_at, lost_at);
    }

    #[test]
    fn the_decoder_reads_what_a_tungstenite_client_writes(
        said in vec(
            prop_oneof![
                text(50).prop_map(Message::text),
                bytes(0..400).prop_map(Message::binary),
                bytes(0..126).prop_map(|payload| Message::Ping(payload.into())),
                bytes(0..126).prop_map(|payload| Message::Pong(payload.into())),
            ],
            0..6,
        ),
        cuts in vec(any::<Index>(), 0..6),
    ) {
        let mut client = WebSocket::from_raw_socket(Cursor::new(Vec::new()), Role::Client, None);
        for message in &said {
            client.send(message.clone()).expect("a vector takes everything");
        }
        let wire = client.into_inner().into_inner();
        let expected: Vec<Said> = said.iter().map(|message| match message {
            Message::Text(text) => Said::Text(text.to_string()),
            Message::Binary(payload) => Said::Binary(payload.to_vec()),
            Message::Ping(payload) => Said::Ping(payload.to_vec()),
            Message::Pong(payload) => Said::Pong(payload.to_vec()),
            other => panic!("not drawn: {other}"),
        }).collect();
        prop_assert_eq!(ours(cut(&wire, &cuts), &Limits::default()), (expected, End::Open));
    }
}

#[test]
fn the_drawn_frames_reach_every_cause_and_every_end() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    // A comparison proves nothing about inputs that are never generated.
    let mut runner = TestRunner::deterministic();
    let drawn = (conversation(), vec(spoil(), 0..3));
    let mut ends: Vec<End> = Vec::new();
    let mut fragmented_texts = 0;
    for _ in 0..3000 {
        let (frames, spoils) = drawn.new_tree(&mut runner).expect("no filter is that strict").current();
        let frames = spoiled(frames, &spoils);
        let (said, end) = ours([&on_the_wire(&frames)[..]], &LIMITS);
        let is_fragmented = frames.iter().any(|frame| frame.opcode == 1 && !frame.fin);
        let is_wide = said.iter().any(|said| matches!(said, Said::Text(text) if !text.is_ascii()));
        fragmented_texts += u32::from(is_fragmented && is_wide);
        if !ends.contains(&end) {
            ends.push(end);
        }
    }
    let causes = [
        Cause::Unmasked,
        Cause::ReservedBits,
        Cause::FragmentedControl,
        Cause::ControlTooLong,
        Cause::UnexpectedContinuation,
        Cause::ExpectedContinuation,
        Cause::Utf8,
        Cause::TooBig,
        Cause::CloseCode,
        Cause::ClosePayload,
    ];
    let reserved = [3, 4, 5, 6, 7, 11, 12, 13, 14, 15].map(Cause::ReservedOpcode);
    let refused = causes.into_iter().chain(reserved).map(End::Refused);
    for end in refused.chain([End::Open, End::Closed]) {
        assert!(ends.contains(&end), "never drawn: {end:?}");
    }
    assert!(fragmented_texts > 100, "only {fragmented_texts}");
}

#[test]
fn code_1014_is_accepted_although_tungstenite_refuses_it() {
    let wire = on_the_wire(&[good(0x8, true, [1, 2, 3, 4], vec![0x03, 0xf6])]);
    assert_eq!(ours([&wire[..]], &LIMITS), (vec![Said::Close(Some((1014, String::new())))], End::Closed));
    assert_eq!(theirs(&wire, Role::Server, 300), (vec![], End::Refused(Cause::CloseCode)));
}

#[test]
fn a_length_of_64_bits_is_an_error_of_its_own() {
    let mut wire = [0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4];
    assert_eq!(Decoder::new().decode(&mut wire, &mut 0, &LIMITS), Err(FrameError::LengthOverflow));
    assert_eq!(theirs(&wire, Role::Server, 300), (vec![], End::Refused(Cause::TooBig)));
}

// ---- Guarantees: writing ----------------------------------------------------------------------------------------

/// Lengths on both sides of every change of header, and anything between.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![
        select(vec![0usize, 1, 125, 126, 127, 65_535, 65_536, 65_537, 100_000]),
        0usize..300,
        65_000usize..66_000,
    ]
}

proptest! {
    #[test]
    fn a_tungstenite_client_reads_our_data_frames(length in length(), seed in any::<u8>(), hint in 0usize..70_000) {
        let payload: Vec<u8> = (0..length).map(|n| (n as u8).wrapping_mul(31) ^ seed).collect();
        let text: String = payload.iter().map(|&byte| char::from(byte & 0x7f)).collect();
        let built = Frame::build(hint, |buffer| {
            buffer.extend_from_slice(&payload);
            Ok::<_, Infallible>(MessageKind::Binary)
        });
        let Ok(built) = built;

        let frames = [Frame::binary(&payload), Frame::text(&text), built];
        let wire: Vec<u8> = frames.iter().flat_map(|frame| frame.as_bytes()).copied().collect();
        let expected = vec![Said::Binary(payload.clone()), Said::Text(text), Said::Binary(payload)];
        prop_assert_eq!(theirs(&wire, Role::Client, FRAME_BYTES_MAX), (expected, End::Open));
    }

    #[test]
    fn a_tungstenite_client_reads_our_control_frames(
        ping in bytes(0..126),
        pong in bytes(0..126),
        code in select(vec![1000u16, 1001, 1002, 1003, 1007, 1008, 1009, 1011, 1012, 1013, 3000, 4999]),
        reason in text(60),
    ) {
        let close = ControlFrame::close(CloseCode(code), &reason);
        let frames = [ControlFrame::ping(&ping), ControlFrame::pong(&pong), close];
        let wire: Vec<u8> = frames.iter().flat_map(|frame| frame.as_bytes()).copied().collect();
        let (said, end) = theirs(&wire, Role::Client, FRAME_BYTES_MAX);
        prop_assert_eq!(end, End::Closed);
        prop_assert_eq!(&said[..2], &[Said::Ping(ping), Said::Pong(pong)]);
        let Said::Close(Some((read_code, read_reason))) = &said[2] else { panic!("{said:?}") };
        prop_assert_eq!(*read_code, code);
        // All of it, or as many whole characters as 123 bytes hold.
        prop_assert!(reason.starts_with(read_reason.as_str()));
        let next = reason[read_reason.len()..].chars().next();
        prop_assert!(next.is_none_or(|next| read_reason.len() + next.len_utf8() > 123));
    }

    #[test]
    fn unmasking_equals_the_loop_of_the_rfc_at_any_offset(
        payload in bytes(0..300),
        key in any::<[u8; 4]>(),
        offset in prop_oneof![0usize..64, any::<usize>().prop_map(|n| n >> 1)],
        begin in 0usize..17,
    ) {
        // `begin` moves the slice off its buffer's alignment.
        let mut fast = [&vec![0; begin][..], &payload].concat();
        unmask(&mut fast[begin..], key, offset);
        let naive: Vec<u8> = payload.iter().enumerate().map(|(n, byte)| byte ^ key[(offset + n) % 4]).collect();
        prop_assert_eq!(&fast[begin..], &naive[..]);
        prop_assert!(fast[..begin].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn text_checked_in_pieces_is_judged_as_std_judges_the_whole(
        text in text(200),
        spoiled in proptest::option::of((any::<Index>(), any::<u8>())),
        end in proptest::option::of(any::<Index>()),
        cuts in vec(any::<Index>(), 0..30),
    ) {
        let mut bytes = text.into_bytes();
        if let (Some((at, byte)), false) = (spoiled, bytes.is_empty()) {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(end) = end {
            bytes.truncate(end.index(bytes.len() + 1));
        }
        let verdict = std::str::from_utf8(&bytes);
        let can_still_be_valid = verdict.is_ok() || verdict.is_err_and(|e| e.error_len().is_none());

        let mut checker = Utf8Checker::new();
        let fed = cut(&bytes, &cuts).into_iter().try_for_each(|piece| checker.feed(piece));
        prop_assert_eq!(fed.is_ok(), can_still_be_valid);
        prop_assert_eq!(fed.and_then(|()| checker.finish()).is_ok(), verdict.is_ok());
    }
}
