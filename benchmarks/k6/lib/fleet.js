// The clients of one VU, opened a few at a time and closed together.
//
// A VU is one JavaScript loop and holds many sockets, because a VU for each socket would cost megabytes for each.
// Does not know what its clients receive.

import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import { within } from './wait.js';

const vusFinished = new Counter('vus_finished');

/** One iteration for each VU; a threshold fails when one is cut short. */
export function fleetOptions(vus, maxMillis, thresholds) {
  return {
    scenarios: {
      default: {
        executor: 'per-vu-iterations',
        vus,
        iterations: 1,
        maxDuration: `${Math.ceil(maxMillis / 1000)}s`,
        gracefulStop: '5s',
      },
    },
    thresholds: { ...thresholds, vus_finished: [`count==${vus}`] },
    // Fewer tags make fewer time series.
    systemTags: ['status'],
    summaryTrendStats: ['min', 'med', 'avg', 'p(90)', 'p(99)', 'max'],
  };
}

/** Counts this VU as finished. */
export function finish() {
  vusFinished.add(1);
}

/** This VU's number, from 0. */
export function vuIndex() {
  return exec.vu.idInTest - 1;
}

/** This VU's share of `total`. */
export function share(total, vus) {
  return Math.floor(total / vus) + (vuIndex() < total % vus ? 1 : 0);
}

/** Opens `count` clients, `atOnce` at a time; stops and returns false when one does not open. */
export async function openAll(clients, count, atOnce, make) {
  let failed = false;
  const lane = async () => {
    while (!failed && clients.length < count) {
      const client = make(clients.length);
      clients.push(client);
      if (!(await client.opened)) failed = true;
    }
  };
  await Promise.all(Array.from({ length: atOnce }, lane));
  return !failed;
}

/** Closes all clients and waits at most `ms` for the server's answers. */
export async function closeAll(clients, ms) {
  clients.forEach((client) => client.leave());
  await within(ms, Promise.all(clients.map((client) => client.closed)));
}
