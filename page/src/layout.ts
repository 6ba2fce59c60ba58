// Hidden states in the slots of a ciphertext: as src/cipherlm/schemes/ckks/layout.py has them.
import type { Layout, Plan } from "./plan";

export type Slots = Float64Array<ArrayBuffer>;

/** Return start and count of what is sent in one evaluation: a text's beginning, then token after token. */
export function* chunks(plan: Plan, start: number, count: number): Generator<[start: number, count: number]> {
  if (count > 0 && start === plan.prefix.length) {
    const first = Math.min(count, plan.layout.room);
    yield [start, first];
    start += first;
    count -= first;
  }
  for (let i = 0; i < count; i++) yield [start + i, 1];
}

/** Return how many tokens a generation evaluates, with those of the prefix, whatever ends its text. */
export function evaluatedTokens(plan: Plan, longest: number): number {
  const behind = Math.ceil(Math.max(longest - 1 - plan.prefix.length, 0) / plan.bucket) * plan.bucket;
  return Math.min(plan.prefix.length + behind, plan.context);
}

/**
 * Return the slots of a chunk's hidden states, a row each; `begins` says whether a text begins with it. Behind
 * such a beginning its last token is repeated: the server does not learn from the ciphertext how many there are.
 */
export function packed(layout: Layout, rows: Slots[], begins: boolean): Slots {
  const side = begins ? layout.tokens : 1;
  const from = begins ? layout.first : 0;
  const block = new Float64Array(layout.period * side);
  for (let token = from; token < side; token++) {
    const row = rows[Math.min(token - from, rows.length - 1)]!;
    for (let feature = 0; feature < layout.width; feature++) block[feature * side + token] = row[feature]!;
  }
  const slots = new Float64Array(layout.slots);
  for (let at = 0; at < slots.length; at += block.length) slots.set(block, at);
  return slots;
}

/** Return the hidden states of the last token of a chunk of `count`. */
export function lastRow(layout: Layout, slots: Slots, count: number, begins: boolean): Slots {
  if (!begins) return slots.slice(0, layout.width);
  const row = new Float64Array(layout.width);
  for (let feature = 0; feature < layout.width; feature++)
    row[feature] = slots[feature * layout.tokens + layout.first + count - 1]!;
  return row;
}
