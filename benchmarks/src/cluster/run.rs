//! One run: clients on two nodes, messages from both, perhaps an outage of the broker, and the report.
//!
//! All clients are on one thread, with one clock and one epoll, so that what one sees can be compared with what another
//! sees. Connection i is on node i % 2. Without a broker both are the same server, so that client and load are the same
//! and the difference is what the second node and the broker cost. Connects, settles (every client has a probe from each
//! node), warms up, measures, drains and reports. A node that is replaced ends its connections, and its clients, when all
//! of them have left, connect to a third node, which was started before: by another thread, so that the load goes on.

use std::{
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    ClusterError, NODES, Options,
    broker::{Broker, BrokerError},
    faults::Member,
    ledger::{Ledger, Silences},
    report::{self, Outage, Report},
};
use crate::{
    dialect::Dialect,
    load::{
        alarm::Alarm,
        client_pool::ClientPool,
        connect::{ConnectError, connect},
        connection::Ended,
        latencies::Latencies,
        pace::{Pace, Senders},
        plan::Plan,
        settle::{Probes, settle},
        target::Target,
    },
    message::{FIRST_SEQ, Template},
    process::{CpuTime, Process},
    trial::ServerProcess,
};

/// How many handshakes run at once.
const AT_ONCE: usize = 100;
const CHORES_EVERY: Duration = Duration::from_millis(10);
/// How long a closed loop waits for a message before it sends another one in its place.
const LOST_AFTER: Duration = Duration::from_secs(2);
/// What has not arrived counts as lost when nothing has arrived for so long, or after `DRAIN_MAX`. A node may take some
/// seconds to notice that its broker is back.
const DRAIN_QUIET: Duration = Duration::from_secs(8);
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// How long to wait for unexpected messages once all have landed.
const QUIET: Duration = Duration::from_millis(100);
/// How many causes of disconnections are reported.
const CAUSES_MAX: usize = 3;

/// The processes that are measured.
#[derive(Debug)]
pub(super) struct Cluster {
    /// Two, or one that has the clients of both; with a replacement a third one.
    pub(super) nodes: Vec<ServerProcess>,
    pub(super) broker: Option<Broker>,
}

/// The broker's state, where an outage is wanted.
#[derive(Clone, Copy, Debug)]
enum Failure {
    None,
    Planned { kill_at: Instant },
    Down { killed: Instant, restart_at: Instant },
    Over { restarted: Instant },
}

/// The node whose clients are moved.
const REPLACED: usize = 1;

/// How far the replacement of a node is, where one is wanted.
#[derive(Debug)]
enum Replacement {
    None,
    Planned {
        at: Instant,
    },
    /// Its clients leave.
    Ending,
    /// They connect to another one.
    Moving(JoinHandle<Result<ClientPool, ConnectError>>),
    Over,
}

#[derive(Debug)]
struct Run {
    pool: ClientPool,
    /// Rings when a message is due.
    alarm: Alarm,
    ledger: Ledger,
    pace: Pace,
    senders: Senders,
    /// On each node.
    clients: usize,
    groups: usize,
    /// Where they connect.
    path: &'static str,
    template: Template,
    sending: bool,
    /// Time spent in polls that found nothing, where no alarm can ring: not work.
    spun: Duration,
    chores_due: Instant,
    outage: Duration,
    failure: Failure,
    replacement: Replacement,
    outage_report: Outage,
    silences: Option<Silences>,
    disconnections: u64,
    causes: Vec<String>,
}

#[derive(Debug)]
struct Snapshot {
    at: Instant,
    nodes: Option<CpuTime>,
    broker: Option<CpuTime>,
    client: Option<CpuTime>,
    spun: Duration,
    landed: u64,
    received: u64,
}

/// Runs the load and reports.
pub(super) fn measure(options: &Options, cluster: &mut Cluster) -> Result<Report, ClusterError> {
    let mut run = Run::open(options, cluster)?;
    if let Pace::Closed { in_flight } = run.pace {
        (0..in_flight).for_each(|_| run.send_from_next(Instant::now()));
        run.pool.flush();
    }
    run.pace.begin(Instant::now());
    run.run_until(cluster, Instant::now() + Duration::from_secs_f64(options.warmup), |_| false)?;
    let before = run.snapshot(cluster);
    run.ledger.begin();
    run.silences = Some(Silences::since(before.at));
    let duration = Duration::from_secs_f64(options.seconds);
    if options.outage.is_some() {
        run.failure = Failure::Planned { kill_at: before.at + duration.mul_f64(report::OUTAGE_AFTER) };
    }
    if options.replace {
        run.replacement = Replacement::Planned { at: before.at + duration.mul_f64(report::REPLACE_AFTER) };
    }
    run.run_until(cluster, before.at + duration, |_| false)?;
    let after = run.snapshot(cluster);
    let silences = run.silences.take();
    run.drain(cluster)?;
    if let Some(broker) = &mut cluster.broker {
        broker.check()?;
    }
    Ok(run.finish(&before, &after, silences))
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Run {
    fn open(options: &Options, cluster: &Cluster) -> Result<Self, ClusterError> {
        let path = if options.groups > 1 { "/group/{group}" } else { "/ws" };
        let urls: Vec<String> = cluster.nodes.iter().map(|node| node.url(path)).collect();
        let envelope = urls.first().map_or(Dialect::Plain, Dialect::of).envelope();
        let template = Template::new(options.payload, envelope)?;
        let targets: Vec<Target> =
            urls.iter().cycle().take(NODES).map(|url| url.parse()).collect::<Result<_, _>>()?;
        // A group on one node counts as one group of the plan, so that publishers are spread over nodes and groups.
        let classes = NODES * options.groups;
        let plan = Plan::new(NODES * options.clients, classes, options.publishers, 0, 0);
        let (mut pool, _) = connect(&targets, &plan, AT_ONCE)?;
        let (mut disconnections, mut causes) = (0, Vec::new());
        let mut note = |index, ended: &Ended| note(&mut disconnections, &mut causes, index, ended);
        let mut first = FIRST_SEQ;
        for node in 0..NODES {
            let probers: Vec<usize> = (0..classes).filter(|class| class % NODES == node).collect();
            first = settle(&mut pool, Probes::FromEach(&probers), &template, first, &mut note)?;
        }
        let member = |index| Member {
            is_connected: pool.is_open(index),
            ..Member::new(index % NODES, plan.group(index) / NODES)
        };
        let now = Instant::now();
        let in_flight = options.in_flight.unwrap_or(1);
        Ok(Self {
            ledger: Ledger::new((0..plan.len()).map(member).collect(), first),
            alarm: pool.alarm()?,
            pool,
            pace: Pace::new(in_flight, options.rate(), now),
            senders: Senders::new(plan.senders().to_vec()),
            clients: options.clients,
            groups: options.groups,
            path,
            template,
            sending: true,
            spun: Duration::ZERO,
            chores_due: now,
            outage: Duration::from_secs_f64(options.outage.unwrap_or_default()),
            failure: Failure::None,
            replacement: Replacement::None,
            outage_report: Outage::default(),
            silences: None,
            disconnections,
            causes,
        })
    }

    /// Runs until `deadline`, or until `is_done`.
    fn run_until(
        &mut self,
        cluster: &mut Cluster,
        deadline: Instant,
        is_done: impl Fn(&Self) -> bool,
    ) -> Result<(), ClusterError> {
        let mut now = Instant::now();
        while now < deadline && !is_done(self) {
            self.turn(cluster, now, deadline)?;
            now = Instant::now();
        }
        Ok(())
    }

    fn turn(&mut self, cluster: &mut Cluster, now: Instant, deadline: Instant) -> Result<(), ClusterError> {
        if now >= self.chores_due {
            self.do_chores(cluster, now)?;
        }
        self.send_due();
        let now = Instant::now();
        let deadline = deadline.min(self.chores_due);
        let due = self.pace.next_due().filter(|due| self.sending && *due < deadline);
        let rings = due.is_some_and(|due| self.alarm.set(due.saturating_duration_since(now)));
        let wait = if self.sending && !rings {
            self.pace.wait_max(now, deadline)
        } else {
            deadline.saturating_duration_since(now)
        };
        if !self.pool.wait(wait)? && wait.is_zero() {
            self.spun += now.elapsed();
        }
        while let Some(index) = self.pool.next_ready() {
            let ledger = &mut self.ledger;
            let outcome = self.pool.read(index, None, |seq| ledger.receive(index, seq));
            self.follow();
            if let Err(ended) = outcome {
                if self.is_moved(index, &ended) {
                    self.ledger.leave_for_another(index);
                    continue;
                }
                self.ledger.leave(index);
                // What follows a Close frame is its own echo.
                if !matches!(ended, Ended::ClosedByBoth) {
                    note(&mut self.disconnections, &mut self.causes, index, &ended);
                }
            }
            self.send_due();
        }
        Ok(())
    }

    /// Records what has arrived, and in a closed loop lets those publish again whose messages have landed.
    fn follow(&mut self) {
        let now = Instant::now();
        let follows = self.sending && matches!(self.pace, Pace::Closed { .. });
        let mut next = Vec::new();
        let heard = self.ledger.follow(now, |publisher| next.extend(follows.then_some(publisher)));
        next.into_iter().for_each(|publisher| self.send(publisher, now));
        self.pool.flush();
        if let Some(silences) = &mut self.silences {
            silences.note(heard, now);
        }
        if let Failure::Over { restarted } = self.failure {
            let first = &mut self.outage_report.first_after_ms;
            for (first, heard) in [(&mut first.own, heard.own), (&mut first.other, heard.other)] {
                if heard && first.is_none() {
                    *first = Some(millis(now - restarted));
                }
            }
        }
    }

    fn send_due(&mut self) {
        if self.sending && matches!(self.pace, Pace::Open { .. }) {
            let now = Instant::now();
            let mut is_due = false;
            while let Some(due) = self.pace.due(now) {
                self.send_from_next(due);
                is_due = true;
            }
            if is_due {
                self.pool.flush();
            }
        }
    }

    fn send_from_next(&mut self, due: Instant) {
        let pool = &self.pool;
        match self.senders.next(|index| pool.is_open(index)) {
            Some(publisher) => self.send(publisher, due),
            // No publisher is left; the report says how they ended.
            None => self.sending = false,
        }
    }

    fn send(&mut self, publisher: usize, due: Instant) {
        if self.pool.is_open(publisher) {
            let seq = self.ledger.send(publisher, due);
            self.pool.queue(publisher, |out| self.template.write(out, seq));
        }
    }

    /// Whether a connection has ended because its node is being replaced.
    fn is_moved(&self, index: usize, ended: &Ended) -> bool {
        let is_ending =
            matches!(self.replacement, Replacement::Ending) && self.ledger.node(index) == REPLACED;
        is_ending && matches!(ended, Ended::Closed(_) | Ended::Disconnected | Ended::Io(_))
            || self.ledger.has_moved(index)
    }

    /// Everything that is not a message.
    #[cold]
    fn do_chores(&mut self, cluster: &mut Cluster, now: Instant) -> Result<(), ClusterError> {
        self.chores_due = now + CHORES_EVERY;
        self.fail_broker(cluster, now)?;
        self.replace_node(cluster, now)?;
        if self.sending
            && matches!(self.pace, Pace::Closed { .. })
            && let Some(deadline) = now.checked_sub(LOST_AFTER)
        {
            let mut next = Vec::new();
            self.ledger.give_up(deadline, |publisher| next.push(publisher));
            next.into_iter().for_each(|publisher| self.send(publisher, now));
            self.pool.flush();
        }
        Ok(())
    }

    fn replace_node(&mut self, cluster: &Cluster, now: Instant) -> Result<(), ClusterError> {
        let (Some(replaced), Some(other)) = (cluster.nodes.get(REPLACED), cluster.nodes.get(NODES)) else {
            return Ok(());
        };
        match std::mem::replace(&mut self.replacement, Replacement::None) {
            Replacement::Planned { at } if now >= at => {
                replaced.terminate();
                self.replacement = Replacement::Ending;
            }
            Replacement::Ending if self.ledger.is_empty(REPLACED) => {
                let target = other.url(self.path).parse::<Target>()?;
                let plan = Plan::new(self.clients, self.groups, 0, 0, 0);
                let moving = thread::spawn(move || Ok(connect(&[target], &plan, AT_ONCE)?.0));
                self.replacement = Replacement::Moving(moving);
            }
            Replacement::Moving(moving) if moving.is_finished() => {
                let moved = moving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                let first = self.pool.absorb(moved)?;
                for (index, of) in (first..).zip((REPLACED..).step_by(NODES).take(self.clients)) {
                    self.ledger.come_back(of);
                    self.senders.rename(of, index);
                }
                self.replacement = Replacement::Over;
            }
            unchanged => self.replacement = unchanged,
        }
        Ok(())
    }

    fn fail_broker(&mut self, cluster: &mut Cluster, now: Instant) -> Result<(), BrokerError> {
        let Some(broker) = &mut cluster.broker else { return Ok(()) };
        match self.failure {
            Failure::Planned { kill_at } if now >= kill_at => {
                broker.kill();
                self.failure = Failure::Down { killed: now, restart_at: now + self.outage };
            }
            Failure::Down { killed, restart_at } if now >= restart_at => {
                broker.spawn()?;
                let restarted = Instant::now();
                self.outage_report.seconds = (restarted - killed).as_secs_f64();
                self.failure = Failure::Over { restarted };
            }
            _ => {}
        }
        Ok(())
    }

    /// Waits for what is in flight, as long as some of it arrives, and then for unexpected messages.
    fn drain(&mut self, cluster: &mut Cluster) -> Result<(), ClusterError> {
        self.sending = false;
        let end = Instant::now() + DRAIN_MAX;
        let mut progressing = true;
        while progressing && Instant::now() < end {
            let received = self.ledger.received;
            let quiet = end.min(Instant::now() + DRAIN_QUIET);
            self.run_until(cluster, quiet, Self::is_settled)?;
            progressing = self.ledger.received > received && !self.is_settled();
        }
        self.run_until(cluster, Instant::now() + QUIET, |_| false)
    }

    /// Nothing is in flight, and nobody is being moved.
    fn is_settled(&self) -> bool {
        let is_moving = matches!(self.replacement, Replacement::Ending | Replacement::Moving(_));
        self.ledger.is_settled() && !is_moving
    }

    fn finish(mut self, before: &Snapshot, after: &Snapshot, silences: Option<Silences>) -> Report {
        let seconds = (after.at - before.at).as_secs_f64();
        let messages = after.landed - before.landed;
        let used = |before: Option<CpuTime>, after: Option<CpuTime>| {
            Some(after?.since(before?).running.as_secs_f64())
        };
        let cost = |before, after| {
            used(before, after).filter(|_| messages > 0).map(|used| 1e6 * used / messages as f64)
        };
        let spun = (after.spun - before.spun).as_secs_f64();
        let has_outage = !matches!(self.failure, Failure::None);
        Report {
            seconds,
            messages_per_second: messages as f64 / seconds,
            deliveries_per_second: (after.received - before.received) as f64 / seconds,
            sent: self.ledger.sent(),
            latency: self.ledger.take_latencies().map(Latencies::summary),
            nodes_cpu_us_per_message: cost(before.nodes, after.nodes),
            broker_cpu_us_per_message: cost(before.broker, after.broker),
            client_cpu_share: used(before.client, after.client).map(|used| (used - spun) / seconds),
            faults: self.ledger.faults(),
            disconnections: self.disconnections,
            causes: self.causes,
            outage: has_outage.then(|| {
                let silence_ms = silences.map(|silences| silences.longest(after.at).map(millis));
                Outage { silence_ms: silence_ms.unwrap_or_default(), ..self.outage_report }
            }),
        }
    }

    fn snapshot(&self, cluster: &Cluster) -> Snapshot {
        let used = |process: Process| process.cpu_time().ok();
        let nodes = cluster.nodes.iter().map(|node| used(Process::new(node.pid())));
        // A broker that was restarted has another process, whose time begins at 0.
        let is_same = matches!(self.failure, Failure::None | Failure::Planned { .. });
        let broker = cluster.broker.as_ref().and_then(Broker::process).filter(|_| is_same);
        Snapshot {
            at: Instant::now(),
            nodes: nodes.reduce(|one, other| Some(one?.and(other?))).flatten(),
            broker: broker.and_then(used),
            client: used(Process::current()),
            spun: self.spun,
            landed: self.ledger.landed,
            received: self.ledger.received,
        }
    }
}

fn note(disconnections: &mut u64, causes: &mut Vec<String>, index: usize, ended: &Ended) {
    *disconnections += 1;
    if causes.len() < CAUSES_MAX {
        causes.push(format!("connection {index}: {ended}"));
    }
}
