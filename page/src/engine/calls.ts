// What a worker with an engine is asked, and answers.

export type Bytes = Uint8Array<ArrayBuffer>;

/** The party that a worker is: see engine/web/party.go. */
export interface Calls {
  /** Take a secret key, or make one; return it. */
  open(parameters: string, secret: Bytes | null): { secret: Bytes; key: string };
  publicKey(): Bytes;
  /** Make one evaluation key. Element 0 stands for the relinearisation key. */
  entry(element: number, level: number): Bytes;
  /** Begin to put evaluation keys together; return the bytes before them, and their order. */
  assemble(requests: [number, number][]): { head: Bytes; order: [number, number][] };
  add(entry: Bytes): void;
  /** Return the bytes behind the keys, and the SHA-256 of everything. */
  finish(): { tail: Bytes; sha256: string };
  encrypt(slots: Float64Array<ArrayBuffer>, level: number): Bytes;
  decrypt(ciphertext: Bytes): Float64Array<ArrayBuffer>;
  refresh(request: Bytes, mostBytes: number): Bytes;
}

export type Method = keyof Calls;

export type Request = { [M in Method]: { id: number; method: M; args: Parameters<Calls[M]> } }[Method];

/** `kind` is the engine's kind of error: engine/core/errors.go. */
export type Answer = { id: number; result: unknown } | { id: number; error: string; kind: string };

/** An error of the engine. Its text tells the form of what it was given, never the content. */
export class EngineError extends Error {
  override name = "EngineError";

  constructor(
    message: string,
    readonly kind: string,
  ) {
    super(message);
  }
}
