import { describe, expect, test } from "vitest";
import { lastRow, packed, type Slots } from "../src/layout";
import type { Layout } from "../src/plan";

// 3 features with a period of 4, 2 tokens side by side of which the first is public.
const layout: Layout = { slots: 16, period: 4, tokens: 2, first: 1, room: 1, width: 3, level: 4 };
const row = (...values: number[]) => Float64Array.from(values) as Slots;

describe("slots", () => {
  test("a text begins with its tokens side by side, which repeat with the features", () => {
    const block = [0, 1, 0, 2, 0, 3, 0, 0];
    expect(Array.from(packed(layout, [row(1, 2, 3)], true))).toEqual([...block, ...block]);
  });

  test("its last token stands in for those that it lacks", () => {
    const wide = { ...layout, tokens: 4 };
    expect(Array.from(packed(wide, [row(1, 2, 3), row(4, 5, 6)], true))).toEqual([
      ...[0, 1, 4, 4],
      ...[0, 2, 5, 5],
      ...[0, 3, 6, 6],
      ...[0, 0, 0, 0],
    ]);
  });

  test("a token behind it is alone", () => {
    const block = [1, 2, 3, 0];
    expect(Array.from(packed(layout, [row(1, 2, 3)], false))).toEqual([...block, ...block, ...block, ...block]);
  });

  test("what comes back is read where it was put", () => {
    const wide = { ...layout, tokens: 4 };
    const rows = [row(1, 2, 3), row(4, 5, 6)];
    expect(lastRow(wide, packed(wide, rows, true), 2, true)).toEqual(row(4, 5, 6));
    expect(lastRow(wide, packed(wide, rows, true), 1, true)).toEqual(row(1, 2, 3));
    expect(lastRow(layout, packed(layout, [row(7, 8, 9)], false), 1, false)).toEqual(row(7, 8, 9));
  });
});
