//! The churn: so many connections a second leave, and as many join in their places and groups.
//!
//! They leave in turn by the closing handshake and abruptly. A newcomer is listened to until its first message has
//! been seen by an older member as well, which gives it its place in the order; then it is a member like any other,
//! owed everything that comes after. Does not know who sends, or how fast.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use mio::Token;

use super::{
    candidate::Candidate,
    connection::Ended,
    latency::Latencies,
    ledger::{Greeting, Leaving},
    report,
    role::{Cast, Role},
    stage::{Stage, Standing},
    target::Target,
};

/// A server that takes longer to end a connection, or to open one, has failed.
const PATIENCE: Duration = Duration::from_secs(5);
/// A newcomer has to hear something this long after its group has.
const HEARING_MAX: Duration = Duration::from_secs(5);
const NORMAL_CLOSURE: u16 = 1000;

/// One place whose connection is being replaced.
#[derive(Debug)]
enum Change {
    /// Our close frame is sent; the server is to answer it and to end TCP.
    Leaving {
        since: Instant,
    },
    Joining(Candidate),
    /// Open, with the messages that have come so far.
    Listening {
        pending: Vec<u64>,
        placed: u32,
        owed_since: Option<Instant>,
        deaf: bool,
    },
}

/// All places whose connections change.
#[derive(Debug)]
pub(crate) struct Churn {
    per_second: f64,
    /// Absent before it begins, and when it is over.
    start: Option<Instant>,
    /// How many have been told to leave.
    told: u64,
    pool: Vec<usize>,
    turn: usize,
    address: SocketAddr,
    requests: Vec<Vec<u8>>,
    changes: BTreeMap<usize, Change>,
    handshakes: Latencies,
    joined: u64,
    left: u64,
    failed: u64,
    deaf: u64,
    causes: Vec<String>,
}

impl Churn {
    pub(crate) fn new(per_second: f64, cast: &Cast, target: &Target) -> Self {
        Self {
            per_second,
            start: None,
            told: 0,
            pool: cast.all(Role::Plain),
            turn: 0,
            address: target.address,
            requests: target.requests(cast.groups()),
            changes: BTreeMap::new(),
            handshakes: Latencies::default(),
            joined: 0,
            left: 0,
            failed: 0,
            deaf: 0,
            causes: Vec::new(),
        }
    }

    pub(crate) fn begin(&mut self, now: Instant) {
        self.start = Some(now);
    }

    /// Nobody leaves any more; those on their way still arrive.
    pub(crate) fn stop(&mut self) {
        self.start = None;
    }

    /// Nobody is on the way, and nothing waits for its place.
    pub(crate) fn is_settled(&self) -> bool {
        self.changes
            .values()
            .all(|change| matches!(change, Change::Listening { pending, .. } if pending.is_empty()))
    }

    /// Lets those leave whose time has come, and sees after everybody who is on the way.
    pub(crate) fn turn(&mut self, stage: &mut Stage, now: Instant) -> io::Result<()> {
        if let Some(start) = self.start {
            let due = (now.saturating_duration_since(start).as_secs_f64() * self.per_second) as u64;
            while self.told < due {
                self.told += 1;
                let Some(index) = self.next_leaver(stage) else { break };
                self.let_go(stage, index, now)?;
            }
        }
        for index in self.changes.keys().copied().collect::<Vec<_>>() {
            self.look_after(stage, index, now)?;
        }
        Ok(())
    }

    /// One of the changing connections may have something to read.
    pub(crate) fn attend(&mut self, stage: &mut Stage, index: usize) -> io::Result<()> {
        match self.changes.get_mut(&index) {
            Some(Change::Leaving { .. }) => match stage.crowd.read(index, |_| ()) {
                Ok(()) | Err(Ended::Closed(_)) => Ok(()),
                Err(Ended::Parted) => {
                    self.left += 1;
                    self.join(stage, index)
                }
                Err(ended) => {
                    self.fail(index, &format!("left and got no answer: {ended}"));
                    self.join(stage, index)
                }
            },
            Some(Change::Joining(candidate)) => {
                match candidate.advance(&self.requests[index % self.requests.len()]) {
                    Ok(false) => {}
                    Ok(true) => self.arrive(stage, index),
                    Err(error) => self.give_up(stage, index, &error.to_string()),
                }
                Ok(())
            }
            Some(Change::Listening { pending, .. }) => {
                if let Err(ended) = stage.crowd.read(index, |seq| pending.push(seq)) {
                    self.give_up(stage, index, &ended.to_string());
                    if matches!(ended, Ended::Closed(_)) {
                        stage.set_standing(index, Standing::Closing);
                    }
                } else {
                    self.greet(stage, index);
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub(crate) fn report(self) -> report::Churn {
        report::Churn {
            joined: self.joined,
            left: self.left,
            failed: self.failed,
            deaf: self.deaf,
            handshake: self.handshakes.summary(),
            causes: self.causes,
        }
    }

    fn next_leaver(&mut self, stage: &Stage) -> Option<usize> {
        for _ in 0..self.pool.len() {
            let index = self.pool[self.turn % self.pool.len()];
            self.turn += 1;
            if stage.standing(index) == Standing::Member && stage.crowd.is_present(index) {
                return Some(index);
            }
        }
        None
    }

    fn let_go(&mut self, stage: &mut Stage, index: usize, now: Instant) -> io::Result<()> {
        if self.told.is_multiple_of(2) {
            stage.leave(index, Leaving::Released, Standing::Newcomer);
            stage.crowd.close(index, NORMAL_CLOSURE);
            self.changes.insert(index, Change::Leaving { since: now });
            return Ok(());
        }
        // Of the abrupt ones every second is a reset.
        stage.abort(index, self.told % 4 == 1, Standing::Newcomer)?;
        self.left += 1;
        self.join(stage, index)
    }

    fn join(&mut self, stage: &mut Stage, index: usize) -> io::Result<()> {
        match Candidate::start(self.address, stage.crowd.registry(), Token(index), None) {
            Ok(candidate) => {
                stage.set_standing(index, Standing::Newcomer);
                self.changes.insert(index, Change::Joining(candidate));
            }
            Err(error) => self.give_up(stage, index, &error.to_string()),
        }
        Ok(())
    }

    fn arrive(&mut self, stage: &mut Stage, index: usize) {
        if let Some(Change::Joining(candidate)) = self.changes.remove(&index) {
            self.handshakes.record(candidate.age());
            self.joined += 1;
            let (stream, received) = candidate.into_parts();
            stage.adopt(index, stream, received);
            let placed = stage.ledger.placed_in_group_of(index);
            let listening = Change::Listening { pending: Vec::new(), placed, owed_since: None, deaf: false };
            self.changes.insert(index, listening);
        }
    }

    fn look_after(&mut self, stage: &mut Stage, index: usize, now: Instant) -> io::Result<()> {
        match self.changes.get_mut(&index) {
            Some(Change::Leaving { since }) if now.saturating_duration_since(*since) > PATIENCE => {
                self.fail(index, "left and was not let go");
                stage.crowd.abort(index, true)?;
                self.join(stage, index)
            }
            Some(Change::Joining(candidate)) if candidate.age() > PATIENCE => {
                self.give_up(stage, index, "no answer to the handshake");
                Ok(())
            }
            Some(Change::Listening { pending, .. }) if !pending.is_empty() => {
                self.greet(stage, index);
                Ok(())
            }
            Some(Change::Listening { placed, owed_since, deaf, .. }) => {
                if stage.ledger.placed_in_group_of(index) > *placed {
                    let since = *owed_since.get_or_insert(now);
                    if now.saturating_duration_since(since) > HEARING_MAX && !*deaf {
                        *deaf = true;
                        self.deaf += 1;
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Makes a newcomer a member as soon as its first message has a place.
    fn greet(&mut self, stage: &mut Stage, index: usize) {
        let Some(Change::Listening { pending, .. }) = self.changes.get_mut(&index) else { return };
        while let Some(&first) = pending.first() {
            match stage.ledger.greet(index, first) {
                Greeting::Early => return,
                Greeting::Stale | Greeting::Stray => drop(pending.remove(0)),
                Greeting::Welcome => {
                    pending[1..].iter().for_each(|&seq| stage.ledger.arrive(index, seq));
                    self.changes.remove(&index);
                    stage.set_standing(index, Standing::Member);
                    return;
                }
            }
        }
    }

    /// The place stays empty.
    fn give_up(&mut self, stage: &mut Stage, index: usize, cause: &str) {
        self.fail(index, cause);
        self.changes.remove(&index);
        stage.set_standing(index, Standing::Gone);
    }

    fn fail(&mut self, index: usize, cause: &str) {
        self.failed += 1;
        if self.causes.len() < report::CAUSES_TOLD {
            self.causes.push(format!("connection {index}: {cause}"));
        }
    }
}
