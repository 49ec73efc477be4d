//! Publications as values: they can be written, read and compared, in a text and in a binary format.

use std::time::Duration;

use shardcast_engine::{Address, CloseCode, Delivery, Payload, Policy, Publication};

fn publications() -> Vec<Publication> {
    let id = "0010000020000003".parse().expect("an id");
    let policy = Policy::DropMessage { timeout: Duration::from_millis(100) };
    let delivery = Delivery::with_policy(policy).expect("in range");
    vec![
        Publication::message(Address::Everyone, Payload::text("to all, \u{e4}")),
        Publication::message(Address::group("lobby"), Payload::binary(&[0, 255])).except(&[id]),
        Publication::message(Address::groups(["a", "b"]), Payload::text("")).with_delivery(delivery),
        Publication::message(id, Payload::binary(b"")),
        Publication::message(Address::user("lobby"), Payload::text("")),
        Publication::message(Address::users(["ada", "bob"]), Payload::text("")),
        Publication::close(Address::group("a"), CloseCode::NORMAL, "bye").expect("it may be sent"),
    ]
}

#[test]
fn a_publication_can_be_written_and_read() {
    for publication in publications() {
        let text = serde_json::to_string(&publication).expect("it can be written");
        assert_eq!(
            serde_json::from_str::<Publication>(&text).expect("it can be read"),
            publication,
            "{text}"
        );
        let bytes = postcard::to_stdvec(&publication).expect("it can be written");
        assert_eq!(postcard::from_bytes::<Publication>(&bytes).expect("it can be read"), publication);
    }
    let text = serde_json::to_string(&publications()[1]).expect("it can be written");
    let expected = r#"{"to":{"group":"lobby"},"except":["0010000020000003"],"content":{"message":{"binary":[0,255]}},"delivery":{"policy":null}}"#;
    assert_eq!(text, expected);
    let to_user = serde_json::to_value(&publications()[4]).expect("it can be written");
    assert_eq!(to_user["to"], serde_json::json!({ "user": "lobby" }), "not the group of this name");
}

#[test]
fn what_could_not_be_made_cannot_be_read() {
    let read = |content: &str, delivery: &str| {
        let text = format!(r#"{{"to":"everyone","except":[],"content":{content},"delivery":{delivery}}}"#);
        serde_json::from_str::<Publication>(&text).map_err(|error| error.to_string())
    };
    let message = r#"{"message":{"text":"x"}}"#;
    assert!(read(message, "{}").is_ok());
    let refused = read(r#"{"close":{"code":1006,"text":""}}"#, "{}").expect_err("1006 is never sent");
    assert!(refused.contains("1006"), "{refused}");
    let refused =
        read(message, r#"{"policy":{"drop_message":{"timeout":"2h"}}}"#).expect_err("at most an hour");
    assert!(refused.contains("`timeout`"), "{refused}");
    assert!(read(message, r#"{"policy":"block","clas":1}"#).is_err(), "an unknown field");
    assert!(read(r#"{"presence":null}"#, "{}").is_err(), "only shards announce changes of presence");
}
