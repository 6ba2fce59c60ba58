// The model's files: fetched once, checked, and kept in the browser.
import { sha256 } from "./bytes";
import { ConnectionFailed, PageError } from "./errors";
import type { Plan } from "./plan";
import type { Store } from "./store";

/** Return a file of the model's. Raises PageError where what comes is not what the page was made for. */
export async function modelFile(
  plan: Plan,
  store: Store,
  name: string,
  report: (received: number, size: number) => void,
): Promise<ArrayBuffer> {
  const expected = plan.files[name];
  if (expected === undefined) throw new PageError(`the page lacks ${name}: write it again with \`cipherlm page\``);
  const kept = await (await store.file(expected.sha256))?.arrayBuffer();
  if (kept !== undefined) {
    if ((await sha256(kept)) === expected.sha256) return kept;
    await store.removeFile(expected.sha256);
  }
  const data = await fetched(`model/${name}`, expected.bytes, report);
  if ((await sha256(data)) !== expected.sha256)
    throw new PageError(`${name} is not the file that this page was made for: do not trust where it comes from`);
  await store.putFile(expected.sha256, new Blob([data]));
  return data;
}

async function fetched(
  path: string,
  size: number,
  report: (received: number, size: number) => void,
): Promise<ArrayBuffer> {
  const failed = new ConnectionFailed(`${path} cannot be fetched: reload the page`);
  try {
    const response = await fetch(path, { credentials: "omit", referrerPolicy: "no-referrer" });
    if (!response.ok || response.body === null) throw failed;
    const data = new Uint8Array(size);
    let received = 0;
    const reader = response.body.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (received + part.value.length > size) throw failed;
      data.set(part.value, received);
      received += part.value.length;
      report(received, size);
    }
    if (received !== size) throw failed;
    return data.buffer;
  } catch {
    throw failed;
  }
}
