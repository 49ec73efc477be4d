//! Settings as text: what a file or the environment can say, and what is refused.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::fmt::Debug;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::de::value::{Error, MapDeserializer};
use serde_json::json;
use shardcast::{BroadcastPolicy, EngineConfig, OverLimit, Rate, RateLimit, UserLimit, WsHubConfig};

/// No field has its default. A new field must be added here, because the literal names them all.
fn engine_config() -> EngineConfig {
    EngineConfig {
        shards: Some(3),
        pin: false,
        blocked_after: None,
        log_capacity: 1,
        mailbox_capacity: 2,
        publishers_waiting_max: 3,
        coalesce: Duration::from_micros(2500),
        io_uring: true,
        read_buffer_bytes: 4,
        backlog_bytes_max: 5,
        unfinished_bytes_max: 6,
        max_connections_per_address: Some(7),
        max_upgrades_per_address: Some(Rate::new(9, Duration::from_secs(60)).with_burst(10)),
        max_connections: 8,
        trim_heap: true,
        __non_exhaustive: (),
    }
}

/// Likewise.
fn hub_config(policy: BroadcastPolicy) -> WsHubConfig {
    WsHubConfig {
        policy,
        outbox_frames: 1,
        outbox_bytes: 2,
        overflow_frames: 3,
        overflow_bytes: 4,
        stall_timeout: None,
        max_message_bytes: 5,
        max_frame_bytes: 11,
        accept_unmasked_frames: true,
        max_fragments: 6,
        control_frames_per_second: 7,
        rate_limit: RateLimit {
            messages: Some(Rate::per_second(11)),
            bytes: Some(Rate::new(12, Duration::from_millis(1500)).with_burst(13)),
            user_messages: Some(Rate::per_second(14)),
            user_bytes: Some(Rate::per_second(15)),
            over_limit: OverLimit::Drop,
            ..RateLimit::default()
        },
        heartbeat_interval: Some(Duration::from_secs(90)),
        pong_timeout: Duration::from_millis(1500),
        idle_timeout: Some(Duration::from_secs(365 * 24 * 60 * 60)),
        message_timeout: Some(Duration::from_secs(3600)),
        max_connection_duration: Some(Duration::new(1, 1)),
        max_groups: 8,
        max_connections_per_user: Some(UserLimit::NewestWins(9)),
        presence_grace: Duration::from_millis(2500),
        close_timeout: Duration::from_nanos(1),
        __non_exhaustive: (),
    }
}

/// As crates do that read settings from the environment: every value is a text.
fn from_texts<T: DeserializeOwned>(texts: &[(&str, &str)]) -> Result<T, Error> {
    T::deserialize(MapDeserializer::new(texts.iter().copied()))
}

#[track_caller]
fn assert_refused<T: DeserializeOwned + Debug>(value: serde_json::Value, words: &[&str]) {
    let error = serde_json::from_value::<T>(value).unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn every_setting_is_written_and_read_back() {
    let engine = engine_config();
    let text = serde_json::to_string(&engine).unwrap();
    assert_eq!(serde_json::from_str::<EngineConfig>(&text).unwrap(), engine);
    let policies = [
        BroadcastPolicy::Block,
        BroadcastPolicy::DropMessage { timeout: Duration::ZERO },
        BroadcastPolicy::DropConnection { timeout: Duration::from_millis(100), max_drops: 5 },
        BroadcastPolicy::DropOnHighRtt { max_rtt: Duration::from_secs(1), rtt_samples: 8 },
    ];
    for policy in policies {
        let hub = hub_config(policy);
        let text = serde_json::to_string(&hub).unwrap();
        assert_eq!(serde_json::from_str::<WsHubConfig>(&text).unwrap(), hub, "{text}");
    }
    let defaults = (EngineConfig::default(), WsHubConfig::default());
    let text = serde_json::to_string(&defaults).unwrap();
    assert_eq!(serde_json::from_str::<(EngineConfig, WsHubConfig)>(&text).unwrap(), defaults);
}

#[test]
fn settings_are_written_as_people_write_them() {
    let written = serde_json::to_value(engine_config()).unwrap();
    assert_eq!((&written["coalesce"], &written["blocked_after"]), (&json!("2ms 500us"), &json!("none")));
    let policy = BroadcastPolicy::DropMessage { timeout: Duration::from_millis(100) };
    let written = serde_json::to_value(hub_config(policy)).unwrap();
    assert_eq!(written["policy"], json!({ "drop_message": { "timeout": "100ms" } }));
    assert_eq!(written["message_timeout"], json!("1h"));
    assert_eq!(
        written["rate_limit"],
        json!({
            "messages": { "count": 11, "period": "1s", "burst": 11 },
            "bytes": { "count": 12, "period": "1s 500ms", "burst": 13 },
            "user_messages": { "count": 14, "period": "1s", "burst": 14 },
            "user_bytes": { "count": 15, "period": "1s", "burst": 15 },
            "over_limit": "drop",
        })
    );
    assert_eq!(serde_json::to_value(WsHubConfig::default()).unwrap()["policy"], json!("block"));
}

#[test]
fn a_setting_that_is_not_given_has_its_default() {
    assert_eq!(from_texts::<EngineConfig>(&[]).unwrap(), EngineConfig::default());
    assert_eq!(from_texts::<WsHubConfig>(&[]).unwrap(), WsHubConfig::default());
}

#[test]
fn a_rate_without_a_period_is_per_second_and_its_burst_is_its_count() {
    let read = |rate| serde_json::from_value::<Rate>(rate).unwrap();
    assert_eq!(read(json!({ "count": 10 })), Rate::per_second(10));
    assert_eq!(read(json!({ "count": 10, "period": "1m" })), Rate::new(10, Duration::from_secs(60)));
    assert_eq!(read(json!({ "count": 10, "burst": 3 })), Rate::per_second(10).with_burst(3));
    assert_refused::<Rate>(json!({ "period": "1s" }), &["`count`"]);
    assert_refused::<Rate>(json!({ "count": 10, "brust": 3 }), &["`brust`"]);
    assert_refused::<Rate>(json!({ "count": 10, "period": 1 }), &["`period`", "5ms"]);
    let limit = json!({ "rate_limit": { "messages": { "count": 10 }, "over_limit": "queue" } });
    assert_refused::<WsHubConfig>(limit, &["`queue`", "`delay`"]);
}

#[test]
fn the_texts_of_environment_variables_are_read() {
    let engine: EngineConfig = from_texts(&[("coalesce", "2ms"), ("blocked_after", "none")]).unwrap();
    let coalesce = Duration::from_millis(2);
    assert_eq!(engine, EngineConfig { coalesce, blocked_after: None, ..EngineConfig::default() });

    let texts = [
        ("heartbeat_interval", "5s"),
        ("idle_timeout", "1h 30m"),
        ("stall_timeout", "none"),
        ("policy", "block"),
    ];
    let hub: WsHubConfig = from_texts(&texts).unwrap();
    let expected = WsHubConfig {
        heartbeat_interval: Some(Duration::from_secs(5)),
        idle_timeout: Some(Duration::from_secs(5400)),
        stall_timeout: None,
        ..WsHubConfig::default()
    };
    assert_eq!(hub, expected);
    let hub: WsHubConfig = serde_json::from_value(json!({ "stall_timeout": null })).unwrap();
    assert_eq!(hub.stall_timeout, None);
}

#[test]
fn an_unknown_setting_is_refused_by_name() {
    assert_refused::<EngineConfig>(json!({ "shard": 2 }), &["`shard`"]);
    assert_refused::<WsHubConfig>(json!({ "run_on": "runtime" }), &["`run_on`"]);
    assert_refused::<WsHubConfig>(json!({ "__non_exhaustive": null }), &["`__non_exhaustive`"]);
    let policy = json!({ "policy": { "drop_message": { "timeout": "1s", "max_drops": 1 } } });
    assert_refused::<WsHubConfig>(policy, &["`max_drops`"]);
    assert_refused::<WsHubConfig>(json!({ "policy": "drop_all" }), &["`drop_all`"]);
}

#[test]
fn a_text_that_is_no_duration_is_refused_with_the_setting_s_name() {
    assert_refused::<EngineConfig>(json!({ "coalesce": "2" }), &["`coalesce`", "\"2\"", "5ms"]);
    assert_refused::<EngineConfig>(json!({ "coalesce": 2 }), &["`coalesce`", "5ms"]);
    assert_refused::<EngineConfig>(json!({ "coalesce": "none" }), &["`coalesce`"]);
    assert_refused::<WsHubConfig>(json!({ "idle_timeout": "soon" }), &["`idle_timeout`", "\"soon\""]);
    assert_refused::<WsHubConfig>(json!({ "idle_timeout": 5 }), &["`idle_timeout`", "none"]);
    let policy = json!({ "policy": { "drop_on_high_rtt": { "max_rtt": "-1s", "rtt_samples": 1 } } });
    assert_refused::<WsHubConfig>(policy, &["`max_rtt`"]);
    let error = from_texts::<WsHubConfig>(&[("pong_timeout", "")]).unwrap_err().to_string();
    assert!(error.contains("`pong_timeout`"), "{error}");
}

#[test]
fn an_impossible_setting_is_named_with_its_range() {
    let error = WsHubConfig { outbox_frames: 0, ..WsHubConfig::default() }.validate().unwrap_err();
    assert_eq!(error.to_string(), "`outbox_frames` is 0, but must be from 1 to 16777216");
    let policy = BroadcastPolicy::DropConnection { timeout: Duration::from_millis(100), max_drops: 0 };
    let error = WsHubConfig { policy, ..WsHubConfig::default() }.validate().unwrap_err();
    assert_eq!(error.field, "max_drops");
}

#[test]
fn the_longest_durations_can_be_written_as_a_year() {
    let text =
        r#"{ "idle_timeout": "1year", "message_timeout": "1y", "max_connection_duration": "12months" }"#;
    let config: WsHubConfig = serde_json::from_str(text).unwrap();
    assert_eq!(config.validate(), Ok(()));
}
