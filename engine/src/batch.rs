//! The batch: consecutive publications to the same connections, as one chunk of memory for each encoding.
//!
//! Lives for one fan-out on one shard. The plain frames are joined at once, those of another encoding when
//! the first connection needs them: renditions that the publishers have made are used, missing ones are
//! rendered here, once for the shard. Does not know which connections get it.

use std::rc::Rc;

use smallvec::SmallVec;

use crate::entry::Entry;
use crate::frame::Frame;
use crate::log::Reader;
use crate::outbox::{Chunk, Retained};
use crate::payload::Payload;
use crate::rendition::{Encoding, Encodings};

pub(crate) struct Batch<'a> {
    /// Its cursor is at the first publication.
    reader: &'a Reader<Entry>,
    len: u64,
    encodings: &'a Encodings,
    retained: Retained,
    plain: Rc<Chunk>,
    /// None where rendering failed.
    others: SmallVec<[(Encoding, Option<Rc<Chunk>>); 1]>,
}

impl<'a> Batch<'a> {
    /// The message at the reader's cursor and, if `joined` is set, those after it that go to the same
    /// connections in the same way: up to the position `limit`, and `bytes_max` bytes in total.
    pub(crate) fn new(
        reader: &'a Reader<Entry>,
        first: &Payload,
        joined: Option<(u64, usize)>,
        encodings: &'a Encodings,
        retained: &Retained,
    ) -> Self {
        let (len, bytes) = joined.map_or((1, 0), |(limit, bytes_max)| measure(reader, limit, bytes_max));
        let plain = if len == 1 {
            Chunk::single(first.plain_frame().bytes(), retained)
        } else {
            let frames = payloads(reader, len).map(|(_, payload)| payload.plain_frame().as_bytes());
            Chunk::joined(frames, bytes, retained)
        };
        let (plain, others) = (Rc::new(plain), SmallVec::new());
        Self { reader, len, encodings, retained: retained.clone(), plain, others }
    }

    /// The number of publications in it.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Its frames in this encoding; none if they cannot be made.
    #[inline]
    pub(crate) fn chunk(&mut self, encoding: Encoding) -> Option<&Rc<Chunk>> {
        if encoding.is_plain() { Some(&self.plain) } else { self.other(encoding) }
    }

    fn other(&mut self, encoding: Encoding) -> Option<&Rc<Chunk>> {
        let made = self.others.iter().position(|(made, _)| *made == encoding);
        let index = made.unwrap_or_else(|| {
            let chunk = self.render(encoding).map(Rc::new);
            self.others.push((encoding, chunk));
            self.others.len() - 1
        });
        self.others[index].1.as_ref()
    }

    fn render(&self, encoding: Encoding) -> Option<Chunk> {
        let frame = |(entry, payload): (&Entry, &Payload)| match entry.renditions.get(encoding) {
            Some(frame) => Some(frame.clone()),
            None => self.encodings.render(encoding, payload),
        };
        let frames: SmallVec<[Frame; 1]> =
            payloads(self.reader, self.len).map(frame).collect::<Option<_>>()?;
        if let [frame] = &frames[..] {
            return Some(Chunk::single(frame.bytes(), &self.retained));
        }
        let bytes = frames.iter().map(Frame::len).sum::<usize>();
        if bytes > Frame::BYTES_MAX {
            tracing::error!(
                bytes,
                "the frames that an encoding made for a batch are too long; connections that need them are closed"
            );
            return None;
        }
        Some(Chunk::joined(frames.iter().map(Frame::as_bytes), bytes, &self.retained))
    }
}

/// The number of publications from the cursor on that can be joined, at least 1, and the bytes of their plain frames.
fn measure(reader: &Reader<Entry>, limit: u64, bytes_max: usize) -> (u64, usize) {
    let ahead = limit - reader.position();
    let Some((first, payload)) = payloads(reader, 1).next() else { return (1, 0) };
    // In an outbox it may take more than its plain frame.
    let weight =
        |entry: &Entry, payload: &Payload| payload.plain_frame().len().max(entry.renditions.longest());
    let (mut len, mut bytes, mut heaviest) = (1, payload.plain_frame().len(), weight(first, payload));
    while len < ahead
        && let Some(next) = reader.get(len)
        && next.joins(first)
        && let Some(payload) = next.payload()
        && heaviest + weight(next, payload) <= bytes_max
    {
        heaviest += weight(next, payload);
        bytes += payload.plain_frame().len();
        len += 1;
    }
    (len, bytes)
}

/// The next `len` messages from the cursor on.
fn payloads(reader: &Reader<Entry>, len: u64) -> impl Iterator<Item = (&Entry, &Payload)> {
    (0..len).filter_map(|ahead| {
        let entry = reader.get(ahead)?;
        Some((entry, entry.payload()?))
    })
}
