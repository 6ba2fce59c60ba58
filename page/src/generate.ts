// Continuing a text: every evaluation is the server's, every decision is made here.
import { Engine } from "./engine/pool";
import type { Bytes } from "./engine/calls";
import { EngineError } from "./engine/calls";
import { pause } from "./bytes";
import { PageError, ServerError, SessionLost } from "./errors";
import { evaluatedTokens, lastRow, packed, passes } from "./layout";
import type { Model } from "./model";
import type { Plan } from "./plan";
import type { Session, Watch } from "./session";

/** How often a text is begun anew because a session was lost. */
const MOST_LOSSES = 3;
const PATIENCE = 60_000;

/** What continues texts, and how its session is opened again when it was lost. */
export interface Parties {
  plan: Plan;
  model: Model;
  engine: Engine;
  session(): Promise<Session>;
}

/** What is seen of a generation. */
export interface Listener extends Watch {
  /** The client has encrypted (up) or received (down) a ciphertext. */
  ciphertext(data: Bytes, way: "up" | "down"): void;
  /** An evaluation begins: the server has seen so many tokens of those that it will see. */
  begins(seen: number, total: number): void;
  evaluated(): void;
  token(token: number): void;
  /** The text has ended. What is evaluated from here on nobody reads. */
  ended(): void;
  lost(): void;
  /** Milliseconds that this machine has computed. */
  worked(milliseconds: number): void;
}

/**
 * Continue a prompt by at most so many tokens, greedily. The server is asked until the budget is reached,
 * whatever ends the text: when it ends, and how long it is, the server does not learn. `reading` says whether
 * anybody still reads; `signal` breaks off, which the server sees.
 */
export async function generate(
  parties: Parties,
  prompt: number[],
  most: number,
  ends: (token: number) => boolean,
  reading: () => boolean,
  listener: Listener,
  signal: AbortSignal,
): Promise<void> {
  const { plan } = parties;
  const prefix = plan.prefix.length;
  const room = plan.context - prefix;
  if (prompt.length === 0) throw new PageError("there is no text to continue");
  if (prompt.length + most - 1 > room)
    throw new PageError(
      `${prompt.length} tokens of text and ${most} of answer are more than the ${room + 1} that this model has room for`,
    );
  const tokens = [...prompt];
  const total = evaluatedTokens(plan, prefix + prompt.length + most) - prefix;
  const text = new Text(parties, listener, signal, total);
  let written = 0;
  let ended = false;
  while (text.seen < total) {
    const next = await text.read(tokens);
    if (!ended && written < most && reading()) {
      tokens.push(next);
      written += 1;
      if (ends(next)) {
        ended = true;
      } else {
        listener.token(next);
        ended = written === most;
      }
      if (ended) listener.ended();
    } else {
      if (!ended) listener.ended();
      ended = true;
      tokens.push(tokens.at(-1)!);
    }
  }
}

/** A text at the server: how many of its tokens it has seen. */
class Text {
  seen = 0;
  private losses = 0;

  constructor(
    private readonly parties: Parties,
    private readonly listener: Listener,
    private readonly signal: AbortSignal,
    private readonly total: number,
  ) {}

  /** Have all tokens evaluated that were not yet, as far as the budget goes; return the one that follows. */
  async read(tokens: number[]): Promise<number> {
    const known = tokens.slice(0, this.total);
    for (;;) {
      const session = await this.parties.session();
      try {
        return await this.evaluate(session, known);
      } catch (error) {
        // A new session remembers nothing: the text begins anew.
        if (!(error instanceof SessionLost) || this.losses === MOST_LOSSES) throw error;
        this.losses += 1;
        this.seen = 0;
        this.listener.lost();
      }
    }
  }

  private async evaluate(session: Session, tokens: number[]): Promise<number> {
    const { plan, model, engine } = this.parties;
    const prefix = plan.prefix.length;
    let next = 0;
    for (const pass of passes(plan, prefix + this.seen, tokens.length - this.seen)) {
      this.listener.begins(this.seen, this.total);
      const inputs: Bytes[] = [];
      for (const { start, count, place } of pass) {
        const some = tokens.slice(start - prefix, start - prefix + count);
        const slots = packed(
          plan.layout,
          some.map((token, i) => model.embed(token, start + i)),
          place,
        );
        const input = await this.timed(engine.call("encrypt", slots, plan.layout.level));
        this.listener.ciphertext(input, "up");
        inputs.push(input);
      }
      const start = pass[0]!.start;
      const count = pass.reduce((sum, chunk) => sum + chunk.count, 0);
      const outputs = await this.patiently(() =>
        session.evaluate(plan.module, start, count, inputs, (r) => this.refresh(r), this.listener, this.signal),
      );
      if (outputs.length !== pass.length)
        throw new PageError(`the server sent ${outputs.length} results, and ${pass.length} were expected`);
      for (const output of outputs) this.listener.ciphertext(output, "down");
      // The token that follows the last is all that a text needs.
      const last = pass.at(-1)!;
      const hidden = await this.timed(engine.call("decrypt", outputs.at(-1)!)).catch((error: unknown) => {
        throw engineProblem(error, "the server sent no result that can be decrypted");
      });
      const began = performance.now();
      next = model.next(lastRow(plan.layout, hidden, last.count, last.place));
      this.listener.worked(performance.now() - began);
      this.seen += count;
      this.listener.evaluated();
    }
    return next;
  }

  /** Ask a server again whose queue is full: it has computed nothing. */
  private async patiently<T>(ask: () => Promise<T>): Promise<T> {
    const since = Date.now();
    for (let wait = 500; ; wait = Math.min(2 * wait, 10_000)) {
      try {
        return await ask();
      } catch (error) {
        const full = error instanceof ServerError && error.code === "busy" && error.retry;
        if (!full || Date.now() - since + wait > PATIENCE) throw error;
        await pause(wait, this.signal);
      }
    }
  }

  private async refresh(request: Bytes): Promise<Bytes> {
    const { engine, plan } = this.parties;
    return this.timed(engine.call("refresh", request, plan.message_bytes)).catch((error: unknown) => {
      throw engineProblem(error, "the server sent no ciphertexts that can be refreshed, or too many");
    });
  }

  private async timed<T>(work: Promise<T>): Promise<T> {
    const began = performance.now();
    try {
      return await work;
    } finally {
      this.listener.worked(performance.now() - began);
    }
  }
}

/** An engine's refusal of what the server sent depends on its form alone; anything else is the page's fault. */
function engineProblem(error: unknown, text: string): unknown {
  return error instanceof EngineError && error.kind !== "I" ? new PageError(text) : error;
}
