//! WebSocket frames (RFC 6455, section 5.2), both directions.
//!
//! Separate from the engine's code, so that a fault there is not repeated here. Frames are parsed in place: the client
//! parses one for each delivery, which must take nanoseconds. Knows bytes. Does not know sockets, messages or fragments,
//! which no server here sends.

use std::ops::Range;

/// A longer frame is an error: no benchmark sends one, and a wrong length must not cause an allocation.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 1 << 20;

const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;
const LENGTH: u8 = 0x7F;
const HEADER_BYTES_MAX: usize = 10;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Opcode {
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

/// Why bytes are not an accepted frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("first byte {0:#04x} does not begin a whole message")]
    FirstByte(u8),
    #[error("a payload of {0} bytes is more than {PAYLOAD_BYTES_MAX}")]
    TooLong(u64),
}

/// One whole frame at the beginning of a buffer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Frame {
    pub(crate) opcode: Opcode,
    /// Present on frames from a client, absent on frames from a server.
    pub(crate) mask: Option<[u8; 4]>,
    /// The position of the payload; its end is the end of the frame.
    pub(crate) payload: Range<usize>,
}

/// Parses the frame at the beginning of `bytes`; `None` while it is incomplete.
#[inline]
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<Frame>, FrameError> {
    let &[first, second, ..] = bytes else { return Ok(None) };
    let opcode = match first {
        0x81 => Opcode::Text,
        0x82 => Opcode::Binary,
        0x88 => Opcode::Close,
        0x89 => Opcode::Ping,
        0x8A => Opcode::Pong,
        other => return Err(FrameError::FirstByte(other)),
    };
    let (length, mut start) = match second & LENGTH {
        126 => match bytes.get(2..4) {
            Some(&[a, b]) => (u64::from(u16::from_be_bytes([a, b])), 4),
            _ => return Ok(None),
        },
        127 => match bytes.get(2..10) {
            Some(&[a, b, c, d, e, f, g, h]) => (u64::from_be_bytes([a, b, c, d, e, f, g, h]), 10),
            _ => return Ok(None),
        },
        short => (u64::from(short), 2),
    };
    if length > PAYLOAD_BYTES_MAX as u64 {
        return Err(FrameError::TooLong(length));
    }
    let mut mask = None;
    if second & MASKED != 0 {
        let Some(&[a, b, c, d]) = bytes.get(start..start + 4) else { return Ok(None) };
        mask = Some([a, b, c, d]);
        start += 4;
    }
    let payload = start..start + length as usize;
    Ok((payload.end <= bytes.len()).then_some(Frame { opcode, mask, payload }))
}

/// Appends a frame; a mask makes it one from a client.
pub(crate) fn write(out: &mut Vec<u8>, opcode: Opcode, mask: Option<[u8; 4]>, payload: &[u8]) {
    out.reserve(HEADER_BYTES_MAX + 4 + payload.len());
    out.push(
        FIN | match opcode {
            Opcode::Text => 1,
            Opcode::Binary => 2,
            Opcode::Close => 8,
            Opcode::Ping => 9,
            Opcode::Pong => 10,
        },
    );
    let masked = if mask.is_some() { MASKED } else { 0 };
    match payload.len() {
        short @ 0..=125 => out.push(masked | short as u8),
        medium @ 126..=0xFFFF => {
            out.push(masked | 126);
            out.extend_from_slice(&(medium as u16).to_be_bytes());
        }
        long => {
            out.push(masked | 127);
            out.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    out.extend(mask.iter().flatten());
    let start = out.len();
    out.extend_from_slice(payload);
    if let Some(mask) = mask {
        apply_mask(mask, &mut out[start..]);
    }
}

/// Masks or unmasks in place.
pub(crate) fn apply_mask(mask: [u8; 4], payload: &mut [u8]) {
    for (byte, key) in payload.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= key;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(opcode: Opcode, mask: Option<[u8; 4]>, length: usize) -> (Vec<u8>, Vec<u8>) {
        let payload: Vec<u8> = (0..length).map(|i| i as u8).collect();
        let mut out = Vec::new();
        write(&mut out, opcode, mask, &payload);
        (out, payload)
    }

    #[test]
    fn frames_of_every_length_form_are_parsed_as_written() {
        for length in [0, 1, 125, 126, 127, 0xFFFF, 0x1_0000, PAYLOAD_BYTES_MAX] {
            for mask in [None, Some([1, 2, 3, 250])] {
                let (mut bytes, payload) = framed(Opcode::Text, mask, length);
                let frame = parse(&bytes).unwrap().unwrap();
                assert_eq!((frame.opcode, frame.mask), (Opcode::Text, mask));
                assert_eq!(frame.payload.end, bytes.len());
                if let Some(mask) = mask {
                    apply_mask(mask, &mut bytes[frame.payload.clone()]);
                }
                assert_eq!(bytes[frame.payload], payload);
            }
        }
    }

    #[test]
    fn a_frame_cut_anywhere_is_incomplete_and_not_an_error() {
        for length in [0, 5, 200, 0x1_0000] {
            let (bytes, _) = framed(Opcode::Binary, Some([9; 4]), length);
            for cut in (0..bytes.len()).step_by(1 + length / 50) {
                assert_eq!(parse(&bytes[..cut]), Ok(None), "length {length}, cut at {cut}");
            }
        }
    }

    #[test]
    fn frames_that_arrive_together_are_parsed_one_after_the_other() {
        let (mut bytes, _) = framed(Opcode::Ping, None, 3);
        bytes.extend(framed(Opcode::Text, None, 300).0);
        let first = parse(&bytes).unwrap().unwrap();
        assert_eq!((first.opcode, first.payload.clone()), (Opcode::Ping, 2..5));
        let second = parse(&bytes[first.payload.end..]).unwrap().unwrap();
        assert_eq!((second.opcode, second.payload), (Opcode::Text, 4..304));
    }

    #[test]
    fn fragments_reserved_bits_and_excessive_lengths_are_refused() {
        assert_eq!(parse(&[0x01, 0x00]), Err(FrameError::FirstByte(0x01)));
        assert_eq!(parse(&[0xC1, 0x00]), Err(FrameError::FirstByte(0xC1)));
        let endless = [0x82, 127, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF];
        assert_eq!(parse(&endless), Err(FrameError::TooLong(u64::MAX)));
    }
}
