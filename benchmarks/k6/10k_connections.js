// 10,000 clients: everything that they send comes back, and every broadcast reaches all of them.
//
// Part 1, echo: CONNECTIONS clients on /echo; each sends a message every INTERVAL for DURATION and must get each back
// once and in order. Part 2, broadcast: CONNECTIONS clients on /ws; one of them sends every BROADCAST_INTERVAL for
// DURATION; all must get every message once and in order. The thresholds require the exact numbers of messages. The run
// also fails on a connection that does not open or closes by itself, on late answers (P99_MS, BROADCAST_P99_MS), and
// when k6 sent later than planned (BEHIND_P99_MS), because it then tested less than planned.
//
// Not 10,000 clients that broadcast to 10,000 every 5 s: that is 20 million deliveries per second, and k6 receives some
// ten thousand. Measured on 2 cores that also ran the server and compilers (load average 5 to 6): at 25,000 deliveries
// per second (a broadcast every 400 ms) it was at most 0.4 s late; at 100,000 (100 ms) it was 7.6 s late after 5 s, which
// makes 40,000. In 45 s it used 22 s of CPU and 3.2 GiB, the server 4.5 s and 17 MiB. Latencies are measured where k6
// reads the socket and are mostly its own: it reads, collects garbage and runs JavaScript on the same cores.

import { Trend } from 'k6/metrics';
import { Barrier } from './lib/barrier.js';
import { Client, connectionThresholds } from './lib/client.js';
import { closeAll, finish, fleetOptions, openAll, share, vuIndex } from './lib/fleet.js';
import { CONNECT_WITHIN, count, GRACE, millis, requireOpenFiles } from './lib/setting.js';
import { Sequence, Tally } from './lib/tally.js';
import { Gate, Pace } from './lib/wait.js';

const CONNECTIONS = count('CONNECTIONS', 10000);
const VUS = Math.min(count('VUS', 50), CONNECTIONS);
const DURATION = millis('DURATION', 20000);
const INTERVAL = millis('INTERVAL', 5000);
const BROADCAST_INTERVAL = millis('BROADCAST_INTERVAL', 500);
const P99_MS = count('P99_MS', 1000);
const BROADCAST_P99_MS = count('BROADCAST_P99_MS', 5000);
const BEHIND_P99_MS = count('BEHIND_P99_MS', 2000);

/** Simultaneous handshakes of each VU. */
const AT_ONCE = 4;
const WARM_UP_MS = 1000;

const ROUNDS = Math.max(1, Math.floor(DURATION / INTERVAL));
const BROADCASTS = Math.max(1, Math.floor(DURATION / BROADCAST_INTERVAL));
const ECHOES = CONNECTIONS * ROUNDS;

requireOpenFiles(CONNECTIONS + VUS);

export const options = fleetOptions(VUS, 2 * (CONNECT_WITHIN + DURATION) + 8 * GRACE, {
  ...Tally.thresholds('echo', ECHOES, ECHOES),
  ...Tally.thresholds('broadcast', BROADCASTS, BROADCASTS * CONNECTIONS),
  ...connectionThresholds(2 * CONNECTIONS + VUS),
  echo_latency: [`p(99)<${P99_MS}`],
  broadcast_latency: [`p(99)<${BROADCAST_P99_MS}`],
  echo_behind: [`p(99)<${BEHIND_P99_MS}`],
  broadcast_behind: [`p(99)<${BEHIND_P99_MS}`],
});

const echoes = new Tally('echo');
const broadcasts = new Tally('broadcast');
const echoLatency = new Trend('echo_latency', true);
const broadcastLatency = new Trend('broadcast_latency', true);
const echoBehind = new Trend('echo_behind', true);
const broadcastBehind = new Trend('broadcast_behind', true);

export default async function () {
  const clients = [];
  const barrier = new Barrier(VUS);
  try {
    await barrier.client.opened;
    await echo(barrier, clients);
    await closeAll(clients.splice(0), GRACE);
    await broadcast(barrier, clients);
    finish();
  } finally {
    echoes.report();
    broadcasts.report();
    await closeAll([...clients, barrier.client], GRACE);
  }
}

async function echo(barrier, clients) {
  const mine = share(CONNECTIONS, VUS);
  const settled = new Gate(mine);
  const sequences = [];
  const sentAt = [];
  const make = (index) => {
    const sequence = new Sequence(echoes);
    sequences.push(sequence);
    sentAt.push([]);
    return new Client('/echo', ({ t }, at) => {
      sequence.take(t);
      if (t in sentAt[index]) echoLatency.add(at - sentAt[index][t]);
      if (t === ROUNDS) settled.step();
    });
  };
  if (!(await openAll(clients, mine, AT_ONCE, make))) barrier.fail('not all connections to /echo opened');
  await barrier.pass(CONNECT_WITHIN);

  // All clients of all VUs are spread evenly over the interval.
  const due = (turn) => INTERVAL * (Math.floor(turn / mine) + ((turn % mine) * VUS + vuIndex()) / CONNECTIONS);
  const pace = new Pace(mine * ROUNDS, due, (turn, late) => {
    const index = turn % mine;
    const number = Math.floor(turn / mine) + 1;
    sentAt[index][number] = Date.now();
    if (clients[index].send(number, 'echo')) echoes.sent += 1;
    echoBehind.add(late);
  });
  try {
    await barrier.wait(DURATION + GRACE, pace.done);
    await barrier.wait(GRACE, settled.passed);
    // Duplicates can still arrive until the last VU is done.
    await barrier.pass(2 * GRACE);
  } finally {
    pace.stop();
    sequences.forEach((sequence) => sequence.close(ROUNDS));
  }
}

async function broadcast(barrier, clients) {
  const mine = share(CONNECTIONS, VUS);
  const settled = new Gate(mine);
  const joined = new Gate(mine);
  const sequences = [];
  // A client's handshake may end before the hub has adopted it. Until each has received one, broadcasts are numbered 0;
  // the next is sent after the sender has received the last, so that they never accumulate.
  let isWarm = false;
  const make = (index) => {
    const sequence = new Sequence(broadcasts);
    sequences.push(sequence);
    let isJoined = false;
    return new Client('/ws', ({ t, p }, at) => {
      if (t === 0) {
        if (!isJoined) joined.step();
        isJoined = true;
        if (index === 0 && vuIndex() === 0) setTimeout(() => isWarm || publish(0), WARM_UP_MS);
        return;
      }
      sequence.take(t);
      if (index === 0) broadcastLatency.add(at - Number(p));
      if (t === BROADCASTS) settled.step();
    });
  };
  if (!(await openAll(clients, mine, AT_ONCE, make))) barrier.fail('not all connections to /ws opened');
  await barrier.pass(CONNECT_WITHIN);

  const isSender = vuIndex() === 0;
  const publish = (t) => clients[0].send(t, String(Date.now()));
  let pace;
  try {
    if (isSender) publish(0);
    await barrier.require(GRACE, joined.passed, 'no broadcast reaches some clients on /ws');
    await barrier.pass(2 * GRACE);
    isWarm = true;
    pace = new Pace(isSender ? BROADCASTS : 0, (turn) => turn * BROADCAST_INTERVAL, (turn, late) => {
      if (publish(turn + 1)) broadcasts.sent += 1;
      broadcastBehind.add(late);
    });
    await barrier.wait(DURATION + GRACE, settled.passed);
    await barrier.pass(2 * GRACE);
  } finally {
    isWarm = true;
    if (pace) pace.stop();
    sequences.forEach((sequence) => sequence.close(BROADCASTS));
  }
}
