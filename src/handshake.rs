//! The opening handshake: is this request the start of a WebSocket, and if not, why not.
//!
//! Pure functions over the head of a request, owned by nobody, so that every refusal can be tested without a
//! server. The checks are those of RFC 6455 (HTTP/1.1) and RFC 8441 (HTTP/2), each with a reason of its own.
//! Knows headers. Does not know sockets, extractors, hubs or how a refusal is sent.

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use thiserror::Error;

/// The protocol version that RFC 6455 defines; there is no other.
pub(crate) const WEBSOCKET_VERSION: HeaderValue = HeaderValue::from_static("13");

/// Why a request did not become a WebSocket.
///
/// As a response it has the [`status`](Self::status) below and the reason as plain text, and carries itself in
/// the response's extensions, where a middleware can find and count it by its [`label`](Self::label).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum UpgradeRejection {
    /// HTTP/1.1, but not a `GET`: 400.
    #[error("a WebSocket handshake must be a GET request")]
    NotGet,
    /// HTTP/2, but not an extended `CONNECT` with `:protocol` = `websocket`: 400.
    #[error("a WebSocket handshake over HTTP/2 must be an extended CONNECT with the protocol `websocket`")]
    NotExtendedConnect,
    /// The `Connection` header does not list `upgrade` (a proxy may have removed it): 400.
    #[error("the `Connection` header must list `upgrade`")]
    NoConnectionUpgrade,
    /// The `Upgrade` header does not list `websocket` (a proxy may have removed it): 400.
    #[error("the `Upgrade` header must list `websocket`")]
    NoUpgradeWebSocket,
    /// `Sec-WebSocket-Key` is missing, repeated, or not 16 bytes in base64: 400.
    #[error("the `Sec-WebSocket-Key` header must be 16 bytes in base64")]
    BadKey,
    /// `Sec-WebSocket-Version` is not 13: 426, with the version that would do.
    #[error("the `Sec-WebSocket-Version` header must be 13")]
    WrongVersion,
    /// HTTP/1.0, or a server that does not let its connections be upgraded: 426.
    #[error("this connection cannot be upgraded")]
    NotUpgradable,
    /// The `Origin` is not among the allowed ones: 403.
    #[error("this origin may not connect")]
    ForbiddenOrigin,
}

impl UpgradeRejection {
    /// Every rejection there is, for those who count them.
    pub const ALL: [Self; 8] = [
        Self::NotGet,
        Self::NotExtendedConnect,
        Self::NoConnectionUpgrade,
        Self::NoUpgradeWebSocket,
        Self::BadKey,
        Self::WrongVersion,
        Self::NotUpgradable,
        Self::ForbiddenOrigin,
    ];

    /// The status of the response.
    pub fn status(self) -> StatusCode {
        match self {
            Self::NotGet
            | Self::NotExtendedConnect
            | Self::NoConnectionUpgrade
            | Self::NoUpgradeWebSocket
            | Self::BadKey => StatusCode::BAD_REQUEST,
            Self::WrongVersion | Self::NotUpgradable => StatusCode::UPGRADE_REQUIRED,
            Self::ForbiddenOrigin => StatusCode::FORBIDDEN,
        }
    }

    /// A short name for metrics, stable across releases.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotGet => "not_get",
            Self::NotExtendedConnect => "not_extended_connect",
            Self::NoConnectionUpgrade => "no_connection_upgrade",
            Self::NoUpgradeWebSocket => "no_upgrade_websocket",
            Self::BadKey => "bad_key",
            Self::WrongVersion => "wrong_version",
            Self::NotUpgradable => "not_upgradable",
            Self::ForbiddenOrigin => "forbidden_origin",
        }
    }
}

/// The part of a request that decides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestHead<'a> {
    pub(crate) method: &'a Method,
    pub(crate) version: Version,
    pub(crate) headers: &'a HeaderMap,
    /// The `:protocol` pseudo-header of an extended `CONNECT`.
    pub(crate) protocol: Option<&'a str>,
}

/// How a good handshake is to be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// 101 with this `Sec-WebSocket-Accept`.
    SwitchingProtocols { accept: String },
    /// 200: over HTTP/2 the stream itself becomes the connection, and there is no key to prove anything by.
    Ok,
}

/// Whether the request means to open a WebSocket, well formed or not. What does not is a request like any other,
/// and a route may answer it with a page.
pub(crate) fn is_attempt(request: RequestHead<'_>) -> bool {
    if request.version >= Version::HTTP_2 {
        return is_extended_connect(request);
    }
    // The key alone tells of a proxy that took the hop-by-hop headers away. A page would hide that.
    lists(request.headers, header::UPGRADE, "websocket")
        || request.headers.contains_key(header::SEC_WEBSOCKET_KEY)
}

/// Checks the handshake.
pub(crate) fn check(request: RequestHead<'_>) -> Result<Answer, UpgradeRejection> {
    if request.version >= Version::HTTP_2 {
        if !is_extended_connect(request) {
            return Err(UpgradeRejection::NotExtendedConnect);
        }
        check_version(request.headers)?;
        return Ok(Answer::Ok);
    }
    if request.version < Version::HTTP_11 {
        return Err(UpgradeRejection::NotUpgradable);
    }
    if request.method != Method::GET {
        return Err(UpgradeRejection::NotGet);
    }
    if !lists(request.headers, header::CONNECTION, "upgrade") {
        return Err(UpgradeRejection::NoConnectionUpgrade);
    }
    if !lists(request.headers, header::UPGRADE, "websocket") {
        return Err(UpgradeRejection::NoUpgradeWebSocket);
    }
    check_version(request.headers)?;
    let key = only(request.headers, header::SEC_WEBSOCKET_KEY).ok_or(UpgradeRejection::BadKey)?;
    if !is_key(key.as_bytes()) {
        return Err(UpgradeRejection::BadKey);
    }
    Ok(Answer::SwitchingProtocols { accept: shardcast_engine::accept_key(key.as_bytes()) })
}

/// The subprotocols that the client offers, in its order. What is not a list of names is skipped.
pub(crate) fn requested_protocols(headers: &HeaderMap) -> Vec<HeaderValue> {
    headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .filter_map(|name| HeaderValue::from_str(name).ok())
        .collect()
}

/// Whether a page from `origin` may connect.
///
/// Browsers always say where a page comes from, and a foreign page is the danger: it would connect with the
/// user's cookies. Whoever sends no origin is no browser and could have sent any, so it is let through.
pub(crate) fn origin_is_allowed<O: AsRef<str>>(
    origin: Option<&HeaderValue>,
    allowed: impl IntoIterator<Item = O>,
) -> bool {
    let Some(origin) = origin else { return true };
    // Scheme and host are lower case in what browsers send; people who write lists do not always know.
    allowed.into_iter().any(|allowed| origin.as_bytes().eq_ignore_ascii_case(allowed.as_ref().as_bytes()))
}

fn is_extended_connect(request: RequestHead<'_>) -> bool {
    request.method == Method::CONNECT && request.protocol == Some("websocket")
}

fn check_version(headers: &HeaderMap) -> Result<(), UpgradeRejection> {
    match only(headers, header::SEC_WEBSOCKET_VERSION) {
        Some(version) if version == WEBSOCKET_VERSION => Ok(()),
        _ => Err(UpgradeRejection::WrongVersion),
    }
}

/// Whether one of the header's lines lists the token.
fn lists(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
        .any(|listed| listed.trim().eq_ignore_ascii_case(token))
}

/// The header's value, unless it is given twice.
fn only(headers: &HeaderMap, name: HeaderName) -> Option<&HeaderValue> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Some(value),
        _ => None,
    }
}

/// Whether this is the base64 of 16 bytes. The four bits that the last digit has too many may be anything: some
/// clients draw 22 random digits, and nobody ever decodes them.
fn is_key(key: &[u8]) -> bool {
    match key {
        [digits @ .., b'=', b'='] => {
            digits.len() == 22
                && digits.iter().all(|digit| digit.is_ascii_alphanumeric() || matches!(digit, b'+' | b'/'))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
            .fold(HeaderMap::new(), |mut headers, (name, value)| {
                headers.append(name, value);
                headers
            })
    }

    fn get(headers: &HeaderMap) -> RequestHead<'_> {
        RequestHead { method: &Method::GET, version: Version::HTTP_11, headers, protocol: None }
    }

    fn good() -> HeaderMap {
        headers(&[
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", KEY),
        ])
    }

    #[test]
    fn the_handshake_of_rfc_6455_gets_its_answer() {
        let accept = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".to_owned();
        assert_eq!(check(get(&good())), Ok(Answer::SwitchingProtocols { accept }));
    }

    #[test]
    fn tokens_are_found_in_lists_in_any_case_and_on_any_line() {
        let mut request = good();
        request.insert(header::CONNECTION, HeaderValue::from_static("keep-alive"));
        request.append(header::CONNECTION, HeaderValue::from_static("x, \tUPGRADE ,y"));
        request.insert(header::UPGRADE, HeaderValue::from_static("h2c, WebSocket"));
        assert!(check(get(&request)).is_ok());

        request.insert(header::CONNECTION, HeaderValue::from_static("upgraded"));
        assert_eq!(
            check(get(&request)),
            Err(UpgradeRejection::NoConnectionUpgrade),
            "a token is a whole word"
        );
    }

    #[test]
    fn each_missing_header_has_its_own_reason() {
        for (name, reason) in [
            (header::CONNECTION, UpgradeRejection::NoConnectionUpgrade),
            (header::UPGRADE, UpgradeRejection::NoUpgradeWebSocket),
            (header::SEC_WEBSOCKET_VERSION, UpgradeRejection::WrongVersion),
            (header::SEC_WEBSOCKET_KEY, UpgradeRejection::BadKey),
        ] {
            let mut request = good();
            request.remove(&name);
            assert_eq!(check(get(&request)), Err(reason), "without {name}");
        }
    }

    #[test]
    fn only_16_bytes_in_base64_are_a_key() {
        for good in [KEY, "AAAAAAAAAAAAAAAAAAAAAA==", "+/+/+/+/+/+/+/+/+/+/+/=="] {
            assert!(is_key(good.as_bytes()), "{good}");
        }
        for bad in [
            "",
            "==",
            "dGhlIHNhbXBsZSBub25jZQ",
            "dGhlIHNhbXBsZSBub25jZQ=",
            "dGhlIHNhbXBsZSBub25jZTE=",
            "dGhlIHNhbXBsZSBub25j==",
            "dGhlIHNhbXBsZSBub25jZSE=",
            "dGhlIHNhbXBsZSBub25jZQ== ",
            "dGhlIHNhbXBsZSBub25j-Q==",
            "dGhlIHNhbXBsZSBub25jZQAA==",
        ] {
            assert!(!is_key(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn a_key_given_twice_is_no_key() {
        let mut request = good();
        request.append(header::SEC_WEBSOCKET_KEY, HeaderValue::from_static(KEY));
        assert_eq!(check(get(&request)), Err(UpgradeRejection::BadKey));
    }

    #[test]
    fn http_1_0_cannot_be_upgraded() {
        let request = good();
        let head = RequestHead { version: Version::HTTP_10, ..get(&request) };
        assert_eq!(check(head), Err(UpgradeRejection::NotUpgradable));
    }

    #[test]
    fn http_2_needs_an_extended_connect_and_no_key() {
        let request = headers(&[("sec-websocket-version", "13")]);
        let head = RequestHead {
            method: &Method::CONNECT,
            version: Version::HTTP_2,
            headers: &request,
            protocol: Some("websocket"),
        };
        assert!(is_attempt(head));
        assert_eq!(check(head), Ok(Answer::Ok));

        for bad in [
            RequestHead { protocol: None, ..head },
            RequestHead { protocol: Some("connect-udp"), ..head },
            RequestHead { method: &Method::GET, ..head },
        ] {
            assert!(!is_attempt(bad));
            assert_eq!(check(bad), Err(UpgradeRejection::NotExtendedConnect));
        }
        let old = headers(&[("sec-websocket-version", "8")]);
        assert_eq!(check(RequestHead { headers: &old, ..head }), Err(UpgradeRejection::WrongVersion));
    }

    #[test]
    fn a_page_view_is_no_attempt_but_a_mangled_handshake_is() {
        for plain in [headers(&[]), headers(&[("upgrade", "h2c"), ("connection", "upgrade")])] {
            assert!(!is_attempt(get(&plain)));
        }
        assert!(is_attempt(get(&good())));
        assert!(is_attempt(get(&headers(&[("upgrade", "websocket")]))));
        assert!(is_attempt(get(&headers(&[("sec-websocket-key", KEY)]))));
    }

    #[test]
    fn offered_protocols_keep_their_order_across_lines() {
        let request =
            headers(&[("sec-websocket-protocol", "soap, wamp,,"), ("sec-websocket-protocol", " chat.v2 ")]);
        assert_eq!(requested_protocols(&request), ["soap", "wamp", "chat.v2"]);
        assert!(requested_protocols(&headers(&[])).is_empty());
    }

    #[test]
    fn a_foreign_origin_is_not_allowed_and_no_origin_is() {
        let allowed = ["https://example.org", "http://localhost:3000"];
        let origin_is_allowed =
            |origin: &'static str| origin_is_allowed(Some(&HeaderValue::from_static(origin)), allowed);
        assert!(origin_is_allowed("https://example.org"));
        assert!(origin_is_allowed("https://Example.org"));
        assert!(origin_is_allowed("http://localhost:3000"));
        assert!(!origin_is_allowed("http://example.org"), "the scheme is part of the origin");
        assert!(!origin_is_allowed("http://localhost:3001"), "the port is part of the origin");
        assert!(!origin_is_allowed("https://example.org.evil.test"));
        assert!(!origin_is_allowed("null"));
        assert!(super::origin_is_allowed(None, allowed));
    }

    #[test]
    fn every_rejection_is_listed_once_under_a_label_of_its_own() {
        let labels: std::collections::HashSet<_> = UpgradeRejection::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(labels.len(), UpgradeRejection::ALL.len());
    }
}
