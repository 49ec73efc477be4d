//! Users: which connections a user's name reaches, in which order, and how many of them there may be.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;

use shardcast_engine::{
    Address, AdoptError, CloseCode, CloseReason, ConnectionConfig, EngineConfig, METADATA_BYTES_MAX, Payload,
    Publication, PublishError, USER_NAME_BYTES_MAX, User, UserLimit,
};
use testkit::client::new_connection;
use testkit::{Client, Received, Rig, at_once, lock};

/// A connection that the engine has been given, and has not necessarily opened.
fn adopt(rig: &Rig, user: User) -> Result<Client, AdoptError> {
    let (mut connection, client) = new_connection(&rig.engine, &rig.config, rig.send_buffer);
    connection.user = Some(user);
    at_once(rig.everyone.adopt(connection)).map(|()| client)
}

fn connect_as(rig: &mut Rig, user: &str) -> Client {
    let client = adopt(rig, User::new(user)).unwrap();
    rig.settle();
    client
}

fn publish(rig: &Rig, to: Address, text: &str) {
    at_once(rig.everyone.publish(Publication::message(to, Payload::text(text)))).unwrap();
}

/// The messages that a client has received.
fn heard(client: &mut Client) -> Vec<String> {
    let received = client.peer.receive().into_iter();
    received.filter_map(|one| if let Received::Data(text) = one { Some(text) } else { None }).collect()
}

fn limited(limit: UserLimit, shards: usize) -> Rig {
    let config = ConnectionConfig { max_connections_per_user: Some(limit), ..ConnectionConfig::default() };
    Rig::with(EngineConfig { shards: Some(shards), ..EngineConfig::default() }, config)
}

#[test]
fn a_user_s_message_reaches_all_connections_of_the_user_and_no_other() {
    for shards in 1..=3 {
        let mut rig = Rig::new(shards);
        let mut tabs: Vec<_> = (0..4).map(|_| connect_as(&mut rig, "ada")).collect();
        let mut bob = connect_as(&mut rig, "bob");
        let mut nobody = rig.connect();
        publish(&rig, Address::user("ada"), "1");
        publish(&rig, Address::users(["ada", "bob", "ada", "nobody"]), "2");
        publish(&rig, Address::Everyone, "3");
        publish(&rig, Address::user("carol"), "nobody gets this");
        rig.settle();
        for tab in &mut tabs {
            assert_eq!(heard(tab), ["1", "2", "3"], "each once and in order, {shards} shards");
        }
        assert_eq!(heard(&mut bob), ["2", "3"]);
        assert_eq!(heard(&mut nobody), ["3"]);
    }
}

#[test]
fn a_user_and_a_group_of_one_name_never_meet() {
    let mut rig = Rig::new(2);
    let mut ada = connect_as(&mut rig, "ada");
    let mut member = rig.connect();
    at_once(rig.everyone.join(member.id(), "ada")).map(drop).unwrap();
    rig.settle();
    publish(&rig, Address::user("ada"), "user");
    publish(&rig, Address::group("ada"), "group");
    at_once(rig.everyone.leave(ada.id(), "ada")).unwrap();
    publish(&rig, Address::user("ada"), "still");
    rig.settle();
    assert_eq!(
        (heard(&mut ada), heard(&mut member)),
        (vec!["user".into(), "still".into()], vec!["group".to_owned()])
    );
    assert_eq!((rig.everyone.group_len("ada"), rig.everyone.user_len("ada")), (1, 1));
    assert_eq!((rig.everyone.group_count(), rig.everyone.user_count()), (1, 1));
    assert_eq!(rig.everyone.groups()[0].name, "ada".into());
}

#[test]
fn a_connection_is_its_user_s_from_when_its_on_open_is_done_until_its_end() {
    let mut rig = Rig::new(2);
    let mut first = connect_as(&mut rig, "ada");
    let (mut connection, mut opening) = new_connection(&rig.engine, &rig.config, rig.send_buffer);
    connection.user = Some(User::new("ada"));
    lock(&opening.record).waits_at_open = true;
    at_once(rig.everyone.adopt(connection)).unwrap();
    rig.settle();
    assert_eq!(rig.everyone.user_len("ada"), 2, "it counts");
    let everyone = rig.everyone.clone();
    let mut receipt = testkit::Task::new(
        everyone.deliver(Publication::message(Address::user("ada"), Payload::text("too early"))),
    );
    let _ = receipt.poll();
    rig.settle();
    assert_eq!(receipt.poll().unwrap().unwrap().recipients, 1);
    opening.release();
    rig.settle();
    publish(&rig, Address::user("ada"), "both");
    at_once(rig.everyone.publish(Publication::close(first.id(), CloseCode(4000), "").unwrap())).unwrap();
    publish(&rig, Address::user("ada"), "one");
    rig.settle();
    assert_eq!(heard(&mut opening), ["both", "one"]);
    assert_eq!(heard(&mut first), ["too early", "both"]);
    assert_eq!(rig.everyone.user_len("ada"), 1);
    drop(opening);
    rig.settle();
    assert_eq!((rig.everyone.user_len("ada"), rig.everyone.user_count()), (0, 0));
}

#[test]
fn all_connections_of_a_user_can_be_ended_at_one_position() {
    let mut rig = Rig::new(3);
    let tabs: Vec<_> = (0..3).map(|_| connect_as(&mut rig, "ada")).collect();
    let bob = connect_as(&mut rig, "bob");
    let close = Publication::close(Address::user("ada"), CloseCode(4001), "banned").unwrap();
    at_once(rig.everyone.publish(close.except(&[tabs[0].id()]))).unwrap();
    rig.settle();
    assert!(tabs[0].record().ends.is_empty() && bob.record().ends.is_empty());
    for tab in &tabs[1..] {
        let reason = CloseReason::Application { code: CloseCode(4001), text: "banned".into() };
        assert_eq!(tab.record().ends, [reason]);
    }
}

#[test]
fn a_user_does_not_count_as_a_group_of_its_connection() {
    let config = ConnectionConfig { max_groups: 1, ..ConnectionConfig::default() };
    let mut rig = Rig::one(config);
    let client = connect_as(&mut rig, "ada");
    at_once(rig.everyone.join(client.id(), "a")).map(drop).unwrap();
    rig.settle();
    assert!(client.record().ends.is_empty());
    let names = Arc::new(std::sync::Mutex::new(Vec::new()));
    let told = names.clone();
    at_once(rig.everyone.groups_of(client.id(), move |names| *lock(&told) = names)).unwrap();
    rig.settle();
    assert_eq!(*lock(&names), ["a".into()]);
    at_once(rig.everyone.join(client.id(), "b")).map(drop).unwrap();
    rig.settle();
    assert_eq!(client.record().ends, [CloseReason::TooManyGroups]);
}

#[test]
fn the_oldest_connections_stay_and_one_more_is_refused() {
    for shards in 1..=3 {
        let mut rig = limited(UserLimit::OldestStays(2), shards);
        // None of them is open yet: those on their way count.
        let mut first = vec![adopt(&rig, User::new("ada")).unwrap(), adopt(&rig, User::new("ada")).unwrap()];
        for _ in 0..2 {
            let refused = adopt(&rig, User::new("ada"));
            assert!(matches!(refused, Err(AdoptError::TooManyConnectionsOfUser)), "{refused:?}");
        }
        adopt(&rig, User::new("bob")).unwrap();
        rig.settle();
        assert_eq!(rig.everyone.user_len("ada"), 2);
        assert!(first.iter().all(|client| client.record().ends.is_empty()));
        drop(first.pop());
        rig.settle();
        adopt(&rig, User::new("ada")).unwrap();
        assert_eq!(rig.everyone.user_len("ada"), 2, "{shards} shards");
    }
}

#[test]
fn the_newest_connection_wins_and_the_oldest_is_told_not_to_return() {
    for shards in 1..=3 {
        let mut rig = limited(UserLimit::NewestWins(2), shards);
        let mut tabs: Vec<_> = (0..2).map(|_| connect_as(&mut rig, "ada")).collect();
        let bob = connect_as(&mut rig, "bob");
        // Two at a time, before any shard has a turn.
        tabs.extend((0..2).map(|_| adopt(&rig, User::new("ada")).unwrap()));
        rig.settle();
        for old in &mut tabs[..2] {
            assert_eq!(old.record().ends, [CloseReason::Replaced]);
            assert!(old.peer.receive().contains(&Received::Close(Some(1008))));
            assert!(!CloseReason::Replaced.should_reconnect());
        }
        assert!(tabs[2..].iter().chain([&bob]).all(|client| client.record().ends.is_empty()));
        assert_eq!(rig.everyone.user_len("ada"), 2);
        // One that has ended is not replaced.
        drop(tabs.pop());
        rig.settle();
        let new = connect_as(&mut rig, "ada");
        assert!(tabs[2].record().ends.is_empty() && new.record().ends.is_empty());
        // Nor does one count whose client has not answered its Close frame.
        let close = Publication::close(new.id(), CloseCode(4000), "").unwrap();
        at_once(rig.everyone.publish(close)).unwrap();
        rig.settle();
        let newest = connect_as(&mut rig, "ada");
        assert!(tabs[2].record().ends.is_empty() && newest.record().ends.is_empty());
    }
}

#[test]
fn a_limit_holds_on_all_shards_while_connections_arrive_from_all_threads() {
    let mut rig = limited(UserLimit::OldestStays(5), 3);
    let admitted: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (engine, everyone, config) =
                    (rig.engine.clone(), rig.everyone.clone(), rig.config.clone());
                scope.spawn(move || {
                    let try_one = || {
                        let (mut connection, client) = new_connection(&engine, &config, 4096);
                        connection.user = Some(User::new("ada"));
                        at_once(everyone.adopt(connection)).map(|()| client)
                    };
                    (0..20).filter_map(|_| try_one().ok()).collect::<Vec<_>>().len()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(admitted, 5);
    rig.settle();
    assert_eq!(rig.everyone.user_len("ada"), 0, "the clients have disconnected");
}

#[test]
fn a_name_or_metadata_that_is_too_long_is_refused() {
    let rig = Rig::new(1);
    let long = "a".repeat(USER_NAME_BYTES_MAX + 1);
    assert!(matches!(adopt(&rig, User::new(&*long)), Err(AdoptError::UserNameTooLong)));
    let big = vec![0; METADATA_BYTES_MAX + 1];
    let refused = adopt(&rig, User::new("ada").with_metadata(big.clone()));
    assert!(matches!(refused, Err(AdoptError::MetadataTooLong)));
    adopt(&rig, User::new(&long[1..]).with_metadata(&big[1..])).unwrap();
    publish(&rig, Address::user(long), "to nobody");
    let someone = adopt(&rig, User::new("ada")).unwrap();
    drop(someone);
    let mut rig = rig;
    let client = connect_as(&mut rig, "bob");
    let set = at_once(rig.everyone.set_metadata(client.id(), big));
    assert_eq!(set, Err(PublishError::MetadataTooLong));
}
