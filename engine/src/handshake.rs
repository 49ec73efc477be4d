//! The accept key: the server's answer to a client's `Sec-WebSocket-Key`.
//!
//! A pure function of its input, without an owner. In the engine and not in `shardcast` because it is part of
//! the WebSocket protocol (RFC 6455, section 1.3), like the frames. Knows SHA-1 and base64. Does not know
//! HTTP, headers, or whether the key is well formed.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use sha1_smol::Sha1;

/// Every WebSocket server appends this GUID, so that no other server gives the right answer by accident.
const WEBSOCKET_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// The value of `Sec-WebSocket-Accept` for a `Sec-WebSocket-Key` as it arrived on the wire, in base64.
///
/// ```
/// assert_eq!(shardcast_engine::accept_key(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
/// ```
pub fn accept_key(key: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(key);
    hash.update(WEBSOCKET_GUID);
    STANDARD.encode(hash.digest().bytes())
}

#[cfg(test)]
mod tests {
    use super::accept_key;

    #[test]
    fn the_example_of_rfc_6455_gets_its_answer() {
        assert_eq!(accept_key(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn the_key_is_hashed_as_received() {
        assert_eq!(accept_key(b"x3JJHMbDL1EzLkh9GBhXDw=="), "HSmrc0sMlYUkAGmm5OPpG2HaGWk=");
    }
}
