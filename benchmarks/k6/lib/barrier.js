// A barrier: nobody goes on before everybody has come.
//
// VUs share no memory, so they meet in a group of the server that is tested. If that group is broken, the barrier
// does not open and the run fails; it cannot pass for this reason. VU 0 counts who is here and lets all go.
// Whoever waits says so again and again, so it does no harm when the others come late.
// Knows a client. Does not know what is waited for.

import { Client } from './client.js';
import { vuIndex } from './fleet.js';
import { within } from './wait.js';

const ROUTE = '/group/barrier';
const REPEAT_MS = 2000;

export class Barrier {
  constructor(parties) {
    this.parties = parties;
    this.phase = 0;
    this.released = 0;
    this.arrived = new Map();
    this.why = undefined;
    this.broken = new Promise((resolve) => {
      this.breakUp = (why) => {
        this.why = this.why || why;
        resolve();
      };
    });
    this.client = new Client(ROUTE, (message) => this.hear(message));
    this.client.closed.then(() => this.breakUp('the connection of the barrier has closed'));
  }

  hear({ t, p }) {
    const [word, who] = p.split(' ');
    if (word === 'go' && t > this.released) {
      this.released = t;
      if (t === this.phase) this.release();
    } else if (word === 'broken') {
      this.breakUp(p);
    } else if (word === 'here' && vuIndex() === 0) {
      if (!this.arrived.has(t)) this.arrived.set(t, new Set());
      const here = this.arrived.get(t).add(who);
      if (here.size === this.parties) this.client.send(t, 'go');
    }
  }

  /** Waits until all have come to their next barrier. Throws when that takes longer than `ms` or cannot be any more. */
  async pass(ms) {
    this.phase += 1;
    const released = new Promise((resolve) => {
      this.release = resolve;
    });
    const announce = () => this.client.send(this.phase, `here ${vuIndex()}`);
    announce();
    const timer = setInterval(announce, REPEAT_MS);
    try {
      await this.demand(ms, released, `barrier ${this.phase} did not open within ${ms} ms`);
    } finally {
      clearInterval(timer);
    }
  }

  /** Waits for what must come within `ms`; gives up for all with `reason` when it does not. */
  async demand(ms, promise, reason) {
    if (!(await this.wait(ms, promise))) this.fail(reason);
  }

  /** Waits for what should come within `ms`; false when it does not. Throws as soon as somebody has given up. */
  async wait(ms, promise) {
    const inTime = await within(ms, Promise.race([promise, this.broken]));
    if (this.why !== undefined) throw new Error(`given up: ${this.why}`);
    return inTime;
  }

  /** Gives up for all: they need not wait for what cannot come. */
  fail(reason) {
    this.client.send(this.phase, `broken by VU ${vuIndex()}: ${reason}`);
    throw new Error(reason);
  }
}
