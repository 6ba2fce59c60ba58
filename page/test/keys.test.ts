import "fake-indexeddb/auto";
import { describe, expect, test } from "vitest";
import type { Bytes } from "../src/engine/calls";
import { PageError } from "../src/errors";
import { seal, unseal, WrongPassphrase } from "../src/secret";
import { identity, serverUrl } from "../src/server";
import { type KeyRecord, Store } from "../src/store";

const secret = crypto.getRandomValues(new Uint8Array(100)) as Bytes;

describe("a secret key that is kept", () => {
  test("is in the clear without a passphrase", async () => {
    expect(await unseal(await seal(secret, "", "whose"), "", "whose")).toEqual(secret);
  });

  test("opens with its passphrase only, in whatever form it is typed, and as whose it is", async () => {
    const kept = await seal(secret, "caf\u00e9", "whose");
    expect(JSON.stringify(kept)).not.toContain(JSON.stringify(Array.from(secret)).slice(1, 30));
    expect(await unseal(kept, "cafe\u0301", "whose")).toEqual(secret);
    await expect(unseal(kept, "cafe", "whose")).rejects.toThrow(WrongPassphrase);
    await expect(unseal(kept, "", "whose")).rejects.toThrow(WrongPassphrase);
    await expect(unseal(kept, "caf\u00e9", "whose else")).rejects.toThrow(WrongPassphrase);
    if (!("sealed" in kept)) throw new Error("in the clear");
    kept.sealed[5]! ^= 1;
    await expect(unseal(kept, "caf\u00e9", "whose")).rejects.toThrow(WrongPassphrase);
  });

  test("never has the same salt or nonce twice", async () => {
    const [one, two] = [await seal(secret, "x", ""), await seal(secret, "x", "")];
    if (!("sealed" in one && "sealed" in two)) throw new Error("in the clear");
    expect(one.salt).not.toEqual(two.salt);
    expect(one.iv).not.toEqual(two.iv);
  });
});

function record(id: string, changed: Partial<KeyRecord> = {}): KeyRecord {
  return {
    id,
    server: "https://a:443",
    fingerprint: "f",
    secret: { clear: secret },
    publicKey: secret,
    publicSha256: "",
    evaluation: { bytes: 3, sha256: "", pieces: 2 },
    texts: 0,
    made: 0,
    ...changed,
  };
}

describe("the store", () => {
  test("finds a server's keys for a model, the newest first", async () => {
    const store = await Store.open("finding");
    await store.putKey(record("old"));
    await store.putKey(record("new", { made: 1 }));
    await store.putKey(record("other server", { server: "https://b:443" }));
    await store.putKey(record("other model", { fingerprint: "g" }));
    expect((await store.keys("https://a:443", "f")).map((key) => key.id)).toEqual(["new", "old"]);
  });

  test("counts texts up to the budget, whoever asks at the same time", async () => {
    const store = await Store.open("counting");
    await store.putKey(record("k"));
    const granted = await Promise.all(Array.from({ length: 8 }, () => store.spend("k", 5)));
    expect(granted.filter(Boolean).length).toBe(5);
    expect((await store.keys("https://a:443", "f"))[0]!.texts).toBe(5);
    await store.remove("k");
    await expect(store.spend("k", 5)).rejects.toThrow(PageError);
  });

  test("deletes pieces of keys that were never finished, and no other ones", async () => {
    const store = await Store.open("cleaning");
    const piece = new Uint8Array(1) as Bytes;
    await store.putPiece("begun", 0, piece);
    await store.putPiece("k", 0, piece);
    await store.putPiece("k", 1, piece);
    await store.putKey(record("k", { evaluation: { bytes: 3, sha256: "", pieces: 2 } }));
    await store.removeUnfinished();
    await store.removeUnfinished();
    await expect(store.evaluation(record("k", { evaluation: { bytes: 3, sha256: "", pieces: 3 } }))).rejects.toThrow(/damaged/);
    await expect(store.evaluation(record("begun", { evaluation: { bytes: 1, sha256: "", pieces: 1 } }))).rejects.toThrow(/damaged/);
  });
});

describe("a server's address", () => {
  (globalThis as { location?: unknown }).location = { href: "https://page.example/chat/index.html" };

  test.each([
    ["", "https://page.example/chat", "https://page.example:443/chat"],
    ["https://llm.example:8470/", "https://llm.example:8470/", "https://llm.example:8470"],
    ["http://127.0.0.1:8470", "http://127.0.0.1:8470/", "http://localhost:8470"],
    ["http://[::1]:8470", "http://[::1]:8470/", "http://localhost:8470"],
  ])("%s", (address, href, name) => {
    const url = serverUrl(address);
    expect([url.href, identity(url)]).toEqual([href, name]);
  });

  test.each(["http://llm.example", "ftp://llm.example", "https://", "javascript:alert(1)"])("%s is refused", (address) => {
    expect(() => serverUrl(address)).toThrow(PageError);
  });
});
