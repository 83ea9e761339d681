/* The page: starts its parts and lets them work together. */

import { ApiError, about, knownUser } from "./api.js";
import { byId, count, plural, say } from "./elements.js";
import { History } from "./history.js";
import { startKeyDialog } from "./key.js";
import { Run, inWords } from "./run.js";
import { startSearch } from "./search.js";

const TITLES = { on: "With a thought", off: "Without a thought" };

let canThink = true;
let running = null; // what stops the recommendations under way

startKeyDialog();
const history = new History({
  list: byId("history"),
  note: byId("history-note"),
  onChange: () => {
    byId("clear").hidden = history.ids.length === 0;
    say(byId("history-error"), null);
  },
});
startSearch({
  input: byId("search"),
  list: byId("found"),
  onChoose: (item) => history.add(item),
  onError: showHistoryError,
});
byId("clear").addEventListener("click", () => {
  history.set([]);
  byId("search").focus();
});
byId("load-user").addEventListener("click", loadUser);
byId("user-id").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  loadUser();
});
byId("use-pasted").addEventListener("click", () => {
  const names = byId("pasted").value.split("\n").map((line) => line.trim());
  history.paste(names.filter((name) => name !== ""));
});
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
});
await introduce();

/** Says what the server's model can do, and offers no more than that. */
async function introduce() {
  let server;
  try {
    server = await about();
  } catch (error) {
    say(byId("about"), error instanceof ApiError ? `${error.message} Then reload this page.` : null);
    byId("about").classList.add("error");
    return;
  }
  const reads = `reads the newest ${count(server.max_history)} of a history`;
  const thinks = server.thoughts ? `thinks in ${plural(server.thoughts, "thought")}` : "does not think";
  say(byId("about"), `${server.model} · ${plural(server.items, "item")} · ${reads} · ${thinks}`);
  history.read = server.max_history;
  byId("user").hidden = !server.users;
  byId("k").max = server.limits.k;
  byId("width").max = server.limits.beam_width;
  for (const radio of byId("think").querySelectorAll("input")) {
    radio.disabled = !server.thoughts && radio.value !== "off";
    radio.checked = radio.value === (server.thoughts ? "both" : "off");
  }
  canThink = server.thoughts > 0;
  byId("think-note").hidden = canThink;
}

async function loadUser() {
  const id = byId("user-id").value.trim();
  if (id === "") return;
  try {
    const user = await knownUser(id);
    history.set(user.history, { older: user.events - user.history.length });
  } catch (error) {
    showHistoryError(error);
  }
}

/** Recommends in one way or in two, side by side. */
async function ask() {
  running = new AbortController();
  const go = byId("go");
  go.textContent = "Stop";
  history.mark(null);
  const chosen = new FormData(byId("ask")).get("think");
  const runs = (chosen === "both" ? ["on", "off"] : [chosen]).map(
    (think) =>
      new Run({ think, title: canThink ? TITLES[think] : "Recommended", names: history.names }),
  );
  byId("runs").replaceChildren(...runs.map((run) => run.card));
  byId("runs").classList.toggle("two", runs.length === 2);
  say(byId("status"), "The model is at work …");
  const body = {
    history: history.ids,
    k: byId("k").valueAsNumber,
    beam_width: byId("width").valueAsNumber,
  };
  try {
    const came = await Promise.all(runs.map((run) => run.start(body, running.signal)));
    if (came.every(Boolean)) conclude(runs);
    else say(byId("status"), running.signal.aborted ? "Stopped." : "No recommendation.");
    history.mark(runs.map((run) => run.error?.param).find(Boolean) ?? null);
  } finally {
    running = null;
    go.textContent = "Recommend";
  }
}

function conclude(runs) {
  const [first, second] = runs;
  if (!second) {
    say(byId("status"), `${plural(first.answer.items.length, "item")}, the likeliest first.`);
    return;
  }
  first.compareWith(second);
  say(byId("status"), inWords(first.answer.items, second.answer.items));
}

function showHistoryError(error) {
  if (!(error instanceof ApiError)) throw error;
  say(byId("history-error"), error.message);
}
