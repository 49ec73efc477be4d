// Waiting with a bound, and doing things when they are due. Knows timers and promises.

/** True when `promise` resolves within `ms`. */
export function within(ms, promise) {
  return new Promise((resolve) => {
    const timer = setTimeout(() => resolve(false), ms);
    promise.then(() => {
      clearTimeout(timer);
      resolve(true);
    });
  });
}

/** A promise, `passed`, that resolves after `steps` calls of `step`. */
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
 * Calls `act(index, late)` for each index below `total` when it is due, `due(index)` milliseconds from now, or until
 * `stop`. Times are absolute: after a delay the calls catch up. `late` is by how many milliseconds a call is late.
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
