//! The outbox: frames that the client has not taken yet.
//!
//! Owned by one shard, never shared. Bounded in frames and in bytes, because a client that stops reading must
//! cost a known amount of memory and nothing else. Nothing is allocated while at most one segment is queued.
//! Frames beyond the bound wait (overflow), together with their origin. Control frames go first, but never
//! inside a frame. Knows frames. Does not know sockets, time, groups or other connections.

use std::cell::Cell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::frame::Opcode;

/// Bytes that the outboxes of one shard keep in memory. A chunk that several share counts once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Retained(Rc<Cell<usize>>);

impl Retained {
    pub(crate) fn bytes(&self) -> usize {
        self.0.get()
    }
}

/// One or more consecutive frames in one piece of memory, shared by every connection of a shard that gets them.
#[derive(Debug)]
pub(crate) struct Chunk {
    bytes: Bytes,
    /// The end of each frame.
    ends: SmallVec<[u32; 2]>,
    /// The counter that includes its bytes for as long as it exists.
    retained: Retained,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.retained.0.set(self.retained.0.get() - self.bytes.len());
    }
}

impl Chunk {
    pub(crate) fn single(frame: Bytes, retained: &Retained) -> Self {
        let ends = SmallVec::from_slice(&[frame.len() as u32]);
        Self::new(frame, ends, retained)
    }

    fn new(bytes: Bytes, ends: SmallVec<[u32; 2]>, retained: &Retained) -> Self {
        retained.0.set(retained.0.get() + bytes.len());
        Self { bytes, ends, retained: retained.clone() }
    }

    /// Puts one frame in the place of what it held.
    fn refill(&mut self, frame: Bytes) {
        self.retained.0.set(self.retained.0.get() - self.bytes.len() + frame.len());
        self.ends.clear();
        self.ends.push(frame.len() as u32);
        self.bytes = frame;
    }

    pub(crate) fn joined<'a>(
        frames: impl Iterator<Item = &'a [u8]>,
        bytes: usize,
        retained: &Retained,
    ) -> Self {
        let mut all = Vec::with_capacity(bytes);
        let ends = frames
            .map(|frame| {
                all.extend_from_slice(frame);
                all.len() as u32
            })
            .collect();
        Self::new(all.into(), ends, retained)
    }

    pub(crate) fn frames(&self) -> u32 {
        self.ends.len() as u32
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn start(&self, frame: u32) -> u32 {
        if frame == 0 { 0 } else { self.ends[frame as usize - 1] }
    }

    fn end(&self, frames: u32) -> u32 {
        self.start(frames)
    }
}

/// A run of frames of a chunk: from `next` up to, but not including, `end`.
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

/// Frames beyond the bound; `origin` is dropped when they are accepted, dropped or discarded.
#[derive(Debug)]
struct Waiting<T> {
    segment: Segment,
    expiry: Expiry,
    origin: Option<T>,
}

/// How long a frame waits for room, and the consequence if it gets none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expiry {
    /// When it is dropped; none means never.
    pub(crate) until: Option<Duration>,
    /// The number of consecutive drops that ends the connection; 0 means that none does.
    pub(crate) max_drops: u32,
}

/// Frames that were dropped because their time had expired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dropped {
    pub(crate) frames: u32,
    pub(crate) max_drops: u32,
}

/// The bounds of an outbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) frames: usize,
    pub(crate) bytes: usize,
    pub(crate) overflow_frames: usize,
    pub(crate) overflow_bytes: usize,
}

/// `T` is kept for as long as a frame waits.
#[derive(Debug)]
pub(crate) struct Outbox<T> {
    front: Option<Segment>,
    /// The end of the written part of the front's chunk.
    offset: u32,
    frames: u32,
    bytes: usize,
    more: Option<Box<More<T>>>,
}

#[derive(Debug)]
struct More<T> {
    rest: VecDeque<Segment>,
    waiting: VecDeque<Waiting<T>>,
    overflow_frames: usize,
    overflow_bytes: usize,
    control: Vec<u8>,
    /// The index in `control` at which a write stopped inside a control frame.
    control_written: usize,
}

impl<T> Default for More<T> {
    fn default() -> Self {
        Self {
            rest: VecDeque::new(),
            waiting: VecDeque::new(),
            overflow_frames: 0,
            overflow_bytes: 0,
            control: Vec::new(),
            control_written: 0,
        }
    }
}

impl<T> More<T> {
    /// Removes all pongs except one that is partly written. Pings stay: an answer is awaited.
    fn forget_pongs(&mut self) {
        let control = std::mem::take(&mut self.control);
        let mut start = 0;
        while start < control.len() {
            let end = control_frame_end(&control, start + 1);
            if start < self.control_written || control[start] & OPCODE_BITS != Opcode::Pong as u8 {
                self.control.extend_from_slice(&control[start..end]);
            }
            start = end;
        }
    }
}

/// Bytes of queued control frames, at most: above it the pongs for all but the last ping are removed, as RFC
/// 6455 (5.5.3) allows.
const CONTROL_BYTES_MAX: usize = 4096;
const OPCODE_BITS: u8 = 0x0F;

/// What [`Outbox::enqueue`] did with the frames.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Enqueued {
    /// All are within the bound.
    Queued,
    /// Some wait for room.
    Waits,
    /// This many were dropped: they may not wait, or the overflow is full.
    Drops(u32),
    /// The overflow is full, and no frame may be dropped: the connection must end as a slow consumer.
    TooMany,
}

/// Bytes to write that stay where they are while this exists.
#[cfg(all(feature = "io-uring", target_os = "linux"))]
#[derive(Debug)]
pub(crate) enum SharedBytes {
    Of { chunk: Rc<Chunk>, from: u32, end: u32 },
    Gathered(Rc<Vec<u8>>),
}

#[cfg(all(feature = "io-uring", target_os = "linux"))]
impl SharedBytes {
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        Self::Gathered(Rc::new(bytes))
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Of { chunk, from, end } => &chunk.bytes[*from as usize..*end as usize],
            Self::Gathered(bytes) => bytes,
        }
    }

    /// Bytes that were copied together for this.
    pub(crate) fn gathered(&self) -> usize {
        match self {
            Self::Of { .. } => 0,
            Self::Gathered(bytes) => bytes.len(),
        }
    }
}

/// What must be written next.
#[derive(Debug)]
pub(crate) enum Next<'a> {
    Nothing,
    Control(&'a [u8]),
    /// Bytes of one segment.
    Data(&'a [u8]),
    /// Several segments: gather them.
    Pieces,
}

impl<T> Outbox<T> {
    pub(crate) fn new() -> Self {
        Self { front: None, offset: 0, frames: 0, bytes: 0, more: None }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.front.is_none() && self.more.is_none()
    }

    /// Frames not completely written, including the waiting ones.
    pub(crate) fn pending(&self) -> u64 {
        u64::from(self.frames) + self.waiting() as u64
    }

    #[cfg(feature = "audit")]
    pub(crate) fn audit_bytes(&self) -> (usize, usize) {
        (self.bytes, self.more.as_ref().map_or(0, |more| more.overflow_bytes))
    }

    #[cfg(feature = "audit")]
    pub(crate) fn earliest_until(&self) -> Option<Duration> {
        let more = self.more.as_ref()?;
        more.waiting.iter().filter_map(|waiting| waiting.expiry.until).min()
    }

    /// Frames within the bound that are not completely written.
    pub(crate) fn queued(&self) -> u32 {
        self.frames
    }

    /// Bytes that are kept for the client, including the waiting ones. A frame shared by several connections
    /// counts for each.
    pub(crate) fn backlog_bytes(&self) -> usize {
        self.bytes + self.more.as_ref().map_or(0, |more| more.overflow_bytes)
    }

    /// Fast path: appends all frames of `chunk` if nothing is queued and they take at most a quarter of the
    /// bounds, so that no frame waits and the outbox does not become congested. Returns false otherwise.
    #[inline]
    pub(crate) fn push_if_empty(&mut self, chunk: &Rc<Chunk>, bounds: &Bounds) -> bool {
        let (frames, bytes) = (chunk.frames(), chunk.bytes.len());
        if !self.is_empty() || frames as usize > bounds.frames / 4 || bytes > bounds.bytes / 4 {
            return false;
        }
        self.front = Some(Segment { chunk: chunk.clone(), next: 0, end: frames });
        (self.offset, self.frames, self.bytes) = (0, frames, bytes);
        true
    }

    /// Appends these `frames` of the chunk, as far as the bounds allow. Those that do not fit wait with their origin, or are
    /// dropped at once if `expiry` ends `now`. `origin_of` gives the origin of the first of these frames, and the end of
    /// those that share it.
    pub(crate) fn enqueue(
        &mut self,
        chunk: &Rc<Chunk>,
        frames: Range<u32>,
        bounds: &Bounds,
        now: Duration,
        expiry: Expiry,
        origin_of: impl FnMut(Range<u32>) -> (Option<T>, u32),
    ) -> Enqueued {
        let all = Segment { chunk: chunk.clone(), next: frames.start, end: frames.end };
        if !self.has_waiting() {
            let fitting = self.fitting(&all, bounds);
            if fitting == all.end {
                self.append(all);
                return Enqueued::Queued;
            }
            if fitting > all.next {
                self.append(Segment { end: fitting, ..all.clone() });
            }
            return self.wait(Segment { next: fitting, ..all }, bounds, now, expiry, origin_of);
        }
        self.wait(all, bounds, now, expiry, origin_of)
    }

    fn wait(
        &mut self,
        mut segment: Segment,
        bounds: &Bounds,
        now: Duration,
        expiry: Expiry,
        mut origin_of: impl FnMut(Range<u32>) -> (Option<T>, u32),
    ) -> Enqueued {
        let frames = segment.frames();
        let mut room = bounds.overflow_frames.saturating_sub(self.waiting()).min(frames as usize) as u32;
        let bytes = bounds.overflow_bytes.saturating_sub(self.backlog_bytes() - self.bytes);
        let start = segment.chunk.start(segment.next);
        while room > 0 && (segment.chunk.end(segment.next + room) - start) as usize > bytes {
            room -= 1;
        }
        // If nothing else waits, one frame of any size may wait, as an empty outbox takes one of any size.
        if room == 0 && bounds.overflow_frames > 0 && !self.has_waiting() {
            room = 1;
        }
        let may_wait = match expiry.until {
            None => frames, // beyond the room: an overflow
            Some(until) if until <= now => 0,
            Some(_) => room,
        };
        segment.end = segment.next + may_wait;
        if may_wait > 0 {
            let more = self.more.get_or_insert_default();
            more.overflow_frames += may_wait as usize;
            more.overflow_bytes += segment.bytes();
            while segment.next < segment.end {
                let (origin, end) = origin_of(segment.next..segment.end);
                let end = end.clamp(segment.next + 1, segment.end);
                more.waiting.push_back(Waiting {
                    segment: Segment { end, ..segment.clone() },
                    expiry,
                    origin,
                });
                segment.next = end;
            }
        }
        match may_wait {
            _ if may_wait < frames => Enqueued::Drops(frames - may_wait),
            _ if may_wait > room => Enqueued::TooMany,
            _ => Enqueued::Waits,
        }
    }

    /// Drops the frames that have expired at `now`; reports to `on_drop` how many frames of which origin, and
    /// the limit on consecutive drops. Returns when the next waiting frame expires.
    pub(crate) fn expire(
        &mut self,
        now: Duration,
        bounds: &Bounds,
        mut on_drop: impl FnMut(Dropped, Option<&T>),
    ) -> Option<Duration> {
        let more = self.more.as_mut()?;
        let (mut frames, mut bytes, mut next) = (0, 0, None);
        more.waiting.retain(|waiting| {
            let is_over = waiting.expiry.until.is_some_and(|until| until <= now);
            if is_over {
                frames += waiting.segment.frames() as usize;
                bytes += waiting.segment.bytes();
                let dropped =
                    Dropped { frames: waiting.segment.frames(), max_drops: waiting.expiry.max_drops };
                on_drop(dropped, waiting.origin.as_ref());
            } else if let Some(until) = waiting.expiry.until {
                next = Some(next.map_or(until, |next: Duration| next.min(until)));
            }
            !is_over
        });
        more.overflow_frames -= frames;
        more.overflow_bytes -= bytes;
        self.admit(bounds);
        self.shrink();
        next
    }

    /// Bytes of memory that it keeps, some of them perhaps shared with others; of a frame that is being
    /// written, also the part that the socket has taken.
    pub(crate) fn held_bytes(&self) -> usize {
        self.backlog_bytes() + self.front.as_ref().map_or(0, |_| self.offset as usize)
    }

    /// Frames that wait for room.
    pub(crate) fn waiting(&self) -> usize {
        self.more.as_ref().map_or(0, |more| more.overflow_frames)
    }

    /// The index up to which the segment's frames fit within the bounds.
    fn fitting(&self, segment: &Segment, bounds: &Bounds) -> u32 {
        let room = bounds.frames.saturating_sub(self.frames as usize);
        if segment.frames() as usize <= room && self.bytes + segment.bytes() <= bounds.bytes {
            return segment.end;
        }
        let last = segment.next + (room.min(segment.frames() as usize) as u32);
        let start = segment.chunk.start(segment.next);
        let within = |end: &u32| self.bytes + (segment.chunk.end(*end) - start) as usize <= bounds.bytes;
        let fitting = (segment.next + 1..=last).take_while(within).last().unwrap_or(segment.next);
        // A frame larger than the whole bound must pass as well: alone.
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

    /// Whether a frame is being written.
    pub(crate) fn is_in_frame(&self) -> bool {
        self.front.as_ref().is_some_and(|front| self.offset > front.chunk.start(front.next))
    }

    /// Whether no control frame is left to be written.
    pub(crate) fn has_no_control(&self) -> bool {
        self.more.as_ref().is_none_or(|more| more.control.is_empty())
    }

    /// Whether publishers should wait for this connection: more than a quarter full.
    pub(crate) fn is_congested(&self, bounds: &Bounds) -> bool {
        self.frames as usize > bounds.frames / 4 || self.bytes > bounds.bytes / 4 || self.has_waiting()
    }

    /// Whether a congested outbox has recovered: at most an eighth full.
    pub(crate) fn is_relieved(&self, bounds: &Bounds) -> bool {
        self.frames as usize <= bounds.frames / 8 && self.bytes <= bounds.bytes / 8 && !self.has_waiting()
    }

    /// Queues a control frame before all data, but after the frame that is being written.
    pub(crate) fn push_control(&mut self, frame: &[u8]) {
        let more = self.more.get_or_insert_default();
        if more.control.len() + frame.len() > CONTROL_BYTES_MAX {
            more.forget_pongs();
        }
        more.control.extend_from_slice(frame);
    }

    /// Queues a control frame of the application, unless too many are queued; false if it was not queued.
    pub(crate) fn push_control_if_room(&mut self, frame: &[u8]) -> bool {
        let queued = self.more.as_ref().map_or(0, |more| more.control.len());
        let has_room = queued + frame.len() <= CONTROL_BYTES_MAX / 2; // the other half is for the engine's own
        if has_room {
            self.push_control(frame);
        }
        has_room
    }

    #[inline]
    pub(crate) fn next(&self) -> Next<'_> {
        match &self.front {
            Some(front) if self.more.is_none() => {
                let (from, end) = (self.offset as usize, front.chunk.end(front.end) as usize);
                Next::Data(&front.chunk.bytes[from..end])
            }
            None if self.more.is_none() => Next::Nothing,
            _ => self.next_of_several(),
        }
    }

    fn next_of_several(&self) -> Next<'_> {
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

    /// What must be written next if it is data; segments are gathered, at most about `bytes_max` bytes of them.
    #[cfg(all(feature = "io-uring", target_os = "linux"))]
    pub(crate) fn next_shared(&self, gather: &mut Gather, bytes_max: usize) -> Option<SharedBytes> {
        match self.next() {
            Next::Data(bytes) => {
                let (chunk, from) = (self.front.as_ref()?.chunk.clone(), self.offset);
                Some(SharedBytes::Of { chunk, from, end: from + bytes.len() as u32 })
            }
            Next::Pieces => {
                gather.gather(self, bytes_max);
                Some(SharedBytes::Gathered(gather.bytes.clone()))
            }
            Next::Control(_) | Next::Nothing => None,
        }
    }

    /// `count` bytes of the control frames were written.
    pub(crate) fn wrote_control(&mut self, count: usize) {
        let Some(more) = &mut self.more else { return };
        more.control_written += count;
        if more.control_written == more.control.len() {
            more.control = Vec::new();
            more.control_written = 0;
        } else {
            // Whole frames are removed, so that `control_written > 0` means "inside a frame".
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
    #[inline]
    pub(crate) fn wrote(&mut self, count: usize, bounds: &Bounds, spares: &mut Spares) -> u32 {
        if self.more.is_none() && count == self.bytes {
            if let Some(front) = self.front.take() {
                spares.keep(front.chunk);
            }
            self.bytes = 0;
            return std::mem::take(&mut self.frames);
        }
        self.wrote_some(count, bounds)
    }

    fn wrote_some(&mut self, mut count: usize, bounds: &Bounds) -> u32 {
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

    /// Accepts waiting frames while there is room.
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
            let taken = Segment { end: fitting, ..waiting.segment.clone() };
            more.overflow_frames -= taken.frames() as usize;
            more.overflow_bytes -= taken.bytes();
            if fitting < end {
                waiting.segment.next = fitting;
                more.waiting.push_front(waiting);
                return;
            }
        }
    }

    /// Discards everything except the frame that is being written; returns how many frames were discarded.
    /// Calls `on_gone` with the origin of each waiting one.
    pub(crate) fn discard(&mut self, mut on_gone: impl FnMut(&T)) -> u64 {
        let before = self.pending();
        if let Some(more) = &mut self.more {
            more.rest = VecDeque::new();
            more.waiting.iter().filter_map(|waiting| waiting.origin.as_ref()).for_each(&mut on_gone);
            more.waiting = VecDeque::new();
            more.overflow_frames = 0;
            more.overflow_bytes = 0;
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

    /// Discards also the frame that is being written, because the socket is closed. Returns how many frames
    /// were discarded.
    pub(crate) fn discard_all(&mut self, on_gone: impl FnMut(&T)) -> u64 {
        let pending = self.pending();
        self.discard(on_gone);
        *self = Self::new();
        pending
    }

    /// Keeps nothing allocated while nothing is queued.
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

/// Chunks of single frames that have been written, for reuse. All replies to one batch of reads are made before the first
/// is written, and so many allocations exceed what an allocator caches.
#[derive(Debug, Default)]
pub(crate) struct Spares(Vec<Rc<Chunk>>);

/// Some 100 bytes each.
const SPARES_MAX: usize = 64;

impl Spares {
    /// A chunk of this frame alone.
    pub(crate) fn single(&mut self, frame: Bytes, retained: &Retained) -> Rc<Chunk> {
        if let Some(mut chunk) = self.0.pop()
            && let Some(spare) = Rc::get_mut(&mut chunk)
        {
            spare.refill(frame);
            return chunk;
        }
        Rc::new(Chunk::single(frame, retained))
    }

    #[inline]
    fn keep(&mut self, mut chunk: Rc<Chunk>) {
        if let Some(spare) = Rc::get_mut(&mut chunk)
            && spare.frames() == 1
            && self.0.len() < SPARES_MAX
        {
            spare.refill(Bytes::new());
            self.0.push(chunk);
        }
    }
}

/// The last segments that were gathered into one buffer, for the next connection with the same segments.
#[derive(Debug, Default)]
pub(crate) struct Gather {
    segments: Vec<Segment>,
    /// Shared only with sends that are under way.
    bytes: Rc<Vec<u8>>,
    pub(crate) spares: Spares,
}

impl Gather {
    /// The queued segments of `outbox` in one buffer, at most about `bytes_max` bytes (but at least one segment).
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
        let bytes = Rc::make_mut(&mut self.bytes);
        let mut from = outbox.offset;
        for piece in pieces().take(count) {
            if !bytes.is_empty() {
                from = piece.chunk.start(piece.next);
            }
            bytes.extend_from_slice(&piece.chunk.bytes[from as usize..piece.chunk.end(piece.end) as usize]);
            if !begun {
                self.segments.push(piece.clone());
            }
        }
        &self.bytes
    }

    /// Releases the segments.
    pub(crate) fn clear(&mut self) {
        self.segments.clear();
        match Rc::get_mut(&mut self.bytes) {
            Some(bytes) => bytes.clear(),
            None => self.bytes = Rc::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::frame::ControlFrame;

    const BOUNDS: Bounds = Bounds { frames: 5, bytes: 60, overflow_frames: 8, overflow_bytes: 1 << 30 };

    const FOR_EVER: Expiry = Expiry { until: None, max_drops: 0 };

    /// A frame with its number as payload, in `bytes` bytes (6 to 120).
    fn frame(number: u32, bytes: usize) -> Vec<u8> {
        let mut frame = vec![0x82, bytes as u8 - 2];
        frame.extend(number.to_be_bytes());
        frame.resize(bytes, 0);
        frame
    }

    fn chunk(frames: &[Vec<u8>]) -> Rc<Chunk> {
        let bytes = frames.iter().map(Vec::len).sum();
        Rc::new(Chunk::joined(frames.iter().map(Vec::as_slice), bytes, &Retained::default()))
    }

    /// What has reached the client: whole frames, and the beginning of one.
    #[derive(Debug, Default)]
    struct Peer {
        data: Vec<u32>,
        controls: Vec<u32>,
        begun: Vec<u8>,
    }

    impl Peer {
        fn receive(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.begun.push(*byte);
                if self.begun.len() >= 2 && self.begun.len() == 2 + usize::from(self.begun[1]) {
                    let number = u32::from_be_bytes(self.begun[2..6].try_into().expect("four bytes"));
                    match self.begun[0] {
                        0x82 => self.data.push(number),
                        0x89 | 0x8A => self.controls.push(number),
                        other => panic!("no frame begins with {other:#x}"),
                    }
                    self.begun.clear();
                }
            }
        }

        fn has_begun_data(&self) -> bool {
            self.begun.first() == Some(&0x82)
        }
    }

    impl<T> Outbox<T> {
        fn next_bytes(&self) -> &[u8] {
            match self.next() {
                Next::Data(bytes) => bytes,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Writes once, at most `bytes`, as a connection does; false if there was nothing to write.
    fn write<T>(outbox: &mut Outbox<T>, gather: &mut Gather, peer: &mut Peer, bytes: usize) -> bool {
        let before = peer.data.len();
        let (piece, is_control) = match outbox.next() {
            Next::Nothing => return false,
            Next::Control(piece) => (piece, true),
            Next::Data(piece) => (piece, false),
            Next::Pieces => (gather.gather(outbox, 50), false),
        };
        let count = piece.len().min(bytes);
        peer.receive(&piece[..count]);
        if is_control {
            outbox.wrote_control(count);
        } else {
            assert_eq!(outbox.wrote(count, &BOUNDS, &mut gather.spares) as usize, peer.data.len() - before);
        }
        true
    }

    #[derive(Debug, Clone)]
    enum Step {
        Offer(Vec<usize>),
        Write(usize),
        Control(usize),
        Discard,
        DiscardAll,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => prop::collection::vec(6usize..20, 1..5).prop_map(Step::Offer),
            1 => (61usize..120).prop_map(|bytes| Step::Offer(vec![bytes])),
            8 => (1usize..60).prop_map(Step::Write),
            2 => (4usize..12).prop_map(Step::Control),
            1 => Just(Step::Discard),
            1 => Just(Step::DiscardAll),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 1000 }))]
        #[test]
        fn the_client_gets_whole_frames_in_order_and_every_frame_is_accounted_for(
            steps in prop::collection::vec(step(), 1..60)
        ) {
            let (mut outbox, mut gather, mut peer) = (Outbox::new(), Gather::default(), Peer::default());
            let retained = Retained::default();
            // For each pending frame its number, its length, and its offer.
            let mut pending: VecDeque<(u32, usize, usize)> = VecDeque::new();
            let mut tickets: Vec<Rc<()>> = Vec::new();
            let (mut offered, mut written, mut discarded) = (0, 0, 0);
            let mut controls = Vec::new();
            for step in steps {
                match step {
                    Step::Offer(sizes) => {
                        let numbers = offered..offered + sizes.len() as u32;
                        let frames: Vec<_> =
                            numbers.clone().zip(&sizes).map(|(number, bytes)| frame(number, *bytes)).collect();
                        pending.extend(numbers.zip(sizes).map(|(number, bytes)| (number, bytes, tickets.len())));
                        offered += frames.len() as u32;
                        let ticket = Rc::new(());
                        tickets.push(ticket.clone());
                        let chunk = match &frames[..] {
                            [frame] => gather.spares.single(frame.clone().into(), &retained),
                            frames => chunk(frames),
                        };
                        let was_empty = outbox.is_empty();
                        // Every second offer tries the fast path.
                        let offer = if tickets.len().is_multiple_of(2) && outbox.push_if_empty(&chunk, &BOUNDS) {
                            prop_assert!(was_empty && !outbox.is_congested(&BOUNDS));
                            Enqueued::Queued
                        } else {
                            let all = 0..chunk.frames();
                            let origin_of = |frames: Range<u32>| (Some(ticket.clone()), frames.end);
                            outbox.enqueue(&chunk, all, &BOUNDS, Duration::ZERO, FOR_EVER, origin_of)
                        };
                        let waiting = pending.len() - outbox.frames as usize;
                        let expected = match waiting {
                            0 => Enqueued::Queued,
                            waiting if waiting <= BOUNDS.overflow_frames => Enqueued::Waits,
                            _ => Enqueued::TooMany,
                        };
                        prop_assert_eq!(offer, expected);
                    }
                    Step::Write(bytes) => {
                        // A control frame precedes all data, but is never inside a frame.
                        let control = outbox.more.as_ref().is_some_and(|more| !more.control.is_empty());
                        let is_control = matches!(outbox.next(), Next::Control(_));
                        prop_assert_eq!(is_control, control && !peer.has_begun_data());
                        let before = peer.data.len();
                        prop_assert_eq!(
                            write(&mut outbox, &mut gather, &mut peer, bytes),
                            control || !pending.is_empty()
                        );
                        for number in &peer.data[before..] {
                            prop_assert_eq!(pending.pop_front().map(|(number, ..)| number), Some(*number));
                            written += 1;
                        }
                    }
                    Step::Control(bytes) => {
                        let number = controls.len() as u32;
                        let mut payload = number.to_be_bytes().to_vec();
                        payload.resize(bytes, 0);
                        outbox.push_control(ControlFrame::ping(&payload).as_bytes());
                        controls.push(number);
                    }
                    Step::Discard => {
                        let kept = usize::from(peer.has_begun_data());
                        prop_assert_eq!(outbox.discard(|_| {}), (pending.len() - kept) as u64);
                        discarded += pending.drain(kept..).count();
                    }
                    Step::DiscardAll => {
                        prop_assert_eq!(outbox.discard_all(|_| {}), pending.len() as u64);
                        discarded += pending.drain(..).count();
                        prop_assert!(outbox.is_empty());
                        controls.clear();
                        peer = Peer::default();
                    }
                }
                // No frame is lost or invented.
                prop_assert_eq!(outbox.pending(), pending.len() as u64);
                prop_assert_eq!(offered as usize, written + discarded + pending.len());
                prop_assert_eq!(&peer.controls[..], &controls[..peer.controls.len()]);
                // The bounds hold, and no frame waits that has room.
                let queued = outbox.frames as usize;
                let begun = if peer.has_begun_data() { peer.begun.len() } else { 0 };
                let bytes: usize = pending.iter().take(queued).map(|(_, bytes, _)| bytes).sum();
                prop_assert_eq!(outbox.bytes, bytes - begun);
                prop_assert!(queued <= BOUNDS.frames && (outbox.bytes <= BOUNDS.bytes || queued == 1));
                if let Some((_, next, _)) = pending.get(queued) {
                    prop_assert!(queued > 0 && (queued == BOUNDS.frames || outbox.bytes + next > BOUNDS.bytes));
                }
                // A ticket is held exactly while a frame of its offer waits.
                let waiting: BTreeSet<_> = pending.iter().skip(queued).map(|(.., offer)| *offer).collect();
                for (offer, ticket) in tickets.iter().enumerate() {
                    prop_assert_eq!(Rc::strong_count(ticket) > 1, waiting.contains(&offer));
                }
                // Nothing stays allocated while nothing is queued.
                let is_needed = outbox.more.as_ref().is_some_and(|more| {
                    !more.rest.is_empty() || !more.waiting.is_empty() || !more.control.is_empty()
                });
                prop_assert_eq!(outbox.more.is_some(), is_needed);
            }
            while write(&mut outbox, &mut gather, &mut peer, 7) {}
            prop_assert!(outbox.is_empty() && peer.begun.is_empty() && peer.controls == controls);
            prop_assert!(tickets.iter().all(|ticket| Rc::strong_count(ticket) == 1));
            gather.clear();
            prop_assert_eq!(retained.bytes(), 0);
        }
    }

    #[test]
    fn a_single_chunk_allocates_nothing() {
        let (mut outbox, mut spares): (Outbox<()>, _) = (Outbox::new(), Spares::default());
        let frames = [frame(0, 10), frame(1, 10), frame(2, 10)];
        assert_eq!(
            outbox.enqueue(
                &chunk(&frames),
                0..frames.len() as u32,
                &BOUNDS,
                Duration::ZERO,
                FOR_EVER,
                |frames| (None, frames.end)
            ),
            Enqueued::Queued
        );
        assert!(outbox.more.is_none() && !outbox.is_empty());
        assert_eq!((outbox.wrote(15, &BOUNDS, &mut spares), outbox.pending()), (1, 2));
        assert_eq!((outbox.wrote(15, &BOUNDS, &mut spares), outbox.pending()), (2, 0));
        assert!(outbox.more.is_none() && outbox.is_empty());
    }

    #[test]
    fn a_chunk_is_used_again_when_its_last_outbox_has_written_it() {
        let (retained, mut spares) = (Retained::default(), Spares::default());
        let mut outboxes: [Outbox<()>; 2] = [Outbox::new(), Outbox::new()];
        let first = spares.single(frame(0, 10).into(), &retained);
        assert!(outboxes.iter_mut().all(|outbox| outbox.push_if_empty(&first, &BOUNDS)));
        let memory = Rc::as_ptr(&first);
        drop(first);
        assert_eq!(outboxes[0].wrote(10, &BOUNDS, &mut spares), 1);
        assert_eq!(retained.bytes(), 10, "the other outbox holds it");
        let other = spares.single(frame(1, 15).into(), &retained);
        assert_ne!(Rc::as_ptr(&other), memory);
        assert_eq!((retained.bytes(), outboxes[1].next_bytes()), (25, &frame(0, 10)[..]));
        assert_eq!(outboxes[1].wrote(10, &BOUNDS, &mut spares), 1);
        assert_eq!(retained.bytes(), 15, "what is kept for the next frame holds none");
        let next = spares.single(frame(2, 12).into(), &retained);
        assert_eq!((Rc::as_ptr(&next), retained.bytes()), (memory, 27));
        assert!(outboxes[1].push_if_empty(&next, &BOUNDS));
        assert_eq!(outboxes[1].next_bytes(), frame(2, 12));
        drop((outboxes, other, next, spares));
        assert_eq!(retained.bytes(), 0);
    }

    #[test]
    fn few_chunks_are_kept_for_the_next_frames_and_only_those_of_one_frame() {
        let mut spares = Spares::default();
        let mut write = |chunk: Rc<Chunk>| {
            let (mut outbox, bytes) = (Outbox::<()>::new(), chunk.bytes());
            assert!(outbox.push_if_empty(&chunk, &Bounds { frames: 100, bytes: 1000, ..BOUNDS }));
            drop(chunk);
            outbox.wrote(bytes, &BOUNDS, &mut spares);
            spares.0.len()
        };
        assert_eq!(write(chunk(&[frame(0, 10), frame(1, 10), frame(2, 10)])), 0);
        let kept = (0..2 * SPARES_MAX).map(|_| write(chunk(&[frame(0, 10)])));
        assert_eq!(kept.last(), Some(SPARES_MAX));
    }

    #[test]
    fn a_frame_larger_than_the_bound_passes_alone() {
        let (mut outbox, mut spares): (Outbox<()>, _) = (Outbox::new(), Spares::default());
        assert_eq!(
            outbox.enqueue(&chunk(&[frame(0, 100)]), 0..1, &BOUNDS, Duration::ZERO, FOR_EVER, |frames| (
                None, frames.end
            )),
            Enqueued::Queued
        );
        assert_eq!(
            outbox.enqueue(&chunk(&[frame(1, 100)]), 0..1, &BOUNDS, Duration::ZERO, FOR_EVER, |frames| (
                None, frames.end
            )),
            Enqueued::Waits
        );
        assert_eq!((outbox.frames, outbox.pending()), (1, 2));
        assert_eq!((outbox.wrote(100, &BOUNDS, &mut spares), outbox.frames, outbox.pending()), (1, 1, 1));
    }

    #[test]
    fn equal_queues_of_several_connections_are_gathered_once() {
        let (mut gather, pieces) = (Gather::default(), [chunk(&[frame(0, 10)]), chunk(&[frame(1, 10)])]);
        let mut outboxes: [Outbox<()>; 2] = [Outbox::new(), Outbox::new()];
        for outbox in &mut outboxes {
            for piece in &pieces {
                assert_eq!(
                    outbox
                        .enqueue(piece, 0..1, &BOUNDS, Duration::ZERO, FOR_EVER, |frames| (None, frames.end)),
                    Enqueued::Queued
                );
            }
        }
        let first = gather.gather(&outboxes[0], 1000).as_ptr();
        assert_eq!(gather.gather(&outboxes[1], 1000), [frame(0, 10), frame(1, 10)].concat());
        assert_eq!(gather.bytes.as_ptr(), first);
        gather.clear();
        assert_eq!(pieces.map(|piece| Rc::strong_count(&piece)), [3, 3]);
    }

    #[test]
    fn a_flood_of_pings_costs_a_bounded_amount_and_not_our_own_ping() {
        let (mut outbox, mut gather, mut peer): (Outbox<()>, _, _) =
            (Outbox::new(), Gather::default(), Peer::default());
        let control = |kind: fn(&[u8]) -> ControlFrame, number: u32| {
            kind(&[&number.to_be_bytes()[..], &[0; 100]].concat())
        };
        outbox.push_control(control(ControlFrame::pong, 0).as_bytes());
        write(&mut outbox, &mut gather, &mut peer, 50);
        outbox.push_control(control(ControlFrame::ping, 1_000_000).as_bytes());
        for number in 1..1000 {
            outbox.push_control(control(ControlFrame::pong, number).as_bytes());
            assert!(outbox.more.as_ref().is_some_and(|more| more.control.len() <= CONTROL_BYTES_MAX));
        }
        while write(&mut outbox, &mut gather, &mut peer, 50) {}
        assert_eq!(peer.controls[..2], [0, 1_000_000], "the partly written pong, and our ping");
        assert_eq!(peer.controls.last(), Some(&999), "the last ping is answered");
    }
}
