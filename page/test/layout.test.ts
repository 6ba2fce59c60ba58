import { describe, expect, test } from "vitest";
import { chunks, lastRow, packed, passes, type Slots } from "../src/layout";
import type { Layout, Plan } from "../src/plan";

// 3 features with a period of 4, 2 tokens side by side of which the first is public.
const layout: Layout = { slots: 16, period: 4, tokens: 2, first: 1, width: 3, level: 4 };
const row = (...values: number[]) => Float64Array.from(values) as Slots;

describe("chunks", () => {
  const plan = (tokens: number, first: number, prefix: number) =>
    ({ prefix: Array.from({ length: prefix }, () => 0), layout: { ...layout, tokens, first } }) as unknown as Plan;
  const sent = (...args: Parameters<typeof chunks>) =>
    Array.from(chunks(...args), ({ start, count, place }) => [start, count, place]);

  test("a prompt goes in chunks, and what does not fill one token by token", () => {
    expect(sent(plan(4, 1, 1), 1, 9)).toEqual([[1, 3, 1], [4, 4, 0], [8, 1, null], [9, 1, null]]);
    expect(sent(plan(4, 1, 1), 1, 2)).toEqual([[1, 2, 1]]);
    expect(sent(plan(4, 0, 24), 24, 5)).toEqual([[24, 4, 0], [28, 1, null]]);
  });

  test("those of a prompt go together, as many as the server takes", () => {
    const together = (...args: Parameters<typeof passes>) =>
      Array.from(passes(...args), (pass) => pass.map(({ start }) => start));
    const limited = { ...plan(4, 1, 1), chunks: 2 };
    expect(together(limited, 1, 16)).toEqual([[1, 4], [8, 12], [16]]);
    expect(together(limited, 1, 5)).toEqual([[1], [4], [5]]);
    // Where a text goes on, chunks need not be in line with those before them.
    expect(together(limited, 6, 9)).toEqual([[6], [10], [14]]);
  });

  test("one token behind others goes alone, and the first of a text does not", () => {
    expect(sent(plan(4, 1, 1), 5, 1)).toEqual([[5, 1, null]]);
    expect(sent(plan(4, 1, 1), 1, 1)).toEqual([[1, 1, 1]]);
  });
});

describe("slots", () => {
  test("a text begins with its tokens side by side, which repeat with the features", () => {
    const block = [0, 1, 0, 2, 0, 3, 0, 0];
    expect(Array.from(packed(layout, [row(1, 2, 3)], 1))).toEqual([...block, ...block]);
  });

  test("its last token stands in for those that it lacks", () => {
    const wide = { ...layout, tokens: 4 };
    expect(Array.from(packed(wide, [row(1, 2, 3), row(4, 5, 6)], 1))).toEqual([
      ...[0, 1, 4, 4],
      ...[0, 2, 5, 5],
      ...[0, 3, 6, 6],
      ...[0, 0, 0, 0],
    ]);
  });

  test("a token behind it is alone", () => {
    const block = [1, 2, 3, 0];
    expect(Array.from(packed(layout, [row(1, 2, 3)], null))).toEqual([...block, ...block, ...block, ...block]);
  });

  test("what comes back is read where it was put", () => {
    const wide = { ...layout, tokens: 4 };
    const rows = [row(1, 2, 3), row(4, 5, 6)];
    expect(lastRow(wide, packed(wide, rows, 1), 2, 1)).toEqual(row(4, 5, 6));
    expect(lastRow(wide, packed(wide, rows, 1), 1, 1)).toEqual(row(1, 2, 3));
    expect(lastRow(layout, packed(layout, [row(7, 8, 9)], null), 1, null)).toEqual(row(7, 8, 9));
  });
});
