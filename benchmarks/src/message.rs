//! The message that every benchmark sends: `{"t":SEQ,"p":"xxxx…"}`, a chosen number of bytes long.
//!
//! Sequence numbers always have ten digits, so all messages of a run have the same length: the client's masked frame is
//! made once, and to send one is to copy it and write ten digits. Does not know senders or receivers.

use crate::frame::{self, Opcode};

/// The first sequence number: the least with ten digits.
pub(crate) const FIRST_SEQ: u64 = 1_000_000_000;

/// The shortest message: nothing but the sequence number.
pub(crate) const BYTES_MIN: usize = HEAD.len() + DIGITS + MIDDLE.len() + TAIL.len();

const HEAD: &str = r#"{"t":"#;
const MIDDLE: &str = r#","p":""#;
const TAIL: &str = r#""}"#;
const DIGITS: usize = 10;

/// One key for all frames: it makes no difference to a server, and the frame can be masked in advance.
const MASK: [u8; 4] = [0x37, 0xFA, 0x21, 0x3D];

/// Why a message cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MessageError {
    #[error("a message has at least {BYTES_MIN} and at most {max} bytes, not {0}", max = frame::PAYLOAD_BYTES_MAX)]
    Bytes(usize),
}

/// A masked client frame without its sequence number.
#[derive(Debug)]
pub(crate) struct Template {
    frame: Vec<u8>,
    /// Where in the frame the digits are.
    digits: usize,
    /// Which byte of the mask applies to the first digit.
    phase: usize,
}

impl Template {
    /// A frame with `bytes` of JSON, and an envelope before and after them.
    pub(crate) fn new(bytes: usize, (before, after): (&str, &str)) -> Result<Self, MessageError> {
        if !(BYTES_MIN..=frame::PAYLOAD_BYTES_MAX).contains(&bytes) {
            return Err(MessageError::Bytes(bytes));
        }
        let filler = "x".repeat(bytes - BYTES_MIN);
        let text = format!("{before}{HEAD}{:0<DIGITS$}{MIDDLE}{filler}{TAIL}{after}", "");
        let mut frame = Vec::new();
        frame::write(&mut frame, Opcode::Text, Some(MASK), text.as_bytes());
        let before = before.len() + HEAD.len();
        let digits = frame.len() - text.len() + before;
        Ok(Self { frame, digits, phase: before % MASK.len() })
    }

    /// Appends the frame that carries `seq`.
    pub(crate) fn write(&self, out: &mut Vec<u8>, mut seq: u64) {
        let start = out.len() + self.digits;
        out.extend_from_slice(&self.frame);
        for (index, byte) in out[start..start + DIGITS].iter_mut().enumerate().rev() {
            *byte = (b'0' + (seq % 10) as u8) ^ MASK[(self.phase + index) % MASK.len()];
            seq /= 10;
        }
    }
}

/// Finds the sequence number in a message; `None` when there is none.
#[inline]
pub(crate) fn seq(message: &[u8]) -> Option<u64> {
    let start = if message.starts_with(HEAD.as_bytes()) {
        HEAD.len()
    } else {
        // A server may order the fields differently.
        message.windows(4).position(|window| window == br#""t":"#)? + 4
    };
    let digits =
        message.get(start..)?.iter().map(|byte| byte.wrapping_sub(b'0')).take_while(|&digit| digit < 10);
    let mut count = 0;
    let value = digits.take(19).fold(0, |value, digit| {
        count += 1;
        value * 10 + u64::from(digit)
    });
    (count > 0).then_some(value)
}

/// Appends a masked text frame.
pub(crate) fn write_text(out: &mut Vec<u8>, text: &str) {
    frame::write(out, Opcode::Text, Some(MASK), text.as_bytes());
}

/// Appends the masked pong that answers a ping.
pub(crate) fn write_pong(out: &mut Vec<u8>, ping: &[u8]) {
    frame::write(out, Opcode::Pong, Some(MASK), ping);
}

/// The code of a Close frame without one (RFC 6455, 7.1.5).
pub(crate) const NO_CODE: u16 = 1005;

/// Appends a masked Close frame.
pub(crate) fn write_close(out: &mut Vec<u8>, code: u16) {
    let code = code.to_be_bytes();
    let payload = if code == NO_CODE.to_be_bytes() { &[][..] } else { &code[..] };
    frame::write(out, Opcode::Close, Some(MASK), payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_makes_messages_of_the_requested_length_with_their_number() {
        for bytes in [BYTES_MIN, 64, 125, 126, 1000, 70_000] {
            let template = Template::new(bytes, ("", "")).unwrap();
            let mut out = Vec::new();
            template.write(&mut out, FIRST_SEQ + 42);
            let frame = frame::parse(&out).unwrap().unwrap();
            let payload = &mut out[frame.payload];
            frame::apply_mask(frame.mask.unwrap(), payload);
            assert_eq!(payload.len(), bytes);
            assert_eq!(seq(payload), Some(FIRST_SEQ + 42));
            assert!(payload.starts_with(br#"{"t":1000000042,"p":""#) && payload.ends_with(br#""}"#));
        }
        assert!(Template::new(BYTES_MIN - 1, ("", "")).is_err());
    }

    #[test]
    fn a_template_with_an_envelope_has_it_around_the_same_message() {
        let mut out = Vec::new();
        Template::new(64, (r#"42["message","#, "]")).unwrap().write(&mut out, FIRST_SEQ + 7);
        let frame = frame::parse(&out).unwrap().unwrap();
        let payload = &mut out[frame.payload];
        frame::apply_mask(frame.mask.unwrap(), payload);
        assert!(
            payload.starts_with(br#"42["message",{"t":1000000007,"p":"x"#) && payload.ends_with(br#"x"}]"#)
        );
        assert_eq!((payload.len(), seq(payload)), (64 + 14, Some(FIRST_SEQ + 7)));
    }

    #[test]
    fn a_number_is_found_wherever_the_field_is() {
        assert_eq!(seq(br#"{"p":"xx","t":17}"#), Some(17));
        assert_eq!(seq(br#"{"t":9,"p":""}"#), Some(9));
        assert_eq!(seq(br#"{"p":"xx"}"#), None);
        assert_eq!(seq(br#"{"t":"x"}"#), None);
    }
}
