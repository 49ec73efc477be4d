//! Where the load goes: an address and a path, read from a `ws://` URL.

use std::{net::SocketAddr, str::FromStr};

/// Why a URL is no target.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TargetError {
    #[error("{0:?} does not have the form ws://IP:PORT/path")]
    Form(String),
}

/// One server and one of its routes.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) path: String,
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(url: &str) -> Result<Self, TargetError> {
        let form = || TargetError::Form(url.to_owned());
        let rest = url.strip_prefix("ws://").ok_or_else(form)?;
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        // Addresses only: a name would bring a resolver, and the loopback needs none.
        let address = host.replace("localhost", "127.0.0.1").parse().map_err(|_| form())?;
        Ok(Self { address, path: format!("/{path}") })
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
        assert!("http://127.0.0.1:1/".parse::<Target>().is_err());
        assert!("ws://127.0.0.1/".parse::<Target>().is_err());
    }
}
