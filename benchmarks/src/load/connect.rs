//! Opens all connections, with a bounded number of handshakes at a time.
//!
//! Bounded, because a listen backlog that overflows costs a second for each lost SYN and would be mistaken for a slow
//! server. Returns when every handshake is done, so that none of it is in the measurement; their own rate is reported.

use std::{
    io,
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token};

use super::{
    client_pool::ClientPool,
    latencies::Latencies,
    pending_connection::{PendingConnection, PendingError},
    plan::Plan,
    report, slow_readers,
    target::Target,
};
use crate::{
    nonblocking,
    tls::{self, TlsError},
};

/// Without any handshake done for so long, the rest counts as failed.
const PROGRESS_MAX: Duration = Duration::from_secs(10);
const POLL_MAX: Duration = Duration::from_millis(100);

/// Why not all connections are open.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("connection {index} did not become a WebSocket")]
    Pending { index: usize, source: PendingError },
    #[error("{open} of {wanted} connections are open, and none was added for {} s", PROGRESS_MAX.as_secs())]
    NoProgress { open: usize, wanted: usize },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("epoll failed")]
    Poll(#[from] io::Error),
}

/// Opens a WebSocket for every connection of the plan, `at_once` at a time: connection i to target i % N, at the path of
/// group g / N, if it is in the plan's group g. With several targets, N must divide the number of the plan's groups.
pub(crate) fn connect(
    targets: &[Target],
    plan: &Plan,
    at_once: usize,
) -> Result<(ClientPool, report::Handshakes), ConnectError> {
    let wanted = plan.len();
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(2 * at_once);
    let tls = targets.iter().any(|target| target.is_tls).then(tls::client_config).transpose()?;
    let nodes = targets.len();
    let requests: Vec<_> =
        targets.iter().map(|target| target.requests(plan.groups().div_ceil(nodes))).collect();
    let mut connections: Vec<(PendingConnection, bool)> = Vec::with_capacity(wanted);
    let mut latencies = Latencies::default();
    let mut open = 0;
    let start = Instant::now();
    let mut progress = start;
    while open < wanted {
        while connections.len() < wanted.min(open + at_once) {
            let index = connections.len();
            let buffer = slow_readers::receive_buffer(plan.role(index));
            let (registry, token, address) = (poll.registry(), Token(index), targets[index % nodes].address);
            let pending = PendingConnection::start(address, registry, token, buffer, tls.as_ref())
                .map_err(|error| ConnectError::Pending { index, source: error.into() })?;
            connections.push((pending, false));
        }
        nonblocking::poll(&mut poll, &mut events, Some(POLL_MAX))?;
        for event in &events {
            let Token(index) = event.token();
            let (pending, is_open) = &mut connections[index];
            if !*is_open {
                *is_open = pending
                    .advance(&requests[index % nodes][plan.group(index) / nodes])
                    .map_err(|source| ConnectError::Pending { index, source })?;
                if *is_open {
                    open += 1;
                    latencies.record(pending.age());
                    progress = Instant::now();
                }
            }
        }
        if progress.elapsed() > PROGRESS_MAX {
            return Err(ConnectError::NoProgress { open, wanted });
        }
    }
    let per_second = wanted as f64 / start.elapsed().as_secs_f64();
    let handshakes = report::Handshakes { at_once, per_second, latency: latencies.summary() };
    let open = connections.into_iter().map(|(pending, _)| pending.into_parts()).collect();
    Ok((ClientPool::new(poll, open), handshakes))
}
