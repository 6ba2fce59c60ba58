// What stays in the browser: keys, how they were used, and the model's files.
import { type DBSchema, type IDBPDatabase, openDB } from "idb";
import type { Bytes } from "./engine/calls";
import { PageError } from "./errors";

/** A secret key under a passphrase, or in the clear. */
export type Kept = { clear: Bytes } | { salt: Bytes; iterations: number; iv: Bytes; sealed: Bytes };

export interface KeyRecord {
  id: string;
  /** Which server and model the key belongs to. */
  server: string;
  fingerprint: string;
  secret: Kept;
  publicKey: Bytes;
  publicSha256: string;
  evaluation: { bytes: number; sha256: string; pieces: number };
  /** Texts that it has served. */
  texts: number;
  made: number;
}

interface Schema extends DBSchema {
  keys: { key: string; value: KeyRecord; indexes: { server: [string, string] } };
  pieces: { key: [string, number]; value: Blob };
  files: { key: string; value: Blob };
}

export class Store {
  private constructor(private readonly database: IDBPDatabase<Schema>) {}

  static async open(name = "cipherlm"): Promise<Store> {
    try {
      const database = await openDB<Schema>(name, 1, {
        upgrade(db) {
          db.createObjectStore("keys", { keyPath: "id" }).createIndex("server", ["server", "fingerprint"]);
          db.createObjectStore("pieces");
          db.createObjectStore("files");
        },
      });
      return new Store(database);
    } catch {
      throw new PageError("this browser keeps nothing for the page: allow it to store data, or leave private mode");
    }
  }

  /** Return the keys of a server's model, newest first. */
  async keys(server: string, fingerprint: string): Promise<KeyRecord[]> {
    const found = await this.database.getAllFromIndex("keys", "server", [server, fingerprint]);
    return found.sort((a, b) => b.made - a.made);
  }

  /** Keep a piece of evaluation keys that are being made. */
  async putPiece(id: string, index: number, piece: Bytes): Promise<void> {
    await this.kept(this.database.put("pieces", new Blob([piece]), [id, index]));
  }

  /** Keep a key, whose pieces are there. */
  async putKey(record: KeyRecord): Promise<void> {
    await this.kept(this.database.put("keys", record));
  }

  /** Return the evaluation keys as one blob, without reading them. */
  async evaluation(record: KeyRecord): Promise<Blob> {
    const pieces = await this.database.getAll("pieces", IDBKeyRange.bound([record.id, 0], [record.id, Infinity]));
    const blob = new Blob(pieces);
    if (pieces.length !== record.evaluation.pieces || blob.size !== record.evaluation.bytes)
      throw new PageError("the keys in this browser are damaged: delete them and make new ones");
    return blob;
  }

  /**
   * Note a text that is about to be generated; return false, and note nothing, if the key is spent. Other
   * tabs wait for the transaction.
   */
  async spend(id: string, budget: number): Promise<boolean> {
    const transaction = this.database.transaction("keys", "readwrite");
    const record = await transaction.store.get(id);
    if (record === undefined) throw new PageError("the keys were deleted, in another tab perhaps: reload the page");
    const spent = !(record.texts < budget);
    if (!spent) await transaction.store.put({ ...record, texts: record.texts + 1 });
    await transaction.done;
    return !spent;
  }

  /** Delete a key with its pieces, or pieces that no key has. */
  async remove(id: string): Promise<void> {
    const transaction = this.database.transaction(["keys", "pieces"], "readwrite");
    await transaction.objectStore("keys").delete(id);
    await transaction.objectStore("pieces").delete(IDBKeyRange.bound([id, 0], [id, Infinity]));
    await transaction.done;
  }

  /** Delete pieces of keys that were never finished: a tab was closed meanwhile. */
  async removeUnfinished(): Promise<void> {
    const finished = new Set(await this.database.getAllKeys("keys"));
    const begun = new Set((await this.database.getAllKeys("pieces")).map(([id]) => id));
    for (const id of begun) if (!finished.has(id)) await this.remove(id);
  }

  async file(sha256: string): Promise<Blob | undefined> {
    return this.database.get("files", sha256);
  }

  async putFile(sha256: string, file: Blob): Promise<void> {
    await this.kept(this.database.put("files", file, sha256));
  }

  async removeFile(sha256: string): Promise<void> {
    await this.database.delete("files", sha256);
  }

  private async kept(written: Promise<unknown>): Promise<void> {
    try {
      await written;
    } catch (error) {
      if (error instanceof DOMException && error.name === "QuotaExceededError")
        throw new PageError("there is no room for the keys in this browser: free some space and try again");
      throw error;
    }
  }
}
