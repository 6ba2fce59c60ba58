// What the client computes itself: embeddings before the server's blocks, the output layer behind them.
import type { Slots } from "./layout";
import type { Plan } from "./plan";
import { PageError } from "./errors";
import { readSafetensors, type Tensor } from "./safetensors";

/** Larger hidden states are of no model: a server has made them up, to see whether the client fails. */
const LARGEST = 2 ** 20;

export class Model {
  private readonly embedding: Tensor;
  private readonly positions: Tensor | undefined;
  private readonly head: Tensor;
  private readonly weight: Float64Array;
  private readonly bias: Float64Array | undefined;
  private readonly width: number;

  constructor(
    private readonly plan: Plan,
    weights: ArrayBuffer,
  ) {
    const tensors = readSafetensors(weights, "model.safetensors");
    this.width = plan.layout.width;
    const get = (name: string, ...ends: number[]): Tensor => {
      const found = tensors.get(name);
      if (found === undefined || ends.some((end, i) => found.shape.at(-ends.length + i) !== end))
        throw new PageError(`${name} is missing or of another shape: the model's files do not fit the page`);
      return found;
    };
    const vector = (name: string): Float64Array => {
      const values = new Float64Array(this.width);
      get(name, this.width).row(0, values);
      return values;
    };
    const { model } = plan;
    this.embedding = get(model.embedding, this.width);
    this.positions = model.positions === null ? undefined : get(model.positions, this.width);
    this.head = model.head === null ? this.embedding : get(model.head, this.width);
    this.weight = vector(model.norm.weight);
    this.bias = model.norm.bias === null ? undefined : vector(model.norm.bias);
  }

  /** Return the hidden states of a token, as they go to the server. */
  embed(token: number, position: number): Slots {
    const row = new Float64Array(this.width);
    this.embedding.row(token, row);
    if (this.positions !== undefined) {
      const shift = new Float64Array(this.width);
      this.positions.row(position, shift);
      for (let i = 0; i < this.width; i++) row[i] = Math.fround(row[i]! + shift[i]!);
    }
    return this.plan.model.centred ? centred(row) : row;
  }

  /** Return the token that is most likely to follow hidden states. Whatever they are, it is one of the model's. */
  next(hidden: Slots): number {
    const x = this.normalized(hidden);
    const row = new Float64Array(this.width);
    let best = 0;
    let greatest = -Infinity;
    for (let token = 0; token < this.head.shape[0]!; token++) {
      this.head.row(token, row);
      let logit = 0;
      for (let i = 0; i < this.width; i++) logit += x[i]! * row[i]!;
      if (logit > greatest) {
        greatest = logit;
        best = token;
      }
    }
    return best;
  }

  private normalized(hidden: Slots): Float64Array {
    const { kind, epsilon } = this.plan.model.norm;
    const bounded = hidden.map((value) => (Number.isNaN(value) ? 0 : Math.max(-LARGEST, Math.min(LARGEST, value))));
    const x = kind === "layer" ? centred(bounded) : bounded;
    const square = x.reduce((sum, value) => sum + value * value, 0) / this.width;
    const factor = 1 / Math.sqrt(square + epsilon);
    return x.map((value, i) => value * factor * this.weight[i]! + (this.bias?.[i] ?? 0));
  }
}

function centred(row: Slots): Slots {
  const mean = row.reduce((sum, value) => sum + value, 0) / row.length;
  return row.map((value) => value - mean);
}
