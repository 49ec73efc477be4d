//! Messages that were read and must wait: their handler is busy, or they exceed a rate limit.
//!
//! Owned by one connection, and exists only while it is needed. Control frames must be answered meanwhile,
//! so reading continues for a while, and messages wait here, one after the other in one buffer.
//! Knows messages. Does not bound itself: its owner stops reading (backpressure).

use crate::frame::MessageKind;

/// Before each message in the buffer: its kind and its length.
const HEADER_BYTES: usize = 5;

#[derive(Debug, Default)]
pub(crate) struct Held {
    bytes: Vec<u8>,
    /// Where the first message that has not been taken begins.
    from: usize,
}

impl Held {
    pub(crate) fn push(&mut self, kind: MessageKind, payload: &[u8]) {
        if self.from > self.bytes.len() / 2 {
            self.bytes.drain(..self.from);
            self.from = 0;
        }
        // A message is at most 1 GiB long, see `ConnectionConfig::max_message_bytes`.
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        self.bytes.push((kind == MessageKind::Text).into());
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(&payload[..length as usize]);
    }

    /// Takes the first message.
    pub(crate) fn pop(&mut self) -> Option<(MessageKind, &[u8])> {
        let left = &self.bytes[self.from..];
        let (header, rest) = left.split_at_checked(HEADER_BYTES)?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let payload = rest.get(..length)?;
        self.from += HEADER_BYTES + length;
        Some((if header[0] == 1 { MessageKind::Text } else { MessageKind::Binary }, payload))
    }

    /// Bytes of the first message.
    pub(crate) fn next_len(&self) -> Option<usize> {
        let [_, length @ ..] = *self.bytes[self.from..].first_chunk::<HEADER_BYTES>()?;
        Some(u32::from_le_bytes(length) as usize)
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
        let message =
            |number: u32| (number.to_string().repeat(number as usize % 9), number.is_multiple_of(2));
        let kind = |is_text| if is_text { MessageKind::Text } else { MessageKind::Binary };
        let (mut pushed, mut popped) = (0, 0);
        for round in 0..200 {
            for _ in 0..round % 7 {
                let (text, is_text) = message(pushed);
                held.push(kind(is_text), text.as_bytes());
                pushed += 1;
            }
            for _ in 0..round % 5 {
                let Some((found, payload)) = held.pop() else { break };
                let (text, is_text) = message(popped);
                assert_eq!((found, payload), (kind(is_text), text.as_bytes()));
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
            held.push(MessageKind::Binary, &[0; 100]);
            assert!(held.pop().is_some());
        }
        assert!(held.heap_bytes() < 1000, "{}", held.heap_bytes());
    }
}
