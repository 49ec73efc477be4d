//! A TCP listener for many clients that connect at once.
//!
//! A plain tokio listener with the options that WebSockets need. Does not know the server that accepts from it.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket, ToSocketAddrs, lookup_host};

/// Clients that may wait to be accepted. The system may allow fewer (`net.core.somaxconn`, 4096 by default).
const BACKLOG: u32 = 4096;

/// Listens on an address, such as `"[::]:3000"`, for `axum::serve`.
///
/// Like tokio's [`TcpListener::bind`], which leaves room for 128 clients that wait to be accepted: when more than that
/// connect at once, as they do after a restart, the system ignores the others, and they try again after 1, 3 and 7
/// seconds. Here it is room for 4,096, or what the system allows (on Linux `net.core.somaxconn`). On Linux the
/// connections also inherit `TCP_NODELAY`, so that HTTP responses are sent at once, too.
///
/// ```no_run
/// # async fn serve(app: axum::Router) -> std::io::Result<()> {
/// axum::serve(shardcast::listen("[::]:3000").await?, app).await
/// # }
/// ```
///
/// # Errors
/// The system's, for instance if the address is in use, or if its name cannot be resolved. If the name resolves to several
/// addresses and none can be used, the error of the last one.
pub async fn listen(address: impl ToSocketAddrs) -> io::Result<TcpListener> {
    let mut refused = None;
    for address in lookup_host(address).await? {
        match bind(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused
        .unwrap_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the name resolves to no address")))
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    shardcast_engine::prepare_tcp(&socket)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::TcpStream;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn hundreds_of_clients_can_connect_before_any_is_accepted() {
        let listener = listen("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // Beyond the backlog a client is not refused, but ignored.
        let connect = |_| TcpStream::connect_timeout(&address, Duration::from_secs(5));
        let clients: Vec<_> = (0..300).map(connect).collect::<Result<_, _>>().unwrap();
        assert_eq!(clients.len(), 300);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn connections_inherit_what_the_engine_needs() {
        let listener = listen("localhost:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        assert!(accepted.nodelay().unwrap());
        assert_eq!(socket2::SockRef::from(&accepted).tcp_notsent_lowat().unwrap(), 16 << 10);
    }

    #[tokio::test]
    async fn a_server_that_starts_again_gets_its_port_although_it_has_just_closed_connections() {
        let listener = listen("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        // Whoever closes first keeps the port for a minute.
        drop((accepted, listener));
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        drop(client);
        assert_eq!(listen(address).await.unwrap().local_addr().unwrap(), address);
    }

    #[tokio::test]
    async fn an_address_in_use_is_an_error() {
        let first = listen("127.0.0.1:0").await.unwrap();
        let error = listen(first.local_addr().unwrap()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn of_several_addresses_the_first_that_can_be_used_is_used() {
        let other = listen("127.0.0.1:0").await.unwrap();
        let (in_use, free) = (other.local_addr().unwrap(), "127.0.0.1:0".parse().unwrap());
        // Reserved for documentation: no machine has it.
        let foreign = "192.0.2.1:0".parse().unwrap();
        let listener = listen(&[in_use, foreign, free][..]).await.unwrap();
        assert!(listener.local_addr().unwrap().ip().is_loopback());
        let error = listen(&[foreign, in_use][..]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "the last one's");
        let error = listen(&[][..]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
