import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { sha256 } from "../src/bytes";
import { ConnectionFailed, ServerError, WrongModel } from "../src/errors";
import type { Plan } from "../src/plan";
import { Server } from "../src/server";

const plan = { fingerprint: "ab", message_bytes: 1000 } as unknown as Plan;
const key = new Uint8Array(10 << 20).map((_, i) => (i * 7) % 251);
const digest = await sha256(key);

interface Asked {
  method: string;
  path: string;
  headers: Record<string, string>;
  body: string | Uint8Array | null;
}

let asked: Asked[];
let answer: (asked: Asked) => Response | Promise<Response>;

const json = (value: unknown, status = 200) => new Response(JSON.stringify(value), { status });
const refusal = (code: string, status: number, retry = false) => json({ error: { code, message: "<i>", retry } }, status);
const server = (token = "") => new Server("https://llm.example:8470", token, { up: () => undefined, down: () => undefined });
const upload = (report = vi.fn()) => server().upload("evaluation", new Blob([key]), digest, report);

beforeEach(() => {
  asked = [];
  vi.useFakeTimers({ shouldAdvanceTime: true, advanceTimeDelta: 200 });
  vi.stubGlobal("location", { href: "https://page.example/" });
  vi.stubGlobal("fetch", async (url: string, options: Asked & { method: string }) => {
    const one = { method: options.method, path: new URL(url).pathname, headers: options.headers, body: options.body };
    asked.push(one);
    return answer(one);
  });
});
afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

function broken(): never {
  throw new TypeError("network");
}

/** A server that keeps what it gets; `fails` may do something else with a chunk. */
function keeping(fails: (chunk: number, received: number) => Response | undefined = () => undefined) {
  let received = 0;
  let chunks = 0;
  const state = () => json({ size: key.length, received, complete: received === key.length });
  answer = async ({ method, headers, body }) => {
    if (method === "POST") return state();
    const piece = body as Uint8Array<ArrayBuffer>;
    const failure = fails(chunks++, received);
    if (failure !== undefined) return failure;
    expect(headers["Upload-Offset"]).toBe(String(received));
    expect(headers["Upload-Checksum"]).toBe(`sha256 ${await sha256(piece)}`);
    expect(await sha256(piece)).toBe(await sha256(key.slice(received, received + piece.length)));
    received += piece.length;
    return state();
  };
  return { forget: () => (received = 0) };
}

describe("an upload", () => {
  test("goes in pieces, which are shown", async () => {
    keeping();
    const report = vi.fn();
    await upload(report);
    expect(report.mock.calls.map(([received]) => received as number)).toEqual([0, 4 << 20, 8 << 20, 10 << 20]);
    expect(asked[0]).toMatchObject({ method: "POST", path: "/v1/keys" });
    expect(JSON.parse(asked[0]!.body as string)).toEqual({ kind: "evaluation", size: key.length, sha256: digest });
  });

  test("is not repeated where the key is there", async () => {
    answer = () => json({ size: key.length, received: key.length, complete: true });
    await upload();
    expect(asked.length).toBe(1);
  });

  test.each<[string, () => Response]>([
    ["a connection that breaks", () => broken()],
    ["a proxy that finds no server", () => new Response("<html>", { status: 502 })],
    ["a busy server", () => refusal("busy", 503, true)],
    ["a chunk that was damaged", () => refusal("bad_keys", 422, true)],
    ["an offset that is another", () => refusal("conflict", 409, true)],
  ])("goes on after %s", async (_, failure) => {
    keeping((chunk) => (chunk === 1 ? failure() : undefined));
    await upload();
    expect(asked.filter(({ method }) => method === "PATCH").length).toBe(4);
  });

  test("begins again, a few times, where the server forgets it", async () => {
    const kept = keeping((_, received) => {
      if (received === 0) return undefined;
      kept.forget();
      return refusal("unknown_keys", 404);
    });
    await expect(upload()).rejects.toThrow(ServerError);
    expect(asked.length).toBeLessThanOrEqual(12);
  });

  test.each([
    ["more than there is", { received: key.length + 1, complete: false }],
    ["less than nothing", { received: -1, complete: false }],
    ["halves", { received: 0.5, complete: false }],
    ["no numbers", { received: "0", complete: false }],
    ["nothing", {}],
  ])("is not sent to a server that has received %s", async (_, state) => {
    answer = () => json(state);
    await expect(upload()).rejects.toThrow(ServerError);
    expect(asked.length).toBe(1);
  });

  test("is not sent for ever to a server that does not move", async () => {
    answer = () => json({ received: 0, complete: false });
    await expect(upload()).rejects.toThrow(ServerError);
    expect(asked.length).toBe(2);
  });
});

describe("a description", () => {
  test("bounds messages by what the page knows", async () => {
    for (const [said, expected] of [[10, 10], [1e9, 1000]]) {
      answer = () => json({ fingerprint: "ab", message_bytes: said });
      expect(await server().describe(plan)).toBe(expected);
    }
  });

  test("of another model is refused", async () => {
    answer = () => json({ fingerprint: "cd", message_bytes: 10 });
    await expect(server().describe(plan)).rejects.toThrow(WrongModel);
  });

  test.each([
    ["no JSON", () => new Response("<html>")],
    ["another form", () => json({ fingerprint: 1, message_bytes: 10 })],
    ["sizes below zero", () => json({ fingerprint: "ab", message_bytes: -1 })],
    ["a page without end", () => new Response("a".repeat(3 << 20))],
    ["a refusal of nobody's", () => new Response("no", { status: 418 })],
  ])("of %s is refused", async (_, response) => {
    answer = response;
    await expect(server().describe(plan)).rejects.toThrow(ServerError);
  });

  test("brings the token, and no word of the server's to people", async () => {
    answer = () => refusal("unauthorized", 401);
    const failure = (await server("secret").describe(plan).catch((error: unknown) => error)) as ServerError;
    expect(asked[0]!.headers["Authorization"]).toBe("Bearer secret");
    expect([failure.code, failure.status]).toEqual(["unauthorized", 401]);
    expect(failure.message).not.toContain("<i>");
    expect(server("secret").session).toEqual({
      url: "wss://llm.example:8470/v1/session",
      protocols: ["cipherlm.1", "cipherlm.token.c2VjcmV0"],
    });
    expect(() => server("two words")).toThrow();
  });

  test("is asked for again for a minute", async () => {
    answer = () => Promise.reject(new TypeError("network"));
    const failure = server().describe(plan).catch((error: unknown) => error);
    await vi.advanceTimersByTimeAsync(70_000);
    expect(await failure).toBeInstanceOf(ConnectionFailed);
    expect(asked.length).toBeGreaterThan(5);
  });
});
