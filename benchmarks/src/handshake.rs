//! A minimal opening handshake (RFC 6455, section 4) for client and server.
//!
//! The client always sends the same key, since nothing here caches. Knows bytes, not sockets.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use sha1::{Digest, Sha1};

use crate::{dialect::Dialect, message};

/// A longer head is an error.
pub(crate) const HEAD_BYTES_MAX: usize = 8 * 1024;

const KEY: &str = "c2hhcmRjYXN0IGJlbmNoIQ==";
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("the head of the handshake is longer than {HEAD_BYTES_MAX} bytes")]
    TooLong,
    #[error("the server answered {0:?} instead of 101")]
    Refused(String),
    #[error("the server's Sec-WebSocket-Accept does not match the key")]
    WrongAccept,
    #[error("the request has no {0}")]
    Lacks(&'static str),
}

/// What a server needs of a request.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) accept: String,
}

/// The client's request for `path` at `host`, followed by the first packet of its dialect.
pub(crate) fn request(host: &str, path: &str) -> Vec<u8> {
    let mut request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    .into_bytes();
    if let Some(opening) = Dialect::of(path).opening() {
        message::write_text(&mut request, opening);
    }
    request
}

/// The server's answer.
pub(crate) fn response(accept: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n\r\n"
    )
    .into_bytes()
}

/// The length of the head at the beginning of `bytes`; `None` while it is incomplete.
pub(crate) fn head_bytes(bytes: &[u8]) -> Result<Option<usize>, HandshakeError> {
    match bytes.windows(4).position(|window| window == b"\r\n\r\n") {
        Some(end) => Ok(Some(end + 4)),
        None if bytes.len() > HEAD_BYTES_MAX => Err(HandshakeError::TooLong),
        None => Ok(None),
    }
}

/// Checks the response to our request.
pub(crate) fn check_response(head: &[u8]) -> Result<(), HandshakeError> {
    let text = String::from_utf8_lossy(head);
    let status = text.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("101") {
        return Err(HandshakeError::Refused(status.to_owned()));
    }
    match header(&text, "sec-websocket-accept") {
        Some(accept) if accept == accept_for(KEY) => Ok(()),
        _ => Err(HandshakeError::WrongAccept),
    }
}

/// Reads a client's request.
pub(crate) fn parse_request(head: &[u8]) -> Result<Request, HandshakeError> {
    let text = String::from_utf8_lossy(head);
    let path = text.split(' ').nth(1).ok_or(HandshakeError::Lacks("path"))?.to_owned();
    let key = header(&text, "sec-websocket-key").ok_or(HandshakeError::Lacks("Sec-WebSocket-Key"))?;
    Ok(Request { path, accept: accept_for(key) })
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(field, _)| field.trim().eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
}

fn accept_for(key: &str) -> String {
    let mut hash = Sha1::new();
    hash.update(key);
    hash.update(GUID);
    STANDARD.encode(hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_value_is_that_of_the_rfcs_example() {
        assert_eq!(accept_for("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn request_and_response_are_accepted_by_the_other_side() {
        let head = request("127.0.0.1:1", "/ws");
        assert_eq!(head_bytes(&head).unwrap(), Some(head.len()));
        let request = parse_request(&head).unwrap();
        assert_eq!(request.path, "/ws");
        assert!(check_response(&response(&request.accept)).is_ok());
        assert!(matches!(check_response(&response("other")), Err(HandshakeError::WrongAccept)));
        assert!(matches!(check_response(b"HTTP/1.1 503 Full\r\n\r\n"), Err(HandshakeError::Refused(_))));
    }
}
