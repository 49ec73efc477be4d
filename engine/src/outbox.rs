//! The outbox: frames that one peer has not taken yet.
//!
//! Owned by one shard, never shared. Bounded in frames and in bytes, because a peer that
//! stops reading must cost a known amount of memory and nothing else. Nothing is
//! allocated while at most one piece is queued. Beyond the bound frames wait, with the
//! tickets of those who await them. Control frames go first, never inside a frame.
//! Knows frames. Does not know sockets, time, groups or other connections.

use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use smallvec::SmallVec;

/// One or more whole frames behind each other in one piece of memory, shared by every
/// connection of a shard that gets them.
#[derive(Debug)]
pub(crate) struct Chunk {
    bytes: Bytes,
    /// Where each frame ends.
    ends: SmallVec<[u32; 2]>,
}

impl Chunk {
    pub(crate) fn single(frame: Bytes) -> Self {
        let ends = SmallVec::from_slice(&[frame.len() as u32]);
        Self { bytes: frame, ends }
    }

    pub(crate) fn joined<'a>(frames: impl Iterator<Item = &'a [u8]>, bytes: usize) -> Self {
        let mut all = Vec::with_capacity(bytes);
        let ends = frames
            .map(|frame| {
                all.extend_from_slice(frame);
                all.len() as u32
            })
            .collect();
        Self { bytes: all.into(), ends }
    }

    pub(crate) fn frames(&self) -> u32 {
        self.ends.len() as u32
    }

    fn start(&self, frame: u32) -> u32 {
        if frame == 0 { 0 } else { self.ends[frame as usize - 1] }
    }

    fn end(&self, frames: u32) -> u32 {
        self.start(frames)
    }
}

/// A run of frames of a chunk: from `next` to before `end`.
#[derive(Debug, Clone)]
struct Segment {
    chunk: Rc<Chunk>,
    next: u32,
    end: u32,
}

impl Segment {
    fn frames(&self) -> u32 {
        self.end - self.next
    }

    fn bytes(&self) -> usize {
        (self.chunk.end(self.end) - self.chunk.start(self.next)) as usize
    }

    fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.chunk, &other.chunk) && self.next == other.next && self.end == other.end
    }
}

/// Frames beyond the bound; `ticket` is dropped when they are taken or gone.
#[derive(Debug)]
struct Waiting<T> {
    segment: Segment,
    _ticket: Option<T>,
}

/// The bounds of an outbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) frames: usize,
    pub(crate) bytes: usize,
    pub(crate) waiting: usize,
}

/// `T` is held for as long as a frame waits.
#[derive(Debug)]
pub(crate) struct Outbox<T> {
    front: Option<Segment>,
    /// How much of the front's chunk has been written.
    offset: u32,
    frames: u32,
    bytes: usize,
    more: Option<Box<More<T>>>,
}

#[derive(Debug)]
struct More<T> {
    rest: VecDeque<Segment>,
    waiting: VecDeque<Waiting<T>>,
    waiting_frames: usize,
    control: Vec<u8>,
    /// Where in `control` the write stopped inside a control frame.
    control_written: usize,
}

impl<T> Default for More<T> {
    fn default() -> Self {
        Self {
            rest: VecDeque::new(),
            waiting: VecDeque::new(),
            waiting_frames: 0,
            control: Vec::new(),
            control_written: 0,
        }
    }
}

/// Control frames that wait for their turn, at most: beyond it the unanswered pings
/// before the last are forgotten, as RFC 6455 (5.5.3) allows.
const CONTROL_BYTES_MAX: usize = 4096;

/// What `offer` did with the frames.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// All are within the bound.
    Queued,
    /// Some wait for room.
    Waits,
    /// More would wait than may: the peer is too slow to keep.
    Overflow,
}

/// What is to be written next.
#[derive(Debug)]
pub(crate) enum Next<'a> {
    Nothing,
    Control(&'a [u8]),
    /// Bytes of one piece.
    Data(&'a [u8]),
    /// Several pieces: gather them.
    Pieces,
}

impl<T> Outbox<T> {
    pub(crate) fn new() -> Self {
        Self { front: None, offset: 0, frames: 0, bytes: 0, more: None }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.front.is_none() && self.more.is_none()
    }

    /// Frames not wholly written, the waiting ones included.
    pub(crate) fn pending(&self) -> u64 {
        u64::from(self.frames) + self.more.as_ref().map_or(0, |more| more.waiting_frames as u64)
    }

    /// Appends all frames of `chunk`, as far as the bounds allow; what does not fit waits with `ticket`.
    pub(crate) fn offer(&mut self, chunk: &Rc<Chunk>, bounds: &Bounds, ticket: Option<T>) -> Offer {
        let all = Segment { chunk: chunk.clone(), next: 0, end: chunk.frames() };
        if !self.has_waiting() {
            let fitting = self.fitting(&all, bounds);
            if fitting == all.end {
                self.append(all);
                return Offer::Queued;
            }
            if fitting > 0 {
                self.append(Segment { end: fitting, ..all.clone() });
            }
            return self.wait(Segment { next: fitting, ..all }, bounds, ticket);
        }
        self.wait(all, bounds, ticket)
    }

    fn wait(&mut self, segment: Segment, bounds: &Bounds, ticket: Option<T>) -> Offer {
        let more = self.more.get_or_insert_default();
        more.waiting_frames += segment.frames() as usize;
        more.waiting.push_back(Waiting { segment, _ticket: ticket });
        if more.waiting_frames > bounds.waiting { Offer::Overflow } else { Offer::Waits }
    }

    /// How many of the segment's frames, up to which index, fit within the bounds.
    fn fitting(&self, segment: &Segment, bounds: &Bounds) -> u32 {
        let room = bounds.frames.saturating_sub(self.frames as usize);
        if segment.frames() as usize <= room && self.bytes + segment.bytes() <= bounds.bytes {
            return segment.end;
        }
        let last = segment.next + (room.min(segment.frames() as usize) as u32);
        let start = segment.chunk.start(segment.next);
        let within = |end: &u32| self.bytes + (segment.chunk.end(*end) - start) as usize <= bounds.bytes;
        let fitting = (segment.next + 1..=last).take_while(within).last().unwrap_or(segment.next);
        // A frame larger than the whole bound has to pass as well: alone.
        if fitting == segment.next && self.frames == 0 { segment.next + 1 } else { fitting }
    }

    fn append(&mut self, segment: Segment) {
        self.frames += segment.frames();
        self.bytes += segment.bytes();
        if self.front.is_none() {
            self.offset = segment.chunk.start(segment.next);
            self.front = Some(segment);
        } else {
            self.more.get_or_insert_default().rest.push_back(segment);
        }
    }

    fn has_waiting(&self) -> bool {
        self.more.as_ref().is_some_and(|more| !more.waiting.is_empty())
    }

    /// Whether a publisher should wait for this peer: more than half full.
    pub(crate) fn is_congested(&self, bounds: &Bounds) -> bool {
        self.frames as usize > bounds.frames / 2 || self.bytes > bounds.bytes / 2 || self.has_waiting()
    }

    /// Whether a congested outbox has recovered: at most a quarter full.
    pub(crate) fn is_relieved(&self, bounds: &Bounds) -> bool {
        self.frames as usize <= bounds.frames / 4 && self.bytes <= bounds.bytes / 4 && !self.has_waiting()
    }

    /// Queues a control frame before all data, but behind the frame that is being written.
    pub(crate) fn push_control(&mut self, frame: &[u8]) {
        let more = self.more.get_or_insert_default();
        if more.control.len() + frame.len() > CONTROL_BYTES_MAX {
            let begun = control_frame_end(&more.control, more.control_written);
            more.control.truncate(begun);
        }
        more.control.extend_from_slice(frame);
    }

    pub(crate) fn next(&self) -> Next<'_> {
        let control = self.more.as_ref().map_or(&[][..], |more| &more.control[more.control_written..]);
        let Some(front) = &self.front else {
            return if control.is_empty() { Next::Nothing } else { Next::Control(control) };
        };
        let offset = self.offset as usize;
        if !control.is_empty() {
            let more = self.more.as_ref().is_some_and(|more| more.control_written > 0);
            if more || self.offset == front.chunk.start(front.next) {
                return Next::Control(control);
            }
            return Next::Data(&front.chunk.bytes[offset..front.chunk.end(front.next + 1) as usize]);
        }
        if self.more.as_ref().is_some_and(|more| !more.rest.is_empty()) {
            return Next::Pieces;
        }
        Next::Data(&front.chunk.bytes[offset..front.chunk.end(front.end) as usize])
    }

    /// `count` bytes of the control frames were written.
    pub(crate) fn wrote_control(&mut self, count: usize) {
        let Some(more) = &mut self.more else { return };
        more.control_written += count;
        if more.control_written == more.control.len() {
            more.control = Vec::new();
            more.control_written = 0;
        } else {
            // Whole frames go, so that `control_written > 0` means "inside a frame".
            let mut whole = 0;
            while control_frame_end(&more.control, whole + 1) <= more.control_written {
                whole = control_frame_end(&more.control, whole + 1);
            }
            more.control.drain(..whole);
            more.control_written -= whole;
        }
        self.shrink();
    }

    /// `count` bytes of data were written; returns how many frames that completed.
    pub(crate) fn wrote(&mut self, mut count: usize, bounds: &Bounds) -> u32 {
        self.bytes -= count;
        let mut whole = 0;
        while count > 0 {
            let Some(front) = &mut self.front else { break };
            let left = (front.chunk.end(front.end) - self.offset) as usize;
            if count < left {
                self.offset += count as u32;
                while front.chunk.end(front.next + 1) <= self.offset {
                    front.next += 1;
                    whole += 1;
                }
                break;
            }
            count -= left;
            whole += front.frames();
            self.front = self.more.as_mut().and_then(|more| more.rest.pop_front());
            self.offset = self.front.as_ref().map_or(0, |front| front.chunk.start(front.next));
        }
        self.frames -= whole;
        self.admit(bounds);
        self.shrink();
        whole
    }

    /// Takes waiting frames in while there is room.
    fn admit(&mut self, bounds: &Bounds) {
        while let Some(more) = &mut self.more
            && let Some(mut waiting) = more.waiting.pop_front()
        {
            let fitting = self.fitting(&waiting.segment, bounds);
            let (from, end) = (waiting.segment.next, waiting.segment.end);
            if fitting > from {
                self.append(Segment { end: fitting, ..waiting.segment.clone() });
            }
            let more = self.more.get_or_insert_default();
            more.waiting_frames -= (fitting - from) as usize;
            if fitting < end {
                waiting.segment.next = fitting;
                more.waiting.push_front(waiting);
                return;
            }
        }
    }

    /// Forgets everything but the frame that is being written; returns how many frames were forgotten.
    pub(crate) fn discard(&mut self) -> u64 {
        let before = self.pending();
        if let Some(more) = &mut self.more {
            more.rest = VecDeque::new();
            more.waiting = VecDeque::new();
            more.waiting_frames = 0;
        }
        self.frames = 0;
        self.bytes = 0;
        match &mut self.front {
            Some(front) if self.offset > front.chunk.start(front.next) => {
                front.end = front.next + 1;
                self.frames = 1;
                self.bytes = (front.chunk.end(front.end) - self.offset) as usize;
            }
            _ => self.front = None,
        }
        self.shrink();
        before - self.pending()
    }

    /// Forgets even the frame that is being written: the socket is gone. Returns how many frames that were.
    pub(crate) fn discard_all(&mut self) -> u64 {
        let pending = self.pending();
        *self = Self::new();
        pending
    }

    /// Nothing stays allocated while nothing is queued.
    fn shrink(&mut self) {
        if let Some(more) = &self.more
            && more.rest.is_empty()
            && more.waiting.is_empty()
            && more.control.is_empty()
        {
            self.more = None;
        }
    }
}

/// The end of the control frame that contains the byte before `position`, or 0.
fn control_frame_end(control: &[u8], position: usize) -> usize {
    let mut end = 0;
    while end < position && end + 1 < control.len() {
        end += 2 + usize::from(control[end + 1] & 0x7F);
    }
    end
}

/// The last several pieces that were gathered into one, for the next connection that has the same.
#[derive(Debug, Default)]
pub(crate) struct Gather {
    segments: Vec<Segment>,
    bytes: Vec<u8>,
}

impl Gather {
    /// The queued pieces of `outbox` in one, at most about `bytes_max` (but at least one piece).
    pub(crate) fn gather<'a, T>(&'a mut self, outbox: &Outbox<T>, bytes_max: usize) -> &'a [u8] {
        let (Some(front), Some(more)) = (&outbox.front, &outbox.more) else { return &[] };
        let pieces = || std::iter::once(front).chain(&more.rest);
        let begun = outbox.offset != front.chunk.start(front.next);
        let mut total = 0;
        let fits = |piece: &&Segment| {
            let first = total == 0;
            total += piece.bytes();
            first || total <= bytes_max
        };
        let count = pieces().take_while(fits).count();
        let same =
            self.segments.len() == count && self.segments.iter().zip(pieces()).all(|(a, b)| a.is_same(b));
        if same && !begun {
            return &self.bytes;
        }
        self.clear();
        let mut from = outbox.offset;
        for piece in pieces().take(count) {
            if !self.bytes.is_empty() {
                from = piece.chunk.start(piece.next);
            }
            self.bytes
                .extend_from_slice(&piece.chunk.bytes[from as usize..piece.chunk.end(piece.end) as usize]);
            if !begun {
                self.segments.push(piece.clone());
            }
        }
        &self.bytes
    }

    /// Lets go of the pieces.
    pub(crate) fn clear(&mut self) {
        self.segments.clear();
        self.bytes.clear();
    }
}
