// Tensors of a safetensors file, as numbers where they are needed.
import { PageError } from "./errors";

type Read = (index: number) => number;

export interface Tensor {
  shape: number[];
  /** Write a row of a matrix, or a vector as row 0, to `out`. */
  row(index: number, out: Float64Array): void;
}

const BYTES: Record<string, number> = { F32: 4, F16: 2, BF16: 2 };

/** Return the tensors of a file by name. Raises PageError for a file that is damaged. */
export function readSafetensors(data: ArrayBuffer, name: string): Map<string, Tensor> {
  const damaged = new PageError(`${name} is damaged: reload the page`);
  try {
    const length = Number(new DataView(data).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 8, length))) as Record<string, Entry>;
    const begin = 8 + length;
    const tensors = new Map<string, Tensor>();
    for (const [key, entry] of Object.entries(header))
      if (key !== "__metadata__") tensors.set(key, tensor(data, begin, entry, damaged));
    return tensors;
  } catch {
    throw damaged;
  }
}

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

function tensor(data: ArrayBuffer, begin: number, entry: Entry, damaged: PageError): Tensor {
  const { dtype, shape } = entry;
  const [from, to] = entry.data_offsets;
  const width = shape.at(-1) ?? 1;
  const bytes = BYTES[dtype];
  const count = shape.reduce((product, size) => product * size, 1);
  if (bytes === undefined || to - from !== count * bytes || begin + to > data.byteLength) throw damaged;
  const read = reader(data, begin + from, count, dtype);
  return {
    shape,
    row(index, out) {
      const start = index * width;
      for (let i = 0; i < width; i++) out[i] = read(start + i);
    },
  };
}

function reader(data: ArrayBuffer, offset: number, count: number, dtype: string): Read {
  if (dtype === "F32") {
    // Typed arrays need alignment, which files do not promise.
    const numbers = new Float32Array(offset % 4 === 0 ? data : data.slice(offset, offset + 4 * count), offset % 4 === 0 ? offset : 0, count);
    return (index) => numbers[index]!;
  }
  const halves = new Uint16Array(offset % 2 === 0 ? data : data.slice(offset, offset + 2 * count), offset % 2 === 0 ? offset : 0, count);
  const table = dtype === "F16" ? float16() : bfloat16();
  return (index) => table[halves[index]!]!;
}

let float16Table: Float32Array | undefined;
let bfloat16Table: Float32Array | undefined;

/** Every number of 16 bits. */
function float16(): Float32Array {
  return (float16Table ??= Float32Array.from({ length: 1 << 16 }, (_, bits) => {
    const sign = bits >> 15 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15));
  }));
}

function bfloat16(): Float32Array {
  return (bfloat16Table ??= new Float32Array(Uint32Array.from({ length: 1 << 16 }, (_, bits) => bits << 16).buffer));
}
