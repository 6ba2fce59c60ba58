// A worker with an engine of its own. It gets a compiled module first, then requests.
import "../../parts/wasm_exec.js";
import { type Answer, type Bytes, type Calls, EngineError, type Request } from "./calls";

/** How much an engine's memory may grow before it is tidied: memory matters more here than time. */
const GARBAGE_PERCENT = "30";

type Failed = { error: string; kind: string };
type Result<T> = T | Failed;

interface Assembly {
  head: Bytes;
  order: string;
  add(entry: Bytes): Result<true>;
  finish(): Result<{ tail: Bytes; sha256: string }>;
}

interface Party {
  key: string;
  secret(): Result<Bytes>;
  publicKey(): Result<Bytes>;
  entry(element: number, level: number): Result<Bytes>;
  assemble(requests: string): Result<Assembly>;
  encrypt(slots: Bytes, level: number): Result<Bytes>;
  decrypt(ciphertext: Bytes): Result<Bytes>;
  refresh(request: Bytes, mostBytes: number): Result<Bytes>;
}

declare class Go {
  env: Record<string, string>;
  importObject: WebAssembly.Imports;
  run(instance: WebAssembly.Instance): Promise<void>;
}

declare const cipherlmEngine: { open(parameters: string, secret: Bytes | null): Result<Party> };

function right<T>(result: Result<T>): T {
  if (typeof result === "object" && result !== null && "error" in result)
    throw new EngineError(result.error, result.kind);
  return result;
}

let party: Party | undefined;
let assembly: Assembly | undefined;

function opened(): Party {
  if (party === undefined) throw new EngineError("no key is open", "V");
  return party;
}

function assembling(): Assembly {
  if (assembly === undefined) throw new EngineError("no keys are put together", "V");
  return assembly;
}

const calls: Calls = {
  open(parameters, secret) {
    party = right(cipherlmEngine.open(parameters, secret));
    return { secret: right(party.secret()), key: party.key };
  },
  publicKey: () => right(opened().publicKey()),
  entry: (element, level) => right(opened().entry(element, level)),
  assemble(requests) {
    assembly = right(opened().assemble(JSON.stringify(requests)));
    return { head: assembly.head, order: JSON.parse(assembly.order) as [number, number][] };
  },
  add(entry) {
    right(assembling().add(entry));
  },
  finish: () => right(assembling().finish()),
  encrypt: (slots, level) => right(opened().encrypt(new Uint8Array(slots.buffer), level)),
  decrypt: (ciphertext) => new Float64Array(right(opened().decrypt(ciphertext)).buffer),
  refresh: (request, mostBytes) => right(opened().refresh(request, mostBytes)),
};

function answer(request: Request): Answer {
  try {
    const call = calls[request.method] as (...args: unknown[]) => unknown;
    return { id: request.id, result: call(...request.args) };
  } catch (error) {
    if (error instanceof EngineError) return { id: request.id, error: error.message, kind: error.kind };
    return { id: request.id, error: error instanceof Error ? error.message : String(error), kind: "I" };
  }
}

let ready: Promise<void> | undefined;

self.onmessage = async (event: MessageEvent<WebAssembly.Module | Request>) => {
  const data = event.data;
  if (data instanceof WebAssembly.Module) {
    const go = new Go();
    go.env = { GOGC: GARBAGE_PERCENT };
    ready = WebAssembly.instantiate(data, go.importObject).then((instance) => void go.run(instance));
    return;
  }
  await ready;
  const answered = answer(data);
  self.postMessage(answered, { transfer: "result" in answered ? buffersOf(answered.result) : [] });
};

/** What can be handed over instead of copied. */
function buffersOf(result: unknown): ArrayBuffer[] {
  const values = typeof result === "object" && result !== null && !ArrayBuffer.isView(result) ? Object.values(result) : [result];
  return values.flatMap((value) => (ArrayBuffer.isView(value) ? [value.buffer as ArrayBuffer] : []));
}
