//! The load balancer: passes each connection on to a node that is ready, one node after the other.
//!
//! It forwards bytes; a WebSocket is a connection like any other. Which nodes are ready, their route `/ready` says. If none
//! is, as when the broker is away, those that listen are used all the same. What nginx does beyond that is in
//! `docs/deploy`.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::node::Started;

/// How often a node is asked whether it is ready. Shorter than the pause of a node that restarts.
const CHECK_EVERY: Duration = Duration::from_millis(200);
/// How long a node may take to accept a connection or to say whether it is ready.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// After an error of `accept`, such as too many open descriptors.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

const NO_NODE: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// Shows the address of a node while it is ready, and says when that changes.
pub(crate) async fn check(
    name: String,
    mut started: watch::Receiver<Option<Started>>,
    ready: watch::Sender<Option<SocketAddr>>,
) {
    loop {
        let address = started.borrow_and_update().as_ref().map(|started| started.address);
        let is_ready = match address {
            Some(address) => timeout(ANSWER_WITHIN, is_ready(address)).await.is_ok_and(|ready| ready.is_ok()),
            None => false,
        };
        let address = address.filter(|_| is_ready);
        let has_changed = ready.send_if_modified(|ready| std::mem::replace(ready, address) != address);
        if has_changed {
            println!("{name}: {}", if is_ready { "ready" } else { "not ready" });
        }
        tokio::select! {
            () = sleep(CHECK_EVERY) => {}
            changed = started.changed() => if changed.is_err() { return },
        }
    }
}

/// An error if it is not.
async fn is_ready(address: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /ready HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut status = *b"HTTP/1.1 200";
    stream.read_exact(&mut status).await?;
    if &status == b"HTTP/1.1 200" { Ok(()) } else { Err(std::io::ErrorKind::NotConnected.into()) }
}

/// What is known of a node.
#[derive(Clone)]
pub(crate) struct Upstream {
    pub(crate) started: watch::Receiver<Option<Started>>,
    /// Its address while it is ready.
    pub(crate) ready: watch::Receiver<Option<SocketAddr>>,
}

/// Accepts connections for as long as this process lives.
pub(crate) async fn balance(listener: TcpListener, nodes: Vec<Upstream>) {
    for next in 0.. {
        let client = loop {
            match listener.accept().await {
                Ok((client, _)) => break client,
                Err(_) => sleep(ACCEPT_AGAIN_AFTER).await,
            }
        };
        // Beginning with another node each time; the others are tried if it is not ready or does not accept.
        let (before, after) = nodes.split_at(next % nodes.len());
        let in_turn = || after.iter().chain(before);
        let mut candidates: Vec<_> = in_turn().filter_map(|node| *node.ready.borrow()).collect();
        if candidates.is_empty() {
            let started = in_turn().filter_map(|node| node.started.borrow().clone());
            candidates = started.map(|started| started.address).collect();
        }
        tokio::spawn(pass_on(client, candidates));
    }
}

async fn pass_on(mut client: TcpStream, nodes: Vec<SocketAddr>) {
    for address in nodes {
        if let Ok(Ok(mut node)) = timeout(ANSWER_WITHIN, TcpStream::connect(address)).await {
            let _ = client.set_nodelay(true).and(node.set_nodelay(true));
            // An error is the end of one of the two, and the other sees it as such.
            let _ = copy_bidirectional(&mut client, &mut node).await;
            return;
        }
    }
    let _ = client.write_all(NO_NODE).await;
}
