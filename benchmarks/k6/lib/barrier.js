// A barrier: no VU continues before all have arrived.
//
// VUs share no memory, so they communicate through a group of the server under test. If that group is broken, the barrier
// does not open and the run fails. VU 0 counts arrivals and releases all. A VU repeats its arrival while it waits, so
// that it does no harm when others connect later. Knows a client. Does not know what is waited for.

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
    this.failure = undefined;
    this.failed = new Promise((resolve) => {
      this.abort = (reason) => {
        this.failure = this.failure || reason;
        resolve();
      };
    });
    this.client = new Client(ROUTE, (message) => this.onMessage(message));
    this.client.closed.then(() => this.abort("the barrier's connection has closed"));
  }

  onMessage({ t, p }) {
    const [word, vu] = p.split(' ');
    if (word === 'go' && t > this.released) {
      this.released = t;
      if (t === this.phase) this.release();
    } else if (word === 'failed') {
      this.abort(p);
    } else if (word === 'arrived' && vuIndex() === 0) {
      if (!this.arrived.has(t)) this.arrived.set(t, new Set());
      const arrived = this.arrived.get(t).add(vu);
      if (arrived.size === this.parties) this.client.send(t, 'go');
    }
  }

  /** Waits until all VUs have arrived. Throws after `ms`, or when a VU has failed. */
  async pass(ms) {
    this.phase += 1;
    const released = new Promise((resolve) => {
      this.release = resolve;
    });
    const announce = () => this.client.send(this.phase, `arrived ${vuIndex()}`);
    announce();
    const timer = setInterval(announce, REPEAT_MS);
    try {
      await this.require(ms, released, `barrier ${this.phase} did not open within ${ms} ms`);
    } finally {
      clearInterval(timer);
    }
  }

  /** Waits for `promise`; after `ms`, fails for all VUs with `reason`. */
  async require(ms, promise, reason) {
    if (!(await this.wait(ms, promise))) this.fail(reason);
  }

  /** Waits for `promise`; false after `ms`. Throws as soon as a VU has failed. */
  async wait(ms, promise) {
    const inTime = await within(ms, Promise.race([promise, this.failed]));
    if (this.failure !== undefined) throw new Error(`aborted: ${this.failure}`);
    return inTime;
  }

  /** Fails for all VUs, so that the others do not wait in vain. */
  fail(reason) {
    this.client.send(this.phase, `failed in VU ${vuIndex()}: ${reason}`);
    throw new Error(reason);
  }
}
