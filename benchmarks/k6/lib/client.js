// A client: one WebSocket to the server, and the counters of how it opened and closed.
//
// Every connection ends in exactly one of three ways: it never opened (`connect_errors`), it closed with 1000 after we
// asked for it (`clean_closes`), or anything else (`unexpected_closes`).
// Knows the form of a message, `{"t":number,"p":string}`. Does not know what the numbers mean.

import { WebSocket } from 'k6/websockets';
import { Counter } from 'k6/metrics';
import { WS_URL } from './setting.js';

const connectErrors = new Counter('connect_errors');
const cleanCloses = new Counter('clean_closes');
const unexpectedCloses = new Counter('unexpected_closes');

/** The thresholds on connections; `total` is how many are opened in all. */
export function connectionThresholds(total) {
  return {
    connect_errors: ['count==0'],
    unexpected_closes: ['count==0'],
    clean_closes: [`count==${total}`],
  };
}

// One message for each VU: connections that fail together fail for the same reason.
let isSilent = false;

function reportOnce(text) {
  if (!isSilent) console.error(text);
  isSilent = true;
}

export class Client {
  /** `onMessage(message, at)` gets each message and the time in milliseconds at which it was read off the socket. */
  constructor(route, onMessage) {
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
    this.socket.onmessage = (event) => onMessage(JSON.parse(event.data), event.timestamp);
    this.socket.onerror = (event) => {
      // A ping that crosses our Close cannot be answered; k6 calls that an error.
      if (!this.isLeaving) reportOnce(`${route}: ${event.error}`);
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
        reportOnce(`${route}: closed with ${event.code || 'no code'} ${event.reason}`);
      }
      opened(false);
      closed();
    };
  }

  /** Returns false, and sends nothing, when the connection is not open. */
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
