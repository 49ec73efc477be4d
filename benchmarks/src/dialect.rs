//! The protocol on top of WebSocket: how it wraps a message, and which other messages it has.
//!
//! Plain servers have none. Socket.IO (protocol 5 over Engine.IO 4, WebSocket only) opens a namespace with a packet from
//! the client and one from the server, puts events into an array, and sends pings as messages. The opening packet is
//! sent together with the handshake request; the server reads it after its 101. The URL selects the dialect. Packets
//! without a number are accepted only in the exact form of the protocol, so that a plain server's message without a
//! number remains a fault. Does not know sockets, or what a message means.

use crate::message;

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

    /// What the client sends first.
    pub(crate) fn opening(self) -> Option<&'static str> {
        match self {
            Self::Plain => None,
            Self::SocketIo => Some("40"),
        }
    }

    /// Whether the server has sent what it must before it accepts messages. A server does not mask, so its packets can be
    /// searched for in the received bytes.
    pub(crate) fn is_open(self, received: &[u8]) -> bool {
        match self {
            Self::Plain => true,
            Self::SocketIo => contains(received, NAMESPACE_OPEN),
        }
    }

    /// What precedes and follows the JSON of a message.
    pub(crate) fn envelope(self) -> (&'static str, &'static str) {
        match self {
            Self::Plain => ("", ""),
            Self::SocketIo => (r#"42["message","#, "]"),
        }
    }
}

const ENGINE_OPEN: &[u8] = br#"0{"sid":""#;
const NAMESPACE_OPEN: &[u8] = br#"40{"sid":""#;

/// Handles a message without a number and appends the answer to `outgoing`, if any; false when it is in no protocol.
#[cold]
pub(crate) fn handle_control(message: &[u8], outgoing: &mut Vec<u8>) -> bool {
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
    fn the_url_selects_the_dialect() {
        assert_eq!(Dialect::of("ws://127.0.0.1:1/ws?EIO=4&transport=websocket"), Dialect::SocketIo);
        assert_eq!(Dialect::of("/ws"), Dialect::Plain);
    }

    #[test]
    fn a_namespace_is_open_after_the_servers_packet() {
        let engine = b"\x81\x10" as &[u8];
        let received = [engine, br#"0{"sid":"a"}"#].concat();
        assert!(!Dialect::SocketIo.is_open(&received) && Dialect::Plain.is_open(&received));
        assert!(Dialect::SocketIo.is_open(&[&received[..], b"\x81\x10", br#"40{"sid":"b"}"#].concat()));
    }

    #[test]
    fn only_packets_of_the_protocol_may_lack_a_number_and_a_ping_is_answered() {
        let handled = |message: &[u8]| {
            let mut outgoing = Vec::new();
            (handle_control(message, &mut outgoing), outgoing)
        };
        let mut pong = Vec::new();
        message::write_text(&mut pong, "3");
        assert_eq!(handled(b"2"), (true, pong));
        for opened in [br#"0{"sid":"a","upgrades":[]}"# as &[u8], br#"40{"sid":"a"}"#] {
            assert_eq!(handled(opened), (true, Vec::new()));
        }
        for other in [&b"3"[..], b"", b"22", br#"44{"message":"no"}"#, br#"{"p":""}"#, b"41"] {
            assert_eq!(handled(other), (false, Vec::new()));
        }
    }
}
