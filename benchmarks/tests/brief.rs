//! The comparison from outside, in brief: every server that is this program itself, under three scenarios.
//!
//! shardcast's own example is left to `compare --brief` on the command line, because building it in release within a
//! test would take minutes. Knows the command line and the files that come of it.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

const SERVERS: &str = "floor,tokio-websockets,fastwebsockets,tutorial,axum-signal,socketioxide";

#[test]
fn every_peer_serves_and_every_result_is_written() {
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join("brief");
    let output = Command::new(env!("CARGO_BIN_EXE_benchmarks"))
        .args(["compare", "--brief", "--no-pin", "--servers", SERVERS])
        .args(["--scenarios", "fanout-64,echo,idle", "--results"])
        .arg(&results)
        .output()
        .unwrap();
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{progress}");

    let record: Value =
        serde_json::from_str(&fs::read_to_string(results.join("compare.json")).unwrap()).unwrap();
    let runs = record["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 6 * 3);
    for run in runs {
        let server = run["server"].as_str().unwrap();
        assert!(run["error"].is_null(), "{server}: {progress}");
        if run["scenario"] != "idle" {
            let traffic = &run["report"]["traffic"];
            assert!(traffic["received"].as_u64() > Some(0), "{server} delivered nothing: {progress}");
            // What this one loses or reorders is a result, and not ours to promise.
            let is_exact = server != "axum-signal";
            assert!(!is_exact || traffic["received"] == traffic["expected"], "{server}: {progress}");
        }
    }
    assert_eq!(
        fs::read_to_string(results.join("compare.md")).unwrap(),
        String::from_utf8_lossy(&output.stdout)
    );
    for chart in ["deliveries.svg", "cpu.svg", "memory.svg"] {
        let svg = fs::read_to_string(results.join(chart)).unwrap();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{chart}");
        assert!(SERVERS.split(',').all(|server| svg.contains(&format!(">{server}<"))), "{chart}");
        assert!(!svg.contains("no result") && !svg.contains("NaN"), "{chart}");
    }
}

#[test]
fn a_server_that_does_not_start_fails_the_comparison() {
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join("unbuilt");
    // Beside the test's own program there is no release build of the example.
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
