// Churn: connections come and go on /ws, and those that stay lose nothing.
//
// STEADY connections stay; one of them broadcasts every INTERVAL. Meanwhile each of PLACES has LIVES clients one after
// the other, each of which connects, hears LIFE broadcasts and leaves with 1000. Then the last broadcast is
// sent, marked as such. Fails when a steady client misses or repeats one from the first to the last, when a short-lived one
// has a gap in what it hears, when a connection fails to open or closes by itself, when fewer lives than planned were
// lived, or when handshakes are slow (HANDSHAKE_P99_MS).
//
// k6 cannot cut a connection off without a Close frame; clients that vanish are not tested here.

import { Counter } from 'k6/metrics';
import { Barrier } from './lib/barrier.js';
import { Client, connectionThresholds } from './lib/client.js';
import { dismiss, finish, fleetOptions, raise, share, vuIndex } from './lib/fleet.js';
import { CONNECT_WITHIN, count, fit, GRACE, millis } from './lib/setting.js';
import { Sequence, Tally } from './lib/tally.js';
import { Gate, Pace, within } from './lib/wait.js';

const STEADY = count('STEADY', 200);
const PLACES = count('PLACES', 50);
const LIVES = count('LIVES', 40);
const LIFE = count('LIFE', 5);
const VUS = Math.min(count('VUS', 10), STEADY);
const INTERVAL = millis('INTERVAL', 20);
const HANDSHAKE_P99_MS = count('HANDSHAKE_P99_MS', 500);
const CHURN_WITHIN = millis('CHURN_WITHIN', 120000);

const AT_ONCE = 4;
const WARM_UP_MS = 1000;
const CHURNED = PLACES * LIVES;

fit(STEADY + PLACES + VUS);

export const options = fleetOptions(VUS, CONNECT_WITHIN + CHURN_WITHIN + 6 * GRACE, {
  // While a place lives its lives there are at least so many broadcasts, and the last one.
  ...Tally.thresholds('steady', `count>${LIVES * LIFE}`, `count>${STEADY * LIVES * LIFE}`),
  ...Tally.thresholds('churner', 'count==0', `count>=${CHURNED * LIFE}`),
  ...connectionThresholds(STEADY + CHURNED + VUS),
  steady_ended: [`count==${STEADY}`],
  churned: [`count==${CHURNED}`],
  ws_connecting: [`p(99)<${HANDSHAKE_P99_MS}`],
});

const steady = new Tally('steady');
const churner = new Tally('churner');
const steadyEnded = new Counter('steady_ended');
const churned = new Counter('churned');

export default async function () {
  const clients = [];
  const barrier = new Barrier(VUS);
  const isSender = vuIndex() === 0;
  let beat;
  try {
    await barrier.client.opened;
    const mine = share(STEADY, VUS);
    const joined = new Gate(mine);
    const settled = new Gate(mine);
    // A client may see its handshake answered a moment before it is in the hub. Until each has heard something,
    // broadcasts are numbered 0; the next goes out when the sender has heard the last, so that they never pile up.
    let isWarm = false;
    const make = (index) => {
      const sequence = new Sequence(steady, 1);
      let isJoined = false;
      return new Client('/ws', ({ t, p }) => {
        if (t === 0) {
          if (!isJoined) joined.step();
          isJoined = true;
          if (index === 0 && isSender) setTimeout(() => isWarm || clients[0].send(0, ''), WARM_UP_MS);
          return;
        }
        sequence.take(t);
        if (p === 'last') {
          steadyEnded.add(1);
          settled.step();
        }
      });
    };
    if (!(await raise(clients, mine, AT_ONCE, make))) barrier.fail('not all of /ws has opened');
    await barrier.pass(CONNECT_WITHIN);

    if (isSender) clients[0].send(0, '');
    await barrier.demand(GRACE, joined.passed, '/ws has members whom no broadcast reaches');
    await barrier.pass(2 * GRACE);
    isWarm = true;

    const say = (p) => {
      if (clients[0].send(steady.sent + 1, p)) steady.sent += 1;
    };
    beat = new Pace(isSender ? Infinity : 0, (turn) => turn * INTERVAL, () => say('beat'));
    const places = Array.from({ length: share(PLACES, VUS) }, () => occupy(barrier));
    await barrier.demand(CHURN_WITHIN, Promise.all(places), `not all lives were lived within ${CHURN_WITHIN} ms`);
    await barrier.pass(CHURN_WITHIN);
    beat.stop();
    if (isSender) say('last');
    await barrier.demand(GRACE, settled.passed, 'the last broadcast has not reached all');
    await barrier.pass(2 * GRACE);
    finish();
  } finally {
    if (beat) beat.stop();
    steady.report();
    churner.report();
    await dismiss([...clients, barrier.client], GRACE);
  }
}

/** One place: a life after the other. Ends early when one goes wrong; then lives are missing in the count. */
async function occupy(barrier) {
  for (let life = 0; life < LIVES && barrier.why === undefined; life += 1) {
    const sequence = new Sequence(churner);
    const heard = new Gate(LIFE);
    const client = new Client('/ws', ({ t }) => {
      if (t === 0) return;
      sequence.take(t);
      heard.step();
    });
    const isFull = (await client.opened) && (await within(GRACE, Promise.race([heard.passed, client.closed])));
    await dismiss([client], GRACE);
    if (!isFull || heard.left > 0) return;
    churned.add(1);
  }
}
