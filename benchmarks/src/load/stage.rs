//! The stage: the crowd's sockets, what each of them is owed, and who counts as what at the moment.
//!
//! Keeps the three in step, so that nobody leaves one of them alone. Whoever kills, replaces or slows down
//! connections does it here. Does not know when, or why.

use std::{io, time::Instant};

use mio::net::TcpStream;

use super::{
    crowd::Crowd,
    ledger::{Leaving, Ledger},
};

/// What a connection counts as.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Standing {
    /// Watched: every delivery is judged.
    Member,
    /// Slow or stalled: nothing is expected.
    Unwatched,
    /// Leaving or joining by churn.
    Newcomer,
    /// The server has sent its close frame, and is to end TCP.
    Closing,
    /// No socket.
    Gone,
}

/// Everybody.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) crowd: Crowd,
    pub(crate) ledger: Ledger,
    standings: Vec<Standing>,
    /// How many are members or closing.
    watched: usize,
}

impl Stage {
    /// Everybody who is present is a member.
    pub(crate) fn new(crowd: Crowd, mut ledger: Ledger) -> Self {
        let standing = |index| match crowd.is_present(index) {
            true => Standing::Member,
            false => Standing::Gone,
        };
        let standings: Vec<Standing> = (0..crowd.len()).map(standing).collect();
        for index in (0..crowd.len()).filter(|&index| standings[index] == Standing::Gone) {
            ledger.leave(index, Leaving::Lost);
        }
        let watched = standings.iter().filter(|&&standing| standing == Standing::Member).count();
        Self { crowd, ledger, standings, watched }
    }

    #[inline]
    pub(crate) fn standing(&self, index: usize) -> Standing {
        self.standings[index]
    }

    /// How many sockets there are of members, those that are closing among them.
    pub(crate) fn watched(&self) -> usize {
        self.watched
    }

    pub(crate) fn count(&self, standing: Standing) -> usize {
        self.standings.iter().filter(|&&other| other == standing).count()
    }

    /// Changes what a connection counts as, which is not `Member` any more.
    pub(crate) fn leave(&mut self, index: usize, leaving: Leaving, standing: Standing) {
        self.ledger.leave(index, leaving);
        self.set_standing(index, standing);
    }

    /// What nobody expects anything of any more has another standing.
    pub(crate) fn set_standing(&mut self, index: usize, standing: Standing) {
        let watched = |standing| usize::from(matches!(standing, Standing::Member | Standing::Closing));
        self.watched = self.watched + watched(standing) - watched(self.standings[index]);
        self.standings[index] = standing;
    }

    /// Ends a connection at once; it is owed nothing more.
    pub(crate) fn abort(&mut self, index: usize, reset: bool, standing: Standing) -> io::Result<()> {
        self.leave(index, Leaving::Released, standing);
        self.crowd.abort(index, reset)
    }

    /// Puts an open WebSocket in the place of one that has left.
    pub(crate) fn adopt(&mut self, index: usize, stream: TcpStream, received: Vec<u8>) {
        self.crowd.adopt(index, stream, received);
        self.set_standing(index, Standing::Newcomer);
    }

    /// Sends one message from `sender`, as of the time when it is or was due.
    pub(crate) fn send(&mut self, sender: usize, due: Instant, write: impl FnOnce(&mut Vec<u8>, u64)) {
        let seq = self.ledger.send(sender, due);
        self.crowd.queue(sender, |out| write(out, seq));
    }
}
