// How figures are written: as `springtide status` writes them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const NONE = "–";

export const count = (value) => (value === null || value === undefined ? NONE : whole.format(value));

export const decimal = (value, digits = 3) => (value === null || value === undefined ? NONE : value.toFixed(digits));

export function rate(value, what = "") {
  if (value === null || value === undefined) return NONE;
  const number = value >= 99.95 || value === 0 ? whole.format(value) : value.toFixed(1);
  return `${number}${what ? ` ${what}` : ""}/s`;
}

/** A short span of time, in seconds. */
export function span(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0 s";
  if (value < 0.00995) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${value.toFixed(value < 0.995 ? 2 : 1)} s`;
  return age(value);
}

/** An age, in seconds. */
export function age(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 100) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.floor(value / 60)} min`;
  if (value < 172800) return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
  return `${Math.floor(value / 86400)} d`;
}

/** A size, in bytes. */
export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  return value < 1e9 ? `${whole.format(value / 1e6)} MB` : `${(value / 1e9).toFixed(1)} GB`;
}

export const percent = (value, digits = 1) => (value === null || value === undefined ? NONE : `${(100 * value).toFixed(digits)} %`);

export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");

export function moment(ms) {
  const day = new Date(ms).toLocaleDateString("en-CA");
  return day === new Date().toLocaleDateString("en-CA") ? clock(ms) : `${day} ${clock(ms)}`;
}
