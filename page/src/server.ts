// A server: what HTTP is for. A session with it is in session.ts.
import { base64url, pause, sha256 } from "./bytes";
import { ConnectionFailed, PageError, ServerError, WrongModel } from "./errors";
import type { Plan } from "./plan";

/** What is sent again at most when an upload breaks. */
const UPLOAD_BYTES = 4 << 20;
const TIMEOUT = 60_000;
const UPLOAD_TIMEOUT = 180_000;
const PATIENCE = 60_000;
const MOST_SETBACKS = 3;
const MOST_ANSWER_BYTES = 1 << 20;
const PORTS: Record<string, string> = { "http:": "80", "https:": "443" };
const LOOPBACK = /^(localhost|127(\.\d{1,3}){3}|\[::1\])$/;

/** How much has gone to and fro. */
export interface Traffic {
  up(bytes: number): void;
  down(bytes: number): void;
}

/** Return a server's address in one spelling. Raises PageError for what is none, and for one without TLS. */
export function serverUrl(address: string): URL {
  let url: URL;
  try {
    url = new URL(address, location.href);
  } catch {
    throw new PageError("that is not the address of a server: write https://, its name and its port");
  }
  if (url.protocol !== "https:" && url.protocol !== "http:")
    throw new PageError("the address of a server begins with https://");
  if (url.protocol === "http:" && !LOOPBACK.test(url.hostname))
    throw new PageError("a server on another machine needs https://: whoever is on the way could be the server");
  const path = address === "" ? new URL(".", url).pathname : url.pathname;
  return new URL(`${url.protocol}//${url.host}${path.replace(/\/+$/, "")}`);
}

/** Return what tells servers apart: all names of this machine are one. */
export function identity(url: URL): string {
  const host = LOOPBACK.test(url.hostname) ? "localhost" : url.hostname;
  return `${url.protocol}//${host}:${url.port || PORTS[url.protocol]}${url.pathname.replace(/\/+$/, "")}`;
}

interface Progress {
  received: number;
  complete: boolean;
}

export class Server {
  readonly url: URL;
  readonly identity: string;

  /** `address` is "" for the server that the page comes from. */
  constructor(
    address: string,
    private readonly token: string,
    private readonly traffic: Traffic,
  ) {
    if (!/^[\x21-\x7e]*$/.test(token)) throw new PageError("a token has no spaces and no letters beyond ASCII");
    this.url = serverUrl(address);
    this.identity = identity(this.url);
  }

  /** Where the server's WebSocket is, and the subprotocols that carry the token: browsers send no other header. */
  get session(): { url: string; protocols: string[] } {
    const protocols = ["cipherlm.1"];
    if (this.token !== "") protocols.push(`cipherlm.token.${base64url(new TextEncoder().encode(this.token))}`);
    return { url: `${this.base.replace(/^http/, "ws")}/v1/session`, protocols };
  }

  /** Check that the server hosts a plan's model; return the size of its messages. Wait for it so long. */
  async describe(plan: Plan, signal?: AbortSignal, patience = PATIENCE): Promise<number> {
    const answer = await this.patiently(() => this.send("GET", "/v1/model", { signal }), signal, patience);
    const { fingerprint, message_bytes: bytes } = answer;
    if (typeof fingerprint !== "string" || !Number.isSafeInteger(bytes) || (bytes as number) < 0) throw nonsense();
    if (fingerprint !== plan.fingerprint)
      throw new WrongModel("this server hosts another model than this page is for: its keys and its text stay here");
    return Math.min(bytes as number, plan.message_bytes);
  }

  /** Give the server keys, unless it has them; an upload that was broken off goes on where it stopped. */
  async upload(
    kind: string,
    file: Blob,
    digest: string,
    report: (received: number, size: number) => void,
    signal?: AbortSignal,
  ): Promise<void> {
    const announced = JSON.stringify({ kind, size: file.size, sha256: digest });
    const announce = () =>
      this.patiently(async () => progress(await this.send("POST", "/v1/keys", { body: announced, signal }), file), signal);
    let state = await announce();
    let setbacks = 0;
    let since = Date.now();
    while (!state.complete) {
      report(state.received, file.size);
      const before = state.received;
      try {
        state = progress(await this.sendPiece(file, before, digest, signal), file);
        if (state.received <= before && !state.complete) throw nonsense();
        since = Date.now();
      } catch (error) {
        // What the server has forgotten, has more of, or got damaged can be sent again.
        const status = error instanceof ServerError ? error.status : undefined;
        const again = mayPass(error) || status === 404 || status === 409 || status === 422;
        if (!again || setbacks === MOST_SETBACKS || Date.now() - since > PATIENCE) throw error;
        await pause(1000, signal);
        state = await announce();
        if (status === 422 || state.received < before) setbacks += 1;
      }
    }
    report(file.size, file.size);
  }

  private get base(): string {
    return this.url.href.replace(/\/+$/, "");
  }

  private async sendPiece(file: Blob, offset: number, digest: string, signal?: AbortSignal) {
    const piece = new Uint8Array(await file.slice(offset, offset + UPLOAD_BYTES).arrayBuffer());
    const headers = {
      "Upload-Offset": String(offset),
      "Upload-Checksum": `sha256 ${await sha256(piece)}`,
      "Content-Type": "application/octet-stream",
    };
    return this.send("PATCH", `/v1/keys/${digest}`, { body: piece, headers, signal, timeout: UPLOAD_TIMEOUT });
  }

  /** Try again for a while what may pass. */
  private async patiently<T>(ask: () => Promise<T>, signal?: AbortSignal, patience = PATIENCE): Promise<T> {
    const since = Date.now();
    for (let wait = 500; ; wait = Math.min(2 * wait, 10_000)) {
      try {
        return await ask();
      } catch (error) {
        if (!mayPass(error) || Date.now() - since + wait > patience) throw error;
        await pause(wait, signal);
      }
    }
  }

  private async send(
    method: string,
    path: string,
    options: {
      body?: string | Uint8Array<ArrayBuffer>;
      headers?: Record<string, string>;
      signal?: AbortSignal | undefined;
      timeout?: number;
    },
  ): Promise<Record<string, unknown>> {
    const headers: Record<string, string> = { ...options.headers };
    if (this.token !== "") headers["Authorization"] = `Bearer ${this.token}`;
    const timeout = AbortSignal.timeout(options.timeout ?? TIMEOUT);
    let response: Response;
    let text: string;
    try {
      response = await fetch(this.base + path, {
        method,
        headers,
        body: options.body ?? null,
        cache: "no-store",
        credentials: "omit",
        redirect: "error",
        referrerPolicy: "no-referrer",
        signal: options.signal ? AbortSignal.any([options.signal, timeout]) : timeout,
      });
      text = await limitedText(response);
    } catch (error) {
      options.signal?.throwIfAborted();
      if (error instanceof PageError) throw error;
      throw new ConnectionFailed(`${this.url.host} does not answer: is the server running, and does it let this page in?`);
    }
    this.traffic.up(options.body?.length ?? 0);
    this.traffic.down(text.length);
    const answer = object(text);
    if (!response.ok) throw refusal(response.status, answer);
    if (answer === undefined) throw nonsense();
    return answer;
  }
}

/** Say whether trying again may help. */
export function mayPass(error: unknown): boolean {
  return error instanceof ConnectionFailed || (error instanceof ServerError && error.retry);
}

const SAID: Record<string, string> = {
  unauthorized: "the server wants a token, or does not let this page in (cipherlm serve --allow-origin)",
  too_large: "the server finds the keys too large",
  storage: "the server has no room for the keys",
  busy: "the server has all the sessions that it can hold: try again later",
  rate_limited: "the server has given you what it gives in an hour: try again later",
  unknown_keys: "the server does not have the keys any more",
  bad_keys: "the keys arrived damaged, or are for another model",
  unknown_model: "the server hosts another model than this page is for",
  timeout: "the server has waited too long",
  shutting_down: "the server is shutting down",
  internal: "the server has a fault",
};

/** Return an error for what the server says. Its own words are not shown: it may say what it likes. */
export function serverError(code: string, retry: boolean, status?: number, retryAfter?: number): ServerError {
  const text = Object.hasOwn(SAID, code) ? SAID[code]! : "the server has refused what it was asked";
  return new ServerError(code, text, retry, status, retryAfter);
}

export function nonsense(): ServerError {
  return new ServerError("nonsense", "the server's answer makes no sense: is it CipherLM's?", false);
}

function refusal(status: number, answer: Record<string, unknown> | undefined): ServerError {
  const error = answer?.["error"];
  const said = typeof error === "object" && error !== null ? (error as Record<string, unknown>) : {};
  const code = typeof said["code"] === "string" ? said["code"] : status >= 500 ? "internal" : "nonsense";
  const after = said["retry_after"];
  // A proxy whose server is away says so in a form of its own.
  const retry = said["retry"] === true || (answer === undefined && status >= 502 && status <= 504);
  return serverError(code, retry, status, typeof after === "number" ? after : undefined);
}

function progress(answer: Record<string, unknown>, file: Blob): Progress {
  const { received, complete } = answer;
  if (!Number.isSafeInteger(received) || typeof complete !== "boolean") throw nonsense();
  if ((received as number) < 0 || (received as number) > file.size) throw nonsense();
  return { received: received as number, complete };
}

function object(text: string): Record<string, unknown> | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null ? (value as Record<string, unknown>) : undefined;
  } catch {
    return undefined;
  }
}

async function limitedText(response: Response): Promise<string> {
  const reader = response.body?.getReader();
  const pieces: Uint8Array<ArrayBuffer>[] = [];
  let total = 0;
  for (let part = await reader?.read(); part !== undefined && !part.done; part = await reader!.read()) {
    total += part.value.length;
    if (total > MOST_ANSWER_BYTES) {
      await reader!.cancel();
      throw nonsense();
    }
    pieces.push(part.value);
  }
  return new Blob(pieces).text();
}
