//! WebSocket frames (RFC 6455, section 5.2): those of a client are written, those of a server are read.
//!
//! Independent of the engine's own frame code, because a test that used that code would judge it by itself. Slow and
//! simple on purpose. Knows bytes. Does not know sockets or what a message means.

/// First byte: the last frame of its message.
pub const FIN: u8 = 0x80;
/// Opcode: a text message.
pub const TEXT: u8 = 0x1;
/// Opcode: a binary message.
pub const BINARY: u8 = 0x2;
/// Opcode: a Close frame.
pub const CLOSE: u8 = 0x8;
/// Opcode: a ping.
pub const PING: u8 = 0x9;
/// Opcode: a pong.
pub const PONG: u8 = 0xA;

/// Second byte: the payload is masked.
const MASKED: u8 = 0x80;
const MASKING_KEY: [u8; 4] = [0x12, 0x34, 0x56, 0x78];

/// A masked frame as a client sends it: `first_byte` is the opcode with [`FIN`] and the reserved bits.
pub fn client_frame(first_byte: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first_byte];
    match payload.len() {
        length @ 0..126 => frame.push(MASKED | length as u8),
        length @ 126..65_536 => {
            frame.push(MASKED | 126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(MASKED | 127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(MASKING_KEY);
    frame.extend(payload.iter().zip(MASKING_KEY.iter().cycle()).map(|(byte, key)| byte ^ key));
    frame
}

/// A text message in one masked frame.
pub fn client_text(text: &str) -> Vec<u8> {
    client_frame(FIN | TEXT, text.as_bytes())
}

/// The frames in what a server has sent, whatever pieces it arrived in.
///
/// Panics if a frame is fragmented, masked, uses a reserved bit, or claims more than the limit.
#[derive(Debug)]
pub struct FrameReader {
    bytes: Vec<u8>,
    /// Where the first frame that was not returned begins.
    start: usize,
    payload_bytes_max: usize,
}

impl FrameReader {
    /// `payload_bytes_max` is the longest payload that the test expects: a wrong length is found at once, and not by a
    /// test that waits for the rest.
    pub fn new(payload_bytes_max: usize) -> Self {
        Self { bytes: Vec::new(), start: 0, payload_bytes_max }
    }

    /// Adds bytes that were received.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// How many bytes of an unfinished frame, and of frames that were not asked for, there are.
    pub fn unread_bytes(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// The next frame, its opcode and its payload; none while it is incomplete.
    pub fn next_frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let bytes = &self.bytes[self.start..];
        let &[first, second, ref rest @ ..] = bytes else { return None };
        assert_eq!(first & 0xF0, FIN, "a fragment or a reserved bit: {first:#04x}");
        assert_eq!(second & MASKED, 0, "a server does not mask");
        let (header_bytes, length) = match second {
            126 => (4, u64::from(u16::from_be_bytes(*rest.first_chunk()?))),
            127 => (10, u64::from_be_bytes(*rest.first_chunk()?)),
            length => (2, u64::from(length)),
        };
        assert!(length <= self.payload_bytes_max as u64, "no test sends {length} bytes");
        let end = header_bytes + length as usize;
        let payload = bytes.get(header_bytes..end)?.to_vec();
        self.start += end;
        Some((first & 0x0F, payload))
    }
}

/// The code in the payload of a Close frame, if there is one. Panics if there is half of one.
pub fn close_code(payload: &[u8]) -> Option<u16> {
    assert_ne!(payload.len(), 1, "half a close code");
    payload.first_chunk().map(|code| u16::from_be_bytes(*code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_frame_has_the_shortest_length_and_a_masked_payload() {
        assert_eq!(client_text("Az"), [0x81, 0x82, 0x12, 0x34, 0x56, 0x78, b'A' ^ 0x12, b'z' ^ 0x34]);
        let header = |length| client_frame(FIN | BINARY, &vec![0; length])[..10].to_vec();
        assert_eq!(header(125)[..3], [0x82, 0xFD, 0x12]);
        assert_eq!(header(126)[..5], [0x82, 0xFE, 0, 126, 0x12]);
        assert_eq!(header(65_535)[..5], [0x82, 0xFE, 0xFF, 0xFF, 0x12]);
        assert_eq!(header(65_536), [0x82, 0xFF, 0, 0, 0, 0, 0, 1, 0, 0]);
    }

    /// A frame as a server sends it, by its header.
    fn server_frame(header: &[u8], length: usize) -> (Vec<u8>, Vec<u8>) {
        let payload: Vec<u8> = (0..length).map(|index| index as u8).collect();
        ([header, &payload].concat(), payload)
    }

    #[test]
    fn frames_are_found_wherever_the_stream_is_cut() {
        let (short, short_payload) = server_frame(&[0x81, 125], 125);
        let (medium, medium_payload) = server_frame(&[0x82, 126, 1, 0], 256);
        let (long, long_payload) = server_frame(&[0x89, 127, 0, 0, 0, 0, 0, 1, 0, 0], 65_536);
        let stream = [short, medium, long].concat();
        let expected = [(TEXT, short_payload), (BINARY, medium_payload), (PING, long_payload)];
        for piece_bytes in [1, 2, 7, 130, stream.len()] {
            let mut reader = FrameReader::new(65_536);
            let mut frames = Vec::new();
            for piece in stream.chunks(piece_bytes) {
                reader.feed(piece);
                frames.extend(std::iter::from_fn(|| reader.next_frame()));
            }
            assert!(frames == expected, "in pieces of {piece_bytes} bytes");
            assert_eq!(reader.unread_bytes(), 0);
        }
    }

    #[test]
    #[should_panic(expected = "a server does not mask")]
    fn a_masked_frame_from_a_server_is_refused() {
        let mut reader = FrameReader::new(1000);
        reader.feed(&client_text("hello"));
        reader.next_frame();
    }

    #[test]
    #[should_panic(expected = "a fragment or a reserved bit")]
    fn a_fragment_from_a_server_is_refused() {
        let mut reader = FrameReader::new(1000);
        reader.feed(&[0x01, 0x00]);
        reader.next_frame();
    }

    #[test]
    #[should_panic(expected = "no test sends")]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_arrive() {
        let mut reader = FrameReader::new(1000);
        reader.feed(&[0x82, 126, 0x03, 0xE9]);
        reader.next_frame();
    }
}
