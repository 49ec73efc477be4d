//! The command `cluster`, briefly: the server of another library that is part of this program, on a real Redis.
//!
//! shardcast's own example is left out, because building it in release within a test would take minutes; that its nodes lose
//! nothing is in the tests of the crate `shardcast` (`tests/node_brokers.rs`). Knows the command line and the JSON that it
//! prints.

use std::process::{Command, Output};

use serde_json::Value;

fn cluster(arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_benchmarks"))
        .args("cluster --servers socketioxide-redis --rounds 1 --warmup 0.2 --rate 200".split(' '))
        .args(arguments.split(' '))
        .output()
        .expect("cargo has built it")
}

fn report(arguments: &str) -> Value {
    let output = cluster(arguments);
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{progress}");
    let comparison: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let broker = comparison["backplanes"][0].as_str();
    assert!(broker.is_some_and(|name| name.starts_with("redis-server ")), "{comparison}");
    comparison["servers"][0].clone()
}

#[test]
fn two_nodes_are_measured_beside_one_and_every_client_has_everything() {
    for arguments in
        ["--json --seconds 1 --clients 3 --publishers 4", "--json --seconds 1 --clients 4 --groups 2"]
    {
        let report = report(arguments);
        for run in [&report["single"][0], &report["cluster"][0]] {
            assert!(run["sent"].as_u64() > Some(0) && run["deliveries_per_second"].as_f64() > Some(0.0));
            // Another order is a result, and not our fault.
            for fault in ["missing", "duplicates", "strays"] {
                assert_eq!(run["faults"][fault], 0, "{arguments}: {fault} in {run}");
            }
            assert_eq!(run["disconnections"], 0, "{run}");
            for node in ["own", "other"] {
                assert!(run["latency"][node]["p50_us"].as_f64() > Some(0.0), "{run}");
            }
        }
        assert!(report["single"][0]["broker_cpu_us_per_message"].is_null());
        assert!(report["cluster"][0]["broker_cpu_us_per_message"].as_f64() > Some(0.0), "{report}");
    }
}

#[test]
fn what_an_outage_of_the_broker_loses_is_found() {
    let report = report("--json --seconds 2 --outage 0.5 --clients 2 --publishers 2");
    assert!(report["single"].as_array().unwrap().is_empty());
    let run = &report["cluster"][0];
    assert!(run["outage"]["seconds"].as_f64() >= Some(0.5), "{run}");
    // PUB/SUB keeps nothing for a subscriber that is not connected.
    assert!(run["faults"]["missing"].as_u64() > Some(0), "{run}");
    assert!(run["outage"]["silence_ms"]["other"].as_f64() >= Some(500.0), "{run}");
}

#[test]
fn clients_of_a_node_that_is_replaced_go_on_at_another_one() {
    let report = report("--json --seconds 2 --replace --clients 3 --publishers 4");
    assert!(report["single"].as_array().unwrap().is_empty());
    let run = &report["cluster"][0];
    assert_eq!((&run["faults"]["moved"], &run["disconnections"]), (&3.into(), &0.into()), "{run}");
    // What both of a client's connections have received is everything but what came between them.
    for fault in ["missing", "duplicates", "strays", "holes"] {
        assert_eq!(run["faults"][fault], 0, "{fault} in {run}");
    }
}

#[test]
fn the_tables_name_every_server_and_options_that_do_not_fit_together_are_refused() {
    let output = cluster("--seconds 0.5 --clients 2 --publishers 2");
    let page = String::from_utf8_lossy(&output.stdout);
    assert_eq!(page.matches("\n| socketioxide-redis | ").count(), 3, "{page}");
    for arguments in [
        "--clients 2 --publishers 5",
        "--publishers 1",
        "--clients 9001",
        "--groups 11",
        "--seconds 1 --outage 0.7",
        "--in-flight 1",
    ] {
        let output = cluster(arguments);
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments}");
    }
}
