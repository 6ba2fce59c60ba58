// Hidden states in the slots of a ciphertext: as src/cipherlm/schemes/ckks/layout.py has them.
import type { Layout, Plan } from "./plan";

export type Slots = Float64Array<ArrayBuffer>;

/** What is in one ciphertext: `count` tokens from `start` on. */
export interface Chunk {
  start: number;
  count: number;
  /** The place of the first token among those side by side; null for a token that goes alone. */
  place: number | null;
}

/**
 * Yield what is sent of `count` tokens from `start` on. A text's first go together. Behind them only full chunks
 * do, and what is left goes token by token: so the end of a prompt looks like the tokens that are generated.
 */
export function* chunks(plan: Plan, start: number, count: number): Generator<Chunk> {
  const { first, tokens } = plan.layout;
  for (const end = start + count; start < end; ) {
    const begins = start === plan.prefix.length;
    const place = begins ? first : 0;
    const room = tokens - place;
    const size = begins ? Math.min(end - start, room) : end - start < room ? 1 : room;
    yield { start, count: size, place: size === 1 && !begins ? null : place };
    start += size;
  }
}

/** Yield the chunks of each evaluation: those of a prompt go together, as many as the server takes. */
export function* passes(plan: Plan, start: number, count: number): Generator<Chunk[]> {
  // Behind a prompt, chunks may lie across groups of keys in the server's cache: those go one by one.
  const most = start === plan.prefix.length ? plan.chunks : 1;
  let together: Chunk[] = [];
  for (const chunk of chunks(plan, start, count)) {
    if (together.length > 0 && (together.length === most || chunk.place === null)) {
      yield together;
      together = [];
    }
    together.push(chunk);
  }
  if (together.length > 0) yield together;
}

/** Return how many tokens a generation evaluates, with those of the prefix, whatever ends its text. */
export function evaluatedTokens(plan: Plan, longest: number): number {
  const behind = Math.ceil(Math.max(longest - 1 - plan.prefix.length, 0) / plan.bucket) * plan.bucket;
  return Math.min(plan.prefix.length + behind, plan.context);
}

/**
 * Return the slots of a chunk's hidden states, a row each, the first at a place. Behind its last token that is
 * repeated: the server does not learn from the ciphertext how many there are.
 */
export function packed(layout: Layout, rows: Slots[], place: number | null): Slots {
  const side = place === null ? 1 : layout.tokens;
  const from = place ?? 0;
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
export function lastRow(layout: Layout, slots: Slots, count: number, place: number | null): Slots {
  if (place === null) return slots.slice(0, layout.width);
  const row = new Float64Array(layout.width);
  for (let feature = 0; feature < layout.width; feature++)
    row[feature] = slots[feature * layout.tokens + place + count - 1]!;
  return row;
}
