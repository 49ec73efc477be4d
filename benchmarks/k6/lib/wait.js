// Waiting for something that happens, never longer than allowed, and doing things when they are due.
//
// Knows timers and promises. Does not know sockets.

/** True when `promise` was resolved within `ms`, false when not. */
export function within(ms, promise) {
  return new Promise((resolve) => {
    const timer = setTimeout(() => resolve(false), ms);
    promise.then(() => {
      clearTimeout(timer);
      resolve(true);
    });
  });
}

/** A promise that is resolved when `step` was called as often as asked. */
export class Gate {
  constructor(steps) {
    this.left = steps;
    this.passed = new Promise((resolve) => {
      this.resolve = resolve;
    });
    if (steps === 0) this.resolve();
  }

  step() {
    this.left -= 1;
    if (this.left === 0) this.resolve();
  }
}

/**
 * Calls `act(0)`, `act(1)`, … each at its time, `due(index)` in milliseconds from now, until `total` or `stop`.
 *
 * Times are absolute: who is late catches up, so that what was planned is what is sent. `act` is told, second, how many
 * milliseconds late it is.
 */
export class Pace {
  constructor(total, due, act) {
    const start = Date.now();
    let index = 0;
    this.stopped = false;
    this.done = new Promise((resolve) => {
      const turn = () => {
        while (!this.stopped && index < total && start + due(index) <= Date.now()) {
          act(index, Date.now() - start - due(index));
          index += 1;
        }
        if (this.stopped || index === total) resolve();
        else setTimeout(turn, Math.max(1, start + due(index) - Date.now()));
      };
      turn();
    });
  }

  stop() {
    this.stopped = true;
  }
}
