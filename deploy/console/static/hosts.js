// Hosts that hold parts of the users, the shares that have no host or only one, and the snapshots of histories.

import { at, table, tell } from "./dom.js";
import { age, count, span } from "./words.js";

const HEAD = [["host", ""], ["shares of users", "text"], ["state", ""]];

/** Shows the hosts; nothing of them where each host holds all users. */
export function show(found) {
  at("hosts").hidden = !found;
  if (!found) return;
  const none = found.without_host.length, one = found.with_one_host.length;
  const lacking = none ? `${none} of 64 shares have no live host, ` : "Each share has a live host, ";
  tell(at("hosts-told"), `${lacking}${one ? `${one} have one` : "none has only one"}.`);
  const state = (host) => (host.live ? "live" : `not renewed for ${span(host.age_s)}`);
  table(at("hosts-table"), HEAD, found.hosts.map((host) => [host.address, host.shares, state(host)]), "No host is in the table.");
}

/** Shows the ages of the snapshots of histories, from which a new host starts. */
export function showSnapshots(found) {
  at("snapshots").hidden = !found;
  if (!found) return;
  const [newest, ...others] = found.ages_s.map(age);
  const writer = `${count(found.users)} users of shares ${found.held}, by ${found.writer}`;
  const kept = newest ? `The newest is ${newest} old${found.late ? ", which is late" : ""}: ${writer}. ${others.length ? `Others: ${others.join(", ")}.` : ""}` : "There is none yet.";
  tell(at("snapshots-told"), found.problem || kept);
}
