/** What a page is made for: `cipherlm page` writes it (src/cipherlm/serving/page.py). */
export interface Plan {
  format: "cipherlm-page";
  version: 1;
  /** The model's name, for people. */
  name: string;
  /** What stands for the server's weights and parameters. */
  fingerprint: string;
  /** The module that the server evaluates. */
  module: string;
  /** Servers to choose from; "" is where the page comes from. */
  servers: string[];
  /** Whether another server may be typed in. */
  any_server: boolean;
  /** The scheme's parameters, as the engine takes them. */
  parameters: Record<string, unknown>;
  /** Evaluation keys that the server needs: Galois element (0: relinearisation) and level. */
  keys: [element: number, level: number][];
  layout: Layout;
  /** Public token ids before every text, and how many positions there are with them. */
  prefix: number[];
  context: number;
  /** How many ciphertexts of a prompt go in one evaluation. */
  chunks: number;
  /** Lengths are rounded up to a multiple of it. */
  bucket: number;
  /** Texts that a key serves. */
  key_budget: number;
  /** What the server may ask for in one evaluation. */
  rounds: number;
  message_bytes: number;
  model: ModelPlan;
  text: TextPlan;
  /** The model's files, by name. */
  files: Record<string, { sha256: string; bytes: number }>;
  /** The page's own files, with the hashes that they must have (subresource integrity). */
  assets: Record<string, string>;
}

/** Where hidden states lie in the slots of a ciphertext. */
export interface Layout {
  slots: number;
  /** After how many features they repeat. */
  period: number;
  /** Tokens side by side in a prompt's ciphertext. */
  tokens: number;
  /** The place of a text's first private token among them. */
  first: number;
  /** Features of hidden states. */
  width: number;
  /** The level to encrypt at. */
  level: number;
}

/** What the client computes itself, by names in `model.safetensors`. */
export interface ModelPlan {
  embedding: string;
  positions: string | null;
  norm: { kind: "layer" | "rms"; weight: string; bias: string | null; epsilon: number };
  /** The output layer, or null where it is the embedding once more. */
  head: string | null;
  /** Whether hidden states go to the server without their mean. */
  centred: boolean;
}

export interface TextPlan {
  /** Tokens that end a text. */
  end: number[];
  /** The chat template, where the model has one. */
  template: string | null;
  /** Special tokens that the template may name. */
  tokens: Record<string, string>;
}

/** Say what is wrong with something that should be a plan; undefined for a right one. */
export function planProblem(value: unknown): string | undefined {
  const plan = value as Partial<Plan> | null;
  if (typeof plan !== "object" || plan === null || plan.format !== "cipherlm-page") return "page.json is damaged";
  if (plan.version !== 1) return "page.json is of another version: write the page again with `cipherlm page`";
  return undefined;
}
