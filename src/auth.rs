//! Tokens of clients, before the upgrade: where to find one in a handshake, and how to refuse.
//!
//! Pure: headers and a URI in, a token or a refusal out. What a token means is the application's business. Does not know
//! hubs or sockets.

use std::convert::Infallible;
use std::fmt;

use axum::extract::{FromRequestParts, OptionalFromRequestParts};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, Uri, header};

use crate::handshake::requested_protocols;

/// The subprotocol after which a browser names its token.
pub(crate) const BEARER: &str = "bearer";

/// A token that a client presents with its handshake: an extractor. Its `Debug` does not show the token.
///
/// By default it is looked for in this order:
///
/// 1. the header `Authorization: Bearer …`, for clients that are not browsers;
/// 2. the subprotocols: a browser opens `new WebSocket(url, ["bearer", token])`. The token is not in the URL, so it is in
///    no log of a proxy. `bearer` is selected by the response, unless the application selects another subprotocol.
/// 3. the query: `?token=…` or `?access_token=…`.
///
/// For a cookie or other names, see [`TokenSources`]. As an extractor it refuses a request without a token with 401;
/// `Option<Token>` is `None` then. The token has not been checked: that is the application's part.
///
/// ```
/// use axum::extract::State;
/// use axum::response::{IntoResponse, Response};
/// use shardcast::{Hub, WebSocketUpgrade};
/// use shardcast::auth::{Denied, Token};
/// # struct Chat { user: String }
/// # impl shardcast::WsHub for Chat {
/// #     type Codec = shardcast::RawCodec; type InMessage = String; type OutMessage = String;
/// #     async fn on_message(&self, _: String, _: shardcast::HubContext<Self>) {}
/// # }
/// # async fn verify(token: &str) -> Result<String, &'static str> { Ok(token.to_owned()) }
///
/// async fn connect(ws: WebSocketUpgrade, token: Token, State(chat): State<Hub<Chat>>) -> Result<Response, Denied> {
///     let user = verify(token.as_str()).await.map_err(Denied::unauthorized)?;
///     Ok(ws.serve(&chat, Chat { user }).into_response())
/// }
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    text: String,
    source: TokenSource,
}

/// Where a token was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenSource {
    /// `Authorization: Bearer …`.
    Authorization,
    /// The subprotocol after `bearer`.
    Subprotocol,
    /// A parameter of the query.
    Query,
    /// A cookie.
    Cookie,
}

impl Token {
    /// The token.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Where it was found.
    pub fn source(&self) -> TokenSource {
        self.source
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("source", &self.source).finish_non_exhaustive()
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Token {
    type Rejection = Denied;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Denied> {
        TokenSources::default().find(&parts.headers, &parts.uri)
    }
}

impl<S: Send + Sync> OptionalFromRequestParts<S> for Token {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Infallible> {
        Ok(TokenSources::default().find(&parts.headers, &parts.uri).ok())
    }
}

/// Where to look for a token, in this order: the `Authorization` header, the subprotocols, the query, cookies.
///
/// ```
/// use axum::http::{HeaderMap, Uri};
/// use shardcast::auth::{Token, TokenSources};
///
/// async fn connect(headers: HeaderMap, uri: Uri) -> Result<String, shardcast::auth::Denied> {
///     let token = TokenSources::none().cookie("session").find(&headers, &uri)?;
///     // …
///     # Ok(token.as_str().to_owned())
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSources {
    authorization: bool,
    subprotocol: bool,
    query: Vec<String>,
    cookies: Vec<String>,
}

impl Default for TokenSources {
    /// The sources of the extractor [`Token`].
    fn default() -> Self {
        Self::none().authorization().subprotocol().query("token").query("access_token")
    }
}

impl TokenSources {
    /// No source: to be followed by those that are wanted.
    pub fn none() -> Self {
        Self { authorization: false, subprotocol: false, query: Vec::new(), cookies: Vec::new() }
    }

    /// The header `Authorization: Bearer …`.
    pub fn authorization(self) -> Self {
        Self { authorization: true, ..self }
    }

    /// The subprotocol after `bearer`.
    pub fn subprotocol(self) -> Self {
        Self { subprotocol: true, ..self }
    }

    /// A parameter of the query.
    pub fn query(mut self, name: impl Into<String>) -> Self {
        self.query.push(name.into());
        self
    }

    /// A cookie. Browsers send cookies from the pages of every site, so a service that accepts them must call
    /// [`allowed_origins`](crate::WebSocketUpgrade::allowed_origins).
    pub fn cookie(mut self, name: impl Into<String>) -> Self {
        self.cookies.push(name.into());
        self
    }

    /// The first token in a request with these headers and this URI. Empty ones are skipped.
    ///
    /// # Errors
    /// None was found: 401, with a body that names the sources.
    pub fn find(&self, headers: &HeaderMap, uri: &Uri) -> Result<Token, Denied> {
        let authorization = || self.authorization.then(|| bearer_of(headers)).flatten();
        let subprotocol = || self.subprotocol.then(|| after_bearer(headers)).flatten();
        let query = || self.query.iter().find_map(|name| parameter(uri.query()?, name));
        let cookie = || self.cookies.iter().find_map(|name| cookie(headers, name));
        let found = |token: Option<String>, source| {
            token.filter(|text| !text.is_empty()).map(|text| Token { text, source })
        };
        found(authorization(), TokenSource::Authorization)
            .or_else(|| found(subprotocol(), TokenSource::Subprotocol))
            .or_else(|| found(query(), TokenSource::Query))
            .or_else(|| found(cookie(), TokenSource::Cookie))
            .ok_or_else(|| Denied::unauthorized(format!("a token is needed: send it {self}")))
    }
}

/// For people who write a client: the ways in which a token may be sent.
impl fmt::Display for TokenSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ways = Vec::new();
        if self.authorization {
            ways.push("in the header `Authorization: Bearer TOKEN`".to_owned());
        }
        if self.subprotocol {
            ways.push("in the subprotocols `bearer, TOKEN`".to_owned());
        }
        ways.extend(self.query.iter().map(|name| format!("in the query `?{name}=TOKEN`")));
        ways.extend(self.cookies.iter().map(|name| format!("in the cookie `{name}`")));
        f.write_str(&ways.join(", or "))
    }
}

fn bearer_of(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case(BEARER).then(|| token.trim().to_owned())
}

fn after_bearer(headers: &HeaderMap) -> Option<String> {
    let protocols = requested_protocols(headers);
    let bearer = protocols.iter().position(|protocol| protocol == BEARER)?;
    Some(protocols.get(bearer + 1)?.to_str().ok()?.to_owned())
}

fn parameter(query: &str, name: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

fn cookie(headers: &HeaderMap, name: &str) -> Option<String> {
    let values = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = values.flat_map(|value| value.split(';')).filter_map(|pair| pair.split_once('='));
    pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().trim_matches('"').to_owned())
}

/// A client may not connect: the response instead of the upgrade, with the reason as its body.
///
/// A browser shows neither the status nor the body to its page; other clients and the network tab do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Denied {
    status: StatusCode,
    why: String,
}

impl Denied {
    /// 401: there is no valid token. With `WWW-Authenticate: Bearer`.
    pub fn unauthorized(why: impl fmt::Display) -> Self {
        Self { status: StatusCode::UNAUTHORIZED, why: why.to_string() }
    }

    /// 403: the client is known, and may not do this.
    pub fn forbidden(why: impl fmt::Display) -> Self {
        Self { status: StatusCode::FORBIDDEN, why: why.to_string() }
    }

    /// The response's status: 401 or 403.
    pub fn status(&self) -> StatusCode {
        self.status
    }
}

impl IntoResponse for Denied {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.why).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let parse = |(name, value): &(&str, &str)| {
            Some((name.parse::<header::HeaderName>().ok()?, value.parse().ok()?))
        };
        pairs.iter().filter_map(parse).collect()
    }

    fn find(sources: &TokenSources, pairs: &[(&str, &str)], uri: &str) -> Option<(String, TokenSource)> {
        let token = sources.find(&headers(pairs), &uri.parse().ok()?).ok()?;
        Some((token.as_str().to_owned(), token.source()))
    }

    #[test]
    fn a_token_is_found_in_each_source_and_the_first_one_counts() {
        let all = TokenSources::default().cookie("session");
        let header = ("authorization", "bEaReR  a.b-c ");
        let protocol = ("sec-websocket-protocol", "chat, bearer, d.e_f");
        let cookie = ("cookie", "theme=dark; session=\"j\"; other=x");
        let uri = "/ws?x=1&token=g%2Bh+i";
        use TokenSource::{Authorization, Cookie, Query, Subprotocol};
        let found = |pairs: &[_], uri| find(&all, pairs, uri);
        assert_eq!(found(&[header, protocol, cookie], uri), Some(("a.b-c".into(), Authorization)));
        assert_eq!(found(&[protocol, cookie], uri), Some(("d.e_f".into(), Subprotocol)));
        assert_eq!(found(&[cookie], uri), Some(("g+h i".into(), Query)));
        assert_eq!(found(&[], "/ws?access_token=k"), Some(("k".into(), Query)));
        assert_eq!(found(&[cookie], "/ws?token="), Some(("j".into(), Cookie)), "an empty one is none");
        assert_eq!(
            found(&[("authorization", "Basic abc"), ("sec-websocket-protocol", "bearer")], "/ws"),
            None
        );
        assert_eq!(find(&TokenSources::default(), &[cookie], "/ws"), None, "cookies must be asked for");
        assert_eq!(find(&TokenSources::none(), &[header, protocol, cookie], uri), None);
    }

    #[test]
    fn a_client_without_a_token_is_told_how_to_send_one() {
        let sources = TokenSources::default().cookie("session");
        let Err(denied) = sources.find(&HeaderMap::new(), &Uri::from_static("/ws")) else {
            panic!("there is none")
        };
        assert_eq!(denied.status(), StatusCode::UNAUTHORIZED);
        let expected = "a token is needed: send it in the header `Authorization: Bearer TOKEN`, or in the subprotocols \
                        `bearer, TOKEN`, or in the query `?token=TOKEN`, or in the query `?access_token=TOKEN`, or in \
                        the cookie `session`";
        assert_eq!(denied.to_string(), expected);
    }

    #[test]
    fn a_token_is_not_shown_in_logs() {
        let token = Token { text: "secret".into(), source: TokenSource::Query };
        assert_eq!(format!("{token:?}"), "Token { source: Query, .. }");
    }
}
