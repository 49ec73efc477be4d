//! The chat on two nodes: one command starts a broker, two nodes and a load balancer, and says what to try.
//!
//! `cargo run --release -p examples --features backplane --example cluster`, then open http://127.0.0.1:3000 in two tabs:
//! each is on another node, as the page says, and they are in one room. `--port P` is the balancer's port, and the nodes
//! have the two after it (0: any ports). `--broker nats|redis` chooses the broker: nats-server or redis-server, which must
//! be installed (`ci/install-brokers` does it on Debian). Without it, nats-server if it is there, else redis-server.
//!
//! A node that ends is started again a second later, and so is the broker, which keeps the log in a temporary folder.
//! SIGTERM to a node is a restart as in a deployment: the balancer sees that it is not ready, and a second later its
//! clients are disconnected with 1012, spread over two seconds. Ctrl-C ends everything. No process outlives this one,
//! even if it is killed (with setpriv of util-linux 2.33 or newer; elsewhere, unless it is killed).
//!
//! This file reads the command line and says what there is. [`broker`] and [`node`] keep a program running,
//! [`balancer`] passes connections on. A node is this program once more, as the example [`chat`].

#![allow(clippy::print_stdout)]

mod balancer;
mod broker;
#[path = "../chat/main.rs"]
mod chat;
mod node;
mod process;

use std::error::Error;
use std::net::Ipv4Addr;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use balancer::Upstream;
use broker::{Broker, Kind};
use node::Node;
use process::Processes;

const NODES: u16 = 2;
const USAGE: &str = "usage: cluster [--port P] [--broker nats|redis]";

struct Options {
    port: u16,
    broker: Option<Kind>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options { port: 3000, broker: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next().as_deref()) {
            ("--port", Some(port)) => options.port = port.parse().map_err(|_| USAGE)?,
            ("--broker", Some("nats")) => options.broker = Some(Kind::Nats),
            ("--broker", Some("redis")) => options.broker = Some(Kind::Redis),
            _ => return Err(USAGE.into()),
        }
    }
    Ok(options)
}

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        Some("node") => chat::main(),
        _ => run(options()?),
    }
}

// One thread, because the processes are killed when the thread ends that has started them.
#[tokio::main(flavor = "current_thread")]
async fn run(Options { port, broker }: Options) -> Result<(), Box<dyn Error>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let broker = Broker::find(broker)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
    let listener = listener.map_err(|error| format!("the balancer cannot listen on port {port}: {error}"))?;
    let (mut brokers, mut nodes) = (Processes::default(), Processes::default());
    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        outcome = serve(broker, port, listener, &mut brokers, &mut nodes) => outcome,
    };
    // The broker last, so that the nodes can leave.
    nodes.end().await;
    brokers.end().await;
    println!("all processes have ended");
    outcome
}

/// Starts everything, and returns when a part of it has failed.
async fn serve(
    broker: Broker,
    port: u16,
    listener: TcpListener,
    brokers: &mut Processes,
    nodes: &mut Processes,
) -> Result<(), Box<dyn Error>> {
    let url = broker.url();
    let (accepts, mut accepting) = watch::channel(None);
    println!("{broker}: {url}");
    brokers.spawn(|ending| broker.keep_running(accepts, ending));
    let broker_pid = tokio::select! {
        error = brokers.failed() => return Err(error.into()),
        pid = accepting.wait_for(Option::is_some) => pid?.unwrap_or_default(),
    };

    let mut upstreams = Vec::new();
    for number in 1..=NODES {
        let port = if port == 0 { 0 } else { port.checked_add(number).ok_or(USAGE)? };
        let node = Node { name: format!("node {number}"), broker: url.clone(), port };
        let name = node.name.clone();
        let (starts, started) = watch::channel(None);
        let (checked, ready) = watch::channel(None);
        nodes.spawn(|ending| node.keep_running(starts, ending));
        tokio::spawn(balancer::check(name, started.clone(), checked));
        upstreams.push(Upstream { started, ready });
    }
    let address = listener.local_addr()?;
    tokio::spawn(balancer::balance(listener, upstreams.clone()));

    let say = async {
        for node in &mut upstreams {
            node.ready.wait_for(Option::is_some).await?;
        }
        let pids =
            upstreams.iter().map(|node| node.started.borrow().as_ref().map_or(0, |started| started.pid));
        say_what_to_try(&address.to_string(), broker_pid, pids);
        std::future::pending().await
    };
    tokio::select! {
        error = brokers.failed() => Err(error.into()),
        error = nodes.failed() => Err(error.into()),
        failed = say => failed,
    }
}

fn say_what_to_try(address: &str, broker: u32, nodes: impl Iterator<Item = u32>) {
    println!("open http://{address} in two tabs; then try:");
    for (node, number) in nodes.zip(1..) {
        println!("  kill {node}    restarts node {number}: its clients go to another node within 3 s");
        println!("  kill -9 {node} crashes it: its clients go to another node at once");
    }
    println!("  kill -9 {broker} crashes the broker: messages wait until it is back, and none is lost");
    println!("Ctrl-C ends everything");
}
