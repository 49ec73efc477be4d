// Settings: numbers and times from the environment, each with its default.
//
// Read once when the script starts, because thresholds depend on them. An invalid value ends the run, which would
// otherwise test something else.

function refuse(reason) {
  throw new Error(reason);
}

/** A whole number of at least one. */
export function count(name, standard) {
  const text = __ENV[name];
  if (text === undefined || text === '') return standard;
  const value = Number(text);
  return Number.isInteger(value) && value > 0 ? value : refuse(`${name}=${text} must be a whole number above 0`);
}

/** A time such as `500ms`, `5s` or `2m`, in milliseconds. */
export function millis(name, standard) {
  const text = __ENV[name];
  if (text === undefined || text === '') return standard;
  const [, digits, unit] = /^(\d+)(ms|s|m)$/.exec(text) || refuse(`${name}=${text} must be a time such as 500ms, 5s or 2m`);
  const value = Number(digits) * { ms: 1, s: 1000, m: 60000 }[unit];
  return value > 0 ? value : refuse(`${name}=${text} must be above 0`);
}

/** Ends the run before it starts when one process may not open so many sockets. */
export function requireOpenFiles(connections) {
  // k6 and the server have files besides their sockets.
  const needed = connections + 100;
  const files = Number(__ENV.OPEN_FILES || Infinity);
  if (needed > files) {
    refuse(
      `needs ${needed} open files, but the limit is ${files}: lower CONNECTIONS, ` +
        `or raise the hard limit: as root 'ulimit -Hn ${needed}' in this shell, ` +
        `or permanently in /etc/security/limits.conf or with systemd's LimitNOFILE=`,
    );
  }
}

export const WS_URL = __ENV.WS_URL || 'ws://127.0.0.1:9001';

/** How long to wait for outstanding messages before they count as lost. */
export const GRACE = millis('GRACE', 30000);

/** How long opening all connections may take. */
export const CONNECT_WITHIN = millis('CONNECT_WITHIN', 60000);
