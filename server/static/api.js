// The server as this page sees it: JSON, streams of server-sent events, and errors that say what to do.

const KEY = "calidrop-key";
const LIVE_TIMEOUT_MS = 10000;

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

// kind: "down" (no answer), "key" (401 or 403), "refused" (another 4xx), "failed" (5xx). param: the field to blame.
export class ServerError extends Error {
  constructor(kind, message, param = null) {
    super(message);
    this.kind = kind;
    this.param = param;
  }
}

function headers() {
  return key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("down", "The server does not answer.");
  }
  if (response.ok) return response;
  throw await errorOf(response);
}

async function errorOf(response) {
  const text = await response.text();
  let message = text.slice(0, 300) || response.statusText, param = null;
  try {
    const body = JSON.parse(text);
    message = body.error?.message ?? (typeof body.error === "string" ? body.error : null) ?? body.detail ?? message;
    param = body.error?.param ?? null;
  } catch {
    // not JSON: the text itself
  }
  if (response.status === 401 || response.status === 403) {
    return new ServerError("key", "This server needs an API key, or another one.");
  }
  return new ServerError(response.status < 500 ? "refused" : "failed", `${response.status}: ${message}`, param);
}

export async function get(path) {
  const response = await answer(path, { headers: headers(), signal: AbortSignal.timeout(LIVE_TIMEOUT_MS) });
  return response.json();
}

function send(path, body, signal) {
  return answer(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
}

export async function post(path, body, signal) {
  return (await send(path, body, signal)).json();
}

// The chunks of a streamed answer, as objects.
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let whole = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        const data = line.slice(6);
        if (data === "[DONE]") {
          whole = true;
          continue;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError("failed", chunk.error.message ?? String(chunk.error));
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError("down", "The connection was lost in the middle of the answer.");
  }
  if (!whole) throw new ServerError("down", "The connection ended in the middle of the answer.");
}
