// Lets the WebAssembly engine do the client's part with files of a directory: see test_engine.py.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const [parts, directory] = process.argv.slice(2);
await import(join(parts, "wasm_exec.js"));
const go = new Go();
const { instance } = await WebAssembly.instantiate(readFileSync(join(parts, "engine.wasm")), go.importObject);
go.run(instance);

const file = (name) => join(directory, name);
const input = (name) => new Uint8Array(readFileSync(file(name)));
const right = (result) => {
  if (result?.error !== undefined) throw new Error(`${result.kind} ${result.error}`);
  return result;
};
const refusal = (result) => (result?.error === undefined ? null : [result.kind, result.error]);

const { parameters, requests, level, reply_bytes } = JSON.parse(readFileSync(file("task.json"), "utf8"));
const values = input("values");

// A party of its own makes everything that Python is to read.
const own = right(cipherlmEngine.open(parameters, null));
const ciphertext = right(own.encrypt(values, level));
writeFileSync(file("own-secret"), right(own.secret()));
writeFileSync(file("own-public"), right(own.publicKey()));
writeFileSync(file("own-ciphertext"), ciphertext);
writeFileSync(file("own-decrypted"), right(own.decrypt(ciphertext)));
const assembly = right(own.assemble(JSON.stringify(requests)));
const pieces = [assembly.head];
for (const [element, at] of JSON.parse(assembly.order)) {
  const entry = right(own.entry(element, at));
  right(assembly.add(entry));
  pieces.push(entry);
}
const { tail, sha256 } = right(assembly.finish());
writeFileSync(file("own-evaluation"), Buffer.concat([...pieces, tail]));

// Python's party, from its bytes.
const other = right(cipherlmEngine.open(parameters, input("secret")));
writeFileSync(file("same-secret"), right(other.secret()));
writeFileSync(file("decrypted"), right(other.decrypt(input("ciphertext"))));
writeFileSync(file("reply"), right(other.refresh(input("request"), reply_bytes)));

const damaged = input("ciphertext");
damaged[damaged.length >> 1] ^= 1;
const refusals = {
  "another key": refusal(own.decrypt(input("ciphertext"))),
  damaged: refusal(other.decrypt(damaged)),
  truncated: refusal(other.decrypt(input("ciphertext").slice(0, 40))),
  longer: refusal(other.decrypt(new Uint8Array([...input("ciphertext"), 0]))),
  "another type": refusal(other.decrypt(input("request"))),
  "too much": refusal(other.refresh(input("request"), reply_bytes - 1)),
  "another's refresh": refusal(own.refresh(input("request"), reply_bytes)),
  "damaged secret": refusal(cipherlmEngine.open(parameters, input("secret").fill(7, 100, 101))),
  insecure: refusal(cipherlmEngine.open(parameters.replace('"log_n":14', '"log_n":13'), null)),
  "not finite": refusal(other.encrypt(new Uint8Array(new Float64Array([Infinity]).buffer), level)),
  "no such key": refusal(other.entry(4, 1)),
  "too few arguments": refusal(other.entry(5)),
  "no bytes": refusal(other.decrypt("bytes")),
};
console.log(JSON.stringify({ key: other.key, sha256, refusals }));
process.exit(0);
