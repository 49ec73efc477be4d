//! The benchmarks: a load generator, the servers it is pointed at, and the comparison of them.
//!
//! One binary with subcommands, because `compare` runs every part as a process of its own and finds them all
//! under its own path. Client and server never share a process, so the CPU of one is never charged to the other.
//! Knows no shardcast type: its example is one more server, known by its command line.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod chart;
mod compare;
mod cpu;
mod dialect;
mod duel;
mod frame;
mod handshake;
mod load;
mod machine;
mod message;
mod process;
mod results;
mod scale;
mod server;
mod statistic;
mod trial;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "benchmarks", about = "Measures WebSocket fan-out servers against the least possible one.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The least possible server: one epoll thread, one send(2) per delivery.
    Floor(server::floor::Options),
    #[command(flatten)]
    Peer(server::Peer),
    /// The load generator: one thread, every delivery verified.
    Load(load::Options),
    /// Runs the load against each server in turn; tables and charts go to benchmarks/results.
    Compare(compare::Options),
    /// Runs several servers at once and turns to each for some milliseconds: their CPU, to a percent or two.
    Duel(duel::Options),
    /// Varies connections, shards, payload and groups; tables and charts go to benchmarks/results.
    Scale(scale::Options),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Floor(options) => server::floor::run(&options).map(|()| true).map_err(boxed),
        Command::Peer(peer) => peer.run().map(|()| true).map_err(boxed),
        Command::Load(options) => load::run(&options).map_err(boxed),
        Command::Compare(options) => compare::run(&options).map_err(boxed),
        Command::Duel(options) => duel::run(&options).map_err(boxed),
        Command::Scale(options) => scale::run(&options).map_err(boxed),
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
