//! `cluster`: the same server as two nodes that meet at a broker, and as one node without it.
//!
//! What a second node costs in throughput and latency, whether all clients of both nodes see one order, and what an
//! outage of the broker loses. Each run has fresh processes. In a round each server runs first as one node and then as
//! two, and what is added is the difference of the two. Nothing is pinned, because there are more processes than cores
//! where this usually runs. Knows a server by its command line and the broker by its program.

mod broker;
mod faults;
mod histories;
mod ledger;
mod report;
mod run;

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use self::{
    broker::{Broker, BrokerError, BrokerKind, Fsync, Keeping, Storage},
    report::{Report, Rounds, Tables},
    run::Cluster,
};
use crate::{
    load::{LoadError, connect::ConnectError, target::TargetError},
    machine::Machine,
    message::MessageError,
    statistic::counted,
    trial::{Harness, HarnessError, Program, ServerProcess, StartError, Subject, locked_version},
};

/// How many nodes there are.
const NODES: usize = 2;

/// With so many on each of two nodes, one server that has all of them, and this process, have less than 20,000 open files.
const CLIENTS_MAX: usize = 9_000;

/// Messages a second in an open loop by default.
const RATE: f64 = 1000.0;

/// A server and its broker.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Contender {
    ShardcastNats,
    ShardcastRedis,
    SocketioxideRedis,
}

/// The command line of `cluster`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Which servers, with which brokers.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Contender::ALL)]
    servers: Vec<Contender>,
    /// Clients on each node.
    #[arg(long, default_value_t = 10)]
    clients: usize,
    /// How many of the clients publish, spread evenly over nodes and groups.
    #[arg(long, default_value_t = 8)]
    publishers: usize,
    /// Groups: a message goes to the clients of its publisher's group on both nodes.
    #[arg(long, default_value_t = 1)]
    groups: usize,
    /// Open loop: messages a second in total, with the latency counted from the intended time of sending. 1,000 by default.
    #[arg(long, conflicts_with = "in_flight")]
    rate: Option<f64>,
    /// Closed loop instead: messages in flight in total.
    #[arg(long)]
    in_flight: Option<usize>,
    /// How long to measure, in seconds.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How long to send before measuring, in seconds.
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// Bytes of a whole JSON message.
    #[arg(long, default_value_t = 64)]
    payload: usize,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// The broker is killed (SIGKILL) after 40 % of the measured time, and started again after so many seconds, with the
    /// same port and data. Without the runs of one node.
    #[arg(long, conflicts_with = "in_flight")]
    outage: Option<f64>,
    /// After 20 % of the measured time the second node is told to end (SIGTERM), and its clients connect to a third one.
    /// Without the runs of one node.
    #[arg(long, conflicts_with = "in_flight")]
    replace: bool,
    /// Redis: `appendonly yes`, with this `appendfsync`.
    #[arg(long, value_enum, default_value_t = Fsync::Everysec)]
    fsync: Fsync,
    /// NATS: where the stream is; by default in memory, and with --outage in files.
    #[arg(long, value_enum)]
    storage: Option<Storage>,
    /// Use shardcast's example as it was built last.
    #[arg(long)]
    no_build: bool,
    /// Print one JSON object on stdout instead of text.
    #[arg(long)]
    json: bool,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterError {
    #[error("{0}")]
    Options(&'static str),
    #[error(transparent)]
    Harness(#[from] HarnessError),
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the client's loop failed")]
    Io(#[from] std::io::Error),
    #[error("the result cannot be encoded as JSON")]
    Json(#[from] serde_json::Error),
    #[error("{name} has no result")]
    Run { name: String, source: Box<ClusterError> },
}

/// The result of the command.
#[derive(Debug, Serialize)]
struct Comparison {
    machine: Machine,
    /// The brokers, and the crates through which another library reaches them, with their versions.
    backplanes: Vec<String>,
    servers: Vec<Rounds>,
}

/// Runs everything and prints it; false when shardcast was faulty.
pub(crate) fn run(options: &Options) -> Result<bool, ClusterError> {
    options.check()?;
    let harness = Harness::find(true)?;
    let subjects = options.subjects();
    if !options.no_build {
        harness.build(&subjects, "backplane,tls")?; // brokers take a minute to compile
    }
    let rounds = |server: &Contender| Rounds { name: server.to_string(), ..Rounds::default() };
    let mut servers: Vec<Rounds> = options.servers.iter().map(rounds).collect();
    for round in 0..options.rounds {
        for (server, rounds) in options.servers.iter().zip(&mut servers) {
            let run = |broker| {
                let source =
                    |source| ClusterError::Run { name: server.to_string(), source: Box::new(source) };
                options.run_once(&harness, *server, broker).map_err(source)
            };
            if options.outage.is_none() && !options.replace {
                let report = run(None)?;
                eprintln!("round {}, {server}, one node:\n{report}", round + 1);
                rounds.single.push(report);
            }
            let report = run(Some(server.broker()))?;
            eprintln!("round {}, {server}, two nodes:\n{report}", round + 1);
            rounds.cluster.push(report);
        }
    }
    let is_ours = |(server, _): &(&Contender, &Rounds)| server.subject().is_ours();
    let is_faultless = options
        .servers
        .iter()
        .zip(&servers)
        .filter(is_ours)
        .all(|(_, rounds)| rounds.single.iter().chain(&rounds.cluster).all(Report::is_faultless));
    let comparison =
        Comparison { machine: Machine::inspect(&subjects), backplanes: options.backplanes(), servers };
    if options.json {
        println!("{}", serde_json::to_string(&comparison)?);
    } else {
        let Comparison { machine, backplanes, servers } = &comparison;
        print!("{machine}- {}\n- {options}\n{}", backplanes.join(", "), Tables(servers));
    }
    Ok(is_faultless)
}

impl Options {
    fn check(&self) -> Result<(), ClusterError> {
        let positive = |number: f64| number.is_finite() && number > 0.0;
        let rules = [
            (
                self.clients == 0 || self.clients > CLIENTS_MAX,
                "clients must be at least 1 and at most 9000 for each node",
            ),
            (
                self.publishers < NODES || self.publishers > NODES * self.clients,
                "publishers must be at least 2, one on each node, and at most as many as clients on both nodes",
            ),
            (
                self.groups == 0 || self.groups > self.clients,
                "there must be at least 1 group, and a client on each node for each",
            ),
            (self.in_flight == Some(0) || self.rounds == 0, "in-flight and rounds must be at least 1"),
            (self.rate.is_some_and(|rate| !positive(rate)), "rate must be above 0"),
            (
                !positive(self.seconds) || !self.warmup.is_finite() || self.warmup < 0.0,
                "seconds must be above 0, and warmup at least 0",
            ),
            (
                self.outage.is_some_and(|outage| {
                    !positive(outage) || outage > (1.0 - report::OUTAGE_AFTER) * self.seconds
                }),
                "outage must be above 0 and end before the measurement does: at most 60 % of its seconds",
            ),
        ];
        match rules.into_iter().find(|(is_broken, _)| *is_broken) {
            Some((_, reason)) => Err(ClusterError::Options(reason)),
            None => Ok(()),
        }
    }

    /// Messages a second in an open loop.
    fn rate(&self) -> Option<f64> {
        self.in_flight.is_none().then(|| self.rate.unwrap_or(RATE))
    }

    fn subjects(&self) -> Vec<Subject> {
        let all = [Subject::Shardcast, Subject::Socketioxide];
        let is_used = |subject: &Subject| self.servers.iter().any(|server| server.subject() == *subject);
        all.into_iter().filter(is_used).collect()
    }

    fn keeping(&self) -> Keeping {
        let usual = if self.outage.is_some() { Storage::File } else { Storage::Memory };
        Keeping { fsync: self.fsync, storage: self.storage.unwrap_or(usual) }
    }

    fn backplanes(&self) -> Vec<String> {
        let is_used = |kind| self.servers.iter().any(|server| server.broker() == kind);
        let brokers = [BrokerKind::Nats, BrokerKind::Redis].into_iter().filter(|&kind| is_used(kind));
        let adapter = self.servers.contains(&Contender::SocketioxideRedis).then(|| {
            let name = "socketioxide-redis";
            Some(format!("{name} {}", locked_version(name)?))
        });
        brokers.filter_map(BrokerKind::version).chain(adapter.flatten()).collect()
    }

    /// Two nodes at a broker, or one node without.
    fn run_once(
        &self,
        harness: &Harness,
        server: Contender,
        broker: Option<BrokerKind>,
    ) -> Result<Report, ClusterError> {
        let broker = broker.map(|kind| Broker::start(kind, self.keeping())).transpose()?;
        let program = Program::Subject(server.subject());
        let nodes = match &broker {
            None => vec![ServerProcess::start(&program, harness, false)?],
            Some(broker) => {
                let node = |_| ServerProcess::start_node(&program, harness, &broker.url());
                (0..NODES + usize::from(self.replace)).map(node).collect::<Result<_, _>>()?
            }
        };
        run::measure(self, &mut Cluster { nodes, broker })
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { clients, publishers, groups, payload, rounds, seconds, .. } = self;
        let Keeping { fsync, storage } = self.keeping();
        write!(f, "{NODES} × {}, {}, ", counted(*clients, "client"), counted(*publishers, "publisher"))?;
        if *groups > 1 {
            write!(f, "{groups} groups, ")?;
        }
        match (self.rate(), self.in_flight) {
            (Some(rate), _) => write!(f, "{rate} messages/s")?,
            (None, in_flight) => write!(f, "{} messages in flight", in_flight.unwrap_or(1))?,
        }
        write!(
            f,
            " of {payload} bytes, {} of {seconds} s, NATS with its stream in {storage}, Redis with appendfsync {fsync}",
            counted(*rounds, "round")
        )?;
        if self.replace {
            f.write_str("; a node is replaced")?;
        }
        match self.outage {
            Some(outage) => write!(f, "; the broker is killed and starts again after {outage} s"),
            None => Ok(()),
        }
    }
}

impl Contender {
    const ALL: [Self; 3] = [Self::ShardcastNats, Self::ShardcastRedis, Self::SocketioxideRedis];

    fn subject(self) -> Subject {
        match self {
            Self::ShardcastNats | Self::ShardcastRedis => Subject::Shardcast,
            Self::SocketioxideRedis => Subject::Socketioxide,
        }
    }

    fn broker(self) -> BrokerKind {
        match self {
            Self::ShardcastNats => BrokerKind::Nats,
            Self::ShardcastRedis | Self::SocketioxideRedis => BrokerKind::Redis,
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}
