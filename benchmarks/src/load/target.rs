//! A server's address and path, parsed from a `ws://` or `wss://` URL.
//!
//! `{group}` in the path is replaced by a group's number.

use std::{net::SocketAddr, str::FromStr};

use crate::handshake;

/// The placeholder for a group's number in a URL.
pub(crate) const GROUP: &str = "{group}";

/// Why a URL is not accepted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TargetError {
    #[error("{0:?} must have the form ws://IP:PORT/path or wss://IP:PORT/path")]
    Form(String),
}

/// One server and one of its routes.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    path: String,
    pub(crate) is_tls: bool,
}

impl Target {
    /// The handshake requests, by group.
    pub(crate) fn requests(&self, groups: usize) -> Vec<Vec<u8>> {
        let host = self.address.to_string();
        (0..groups)
            .map(|group| handshake::request(&host, &self.path.replace(GROUP, &group.to_string())))
            .collect()
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(url: &str) -> Result<Self, TargetError> {
        let form = || TargetError::Form(url.to_owned());
        let (scheme, rest) = url.split_once("://").ok_or_else(form)?;
        let is_tls = match scheme {
            "ws" => false,
            "wss" => true,
            _ => return Err(form()),
        };
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        // Addresses only: a name would need a resolver, and the loopback needs none.
        let address = host.replace("localhost", "127.0.0.1").parse().map_err(|_| form())?;
        Ok(Self { address, path: format!("/{path}"), is_tls })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_an_address_and_a_path() {
        let target: Target = "ws://localhost:8080/ws?a=b".parse().unwrap();
        assert_eq!(
            (target.address.to_string().as_str(), target.path.as_str()),
            ("127.0.0.1:8080", "/ws?a=b")
        );
        assert!(!target.is_tls && "wss://127.0.0.1:1/".parse::<Target>().unwrap().is_tls);
        assert!("http://127.0.0.1:1/".parse::<Target>().is_err());
        assert!("ws://127.0.0.1/".parse::<Target>().is_err());
    }

    #[test]
    fn every_group_has_its_own_path() {
        let target: Target = "ws://127.0.0.1:1/group/{group}".parse().unwrap();
        let requests = target.requests(2);
        assert!(requests[0].starts_with(b"GET /group/0 ") && requests[1].starts_with(b"GET /group/1 "));
    }
}
