// The messages of a session and how they become bytes: see docs/protocol.md. The server's are hostile
// until they have proved to have the right form.

const HEADER_BYTES = 64 * 1024;
const MAX_BLOBS = 4096;
const MAX_TEXT = 1024;
const MAX_ENTRIES = 32;

export type ClientMessage =
  | { type: "open"; protocol: number; model: string; keys: Record<string, string> }
  | { type: "evaluate"; id: number; module: string; start: number; count: number; blobs: Uint8Array[] }
  | { type: "refreshed"; id: number; round: number; blobs: Uint8Array[] }
  | { type: "cancel"; id: number }
  | { type: "close" };

export type ServerMessage =
  | { type: "opened"; session: string; limits: Record<string, number> }
  | { type: "queued"; id: number; position: number }
  | { type: "progress"; id: number; done: number; total: number }
  | { type: "refresh"; id: number; round: number; blobs: Uint8Array[] }
  | { type: "result"; id: number; blobs: Uint8Array[] }
  | { type: "error"; code: string; message: string; retry: boolean; id?: number; retry_after?: number };

/** Bytes that are no message. */
export class WireError extends Error {
  override name = "WireError";
}

type Check = (value: unknown) => boolean;
const integer: Check = (value) => Number.isSafeInteger(value) && (value as number) >= 0;
const text: Check = (value) => typeof value === "string" && value.length <= MAX_TEXT && !/\p{Cc}/u.test(value);
const flag: Check = (value) => typeof value === "boolean";
const map =
  (of: Check): Check =>
  (value) =>
    typeof value === "object" &&
    value !== null &&
    !Array.isArray(value) &&
    Object.keys(value).length <= MAX_ENTRIES &&
    Object.entries(value).every(([name, entry]) => text(name) && of(entry));

/** The fields of each message of the server's; those with a ? may be missing. `blobs` says how many there are. */
const FIELDS: Record<ServerMessage["type"], { fields: Record<string, Check>; blobs: "none" | "one" | "any" }> = {
  opened: { fields: { session: text, limits: map(integer) }, blobs: "none" },
  queued: { fields: { id: integer, position: integer }, blobs: "none" },
  progress: { fields: { id: integer, done: integer, total: integer }, blobs: "none" },
  refresh: { fields: { id: integer, round: integer }, blobs: "one" },
  result: { fields: { id: integer }, blobs: "any" },
  error: {
    fields: { code: text, message: text, retry: flag, "id?": integer, "retry_after?": integer },
    blobs: "none",
  },
};

/** Return how many bytes a message may have whose blobs take so many. */
export function messageLimit(messageBytes: number): number {
  return messageBytes + HEADER_BYTES + 4;
}

/** Return a message as bytes. */
export function pack(message: ClientMessage): Uint8Array<ArrayBuffer> {
  const { blobs = [], ...fields } = message as { blobs?: Uint8Array[] } & Record<string, unknown>;
  const header = new TextEncoder().encode(JSON.stringify({ ...fields, blobs: blobs.map((blob) => blob.length) }));
  if (header.length > HEADER_BYTES || blobs.length > MAX_BLOBS) throw new WireError("a message that is too large");
  const size = blobs.reduce((sum, blob) => sum + blob.length, 4 + header.length);
  const data = new Uint8Array(size);
  new DataView(data.buffer).setUint32(0, header.length, true);
  data.set(header, 4);
  let offset = 4 + header.length;
  for (const blob of blobs) {
    data.set(blob, offset);
    offset += blob.length;
  }
  return data;
}

/** Return the server's message in bytes. Raises WireError. */
export function unpack(data: Uint8Array): ServerMessage {
  const [header, blobs] = split(data);
  const { type, ...fields } = header;
  if (typeof type !== "string" || !Object.hasOwn(FIELDS, type)) throw new WireError("a message of no known type");
  const { fields: checks, blobs: count } = FIELDS[type as ServerMessage["type"]];
  const known = new Set<string>();
  for (const [key, check] of Object.entries(checks)) {
    const name = key.replace("?", "");
    known.add(name);
    if (!Object.hasOwn(fields, name)) {
      if (name === key) throw new WireError(`"${type}" without "${name}"`);
    } else if (!check(fields[name])) throw new WireError(`"${type}" whose "${name}" is not what it should be`);
  }
  if (!Object.keys(fields).every((name) => known.has(name))) throw new WireError(`"${type}" with more fields`);
  if ((count === "none" && blobs.length > 0) || (count === "one" && blobs.length !== 1))
    throw new WireError(`"${type}" with ${blobs.length} blobs`);
  return { type, ...fields, ...(count === "none" ? {} : { blobs }) } as ServerMessage;
}

function split(data: Uint8Array): [Record<string, unknown>, Uint8Array[]] {
  const length = data.length < 4 ? HEADER_BYTES + 1 : new DataView(data.buffer, data.byteOffset).getUint32(0, true);
  if (length > HEADER_BYTES || length > data.length - 4) throw new WireError("a header that is cut off or too long");
  let header: unknown;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data.subarray(4, 4 + length)));
  } catch {
    throw new WireError("a header that is not JSON");
  }
  if (typeof header !== "object" || header === null || Array.isArray(header))
    throw new WireError("a header that is not a JSON object");
  const { blobs: sizes, ...rest } = header as Record<string, unknown>;
  if (!Array.isArray(sizes) || sizes.length > MAX_BLOBS || !sizes.every(integer))
    throw new WireError("sizes of blobs that are none");
  const blobs: Uint8Array[] = [];
  let offset = 4 + length;
  for (const size of sizes as number[]) {
    blobs.push(data.subarray(offset, offset + size));
    offset += size;
  }
  if (offset !== data.length) throw new WireError("a message that does not have the size that its header says");
  return [rest, blobs];
}
