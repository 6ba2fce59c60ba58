import { describe, expect, test } from "vitest";
import { pack, type ServerMessage, unpack, WireError } from "../src/wire";

function frame(header: unknown, ...blobs: Uint8Array[]): Uint8Array {
  const text = new TextEncoder().encode(typeof header === "string" ? header : JSON.stringify(header));
  const length = new Uint8Array(4);
  new DataView(length.buffer).setUint32(0, text.length, true);
  return new Uint8Array([...length, ...text, ...blobs.flatMap((blob) => Array.from(blob))]);
}

const blob = (...bytes: number[]) => new Uint8Array(bytes);

describe("messages", () => {
  test("a known answer: docs/protocol.md has the bytes of a close", () => {
    const data = pack({ type: "close" });
    expect(Array.from(data.subarray(0, 4))).toEqual([0x1b, 0, 0, 0]);
    expect(new TextDecoder().decode(data.subarray(4))).toBe('{"type":"close","blobs":[]}');
  });

  test("blobs follow the header, and come back as views", () => {
    const data = pack({ type: "evaluate", id: 1, module: "m", start: 1, count: 2, blobs: [blob(1, 2), blob(3)] });
    expect(Array.from(data.subarray(-3))).toEqual([1, 2, 3]);
    const message = unpack(frame({ type: "result", id: 1, blobs: [2, 1] }, blob(1, 2), blob(3)));
    expect(message).toEqual({ type: "result", id: 1, blobs: [blob(1, 2), blob(3)] });
  });

  test.each<ServerMessage>([
    { type: "opened", session: "ab", limits: { max_tokens: 4 } },
    { type: "queued", id: 1, position: 0 },
    { type: "progress", id: 1, done: 1, total: 4 },
    { type: "error", code: "busy", message: "later", retry: true },
    { type: "error", code: "busy", message: "later", retry: true, id: 3, retry_after: 5 },
  ])("$type is read", (message) => {
    expect(unpack(frame({ ...message, blobs: [] }))).toEqual(message);
  });

  test.each([
    ["nothing", blob()],
    ["a cut length", blob(1, 0)],
    ["a header beyond the end", blob(9, 0, 0, 0, 1)],
    ["a header that is too long", blob(1, 0, 1, 0)],
    ["no JSON", frame("{")],
    ["a list", frame("[]")],
    ["NaN", frame('{"type":"queued","id":NaN,"position":1,"blobs":[]}')],
    ["no sizes", frame({ type: "queued", id: 1, position: 1 })],
    ["sizes below zero", frame({ type: "result", id: 1, blobs: [-1] })],
    ["sizes that are not whole", frame({ type: "result", id: 1, blobs: [0.5] })],
    ["a size that is not right", frame({ type: "result", id: 1, blobs: [2] }, blob(1))],
    ["bytes behind the end", frame({ type: "result", id: 1, blobs: [] }, blob(1))],
    ["an unknown type", frame({ type: "secret", blobs: [] })],
    ["a type of every object", frame({ type: "constructor", blobs: [] })],
    ["a missing field", frame({ type: "queued", id: 1, blobs: [] })],
    ["a field of another type", frame({ type: "queued", id: "1", position: 1, blobs: [] })],
    ["one field more", frame({ type: "queued", id: 1, position: 1, more: 1, blobs: [] })],
    ["a refresh of nothing", frame({ type: "refresh", id: 1, round: 0, blobs: [] })],
    ["a blob where there is none", frame({ type: "queued", id: 1, position: 1, blobs: [1] }, blob(1))],
    ["a text with a line", frame({ type: "error", code: "a\nb", message: "", retry: false, blobs: [] })],
    ["a text without end", frame({ type: "error", code: "a".repeat(2000), message: "", retry: false, blobs: [] })],
  ])("%s is refused", (_, data) => {
    expect(() => unpack(data)).toThrow(WireError);
  });
});
