// The secret key in the browser's store, in the clear or under a passphrase.
import type { Bytes } from "./engine/calls";
import { PageError } from "./errors";
import type { Kept } from "./store";

/** OWASP's recommendation for PBKDF2 with SHA-256. */
const ITERATIONS = 600_000;

/** A passphrase that does not open the key. */
export class WrongPassphrase extends PageError {
  override name = "WrongPassphrase";

  constructor() {
    super("that is not the passphrase of these keys, or they are damaged");
  }
}

/** Return a secret key as it is kept; `about` is authenticated with it. An empty passphrase is none. */
export async function seal(secret: Bytes, passphrase: string, about: string): Promise<Kept> {
  if (passphrase === "") return { clear: secret };
  const salt = crypto.getRandomValues(new Uint8Array(16));
  const iv = crypto.getRandomValues(new Uint8Array(12));
  const key = await derived(passphrase, salt, ITERATIONS);
  const sealed = await crypto.subtle.encrypt(algorithm(iv, about), key, secret);
  return { salt, iterations: ITERATIONS, iv, sealed: new Uint8Array(sealed) };
}

/** Return a secret key that `seal` has kept. Raises WrongPassphrase. */
export async function unseal(kept: Kept, passphrase: string, about: string): Promise<Bytes> {
  if ("clear" in kept) return kept.clear;
  const key = await derived(passphrase, kept.salt, Math.min(kept.iterations, 100 * ITERATIONS));
  try {
    return new Uint8Array(await crypto.subtle.decrypt(algorithm(kept.iv, about), key, kept.sealed));
  } catch {
    throw new WrongPassphrase();
  }
}

function algorithm(iv: Bytes, about: string): AesGcmParams {
  return { name: "AES-GCM", iv, additionalData: new TextEncoder().encode(about) };
}

async function derived(passphrase: string, salt: Bytes, iterations: number): Promise<CryptoKey> {
  const bytes = new TextEncoder().encode(passphrase.normalize("NFC"));
  const key = await crypto.subtle.importKey("raw", bytes, "PBKDF2", false, ["deriveKey"]);
  const derivation = { name: "PBKDF2", hash: "SHA-256", salt, iterations };
  return crypto.subtle.deriveKey(derivation, key, { name: "AES-GCM", length: 256 }, false, ["encrypt", "decrypt"]);
}
