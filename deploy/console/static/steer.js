// What changes something: each asks for a reason, and is done on what was shown or not at all.

import { Refused, change, keepToken, read, token } from "./asking.js";
import { at, h, marked, tell } from "./dom.js";
import { age, count, moment } from "./words.js";

const NAME = "springtide-name";
let generation = null;
let control = null;
let refresh = () => {};
let role = "";

export const mayOperate = () => role === "operate";

/** Says something once, where a screen reader hears it. */
export function say(text, kind = "done") {
  at("said").dataset.kind = kind;
  at("said").replaceChildren(...marked(text));
}

/** A dialog with fields; `does` is called with what was filled in, and closes it where it succeeds. */
function ask(title, told, fields, button, does) {
  const dialog = at("asking"), problem = h("p", { role: "alert", class: "problem" });
  const send = h("button", { type: "submit" }, button);
  const form = h(
    "form", { method: "dialog" }, h("h2", { id: "asking-title" }, title), told ? h("p", {}, marked(told)) : null, fields, problem,
    h("div", { class: "row end" }, h("button", { type: "button", class: "plain", onclick: () => dialog.close() }, "Cancel"), send),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    send.disabled = true;
    tell(problem, "");
    try {
      await does(Object.fromEntries(new FormData(form)));
      dialog.close();
    } catch (error) {
      tell(problem, error.message);
    } finally {
      send.disabled = false;
    }
  });
  dialog.replaceChildren(form);
  dialog.showModal();
  form.querySelector("input")?.focus();
}

const why = () => [
  h("label", {}, "Reason", h("input", { name: "reason", required: true, maxlength: 500, autocomplete: "off" })),
  h("label", {}, "Your name", h("input", { name: "name", maxlength: 64, autocomplete: "name", value: sessionStorage.getItem(NAME) ?? "" })),
];

function who(given) {
  sessionStorage.setItem(NAME, given.name);
  return { reason: given.reason, name: given.name };
}

/** Asks for the token; whoever reads with one may not steer with it. */
export function askToken(told) {
  const field = h("label", {}, "Token", h("input", { name: "token", type: "password", autocomplete: "off", spellcheck: "false" }));
  ask("Enter a token", told ?? "The token `operate` allows changes, the token `read` only reading. It stays in this tab. Leave the field empty to remove it.", [field], "Use it", async (given) => {
    const before = token();
    keepToken(given.token.trim());
    const found = await read("api/session");
    if (given.token.trim() && !found.role) {
      keepToken(before);
      throw new Refused(401, { error: "this host does not know this token" });
    }
    await refresh();
  });
}

function verb(name, title, told, more = {}) {
  if (!mayOperate()) return askToken("To change something needs the token `operate`.");
  const shown = generation;
  return ask(title, told, why(), title, async (given) => {
    const done = await change(`api/${name}`, { generation: shown, ...more, ...who(given) });
    say(done.changed ? `Done: generation ${done.control.generation}, ${done.control.action}.` : "Already in this state; nothing was changed.");
    await refresh();
  });
}

export const pin = (version) => verb("pin", `Pin answers at version ${version}`, "Training continues; answers stay at this version until they follow again.", { version });
export const lift = (mask) => verb("unmask", `Lift mask ${mask}`, "New clicks count at once; what was left out comes back at the next exact rollback.", { masks: [mask] });

/** Fills in a version to go back to. */
export function back(version) {
  const form = at("plan");
  form.elements.target.value = "to";
  form.elements.to.value = version;
  at("steer").scrollIntoView();
  form.elements.to.focus();
}

const SWITCHES = [
  { name: "Answers", state: (c) => (c.serving.version == null ? "follow the newest version" : `stay at version ${c.serving.version}`), on: (c) => c.serving.version == null, act: ["follow", "Follow", "Answers follow the newest version of the epoch again."] },
  { name: "Publishing", state: (c) => (c.publishing !== false ? "versions are published" : "held by an operator"), on: (c) => c.publishing !== false, off: ["hold", "Hold publishing", "The trainer continues to learn and publishes no version."], act: ["release", "Release publishing", "The trainer publishes versions again."] },
  { name: "Training", state: (c, held) => (c.training === false ? "paused by an operator" : held ? "held by the guard" : "records are read"), on: (c, held) => c.training !== false && !held, off: ["pause", "Pause training", "The trainer reads no records; answers continue."], act: ["resume", "Resume training", "The trainer reads records again."] },
];

/** Shows the newest generation of control, without what is unchanged. */
export function show(newest, held, found) {
  control = newest;
  generation = newest?.generation ?? null;
  role = found;
  tell(at("token"), role ? `Token: ${role}` : "Enter a token");
  suspect(newest?.held ?? null);
  if (!control) return tell(at("steer-told"), "No control yet; the trainer writes the first generation.");
  tell(at("steer-told"), `Generation ${generation}: ${control.action} by ${control.actor}, ${moment(control.created_at_ms)}: ${control.reason}.${mayOperate() ? "" : " To change something needs the token `operate`."}`);
  const focused = document.activeElement?.dataset?.verb;
  const state = JSON.stringify([generation, held]);
  if (at("holds").dataset.state === state) return undefined;
  at("holds").dataset.state = state;
  at("holds").replaceChildren(
    ...SWITCHES.map((one) => {
      const [name, title, told] = one.on(control, held) ? one.off ?? [] : one.act;
      return h("div", { class: "hold" }, h("h3", {}, one.name), h("p", {}, one.state(control, held)),
        name ? h("button", { type: "button", "data-verb": name, onclick: () => verb(name, title, told) }, title) : null);
    }),
  );
  if (focused) document.querySelector(`[data-verb="${focused}"]`)?.focus();
  return undefined;
}

/** What the trainer's guard holds, with the rollback that leaves its clicks out, ready to be planned. */
function suspect(held) {
  const place = at("suspect");
  if (place.dataset.of === String(held?.next)) return;
  place.dataset.of = String(held?.next);
  place.hidden = !held;
  if (!held) return;
  const clicks = held.clicks.map((one) => `${one.partition}:${one.first}-${one.next - 1}`);
  place.replaceChildren(
    h("h3", {}, "The guard holds an update"),
    h("p", {}, `${held.meaning} is ${held.signal.toPrecision(3)}, usually ${held.usual.toPrecision(3)} (${held.rule}). ${held.followed ? `Answers stay at version ${held.version}, before it.` : "Answers stay where an operator put them."}`),
    h("p", { class: "quiet" }, clicks.length ? `Its clicks, partition and offsets: ${clicks.join(", ")}` : "Its clicks are not known."),
    h("div", { class: "row" },
      h("button", { type: "button", onclick: () => propose(held, clicks) }, "Go back without these clicks"),
      h("button", { type: "button", class: "plain", onclick: () => verb("release", "Accept the clicks", "The clicks are good: the trainer continues, and these records are not held again.") }, "They are good: continue")),
  );
  say(`The guard holds an update: ${held.meaning}.`, "problem");
}

function propose(held, clicks) {
  const form = at("plan");
  form.reset();
  form.elements.target.value = held.version ? "to" : "clean";
  form.elements.to.value = held.version || "";
  form.elements.skip.value = clicks.join(" ");
  form.elements.follow_when_caught_up.checked = true;
  form.requestSubmit();
  at("steer").scrollIntoView();
}

/** Plans a rollback without the clicks that the fields of the form name. */
export function planWithout(fields) {
  const form = at("plan");
  form.reset();
  form.elements.target.value = "clean";
  for (const [name, value] of Object.entries(fields)) form.elements[name].value = value;
  form.requestSubmit();
  at("steer").scrollIntoView();
}

/** The fields of the form, as the interface takes them. */
function wanted(form) {
  const given = Object.fromEntries(new FormData(form));
  const found = { mode: given.mode, follow_when_caught_up: given.follow_when_caught_up === "on" };
  if (given.target === "to" && given.to) found.to = Number(given.to);
  if (given.target === "before" && given.before) found.before = given.before;
  if (given.minutes) found.minutes = Number(given.minutes);
  for (const name of ["skip_time", "skip_item", "skip_category"]) if (given[name]) found[name] = [given[name]];
  for (const name of ["skip", "users", "pseudonyms"]) if (given[name]) found[name] = given[name].split(/[\s,]+/).filter(Boolean);
  return found;
}

const users = (number) => (number === 1 ? "1 user" : `${count(number)} users`);

function facts({ plan }) {
  const turn = plan.answers;
  const answers = !turn.serves ? "nothing serves on this host" : turn.in_row_store ? "at once: the version is in the row store" : `after about ${turn.seconds.toFixed(1)} s`;
  const learn = plan.end_is_exact
    ? `${count(plan.rows)} examples in ${count(plan.records)} records${plan.replay_s === null ? "" : `, about ${age(plan.replay_s)}`}`
    : "not counted: Kafka does not answer";
  const left = [...plan.mask.offsets.map(([, partition, first, last]) => `partition ${partition} offsets ${first}-${last - 1}`), ...plan.mask.times.map(([first, last]) => `${moment(first)} to ${moment(last)}`)];
  left.push(...(plan.mask.named ?? []).map(([column, name, first, last]) => `${column} ${name}, ${moment(first)} to ${moment(last)}`));
  if (plan.mask.users) left.push(`all clicks of ${users(plan.mask.users)}`);
  const found = [
    ["Mode", plan.mode === "exact" ? "exact: the stream reads its clicks again, and windows are computed without what is left out" : "fast: the trainer learns again; the stream continues"],
    ["Go back to", `version ${plan.to}, ${age(plan.age_s)} old`],
    ["Answers", `switch ${answers}, then ${plan.then_follow ? "follow once it has caught up" : "stay there"}`],
    ["Learn again", learn],
    ["Leave out", left.length ? `${left.join("; ")}: ${count(plan.masked ?? null)} examples of ${users(plan.users ?? null)}` : "nothing"],
  ];
  if (plan.after) found.push(["Windows", `up to ${count(plan.after)} later examples still count the masked clicks; exact recomputes them`]);
  if (plan.exact) found.push(["Stream", `reads ${count(plan.exact.clicks)} positions again`]);
  found.push(["Figures", `log loss, ranking and lift return to those of version ${plan.to} and are measured again from there`]);
  return found.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);
}

async function plan(event) {
  event.preventDefault();
  if (!mayOperate()) return askToken("A plan reads the training log: it needs the token `operate`.");
  const send = at("plan").querySelector("button"), go = at("go");
  send.disabled = true;
  go.hidden = true;
  try {
    const found = await change("api/plan", wanted(at("plan")));
    showPlan(found);
  } catch (error) {
    say(error.message, "problem");
  } finally {
    send.disabled = false;
  }
  return undefined;
}

function showPlan(found) {
  const go = at("go"), problem = h("p", { role: "alert", class: "problem" });
  const heading = h("h3", { tabindex: -1 }, `The plan, for generation ${found.generation}: nothing is changed yet`);
  const send = h("button", { type: "submit", class: "danger" }, "Roll back");
  go.replaceChildren(heading, h("dl", { class: "plan" }, facts(found)), h("div", { class: "row" },
    h("label", {}, `Type ${found.plan.to} to confirm`, h("input", { name: "confirm", inputmode: "numeric", required: true, size: 8, autocomplete: "off", pattern: "[0-9]+" })), ...why()), problem,
    h("div", { class: "row" }, send, h("button", { type: "button", class: "plain", onclick: () => { go.hidden = true; at("plan").querySelector("button").focus(); } }, "Not now")));
  go.onsubmit = async (event) => {
    event.preventDefault();
    send.disabled = true;
    tell(problem, "");
    const given = Object.fromEntries(new FormData(go));
    try {
      const done = await change("api/rollback", { plan: found.digest, confirm: Number(given.confirm), ...who(given) });
      const turned = done.answered_s == null ? "" : ` Answers of this host come from it after ${done.answered_s.toFixed(2)} s.`;
      say(done.changed ? `Generation ${done.control.generation}: epoch ${done.control.epoch} starts from version ${done.control.base}.${turned}` : "Already in this state; nothing was changed.");
      go.hidden = true;
      at("plan").querySelector("button").focus();
      await refresh();
    } catch (error) {
      tell(problem, error.message);
    } finally {
      send.disabled = false;
    }
  };
  go.hidden = false;
  heading.focus();
}

export function begin(again) {
  refresh = again;
  at("plan").addEventListener("submit", plan);
  at("token").addEventListener("click", () => askToken());
}
