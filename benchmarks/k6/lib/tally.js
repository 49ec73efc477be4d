// A tally: what became of messages, counted one by one and reported once, when a VU ends.
//
// `sent`, `received` (each distinct message in its place), `lost`, `repeated` (twice, or too late to be in order) and
// `strange` (not a message that was sent). Reported once, because a metric's sample for each of many thousand messages
// per second would cost more than receiving them.
// Knows numbers. Does not know sockets or time.

import { Counter } from 'k6/metrics';

const KINDS = ['sent', 'received', 'lost', 'repeated', 'strange'];

export class Tally {
  /** To be made when the script starts: k6 wants its metrics early. */
  constructor(name) {
    this.counters = {};
    for (const kind of KINDS) {
      this.counters[kind] = new Counter(`${name}_${kind}`);
      this[kind] = 0;
    }
  }

  /**
   * What must hold for `sent` and `received` messages.
   *
   * The two counts are what makes a run fail in which nothing happened: a counter without a sample is 0 for k6, and
   * `count==0` holds then.
   */
  static thresholds(name, sent, received) {
    return {
      [`${name}_sent`]: [sent],
      [`${name}_received`]: [received],
      [`${name}_lost`]: ['count==0'],
      [`${name}_repeated`]: ['count==0'],
      [`${name}_strange`]: ['count==0'],
    };
  }

  report() {
    for (const kind of KINDS) this.counters[kind].add(this[kind]);
  }
}

/** Numbers that must come one after the other, without a gap and once each. */
export class Sequence {
  /** `first` is the number it must begin with; without it, any. */
  constructor(tally, first) {
    this.tally = tally;
    this.next = first;
  }

  take(number) {
    if (this.next === undefined) this.next = number;
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

  /** Everything up to `last` should have come by now. */
  close(last) {
    this.tally.lost += Math.max(0, last + 1 - this.next);
    if (this.next > last + 1) this.tally.strange += this.next - last - 1;
  }
}
