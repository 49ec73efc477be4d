//! The storm: everybody connects at once, as after a server's restart, and leaves; again and again.
//!
//! A bounded number shakes hands at a time, and each that is through makes room for the next. Only the opening is
//! timed; the closing handshakes of all are waited for, so that every round begins with an empty server. A handshake
//! that fails is counted and not repeated.

use std::{
    collections::BTreeMap,
    io,
    time::{Duration, Instant},
};

use mio::{Events, Poll, Token, net::TcpStream};

use super::{
    LoadError, Options,
    candidate::{Candidate, CandidateError},
    connection::Ended,
    crowd::Crowd,
    latency::Latencies,
    memory::Watch,
    report::{self, Report},
    target::Target,
};
use crate::process::Process;

/// A handshake that takes longer has failed.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long a server may take to end everybody.
const CLOSING_MAX: Duration = Duration::from_secs(10);
/// How often handshakes are looked through for those that take too long.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const EVENTS: usize = 1024;
const NORMAL_CLOSURE: u16 = 1000;

/// What all rounds have brought.
#[derive(Debug, Default)]
struct Books {
    rounds: u64,
    opened: u64,
    opening: Duration,
    closing_max: Duration,
    handshakes: Latencies,
    failures: BTreeMap<String, u64>,
}

/// Storms the server for `--seconds`, at least once.
pub(crate) fn measure(
    options: &Options,
    target: &Target,
    server: Option<Process>,
) -> Result<Report, LoadError> {
    let mut memory =
        server.map(|server| Watch::new(server, target.address.port(), options.connections)).transpose()?;
    let request = target.requests(1).remove(0);
    let mut books = Books::default();
    let cpu_before = server.map(Process::cpu_time).transpose()?;
    let start = Instant::now();
    while books.rounds == 0 || start.elapsed() < options.duration() {
        let began = Instant::now();
        let mut round = Round::new(options.connections)?;
        round.open(target, &request, options.at_once(), &mut books)?;
        books.opening += began.elapsed();
        if let Some(memory) = &mut memory {
            if books.rounds == 0 {
                memory.fill()?;
            }
            memory.turn(Instant::now());
        }
        let closing = Instant::now();
        round.close(&mut books)?;
        books.closing_max = books.closing_max.max(closing.elapsed());
        books.rounds += 1;
    }
    let mut report = Report::new(options);
    let cpu = cpu_before.zip(server.and_then(|server| server.cpu_time().ok()));
    report.storm = Some(report::Storm {
        at_once: options.at_once(),
        rounds: books.rounds,
        opened: books.opened,
        connections_per_second: books.opened as f64 / books.opening.as_secs_f64(),
        handshake: books.handshakes.summary(),
        closing_ms_max: 1e3 * books.closing_max.as_secs_f64(),
        server_cpu_us_per_connection: cpu
            .filter(|_| books.opened > 0)
            .map(|(before, after)| 1e6 * after.since(before).running.as_secs_f64() / books.opened as f64),
        failures: books.failures,
    });
    report.memory = memory.map(|memory| memory.report());
    Ok(report)
}

/// Everybody once.
#[derive(Debug)]
struct Round {
    poll: Poll,
    /// By index, until they are open or have failed.
    candidates: Vec<Option<Candidate>>,
    open: Vec<Option<(TcpStream, Vec<u8>)>>,
    wanted: usize,
}

impl Round {
    fn new(wanted: usize) -> io::Result<Self> {
        let open = std::iter::repeat_with(|| None).take(wanted).collect();
        Ok(Self { poll: Poll::new()?, candidates: Vec::with_capacity(wanted), open, wanted })
    }

    fn open(
        &mut self,
        target: &Target,
        request: &[u8],
        at_once: usize,
        books: &mut Books,
    ) -> Result<(), LoadError> {
        let mut events = Events::with_capacity(EVENTS);
        let mut done = 0;
        let mut look_at = Instant::now() + LOOK_EVERY;
        while done < self.wanted {
            while self.candidates.len() < self.wanted.min(done + at_once) {
                let token = Token(self.candidates.len());
                match Candidate::start(target.address, self.poll.registry(), token, None) {
                    Ok(candidate) => self.candidates.push(Some(candidate)),
                    Err(error) => {
                        books.fail(&error.into());
                        self.candidates.push(None);
                        done += 1;
                    }
                }
            }
            match self.poll.poll(&mut events, Some(LOOK_EVERY)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                outcome => outcome?,
            }
            for event in &events {
                done += self.advance(event.token().0, request, books);
            }
            if Instant::now() >= look_at {
                look_at = Instant::now() + LOOK_EVERY;
                done += self.expire(books);
            }
        }
        Ok(())
    }

    /// Goes on with one handshake; 1 when it is over.
    fn advance(&mut self, index: usize, request: &[u8], books: &mut Books) -> usize {
        let Some(candidate) = &mut self.candidates[index] else { return 0 };
        match candidate.advance(request) {
            Ok(false) => return 0,
            Ok(true) => {
                books.handshakes.record(candidate.age());
                books.opened += 1;
                self.open[index] = self.candidates[index].take().map(Candidate::into_parts);
            }
            Err(error) => {
                books.fail(&error);
                self.candidates[index] = None;
            }
        }
        1
    }

    /// Ends the handshakes that take too long; tells how many.
    fn expire(&mut self, books: &mut Books) -> usize {
        let mut expired = 0;
        for slot in &mut self.candidates {
            if slot.as_ref().is_some_and(|candidate| candidate.age() > HANDSHAKE_MAX) {
                *slot = None;
                books.count(format!("no answer within {} s", HANDSHAKE_MAX.as_secs()), 1);
                expired += 1;
            }
        }
        expired
    }

    /// Shakes hands in parting, with everybody.
    fn close(self, books: &mut Books) -> Result<(), LoadError> {
        let mut crowd = Crowd::sparse(self.poll, self.open);
        (0..crowd.len()).for_each(|index| crowd.close(index, NORMAL_CLOSURE));
        let end = Instant::now() + CLOSING_MAX;
        while crowd.sockets() > 0 && Instant::now() < end {
            crowd.wait(LOOK_EVERY)?;
            while let Some(index) = crowd.next_ready() {
                match crowd.read(index, |_| ()) {
                    Ok(()) | Err(Ended::Closed(_) | Ended::Parted) => {}
                    Err(ended) => books.count(format!("closed, but not answered: {ended}"), 1),
                }
            }
        }
        let unclosed = crowd.sockets() as u64;
        books.count(format!("closed, but not ended within {} s", CLOSING_MAX.as_secs()), unclosed);
        Ok(())
    }
}

impl Books {
    fn fail(&mut self, error: &CandidateError) {
        let cause = match error {
            CandidateError::Socket(source) => source.kind().to_string(),
            CandidateError::Handshake(_) | CandidateError::Closed => error.to_string(),
        };
        self.count(cause, 1);
    }

    fn count(&mut self, cause: String, more: u64) {
        if more > 0 {
            *self.failures.entry(cause).or_default() += more;
        }
    }
}
