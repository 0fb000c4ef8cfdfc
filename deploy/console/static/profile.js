// One user's profile: interests as bars, and why one of them is as probable as it is.

import { read } from "./asking.js";
import { at, h, marked, tell } from "./dom.js";
import { age, count, percent } from "./words.js";

let asked = 0;

async function lookUp(user, label) {
  const mine = ++asked;
  const query = label ? `?label=${encodeURIComponent(label)}` : "";
  try {
    const found = await read(`api/profiles/${encodeURIComponent(user)}${query}`);
    if (mine === asked) show(user, found);
  } catch (error) {
    if (mine === asked) at("found").replaceChildren(h("p", { class: "problem" }, marked(error.message)));
  }
}

function bar(value) {
  const inner = h("span", { class: "inner" });
  inner.style.width = `${(100 * value).toFixed(1)}%`;
  return h("span", { class: "bar-of", "aria-hidden": "true" }, inner);
}

function show(user, { profile, explanation }) {
  const version = profile.version;
  const focused = document.activeElement?.dataset?.label;
  const interests = profile.interests.map((one) =>
    h("li", {}, h("button", { type: "button", "data-label": one.label, "aria-pressed": String(explanation?.label === one.label), onclick: () => lookUp(user, one.label) },
      h("span", { class: "name" }, one.label), bar(one.probability), h("span", { class: "value" }, percent(one.probability)))),
  );
  const features = Object.entries(profile.features).filter(([, value]) => value);
  at("found").replaceChildren(
    h("p", {}, h("b", {}, user), ` is ${profile.known ? "known" : "not known: this is the answer for anybody new"}. Answered by version ${version.number} of epoch ${version.epoch}, ${age(version.age_s)} old.`),
    h("div", { class: "two" },
      h("div", {}, h("h3", {}, "Interests"), h("ol", { class: "interests" }, interests)),
      h("div", {}, reasons(explanation) ?? ""),
    ),
    h("details", {}, h("summary", {}, `${features.length} features that are not 0`), h("dl", { class: "facts features" }, features.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, Number.isInteger(value) ? count(value) : value.toPrecision(4)))))),
  );
  if (focused) document.querySelector(`[data-label="${CSS.escape(focused)}"]`)?.focus();
}

function reasons(explanation) {
  if (!explanation) return null;
  if (explanation.error) return h("p", { class: "problem" }, `${explanation.error}; ${explanation.do ?? ""}`);
  const rows = explanation.reasons.map((one) => {
    const sign = one.share < 0 ? "−" : "+";
    return h("li", { class: one.share < 0 ? "less" : "more" }, h("span", { class: "value" }, `${sign}${percent(Math.abs(one.share))}`), h("span", {}, one.words));
  });
  return [
    h("h3", {}, `Why ${explanation.label} is ${percent(explanation.probability)}`),
    h("p", { class: "quiet" }, `For an unknown user it would be ${percent(explanation.cold_start_probability)}. What increases it, and what decreases it:`),
    rows.length ? h("ul", { class: "reasons" }, rows) : h("p", {}, "Nothing."),
    Math.abs(explanation.rest) >= 0.0005 ? h("p", { class: "quiet" }, `Smaller parts together: ${percent(explanation.rest)}.`) : null,
  ].filter(Boolean);
}

/** Fills in a user and shows the profile. */
export function lookUpUser(user) {
  at("user").value = user;
  at("profile").scrollIntoView();
  at("user").focus();
  at("lookup").requestSubmit();
}

export function begin() {
  at("lookup").addEventListener("submit", (event) => {
    event.preventDefault();
    tell(at("found"), "");
    lookUp(at("user").value.trim());
  });
}
