// Which keys are used with a server: some that belong to it and are not spent, or new ones.
import { hex, sha256 } from "./bytes";
import type { Bytes } from "./engine/calls";
import { EngineError } from "./engine/calls";
import { Engine, type Engines, makeKeys } from "./engine/pool";
import { PageError } from "./errors";
import type { Plan } from "./plan";
import { seal, unseal } from "./secret";
import type { KeyRecord, Store } from "./store";

/** Keys that are open: a record, and the engine that holds the secret key. */
export interface OpenKeys {
  record: KeyRecord;
  engine: Engine;
}

export class KeyRing {
  constructor(
    private readonly plan: Plan,
    private readonly store: Store,
    private readonly engines: Engines,
    /** The identity of the server that the keys are for. */
    private readonly server: string,
  ) {}

  /** Return keys that belong to the server's model and are not spent, and whether others were spent. */
  async existing(): Promise<{ record: KeyRecord | undefined; spent: boolean }> {
    const all = await this.store.keys(this.server, this.plan.fingerprint);
    const record = all.find((one) => one.texts < this.plan.key_budget);
    return { record, spent: record === undefined && all.length > 0 };
  }

  /** Return new keys, or those that another tab has made meanwhile. Spent keys are deleted. */
  async make(passphrase: string, report: (done: number, total: number) => void): Promise<KeyRecord> {
    return navigator.locks.request("cipherlm-keys", async () => {
      const { record } = await this.existing();
      if (record !== undefined) return record;
      await this.store.removeUnfinished();
      const made = await this.made(passphrase, report);
      for (const old of await this.store.keys(this.server, this.plan.fingerprint))
        if (old.id !== made.id) await this.store.remove(old.id);
      return made;
    });
  }

  /** Open keys. Raises WrongPassphrase, and PageError for keys that are damaged. */
  async open(record: KeyRecord, passphrase: string): Promise<OpenKeys> {
    const secret = await unseal(record.secret, passphrase, about(record));
    const engine = new Engine(this.engines);
    try {
      await engine.call("open", JSON.stringify(this.plan.parameters), secret);
    } catch (error) {
      engine.end();
      if (error instanceof EngineError && error.kind !== "I")
        throw new PageError("the keys in this browser are damaged: delete them and make new ones");
      throw error;
    }
    return { record, engine };
  }

  private async made(passphrase: string, report: (done: number, total: number) => void): Promise<KeyRecord> {
    const id = hex(crypto.getRandomValues(new Uint8Array(16)));
    await navigator.storage?.persist?.();
    try {
      let pieces = 0;
      const take = (piece: Bytes) => this.store.putPiece(id, pieces++, piece);
      const parameters = JSON.stringify(this.plan.parameters);
      const keys = await makeKeys(this.engines, parameters, this.plan.keys, take, report);
      const named = { id, server: this.server, fingerprint: this.plan.fingerprint };
      const record: KeyRecord = {
        ...named,
        secret: await seal(keys.secret, passphrase, about(named)),
        publicKey: keys.publicKey,
        publicSha256: await sha256(keys.publicKey),
        evaluation: { ...keys.evaluation, pieces },
        texts: 0,
        made: Date.now(),
      };
      await this.store.putKey(record);
      return record;
    } catch (error) {
      await this.store.remove(id).catch(() => undefined);
      throw error;
    }
  }
}

/** What is authenticated with a secret key: whose it is. */
function about(record: Pick<KeyRecord, "id" | "server" | "fingerprint">): string {
  return JSON.stringify([record.id, record.server, record.fingerprint]);
}
