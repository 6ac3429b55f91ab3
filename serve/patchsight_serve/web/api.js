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
 * signal says when it is aborted, and the server ends that work. progress: told how many bytes of the body are sent.
 * busy: told for how many seconds a full server asks to wait; with it, it is asked again for as long as it is full.
 */
export async function call(path, { method = "GET", body, type, accept, signal, progress, busy } = {}) {
  for (let attempt = 0; ; attempt++) {
    const key = sessionStorage.getItem(KEY);
    const headers = {};
    if (key) headers.Authorization = `Bearer ${key}`;
    if (type) headers["Content-Type"] = type;
    if (accept) headers.Accept = accept;
    const start = performance.now();
    const asked = (progress ? upload : fetch)(path, { method, body, headers, signal }, progress);
    const response = await asked.catch(() => null);
    signal?.throwIfAborted();
    if (!response) throw await lost(body);
    if (response.ok) {
      response.took = { all: performance.now() - start, ...stages(response) };
      return response;
    }
    if (response.status === 401 && (await obtainKey(key))) continue;
    if (response.status === 429 && (busy || attempt < PATIENCE)) {
      const seconds = Number(response.headers.get("Retry-After")) || 1;
      busy?.(seconds);
      await pause(1000 * seconds, signal);
      signal?.throwIfAborted();
      continue;
    }
    throw await refusal(response);
  }
}

/** As `fetch`, which does not tell how much of a body is sent. */
function upload(path, { method, body, headers, signal }, progress) {
  const request = new XMLHttpRequest();
  request.open(method, path);
  request.responseType = "blob";
  for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
  request.upload.onprogress = ({ loaded }) => progress(loaded);
  const abort = () => request.abort();
  signal?.addEventListener("abort", abort);
  return new Promise((done, failed) => {
    request.onload = () => {
      const said = request.getAllResponseHeaders().trim().split(/\r?\n/).map((line) => line.split(/: (.*)/s, 2));
      done(new Response(request.response, { status: request.status, headers: said }));
    };
    request.onerror = request.onabort = () => failed(new Lost());
    request.send(body);
  }).finally(() => signal?.removeEventListener("abort", abort));
}

/** The JSON of a reply; `took` beside it. */
export async function callJson(path, options) {
  const response = await call(path, options);
  return Object.assign(await response.json(), { took: response.took });
}

/** The options of a call that sends a picture as its bytes. One that the browser could not read is refused here. */
export function posting(body) {
  if (body.unread) throw unreadable();
  return { method: "POST", body, type: "application/octet-stream" };
}

/** The gallery that the page is about: the one that its own address names. */
export const galleryName = () => new URLSearchParams(location.search).get("gallery") || "default";

/** A path that asks of the gallery that the page is about, or of the one that the query names. */
export function ofGallery(path, { gallery = galleryName(), ...query } = {}) {
  const asked = new URLSearchParams(gallery === "default" ? query : { ...query, gallery }).toString();
  return asked ? `${path}?${asked}` : path;
}

/** Whether the server answers. */
export async function alive() {
  const response = await fetch("livez").catch(() => null);
  return Boolean(response?.ok);
}

/** For so long, or until the signal. */
export function pause(ms, signal) {
  return new Promise((done) => {
    setTimeout(done, ms);
    signal?.addEventListener("abort", done);
  });
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
    if (body instanceof Blob && !(await body.slice(0, 1).arrayBuffer().catch(() => null))) return unreadable();
    return new ApiError(413, "too_large", "the server broke off the upload; the file is probably too large");
  }
  return new Lost();
}

const unreadable = () => new ApiError(400, "unreadable", "the browser cannot read this file");

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
