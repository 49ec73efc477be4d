//! The handshake's request: URL, headers, cookies and subprotocols, and what of them an application cannot set.
//!
//! Made anew for each attempt, since headers such as tokens may have changed. Knows HTTP's names. Does not know sockets.

use std::{future::Future, pin::Pin, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Request, header, uri::Authority};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::{
    builder::Config,
    error::{BoxError, ClientError},
};

/// Makes the headers of each attempt.
#[derive(Clone)]
pub(super) struct HeaderSource(Arc<dyn Fn() -> MakingHeaders + Send + Sync>);

type MakingHeaders = Pin<Box<dyn Future<Output = Result<HeaderMap, BoxError>> + Send>>;

impl HeaderSource {
    pub(super) fn new<F>(make: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<HeaderMap, BoxError>> + Send + 'static,
    {
        Self(Arc::new(move || Box::pin(make())))
    }
}

/// Where the request goes.
pub(super) struct Target {
    /// A name or an address, without the brackets of an IPv6 address in a URL.
    pub(super) host: String,
    pub(super) port: u16,
    #[cfg_attr(not(feature = "client-tls"), allow(dead_code))]
    pub(super) is_tls: bool,
}

pub(super) async fn make(config: &Config) -> Result<(Request<()>, Target), ClientError> {
    if let Some(what) = &config.malformed {
        return Err(ClientError::invalid(&**what));
    }
    let mut request = config.url.as_str().into_client_request()?;
    let target = target(&request)?;
    let mut headers = config.headers.clone();
    if let Some(HeaderSource(make)) = &config.header_source {
        for (name, value) in &make().await.map_err(|error| ClientError::Headers(error.into()))? {
            add(&mut headers, name.clone(), value.clone()).map_err(ClientError::invalid)?;
        }
    }
    // A client must send one `Cookie` header (RFC 6265, section 5.4).
    let cookies: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1 {
        let cookies = HeaderValue::from_bytes(&cookies.join(&b"; "[..])).map_err(ClientError::invalid)?;
        headers.insert(header::COOKIE, cookies);
    }
    for (name, value) in &headers {
        if name == header::HOST {
            request.headers_mut().insert(name, value.clone());
        } else {
            request.headers_mut().append(name, value.clone());
        }
    }
    if !config.protocols.is_empty() {
        let protocols = HeaderValue::try_from(config.protocols.join(", ")).map_err(ClientError::invalid)?;
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, protocols);
    }
    Ok((request, target))
}

fn target(request: &Request<()>) -> Result<Target, ClientError> {
    let (is_tls, default_port) = match request.uri().scheme_str() {
        Some("ws") => (false, 80),
        Some("wss") if cfg!(feature = "client-tls") => (true, 443),
        Some("wss") => {
            return Err(ClientError::invalid("wss needs the feature `client-tls`: enable it in Cargo.toml"));
        }
        _ => {
            let what = "the URL's scheme is neither ws nor wss: write `ws://…` or `wss://…`";
            return Err(ClientError::invalid(what));
        }
    };
    let host = request.uri().host().ok_or_else(|| ClientError::invalid("the URL has no host"))?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned();
    Ok(Target { host, port: request.uri().port_u16().unwrap_or(default_port), is_tls })
}

/// Adds a header to those that the application set, or says why it cannot be set.
pub(super) fn add(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) -> Result<(), String> {
    match refusal(&name, &value) {
        None if name == header::HOST && headers.contains_key(&name) => {
            Err("the header `host` is set twice: set it once".to_owned())
        }
        None => {
            headers.append(name, value);
            Ok(())
        }
        Some(why) => Err(format!("the header `{name}` cannot be set: {why}")),
    }
}

/// Why an application cannot set this header, if it cannot.
fn refusal(name: &HeaderName, value: &HeaderValue) -> Option<&'static str> {
    match name.as_str() {
        "host" => {
            let host = value.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
            host.is_none_or(|host| host.as_str().contains('@')).then_some("its value is not a host")
        }
        "sec-websocket-protocol" => Some("use `with_subprotocol` to offer subprotocols"),
        "sec-websocket-extensions" => Some("the client supports no extensions"),
        "connection" | "upgrade" => Some("the handshake sets it"),
        name if name.starts_with("sec-websocket-") => Some("the handshake sets it"),
        "content-length" | "transfer-encoding" | "expect" => Some("a handshake has no body"),
        _ => None,
    }
}

/// Whether this is a token in the sense of HTTP: letters, digits and some marks.
pub(super) fn is_token(text: &str) -> bool {
    // Header names are tokens, too.
    HeaderName::try_from(text).is_ok()
}

/// A cookie as it is sent (RFC 6265, section 4.2.1), or why it cannot be.
pub(super) fn cookie(name: &str, value: &str) -> Result<HeaderValue, String> {
    if !is_token(name) {
        return Err(format!("the cookie's name {name:?} is not a token: use letters, digits and `-._`"));
    }
    let is_octet = |byte: u8| matches!(byte, 0x21 | 0x23..=0x2b | 0x2d..=0x3a | 0x3c..=0x5b | 0x5d..=0x7e);
    let bare = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value);
    if !bare.bytes().all(is_octet) {
        return Err(format!(
            "the value of the cookie `{name}` has a character that a cookie cannot have: percent-encode it"
        ));
    }
    HeaderValue::try_from(format!("{name}={value}")).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::cookie;

    #[test]
    fn a_cookie_has_a_name_and_a_value_that_end_where_they_should() {
        for (name, value, sent) in [("id", "a1-=_/", "id=a1-=_/"), ("Q", "\"x\"", "Q=\"x\""), ("e", "", "e=")]
        {
            assert_eq!(cookie(name, value).unwrap(), sent);
        }
        for (name, value) in [
            ("", "x"),
            ("a b", "x"),
            ("a=b", "x"),
            ("a", "x;y"),
            ("a", "x y"),
            ("a", "\""),
            ("a", "é"),
            ("a", "\n"),
        ] {
            assert!(cookie(name, value).is_err(), "{name:?} {value:?}");
        }
    }
}
