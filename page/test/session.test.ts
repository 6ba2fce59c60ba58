import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import type { Bytes } from "../src/engine/calls";
import { Cancelled, ConnectionFailed, PageError, ServerError, SessionLost, WrongModel } from "../src/errors";
import type { Server } from "../src/server";
import { Session } from "../src/session";
import { messageLimit } from "../src/wire";

const MESSAGE_BYTES = 1000;
const ROUNDS = 3;
const blob = new Uint8Array([1, 2, 3]) as Bytes;

function frame(header: Record<string, unknown>, ...blobs: Uint8Array[]): ArrayBuffer {
  const text = new TextEncoder().encode(JSON.stringify({ ...header, blobs: blobs.map((one) => one.length) }));
  const data = new Uint8Array(4 + text.length + blobs.reduce((sum, one) => sum + one.length, 0));
  new DataView(data.buffer).setUint32(0, text.length, true);
  data.set(text, 4);
  let at = 4 + text.length;
  for (const one of blobs) {
    data.set(one, at);
    at += one.length;
  }
  return data.buffer;
}

function header(data: Uint8Array): Record<string, unknown> {
  const length = new DataView(data.buffer).getUint32(0, true);
  return JSON.parse(new TextDecoder().decode(data.subarray(4, 4 + length))) as Record<string, unknown>;
}

type Said = { type: string; id?: number } & Record<string, unknown>;

/** A WebSocket whose other end is a function: what it says to each message of the client's. */
class FakeSocket extends EventTarget {
  static readonly OPEN = 1;
  static answers: (said: Said, socket: FakeSocket) => void = () => undefined;
  static opens = true;
  static last: FakeSocket;
  binaryType = "";
  readyState = 0;
  onmessage: ((event: MessageEvent<unknown>) => void) | null = null;
  onclose: (() => void) | null = null;
  readonly sent: Said[] = [];

  constructor(
    readonly url: string,
    readonly protocols: string[],
  ) {
    super();
    FakeSocket.last = this;
    queueMicrotask(() => {
      if (!FakeSocket.opens) return this.close();
      this.readyState = FakeSocket.OPEN;
      this.dispatchEvent(new Event("open"));
    });
  }

  send(data: Uint8Array): void {
    const said = header(data) as Said;
    this.sent.push(said);
    queueMicrotask(() => FakeSocket.answers(said, this));
  }

  says(message: Record<string, unknown>, ...blobs: Uint8Array[]): void {
    this.onmessage?.(new MessageEvent("message", { data: frame(message, ...blobs) }));
  }

  close(): void {
    if (this.readyState === 3) return;
    this.readyState = 3;
    this.dispatchEvent(new Event("close"));
    this.onclose?.();
  }
}

const server = { session: { url: "wss://llm.example/v1/session", protocols: ["cipherlm.1"] } } as unknown as Server;
const traffic = { up: vi.fn(), down: vi.fn() };
const watch = { queued: vi.fn(), progress: vi.fn(), refreshed: vi.fn() };
const opened = { type: "opened", session: "s", limits: {} };
const error = (code: string, id?: number, retry = false) => ({
  type: "error",
  code,
  message: "<b>anything</b>",
  retry,
  ...(id === undefined ? {} : { id }),
});

function open(): Promise<Session> {
  return Session.open(server, "fingerprint", {}, { messageBytes: MESSAGE_BYTES, rounds: ROUNDS }, traffic);
}

/** Open a session, and let the server answer an evaluation. */
async function session(evaluated: (id: number, socket: FakeSocket, said: Said) => void): Promise<Session> {
  FakeSocket.answers = (said, socket) => {
    if (said.type === "open") socket.says(opened);
    else if (said.id !== undefined) evaluated(said.id, socket, said);
  };
  return open();
}

function evaluate(session: Session, signal = new AbortController().signal, refresh = async () => blob): Promise<Bytes[]> {
  return session.evaluate("m", 1, 1, [blob], refresh, watch, signal);
}

beforeEach(() => {
  vi.stubGlobal("WebSocket", FakeSocket);
  vi.stubGlobal("location", { href: "https://page.example/" });
  FakeSocket.opens = true;
});
afterEach(() => {
  vi.unstubAllGlobals();
});

describe("a session", () => {
  test("evaluates, with refreshes on the way", async () => {
    const good = await session((id, socket, said) => {
      const round = said.type === "refreshed" ? (said["round"] as number) + 1 : 0;
      if (said.type === "evaluate") {
        socket.says({ type: "queued", id, position: 2 });
        socket.says({ type: "progress", id, done: 1, total: 4 });
      }
      if (round < ROUNDS) socket.says({ type: "refresh", id, round }, blob);
      else socket.says({ type: "result", id }, blob);
    });
    for (let i = 0; i < 2; i++) expect(await evaluate(good)).toEqual([blob]);
    const ids = FakeSocket.last.sent.filter(({ type }) => type === "evaluate").map(({ id }) => id);
    expect(ids).toEqual([1, 2]);
    expect(watch.queued).toHaveBeenCalledWith(2);
    expect(watch.progress).toHaveBeenCalledWith(1, 4);
    good.close();
    expect(FakeSocket.last.sent.at(-1)?.type).toBe("close");
    await expect(evaluate(good)).rejects.toThrow(SessionLost);
  });

  test.each<[string, unknown, new (...args: never[]) => Error]>([
    ["another model", error("unknown_model"), WrongModel],
    ["keys that it lacks", error("unknown_keys"), ServerError],
    ["something else", { type: "result", id: 1 }, ServerError],
  ])("is not opened by a server with %s", async (_, answer, kind) => {
    FakeSocket.answers = (_, socket) => socket.says(answer as Record<string, unknown>);
    await expect(open()).rejects.toThrow(kind);
    expect(FakeSocket.last.readyState).toBe(3);
  });

  test("is not opened where nobody answers", async () => {
    FakeSocket.opens = false;
    await expect(open()).rejects.toThrow(ConnectionFailed);
  });
});

describe("a server that cheats is left", () => {
  test.each<[string, (id: number, socket: FakeSocket, said: Said) => void]>([
    ["when it never has enough of refreshes", (id, socket, said) =>
      socket.says({ type: "refresh", id, round: said.type === "refreshed" ? (said["round"] as number) + 1 : 0 }, blob)],
    ["when rounds do not count up", (id, socket) => socket.says({ type: "refresh", id, round: 1 }, blob)],
    ["when a message is too large", (id, socket) =>
      socket.says({ type: "result", id }, new Uint8Array(messageLimit(MESSAGE_BYTES)))],
    ["when it says what is no message", (_, socket) => socket.says({ type: "result" })],
    ["when it answers another question", (id, socket) => socket.says({ type: "result", id: id + 1 }, blob)],
    ["when it opens twice", (_, socket) => socket.says(opened)],
    ["when it says a text", (_, socket) => socket.onmessage?.(new MessageEvent("message", { data: "text" }))],
  ])("%s", async (_, evaluated) => {
    const bad = await session(evaluated);
    const failure = await evaluate(bad).catch((reason: unknown) => reason);
    expect(failure).toBeInstanceOf(PageError);
    expect(bad.over).toBe(true);
    expect(FakeSocket.last.readyState).toBe(3);
    expect(FakeSocket.last.sent.filter(({ type }) => type === "refreshed").length).toBeLessThanOrEqual(ROUNDS);
  });
});

describe("an evaluation that fails", () => {
  test("says what the server means in words of the page's own", async () => {
    const good = await session((id, socket) => socket.says(error("busy", id, true)));
    const failure = (await evaluate(good).catch((reason: unknown) => reason)) as ServerError;
    expect(failure).toBeInstanceOf(ServerError);
    expect([failure.code, failure.retry, good.over]).toEqual(["busy", true, false]);
    expect(failure.message).not.toContain("anything");
  });

  test.each(["shutting_down", "timeout"])("with %s ends the session", async (code) => {
    const ended = await session((_, socket) => socket.says(error(code)));
    await expect(evaluate(ended)).rejects.toThrow(SessionLost);
    expect(ended.over).toBe(true);
  });

  test("because the connection breaks ends the session", async () => {
    const lost = await session((_, socket) => socket.close());
    await expect(evaluate(lost)).rejects.toThrow(SessionLost);
  });

  test("because a refresh cannot be answered is cancelled, and the session goes on", async () => {
    const good = await session((id, socket, said) => {
      if (said.type === "evaluate") socket.says(id === 1 ? { type: "refresh", id, round: 0 } : { type: "result", id }, blob);
      if (said.type === "cancel") socket.says(error("cancelled", id));
    });
    const refused = new PageError("cannot be refreshed");
    await expect(evaluate(good, undefined, () => Promise.reject(refused))).rejects.toBe(refused);
    expect(FakeSocket.last.sent.at(-1)).toMatchObject({ type: "cancel", id: 1 });
    expect(await evaluate(good)).toEqual([blob]);
  });

  test("because the user breaks off is cancelled, and the session goes on", async () => {
    const controller = new AbortController();
    const good = await session((id, socket, said) => {
      if (said.type === "evaluate" && id === 1) controller.abort();
      else if (said.type === "cancel") socket.says(error("cancelled", id));
      else socket.says({ type: "result", id }, blob);
    });
    await expect(evaluate(good, controller.signal)).rejects.toThrow(Cancelled);
    expect(await evaluate(good)).toEqual([blob]);
  });
});
