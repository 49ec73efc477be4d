//! The close code: the number in a Close frame that gives the reason.
//!
//! A plain value. Stored as the number itself, not as an enum, because a client may send any code between
//! 3000 and 4999, and the application must see it unchanged. Does not know frames, errors or connections.

use std::fmt;

/// Why a WebSocket ends, as the number that a Close frame carries (RFC 6455, section 7.4).
///
/// Every `u16` can be stored, also those that must not be sent: see
/// [`is_valid_on_wire`](Self::is_valid_on_wire). Displayed as the bare number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct CloseCode(pub u16);

impl CloseCode {
    /// 1000: the purpose of the connection is fulfilled.
    pub const NORMAL: Self = Self(1000);
    /// 1001: the server shuts down, or the page was left.
    pub const GOING_AWAY: Self = Self(1001);
    /// 1002: the other side broke the protocol.
    pub const PROTOCOL_ERROR: Self = Self(1002);
    /// 1003: a kind of message that is not accepted here (text instead of binary, for example).
    pub const UNSUPPORTED_DATA: Self = Self(1003);
    /// 1005: the Close frame carried no code. Only reported, never sent (RFC 6455, section 7.1.5).
    pub const NO_STATUS: Self = Self(1005);
    /// 1007: a payload that contradicts its kind, such as text that is not UTF-8.
    pub const INVALID_PAYLOAD: Self = Self(1007);
    /// 1008: the client broke a rule of this server.
    pub const POLICY_VIOLATION: Self = Self(1008);
    /// 1009: a message exceeds the size limit.
    pub const MESSAGE_TOO_BIG: Self = Self(1009);
    /// 1010: the client requires an extension that the server did not negotiate.
    pub const MANDATORY_EXTENSION: Self = Self(1010);
    /// 1011: the server failed.
    pub const INTERNAL_ERROR: Self = Self(1011);
    /// 1012: the server restarts; reconnect after a random delay.
    pub const SERVICE_RESTART: Self = Self(1012);
    /// 1013: the server is overloaded, or this client is too slow for it; try again later.
    pub const TRY_AGAIN_LATER: Self = Self(1013);
    /// 1014: a gateway got an invalid answer from its upstream server.
    pub const BAD_GATEWAY: Self = Self(1014);

    /// Whether a client that receives this code should reconnect: 1001 and 1011–1014.
    #[must_use]
    pub const fn should_reconnect(self) -> bool {
        matches!(self.0, 1001 | 1011..=1014)
    }

    /// Whether this code may be sent in a Close frame: 1000–1003, 1007–1014 and 3000–4999.
    ///
    /// 1005, 1006 and 1015 are only for reporting ("no code", "no Close frame", "TLS failed"),
    /// 1004 and the rest are not assigned.
    #[must_use]
    pub const fn is_valid_on_wire(self) -> bool {
        matches!(self.0, 1000..=1003 | 1007..=1014 | 3000..=4999)
    }
}

/// A code that may not be sent in a Close frame; see [`CloseCode::is_valid_on_wire`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("close code {0} may not be sent: use 1000 to 1003, 1007 to 1014 or 3000 to 4999")]
pub struct InvalidCloseCode(pub CloseCode);

impl From<u16> for CloseCode {
    fn from(code: u16) -> Self {
        Self(code)
    }
}

impl From<CloseCode> for u16 {
    fn from(code: CloseCode) -> Self {
        code.0
    }
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::CloseCode;

    #[test]
    fn the_codes_allowed_on_the_wire_are_three_ranges() {
        let allowed: Vec<u16> = (0..=u16::MAX).filter(|&code| CloseCode(code).is_valid_on_wire()).collect();
        let expected: Vec<u16> = (1000..=1003).chain(1007..=1014).chain(3000..=4999).collect();
        assert_eq!(allowed, expected);
    }

    #[test]
    fn a_code_is_displayed_as_its_number() {
        assert_eq!(CloseCode::TRY_AGAIN_LATER.to_string(), "1013");
        assert_eq!(u16::from(CloseCode::from(4321)), 4321);
    }
}
