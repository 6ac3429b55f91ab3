// Calls to this server: the API key, full queues, and errors that can be told to a person.

const KEY = "patchsight.key";
const PATIENCE = 3; // times that a 429 is tried again

/** What the server refused: `status`, `code`, and a message written for whoever sent the request. */
export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The server could not be reached at all. */
export class Lost extends Error {}

let askForKey = async () => null;
let asking = null;

/** `ask(refused)` resolves to a key, or to null if the person has none; `refused`: an earlier one was wrong. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/**
 * A reply that went well, with `took`: milliseconds in all, and of the server's stages. Throws ApiError, Lost; what the
 * signal says when it is aborted, and the server ends that work.
 */
export async function call(path, { method = "GET", body, type, accept, signal } = {}) {
  for (let attempt = 0; ; attempt++) {
    const key = sessionStorage.getItem(KEY);
    const headers = {};
    if (key) headers.Authorization = `Bearer ${key}`;
    if (type) headers["Content-Type"] = type;
    if (accept) headers.Accept = accept;
    const start = performance.now();
    const response = await fetch(path, { method, body, headers, signal }).catch(() => null);
    signal?.throwIfAborted();
    if (!response) throw await lost(body);
    if (response.ok) {
      response.took = { all: performance.now() - start, ...stages(response) };
      return response;
    }
    if (response.status === 401 && (await obtainKey(key))) continue;
    if (response.status === 429 && attempt < PATIENCE) {
      await pause(1000 * (Number(response.headers.get("Retry-After")) || 1));
      continue;
    }
    throw await refusal(response);
  }
}

/** The JSON of a reply; `took` beside it. */
export async function callJson(path, options) {
  const response = await call(path, options);
  return Object.assign(await response.json(), { took: response.took });
}

/** A path that asks of the gallery that the page is about: the one that the page's own address names. */
export function ofGallery(path, query = {}) {
  const gallery = new URLSearchParams(location.search).get("gallery");
  const asked = new URLSearchParams(gallery ? { ...query, gallery } : query).toString();
  return asked ? `${path}?${asked}` : path;
}

/** Whether the server answers. */
export async function alive() {
  const response = await fetch("livez").catch(() => null);
  return Boolean(response?.ok);
}

export function pause(ms) {
  return new Promise((done) => setTimeout(done, ms));
}

/** Whether there is another key now than the one that was refused. Calls that fail together ask once. */
async function obtainKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return true;
  asking ??= askForKey(refused !== null).finally(() => (asking = null));
  const key = await asking;
  if (key === null) return false;
  sessionStorage.setItem(KEY, key);
  return true;
}

async function lost(body) {
  if (body && (await alive())) {
    return new ApiError(413, "too_large", "the server broke off the upload; the file is probably too large");
  }
  return new Lost();
}

async function refusal(response) {
  const content = await response.json().catch(() => null);
  const error = content?.error ?? { code: "unknown", message: `the server answered with status ${response.status}` };
  return new ApiError(response.status, error.code, error.message);
}

/** Server-Timing as `{decode: ms, queue: ms, infer: ms}`. */
function stages(response) {
  const found = (response.headers.get("Server-Timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g);
  return Object.fromEntries([...found].map(([, name, ms]) => [name, Number(ms)]));
}
