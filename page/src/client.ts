// A client of one server: keys, uploads and sessions, from a choice of server to a text that goes on.
import { pause } from "./bytes";
import type { Engines } from "./engine/pool";
import { ConnectionFailed, PageError, ServerError } from "./errors";
import { generate, type Listener } from "./generate";
import { KeyRing, type OpenKeys } from "./keys";
import type { Model } from "./model";
import type { Plan } from "./plan";
import { mayPass, Server, type Traffic } from "./server";
import { Session } from "./session";
import type { KeyRecord, Store } from "./store";

const PATIENCE = 60_000;
/** For a server that was just chosen: somebody waits to hear that it is the wrong one. */
const FIRST_PATIENCE = 5_000;

export class Client {
  readonly ring: KeyRing;
  private keys: OpenKeys | undefined;
  private session: Session | undefined;
  private messageBytes = 0;

  constructor(
    readonly plan: Plan,
    readonly server: Server,
    private readonly store: Store,
    engines: Engines,
    private readonly model: Model,
    private readonly traffic: Traffic,
    /** Shows an upload. */
    private readonly uploading: (received: number, size: number) => void,
  ) {
    this.ring = new KeyRing(plan, store, engines, server.identity);
  }

  /** Check that the server is there and hosts the model. */
  async check(): Promise<void> {
    this.messageBytes = await this.server.describe(this.plan, undefined, FIRST_PATIENCE);
  }

  /** Use keys from now on. */
  async use(record: KeyRecord, passphrase: string): Promise<void> {
    const opened = await this.ring.open(record, passphrase);
    this.leave();
    this.keys = opened;
  }

  /** The keys that are used. */
  get record(): KeyRecord | undefined {
    return this.keys?.record;
  }

  /** Open a session, with an upload first where the server lacks the keys. */
  async connect(signal?: AbortSignal): Promise<Session> {
    if (this.session !== undefined && !this.session.over) return this.session;
    const since = Date.now();
    for (let wait = 500; ; wait = Math.min(2 * wait, 10_000)) {
      try {
        return (this.session = await this.opened(signal));
      } catch (error) {
        if (!mayPass(error) || Date.now() - since + wait > PATIENCE) throw error;
        await pause(wait, signal);
      }
    }
  }

  /** Note a text that is about to be generated; false if the keys are spent. */
  async spend(): Promise<boolean> {
    return this.store.spend(this.used().record.id, this.plan.key_budget);
  }

  async generate(
    prompt: number[],
    most: number,
    ends: (token: number) => boolean,
    reading: () => boolean,
    listener: Listener,
    signal: AbortSignal,
  ): Promise<void> {
    const parties = {
      plan: this.plan,
      model: this.model,
      engine: this.used().engine,
      session: () => this.connect(signal),
    };
    await generate(parties, prompt, most, ends, reading, listener, signal);
  }

  /** Close the session and forget the keys in memory. */
  leave(): void {
    this.session?.close();
    this.session = undefined;
    this.keys?.engine.end();
    this.keys = undefined;
  }

  private used(): OpenKeys {
    if (this.keys === undefined) throw new PageError("no keys are open");
    return this.keys;
  }

  private async opened(signal?: AbortSignal): Promise<Session> {
    try {
      return await this.open();
    } catch (error) {
      // A browser does not tell why a WebSocket was refused; over HTTP the server says it.
      if (error instanceof ConnectionFailed) await this.server.describe(this.plan, signal);
      if (!(error instanceof ServerError) || error.code !== "unknown_keys") throw error;
      await this.upload(signal);
      return this.open();
    }
  }

  private open(): Promise<Session> {
    const { record } = this.used();
    const keys = { evaluation: record.evaluation.sha256, public: record.publicSha256 };
    const bounds = { messageBytes: this.messageBytes, rounds: this.plan.rounds };
    return Session.open(this.server, this.plan.fingerprint, keys, bounds, this.traffic);
  }

  private async upload(signal?: AbortSignal): Promise<void> {
    const { record } = this.used();
    const evaluation = await this.store.evaluation(record);
    await this.server.upload("evaluation", evaluation, record.evaluation.sha256, this.uploading, signal);
    const publicKey = new Blob([record.publicKey]);
    await this.server.upload("public", publicKey, record.publicSha256, () => undefined, signal);
  }
}
