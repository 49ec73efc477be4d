//! A member of a room: the hub of the chat, one value for each connection.
//!
//! A room is a group, and a user is whoever has the same token, in any number of tabs. The members' list, joins and
//! leaves come from presence: a user whose connection failed, or who reloads the page, is the same user, and nobody
//! sees a leave and a join.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shardcast::backplane::MissedMessages;
use shardcast::{
    BroadcastPolicy, Clients, CloseCode, Dropped, GroupCount, HubContext, JsonCodec, PresenceChange,
    PresenceKind, Present, PublishError, Rate, RateLimit, Refusal, Stateful, StatefulHub, UserLimit,
    WsHubConfig,
};

use super::room::{Room, Said, now};

/// Most characters in the name of a user or a room.
const NAME_MAX: usize = 32;
/// Most characters in a message.
const TEXT_MAX: usize = 2000;
/// Most rooms in an overview.
const ROOMS_SHOWN: usize = 20;

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(crate) enum FromMember {
    Say {
        text: String,
    },
    Rename {
        name: String,
    },
    /// Requests an [`Overview`](ToMember::Overview).
    Look,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(crate) enum ToMember {
    /// Sent once. What arrives before it must be applied after it.
    Welcome {
        user: Arc<str>,
        /// The node of the connection, if there are several.
        #[serde(skip_serializing_if = "Option::is_none")]
        node: Option<String>,
        members: Vec<Present>,
        history: Vec<Said>,
        /// Whether there were messages before the history. With several nodes there is no history, see `room.rs`.
        is_cut: bool,
        at: u64,
    },
    Joined {
        user: Arc<str>,
        name: Arc<str>,
        at: u64,
    },
    Left {
        user: Arc<str>,
        name: Arc<str>,
        at: u64,
    },
    Renamed {
        user: Arc<str>,
        name: Arc<str>,
        was: Arc<str>,
        at: u64,
    },
    Said(Said),
    /// The answer to a message: how many members it has reached, and for how many it was dropped.
    Sent {
        reached: u64,
        dropped: u64,
        /// Nodes that have not answered in time; their members are not counted.
        #[serde(skip_serializing_if = "is_zero")]
        silent_nodes: u64,
    },
    /// This node has missed messages of others.
    Gap {
        at: u64,
    },
    /// The other answer to a message, and to a name.
    Refused {
        why: String,
    },
    /// Messages to this member were dropped, because it reads too slowly.
    Missed {
        messages: u64,
    },
    Overview {
        connections: usize,
        rooms: Vec<GroupCount>,
        /// The mean round trip of the server's pings to this member.
        rtt_micros: Option<u64>,
        /// Messages to this member that were dropped.
        dropped: u64,
    },
}

/// What presence shows of a user besides the id.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Profile {
    pub(crate) name: Arc<str>,
}

/// The settings of the chat's connections.
pub(crate) fn config() -> WsHubConfig {
    WsHubConfig {
        // A member who reads slowly misses messages, is told so, and delays nobody.
        policy: BroadcastPolicy::DropMessage { timeout: Duration::ZERO },
        // Ten messages a second after a burst of twenty. A client above it is read more slowly; nothing is lost.
        rate_limit: RateLimit { messages: Some(Rate::per_second(10).with_burst(20)), ..RateLimit::default() },
        max_connections_per_user: Some(UserLimit::NewestWins(10)),
        max_message_bytes: 16 << 10,
        ..WsHubConfig::default()
    }
}

/// One connection of a user.
pub(crate) struct Member {
    pub(crate) room: Arc<Room>,
    pub(crate) user: Arc<str>,
    pub(crate) name: Arc<str>,
}

impl StatefulHub for Member {
    type Codec = JsonCodec;
    type InMessage = FromMember;
    type OutMessage = ToMember;

    async fn on_connected(&mut self, ctx: HubContext<Stateful<Self>>) -> Result<(), Refusal> {
        if !is_name(&self.name) || !is_name(&self.room.name) {
            return Err(Refusal::new(CloseCode::POLICY_VIOLATION, NAME_RULE));
        }
        // Nobody can say anything between the join and the history.
        let history = self.room.history.lock().await;
        let _ = ctx.clients().join(ctx.id(), &self.room.name).await; // fails when the engine has ended
        let members = ctx.clients().presence(&self.room.name).await.unwrap_or_default();
        let node = ctx.id().node().map(|node| node.to_string());
        let (user, is_cut) = (self.user.clone(), node.is_some() || history.is_cut());
        ctx.unicast(ToMember::Welcome {
            user,
            node,
            members,
            history: history.messages(),
            is_cut,
            at: now(),
        })
        .await;
        Ok(())
    }

    async fn on_message(&mut self, message: FromMember, ctx: HubContext<Stateful<Self>>) {
        let answer = match message {
            FromMember::Say { text } => self.say(text, &ctx).await,
            FromMember::Rename { name } => self.rename(name.trim(), &ctx).await,
            FromMember::Look => overview(&ctx).await.map(Some),
        };
        match answer {
            Ok(Some(answer)) => ctx.unicast(answer).await,
            Ok(None) => {}
            Err(error) => ctx.unicast(ToMember::Refused { why: error.to_string() }).await,
        }
    }

    async fn on_dropped(&mut self, ctx: HubContext<Stateful<Self>>, dropped: Dropped) {
        ctx.unicast(ToMember::Missed { messages: dropped.messages }).await;
    }

    /// Called once for each user, not for each connection.
    async fn on_gap(clients: &Clients<ToMember>, _: MissedMessages) {
        let gap = ToMember::Gap { at: now() };
        let _ = clients.to_all().on_this_node().publish(&gap).await; // fails when the engine has ended
    }

    async fn on_presence(clients: &Clients<ToMember>, change: PresenceChange) {
        let PresenceChange { group: Some(room), user, kind, metadata: Some(metadata), .. } = change else {
            return; // the hub itself
        };
        let Ok(Profile { name }) = metadata.get() else { return };
        let message = match kind {
            PresenceKind::Joined => ToMember::Joined { user, name, at: now() },
            PresenceKind::Left => ToMember::Left { user, name, at: now() },
        };
        let _ = clients.to_group(&room).publish(&message).await; // fails when the engine has ended
    }
}

type Answer = Result<Option<ToMember>, PublishError>;

impl Member {
    async fn say(&self, text: String, ctx: &HubContext<Stateful<Self>>) -> Answer {
        if text.trim().is_empty() || text.chars().count() > TEXT_MAX {
            let why = format!("a message must have 1 to {TEXT_MAX} characters");
            return Ok(Some(ToMember::Refused { why }));
        }
        let said = Said { user: self.user.clone(), name: self.name.clone(), text, at: now() };
        let room = ctx.clients().to_group(&self.room.name);
        let receipt = if ctx.id().node().is_some() {
            room.deliver(&ToMember::Said(said)).await?
        } else {
            let mut history = self.room.history.lock().await;
            room.deliver(&ToMember::Said(history.add(said))).await?
        };
        Ok(Some(ToMember::Sent {
            reached: receipt.accepted(),
            dropped: receipt.dropped.total(),
            silent_nodes: receipt.nodes_asked.saturating_sub(receipt.nodes_answered),
        }))
    }

    async fn rename(&mut self, name: &str, ctx: &HubContext<Stateful<Self>>) -> Answer {
        if !is_name(name) {
            return Ok(Some(ToMember::Refused { why: NAME_RULE.to_owned() }));
        }
        let name: Arc<str> = name.into();
        let was = std::mem::replace(&mut self.name, name.clone());
        ctx.clients().set_metadata(ctx.id(), &Profile { name: name.clone() }).await?;
        let renamed = ToMember::Renamed { user: self.user.clone(), name, was, at: now() };
        ctx.clients().to_group(&self.room.name).publish(&renamed).await?;
        Ok(None)
    }
}

/// The largest rooms that this node has, and the connection in numbers.
async fn overview(ctx: &HubContext<Stateful<Member>>) -> Result<ToMember, PublishError> {
    let clients = ctx.clients();
    let mut rooms = clients.groups();
    for room in &mut rooms {
        room.users = clients.presence_len(&room.name); // those on other nodes, too
    }
    rooms.sort_by(|a, b| b.users.cmp(&a.users).then_with(|| a.name.cmp(&b.name)));
    rooms.truncate(ROOMS_SHOWN);
    let metrics = clients.connection_metrics(ctx.id()).await?.unwrap_or_default();
    let rtt_micros = metrics.rtt.average.map(|rtt| rtt.as_micros() as u64);
    Ok(ToMember::Overview {
        connections: clients.len(),
        rooms,
        rtt_micros,
        dropped: metrics.tally.dropped.total(),
    })
}

const NAME_RULE: &str = "the names of user and room must have 1 to 32 characters";

fn is_zero(count: &u64) -> bool {
    *count == 0
}

fn is_name(name: &str) -> bool {
    !name.trim().is_empty() && name.chars().count() <= NAME_MAX
}
