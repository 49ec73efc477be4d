//! The batch: consecutive publications to the same group, as one chunk of memory for each encoding.
//!
//! Lives for one fan-out on one shard. The plain frames are joined at once, those of another encoding when
//! the first connection needs them: renditions that the publishers have made are used, missing ones are
//! rendered here, once for the shard. Knows which connections must not get which of them, and not which get it.

use std::ops::Range;
use std::rc::Rc;

use smallvec::SmallVec;

use crate::entry::Entry;
use crate::frame::Frame;
use crate::id::ConnectionId;
use crate::log::{Reader, Weigh};
use crate::outbox::{Chunk, Retained};
use crate::payload::Payload;
use crate::receipt::Ticket;
use crate::rendition::{Encoding, Encodings};

/// Connections that a message may leave out and yet be joined with others: usually it is its sender.
const EXCEPT_MAX: usize = 4;

/// One for each publication of a batch, or of a single one; those without at the end are left out.
pub(crate) type Tickets = SmallVec<[Option<Ticket>; 1]>;

pub(crate) struct Batch<'a> {
    /// Its cursor is at the first publication.
    reader: &'a Reader<Entry>,
    len: u64,
    encodings: &'a Encodings,
    retained: Retained,
    plain: Rc<Chunk>,
    /// Which connections must not get which of its publications; sorted.
    exceptions: SmallVec<[(ConnectionId, u32); 4]>,
    /// None where not even the first could be rendered.
    others: SmallVec<[(Encoding, Option<Rc<Chunk>>); 1]>,
}

impl<'a> Batch<'a> {
    /// The messages at the reader's cursor: `first` and, if `joined` is set, those after it that go to the same
    /// group in the same way, up to the position `limit` and `bytes_max` bytes in total.
    pub(crate) fn new(
        reader: &'a Reader<Entry>,
        first: (&Entry, &Payload),
        joined: Option<(u64, usize)>,
        encodings: &'a Encodings,
        retained: &Retained,
    ) -> Self {
        // With other encodings a connection might be ended for a message that it must not get: a batch ends where the
        // first one cannot be rendered.
        let except_max = if encodings.has_any() { 0 } else { EXCEPT_MAX };
        let count = |(limit, bytes_max)| count_joined(reader, first.0, except_max, limit, bytes_max);
        let len = joined.map_or(1, count);
        let plain = if len == 1 {
            Chunk::single(first.1.plain_frame().bytes(), retained)
        } else {
            let frames = || payloads(reader, len).map(|(_, payload)| payload.plain_frame().as_bytes());
            Chunk::joined(frames(), frames().map(<[u8]>::len).sum(), retained)
        };
        let mut exceptions = SmallVec::new();
        for ahead in 0..len {
            let except = reader.get(ahead).map_or(&[][..], |entry| &entry.publication.except);
            exceptions.extend(except.iter().map(|id| (*id, ahead as u32)));
        }
        exceptions.sort_unstable();
        let (plain, others) = (Rc::new(plain), SmallVec::new());
        Self { reader, len, encodings, retained: retained.clone(), plain, exceptions, others }
    }

    /// The number of publications in it.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Adds to the ticket of its first publication those of the others, up to the last that has one for this shard.
    pub(crate) fn take_tickets(&self, shard: usize, tickets: &mut Tickets) {
        for ahead in 1..self.len {
            if let Some(ticket) = self.reader.get(ahead).and_then(|entry| entry.take_ticket(shard)) {
                tickets.resize_with(ahead as usize, || None);
                tickets.push(Some(ticket));
            }
        }
    }

    /// Whether a connection must not get some of its publications.
    #[inline]
    pub(crate) fn leaves_out(&self, id: ConnectionId) -> bool {
        !self.exceptions.is_empty() && !self.exceptions_of(id).is_empty()
    }

    /// The runs of publications that a connection gets which must not get others.
    pub(crate) fn runs_for(&self, id: ConnectionId) -> impl Iterator<Item = Range<u32>> + use<'_> {
        let left_out = self.exceptions_of(id).iter().map(|(_, publication)| *publication);
        let mut start = 0;
        let runs =
            left_out.chain([self.len as u32]).map(move |end| std::mem::replace(&mut start, end + 1)..end);
        runs.filter(|run| !run.is_empty())
    }

    fn exceptions_of(&self, id: ConnectionId) -> &[(ConnectionId, u32)] {
        let from = self.exceptions.partition_point(|(other, _)| *other < id);
        let exceptions = &self.exceptions[from..];
        &exceptions[..exceptions.partition_point(|(other, _)| *other == id)]
    }

    /// Its frames in this encoding, and how many are missing because they cannot be made.
    #[inline]
    pub(crate) fn chunk(&mut self, encoding: Encoding) -> (Option<&Rc<Chunk>>, u64) {
        if encoding.is_plain() { (Some(&self.plain), 0) } else { self.other(encoding) }
    }

    fn other(&mut self, encoding: Encoding) -> (Option<&Rc<Chunk>>, u64) {
        let made = self.others.iter().position(|(made, _)| *made == encoding);
        let index = made.unwrap_or_else(|| {
            let chunk = self.render(encoding).map(Rc::new);
            self.others.push((encoding, chunk));
            self.others.len() - 1
        });
        let chunk = self.others[index].1.as_ref();
        (chunk, self.len - chunk.map_or(0, |chunk| chunk.frames().into()))
    }

    /// The frames up to the first that cannot be made: the connections are closed in its place.
    fn render(&self, encoding: Encoding) -> Option<Chunk> {
        let mut bytes = 0;
        let frame = |(entry, payload): (&Entry, &Payload)| {
            let frame = match entry.renditions.get(encoding) {
                Some(frame) => frame.clone(),
                None => self.encodings.render(encoding, payload)?,
            };
            bytes += frame.len();
            (bytes <= Frame::BYTES_MAX).then_some(frame)
        };
        let frames: SmallVec<[Frame; 1]> = payloads(self.reader, self.len).map_while(frame).collect();
        match &frames[..] {
            [] => None,
            [frame] => Some(Chunk::single(frame.bytes(), &self.retained)),
            _ => {
                let bytes = frames.iter().map(Frame::len).sum();
                Some(Chunk::joined(frames.iter().map(Frame::as_bytes), bytes, &self.retained))
            }
        }
    }
}

/// How many publications from the cursor on can be joined, the first included.
fn count_joined(
    reader: &Reader<Entry>,
    first: &Entry,
    except_max: usize,
    limit: u64,
    bytes_max: usize,
) -> u64 {
    let (ahead, mut len, mut bytes) = (limit - reader.position(), 1, first.bytes());
    while len < ahead
        && let Some(next) = reader.get(len)
        && next.joins(first, except_max)
        && bytes + next.bytes() <= bytes_max as u64
    {
        bytes += next.bytes();
        len += 1;
    }
    len
}

/// The next `len` messages from the cursor on.
fn payloads(reader: &Reader<Entry>, len: u64) -> impl Iterator<Item = (&Entry, &Payload)> {
    (0..len).filter_map(|ahead| {
        let entry = reader.get(ahead)?;
        Some((entry, entry.payload()?))
    })
}
