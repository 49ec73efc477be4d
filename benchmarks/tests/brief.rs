//! A brief comparison by the command line: every server that is part of this program, under three scenarios.
//!
//! shardcast's own example is left to `ci/bench`, because building it in release within a test would take minutes. Knows
//! the command line and the files that it writes.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

const SERVERS: &str = "floor,tokio-websockets,fastwebsockets,tutorial,axum-signal,socketioxide";

#[test]
fn every_server_serves_and_every_result_is_written() {
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join("brief");
    let output = Command::new(env!("CARGO_BIN_EXE_benchmarks"))
        .args(["compare", "--brief", "--no-pin", "--servers", SERVERS])
        .args(["--scenarios", "fanout-64,echo,idle,groups-2,tls-echo", "--results"])
        .arg(&results)
        .output()
        .unwrap();
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{progress}");

    let record: Value =
        serde_json::from_str(&fs::read_to_string(results.join("compare.json")).unwrap()).unwrap();
    let runs = record["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 6 * 3 + 1 + 4, "only the floor has groups, and two have no TLS");
    for run in runs {
        let server = run["server"].as_str().unwrap();
        assert!(run["error"].is_null(), "{server}: {progress}");
        if run["scenario"] != "idle" {
            let traffic = &run["report"]["traffic"];
            assert!(traffic["received"].as_u64() > Some(0), "{server} delivered nothing: {progress}");
            // This one may lose and reorder messages, which is a result and not our fault.
            let is_exact = server != "axum-signal";
            assert!(!is_exact || traffic["received"] == traffic["expected"], "{server}: {progress}");
        }
    }
    let page = fs::read_to_string(results.join("compare.md")).unwrap();
    assert_eq!(page, String::from_utf8_lossy(&output.stdout));
    let charts: Vec<&str> = page.split("```text\n").skip(1).collect();
    assert_eq!(charts.len(), 3, "deliveries, CPU, memory: {page}");
    for chart in charts {
        assert!(SERVERS.split(',').all(|server| chart.contains(&format!("\n{server} "))), "{chart}");
        assert!(!chart.contains("no result") && !chart.contains("NaN"), "{chart}");
    }
}

#[test]
fn a_server_that_does_not_start_fails_the_comparison() {
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join("unbuilt");
    // There is no release build of the example next to this copy of the program.
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("elsewhere/debug/benchmarks");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_benchmarks"), &program).unwrap();
    let output = Command::new(&program)
        .args(["compare", "--brief", "--no-pin", "--no-build", "--servers", "shardcast"])
        .args(["--scenarios", "idle", "--results"])
        .arg(&results)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("**FAILED**"));
}
