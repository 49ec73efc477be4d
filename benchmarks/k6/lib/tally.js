// Counters of messages, reported once when a VU ends.
//
// `sent`, `received` (each distinct message in order), `lost`, `repeated` (twice, or after a later one) and `strange`
// (not a message that was sent). Reported once, because a sample for each message would cost more than receiving it.
// Knows numbers. Does not know sockets or time.

import { Counter } from 'k6/metrics';

const KINDS = ['sent', 'received', 'lost', 'repeated', 'strange'];

export class Tally {
  /** Must be created while the script starts, because k6 requires that of metrics. */
  constructor(name) {
    this.counters = {};
    for (const kind of KINDS) {
      this.counters[kind] = new Counter(`${name}_${kind}`);
      this[kind] = 0;
    }
  }

  /** Exact numbers of `sent` and `received` messages: `count==0` alone would hold in a run in which nothing happened. */
  static thresholds(name, sent, received) {
    return {
      [`${name}_sent`]: [`count==${sent}`],
      [`${name}_received`]: [`count==${received}`],
      [`${name}_lost`]: ['count==0'],
      [`${name}_repeated`]: ['count==0'],
      [`${name}_strange`]: ['count==0'],
    };
  }

  report() {
    for (const kind of KINDS) this.counters[kind].add(this[kind]);
  }
}

/** Numbers from 1 that must arrive in order, without a gap and once each. */
export class Sequence {
  constructor(tally) {
    this.tally = tally;
    this.next = 1;
  }

  take(number) {
    if (!Number.isInteger(number)) {
      this.tally.strange += 1;
    } else if (number < this.next) {
      this.tally.repeated += 1;
    } else {
      this.tally.lost += number - this.next;
      this.tally.received += 1;
      this.next = number + 1;
    }
  }

  /** Counts what has not arrived up to `last` as lost, and what is beyond it as strange. */
  close(last) {
    this.tally.lost += Math.max(0, last + 1 - this.next);
    this.tally.strange += Math.max(0, this.next - last - 1);
  }
}
