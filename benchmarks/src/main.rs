//! The benchmarks: a load generator, the servers that it loads, and the comparison of them.
//!
//! One binary with subcommands, because `compare` runs servers and clients as separate processes of this one program.
//! Client and server never share a process, so that the CPU of one is not charged to the other. Knows no type of
//! shardcast: its example is one more server, known by its command line.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod cluster;
mod compare;
mod cpu;
mod dialect;
mod duel;
mod flood;
mod frame;
mod handshake;
mod load;
mod machine;
mod message;
mod nonblocking;
mod process;
mod server;
mod statistic;
mod tls;
mod trial;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "benchmarks", about = "Measures WebSocket fan-out servers against a minimal one.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A minimal server: one epoll thread, one send(2) per delivery.
    Floor(server::floor::Options),
    #[command(flatten)]
    Library(server::LibraryServer),
    /// The load generator: one thread, every delivery verified.
    Load(load::Options),
    /// Runs the load against each server; writes tables and JSON to benchmarks/results.
    Compare(compare::Options),
    /// Runs several servers or builds at once, in turns of some milliseconds: their CPU, to one or two percent.
    Duel(duel::Options),
    /// Two nodes at a broker, and one node without: what is added, lost, duplicated and seen in another order.
    Cluster(cluster::Options),
    /// One client that sends at a steady rate whatever the server does.
    Flood(flood::Options),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Floor(options) => server::floor::run(&options).map(|()| true).map_err(boxed),
        Command::Library(server) => server.run().map(|()| true).map_err(boxed),
        Command::Load(options) => load::run(&options).map_err(boxed),
        Command::Compare(options) => compare::run(&options).map_err(boxed),
        Command::Duel(options) => duel::run(&options).map_err(boxed),
        Command::Cluster(options) => cluster::run(&options).map_err(boxed),
        Command::Flood(options) => flood::run(&options).map(|()| true).map_err(boxed),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("benchmarks: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn boxed<E: std::error::Error + 'static>(error: E) -> Box<dyn std::error::Error> {
    Box::new(error)
}
