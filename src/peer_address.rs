//! The client's address, as far as it is known: from the socket, or from trusted proxies.
//!
//! Behind a reverse proxy the socket's remote address is the proxy's, and the client's address is in a header that
//! every client can set. So the header is read from its end, which the nearest proxy wrote, and only while each hop is
//! a trusted proxy. Pure functions over addresses and header lines; a `PeerAddress` belongs to one handshake. Does not
//! know sockets or limits.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use http::{HeaderMap, HeaderName, header};
use thiserror::Error;

/// The reverse proxies that are trusted to report a client's address: see
/// [`WebSocketUpgrade::trusted_proxies`](crate::WebSocketUpgrade::trusted_proxies). Cloning is cheap.
///
/// Choose the header that your proxy **sets or appends to**. A header that it only forwards is under the client's
/// control.
///
/// ```
/// # use shardcast::TrustedProxies;
/// let proxies = TrustedProxies::x_forwarded_for(["127.0.0.1", "10.0.0.0/8", "fd00::/8"])?;
/// # Ok::<(), shardcast::InvalidNetwork>(())
/// ```
#[derive(Clone, Debug)]
pub struct TrustedProxies {
    networks: Arc<[Network]>,
    format: Format,
}

#[derive(Clone, Copy, Debug)]
enum Format {
    Forwarded,
    XForwardedFor,
}

/// An entry of a list of trusted proxies that is neither an address nor a network.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{entry}` is neither an address nor a network; write it like `127.0.0.1` or `10.0.0.0/8`")]
pub struct InvalidNetwork {
    /// The entry.
    pub entry: String,
}

/// A host that a request has passed; `None` if its address is not given (`unknown`, a name, or malformed).
type Hop = Option<IpAddr>;

impl TrustedProxies {
    /// Proxies at these addresses or in these networks that report the client's address in `X-Forwarded-For`, as nginx
    /// does with `proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for`.
    ///
    /// # Errors
    /// The first entry that is neither an address nor a network (`10.0.0.0/8`).
    pub fn x_forwarded_for<I>(networks: I) -> Result<Self, InvalidNetwork>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        Self::new(networks, Format::XForwardedFor)
    }

    /// The same for proxies that report it in `Forwarded` (RFC 7239).
    ///
    /// # Errors
    /// As for [`x_forwarded_for`](Self::x_forwarded_for).
    pub fn forwarded<I>(networks: I) -> Result<Self, InvalidNetwork>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        Self::new(networks, Format::Forwarded)
    }

    fn new<I>(networks: I, format: Format) -> Result<Self, InvalidNetwork>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let parse = |entry: I::Item| {
            let entry = entry.as_ref();
            Network::parse(entry).ok_or_else(|| InvalidNetwork { entry: entry.to_owned() })
        };
        Ok(Self { networks: networks.into_iter().map(parse).collect::<Result<_, _>>()?, format })
    }

    fn trust(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(address))
    }

    /// The hosts that the request has passed, the farthest from the server first.
    fn hops(&self, headers: &HeaderMap) -> Vec<Hop> {
        match self.format {
            Format::Forwarded => {
                lines(headers, header::FORWARDED).flat_map(|line| forwarded(line.unwrap_or("\""))).collect()
            }
            Format::XForwardedFor => lines(headers, HeaderName::from_static("x-forwarded-for"))
                .flat_map(|line| line.unwrap_or("?").split(',').map(node))
                .collect(),
        }
    }

    /// Walks from the socket's remote address towards the client, while each hop is trusted and reports the next one.
    fn client(&self, peer: IpAddr, hops: &[Hop]) -> IpAddr {
        let mut client = peer.to_canonical();
        for hop in hops.iter().rev() {
            match hop {
                Some(address) if self.trust(client) => client = *address,
                _ => break,
            }
        }
        client
    }
}

/// What is known about the address of a request's client.
#[derive(Clone, Debug, Default)]
pub(crate) struct PeerAddress {
    /// The socket's remote address, if the server's connect info contains it.
    socket: Option<IpAddr>,
    /// The address that the application has set; overrides all others.
    told: Option<IpAddr>,
    proxies: Option<(TrustedProxies, Vec<Hop>)>,
}

impl PeerAddress {
    pub(crate) fn of_socket(socket: Option<IpAddr>) -> Self {
        Self { socket, ..Self::default() }
    }

    pub(crate) fn trust(&mut self, proxies: &TrustedProxies, headers: &HeaderMap) {
        self.proxies = Some((proxies.clone(), proxies.hops(headers)));
    }

    pub(crate) fn tell(&mut self, address: IpAddr) {
        self.told = Some(address.to_canonical());
    }

    /// The client's address, if it is known before there is a socket.
    pub(crate) fn known(&self) -> Option<IpAddr> {
        self.with_socket(self.socket)
    }

    /// The client's address, with the remote address of the socket after the upgrade.
    pub(crate) fn with_socket(&self, socket: Option<IpAddr>) -> Option<IpAddr> {
        if self.told.is_some() {
            return self.told;
        }
        let socket = self.socket.or(socket)?;
        Some(match &self.proxies {
            Some((proxies, hops)) => proxies.client(socket, hops),
            None => socket.to_canonical(),
        })
    }
}

/// An IP network: all addresses with the same first `bits` bits.
#[derive(Clone, Copy, Debug)]
struct Network {
    first: u128,
    bits: u32,
}

impl Network {
    fn parse(entry: &str) -> Option<Self> {
        let (address, bits) = match entry.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u32>().ok()?)),
            None => (entry, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let (most, above) = if address.is_ipv4() { (32, 96) } else { (128, 0) };
        let bits = bits.unwrap_or(most);
        (bits <= most).then(|| Self { first: number(address), bits: above + bits })
    }

    fn contains(&self, address: IpAddr) -> bool {
        let differing = number(address) ^ self.first;
        self.bits == 0 || differing >> (128 - self.bits) == 0
    }
}

/// The address's bits, with IPv4 in its IPv6-mapped form.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// A header's lines; `None` for a line that is not text.
fn lines(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = Option<&str>> {
    let lines: Vec<_> = headers.get_all(name).iter().map(|line| line.to_str().ok()).collect();
    lines.into_iter()
}

/// The hops in one line of `Forwarded`. A malformed line counts as one unknown hop: with unbalanced quotes, text from
/// the client could be taken for text from a proxy.
fn forwarded(line: &str) -> Vec<Hop> {
    let Some(elements) = split_outside_quotes(line, ',') else { return vec![None] };
    let address = |element: &str| {
        let pairs = split_outside_quotes(element, ';')?;
        let mut values = pairs.into_iter().filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            name.trim().eq_ignore_ascii_case("for").then_some(value)
        });
        let (value, another) = (values.next()?, values.next());
        if another.is_some() { None } else { node(&unquote(value.trim())) }
    };
    elements.into_iter().map(address).collect()
}

/// `None` if a quoted string does not end.
fn split_outside_quotes(line: &str, separator: char) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut is_quoted, mut is_escaped) = (Vec::new(), 0, false, false);
    for (at, letter) in line.char_indices() {
        if is_escaped {
            is_escaped = false;
        } else if is_quoted && letter == '\\' {
            is_escaped = true;
        } else if letter == '"' {
            is_quoted = !is_quoted;
        } else if letter == separator && !is_quoted {
            parts.push(&line[start..at]);
            start = at + 1;
        }
    }
    parts.push(&line[start..]);
    (!is_quoted).then_some(parts)
}

fn unquote(value: &str) -> String {
    let Some(inside) = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) else {
        return value.to_owned();
    };
    let mut is_escaped = false;
    inside
        .chars()
        .filter(|letter| {
            is_escaped = *letter == '\\' && !is_escaped;
            !is_escaped
        })
        .collect()
}

/// An address with an optional port.
fn node(text: &str) -> Hop {
    let text = text.trim();
    let address = if let Some(bracketed) = text.strip_prefix('[') {
        let (address, port) = bracketed.split_once(']')?;
        if !port.is_empty() && !port.starts_with(':') {
            return None;
        }
        IpAddr::V6(address.parse::<Ipv6Addr>().ok()?)
    } else if let Ok(address) = text.parse::<IpAddr>() {
        address
    } else {
        let (address, _port) = text.split_once(':')?;
        IpAddr::V4(address.parse::<Ipv4Addr>().ok()?)
    };
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn headers(name: &'static str, lines: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(name, line.parse().unwrap());
        }
        headers
    }

    /// The client's address by these lines, for a server that trusts 10.0.0.0/8 and ::1 and a connection from `peer`.
    fn client(peer: &str, name: &'static str, lines: &[&str]) -> IpAddr {
        let trusted = ["10.0.0.0/8", "::1"];
        let proxies = match name {
            "forwarded" => TrustedProxies::forwarded(trusted),
            _ => TrustedProxies::x_forwarded_for(trusted),
        };
        let mut address = PeerAddress::of_socket(Some(ip(peer)));
        address.trust(&proxies.unwrap(), &headers(name, lines));
        address.known().unwrap()
    }

    #[test]
    fn a_trusted_proxy_tells_where_the_client_is() {
        for (lines, expected) in [
            (&["192.0.2.1"][..], "192.0.2.1"),
            (&["192.0.2.1:4711"], "192.0.2.1"),
            (&["2001:db8::1"], "2001:db8::1"),
            (&["[2001:db8::1]:4711"], "2001:db8::1"),
            (&["::ffff:192.0.2.1"], "192.0.2.1"),
            (&["192.0.2.1, 10.1.1.1", " 10.2.2.2"], "192.0.2.1"),
            (&["10.3.3.3"], "10.3.3.3"),
            (&[], "10.0.0.1"),
        ] {
            assert_eq!(client("10.0.0.1", "x-forwarded-for", lines), ip(expected), "{lines:?}");
        }
        for (lines, expected) in [
            (&["for=192.0.2.1;proto=https;by=10.0.0.1"][..], "192.0.2.1"),
            (&["proto=https; FOR = \"192.0.2.1:_port\""], "192.0.2.1"),
            (&[r#"For="[2001:db8::1]:4711""#], "2001:db8::1"),
            (&[r#"for="192.\0.2.1""#], "192.0.2.1"),
            (&["for=192.0.2.1, for=10.1.1.1", "for=10.2.2.2"], "192.0.2.1"),
            (&[r#"for="_a,b;c", for=192.0.2.1"#], "192.0.2.1"),
        ] {
            assert_eq!(client("::1", "forwarded", lines), ip(expected), "{lines:?}");
        }
    }

    #[test]
    fn what_a_stranger_says_counts_for_nothing() {
        // The connection is not from a proxy.
        assert_eq!(client("192.0.2.9", "x-forwarded-for", &["10.0.0.7"]), ip("192.0.2.9"));
        // Sent by the client, before what the proxy has appended.
        assert_eq!(client("10.0.0.1", "x-forwarded-for", &["203.0.113.5, 192.0.2.1"]), ip("192.0.2.1"));
        assert_eq!(client("10.0.0.1", "x-forwarded-for", &["203.0.113.5", "192.0.2.1"]), ip("192.0.2.1"));
        assert_eq!(client("10.0.0.1", "forwarded", &["for=203.0.113.5, for=192.0.2.1"]), ip("192.0.2.1"));
        // The other header, which this proxy only forwards.
        let proxies = TrustedProxies::x_forwarded_for(["10.0.0.1"]).unwrap();
        assert!(proxies.hops(&headers("forwarded", &["for=203.0.113.5"])).is_empty());
    }

    #[test]
    fn where_a_proxy_does_not_say_it_is_the_nearest_that_is_known() {
        for line in ["for=unknown", "for=_hidden", "proto=https", "for=", "for=1.2.3.4;for=5.6.7.8", ""] {
            assert_eq!(client("10.0.0.1", "forwarded", &[line]), ip("10.0.0.1"), "{line}");
        }
        // A quote that does not end would hide what the proxy has appended.
        let line = r#"for="203.0.113.5, for=192.0.2.1"#;
        assert_eq!(client("10.0.0.1", "forwarded", &[line]), ip("10.0.0.1"));
        let lines = ["for=203.0.113.5, for=unknown, for=10.1.1.1"];
        assert_eq!(client("10.0.0.1", "forwarded", &lines), ip("10.1.1.1"));
        for line in ["unknown", "", "192.0.2.1.5", "[2001:db8::1]x", "[2001:db8::1", "fe80::1%eth0"] {
            assert_eq!(client("10.0.0.1", "x-forwarded-for", &[line]), ip("10.0.0.1"), "{line}");
        }
    }

    #[test]
    fn an_address_is_known_late_or_told_or_not_at_all() {
        let mut address = PeerAddress::of_socket(None);
        assert_eq!(address.known(), None);
        assert_eq!(address.with_socket(Some(ip("::ffff:192.0.2.1"))), Some(ip("192.0.2.1")));
        let proxies = TrustedProxies::x_forwarded_for(["192.0.2.1"]).unwrap();
        address.trust(&proxies, &headers("x-forwarded-for", &["203.0.113.5"]));
        assert_eq!(address.with_socket(Some(ip("192.0.2.1"))), Some(ip("203.0.113.5")));
        assert_eq!(address.with_socket(None), None);
        address.tell(ip("198.51.100.1"));
        assert_eq!(address.known(), Some(ip("198.51.100.1")));
    }

    #[test]
    fn networks_are_told_from_their_neighbours() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.1"),
            ("10.1.2.3", "10.1.2.3", "10.1.2.4"),
            ("10.1.2.3", "::ffff:10.1.2.3", "::10.1.2.3"),
            ("0.0.0.0/0", "203.0.113.5", "2001:db8::1"),
            ("fd00::/8", "fdff::1", "fe00::1"),
            ("::/0", "2001:db8::1", ""),
            ("192.0.2.128/25", "192.0.2.200", "192.0.2.127"),
        ] {
            let network = Network::parse(network).unwrap();
            assert!(network.contains(ip(inside)), "{network:?}");
            assert!(outside.is_empty() || !network.contains(ip(outside)), "{network:?}");
        }
        for bad in ["", "proxy", "10.0.0.0/33", "::/129", "10.0.0/8", "10.0.0.0/", "10.0.0.0/-1"] {
            let error = TrustedProxies::forwarded([bad]).unwrap_err();
            assert_eq!(error.entry, bad);
        }
    }
}
