// What the server sees, and what it costs.
import { size } from "../bytes";
import type { Bytes } from "../engine/calls";
import type { Traffic } from "../server";
import { write } from "./elements";

const SHOWN_BYTES = 256;
const A_LINE = 16;

/** Counts, and shows what it counts. */
export class Panel implements Traffic {
  sent = 0;
  received = 0;
  private evaluations = 0;
  private rounds = 0;
  private textBegan = 0;
  private stepBegan = performance.now();
  private browser = 0;

  up(bytes: number): void {
    this.sent += bytes;
    write("up", size(this.sent));
  }

  down(bytes: number): void {
    this.received += bytes;
    write("down", size(this.received));
  }

  keysMade(milliseconds: number): void {
    write("cost-keys", seconds(milliseconds));
  }

  keys(bytes: number): void {
    write("cost-key-bytes", size(bytes));
  }

  textBegins(): void {
    this.textBegan = this.sent + this.received;
  }

  evaluationBegins(): void {
    this.stepBegan = performance.now();
    this.browser = 0;
  }

  worked(milliseconds: number): void {
    this.browser += milliseconds;
  }

  evaluationEnds(): void {
    this.evaluations += 1;
    write("evaluations", String(this.evaluations));
    write("cost-token", seconds(performance.now() - this.stepBegan));
    write("cost-browser", seconds(this.browser));
    write("cost-traffic", size(this.sent + this.received - this.textBegan));
  }

  refreshed(): void {
    this.rounds += 1;
    write("rounds", String(this.rounds));
  }

  ciphertext(data: Bytes, way: "up" | "down"): void {
    const direction = way === "up" ? "sent" : "received";
    write("dump-title", `The last ciphertext that was ${direction}, ${size(data.length)}; this is how it begins:`);
    write("dump", dump(data.subarray(0, SHOWN_BYTES)));
  }
}

function dump(data: Uint8Array): string {
  const lines: string[] = [];
  for (let at = 0; at < data.length; at += A_LINE) {
    const line = Array.from(data.subarray(at, at + A_LINE));
    const digits = line.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
    const letters = line.map((byte) => (byte > 32 && byte < 127 ? String.fromCharCode(byte) : "·")).join("");
    lines.push(`${digits}  ${letters}`);
  }
  return lines.join("\n");
}

export function seconds(milliseconds: number): string {
  return `${(milliseconds / 1000).toFixed(1)} s`;
}
