// Groups: every member gets exactly the messages of its group, all members in one order.
//
// GROUP_COUNT groups of MEMBERS connections; each member sends to its group every INTERVAL for DURATION, and waits for
// what all of them have sent. Fails when a message is missing, comes twice, comes out of its sender's order, comes from
// another group (`group_strange`), or when two members of a group see two orders (`group_disorder`).
//
// All members of a group are in one VU, so that what they saw can be compared; the server puts them on shards as they
// connect. A VU takes every VUS-th group.

import { Counter, Trend } from 'k6/metrics';
import { Barrier } from './lib/barrier.js';
import { Client, connectionThresholds } from './lib/client.js';
import { dismiss, finish, fleetOptions, raise, share, vuIndex } from './lib/fleet.js';
import { CONNECT_WITHIN, count, fit, GRACE, millis } from './lib/setting.js';
import { Sequence, Tally } from './lib/tally.js';
import { Gate, Pace } from './lib/wait.js';

const GROUP_COUNT = count('GROUP_COUNT', 100);
const MEMBERS = count('MEMBERS', 10);
const VUS = Math.min(count('VUS', 20), GROUP_COUNT);
const DURATION = millis('DURATION', 10000);
const INTERVAL = millis('INTERVAL', 1000);
const P99_MS = count('P99_MS', 1000);

const AT_ONCE = 4;
const ROUNDS = Math.max(1, Math.floor(DURATION / INTERVAL));
const CONNECTIONS = GROUP_COUNT * MEMBERS;
const SENT = CONNECTIONS * ROUNDS;

fit(CONNECTIONS + VUS);

export const options = fleetOptions(VUS, CONNECT_WITHIN + DURATION + 5 * GRACE, {
  ...Tally.thresholds('group', `count==${SENT}`, `count==${SENT * MEMBERS}`),
  ...connectionThresholds(CONNECTIONS + VUS),
  group_disorder: ['count==0'],
  group_latency: [`p(99)<${P99_MS}`],
});

const tally = new Tally('group');
const disorder = new Counter('group_disorder');
const latency = new Trend('group_latency', true);

/** A group as this VU sees it: in which order its messages came to whoever was first to see each. */
class Group {
  constructor(name) {
    this.name = name;
    this.order = [];
  }
}

/** What one member has seen. */
class Member {
  constructor(group, number) {
    this.group = group;
    this.number = number;
    this.from = Array.from({ length: MEMBERS }, () => new Sequence(tally, 1));
    this.seen = 0;
    this.isJoined = false;
    this.sentAt = [];
  }

  /** The sender's name, as it stands in its messages. */
  get name() {
    return `${this.group.name}/${this.number}`;
  }

  take(t, p, at) {
    const [name, number] = p.split('/');
    const sequence = this.from[number];
    if (name !== this.group.name || sequence === undefined) {
      tally.strange += 1;
      return;
    }
    sequence.take(t);
    if (Number(number) === this.number && t in this.sentAt) latency.add(at - this.sentAt[t]);
    const { order } = this.group;
    const key = `${number}:${t}`;
    if (this.seen === order.length) order.push(key);
    else if (order[this.seen] !== key) disorder.add(1);
    this.seen += 1;
  }
}

export default async function () {
  const clients = [];
  const members = [];
  const barrier = new Barrier(VUS);
  let pace;
  try {
    await barrier.client.opened;
    const groups = Array.from({ length: share(GROUP_COUNT, VUS) }, (_, turn) => new Group(`g${turn * VUS + vuIndex()}`));
    const mine = groups.length * MEMBERS;
    const joined = new Gate(mine);
    const settled = new Gate(mine);
    const make = (index) => {
      const member = new Member(groups[Math.floor(index / MEMBERS)], index % MEMBERS);
      members.push(member);
      const client = new Client(`/group/${member.group.name}`, ({ t, p }, at) => {
        // 0 is the member's first word, below: who hears his own has joined.
        if (t === 0) {
          if (p === member.name && !member.isJoined) {
            member.isJoined = true;
            joined.step();
          }
          return;
        }
        member.take(t, p, at);
        if (member.seen === MEMBERS * ROUNDS) settled.step();
      });
      client.opened.then(() => client.send(0, member.name));
      return client;
    };
    if (!(await raise(clients, mine, AT_ONCE, make))) barrier.fail('not all of /group has opened');
    await barrier.demand(GRACE, joined.passed, 'a member does not hear what it sends to its group');
    await barrier.pass(CONNECT_WITHIN);

    // All members of all VUs are spread evenly over the interval.
    const due = (turn) => INTERVAL * (Math.floor(turn / mine) + ((turn % mine) * VUS + vuIndex()) / CONNECTIONS);
    pace = new Pace(mine * ROUNDS, due, (turn) => {
      const member = members[turn % mine];
      const number = Math.floor(turn / mine) + 1;
      member.sentAt[number] = Date.now();
      if (clients[turn % mine].send(number, member.name)) tally.sent += 1;
    });
    await barrier.wait(DURATION + GRACE, pace.done);
    await barrier.wait(GRACE, settled.passed);
    // A stranger's or a second message has until the last VU is done.
    await barrier.pass(2 * GRACE);
    finish();
  } finally {
    if (pace) pace.stop();
    members.forEach((member) => member.from.forEach((sequence) => sequence.close(ROUNDS)));
    tally.report();
    await dismiss([...clients, barrier.client], GRACE);
  }
}
