import { describe, expect, test } from "vitest";
import type { Slots } from "../src/layout";
import { Model } from "../src/model";
import type { Plan } from "../src/plan";

type Values = { dtype: string; shape: number[]; bytes: Uint8Array };

const f32 = (shape: number[], ...values: number[]): Values => ({
  dtype: "F32",
  shape,
  bytes: new Uint8Array(new Float32Array(values).buffer),
});
const u16 = (dtype: string, shape: number[], ...bits: number[]): Values => ({
  dtype,
  shape,
  bytes: new Uint8Array(new Uint16Array(bits).buffer),
});

function file(tensors: Record<string, Values>): ArrayBuffer {
  let at = 0;
  const header: Record<string, unknown> = { __metadata__: { format: "pt" } };
  for (const [name, { dtype, shape, bytes }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [at, at + bytes.length] };
    at += bytes.length;
  }
  // An odd length, so that no tensor is aligned.
  const text = new TextEncoder().encode(JSON.stringify(header).padEnd(401));
  const data = new Uint8Array(8 + text.length + at);
  new DataView(data.buffer).setBigUint64(0, BigInt(text.length), true);
  data.set(text, 8);
  at = 8 + text.length;
  for (const { bytes } of Object.values(tensors)) {
    data.set(bytes, at);
    at += bytes.length;
  }
  return data.buffer;
}

function plan(changed: Partial<Plan["model"]>): Plan {
  const norm = { kind: "rms" as const, weight: "norm", bias: null, epsilon: 0 };
  const model = { embedding: "embedding", positions: null, norm, head: null, centred: false, ...changed };
  return { layout: { width: 2 }, model } as unknown as Plan;
}

const hidden = (...values: number[]) => Float64Array.from(values) as Slots;
const norm = f32([2], 1, 1);
const embedding = f32([3, 2], 1, 0, 0, 1, -1, -1);

describe("a model", () => {
  test("has its embeddings in numbers of any size", () => {
    // 1.5, -2, 2^-24, 65504, and 1, -3.140625 in bfloat16
    const half = u16("F16", [3, 2], 0x3e00, 0xc000, 0x0001, 0x7bff, 0, 0);
    const brain = u16("BF16", [3, 2], 0x3f80, 0xc049, 0, 0, 0, 0);
    const halves = new Model(plan({}), file({ embedding: half, norm }));
    expect(Array.from(halves.embed(0, 0))).toEqual([1.5, -2]);
    expect(Array.from(halves.embed(1, 0))).toEqual([2 ** -24, 65504]);
    expect(Array.from(new Model(plan({}), file({ embedding: brain, norm })).embed(0, 0))).toEqual([1, -3.140625]);
  });

  test("adds positions and takes the mean away, where it is to", () => {
    const positions = f32([2, 2], 0, 0, 3, 1);
    const whole = { embedding, positions, norm };
    expect(Array.from(new Model(plan({ positions: "positions" }), file(whole)).embed(0, 1))).toEqual([4, 1]);
    const centred = plan({ positions: "positions", centred: true });
    expect(Array.from(new Model(centred, file(whole)).embed(0, 1))).toEqual([1.5, -1.5]);
  });

  test("chooses the likeliest token", () => {
    const model = new Model(plan({}), file({ embedding, norm }));
    expect([hidden(5, 1), hidden(1, 5), hidden(-3, -3)].map((x) => model.next(x))).toEqual([0, 1, 2]);
    // With an output layer of its own, and weights of the normalisation.
    const head = f32([2, 2], 0, 1, 1, 0);
    const weighted = new Model(plan({ head: "head" }), file({ embedding, norm: f32([2], 10, 0.1), head }));
    expect(weighted.next(hidden(1, 5))).toBe(1);
    const layer = { kind: "layer" as const, weight: "norm", bias: "bias", epsilon: 1e-5 };
    const shifted = new Model(plan({ norm: layer, head: "head" }), file({ embedding, norm, head, bias: f32([2], 0, 9) }));
    expect(shifted.next(hidden(5, 1))).toBe(0);
  });

  test.each([[NaN, NaN], [Infinity, -Infinity], [1e300, -1e300], [0, 0]])("chooses one of its tokens for %d, %d", (a, b) => {
    const token = new Model(plan({}), file({ embedding, norm })).next(hidden(a, b));
    expect([0, 1, 2]).toContain(token);
  });

  test.each([
    ["nothing", new ArrayBuffer(3)],
    ["a missing tensor", file({ norm })],
    ["another shape", file({ embedding: f32([2, 3], 1, 0, 0, 1, -1, -1), norm })],
    ["integers", file({ embedding: { ...embedding, dtype: "I32" }, norm })],
    ["a tensor that is cut off", file({ norm, embedding }).slice(0, -4)],
  ])("refuses files with %s", (_, data) => {
    expect(() => new Model(plan({}), data)).toThrow(/damaged|do not fit/);
  });
});
