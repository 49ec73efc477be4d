//! Origins: the origins whose pages may open a WebSocket.
//!
//! An immutable list and pure functions; the list is owned by the application. Entries are normalized to the form that
//! browsers send (the serialization of an origin in the WHATWG URL standard). An entry that can never match what a
//! browser sends is refused when the list is made; otherwise the mistake would first show as users who cannot connect.
//! Knows schemes, hosts and ports. Does not know requests.

use std::{fmt, net::Ipv6Addr, sync::Arc};

use http::HeaderValue;
use thiserror::Error;

/// The origins whose pages may open a WebSocket, checked once: see
/// [`WebSocketUpgrade::allowed_origins`](crate::WebSocketUpgrade::allowed_origins). Cloning is cheap.
///
/// An origin is a scheme, a host and an optional port. Case, one trailing slash and the default ports of `http` and
/// `https` make no difference, as in browsers. `null`, which browsers send for sandboxed pages and local files, is
/// allowed only if it is listed.
///
/// ```
/// # use shardcast::AllowedOrigins;
/// let origins = AllowedOrigins::new(["https://example.org", "http://localhost:3000"])?;
/// assert!(AllowedOrigins::new(["https://*.example.org"]).is_err()); // it would match nothing
/// # Ok::<(), shardcast::InvalidOrigin>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedOrigins(Arc<[String]>);

/// An entry of a list of origins that can never be the origin of a page.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{entry}` can never be the origin of a page: {why}")]
pub struct InvalidOrigin {
    /// The entry.
    pub entry: String,
    why: &'static str,
}

impl AllowedOrigins {
    /// A list of origins such as `https://example.org` or `http://localhost:3000`. An empty list allows no page.
    ///
    /// # Errors
    /// The first entry that can never match, with the reason: a wildcard, a path, no scheme, `ws://` or `wss://` (pages
    /// are loaded by `http://` or `https://`), spaces, a host that is not ASCII (write it in punycode).
    pub fn new<I>(origins: I) -> Result<Self, InvalidOrigin>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let normalized = origins.into_iter().map(|entry| {
            let entry = entry.as_ref();
            normalize(entry).map_err(|why| InvalidOrigin { entry: entry.to_owned(), why })
        });
        normalized.collect::<Result<_, _>>().map(Self)
    }

    /// The origins in the form that browsers send.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Whether a page from `origin` may connect.
    pub(crate) fn allow(&self, origin: &HeaderValue) -> bool {
        let origin = origin.to_str().ok().and_then(|origin| normalize(origin).ok());
        origin.is_some_and(|origin| self.0.contains(&origin))
    }
}

impl<'a> IntoIterator for &'a AllowedOrigins {
    type Item = &'a String;
    type IntoIter = std::slice::Iter<'a, String>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl fmt::Display for AllowedOrigins {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.join(", "))
    }
}

/// The origin as a browser would send it.
fn normalize(origin: &str) -> Result<String, &'static str> {
    if origin == "null" {
        return Ok(origin.to_owned());
    }
    if origin.contains('*') {
        return Err("wildcards are not supported; list each origin, or set no list to allow every origin");
    }
    if origin.contains(|letter: char| letter.is_whitespace() || letter.is_control()) {
        return Err("it contains white space; write each origin as a separate entry");
    }
    if !origin.is_ascii() {
        return Err("it is not ASCII; write the host in punycode (`xn--…`), as browsers send it");
    }
    let Some((scheme, rest)) = origin.split_once("://") else {
        return Err("it has no scheme; write `https://…`");
    };
    let scheme = scheme.to_ascii_lowercase();
    let is_scheme = scheme.starts_with(|letter: char| letter.is_ascii_alphabetic())
        && scheme.chars().all(|letter| letter.is_ascii_alphanumeric() || matches!(letter, '+' | '-' | '.'));
    if !is_scheme {
        return Err("its scheme is not valid; write `https://…`");
    }
    let default_port = match scheme.as_str() {
        "http" => Some(80),
        "https" => Some(443),
        "ws" | "wss" => {
            return Err("it is the URL of a WebSocket; write the page's `http://…` or `https://…`");
        }
        _ => None,
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.contains(['/', '?', '#', '@', '\\', '%', ',']) {
        return Err("it has more than a scheme, a host and a port; remove the rest");
    }
    let (host, port) = split_port(rest)?;
    if host.is_empty() && default_port.is_some() {
        return Err("it has no host; write `https://HOST`");
    }
    let port = match port {
        Some(port) if Some(port) != default_port => format!(":{port}"),
        _ => String::new(),
    };
    Ok(format!("{scheme}://{host}{port}"))
}

const INVALID_IPV6: &str = "its IPv6 address is not valid; write `[::1]` or `[::1]:3000`";

/// The host in the form that browsers send, and the port, if there is one.
fn split_port(authority: &str) -> Result<(String, Option<u16>), &'static str> {
    let (host, port) = if let Some(bracketed) = authority.strip_prefix('[') {
        let (address, port) = bracketed.split_once(']').ok_or(INVALID_IPV6)?;
        let address: Ipv6Addr = address.parse().map_err(|_| INVALID_IPV6)?;
        if !port.is_empty() && !port.starts_with(':') {
            return Err(INVALID_IPV6);
        }
        (serialize(address), port.strip_prefix(':'))
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host.to_ascii_lowercase(), Some(port)),
            None => (authority.to_ascii_lowercase(), None),
        }
    };
    match port {
        None | Some("") => Ok((host, None)),
        Some(port) if port.bytes().all(|digit| digit.is_ascii_digit()) => {
            let port = port.parse().map_err(|_| "its port is above 65535")?;
            Ok((host, Some(port)))
        }
        Some(_) => Err("its port is not a number"),
    }
}

/// The form of the URL standard, which has no dotted part where `Display` writes one.
fn serialize(address: Ipv6Addr) -> String {
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, high, low] => format!("[::ffff:{high:x}:{low:x}]"),
        _ => format!("[{address}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allow(entries: &[&str], origin: &'static str) -> bool {
        AllowedOrigins::new(entries).unwrap().allow(&HeaderValue::from_static(origin))
    }

    #[test]
    fn what_is_one_origin_for_a_browser_is_one_here() {
        for (entry, sent) in [
            ("https://example.org", "https://example.org"),
            ("https://Example.ORG", "https://example.org"),
            ("HTTPS://example.org/", "https://example.org"),
            ("https://example.org:443", "https://example.org"),
            ("http://example.org:80/", "http://example.org"),
            ("https://example.org:", "https://example.org"),
            ("http://localhost:03000", "http://localhost:3000"),
            ("http://[0:0::1]:3000", "http://[::1]:3000"),
            ("https://[::FFFF:1.2.3.4]", "https://[::ffff:102:304]"),
            ("capacitor://localhost", "capacitor://localhost"),
            ("file:///", "file://"),
            ("null", "null"),
        ] {
            assert!(allow(&[entry], sent), "{entry}");
        }
    }

    #[test]
    fn what_are_two_origins_for_a_browser_are_two_here() {
        let entries = &["https://example.org", "http://localhost:3000", "https://example.org:8443"];
        for sent in [
            "http://example.org",
            "http://localhost",
            "http://localhost:3001",
            "https://example.org.evil.test",
            "https://www.example.org",
            "https://example.org:80",
            "null",
            "",
            "example.org",
            "https://example.org https://evil.test",
        ] {
            assert!(!allow(entries, sent), "{sent}");
        }
    }

    #[test]
    fn an_entry_that_can_never_match_is_refused_by_name() {
        for entry in [
            "",
            "*",
            "https://*.example.org",
            "example.org",
            "//example.org",
            "https://example.org/chat",
            "https://example.org//",
            "https://example.org?x",
            "https://user@example.org",
            "https://",
            "https://:443",
            "wss://example.org",
            "ws://localhost:3000",
            "https://exämple.org",
            "https://a.test https://b.test",
            " https://a.test",
            "https://a.test,https://b.test",
            "https://a.test:http",
            "https://a.test:+80",
            "https://a.test:65536",
            "https://[::1",
            "https://[example]",
            "1https://a.test",
        ] {
            let error = AllowedOrigins::new(["https://fine.test", entry]).unwrap_err();
            assert_eq!(error.entry, entry);
            assert!(error.to_string().starts_with(&format!("`{entry}` can never be")), "{error}");
        }
    }
}
