// A client: one WebSocket to the server, and the books on how it opened and closed.
//
// Every end of a connection is exactly one of three: it never opened (`connect_errors`), it closed as we asked
// with 1000 (`clean_closes`), or anything else (`unexpected_closes`).
// Knows the form of a message, `{"t":number,"p":string}`. Does not know what the numbers mean.

import { WebSocket } from 'k6/websockets';
import { Counter } from 'k6/metrics';
import { WS_URL } from './setting.js';

const connectErrors = new Counter('connect_errors');
const cleanCloses = new Counter('clean_closes');
const unexpectedCloses = new Counter('unexpected_closes');

/** The thresholds on connections that every script has; `total` is how many it opens in all. */
export function connectionThresholds(total) {
  return {
    connect_errors: ['count==0'],
    unexpected_closes: ['count==0'],
    clean_closes: [`count==${total}`],
  };
}

// Many connections that fail at once have one thing to say: once for each VU.
let complaints = 1;

function complain(text) {
  if (complaints > 0) console.error(text);
  complaints -= 1;
}

export class Client {
  /** `hear(message, at)` gets each message with the time, in milliseconds, at which it was read off the socket. */
  constructor(route, hear) {
    let opened;
    let closed;
    this.isOpen = false;
    this.isLeaving = false;
    this.isGone = false;
    this.opened = new Promise((resolve) => {
      opened = resolve;
    });
    this.closed = new Promise((resolve) => {
      closed = resolve;
    });
    this.socket = new WebSocket(`${WS_URL}${route}`);
    this.socket.onmessage = (event) => hear(JSON.parse(event.data), event.timestamp);
    this.socket.onerror = (event) => {
      // A ping that crosses our Close cannot be answered any more; k6 calls that an error.
      if (!this.isLeaving) complain(`${route}: ${event.error}`);
    };
    this.socket.onopen = () => {
      this.isOpen = true;
      opened(true);
    };
    this.socket.onclose = (event) => {
      this.isGone = true;
      if (!this.isOpen) connectErrors.add(1);
      else if (this.isLeaving && event.code === 1000) cleanCloses.add(1);
      else {
        unexpectedCloses.add(1);
        complain(`${route}: closed with ${event.code || 'no code'} ${event.reason}`);
      }
      opened(false);
      closed();
    };
  }

  /** False when the connection is gone: nothing is sent then. */
  send(t, p) {
    if (!this.isOpen || this.isLeaving || this.isGone) return false;
    this.socket.send(JSON.stringify({ t, p }));
    return true;
  }

  leave() {
    if (this.isLeaving || this.isGone) return;
    this.isLeaving = true;
    this.socket.close(1000);
  }
}
