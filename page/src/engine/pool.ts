// Engines in workers, and what all of them need.
import { PageError } from "../errors";
import { type Answer, type Bytes, type Calls, EngineError, type Method } from "./calls";

/** Engines that make keys at once: each takes memory. */
const MOST_WORKERS = 4;

/** How engines are started: a compiled module, and a function that starts a worker. */
export interface Engines {
  module: WebAssembly.Module;
  start(): Worker;
}

/** An engine in a worker. What is asked of it is answered in turn. */
export class Engine {
  private readonly waiting = new Map<number, { resolve(value: unknown): void; reject(error: Error): void }>();
  private readonly worker: Worker;
  private next = 0;
  private ended: Error | undefined;

  constructor(engines: Engines) {
    this.worker = engines.start();
    this.worker.onmessage = (event: MessageEvent<Answer>) => this.answered(event.data);
    this.worker.onerror = () => this.end(new PageError("an engine has stopped: reload the page"));
    this.worker.postMessage(engines.module);
  }

  call<M extends Method>(method: M, ...args: Parameters<Calls[M]>): Promise<ReturnType<Calls[M]>> {
    if (this.ended !== undefined) return Promise.reject(this.ended);
    const id = this.next++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve: resolve as (value: unknown) => void, reject });
      this.worker.postMessage({ id, method, args });
    });
  }

  end(error: Error = new PageError("the engine was ended")): void {
    this.ended ??= error;
    this.worker.terminate();
    for (const { reject } of this.waiting.values()) reject(this.ended);
    this.waiting.clear();
  }

  private answered(answer: Answer): void {
    const waiting = this.waiting.get(answer.id);
    this.waiting.delete(answer.id);
    if ("error" in answer) waiting?.reject(new EngineError(answer.error, answer.kind));
    else waiting?.resolve(answer.result);
  }
}

/** What a new key consists of. */
export interface NewKeys {
  secret: Bytes;
  publicKey: Bytes;
  evaluation: { bytes: number; sha256: string };
}

/**
 * Make keys on several engines, and hand out the bytes of the evaluation keys piece by piece, in order.
 * No more than a few pieces are in memory at a time.
 */
export async function makeKeys(
  engines: Engines,
  parameters: string,
  requests: [number, number][],
  take: (piece: Bytes) => Promise<void>,
  report: (done: number, total: number) => void,
): Promise<NewKeys> {
  const count = Math.max(1, Math.min(navigator.hardwareConcurrency || 2, MOST_WORKERS));
  const workers = Array.from({ length: count }, () => new Engine(engines));
  try {
    const first = workers[0]!;
    const { secret } = await first.call("open", parameters, null);
    await Promise.all(workers.slice(1).map((worker) => worker.call("open", parameters, secret)));
    const { head, order } = await first.call("assemble", requests);
    let bytes = 0;
    const keep = async (piece: Bytes) => {
      bytes += piece.length;
      await take(piece);
    };
    await keep(head);

    // Each engine takes the next key that nobody has; pieces wait until those before them are there.
    const pieces = new Map<number, Bytes>();
    let begun = 0;
    let added = 0;
    let adding = Promise.resolve();
    const add = async () => {
      for (let piece = pieces.get(added); piece !== undefined; piece = pieces.get(added)) {
        pieces.delete(added);
        added += 1;
        await Promise.all([first.call("add", piece), keep(piece)]);
        report(added, order.length);
      }
    };
    report(0, order.length);
    await Promise.all(
      workers.map(async (worker) => {
        while (begun < order.length) {
          const index = begun++;
          pieces.set(index, await worker.call("entry", ...order[index]!));
          adding = adding.then(add);
          await adding;
        }
      }),
    );
    const { tail, sha256 } = await first.call("finish");
    await keep(tail);
    return { secret, publicKey: await first.call("publicKey"), evaluation: { bytes, sha256 } };
  } finally {
    for (const worker of workers) worker.end();
  }
}
