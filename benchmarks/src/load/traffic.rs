//! Messages through the server: settle, warm up, measure, drain.
//!
//! Connects the clients (sockets and expected deliveries) with the pace (when to send), and runs the chores in between:
//! slow readers and memory samples. A latency ends when the last receiver's bytes have been read, so it includes
//! the client's own reading of all connections: comparable between servers, but not the network's.

use std::time::{Duration, Instant};

use super::{
    LoadError, Mode, Options,
    clients::{Clients, Status},
    close_counts::CloseCounts,
    connect::connect,
    connection::Ended,
    delivery_tracker::{DeliveryTracker, Landed, Leave, Order},
    latencies::Latencies,
    memory_monitor::MemoryMonitor,
    pace::{Pace, Senders},
    report::Report,
    settle::{Probes, settle},
    slow_readers::SlowReaders,
    snapshot::{Interval, Snapshot},
    target::Target,
};
use crate::{
    dialect::Dialect,
    message::{FIRST_SEQ, Template},
    process::{Process, ProcessError},
};

/// What has not arrived counts as lost when nothing has arrived for so long, or after `DRAIN_MAX`.
const DRAIN_QUIET: Duration = Duration::from_secs(3);
const DRAIN_MAX: Duration = Duration::from_secs(30);
/// How long a server may continue to work after its last message has landed, before its CPU time is read.
const SERVER_SLEEP_MAX: Duration = Duration::from_millis(20);
/// How long to wait for unexpected messages once all have landed.
const QUIET: Duration = Duration::from_millis(50);
const CHORES_EVERY: Duration = Duration::from_millis(10);
/// How long a closed loop waits for a message where losses are allowed.
const LOSSY_WAIT_MAX: Duration = Duration::from_millis(500);

/// The traffic with one server.
#[derive(Debug)]
pub(super) struct Traffic {
    clients: Clients,
    pace: Pace,
    senders: Senders,
    template: Template,
    echo: bool,
    lossy: bool,
    spin: bool,
    sending: bool,
    /// Present while measuring.
    latencies: Option<Latencies>,
    /// Time spent in polls that found nothing, because a message was almost due or expected: not work.
    spun: Duration,
    chores_due: Instant,
    slow: SlowReaders,
    /// Present where the server's shutdown is expected.
    closes: Option<CloseCounts>,
    memory: Option<MemoryMonitor>,
    report: Report,
}

/// Runs the traffic and reports.
pub(crate) fn measure(
    options: &Options,
    target: &Target,
    server: Option<Process>,
) -> Result<Report, LoadError> {
    let memory = server
        .map(|server| MemoryMonitor::new(server, target.address.port(), options.connections))
        .transpose()?;
    let mut traffic = Traffic::open(options, target, memory)?;
    traffic.fill_pipeline();
    traffic.run_until(Instant::now() + Duration::from_secs_f64(options.warmup), |_| false)?;
    let before = traffic.snapshot(server)?;
    traffic.latencies = Some(Latencies::default());
    traffic.slow.begin(before.at);
    traffic.run_until(before.at + options.duration(), Traffic::is_ending)?;
    let after = traffic.snapshot(server)?;
    let latencies = traffic.latencies.take().unwrap_or_default();
    traffic.report.memory = traffic.memory.take().map(|memory| memory.report());
    if traffic.is_ending() {
        traffic.run_until(Instant::now() + DRAIN_MAX, Traffic::is_over)?;
    }
    traffic.drain()?;
    traffic.finish(&after.since(&before), latencies)
}

impl Traffic {
    /// Connects and settles.
    pub(super) fn open(
        options: &Options,
        target: &Target,
        mut memory: Option<MemoryMonitor>,
    ) -> Result<Self, LoadError> {
        let template = Template::new(options.payload, Dialect::of(&options.url).envelope())?;
        let mut report = Report::new(options);
        let plan = options.plan();
        let (mut pool, handshakes) = connect(std::slice::from_ref(target), &plan, options.at_once())?;
        report.handshakes = Some(handshakes);
        let echo = options.mode == Mode::Echo;
        let first_members: Vec<usize> = (0..plan.groups()).collect();
        let probes = if echo { Probes::Own(plan.senders()) } else { Probes::FromEach(&first_members) };
        let on_end = |index, ended: &Ended| report.disconnected(index, ended);
        let first = settle(&mut pool, probes, &template, FIRST_SEQ, on_end)?;
        if let Some(memory) = &mut memory {
            memory.measure_full()?;
        }
        let group = |index| if echo { index } else { plan.group(index) };
        let groups: Vec<usize> = (0..plan.len()).map(group).collect();
        let order = if echo { Order::Sending } else { Order::FirstSight };
        let mut clients = Clients::new(pool, DeliveryTracker::new(order, &groups, first));
        let slow = SlowReaders::new(&plan, options.slow_rate);
        for index in slow.all() {
            if clients.status(index) == Status::Watched {
                clients.unwatch(index, Leave::Unwatched, Status::Unwatched);
            }
        }
        let now = Instant::now();
        Ok(Self {
            clients,
            pace: Pace::new(options.in_flight, options.rate, now),
            senders: Senders::new(plan.senders().to_vec()),
            template,
            echo,
            lossy: options.lossy,
            spin: options.spin,
            sending: true,
            latencies: None,
            spun: Duration::ZERO,
            chores_due: now,
            slow,
            closes: options.expect_end.then(CloseCounts::default),
            memory,
            report,
        })
    }

    /// Sends for `duration`, then waits until all has landed or counts as lost.
    pub(super) fn slice(&mut self, server: Process, duration: Duration) -> Result<Interval, LoadError> {
        let before = self.snapshot(Some(server))?;
        self.sending = true;
        self.pace.begin(before.at);
        self.fill_pipeline();
        self.run_until(before.at + duration, Self::is_over)?;
        self.sending = false;
        self.await_landed()?;
        server.await_sleep(SERVER_SLEEP_MAX);
        Ok(self.snapshot(Some(server))?.since(&before))
    }

    /// Measures the slices from now on.
    pub(super) fn measure_slices(&mut self) {
        self.latencies = Some(Latencies::default());
    }

    /// Waits for unexpected messages, and reports on the slices.
    pub(super) fn finish_slices(mut self, slices: &Interval) -> Result<Report, LoadError> {
        let latencies = self.latencies.take().unwrap_or_default();
        self.drain()?;
        self.finish(slices, latencies)
    }

    /// In a closed loop, sends the first messages.
    fn fill_pipeline(&mut self) {
        if let Pace::Closed { in_flight } = self.pace {
            self.send_from_next(in_flight, Instant::now());
            self.clients.pool.flush();
        }
    }

    /// Runs until `deadline`, or until `is_done`.
    fn run_until(&mut self, deadline: Instant, is_done: impl Fn(&Self) -> bool) -> Result<(), LoadError> {
        let mut now = Instant::now();
        while now < deadline && !is_done(self) {
            self.turn(now, deadline)?;
            now = Instant::now();
        }
        Ok(())
    }

    fn turn(&mut self, now: Instant, deadline: Instant) -> Result<(), LoadError> {
        self.send_due();
        if now >= self.chores_due {
            self.do_chores(now);
        }
        let deadline = deadline.min(self.chores_due);
        let wait = if self.spin && !self.is_settled() {
            Duration::ZERO
        } else if self.sending {
            self.pace.wait_max(now, deadline)
        } else {
            deadline.saturating_duration_since(now)
        };
        if !self.clients.pool.wait(wait)? && wait.is_zero() {
            self.spun += now.elapsed();
        }
        while let Some(index) = self.clients.pool.next_ready() {
            self.receive(index);
            self.follow_landed();
            self.send_due();
        }
        Ok(())
    }

    fn receive(&mut self, index: usize) {
        match self.clients.status(index) {
            Status::Watched => {
                let Clients { pool, tracker, .. } = &mut self.clients;
                if let Err(ended) = pool.read(index, None, |seq| tracker.receive(index, seq)) {
                    self.on_end(index, &ended);
                }
            }
            Status::Unwatched => self.slow.on_readable(&mut self.clients, index),
            Status::Closing | Status::Disconnected => {
                if self.clients.pool.read(index, None, |_| ()).is_err() {
                    self.clients.set_status(index, Status::Disconnected);
                }
            }
        }
    }

    /// A watched connection has ended.
    #[cold]
    fn on_end(&mut self, index: usize, ended: &Ended) {
        let leave = if self.closes.is_some() { Leave::Shutdown } else { Leave::Lost };
        let is_closing = matches!(ended, Ended::Closed(_));
        self.clients.unwatch(index, leave, if is_closing { Status::Closing } else { Status::Disconnected });
        if !self.closes.as_mut().is_some_and(|closes| closes.note(ended)) {
            self.report.disconnected(index, ended);
        }
    }

    /// Records what has landed, and in a closed loop sends as many new messages.
    fn follow_landed(&mut self) {
        let Some(mut landed) = self.clients.tracker.take_landed() else {
            self.clients.pool.flush();
            return;
        };
        let now = Instant::now();
        loop {
            self.record(&landed, now);
            if self.sending && !landed.late && matches!(self.pace, Pace::Closed { .. }) {
                // An echo is followed by its own sender, or some would have several in flight and others none.
                if self.echo && self.clients.pool.is_open(landed.sender) {
                    self.send(landed.sender, now);
                } else {
                    self.send_from_next(1, now);
                }
            }
            match self.clients.tracker.take_landed() {
                Some(next) => landed = next,
                None => break,
            }
        }
        self.clients.pool.flush();
    }

    fn record(&mut self, landed: &Landed, now: Instant) {
        if let Some(latencies) = self.latencies.as_mut().filter(|_| landed.seen) {
            latencies.record(now.saturating_duration_since(landed.sent));
        }
    }

    fn send_due(&mut self) {
        if self.sending && matches!(self.pace, Pace::Open { .. }) {
            let now = Instant::now();
            while let Some(due) = self.pace.due(now) {
                self.send_from_next(1, due);
            }
            self.clients.pool.flush();
        }
    }

    fn send_from_next(&mut self, count: usize, sent: Instant) {
        for _ in 0..count {
            let pool = &self.clients.pool;
            match self.senders.next(|index| pool.is_open(index)) {
                Some(sender) => self.send(sender, sent),
                // No sender is left; the report says how they ended.
                None => self.sending = false,
            }
        }
    }

    fn send(&mut self, sender: usize, sent: Instant) {
        self.clients.send(sender, sent, |out, seq| self.template.write(out, seq));
    }

    /// Everything that is not a message.
    #[cold]
    fn do_chores(&mut self, now: Instant) {
        self.chores_due = now + CHORES_EVERY;
        self.slow.read_due(&mut self.clients, now);
        if let Some(memory) = &mut self.memory {
            memory.sample(now);
        }
        self.replace_lost(now);
        self.follow_landed();
    }

    /// Where losses are allowed, a closed loop replaces messages that are probably lost.
    fn replace_lost(&mut self, now: Instant) {
        if self.lossy
            && self.sending
            && matches!(self.pace, Pace::Closed { .. })
            && let Some(deadline) = now.checked_sub(LOSSY_WAIT_MAX)
        {
            let lost = self.clients.tracker.give_up(deadline);
            self.send_from_next(lost, now);
        }
    }

    /// The server has begun to close its connections: the measurement ends, the checks do not.
    fn is_ending(&self) -> bool {
        self.closes.as_ref().is_some_and(|closes| !closes.is_empty()) || self.is_over()
    }

    /// No watched connection has a socket. Slow readers may notice the end later.
    fn is_over(&self) -> bool {
        self.clients.connected() == 0
    }

    /// No message is in flight.
    pub(super) fn is_settled(&self) -> bool {
        self.clients.tracker.is_settled()
    }

    fn drain(&mut self) -> Result<(), LoadError> {
        self.sending = false;
        self.await_landed()?;
        self.run_until(Instant::now() + QUIET, |_| false)
    }

    /// Waits for what is in flight, as long as some of it arrives.
    fn await_landed(&mut self) -> Result<(), LoadError> {
        let end = Instant::now() + DRAIN_MAX;
        let mut progressing = true;
        while progressing && Instant::now() < end {
            let received = self.clients.tracker.tally.received;
            self.run_until(end.min(Instant::now() + DRAIN_QUIET), Self::is_settled)?;
            progressing = self.clients.tracker.tally.received > received && !self.is_settled();
        }
        Ok(())
    }

    fn snapshot(&self, server: Option<Process>) -> Result<Snapshot, ProcessError> {
        Snapshot::take(server, self.clients.tracker.tally, self.spun)
    }

    fn finish(mut self, measured: &Interval, latencies: Latencies) -> Result<Report, LoadError> {
        self.report.traffic = Some(measured.report(self.clients.tracker.tally, latencies));
        if !self.slow.is_empty() {
            self.report.slow = Some(self.slow.finish(&mut self.clients)?);
        }
        self.report.ends = self.closes.map(|closes| {
            closes.report(self.clients.count(Status::Watched), self.clients.count(Status::Closing))
        });
        Ok(self.report)
    }
}
