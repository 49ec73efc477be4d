//! The client side of a connection, which does what the history tells it.
//!
//! Checks what it receives meanwhile: whole frames of its encoding, nothing after a Close. Never waits.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use shardcast_engine::{Frame, Payload};
use testkit::frames::{BINARY, CLOSE, FIN, FrameReader, PING, PONG, client_frame, close_code};

/// Nobody sends a longer payload.
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) stream: Option<UnixStream>,
    unread: FrameReader,
    /// The numbers of the frames that it received.
    pub(crate) heard: Vec<u32>,
    /// Pings that it has not answered.
    pub(crate) pings: Vec<Vec<u8>>,
    pub(crate) pongs: Vec<u32>,
    pub(crate) closes: Vec<Option<u16>>,
    pub(crate) is_over: bool,
    /// What the kernel has not taken.
    unsent: Vec<u8>,
    /// Messages, all sent before the Close.
    pub(crate) said: u32,
    /// The message of which it has sent the first fragment.
    pub(crate) in_fragments: Option<u32>,
    pub(crate) pings_said: u32,
    pub(crate) has_said_close: bool,
    /// Frames that addressed it when it sent Close.
    pub(crate) expected_at_close: usize,
    /// It has broken the protocol, or sent too much.
    pub(crate) is_faulty: bool,
    /// It has asked its handler to panic.
    pub(crate) asked_for_panic: bool,
    /// Its socket is closed or has been shut down.
    pub(crate) is_broken: bool,
    /// It reads and answers at once.
    pub(crate) is_good: bool,
    /// The prefix that its encoding puts in front of each payload.
    prefix_bytes: usize,
}

/// The lengths of the encodings' prefixes, in bytes.
pub(crate) const PREFIXES: [usize; 2] = [1, 200];
const PREFIX: u8 = 0xEE;

/// Makes the frames of an encoding.
pub(crate) fn prefixed(bytes: usize) -> impl Fn(&Payload) -> Frame {
    move |payload| Frame::binary(&[&vec![PREFIX; bytes], payload.bytes()].concat())
}

/// A frame with its number in every byte.
pub(crate) fn numbered_frame(number: u32, bytes: usize) -> Payload {
    let mut payload = number.to_be_bytes().to_vec();
    payload.resize(4 + bytes, number as u8);
    Payload::binary(&payload)
}

impl Peer {
    pub(crate) fn new(stream: UnixStream, is_good: bool, prefix_bytes: usize) -> Self {
        stream.set_nonblocking(true).unwrap();
        Self {
            stream: Some(stream),
            unread: FrameReader::new(PAYLOAD_BYTES_MAX),
            heard: Vec::new(),
            pings: Vec::new(),
            pongs: Vec::new(),
            closes: Vec::new(),
            is_over: false,
            unsent: Vec::new(),
            said: 0,
            in_fragments: None,
            pings_said: 0,
            has_said_close: false,
            expected_at_close: 0,
            is_faulty: false,
            asked_for_panic: false,
            is_broken: false,
            is_good,
            prefix_bytes,
        }
    }

    pub(crate) fn say(&mut self, first_byte: u8, payload: &[u8]) {
        self.unsent.extend(client_frame(first_byte, payload));
        self.send();
    }

    /// Passes to the kernel as much as it accepts.
    pub(crate) fn send(&mut self) {
        while !self.unsent.is_empty() && self.send_some(usize::MAX) {}
    }

    /// Passes at most `max` bytes to the kernel; returns whether it accepted any.
    pub(crate) fn send_some(&mut self, max: usize) -> bool {
        let Some(stream) = &mut self.stream else {
            self.unsent.clear();
            return false;
        };
        let end = self.unsent.len().min(max);
        match stream.write(&self.unsent[..end]) {
            Ok(count) => {
                self.unsent.drain(..count);
                count > 0
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(_) => {
                self.is_broken = true;
                self.unsent.clear();
                false
            }
        }
    }

    /// Takes at most `max` bytes from the kernel.
    pub(crate) fn read(&mut self, max: usize) {
        let Some(stream) = &mut self.stream else { return };
        let mut buffer = vec![0; max.min(1 << 16)];
        let mut left = max;
        while left > 0 {
            let end = left.min(buffer.len());
            match stream.read(&mut buffer[..end]) {
                Ok(count @ 1..) => {
                    self.unread.feed(&buffer[..count]);
                    left -= count;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Ok(0) | Err(_) => {
                    self.is_over = true;
                    break;
                }
            }
        }
        while let Some((opcode, payload)) = self.unread.next_frame() {
            match opcode {
                BINARY => {
                    assert!(self.closes.is_empty(), "data behind a Close");
                    let (prefix, payload) = payload.split_at(self.prefix_bytes);
                    assert!(prefix.iter().all(|byte| *byte == PREFIX), "a frame in another encoding");
                    let number = number_in(payload);
                    let is_whole = payload[4..].iter().all(|byte| *byte == number as u8);
                    assert!(is_whole, "a frame's bytes are mixed up");
                    self.heard.push(number);
                }
                CLOSE => self.closes.push(close_code(&payload)),
                PING => self.pings.push(payload),
                PONG => self.pongs.push(number_in(&payload)),
                opcode => panic!("opcode {opcode}"),
            }
        }
    }

    pub(crate) fn answer_pings(&mut self) {
        for ping in std::mem::take(&mut self.pings) {
            if !self.has_said_close {
                self.say(FIN | PONG, &ping);
            }
        }
    }

    /// Changes whenever something happens between it and the engine.
    pub(crate) fn progress(&self) -> (usize, usize, usize, bool) {
        (self.heard.len(), self.unread.unread_bytes(), self.unsent.len(), self.is_over)
    }
}

pub(crate) fn number_in(payload: &[u8]) -> u32 {
    u32::from_be_bytes(payload[..4].try_into().unwrap())
}
