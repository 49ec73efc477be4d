//! What hubs write into the log that all nodes share, and what nodes tell each other beside it.
//!
//! Values and their bytes: a version, then postcard. Every node decodes what another one has written, perhaps by another
//! release of the program: what it cannot read is an error, never a panic. Does not know the log.

use std::borrow::Cow;
use std::time::SystemTime;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shardcast_backplane::NodeId;
use shardcast_engine::{
    CloseCode, Delivery, DropCause, InvalidCloseCode, MessageKind, Payload, Publication, Receipt,
};

use crate::address::{To, those_on};
use crate::connection_id::ConnectionId;

/// Of the format. A node leaves out what has another one.
const VERSION: u8 = 1;

/// Bytes of a payload's entry besides the payload, at a guess.
const ENTRY_BYTES_HINT: usize = 128;

/// An entry of the log.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Entry<'a> {
    /// The node is alive; or it leaves, and nothing of it follows.
    Heartbeat { is_leaving: bool },
    /// All nodes are asked for the connections that a target has there.
    ListMembers { hub: &'a str, to: To, question: u64 },
    /// A node is gone, and its users with it, unless something of it has followed what was read last.
    Forget { node: u64, read_last: Place },
    /// All nodes are asked for their state of this hub.
    AskState { hub: &'a str },
    /// A part of this node's state of this hub: all users who are present, and all counts.
    State {
        hub: &'a str,
        is_first: bool,
        is_last: bool,
        #[serde(borrow)]
        users: Vec<UserState<'a>>,
        #[serde(borrow)]
        counts: NodeCounts<'a>,
    },
    /// Counts of this node that have changed.
    CountChanges {
        hub: &'a str,
        #[serde(borrow)]
        counts: NodeCounts<'a>,
    },
    /// A user has joined or left, on this node; or is present with other metadata.
    #[serde(borrow)]
    PresenceChange(PresenceNews<'a>),
    /// A message, or the end of connections.
    #[serde(borrow)]
    Published(Published<'a>),
    /// Something to do for one connection, on its node.
    Command {
        hub: &'a str,
        id: ConnectionId,
        #[serde(borrow)]
        command: Command<'a>,
    },
}

/// The place of an entry: epoch and number of its record, and its number in the record.
pub(crate) type Place = (u64, u64, u32);

/// A user in a group, or, without one, in the hub.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct UserState<'a> {
    pub(crate) group: Option<&'a str>,
    pub(crate) user: &'a str,
    /// In milliseconds since 1970.
    pub(crate) since: u64,
    /// As JSON.
    pub(crate) metadata: Option<&'a [u8]>,
}

/// Connections to one node.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NodeCounts<'a> {
    pub(crate) connections: u64,
    /// Those that are members of a group; 0 if there are none any more.
    #[serde(borrow)]
    pub(crate) groups: Vec<(&'a str, u64)>,
    /// Those of a user; 0 if there are none any more.
    #[serde(borrow)]
    pub(crate) users: Vec<(&'a str, u64)>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PresenceNews<'a> {
    pub(crate) hub: &'a str,
    pub(crate) is_present: bool,
    #[serde(borrow)]
    pub(crate) state: UserState<'a>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Published<'a> {
    pub(crate) hub: &'a str,
    pub(crate) to: To,
    #[serde(borrow)]
    pub(crate) except: Cow<'a, [ConnectionId]>,
    #[serde(borrow)]
    pub(crate) content: Content<'a>,
    pub(crate) delivery: Delivery,
    /// The number under which its publisher expects the receipts of all nodes.
    pub(crate) receipt: Option<u64>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Content<'a> {
    Text(&'a str),
    Binary(#[serde(with = "raw")] &'a [u8]),
    Close { code: CloseCode, reason: Cow<'a, str> },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Command<'a> {
    #[serde(borrow)]
    Join(Vec<&'a str>),
    #[serde(borrow)]
    Leave(Vec<&'a str>),
    ExpireAt(Option<SystemTime>),
    SetMetadata(#[serde(with = "raw")] &'a [u8]),
    /// Its groups are told to this node under this number.
    ListGroups {
        question: u64,
    },
}

/// What a node tells another one: an answer to its question of this number.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) question: u64,
    pub(crate) node: u64,
    pub(crate) content: AnswerContent,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum AnswerContent {
    Receipt {
        recipients: u64,
        delayed: u64,
        timeout: u64,
        overflow: u64,
        disconnected: u64,
    },
    /// None for a connection that has disconnected.
    Groups(Option<Vec<String>>),
    /// A part of them.
    Members {
        ids: Vec<shardcast_engine::ConnectionId>,
        is_last: bool,
    },
}

/// Why bytes are no entry.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InvalidEntry {
    #[error("it is of version {0:?}, and this node knows version {VERSION}")]
    Version(Option<u8>),
    #[error("it cannot be decoded: {0}")]
    Decode(#[from] postcard::Error),
}

fn encode<T: Serialize>(value: &T, bytes_hint: usize) -> Result<Bytes, postcard::Error> {
    let mut bytes = Vec::with_capacity(bytes_hint);
    bytes.push(VERSION);
    Ok(postcard::to_extend(value, bytes)?.into())
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, InvalidEntry> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => Ok(postcard::from_bytes(rest)?),
        other => Err(InvalidEntry::Version(other.map(|(version, _)| *version))),
    }
}

impl<'a> Entry<'a> {
    pub(crate) fn encode(&self) -> Result<Bytes, postcard::Error> {
        let payload = match self {
            Self::Published(Published { content: Content::Text(text), .. }) => text.len(),
            Self::Published(Published { content: Content::Binary(bytes), .. }) => bytes.len(),
            _ => 0,
        };
        encode(self, ENTRY_BYTES_HINT + payload)
    }

    pub(crate) fn decode(bytes: &'a [u8]) -> Result<Self, InvalidEntry> {
        decode(bytes)
    }
}

impl<'a> Content<'a> {
    pub(crate) fn of(payload: &'a Payload) -> Self {
        // What a codec calls text has been checked.
        match (payload.kind(), std::str::from_utf8(payload.bytes())) {
            (MessageKind::Text, Ok(text)) => Self::Text(text),
            _ => Self::Binary(payload.bytes()),
        }
    }
}

impl Published<'_> {
    /// What the engine of this node must publish.
    ///
    /// # Errors
    /// A close code that may not be sent.
    pub(crate) fn on(&self, node: NodeId) -> Result<Publication, InvalidCloseCode> {
        let to = self.to.on(Some(node));
        let publication = match &self.content {
            Content::Text(text) => Publication::message(to, Payload::text(text)),
            Content::Binary(bytes) => Publication::message(to, Payload::binary(bytes)),
            Content::Close { code, reason } => Publication::close(to, *code, reason.clone().into_owned())?,
        };
        Ok(publication.except(&those_on(&self.except, Some(node))).with_delivery(self.delivery))
    }
}

impl Answer {
    pub(crate) fn encode(&self) -> Result<Bytes, postcard::Error> {
        encode(self, ENTRY_BYTES_HINT)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, InvalidEntry> {
        decode(bytes)
    }
}

impl From<Receipt> for AnswerContent {
    fn from(receipt: Receipt) -> Self {
        Self::Receipt {
            recipients: receipt.recipients,
            delayed: receipt.delayed,
            timeout: receipt.dropped[DropCause::Timeout],
            overflow: receipt.dropped[DropCause::Overflow],
            disconnected: receipt.disconnected,
        }
    }
}

/// Bytes in one piece: serde would take a slice element by element.
mod raw {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<&'de [u8], D::Error> {
        <&[u8]>::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use shardcast_engine::{Address, Policy};

    use super::*;

    fn ada() -> UserState<'static> {
        UserState { group: Some("room"), user: "ada", since: 3, metadata: Some(b"{}") }
    }

    fn counts() -> NodeCounts<'static> {
        NodeCounts { connections: 3, groups: vec![("room", 2), ("", 0)], users: vec![("ada", 1)] }
    }

    fn published<'a>(content: Content<'a>, except: &'a [ConnectionId]) -> Entry<'a> {
        let policy = Policy::DropConnection { timeout: Duration::from_millis(1500), max_drops: 3 };
        Entry::Published(Published {
            hub: "chat",
            to: To::Many(Address::groups(["a", "b"])),
            except: except.into(),
            content,
            delivery: Delivery::with_policy(policy).expect("in range"),
            receipt: Some(7),
        })
    }

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let id: ConnectionId = "95d6b1a20c4f83e70010000020000003".parse().expect("an id");
        let one = To::One(id);
        let except = [id];
        let entries = [
            Entry::Heartbeat { is_leaving: true },
            Entry::Forget { node: 7, read_last: (1, 2, 3) },
            Entry::AskState { hub: "chat" },
            Entry::ListMembers { hub: "chat", to: To::One(id), question: 4 },
            Entry::State {
                hub: "chat",
                is_first: true,
                is_last: false,
                users: vec![ada()],
                counts: counts(),
            },
            Entry::CountChanges { hub: "chat", counts: counts() },
            Entry::PresenceChange(PresenceNews { hub: "chat", is_present: true, state: ada() }),
            published(Content::Text("hello"), &except),
            published(Content::Binary(&[0, 255, 128]), &[]),
            published(Content::Close { code: CloseCode(4000), reason: "away".into() }, &[]),
            Entry::Published(Published {
                hub: "",
                to: one,
                except: Cow::Borrowed(&[]),
                content: Content::Text(""),
                delivery: Delivery::default(),
                receipt: None,
            }),
            Entry::Command { hub: "chat", id, command: Command::Join(vec!["a", "b"]) },
            Entry::Command { hub: "chat", id, command: Command::ExpireAt(Some(SystemTime::UNIX_EPOCH)) },
            Entry::Command { hub: "chat", id, command: Command::SetMetadata(b"{}") },
            Entry::Command { hub: "chat", id, command: Command::ListGroups { question: 3 } },
        ];
        for entry in entries {
            let bytes = entry.encode().expect("encodes");
            assert_eq!(Entry::decode(&bytes).expect("decodes"), entry);
        }
        let answer =
            Answer { question: 1, node: 2, content: AnswerContent::Groups(Some(vec!["a".to_owned()])) };
        assert_eq!(Answer::decode(&answer.encode().expect("encodes")).expect("decodes"), answer);
    }

    #[test]
    fn what_is_no_entry_is_an_error() {
        let bytes = published(Content::Text("hello"), &[]).encode().expect("encodes");
        assert!((0..bytes.len()).all(|length| Entry::decode(&bytes[..length]).is_err()));
        let mut newer = bytes.to_vec();
        newer[0] = VERSION + 1;
        assert!(matches!(Entry::decode(&newer), Err(InvalidEntry::Version(Some(2)))));
        // Text that is not UTF-8: clients would close on it.
        let at = bytes.windows(5).position(|window| window == b"hello").expect("it is there");
        let mut broken = bytes.to_vec();
        broken[at] = 0xFF;
        assert!(Entry::decode(&broken).is_err());
    }

    #[test]
    fn a_publication_is_for_the_connections_of_the_node_that_reads_it() {
        let (here, there) = (NodeId::from_bits(1), NodeId::from_bits(2));
        let local: shardcast_engine::ConnectionId = "0010000020000003".parse().expect("an id");
        let entry = |to, except| Published {
            hub: "chat",
            to,
            except,
            content: Content::Text("hello"),
            delivery: Delivery::default(),
            receipt: None,
        };
        let id = ConnectionId::new(Some(here), local);
        let to_one = entry(To::One(id), Cow::Borrowed(&[]));
        assert_eq!(*to_one.on(here).expect("valid").address(), Address::Connection(local));
        let nobody = shardcast_engine::ConnectionId::NOBODY;
        assert_eq!(*to_one.on(there).expect("valid").address(), Address::Connection(nobody));
        let ids = [id, ConnectionId::new(Some(there), local)];
        let to_others = entry(To::Many(Address::Everyone), Cow::Borrowed(&ids));
        let expected = Publication::message(Address::Everyone, Payload::text("hello")).except(&[local]);
        assert_eq!(to_others.on(here).expect("valid"), expected);
        let closing = Published {
            content: Content::Close { code: CloseCode(1006), reason: "".into() },
            ..entry(To::Many(Address::Everyone), Cow::Borrowed(&[]))
        };
        assert!(closing.on(here).is_err());
    }
}
