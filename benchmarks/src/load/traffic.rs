//! Messages through the server: settle, warm up, measure, drain.
//!
//! Ties the crowd (sockets), the ledger (what is owed) and the pace (when to send) together; each of them knows
//! nothing of the others. Latency ends when the last receiver's bytes have been read, so it contains the client's own
//! reading of all connections: compare it between servers, do not take it for the network's.

use std::time::{Duration, Instant};

use super::{
    LoadError, Mode, Options,
    connect::connect,
    crowd::{Crowd, Ended},
    latency::Latencies,
    ledger::{Ledger, Tally},
    pace::{Pace, Senders},
    report::{self, Report},
    target::Target,
};
use crate::{
    dialect::Dialect,
    message::{FIRST_SEQ, Template},
    process::{CpuTime, Process, ProcessError},
};

/// How long a server may take to adopt everybody after the last handshake.
pub(crate) const SETTLE_MAX: Duration = Duration::from_secs(15);
const PROBE_EVERY: Duration = Duration::from_millis(200);
/// At the end, how long nothing may come before what is outstanding counts as lost, and how long to wait in all.
const STALLED_AFTER: Duration = Duration::from_secs(3);
const DRAIN_MAX: Duration = Duration::from_secs(30);
/// How long to listen for what should not come, once all has landed.
const QUIET: Duration = Duration::from_millis(50);
const CAUSES_TOLD: usize = 3;

/// What stood in the books at one moment.
#[derive(Clone, Copy, Debug)]
struct Snapshot {
    at: Instant,
    tally: Tally,
    server_cpu: Option<CpuTime>,
    client_cpu: CpuTime,
    spun: Duration,
}

#[derive(Debug)]
struct Traffic {
    crowd: Crowd,
    ledger: Ledger,
    pace: Pace,
    senders: Senders,
    template: Template,
    echo: bool,
    sending: bool,
    /// Present while measuring.
    latencies: Option<Latencies>,
    /// Time spent in polling for nothing because a message was almost due: no work.
    spun: Duration,
    report: Report,
}

/// Runs the traffic and reports.
pub(crate) fn measure(
    options: &Options,
    target: &Target,
    server: Option<Process>,
) -> Result<Report, LoadError> {
    let template = Template::new(options.payload, Dialect::of(&options.url).envelope())?;
    let mut report = Report::new(options);
    let senders = Senders::new(options.sender_count(), options.connections);
    let mut crowd = connect(target, options.connections)?;
    let first = settle(&mut crowd, &senders, &template, options.mode, &mut report)?;
    let mut ledger = Ledger::new(options.mode, options.connections, first);
    for index in (0..crowd.len()).filter(|&index| !crowd.is_present(index)) {
        ledger.leave(index);
    }
    let mut traffic = Traffic {
        crowd,
        ledger,
        pace: Pace::new(options.in_flight, options.rate, Instant::now()),
        senders,
        template,
        echo: options.mode == Mode::Echo,
        sending: true,
        latencies: None,
        spun: Duration::ZERO,
        report,
    };
    traffic.start()?;
    traffic.turn_until(Instant::now() + Duration::from_secs_f64(options.warmup), |_| false)?;
    let before = traffic.snapshot(server)?;
    traffic.latencies = Some(Latencies::default());
    traffic.turn_until(before.at + options.duration(), |_| false)?;
    let after = traffic.snapshot(server)?;
    let latencies = traffic.latencies.take().unwrap_or_default();
    traffic.drain()?;
    Ok(traffic.conclude(before, after, latencies))
}

/// Sends probes until every receiver has got one: a server may adopt a connection after its 101.
/// Returns the first number that is no probe.
fn settle(
    crowd: &mut Crowd,
    senders: &Senders,
    template: &Template,
    mode: Mode,
    report: &mut Report,
) -> Result<u64, LoadError> {
    let (probers, mut unseen) = match mode {
        Mode::Echo => (senders.all(), senders.all().len()),
        Mode::Fanout | Mode::Idle => (&senders.all()[..1], crowd.len()),
    };
    let mut seen = vec![false; crowd.len()];
    let mut seq = FIRST_SEQ;
    let deadline = Instant::now() + SETTLE_MAX;
    while unseen > 0 {
        if Instant::now() > deadline {
            return Err(LoadError::Unsettled { unseen, connections: crowd.len() });
        }
        for &prober in probers.iter().filter(|&&prober| !seen[prober] || mode != Mode::Echo) {
            crowd.queue(prober, |out| template.write(out, seq));
            seq += 1;
        }
        crowd.flush();
        let probe_at = Instant::now() + PROBE_EVERY;
        while unseen > 0 && Instant::now() < probe_at {
            crowd.wait(probe_at.saturating_duration_since(Instant::now()))?;
            while let Some(index) = crowd.next_ready() {
                let mut got = false;
                let outcome = crowd.read(index, |_| got = true);
                if let Err(ended) = &outcome {
                    report.disconnected(index, ended);
                }
                if (got || outcome.is_err()) && !std::mem::replace(&mut seen[index], true) {
                    unseen = unseen.saturating_sub(1);
                }
            }
            crowd.flush();
        }
    }
    Ok(seq)
}

impl Traffic {
    fn start(&mut self) -> Result<(), LoadError> {
        if let Pace::Closed { in_flight } = self.pace {
            let now = Instant::now();
            for _ in 0..in_flight {
                self.send_in_turn(now)?;
            }
            self.crowd.flush();
        }
        Ok(())
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
        self.send_due()?;
        let patience = if self.sending {
            self.pace.patience(now, deadline)
        } else {
            deadline.saturating_duration_since(now)
        };
        if !self.crowd.wait(patience)? && patience.is_zero() {
            self.spun += now.elapsed();
        }
        while let Some(index) = self.crowd.next_ready() {
            let ledger = &mut self.ledger;
            if let Err(ended) = self.crowd.read(index, |seq| ledger.arrive(index, seq)) {
                self.ledger.leave(index);
                self.report.disconnected(index, &ended);
            }
            self.follow_landed()?;
            self.send_due()?;
        }
        Ok(())
    }

    /// Notes what has landed, and in a closed loop sends as many new ones.
    fn follow_landed(&mut self) -> Result<(), LoadError> {
        let Some(mut landed) = self.ledger.take_landed() else {
            self.crowd.flush();
            return Ok(());
        };
        let now = Instant::now();
        loop {
            if let Some(latencies) = &mut self.latencies {
                latencies.record(now.saturating_duration_since(landed.sent));
            }
            if self.sending && matches!(self.pace, Pace::Closed { .. }) {
                // An echo is followed by its own sender, or some would have several in flight and others none.
                if self.echo && self.crowd.is_present(landed.sender) {
                    self.send(landed.sender, now);
                } else {
                    self.send_in_turn(now)?;
                }
            }
            match self.ledger.take_landed() {
                Some(next) => landed = next,
                None => break,
            }
        }
        self.crowd.flush();
        Ok(())
    }

    fn send_due(&mut self) -> Result<(), LoadError> {
        if self.sending && matches!(self.pace, Pace::Open { .. }) {
            let now = Instant::now();
            while let Some(due) = self.pace.due(now) {
                self.send_in_turn(due)?;
            }
            self.crowd.flush();
        }
        Ok(())
    }

    fn send_in_turn(&mut self, sent: Instant) -> Result<(), LoadError> {
        let crowd = &self.crowd;
        let sender = self.senders.next(|index| crowd.is_present(index)).ok_or(LoadError::NoSender)?;
        self.send(sender, sent);
        Ok(())
    }

    fn send(&mut self, sender: usize, sent: Instant) {
        let seq = self.ledger.send(sender, sent);
        self.crowd.queue(sender, |out| self.template.write(out, seq));
    }

    fn drain(&mut self) -> Result<(), LoadError> {
        self.sending = false;
        let end = Instant::now() + DRAIN_MAX;
        let mut progressing = true;
        while progressing && Instant::now() < end {
            let received = self.ledger.tally.received;
            self.turn_until(end.min(Instant::now() + STALLED_AFTER), |traffic| traffic.ledger.is_settled())?;
            progressing = self.ledger.tally.received > received && !self.ledger.is_settled();
        }
        self.turn_until(Instant::now() + QUIET, |_| false)
    }

    fn snapshot(&self, server: Option<Process>) -> Result<Snapshot, ProcessError> {
        Ok(Snapshot {
            server_cpu: server.map(Process::cpu_time).transpose()?,
            client_cpu: Process::current().cpu_time()?,
            spun: self.spun,
            tally: self.ledger.tally,
            at: Instant::now(),
        })
    }

    fn conclude(mut self, before: Snapshot, after: Snapshot, latencies: Latencies) -> Report {
        let tally = self.ledger.tally;
        let seconds = (after.at - before.at).as_secs_f64();
        let deliveries = (after.tally.received - before.tally.received) as f64;
        let messages = (after.tally.landed - before.tally.landed) as f64;
        let server = before.server_cpu.zip(after.server_cpu).map(|(before, after)| after.since(before));
        let server_cpu = server.map(|time| time.running.as_secs_f64());
        let client = after.client_cpu.since(before.client_cpu);
        let worked = client.running.saturating_sub(after.spun - before.spun).as_secs_f64();
        let client_cpu_share = worked / seconds;
        self.report.traffic = Some(report::Traffic {
            seconds,
            deliveries_per_second: deliveries / seconds,
            messages_per_second: messages / seconds,
            expected: tally.expected,
            received: tally.received,
            delivery_ratio: tally.received as f64 / tally.expected.max(1) as f64,
            duplicates: tally.duplicates,
            order_violations: tally.order_violations,
            sender_reorders: tally.sender_reorders,
            strays: tally.strays,
            latency: latencies.summary(),
            server_cpu_us_per_delivery: server_cpu
                .filter(|_| deliveries > 0.0)
                .map(|cpu| 1e6 * cpu / deliveries),
            server_cpu_share: server_cpu.map(|cpu| cpu / seconds),
            server_waiting_share: server.map(|time| time.waiting.as_secs_f64() / seconds),
            client_cpu_share,
            client_waiting_share: client.waiting.as_secs_f64() / seconds,
            client_was_the_limit: report::Traffic::client_is_the_limit(
                client_cpu_share,
                server.map(|time| (time.running + time.waiting).as_secs_f64() / seconds),
            ),
        });
        self.report
    }
}

impl Report {
    pub(super) fn disconnected(&mut self, index: usize, ended: &Ended) {
        self.disconnections += 1;
        if self.causes.len() < CAUSES_TOLD {
            self.causes.push(format!("connection {index}: {ended}"));
        }
    }
}
