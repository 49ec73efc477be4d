//! The client side of a connection, which does what the history tells it.
//!
//! Implements its own small part of RFC 6455 and checks its input meanwhile: whole frames, nothing after a
//! Close. Never waits.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use shardcast_engine::{Frame, Payload};

#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) stream: Option<UnixStream>,
    unread: Vec<u8>,
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
            unread: Vec::new(),
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
        let mut frame = vec![first_byte];
        match payload.len() {
            length @ 0..126 => frame.push(0x80 | length as u8),
            length => {
                frame.push(0x80 | 126);
                frame.extend((length as u16).to_be_bytes());
            }
        }
        let mask = [0x12, 0x34, 0x56, 0x78];
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
        self.unsent.extend(frame);
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
                    self.unread.extend_from_slice(&buffer[..count]);
                    left -= count;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Ok(0) | Err(_) => {
                    self.is_over = true;
                    break;
                }
            }
        }
        let mut at = 0;
        while let Some((first_byte, payload, end)) = parse(&self.unread, at) {
            match first_byte {
                0x82 => {
                    assert!(self.closes.is_empty(), "data behind a Close");
                    let (prefix, payload) = payload.split_at(self.prefix_bytes);
                    assert!(prefix.iter().all(|byte| *byte == PREFIX), "a frame in another encoding");
                    let number = number_in(payload);
                    let is_whole = payload[4..].iter().all(|byte| *byte == number as u8);
                    assert!(is_whole, "a frame's bytes are mixed up");
                    self.heard.push(number);
                }
                0x88 => self.closes.push(payload.get(..2).map(|code| u16::from_be_bytes([code[0], code[1]]))),
                0x89 => self.pings.push(payload.to_vec()),
                0x8A => self.pongs.push(number_in(payload)),
                other => panic!("a frame that begins with {other:x}"),
            }
            at = end;
        }
        self.unread.drain(..at);
    }

    pub(crate) fn answer_pings(&mut self) {
        for ping in std::mem::take(&mut self.pings) {
            if !self.has_said_close {
                self.say(0x8A, &ping);
            }
        }
    }

    /// Changes whenever something happens between it and the engine.
    pub(crate) fn progress(&self) -> (usize, usize, usize, bool) {
        (self.heard.len(), self.unread.len(), self.unsent.len(), self.is_over)
    }
}

pub(crate) fn number_in(payload: &[u8]) -> u32 {
    u32::from_be_bytes(payload[..4].try_into().unwrap())
}

/// The frame at an offset: its first byte, its payload, its end.
fn parse(bytes: &[u8], at: usize) -> Option<(u8, &[u8], usize)> {
    let bytes = &bytes[at..];
    let (first_byte, second) = (*bytes.first()?, *bytes.get(1)?);
    let (start, length) = match second {
        126 => (4, u16::from_be_bytes(bytes.get(2..4)?.try_into().unwrap()) as usize),
        127 => (10, u64::from_be_bytes(bytes.get(2..10)?.try_into().unwrap()) as usize),
        length => (2, length as usize),
    };
    assert!(length < 1 << 20, "a mask bit, or a length that nobody sends");
    Some((first_byte, bytes.get(start..start + length)?, at + start + length))
}
