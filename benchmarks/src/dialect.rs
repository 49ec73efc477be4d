//! The dialect of a server: what its protocol wraps around a message, and what it says besides.
//!
//! Plain servers have nothing of the kind. Socket.IO (protocol 5 over Engine.IO 4, WebSocket only) opens a namespace
//! with a packet of the client's and one of the server's, puts events into an array, and sends pings as messages. The
//! packet that opens goes out together with the request of the handshake: the server reads it after its 101. A
//! dialect is known by the URL, so that nobody passes it on; its packets are known by their exact form, so that a
//! plain server's message without a number stays a fault. Does not know sockets, or what a message is about.

use crate::message;

/// How a server is spoken to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Dialect {
    Plain,
    SocketIo,
}

impl Dialect {
    /// The dialect of a URL, of a path, or of a request for it.
    pub(crate) fn of(url: impl AsRef<[u8]>) -> Self {
        if contains(url.as_ref(), b"EIO=4") { Self::SocketIo } else { Self::Plain }
    }

    /// What the client says first.
    pub(crate) fn opening(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::SocketIo => Some("40"),
        }
    }

    /// Whether the server has said all that it says before messages may come to it. A server does not mask, so its
    /// packets stand in what came from it as they are.
    pub(crate) fn is_open(self, received: &[u8]) -> bool {
        match self {
            Self::Plain => true,
            Self::SocketIo => contains(received, NAMESPACE_OPEN),
        }
    }

    /// What stands before and after the JSON of a message.
    pub(crate) fn envelope(self) -> (&'static str, &'static str) {
        match self {
            Self::Plain => ("", ""),
            Self::SocketIo => (r#"42["message","#, "]"),
        }
    }
}

const ENGINE_OPEN: &[u8] = br#"0{"sid":""#;
const NAMESPACE_OPEN: &[u8] = br#"40{"sid":""#;

/// Follows a message that has no number, appending an answer to what is to be sent; false when no dialect knows it.
#[cold]
pub(crate) fn follow(message: &[u8], outgoing: &mut Vec<u8>) -> bool {
    match message {
        b"2" => {
            message::write_text(outgoing, "3");
            true
        }
        _ => message.starts_with(ENGINE_OPEN) || message.starts_with(NAMESPACE_OPEN),
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dialect_is_known_by_its_url() {
        assert_eq!(Dialect::of("ws://127.0.0.1:1/ws?EIO=4&transport=websocket"), Dialect::SocketIo);
        assert_eq!(Dialect::of("/ws"), Dialect::Plain);
    }

    #[test]
    fn a_namespace_is_open_when_the_server_has_said_so() {
        let engine = b"\x81\x10" as &[u8];
        let received = [engine, br#"0{"sid":"a"}"#].concat();
        assert!(!Dialect::SocketIo.is_open(&received) && Dialect::Plain.is_open(&received));
        assert!(Dialect::SocketIo.is_open(&[&received[..], b"\x81\x10", br#"40{"sid":"b"}"#].concat()));
    }

    #[test]
    fn only_packets_of_the_protocol_may_lack_a_number_and_a_ping_is_answered() {
        let followed = |message: &[u8]| {
            let mut outgoing = Vec::new();
            (follow(message, &mut outgoing), outgoing)
        };
        let mut pong = Vec::new();
        message::write_text(&mut pong, "3");
        assert_eq!(followed(b"2"), (true, pong));
        for opened in [br#"0{"sid":"a","upgrades":[]}"# as &[u8], br#"40{"sid":"a"}"#] {
            assert_eq!(followed(opened), (true, Vec::new()));
        }
        for stranger in [&b"3"[..], b"", b"22", br#"44{"message":"no"}"#, br#"{"p":""}"#, b"41"] {
            assert_eq!(followed(stranger), (false, Vec::new()));
        }
    }
}
