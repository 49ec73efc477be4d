//! The mask: the four bytes that a client XORs over every payload.
//!
//! One function over a borrowed slice, without an owner. Eight bytes a step, because the compiler turns that
//! loop into vector instructions, and without `unsafe`, because `as_chunks_mut` already provides what
//! alignment would. Does not know frames: the caller gives the slice's offset in the payload.

/// XORs `payload` with `key` in place. Masking and unmasking are the same.
///
/// `offset` is the slice's offset in the frame's payload, in bytes, so that a payload can be unmasked piece
/// by piece as it arrives. The slice may have any length and any alignment.
pub fn unmask(payload: &mut [u8], key: [u8; 4], offset: usize) {
    let mut key = key;
    key.rotate_left(offset % 4);
    let [a, b, c, d] = key;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);

    let (words, tail) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    // A word is two keys long, so the tail begins with the key's first byte again.
    for (byte, key) in tail.iter_mut().zip([a, b, c, d, a, b, c]) {
        *byte ^= key;
    }
}

#[cfg(test)]
mod tests {
    use super::unmask;

    #[test]
    fn unmasking_twice_gives_the_payload_back() {
        let mut payload = *b"a payload that is longer than two words";
        unmask(&mut payload, [1, 2, 3, 4], 3);
        assert_ne!(&payload, b"a payload that is longer than two words");
        unmask(&mut payload, [1, 2, 3, 4], 3);
        assert_eq!(&payload, b"a payload that is longer than two words");
    }

    #[test]
    fn the_example_of_the_rfc_reads_hello() {
        let mut payload = [0x7f, 0x9f, 0x4d, 0x51, 0x58];
        unmask(&mut payload, [0x37, 0xfa, 0x21, 0x3d], 0);
        assert_eq!(&payload, b"Hello");
    }
}
