//! Opens the crowd: connects and shakes hands, a bounded number at a time.
//!
//! Bounded, because a listen backlog that overflows costs a second per lost SYN and would be mistaken for a slow
//! server. Returns only when every handshake is done, so that nothing of it is measured.

use std::{
    io,
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token};

use super::{
    candidate::{Candidate, CandidateError},
    crowd::Crowd,
    role::Cast,
    slow,
    target::Target,
};

const STALLED_AFTER: Duration = Duration::from_secs(10);

/// Why not everybody is connected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("connection {index} is no WebSocket")]
    Candidate { index: usize, source: CandidateError },
    #[error("{open} of {wanted} connections are open, and no more for {}s", STALLED_AFTER.as_secs())]
    Stalled { open: usize, wanted: usize },
    #[error("epoll failed")]
    Poll(#[from] io::Error),
}

/// Opens a WebSocket for every part of the cast, each at its group's path.
/// `at_once` handshakes are on their way at any time.
pub(crate) fn connect(target: &Target, cast: &Cast, at_once: usize) -> Result<Crowd, ConnectError> {
    let wanted = cast.len();
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(2 * at_once);
    let requests = target.requests(cast.groups());
    let mut candidates: Vec<(Candidate, bool)> = Vec::with_capacity(wanted);
    let mut open = 0;
    let mut progress = Instant::now();
    while open < wanted {
        while candidates.len() < wanted && candidates.len() < open + at_once {
            let index = candidates.len();
            let buffer = slow::receive_buffer(cast.role(index));
            let candidate = Candidate::start(target.address, poll.registry(), Token(index), buffer)
                .map_err(|error| ConnectError::Candidate { index, source: error.into() })?;
            candidates.push((candidate, false));
        }
        match poll.poll(&mut events, Some(Duration::from_millis(100))) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            outcome => outcome?,
        }
        for event in &events {
            let Token(index) = event.token();
            let (candidate, is_open) = &mut candidates[index];
            if !*is_open {
                *is_open = candidate
                    .advance(&requests[cast.group(index)])
                    .map_err(|source| ConnectError::Candidate { index, source })?;
                if *is_open {
                    open += 1;
                    progress = Instant::now();
                }
            }
        }
        if progress.elapsed() > STALLED_AFTER {
            return Err(ConnectError::Stalled { open, wanted });
        }
    }
    Ok(Crowd::new(poll, candidates.into_iter().map(|(candidate, _)| candidate.into_parts()).collect()))
}
