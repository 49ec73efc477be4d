//! The checks at the end of a history: after all clients have read everything, and after all have disconnected.
//!
//! Each client against the model: what it received, what it lost and for which cause, what was reported to
//! its handler, why it ended. All together: tallies, group metrics, receipts, the report of a shutdown, and
//! that nothing is left.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use shardcast_engine::{CloseReason, ConnectionAudit, GroupMetrics, Policy, Receipt, Shard, UserLimit};
use testkit::lock;
use testkit::rig::is_readable;
use testkit::time::ms;

use super::handler::Record;
use super::history::{GRACE_MAX, History, SurveyOf, tell};
use super::model::{GROUPS, Model, ModelClient, USERS};
use super::peer::Peer;

impl History {
    /// Lets all clients finish, checks, ends all connections, and checks again.
    pub(crate) fn finish(&mut self) {
        self.room.store(usize::MAX, Relaxed); // otherwise changes are tried again for ever
        // What is in flight when some have ended may end others.
        for _ in 0..4 {
            self.settle();
        }
        self.let_delayed_pass();
        self.check_groups();
        // All clients read and no handler is busy, so no job has to wait.
        for job in self.jobs.iter().filter(|job| !job.is_shutdown()) {
            self.fault(format!("waits for ever: {:?}, accepted: {}", job.effect, job.is_accepted));
        }
        if self.adoptions_under_way > 0 {
            self.fault("an adoption does not end".into());
        }
        self.check_reasons();
        self.check_clients();
        self.check_receipts();
        self.check_surveys();
        self.check_books();
        self.check_presence();
        self.end_all();
        self.check_end();
    }

    /// Lets time pass until no message waits for its rate.
    fn let_delayed_pass(&mut self) {
        for _ in 0..1000 {
            let audits = self.shards.iter().flatten().flat_map(|shard| shard.audit().connections);
            if self.is_stopping || !audits.into_iter().any(|audit| audit.is_delayed) {
                return;
            }
            self.now += ms(25);
            self.settle();
        }
        self.fault("a message waits for its rate for ever".into());
    }

    /// Every end has a reason that this history has caused.
    fn check_reasons(&self) {
        for (client, record) in self.records.iter().enumerate() {
            let (peer, config, record) = (&self.peers[client], &self.configs[client], lock(record));
            let Some(reason) = record.ends.first() else { continue };
            let is_tight = config.overflow_frames < 65_536 || config.overflow_bytes < 1 << 20;
            let is_justified = match reason {
                CloseReason::PongTimeout => !peer.is_good || peer.is_broken,
                CloseReason::IdleTimeout => config.idle_timeout.is_some() || config.message_timeout.is_some(),
                CloseReason::MaxDuration => config.max_connection_duration.is_some(),
                CloseReason::Peer { .. } => peer.has_said_close,
                CloseReason::Disconnected | CloseReason::Transport(_) => peer.is_broken,
                CloseReason::Protocol(_) => peer.is_faulty || config.max_fragments < 1024,
                CloseReason::SlowConsumer => is_tight || (config.stall_timeout.is_some() && !peer.is_good),
                CloseReason::HighRtt => {
                    self.has_frame_with_rtt || matches!(config.policy, Policy::DropOnHighRtt { .. })
                }
                CloseReason::TooManyDrops => {
                    self.has_frame_with_drops || matches!(config.policy, Policy::DropConnection { .. })
                }
                CloseReason::UnfinishedLimit => self.engine_config.unfinished_bytes_max == 1 << 20,
                CloseReason::BacklogLimit => self.engine_config.backlog_bytes_max == 1 << 20,
                CloseReason::TooManyGroups => config.max_groups == 1,
                CloseReason::Replaced => self.is_replaced(client),
                CloseReason::ControlFlood => config.control_frames_per_second < 1000,
                CloseReason::HandlerPanicked => peer.asked_for_panic,
                CloseReason::Application { text, .. } => {
                    let client = &lock(&self.model).clients[client];
                    let (is_command, is_handler) = (text == "command", text == "handler");
                    is_command && client.closed_at.is_some() || is_handler && client.may_close_at.is_some()
                }
                CloseReason::Shutdown { .. } => self.is_stopping,
                _ => false,
            };
            if !is_justified {
                self.fault(format!("{client} ended by {reason:?}: {peer:?}"));
            }
        }
    }

    fn check_clients(&self) {
        let audits = self.shards.iter().flatten().flat_map(|shard| shard.audit().connections);
        let audits: BTreeMap<String, _> = audits.map(|audit| (audit.id.to_string(), audit)).collect();
        let model = lock(&self.model);
        let mut faults = Vec::new();
        for (number, client) in model.clients.iter().enumerate() {
            let check = ClientCheck {
                history: self,
                model: &model,
                number,
                client,
                peer: &self.peers[number],
                record: &lock(&self.records[number]),
            };
            let id = client.id.map(|id| id.to_string());
            check.run(id.and_then(|id| audits.get(&id)), &mut faults);
        }
        for (client, why) in &self.presumed_ended {
            let was_open = model.clients[*client].id.is_some();
            if was_open && !self.has_ended(*client) && !self.is_stopping {
                faults.push(format!("{client} lives, but {why}"));
            }
        }
        drop(model);
        lock(&self.model).faults.extend(faults);
    }

    /// Compares receipts with what arrived.
    fn check_receipts(&self) {
        let model = lock(&self.model);
        let mut faults = Vec::new();
        for (number, frame) in model.frames.iter().enumerate() {
            let Some(receipt) = frame.receipt else { continue };
            let number = number as u32;
            let Receipt { recipients, dropped, disconnected, .. } = receipt;
            let mut fault = |text: String| {
                faults
                    .push(format!("frame {number}: {receipt:?}, recipients {:?}: {text}", frame.recipients));
            };
            if recipients > frame.recipients.len() as u64 {
                fault("too many".into());
            }
            let count = |is_so: &dyn Fn(usize) -> bool| {
                frame.recipients.iter().filter(|client| is_so(**client)).count() as u64
            };
            // Only frames whose policy allows it may be dropped.
            let by_timeout = count(&|client| model.losses(number, client).by_timeout);
            let by_overflow = count(&|client| model.losses(number, client).by_overflow);
            if dropped.timeout > by_timeout || dropped.overflow > by_overflow {
                fault(format!("at most {by_timeout} and {by_overflow} may be lost"));
            }
            let all_live = count(&|client| self.has_ended(client) || model.clients[client].id.is_none()) == 0;
            if all_live && !self.is_stopping {
                let missing = count(&|client| !self.peers[client].heard.contains(&number));
                let is_right = recipients == frame.recipients.len() as u64
                    && disconnected == 0
                    && missing == dropped.total();
                if !is_right {
                    fault(format!("{missing} have not heard it"));
                }
            }
        }
        drop(model);
        lock(&self.model).faults.extend(faults);
    }

    /// Queries during the history add up, and match what had been accepted.
    fn check_surveys(&self) {
        for survey in &self.surveys {
            let parts = lock(&survey.parts);
            for part in parts.iter().filter(|part| !adds_up(part)) {
                self.fault(format!("a survey does not add up: {part:?}"));
            }
            if survey.is_of_everyone && survey.over_at.is_some() && !self.is_stopping {
                if parts.len() != self.shards.len() {
                    self.fault(format!("a survey was answered by {} shards", parts.len()));
                }
                self.check_survey(survey, &sum_of(&parts));
            }
        }
    }

    /// A query is answered after what was accepted before it, and before what was accepted after it.
    fn check_survey(&self, survey: &SurveyOf, sum: &GroupMetrics) {
        let (Some(asked_at), Some(over_at)) = (&survey.asked_at, &survey.over_at) else { return };
        let model = lock(&self.model);
        let clients = model.clients.iter().enumerate();
        let clients: Vec<_> = clients.filter(|(_, client)| client.namespace == survey.namespace).collect();
        let accepted = |counts: &[usize], number: usize| counts.get(number).copied().unwrap_or(0) as u64;
        let lives = |number: usize, client: &ModelClient| client.id.is_some() && !self.has_ended(number);
        let living = clients.iter().filter(|(number, client)| lives(*number, client));
        let least: u64 = living.map(|(number, _)| accepted(asked_at, *number)).sum();
        let most: u64 = clients.iter().map(|(number, _)| accepted(over_at, *number)).sum();
        let said: u64 = clients.iter().map(|(number, _)| u64::from(self.peers[*number].said)).sum();
        drop(model);
        if sum.tally.offered < least || sum.tally.offered > most || sum.tally.received > said {
            self.fault(format!(
                "of {least} to {most} frames and {said} messages a survey tells {} and {}",
                sum.tally.offered, sum.tally.received
            ));
        }
    }

    /// Compares the engine's tally with those of its namespaces.
    fn check_books(&mut self) {
        if self.is_stopping {
            return;
        }
        let parts: Vec<_> = (0..2).map(|namespace| self.survey_everyone(namespace)).collect();
        self.settle();
        self.check_surveys();
        let sum = parts.iter().flat_map(|parts| lock(parts).clone()).collect::<Vec<_>>();
        let sum = sum_of(&sum);
        // Once more, so that the published metrics are current.
        self.asleep.fill(None);
        self.shards.iter_mut().flatten().for_each(|shard| shard.turn(self.now).unwrap());
        let all = self.engine.metrics();
        let engine = (all.tally, all.pending_bytes, all.connections);
        let namespaces = (sum.tally, sum.pending_bytes, sum.connections);
        if engine != namespaces {
            self.fault(format!("the engine counts {engine:?} and its namespaces {namespaces:?}"));
        }
        // Bytes are counted in the outboxes; pending frames follow from the other counters.
        if (all.tally.pending() > 0) != (all.pending_bytes > 0) {
            self.fault(format!("the engine's books: {all:?}"));
        }
        if all.retained_bytes as usize > self.engine_config.backlog_bytes_max {
            self.fault("beyond the budget".into());
        }
    }

    /// Whether the user of a client has had as many others as are allowed.
    fn is_replaced(&self, client: usize) -> bool {
        let Some(UserLimit::NewestWins(max)) = self.user_limit else { return false };
        let model = lock(&self.model);
        let replaced = &model.clients[client];
        let others = model.clients.iter().enumerate().filter(|(number, other)| {
            *number != client
                && other.id.is_some()
                && (other.namespace, other.user) == (replaced.namespace, replaced.user)
        });
        replaced.user.is_some() && others.count() >= max as usize
    }

    /// Who was announced is who is there, once everybody who may come back has had the time.
    fn check_presence(&mut self) {
        // Until no connection has ended for as long as its user may take to come back.
        let ended =
            |history: &Self| (0..history.records.len()).filter(|client| history.has_ended(*client)).count();
        let mut quiet = 0;
        while quiet < 6 {
            let before = ended(self);
            // In small steps: where the log was full, changes are tried again after a few milliseconds.
            self.now += GRACE_MAX / 4;
            self.settle();
            quiet = if ended(self) == before { quiet + 1 } else { 0 };
        }
        if self.is_stopping {
            return;
        }
        for (namespace, user) in [0, 1].into_iter().flat_map(|namespace| [(namespace, 0), (namespace, 1)]) {
            let model = lock(&self.model);
            let clients = model.clients.iter().enumerate().filter(|(number, client)| {
                (client.namespace, client.user) == (namespace, Some(user))
                    && client.id.is_some()
                    && !self.has_ended(*number)
            });
            let clients: Vec<_> = clients.map(|(_, client)| client).collect();
            let mut faults = Vec::new();
            let mut check = |group: &str, members: usize| {
                let is_shown = model.shown.contains(&(namespace, group.to_owned(), USERS[user].to_owned()));
                if is_shown != (members > 0) {
                    let user = USERS[user];
                    faults.push(format!("{user} has {members} in {group} of {namespace}, shown: {is_shown}"));
                }
            };
            check("everyone", clients.iter().filter(|client| client.has_entered).count());
            for (index, group) in GROUPS.iter().enumerate() {
                check(group, clients.iter().filter(|client| client.groups.contains(&index)).count());
            }
            let counted = self.namespaces[namespace].user_len(USERS[user]);
            if counted != clients.len() {
                faults.push(format!(
                    "{} has {} connections, counted as {counted}",
                    USERS[user],
                    clients.len()
                ));
            }
            if let Some(limit) = self.user_limit
                && clients.len() > limit.max() as usize
            {
                faults.push(format!("{} has {} connections: {limit:?}", USERS[user], clients.len()));
            }
            drop(model);
            lock(&self.model).faults.extend(faults);
        }
        for (number, namespace) in self.namespaces.iter().enumerate() {
            for group in [None].into_iter().chain(GROUPS.map(Some)) {
                let name = group.unwrap_or("everyone");
                let model = lock(&self.model);
                let shown =
                    model.shown.iter().filter(|(its, group, _)| *its == number && group == name).count();
                drop(model);
                if namespace.presence_len(group) != shown {
                    self.fault(format!(
                        "{shown} are shown in {name}, counted as {}",
                        namespace.presence_len(group)
                    ));
                }
            }
        }
    }

    /// Ends all connections, in one way or the other.
    fn end_all(&mut self) {
        let is_by_shutdown = self.random.one_in(3);
        tell!(self, "all go, by a shutdown: {is_by_shutdown}");
        if is_by_shutdown {
            self.shut_down();
        }
        if !is_by_shutdown || self.is_hurried {
            for peer in &mut self.peers {
                peer.stream = None;
            }
        }
        for _ in 0..40 {
            self.settle();
            self.now += ms(200);
        }
        if self.is_stopping {
            // Shards that are over have been dropped; the others are given their time.
            for _ in 0..20 {
                self.now += ms(10_000);
                self.settle();
            }
            self.check_shutdown(is_by_shutdown);
        }
    }

    fn check_shutdown(&self, is_by_shutdown: bool) {
        for shard in self.shards.iter().flatten() {
            self.fault(format!(
                "a shard does not end: asleep {:?} at {:?}, work {}, readable {}, {:?}",
                self.asleep,
                self.now - self.start,
                shard.has_work(),
                is_readable(shard),
                shard.audit()
            ));
        }
        let Some(report) = &self.report else { return self.fault("there is no report".into()) };
        let open: u64 = self.open_at_stop.iter().flatten().sum();
        if report.flushed + report.cut_off != open {
            self.fault(format!("{report:?} of {open} connections"));
        }
        if !self.is_hurried && is_by_shutdown && report.left_over > 0 {
            self.fault(format!("{report:?} though nobody was in a hurry"));
        }
        if !report.stuck.is_empty() {
            self.fault(format!("{report:?} though no shard was held up"));
        }
    }

    /// Nothing is left.
    fn check_end(&self) {
        for job in &self.jobs {
            self.fault(format!("waits for ever when all have gone: {:?}", job.effect));
        }
        let (all, opened) = (self.engine.metrics(), self.opened());
        if !self.is_stopping && (all.connections, all.tally.pending(), all.retained_bytes) != (0, 0, 0) {
            self.fault(format!("left over: {all:?}"));
        }
        if all.adopted != all.ended || all.adopted != opened {
            self.fault(format!("{} adopted, {} ended, {opened} opened", all.adopted, all.ended));
        }
        if all.tally.offered != all.tally.written + all.tally.dropped.total() + all.tally.discarded {
            self.fault(format!("the engine's books at the end: {all:?}"));
        }
        if self.engine.connection_count() != self.jobs.len() {
            self.fault(format!("{} places are taken", self.engine.connection_count()));
        }
        if !self.is_stopping && !lock(&self.model).shown.is_empty() {
            self.fault(format!("shown when all have gone: {:?}", lock(&self.model).shown));
        }
        for namespace in &self.namespaces {
            if namespace.user_count() > 0 || !self.is_stopping && namespace.presence_len(None) > 0 {
                self.fault(format!("{} users are left", namespace.user_count()));
            }
            if (namespace.len(), namespace.group_count()) != (0, 0) {
                self.fault(format!(
                    "{} members, {} groups are left",
                    namespace.len(),
                    namespace.group_count()
                ));
            }
        }
        for audit in self.shards.iter().flatten().map(Shard::audit) {
            if !audit.connections.is_empty() || !audit.groups.is_empty() {
                self.fault(format!("a shard keeps {audit:?}"));
            }
        }
        for (client, record) in self.records.iter().enumerate() {
            let record = lock(record);
            if lock(&self.model).clients[client].id.is_none() {
                continue;
            }
            let is_left_over = self.is_hurried && record.ends.is_empty();
            if record.ends.len() != 1 && !is_left_over {
                self.fault(format!("{client} ended {:?}", record.ends));
            }
            if !record.is_dropped {
                self.fault(format!("the handler of {client} is not dropped"));
            }
        }
    }

    /// Connections that the engine has adopted.
    fn opened(&self) -> u64 {
        lock(&self.model).clients.iter().filter(|client| client.id.is_some()).count() as u64
    }
}

fn adds_up(part: &GroupMetrics) -> bool {
    let dropped = part.tally.dropped.total();
    part.tally.offered == part.tally.written + dropped + part.tally.discarded + part.tally.pending()
}

fn sum_of(parts: &[GroupMetrics]) -> GroupMetrics {
    parts.iter().fold(GroupMetrics::default(), |mut sum, part| {
        sum += *part;
        sum
    })
}

/// One client, everything that addressed it, and the outcome.
struct ClientCheck<'a> {
    history: &'a History,
    model: &'a Model,
    number: usize,
    client: &'a ModelClient,
    peer: &'a Peer,
    record: &'a Record,
}

impl ClientCheck<'_> {
    fn run(&self, audit: Option<&ConnectionAudit>, faults: &mut Vec<String>) {
        let Self { number, client, peer, record, .. } = self;
        let mut fault = |text: String| faults.push(format!("{number} {text}"));
        let (heard, expected) = (&peer.heard, &client.expected);
        // One order, nothing that addresses others, nothing twice.
        let Some(skipped) = self.skipped() else {
            return fault(format!("heard {heard:?}, which is no part of {expected:?}"));
        };
        if let Some(lost) = skipped.iter().find(|frame| !self.model.may_lose(**frame, *number)) {
            fault(format!("did not hear {lost}: {heard:?} of {expected:?}"));
        }
        if !record.messages.iter().copied().eq(0..record.messages.len() as u32) {
            fault(format!("said messages that were handled as {:?}", record.messages));
        }
        if !peer.pongs.is_sorted() {
            fault(format!("heard pongs {:?}", peer.pongs));
        }
        if peer.closes.len() > 1 || record.ends.len() > 1 {
            fault(format!("heard {:?}, ended {:?}", peer.closes, record.ends));
        }
        let is_open = client.id.is_some() && record.ends.is_empty() && !self.history.is_stopping;
        if is_open && peer.stream.is_some() {
            match audit {
                Some(audit) => self.check_open(audit, &mut fault),
                None => fault("is open, and no shard has it".into()),
            }
        }
        if let (Some(code), Some(reason)) = (peer.closes.first(), record.ends.first()) {
            self.check_close(*code, reason, &mut fault);
        }
    }

    /// What addressed it, preceded the last frame that it received, and was not received; none if it received
    /// something else.
    fn skipped(&self) -> Option<Vec<u32>> {
        let mut skipped = Vec::new();
        let mut expected = self.client.expected.iter().copied();
        for heard in &self.peer.heard {
            loop {
                match expected.next()? {
                    frame if frame == *heard => break,
                    frame => skipped.push(frame),
                }
            }
        }
        Some(skipped)
    }

    /// Everything has settled: it has received everything, except what was dropped.
    fn check_open(&self, audit: &ConnectionAudit, fault: &mut impl FnMut(String)) {
        let Self { model, number, client, peer, record, .. } = self;
        let expected = &client.expected;
        if audit.pending > 0 || audit.tally.discarded > 0 {
            fault(format!("is open, and has not got all: {audit:?}"));
        }
        if audit.tally.offered != expected.len() as u64 {
            fault(format!("was offered {} of {expected:?}", audit.tally.offered));
        }
        let dropped = audit.tally.dropped.total();
        if record.drops != dropped {
            fault(format!("was told of {} drops of {dropped}", record.drops));
        }
        // The policy of a frame determines for which cause it may be lost.
        let missing: Vec<u32> =
            expected.iter().copied().filter(|frame| !peer.heard.contains(frame)).collect();
        let losses = missing.iter().map(|frame| model.losses(*frame, *number));
        let by_timeout = losses.clone().filter(|losses| losses.by_timeout).count() as u64;
        let by_overflow = losses.filter(|losses| losses.by_overflow).count() as u64;
        let is_right = missing.len() as u64 == dropped
            && audit.tally.dropped.timeout <= by_timeout
            && audit.tally.dropped.overflow <= by_overflow;
        if !is_right {
            fault(format!(
                "did not hear {missing:?}, {by_timeout} and {by_overflow} by their policy: {audit:?}"
            ));
        }
        if record.messages.len() as u32 != peer.said {
            fault(format!("said {} and the handler got {:?}", peer.said, record.messages));
        }
        if peer.has_said_close || peer.is_broken && !peer.is_over || peer.is_faulty {
            fault(format!("should have ended: {peer:?}"));
        }
        if client.closed_at.is_some() || client.may_close_at.is_some() {
            fault("was closed and is open".into());
        }
        if peer.pongs.last().map_or(0, |last| last + 1) != peer.pings_said && audit.is_open {
            fault(format!("said {} pings and heard {:?}", peer.pings_said, peer.pongs));
        }
        if !peer.closes.is_empty() || peer.is_over {
            fault("is open and heard its end".into());
        }
    }

    /// A Close frame gives the reason, and follows everything that was sent before the end.
    fn check_close(&self, code: Option<u16>, reason: &CloseReason, fault: &mut impl FnMut(String)) {
        let Self { history, model, number, client, peer, record } = self;
        let (heard, expected) = (&peer.heard, &client.expected);
        let is_empty = matches!(reason, CloseReason::Peer { code: None, .. });
        if code != reason.close_frame().map(|(code, _)| code.0) && !(is_empty && code.is_none()) {
            fault(format!("ended by {reason:?} and heard {code:?}"));
        }
        // Half of the time for the closing handshake is for what is queued; then that is discarded.
        let has_time = history.configs[*number].close_timeout >= ms(5000) && !history.is_hurried;
        let is_peer = matches!(reason, CloseReason::Peer { .. });
        let all = match reason {
            CloseReason::Application { text, .. } if text == "command" => client.closed_at,
            CloseReason::Application { text, .. } if text == "handler" => client.may_close_at,
            CloseReason::Shutdown { .. } => Some(expected.len()),
            CloseReason::Peer { .. } => Some(peer.expected_at_close),
            _ => None,
        };
        if let Some(all) = all.filter(|_| has_time) {
            let before = &expected[..all];
            let is_lost = |frame: &u32| !heard.contains(frame) && !model.may_lose(*frame, *number);
            if let Some(lost) = before.iter().find(|frame| is_lost(frame)) {
                fault(format!("ended by {reason:?} and did not hear {lost}: {heard:?} of {before:?}"));
            }
            if !is_peer && expected[all..].iter().any(|frame| heard.contains(frame)) {
                fault(format!("ended by {reason:?} and heard {heard:?}, more than {before:?}"));
            }
        }
        let handled = record.messages.len() as u64 + record.rate_limited;
        let has_all = handled == u64::from(peer.said) || record.has_enough;
        if is_peer && !history.is_stopping && !has_all {
            fault(format!("said {} before it closed, handled {:?}", peer.said, record.messages));
        }
    }
}
