// Asks the console's interface; the token lives in this tab alone.

const KEY = "springtide-token";

export const token = () => sessionStorage.getItem(KEY) ?? "";

export function keepToken(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

/** What went wrong: what happened, what to do, and the status of HTTP (0: nobody answers). */
export class Refused extends Error {
  constructor(status, said) {
    super(said.do ? `${said.error}. ${said.do[0].toUpperCase()}${said.do.slice(1)}.` : said.error);
    this.status = status;
  }
}

async function asked(path, options) {
  const headers = { ...options.headers, ...(token() ? { authorization: `Bearer ${token()}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch {
    throw new Refused(0, { error: "the console does not answer" });
  }
  const said = await answer.json().catch(() => ({ error: `status ${answer.status}` }));
  if (!answer.ok) throw new Refused(answer.status, said);
  return said;
}

export const read = (path) => asked(path, {});

export const change = (path, wanted) =>
  asked(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(wanted) });
