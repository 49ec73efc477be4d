//! Messages through the server: settle, warm up, measure, drain.
//!
//! Ties the stage (sockets and what they are owed) and the pace (when to send) together, and gives a turn now and
//! then to whatever else a run is to have: slow readers, a killing, churn, an end of the server. Latency ends when the
//! last receiver's bytes have been read, so it contains the client's own reading of all connections: compare it
//! between servers, do not take it for the network's.

use std::time::{Duration, Instant};

use super::{
    LoadError, Mode, Options,
    churn::Churn,
    connect::connect,
    connection::Ended,
    end::Ends,
    kill::Kill,
    latency::Latencies,
    ledger::{Landed, Leaving, Ledger, Order},
    memory::Watch,
    pace::{Pace, Senders},
    progress::Progress,
    report::Report,
    role::Role,
    settle::settle,
    slow::SlowReaders,
    snapshot::{Snapshot, Span},
    stage::{Stage, Standing},
    target::Target,
};
use crate::{
    dialect::Dialect,
    message::Template,
    process::{Process, ProcessError},
};

/// At the end, how long nothing may come before what is outstanding counts as lost, and how long to wait in all.
const STALLED_AFTER: Duration = Duration::from_secs(3);
const DRAIN_MAX: Duration = Duration::from_secs(30);
/// How long a server may go on working when its last message has landed, before its CPU time is read all the same.
const SLEEPS_WITHIN: Duration = Duration::from_millis(20);
/// How long to listen for what should not come, once all has landed.
const QUIET: Duration = Duration::from_millis(50);
/// How often everything is looked after that is not a message.
const CHORES_EVERY: Duration = Duration::from_millis(10);
/// Where losses are allowed, a closed loop waits no longer for a message.
const LOSSY_PATIENCE: Duration = Duration::from_millis(500);

/// All of it, for one server.
#[derive(Debug)]
pub(super) struct Traffic {
    stage: Stage,
    pace: Pace,
    senders: Senders,
    template: Template,
    echo: bool,
    lossy: bool,
    spin: bool,
    sending: bool,
    /// Present while measuring.
    latencies: Option<Latencies>,
    /// Time spent in polling for nothing, because a message was almost due or expected: no work.
    spun: Duration,
    chores_due: Instant,
    slow: SlowReaders,
    kill: Option<Kill>,
    churn: Option<Churn>,
    ends: Option<Ends>,
    memory: Option<Watch>,
    progress: Option<Progress>,
    report: Report,
}

/// Runs the traffic and reports.
pub(crate) fn measure(
    options: &Options,
    target: &Target,
    server: Option<Process>,
) -> Result<Report, LoadError> {
    let memory =
        server.map(|server| Watch::new(server, target.address.port(), options.connections)).transpose()?;
    let mut traffic = Traffic::open(options, target, memory)?;
    traffic.start()?;
    traffic.turn_until(Instant::now() + Duration::from_secs_f64(options.warmup), |_| false)?;
    let before = traffic.snapshot(server)?;
    traffic.begin(before.at, options.duration());
    traffic.turn_until(before.at + options.duration(), Traffic::is_ending)?;
    let after = traffic.snapshot(server)?;
    let latencies = traffic.latencies.take().unwrap_or_default();
    traffic.weigh();
    if traffic.is_ending() {
        traffic.turn_until(Instant::now() + DRAIN_MAX, Traffic::is_over)?;
    }
    traffic.drain()?;
    traffic.conclude(&after.since(&before), latencies)
}

impl Traffic {
    /// Connects, settles and gives everybody their part.
    pub(super) fn open(
        options: &Options,
        target: &Target,
        mut memory: Option<Watch>,
    ) -> Result<Self, LoadError> {
        let template = Template::new(options.payload, Dialect::of(&options.url).envelope())?;
        let mut report = Report::new(options);
        let cast = options.cast();
        let mut crowd = connect(target, &cast, options.at_once())?;
        let first = settle(&mut crowd, &cast, &template, options.mode, &mut report)?;
        if let Some(memory) = &mut memory {
            memory.fill()?;
        }
        let echo = options.mode == Mode::Echo;
        let group = |index| if echo { index } else { cast.group(index) };
        let groups: Vec<usize> = (0..cast.len()).map(group).collect();
        let order = if echo { Order::Sending } else { Order::FirstSight };
        let mut ledger = Ledger::new(order, &groups, first);
        if options.churn.is_some() {
            ledger.expect_newcomers();
        }
        let mut stage = Stage::new(crowd, ledger);
        let slow = SlowReaders::new(&cast, options.slow_rate);
        for index in slow.all() {
            if stage.standing(index) == Standing::Member {
                stage.leave(index, Leaving::Released, Standing::Unwatched);
            }
        }
        let now = Instant::now();
        Ok(Self {
            stage,
            pace: Pace::new(options.in_flight, options.rate, now),
            senders: Senders::new(cast.senders().to_vec()),
            template,
            echo,
            lossy: options.lossy,
            spin: options.spin,
            sending: true,
            latencies: None,
            spun: Duration::ZERO,
            chores_due: now,
            slow,
            kill: options.kill.map(|count| Kill::new(count, cast.all(Role::Plain))),
            churn: options.churn.map(|per_second| Churn::new(per_second, &cast, target)),
            ends: options.expect_end.then(Ends::default),
            memory,
            progress: Progress::new(options.progress, options.duration()),
            report,
        })
    }

    /// Sends for `duration`, then waits until all has landed or nothing more is to be expected.
    pub(super) fn slice(&mut self, server: Process, duration: Duration) -> Result<Span, LoadError> {
        let before = self.snapshot(Some(server))?;
        self.sending = true;
        self.pace.begin(before.at);
        self.start()?;
        self.turn_until(before.at + duration, Self::is_over)?;
        self.sending = false;
        self.await_landed()?;
        server.await_sleep(SLEEPS_WITHIN);
        Ok(self.snapshot(Some(server))?.since(&before))
    }

    /// The slices from now on are measured; there is no second in them that a line could tell of.
    pub(super) fn measure_slices(&mut self) {
        self.progress = None;
        self.latencies = Some(Latencies::default());
    }

    /// Listens for what should not come, and reports on the slices.
    pub(super) fn end_slices(mut self, slices: &Span) -> Result<Report, LoadError> {
        let latencies = self.latencies.take().unwrap_or_default();
        self.drain()?;
        self.conclude(slices, latencies)
    }

    fn start(&mut self) -> Result<(), LoadError> {
        if let Some(churn) = &mut self.churn {
            churn.begin(Instant::now());
        }
        if let Pace::Closed { in_flight } = self.pace {
            self.send_in_turn(in_flight, Instant::now());
            self.stage.crowd.flush();
        }
        Ok(())
    }

    /// The measurement begins.
    fn begin(&mut self, now: Instant, duration: Duration) {
        self.latencies = Some(Latencies::default());
        self.slow.begin(now);
        if let Some(kill) = &mut self.kill {
            kill.set_due(now + duration / 2);
        }
    }

    /// Reads the server's memory, which takes a while.
    fn weigh(&mut self) {
        let start = Instant::now();
        self.report.memory = self.memory.take().map(|memory| memory.report());
        if let Some(kill) = &mut self.kill {
            kill.excuse(start.elapsed());
        }
    }

    /// Turns until `deadline`, or until `enough`.
    fn turn_until(&mut self, deadline: Instant, enough: impl Fn(&Self) -> bool) -> Result<(), LoadError> {
        let mut now = Instant::now();
        while now < deadline && !enough(self) {
            self.turn(now, deadline)?;
            now = Instant::now();
        }
        Ok(())
    }

    fn turn(&mut self, now: Instant, deadline: Instant) -> Result<(), LoadError> {
        self.send_due();
        if now >= self.chores_due {
            self.do_chores(now)?;
        }
        let deadline = deadline.min(self.chores_due);
        let patience = if self.spin && !self.stage.ledger.is_settled() {
            Duration::ZERO
        } else if self.sending {
            self.pace.patience(now, deadline)
        } else {
            deadline.saturating_duration_since(now)
        };
        if !self.stage.crowd.wait(patience)? && patience.is_zero() {
            self.spun += now.elapsed();
        }
        while let Some(index) = self.stage.crowd.next_ready() {
            self.receive(index)?;
            self.follow_landed();
            self.send_due();
        }
        Ok(())
    }

    fn receive(&mut self, index: usize) -> Result<(), LoadError> {
        if self.stage.standing(index) != Standing::Member {
            return self.attend(index);
        }
        let Stage { crowd, ledger, .. } = &mut self.stage;
        if let Err(ended) = crowd.read(index, |seq| ledger.arrive(index, seq)) {
            self.lose(index, &ended);
        }
        Ok(())
    }

    /// Somebody who is not watched has something to read.
    #[cold]
    fn attend(&mut self, index: usize) -> Result<(), LoadError> {
        match self.stage.standing(index) {
            Standing::Unwatched => self.slow.attend(&mut self.stage, index),
            Standing::Newcomer => {
                if let Some(churn) = &mut self.churn {
                    churn.attend(&mut self.stage, index)?;
                }
            }
            Standing::Member | Standing::Closing | Standing::Gone => {
                if self.stage.crowd.read(index, |_| ()).is_err() {
                    self.stage.set_standing(index, Standing::Gone);
                }
            }
        }
        Ok(())
    }

    /// A member has been ended.
    #[cold]
    fn lose(&mut self, index: usize, ended: &Ended) {
        let leaving = if self.ends.is_some() { Leaving::Ended } else { Leaving::Lost };
        let told = matches!(ended, Ended::Closed(_));
        self.stage.leave(index, leaving, if told { Standing::Closing } else { Standing::Gone });
        if !self.ends.as_mut().is_some_and(|ends| ends.note(ended)) {
            self.report.disconnected(index, ended);
        }
    }

    /// Notes what has landed, and in a closed loop sends as many new ones.
    fn follow_landed(&mut self) {
        let Some(mut landed) = self.stage.ledger.take_landed() else {
            self.stage.crowd.flush();
            return;
        };
        let now = Instant::now();
        loop {
            self.note(&landed, now);
            if self.sending && !landed.late && matches!(self.pace, Pace::Closed { .. }) {
                // An echo is followed by its own sender, or some would have several in flight and others none.
                if self.echo && self.stage.crowd.is_present(landed.sender) {
                    self.send(landed.sender, now);
                } else {
                    self.send_in_turn(1, now);
                }
            }
            match self.stage.ledger.take_landed() {
                Some(next) => landed = next,
                None => break,
            }
        }
        self.stage.crowd.flush();
    }

    fn note(&mut self, landed: &Landed, now: Instant) {
        if let Some(latencies) = self.latencies.as_mut().filter(|_| landed.seen) {
            latencies.record(now.saturating_duration_since(landed.sent));
        }
        if let Some(kill) = &mut self.kill {
            kill.follow(landed, now);
        }
    }

    fn send_due(&mut self) {
        if self.sending && matches!(self.pace, Pace::Open { .. }) {
            let now = Instant::now();
            while let Some(due) = self.pace.due(now) {
                self.send_in_turn(1, due);
            }
            self.stage.crowd.flush();
        }
    }

    fn send_in_turn(&mut self, count: usize, sent: Instant) {
        for _ in 0..count {
            let crowd = &self.stage.crowd;
            match self.senders.next(|index| crowd.is_present(index)) {
                Some(sender) => self.send(sender, sent),
                // Nobody is left to send, and why is told by how they ended.
                None => self.sending = false,
            }
        }
    }

    fn send(&mut self, sender: usize, sent: Instant) {
        self.stage.send(sender, sent, |out, seq| self.template.write(out, seq));
    }

    /// Gives everything that is not a message its turn.
    #[cold]
    fn do_chores(&mut self, now: Instant) -> Result<(), LoadError> {
        self.chores_due = now + CHORES_EVERY;
        self.slow.turn(&mut self.stage, now);
        if let Some(kill) = &mut self.kill {
            kill.turn(&mut self.stage, now)?;
        }
        if let Some(churn) = &mut self.churn {
            churn.turn(&mut self.stage, now)?;
        }
        if let Some(memory) = &mut self.memory {
            memory.turn(now);
        }
        if let Some(progress) = &mut self.progress {
            progress.turn(&self.stage.ledger, &self.report, now);
        }
        self.replace_lost(now);
        self.follow_landed();
        Ok(())
    }

    /// Where losses are allowed, a closed loop goes on without what is lost.
    fn replace_lost(&mut self, now: Instant) {
        if self.lossy
            && self.sending
            && matches!(self.pace, Pace::Closed { .. })
            && let Some(deadline) = now.checked_sub(LOSSY_PATIENCE)
        {
            let lost = self.stage.ledger.give_up(deadline);
            self.send_in_turn(lost, now);
        }
    }

    /// The server has begun to end its connections: what is measured is over, what is promised is not.
    fn is_ending(&self) -> bool {
        self.ends.as_ref().is_some_and(Ends::any) || self.is_over()
    }

    /// Nobody is there any more, but for slow readers, who may hear of it later.
    fn is_over(&self) -> bool {
        self.stage.watched() == 0
    }

    /// Nothing is on its way.
    pub(super) fn is_settled(&self) -> bool {
        self.stage.ledger.is_settled() && self.churn.as_ref().is_none_or(Churn::is_settled)
    }

    fn drain(&mut self) -> Result<(), LoadError> {
        self.sending = false;
        if let Some(churn) = &mut self.churn {
            churn.stop();
        }
        self.await_landed()?;
        self.turn_until(Instant::now() + QUIET, |_| false)
    }

    /// Waits for what is on its way, as long as something of it comes.
    fn await_landed(&mut self) -> Result<(), LoadError> {
        let end = Instant::now() + DRAIN_MAX;
        let mut progressing = true;
        while progressing && Instant::now() < end {
            let received = self.stage.ledger.tally.received;
            self.turn_until(end.min(Instant::now() + STALLED_AFTER), Self::is_settled)?;
            progressing = self.stage.ledger.tally.received > received && !self.is_settled();
        }
        Ok(())
    }

    fn snapshot(&self, server: Option<Process>) -> Result<Snapshot, ProcessError> {
        Snapshot::take(server, self.stage.ledger.tally, self.spun)
    }

    fn conclude(mut self, measured: &Span, latencies: Latencies) -> Result<Report, LoadError> {
        self.report.traffic = Some(measured.report(self.stage.ledger.tally, latencies));
        if !self.slow.is_empty() {
            self.report.slow = Some(self.slow.reckon(&mut self.stage)?);
        }
        self.report.kill = self.kill.as_ref().map(Kill::report);
        self.report.churn = self.churn.map(Churn::report);
        self.report.ends = self.ends.map(|ends| {
            let count = |standing| self.stage.count(standing);
            ends.report(count(Standing::Member), count(Standing::Closing))
        });
        Ok(self.report)
    }
}
