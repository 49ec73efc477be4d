//! Renditions: a payload's frames, one for each encoding that connections use.
//!
//! Nearly all connections use the plain frame, which a payload contains. For other encodings (another
//! protocol around the payload, compression within it) a function is registered with the engine. The publisher calls it
//! once for every encoding in use, however many shards there are. A shard calls it itself for a message to one
//! connection, and, once for all its connections, where an encoding was not yet in use. Does not know which connections
//! use which encoding.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use crate::frame::Frame;
use crate::payload::Payload;

/// The number of encodings that an engine can distinguish, [`Encoding::PLAIN`] included.
pub(crate) const ENCODINGS_MAX: usize = 8;

/// How payloads become frames for a connection; chosen when the connection is adopted.
///
/// Returned by [`Engine::register_encoding`](crate::Engine::register_encoding), and valid with that engine only.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Encoding(u8);

impl Encoding {
    /// One unmasked frame for each payload, without extensions (RFC 6455).
    pub const PLAIN: Self = Self(0);

    pub(crate) fn is_plain(self) -> bool {
        self == Self::PLAIN
    }

    pub(crate) fn index(self) -> usize {
        self.0.into()
    }

    pub(crate) fn from_index(index: usize) -> Self {
        Self(index as u8)
    }
}

/// The engine has as many encodings as it can distinguish: 8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an engine has at most {ENCODINGS_MAX} encodings: register each once, when the program starts")]
pub struct TooManyEncodings;

/// Makes the frame of a payload for one encoding.
type Render = Box<dyn Fn(&Payload) -> Frame + Send + Sync>;

/// The encodings of one engine.
#[derive(Default)]
pub(crate) struct Encodings {
    /// The function at `index - 1` belongs to the encoding of this index; the plain encoding has index 0 and
    /// needs none.
    renders: [OnceLock<Render>; ENCODINGS_MAX - 1],
    registered: AtomicUsize,
}

impl fmt::Debug for Encodings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encodings").field("registered", &self.registered).finish_non_exhaustive()
    }
}

impl Encodings {
    pub(crate) fn register(&self, render: Render) -> Result<Encoding, TooManyEncodings> {
        let free = |registered: usize| (registered < self.renders.len()).then_some(registered + 1);
        // Relaxed: only makes the numbers differ; the function is published by its `OnceLock`.
        let index = self.registered.fetch_update(Relaxed, Relaxed, free).map_err(|_| TooManyEncodings)?;
        let _ = self.renders[index].set(render); // the index was given to this call alone
        Ok(Encoding::from_index(index + 1))
    }

    /// Whether there is another one than the plain encoding.
    pub(crate) fn has_any(&self) -> bool {
        // Relaxed: a shard meets a connection of an encoding only after that was registered.
        self.registered.load(Relaxed) > 0
    }

    pub(crate) fn has(&self, encoding: Encoding) -> bool {
        encoding.is_plain() || self.find(encoding).is_some()
    }

    fn find(&self, encoding: Encoding) -> Option<&Render> {
        self.renders.get(encoding.index().checked_sub(1)?)?.get()
    }

    /// The payload's frame for an encoding. None if the encoding's function panics or makes a frame that is
    /// too long; both are logged.
    pub(crate) fn render(&self, encoding: Encoding, payload: &Payload) -> Option<Frame> {
        if encoding.is_plain() {
            return Some(payload.plain_frame().clone());
        }
        let render = self.find(encoding)?;
        match catch_unwind(AssertUnwindSafe(|| render(payload))) {
            Ok(frame) if frame.len() <= Frame::BYTES_MAX => Some(frame),
            Ok(frame) => {
                tracing::error!(
                    encoding = encoding.0,
                    bytes = frame.len(),
                    "an encoding made a frame that is too long; connections that need it are closed"
                );
                None
            }
            Err(_) => {
                tracing::error!(
                    encoding = encoding.0,
                    payload_bytes = payload.bytes().len(),
                    "an encoding's function panicked; connections that need its frame are closed"
                );
                None
            }
        }
    }
}

/// The frames that the publisher of one payload has made, besides the plain one.
#[derive(Debug, Default, Clone)]
pub(crate) struct Renditions(Box<[(Encoding, Frame)]>);

impl Renditions {
    /// Makes the frames for these encodings. One that fails is left out: the shard that needs it tries again
    /// and closes the connection if it fails again.
    pub(crate) fn make(
        encodings: &Encodings,
        in_use: impl Iterator<Item = Encoding>,
        payload: &Payload,
    ) -> Self {
        Self(in_use.filter_map(|encoding| Some((encoding, encodings.render(encoding, payload)?))).collect())
    }

    pub(crate) fn get(&self, encoding: Encoding) -> Option<&Frame> {
        self.0.iter().find(|(made, _)| *made == encoding).map(|(_, frame)| frame)
    }

    /// The length of the longest frame, in bytes.
    pub(crate) fn longest(&self) -> usize {
        self.0.iter().map(|(_, frame)| frame.len()).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_has_eight_encodings_at_most() {
        let encodings = Encodings::default();
        for number in 1..ENCODINGS_MAX {
            let render = Box::new(move |_: &Payload| Frame::text(&number.to_string()));
            let encoding = encodings.register(render).expect("there is one left");
            let frame = encodings.render(encoding, &Payload::binary(b"x")).expect("it is made");
            assert_eq!(frame.payload(), number.to_string().as_bytes());
        }
        assert_eq!(encodings.register(Box::new(|_| Frame::text(""))), Err(TooManyEncodings));
        assert!(encodings.has(Encoding::PLAIN) && !Encodings::default().has(Encoding(1)));
    }

    #[test]
    fn an_encoding_that_panics_makes_no_frame() {
        let encodings = Encodings::default();
        let encoding = encodings.register(Box::new(|_| panic!("on purpose"))).expect("there is one left");
        assert!(encodings.render(encoding, &Payload::text("x")).is_none());
        let made = Renditions::make(&encodings, [Encoding::PLAIN, encoding].into_iter(), &Payload::text("x"));
        assert!(made.get(encoding).is_none() && made.longest() == 3);
    }
}
