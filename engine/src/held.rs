//! Messages, and the control frames between them, that were read and must wait: their handler is busy, or a message
//! exceeds a rate limit.
//!
//! Owned by one connection, and exists only while it is needed. Control frames must be answered meanwhile, so
//! reading continues for a while, and messages wait here, one after the other in one buffer.
//! Knows input. Does not bound itself: its owner stops reading (backpressure).

use crate::close_code::CloseCode;
use crate::frame::MessageKind;
use crate::handler::{Control, Input, Message};

/// Before each message in the buffer: its kind and its length.
const HEADER_BYTES: usize = 5;

const TEXT: u8 = 0;
const BINARY: u8 = 1;
const PING: u8 = 2;
const PONG: u8 = 3;
const CLOSE: u8 = 4;

#[derive(Debug, Default)]
pub(crate) struct Held {
    bytes: Vec<u8>,
    /// Where the first message that has not been taken begins.
    from: usize,
}

impl Held {
    pub(crate) fn push(&mut self, input: Input<'_>) {
        match input {
            Input::Message(Message { kind: MessageKind::Text, payload }) => self.push_bytes(TEXT, &[payload]),
            Input::Message(Message { kind: MessageKind::Binary, payload }) => {
                self.push_bytes(BINARY, &[payload])
            }
            Input::Control(Control::Ping(payload)) => self.push_bytes(PING, &[payload]),
            Input::Control(Control::Pong(payload)) => self.push_bytes(PONG, &[payload]),
            Input::Control(Control::Close(None)) => self.push_bytes(CLOSE, &[]),
            Input::Control(Control::Close(Some((code, text)))) => {
                self.push_bytes(CLOSE, &[&code.0.to_be_bytes(), text.as_bytes()]);
            }
        }
    }

    fn push_bytes(&mut self, kind: u8, parts: &[&[u8]]) {
        if self.from > self.bytes.len() / 2 {
            self.bytes.drain(..self.from);
            self.from = 0;
        }
        // A message is at most 1 GiB long, see `ConnectionConfig::max_message_bytes`.
        let length: usize = parts.iter().map(|part| part.len()).sum();
        debug_assert!(u32::try_from(length).is_ok(), "{length} bytes");
        self.bytes.push(kind);
        self.bytes.extend_from_slice(&(length as u32).to_le_bytes());
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
    }

    /// Takes the first message.
    pub(crate) fn pop(&mut self) -> Option<Input<'_>> {
        let left = &self.bytes[self.from..];
        let (header, rest) = left.split_at_checked(HEADER_BYTES)?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let payload = rest.get(..length)?;
        self.from += HEADER_BYTES + length;
        Some(match header[0] {
            TEXT => Input::Message(Message { kind: MessageKind::Text, payload }),
            BINARY => Input::Message(Message { kind: MessageKind::Binary, payload }),
            PING => Input::Control(Control::Ping(payload)),
            PONG => Input::Control(Control::Pong(payload)),
            _ => Input::Control(Control::Close(payload.split_first_chunk().map(|(code, text)| {
                let code = CloseCode(u16::from_be_bytes(*code));
                (code, std::str::from_utf8(text).unwrap_or_default()) // it was UTF-8 when it was pushed
            }))),
        })
    }

    /// Bytes of the first message; none if a control frame comes first, or nothing.
    pub(crate) fn next_message_bytes(&self) -> Option<usize> {
        let [kind, length @ ..] = *self.bytes[self.from..].first_chunk::<HEADER_BYTES>()?;
        matches!(kind, TEXT | BINARY).then_some(u32::from_le_bytes(length) as usize)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.from == self.bytes.len()
    }

    /// Bytes of the messages that have not been taken.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.from
    }

    /// Bytes of memory.
    pub(crate) fn heap_bytes(&self) -> usize {
        self.bytes.capacity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_returned_whole_and_in_order() {
        let mut held = Held::default();
        let text = |number: u32| number.to_string().repeat(number as usize % 9);
        fn input(number: u32, text: &str) -> Input<'_> {
            let payload = text.as_bytes();
            match number % 6 {
                0 => Input::Message(Message { kind: MessageKind::Text, payload }),
                1 => Input::Message(Message { kind: MessageKind::Binary, payload }),
                2 => Input::Control(Control::Ping(payload)),
                3 => Input::Control(Control::Pong(payload)),
                4 => Input::Control(Control::Close(None)),
                _ => Input::Control(Control::Close(Some((CloseCode(4321), text)))),
            }
        }
        let (mut pushed, mut popped) = (0, 0);
        for round in 0..200 {
            for _ in 0..round % 7 {
                held.push(input(pushed, &text(pushed)));
                pushed += 1;
            }
            for _ in 0..round % 5 {
                let Some(found) = held.pop() else { break };
                assert_eq!(found, input(popped, &text(popped)));
                popped += 1;
            }
        }
        while held.pop().is_some() {
            popped += 1;
        }
        assert_eq!((popped, held.is_empty(), held.len()), (pushed, true, 0));
    }

    #[test]
    fn the_memory_of_taken_messages_is_reused() {
        let mut held = Held::default();
        for _ in 0..10_000 {
            held.push(Input::Message(Message { kind: MessageKind::Binary, payload: &[0; 100] }));
            assert!(held.pop().is_some());
        }
        assert!(held.heap_bytes() < 1000, "{}", held.heap_bytes());
    }
}
