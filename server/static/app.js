// Ties the page together: reads settings and statistics every two seconds, shows what is wrong, takes the API key.

import { get, key } from "./api.js";
import { byId } from "./dom.js";
import * as live from "./live.js";
import * as playground from "./playground.js";

const EVERY_MS = 2000;
const SLOWEST_MS = 15000;

let wait = EVERY_MS;
let timer = null;
let configured = null;

async function refresh() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const stats = await get("stats");
    if (configured !== stats.defaults_version) {
      const config = await get("config");
      playground.configure(config);
      byId("model").textContent = `${config.model} · ${config.max_model_len.toLocaleString("en")} tokens`;
      byId("versions").textContent = ` · vllm-calidrop ${config.version} on vLLM ${config.vllm}`;
      configured = stats.defaults_version;
    }
    live.show(byId("engines"), stats);
    say("live", "live");
    byId("problem").hidden = true;
    wait = EVERY_MS;
  } catch (error) {
    trouble(error);
    wait = Math.min(2 * wait, SLOWEST_MS);
  }
  timer = setTimeout(refresh, wait);
}

function trouble(error) {
  const problem = byId("problem");
  problem.textContent = error.kind === "key" ? `${error.message} Enter it above.` : error.message;
  problem.hidden = false;
  if (error.kind === "key") {
    say("key needed", "error");
    if (!byId("key-box").open) {
      byId("key-box").open = true;
      byId("key").focus();
    }
  } else {
    say(error.kind === "down" ? "no answer" : "error", "error");
    configured = null;
  }
}

function say(text, state) {
  const status = byId("status");
  if (status.textContent !== text) status.textContent = text;
  status.dataset.state = state;
}

function useKey(event) {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key-box").open = false;
  wait = EVERY_MS;
  refresh();
}

byId("key").value = key.get();
byId("key-form").addEventListener("submit", useKey);
document.addEventListener("visibilitychange", () => {
  live.forget();
  refresh();
});
playground.start(trouble);
refresh();
