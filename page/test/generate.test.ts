import { describe, expect, test, vi } from "vitest";
import type { Bytes } from "../src/engine/calls";
import type { Engine } from "../src/engine/pool";
import { PageError, ServerError, SessionLost } from "../src/errors";
import { generate, type Listener, type Parties } from "../src/generate";
import type { Slots } from "../src/layout";
import type { Model } from "../src/model";
import type { Plan } from "../src/plan";
import type { Session } from "../src/session";

const plan = {
  module: "blocks",
  prefix: [0],
  context: 32,
  chunks: 2,
  bucket: 4,
  message_bytes: 1 << 20,
  layout: { slots: 64, period: 8, tokens: 8, first: 1, width: 8, level: 4 },
} as unknown as Plan;
const bytes = new Uint8Array(8) as Bytes;

/** A server and an engine that compute nothing, and note what is asked of them. */
function world(next: (hidden: Slots) => number, lose: (evaluation: number) => boolean = () => false, keeps = 0) {
  const asked: [number, number][] = [];
  const session = {
    evaluate: async (_: string, start: number, count: number, inputs: Bytes[]) => {
      asked.push([start, count]);
      if (lose(asked.length)) throw new SessionLost("lost");
      return inputs.slice(keeps).map(() => bytes);
    },
  } as unknown as Session;
  const engine = {
    call: async (method: string) => (method === "decrypt" ? new Float64Array(64) : bytes),
  } as unknown as Engine;
  const model = { embed: () => new Float64Array(8), next } as unknown as Model;
  const parties: Parties = { plan, model, engine, session: async () => session };
  const tokens: number[] = [];
  const listener = {
    ...Object.fromEntries(
      ["queued", "progress", "refreshed", "ciphertext", "begins", "evaluated", "lost", "worked"].map((name) => [name, vi.fn()]),
    ),
    token: (token: number) => tokens.push(token),
    ended: vi.fn(),
  } as unknown as Listener & { ended: ReturnType<typeof vi.fn>; lost: ReturnType<typeof vi.fn> };
  const run = (prompt: number[], most: number, ends = (token: number) => token === 9, reading = () => true) =>
    generate(parties, prompt, most, ends, reading, listener, new AbortController().signal);
  return { asked, tokens, listener, run };
}

const expected: [number, number][] = [[1, 3], ...[4, 5, 6, 7, 8].map((start): [number, number] => [start, 1])];

describe("what the server is asked for", () => {
  test.each<[string, (hidden: Slots) => number, () => boolean, number]>([
    ["a text to its limit", () => 5, () => true, 5],
    ["a text that ends at once", () => 9, () => true, 0],
    ["a text that nobody reads any more", () => 5, () => false, 0],
    ["numbers that are none", () => Number.NaN, () => true, 5],
  ])("does not depend on it: %s", async (_, next, reading, length) => {
    const { asked, tokens, listener, run } = world(next);
    await run([1, 2, 3], 5, undefined, reading);
    expect(asked).toEqual(expected);
    expect(tokens.length).toBe(length);
    expect(listener.ended).toHaveBeenCalledOnce();
  });

  test("a prompt that is longer than a chunk goes on token by token", async () => {
    const { asked, run } = world(() => 5);
    await run(Array.from({ length: 9 }, () => 1), 1);
    expect(asked.slice(0, 3)).toEqual([[1, 7], [8, 1], [9, 1]]);
    expect(asked.at(-1)).toEqual([12, 1]);
  });

  test("a long prompt goes in a few chunks at a time", async () => {
    const { asked, run } = world(() => 5);
    await run(Array.from({ length: 25 }, () => 1), 1);
    expect(asked).toEqual([[1, 15], [16, 8], [24, 1], [25, 1], [26, 1], [27, 1], [28, 1]]);
  });

  test("a server that keeps results is refused", async () => {
    const { run } = world(() => 5, undefined, 1);
    await expect(run(Array.from({ length: 20 }, () => 1), 1)).rejects.toThrow("1 results, and 2 were expected");
  });

  test("the context is not left", async () => {
    const { asked, run } = world(() => 5);
    await run(Array.from({ length: 30 }, () => 1), 2);
    expect(asked.at(-1)).toEqual([31, 1]);
    await expect(run(Array.from({ length: 30 }, () => 1), 3)).rejects.toThrow(PageError);
    await expect(run([], 3)).rejects.toThrow(PageError);
  });
});

test("a server whose queue is full is asked again", async () => {
  let refusals = 2;
  const { asked, tokens, run } = world(() => 5, () => {
    if (refusals-- > 0) throw new ServerError("busy", "busy", true);
    return false;
  });
  vi.useFakeTimers();
  const running = run([1, 2, 3], 1);
  await vi.runAllTimersAsync();
  vi.useRealTimers();
  await running;
  expect(asked).toEqual([[1, 3], [1, 3], [1, 3], [4, 1]]);
  expect(tokens).toEqual([5]);
});

describe("a lost session", () => {
  test("lets the text begin anew, with what is known of it", async () => {
    const { asked, tokens, listener, run } = world(() => 5, (evaluation) => evaluation === 3);
    await run([1, 2, 3], 5);
    expect(asked).toEqual([[1, 3], [4, 1], [5, 1], [1, 5], ...expected.slice(3)]);
    expect(tokens).toEqual([5, 5, 5, 5, 5]);
    expect(listener.lost).toHaveBeenCalledOnce();
  });

  test("is not for ever", async () => {
    const { asked, run } = world(() => 5, () => true);
    await expect(run([1, 2, 3], 5)).rejects.toThrow(SessionLost);
    expect(asked.length).toBe(4);
  });
});
