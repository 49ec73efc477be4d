//! The UTF-8 checker: validates a text that arrives in pieces.
//!
//! Owned by the receiver of one message; four bytes. Pieces may be cut inside a character, so it keeps the
//! beginning of an unfinished one (at most three bytes) and nothing else; the text itself stays with the
//! caller. It fails early: a byte after which no continuation could make the text valid is an error at once,
//! so a client cannot make the server store a text that it will refuse. Does not know frames or messages.

/// The text is not valid UTF-8, or it ended inside a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("text is not valid UTF-8")]
pub struct InvalidUtf8;

/// Checks a text that arrives in pieces cut anywhere.
///
/// ```
/// # use shardcast_engine::Utf8Checker;
/// let mut checker = Utf8Checker::new();
/// checker.feed(b"caf\xc3").unwrap();   // cut inside the é
/// assert!(checker.finish().is_err());  // the text may not end here
/// checker.feed(b"\xa9").unwrap();
/// assert!(checker.finish().is_ok());
/// assert!(checker.feed(b"\xff").is_err());
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Utf8Checker {
    /// The beginning of a character that is not complete yet: `held[..held_len]`.
    held: [u8; 3],
    held_len: u8,
}

impl Utf8Checker {
    /// A checker at the beginning of a text.
    #[must_use]
    pub const fn new() -> Self {
        Self { held: [0; 3], held_len: 0 }
    }

    /// Checks the next piece of the text.
    ///
    /// # Errors
    /// [`InvalidUtf8`] as soon as no continuation could make the text valid. The checker must not be used afterwards.
    pub fn feed(&mut self, piece: &[u8]) -> Result<(), InvalidUtf8> {
        let rest = if self.held_len == 0 { piece } else { self.complete_character(piece)? };
        let (whole, unfinished) = rest.split_at(rest.len() - unfinished_len(rest));
        if simdutf8::basic::from_utf8(whole).is_err() {
            return Err(InvalidUtf8);
        }
        if !unfinished.is_empty() {
            if !is_possible_beginning(unfinished) {
                return Err(InvalidUtf8);
            }
            self.held[..unfinished.len()].copy_from_slice(unfinished);
            self.held_len = unfinished.len() as u8;
        }
        Ok(())
    }

    /// Says whether the text may end here.
    ///
    /// # Errors
    /// [`InvalidUtf8`] if the last character is unfinished.
    pub const fn finish(&self) -> Result<(), InvalidUtf8> {
        if self.held_len == 0 { Ok(()) } else { Err(InvalidUtf8) }
    }

    /// Takes the missing bytes of the held character off the front of `piece`; returns the rest.
    fn complete_character<'p>(&mut self, piece: &'p [u8]) -> Result<&'p [u8], InvalidUtf8> {
        let held_len = usize::from(self.held_len);
        let width = width(self.held[0]);
        let taken = (width - held_len).min(piece.len());
        let (missing, rest) = piece.split_at(taken);

        let mut character = [0; 4];
        character[..held_len].copy_from_slice(&self.held[..held_len]);
        character[held_len..held_len + taken].copy_from_slice(missing);
        let so_far = &character[..held_len + taken];

        if so_far.len() == width {
            if std::str::from_utf8(so_far).is_err() {
                return Err(InvalidUtf8);
            }
            self.held_len = 0;
        } else {
            if !is_possible_beginning(so_far) {
                return Err(InvalidUtf8);
            }
            self.held[..so_far.len()].copy_from_slice(so_far);
            self.held_len = so_far.len() as u8;
        }
        Ok(rest)
    }
}

/// The number of bytes at the end of `piece` that begin an incomplete character (0 to 3).
fn unfinished_len(piece: &[u8]) -> usize {
    for (behind, &byte) in piece.iter().rev().take(3).enumerate() {
        let is_continuation = byte & 0b1100_0000 == 0b1000_0000;
        if !is_continuation {
            let present = behind + 1;
            return if width(byte) > present { present } else { 0 };
        }
    }
    0
}

/// The length of a character that begins with this byte. Bytes that begin none count as one: they are passed
/// to the validator, which refuses them.
const fn width(lead: u8) -> usize {
    match lead {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf4 => 4,
        _ => 1,
    }
}

/// Whether some continuation makes this one character valid: E0 80, ED A0 or F4 90 have none.
fn is_possible_beginning(unfinished: &[u8]) -> bool {
    // `error_len` is `None` exactly when the only fault is that the input ends too soon.
    std::str::from_utf8(unfinished)
        .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::Utf8Checker;

    #[test]
    fn an_impossible_beginning_is_refused_before_the_character_ends() {
        for lost in [&b"\xe0\x80"[..], b"\xed\xa0", b"\xf4\x90", b"\xf0\x80", b"\xc0", b"\xf5", b"\x80"] {
            let mut at_once = Utf8Checker::new();
            assert!(at_once.feed(lost).is_err(), "{lost:x?} in one piece");

            let mut bytewise = Utf8Checker::new();
            assert!(lost.iter().any(|&byte| bytewise.feed(&[byte]).is_err()), "{lost:x?} byte by byte");
        }
    }

    #[test]
    fn a_checker_is_four_bytes() {
        assert_eq!(size_of::<Utf8Checker>(), 4);
    }
}
