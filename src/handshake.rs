//! The opening handshake: whether a request opens a WebSocket, and if not, why not.
//!
//! Pure functions over the head of a request, without state or owner, so that every refusal can be tested without a
//! server. The checks are those of RFC 6455 (HTTP/1.1) and RFC 8441 (HTTP/2), each with its own reason.
//! Knows headers. Does not know sockets, extractors, hubs or how a refusal is sent.

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header, uri::Authority};
use thiserror::Error;

/// The protocol version that RFC 6455 defines; there is no other.
pub(crate) const WEBSOCKET_VERSION: HeaderValue = HeaderValue::from_static("13");

/// Why a request did not become a WebSocket.
///
/// As a response it has the [`status`](Self::status) given below and the reason as plain text. The rejection is also in
/// the response's extensions, where a middleware can find it and count it by its [`label`](Self::label).
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
    /// `Host` is missing, repeated, empty or not a host: 400. Over HTTP/2 it may be missing if there is an
    /// `:authority`.
    #[error("the request must name one `Host`")]
    BadHost,
    /// The request announces a body, by a `Content-Length` other than 0, `Transfer-Encoding` or
    /// `Expect: 100-continue`: 400. The body's bytes would be taken for frames.
    #[error("a WebSocket handshake must not have a body")]
    HasBody,
    /// `Sec-WebSocket-Key` is missing, repeated, or not 16 bytes in base64: 400.
    #[error("the `Sec-WebSocket-Key` header must be 16 bytes in base64")]
    BadKey,
    /// HTTP/1.1, and `Sec-WebSocket-Version` is not 13: 426, with the supported version.
    #[error("the `Sec-WebSocket-Version` header must be 13")]
    WrongVersion,
    /// HTTP/2, and `sec-websocket-version` is not 13: 400, with the supported version. HTTP/2 has no `Upgrade` and
    /// therefore no 426.
    #[error("the `sec-websocket-version` header must be 13")]
    WrongVersionOverHttp2,
    /// HTTP/1.0, or a server or middleware that does not allow the connection to be upgraded: 426.
    #[error("this connection cannot be upgraded")]
    NotUpgradable,
    /// HTTP/2, and the server or a middleware does not allow the stream to be upgraded: 400.
    #[error("this stream cannot become a WebSocket")]
    NotUpgradableOverHttp2,
    /// The `Origin` is not in the list of allowed origins: 403.
    #[error("this origin may not connect")]
    ForbiddenOrigin,
}

impl UpgradeRejection {
    /// All rejections, for metrics that need the full list.
    pub const ALL: [Self; 12] = [
        Self::NotGet,
        Self::NotExtendedConnect,
        Self::NoConnectionUpgrade,
        Self::NoUpgradeWebSocket,
        Self::BadHost,
        Self::HasBody,
        Self::BadKey,
        Self::WrongVersion,
        Self::WrongVersionOverHttp2,
        Self::NotUpgradable,
        Self::NotUpgradableOverHttp2,
        Self::ForbiddenOrigin,
    ];

    /// The status of the response.
    pub fn status(self) -> StatusCode {
        match self {
            Self::NotGet
            | Self::NotExtendedConnect
            | Self::NoConnectionUpgrade
            | Self::NoUpgradeWebSocket
            | Self::BadHost
            | Self::HasBody
            | Self::BadKey
            | Self::WrongVersionOverHttp2
            | Self::NotUpgradableOverHttp2 => StatusCode::BAD_REQUEST,
            Self::WrongVersion | Self::NotUpgradable => StatusCode::UPGRADE_REQUIRED,
            Self::ForbiddenOrigin => StatusCode::FORBIDDEN,
        }
    }

    /// A short name for metrics. It does not change between releases.
    pub fn label(self) -> &'static str {
        match self {
            Self::NotGet => "not_get",
            Self::NotExtendedConnect => "not_extended_connect",
            Self::NoConnectionUpgrade => "no_connection_upgrade",
            Self::NoUpgradeWebSocket => "no_upgrade_websocket",
            Self::BadHost => "bad_host",
            Self::HasBody => "has_body",
            Self::BadKey => "bad_key",
            Self::WrongVersion => "wrong_version",
            Self::WrongVersionOverHttp2 => "wrong_version_over_http_2",
            Self::NotUpgradable => "not_upgradable",
            Self::NotUpgradableOverHttp2 => "not_upgradable_over_http_2",
            Self::ForbiddenOrigin => "forbidden_origin",
        }
    }
}

/// The part of a request that the checks need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestHead<'a> {
    pub(crate) method: &'a Method,
    pub(crate) version: Version,
    pub(crate) headers: &'a HeaderMap,
    /// The `:protocol` pseudo-header of an extended `CONNECT`.
    pub(crate) protocol: Option<&'a str>,
    /// The authority of the request's target; over HTTP/2 the `:authority` pseudo-header.
    pub(crate) authority: Option<&'a Authority>,
}

/// The response to a valid handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// 101 with this `Sec-WebSocket-Accept`.
    SwitchingProtocols { accept: String },
    /// 200: over HTTP/2 the stream itself becomes the connection, and there is no key to confirm.
    Http2Ok,
}

/// Whether the request asks for a WebSocket, even if its handshake is invalid. A route may answer any other request
/// with a page.
pub(crate) fn is_attempt(request: RequestHead<'_>) -> bool {
    if request.version >= Version::HTTP_2 {
        return is_extended_connect(request);
    }
    // A key without `Upgrade` means that a proxy removed the hop-by-hop headers. A page as the response would hide
    // that.
    lists(request.headers, header::UPGRADE, "websocket")
        || request.headers.contains_key(header::SEC_WEBSOCKET_KEY)
}

/// Checks the handshake.
pub(crate) fn check(request: RequestHead<'_>) -> Result<Answer, UpgradeRejection> {
    if request.version >= Version::HTTP_2 {
        if !is_extended_connect(request) {
            return Err(UpgradeRejection::NotExtendedConnect);
        }
        let has_host = request.authority.is_some() && !request.headers.contains_key(header::HOST);
        if !has_host && !names_one_host(request.headers) {
            return Err(UpgradeRejection::BadHost);
        }
        if has_body(request.headers) {
            return Err(UpgradeRejection::HasBody);
        }
        if !is_version_13(request.headers) {
            return Err(UpgradeRejection::WrongVersionOverHttp2);
        }
        return Ok(Answer::Http2Ok);
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
    if !names_one_host(request.headers) {
        return Err(UpgradeRejection::BadHost);
    }
    if has_body(request.headers) {
        return Err(UpgradeRejection::HasBody);
    }
    if !is_version_13(request.headers) {
        return Err(UpgradeRejection::WrongVersion);
    }
    let key = only(request.headers, header::SEC_WEBSOCKET_KEY).ok_or(UpgradeRejection::BadKey)?;
    if !is_key(key.as_bytes()) {
        return Err(UpgradeRejection::BadKey);
    }
    Ok(Answer::SwitchingProtocols { accept: shardcast_engine::accept_key(key.as_bytes()) })
}

/// How many of a client's subprotocols are kept. A request may list 200,000, and each takes about 70 bytes.
const PROTOCOLS_MAX: usize = 128;

/// The first subprotocols that the client offers, in the client's order. Values that are not lists of names are
/// skipped.
pub(crate) fn requested_protocols(headers: &HeaderMap) -> Vec<HeaderValue> {
    headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .filter_map(|name| HeaderValue::from_str(name).ok())
        .take(PROTOCOLS_MAX)
        .collect()
}

/// Whether the client asks to close the connection after the response. That is irrelevant for a 101, but explains why
/// the connection ends after another response.
pub(crate) fn asks_to_close(headers: &HeaderMap) -> bool {
    lists(headers, header::CONNECTION, "close")
}

fn is_extended_connect(request: RequestHead<'_>) -> bool {
    request.method == Method::CONNECT && request.protocol == Some("websocket")
}

fn is_version_13(headers: &HeaderMap) -> bool {
    only(headers, header::SEC_WEBSOCKET_VERSION).is_some_and(|version| version == WEBSOCKET_VERSION)
}

/// RFC 9112, section 3.2: a request with no `Host`, several, or an invalid one must be refused.
fn names_one_host(headers: &HeaderMap) -> bool {
    only(headers, header::HOST)
        .and_then(|host| Authority::try_from(host.as_bytes()).ok())
        .is_some_and(|host| !host.host().is_empty() && !host.as_str().contains('@'))
}

/// Whether the request announces a body. `Content-Length: 0` announces none.
fn has_body(headers: &HeaderMap) -> bool {
    let is_zero = |length: &HeaderValue| length.as_bytes().iter().all(|digit| *digit == b'0');
    headers.contains_key(header::TRANSFER_ENCODING)
        || !headers.get_all(header::CONTENT_LENGTH).iter().all(is_zero)
        || lists(headers, header::EXPECT, "100-continue")
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

/// The header's value, if it is given exactly once.
fn only(headers: &HeaderMap, name: HeaderName) -> Option<&HeaderValue> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => Some(value),
        _ => None,
    }
}

/// Whether this is the base64 of 16 bytes. The last digit's four unused bits may have any value: some clients generate
/// 22 random digits, and the key is never decoded.
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
        RequestHead {
            method: &Method::GET,
            version: Version::HTTP_11,
            headers,
            protocol: None,
            authority: None,
        }
    }

    fn good() -> HeaderMap {
        headers(&[
            ("host", "example.org"),
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
            (header::HOST, UpgradeRejection::BadHost),
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
        let authority = Authority::from_static("example.org");
        let head = RequestHead {
            method: &Method::CONNECT,
            version: Version::HTTP_2,
            headers: &request,
            protocol: Some("websocket"),
            authority: Some(&authority),
        };
        assert!(is_attempt(head));
        assert_eq!(check(head), Ok(Answer::Http2Ok));

        for bad in [
            RequestHead { protocol: None, ..head },
            RequestHead { protocol: Some("connect-udp"), ..head },
            RequestHead { method: &Method::GET, ..head },
        ] {
            assert!(!is_attempt(bad));
            assert_eq!(check(bad), Err(UpgradeRejection::NotExtendedConnect));
        }
        let old = headers(&[("sec-websocket-version", "8")]);
        assert_eq!(
            check(RequestHead { headers: &old, ..head }),
            Err(UpgradeRejection::WrongVersionOverHttp2)
        );
    }

    #[test]
    fn over_http_2_the_host_is_the_authority_or_a_header() {
        let mut request = headers(&[("sec-websocket-version", "13")]);
        fn head(headers: &HeaderMap) -> RequestHead<'_> {
            RequestHead {
                method: &Method::CONNECT,
                version: Version::HTTP_2,
                headers,
                protocol: Some("websocket"),
                authority: None,
            }
        }
        assert_eq!(check(head(&request)), Err(UpgradeRejection::BadHost));
        request.insert(header::HOST, HeaderValue::from_static("example.org"));
        assert_eq!(check(head(&request)), Ok(Answer::Http2Ok));
        request.append(header::HOST, HeaderValue::from_static("example.org"));
        assert_eq!(check(head(&request)), Err(UpgradeRejection::BadHost));
        let authority = Authority::from_static("example.org");
        let both = RequestHead { authority: Some(&authority), ..head(&request) };
        assert_eq!(check(both), Err(UpgradeRejection::BadHost), "two names may contradict each other");
    }

    #[test]
    fn one_valid_host_is_named_and_no_second_one() {
        for host in
            ["example.org", "EXAMPLE.org:8080", "my_service", "127.0.0.1:3000", "[::1]:3000", "a.test."]
        {
            let mut request = good();
            request.insert(header::HOST, HeaderValue::from_str(host).unwrap());
            assert!(check(get(&request)).is_ok(), "{host}");
        }
        for hosts in [&[][..], &[""], &["a", "a"], &["a", "b"], &["a b"], &["u@a"], &["a/b"], &[":80"]] {
            let mut request = good();
            request.remove(header::HOST);
            for host in hosts {
                request.append(header::HOST, HeaderValue::from_str(host).unwrap());
            }
            assert_eq!(check(get(&request)), Err(UpgradeRejection::BadHost), "{hosts:?}");
        }
    }

    #[test]
    fn a_handshake_has_no_body() {
        for (name, value) in
            [("content-length", "5"), ("transfer-encoding", "chunked"), ("expect", "100-Continue")]
        {
            let mut request = good();
            request.insert(name, HeaderValue::from_static(value));
            assert_eq!(check(get(&request)), Err(UpgradeRejection::HasBody), "{name}: {value}");
        }
        let mut request = good();
        request.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        assert!(check(get(&request)).is_ok(), "a body of no bytes is none");
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
    fn of_more_protocols_than_anyone_means_only_the_first_are_looked_at() {
        let many = format!("first,{}", "a,".repeat(100_000));
        let some = requested_protocols(&headers(&[("sec-websocket-protocol", many.as_str())]));
        assert_eq!((some.len(), &some[0]), (PROTOCOLS_MAX, &HeaderValue::from_static("first")));
    }

    #[test]
    fn every_rejection_is_listed_once_under_a_label_of_its_own() {
        let labels: std::collections::HashSet<_> = UpgradeRejection::ALL.iter().map(|r| r.label()).collect();
        assert_eq!(labels.len(), UpgradeRejection::ALL.len());
    }
}
