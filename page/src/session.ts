// One WebSocket, from its opening to its end: evaluations, and the refreshes that they ask for.
import type { Bytes } from "./engine/calls";
import { Cancelled, ConnectionFailed, PageError, ServerError, SessionLost, WrongModel } from "./errors";
import { nonsense, type Server, serverError, type Traffic } from "./server";
import { type ClientMessage, messageLimit, pack, type ServerMessage, unpack, WireError } from "./wire";

const OPEN_TIMEOUT = 60_000;
/** Without a word from the server while it reads keys or evaluates. */
const SILENCE = 1_800_000;
/** Nothing was wrong with what was asked, but the session is over. */
const OVER = new Set(["shutting_down", "timeout", "busy"]);

/** What one evaluation shows of itself. */
export interface Watch {
  queued(before: number): void;
  progress(done: number, total: number): void;
  /** A round of refreshing: what came, what goes back. */
  refreshed(request: Bytes, reply: Bytes): void;
}

export class Session {
  private id = 0;
  private unfinished: number | undefined;
  private readonly inbox: ServerMessage[] = [];
  private broken: PageError | undefined;
  private wake: (() => void) | undefined;

  private constructor(
    private readonly socket: WebSocket,
    private readonly limit: number,
    private readonly rounds: number,
    private readonly traffic: Traffic,
  ) {
    socket.binaryType = "arraybuffer";
    socket.onmessage = (event: MessageEvent<unknown>) => this.received(event.data);
    socket.onclose = () => this.fail(new SessionLost("the connection to the server broke off"));
  }

  /** Whether the connection is of no more use. */
  get over(): boolean {
    return this.broken !== undefined;
  }

  /** Open a session with uploaded keys. An evaluation may ask for so many `rounds`, a message have so many bytes. */
  static async open(
    server: Server,
    model: string,
    keys: Record<string, string>,
    bounds: { messageBytes: number; rounds: number },
    traffic: Traffic,
  ): Promise<Session> {
    const { url, protocols } = server.session;
    const socket = new WebSocket(url, protocols);
    const session = new Session(socket, messageLimit(bounds.messageBytes), bounds.rounds, traffic);
    try {
      await connected(socket);
      session.send({ type: "open", protocol: 1, model, keys });
      const answer = await session.next(SILENCE);
      if (answer.type !== "opened") throw session.fail(nonsense());
      return session;
    } catch (error) {
      session.close();
      if (error instanceof ServerError && error.code === "unknown_model")
        throw new WrongModel("the server hosts another model now: reload the page");
      if (error instanceof SessionLost) throw new ConnectionFailed("the server has ended the connection");
      throw error;
    }
  }

  /**
   * Return what a module makes of ciphertexts. Whatever `refresh` raises cancels the evaluation, as does the
   * signal; the session stays usable.
   */
  async evaluate(
    module: string,
    start: number,
    count: number,
    inputs: Bytes[],
    refresh: (request: Bytes) => Promise<Bytes>,
    watch: Watch,
    signal: AbortSignal,
  ): Promise<Bytes[]> {
    await this.endUnfinished();
    const id = ++this.id;
    this.unfinished = id;
    let rounds = 0;
    try {
      this.send({ type: "evaluate", id, module, start, count, blobs: inputs });
      for (;;) {
        const message = await this.next(SILENCE, signal);
        if (message.type === "opened" || message.type === "error" || message.id !== id) throw this.fail(nonsense());
        if (message.type === "queued") watch.queued(message.position);
        else if (message.type === "progress") watch.progress(message.done, message.total);
        else if (message.type === "refresh") {
          if (message.round !== rounds) throw this.fail(nonsense());
          if (rounds === this.rounds) throw this.fail(asksTooMuch());
          rounds += 1;
          const request = message.blobs[0] as Bytes;
          const reply = await refresh(request);
          this.send({ type: "refreshed", id, round: message.round, blobs: [reply] });
          watch.refreshed(request, reply);
        } else {
          this.unfinished = undefined;
          return message.blobs as Bytes[];
        }
      }
    } catch (error) {
      if (this.unfinished !== undefined && !this.over) this.send({ type: "cancel", id: this.unfinished });
      throw error;
    }
  }

  /** Say goodbye if anybody listens. */
  close(): void {
    if (!this.over && this.socket.readyState === WebSocket.OPEN) this.send({ type: "close" });
    this.broken ??= new SessionLost("the session is closed");
    this.socket.close();
  }

  /** Read the last word about an evaluation that was cancelled. */
  private async endUnfinished(): Promise<void> {
    while (this.unfinished !== undefined) {
      try {
        const message = await this.next(OPEN_TIMEOUT);
        if (message.type === "result" && message.id === this.unfinished) this.unfinished = undefined;
      } catch (error) {
        if (this.over) throw error;
      }
    }
  }

  private send(message: ClientMessage): void {
    const data = pack(message);
    if (data.length > this.limit) throw new PageError("a message that is larger than the server takes");
    if (this.broken !== undefined) throw this.broken;
    this.traffic.up(data.length);
    this.socket.send(data);
  }

  /** Return the server's next message. Raises what the server says went wrong. */
  private async next(milliseconds: number, signal?: AbortSignal): Promise<ServerMessage> {
    const deadline = Date.now() + milliseconds;
    for (;;) {
      if (signal?.aborted) throw new Cancelled("broken off");
      const message = this.inbox.shift();
      if (message?.type === "error") throw this.failure(message);
      if (message !== undefined) return message;
      if (this.broken !== undefined) throw this.broken;
      if (!(await this.news(deadline - Date.now(), signal)))
        throw this.fail(new SessionLost("the server has said nothing for too long"));
    }
  }

  /** Wait until something happens; false if nothing does in time. */
  private news(milliseconds: number, signal?: AbortSignal): Promise<boolean> {
    return new Promise((resolve) => {
      const timer = setTimeout(() => done(false), milliseconds);
      const done = (happened: boolean) => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", aborted);
        this.wake = undefined;
        resolve(happened);
      };
      const aborted = () => done(true);
      signal?.addEventListener("abort", aborted);
      this.wake = () => done(true);
    });
  }

  private received(data: unknown): void {
    try {
      if (!(data instanceof ArrayBuffer) || data.byteLength > this.limit) throw new WireError("not a message");
      this.traffic.down(data.byteLength);
      this.inbox.push(unpack(new Uint8Array(data)));
      this.wake?.();
    } catch {
      this.fail(nonsense());
    }
  }

  private failure(message: ServerMessage & { type: "error" }): PageError {
    const error = serverError(message.code, message.retry, undefined, message.retry_after);
    if (message.id !== undefined && message.id === this.unfinished) {
      this.unfinished = undefined;
      if (message.code !== "shutting_down") return error;
    }
    return this.fail(OVER.has(message.code) && this.id > 0 ? new SessionLost(error.message) : error);
  }

  private fail(error: PageError): PageError {
    if (this.broken === undefined) {
      this.broken = error;
      this.socket.close();
    }
    this.wake?.();
    return error;
  }
}

function asksTooMuch(): PageError {
  return new PageError("the server asks for more refreshes than this model needs: it was left");
}

function connected(socket: WebSocket): Promise<void> {
  return new Promise((resolve, reject) => {
    const refused = () => {
      clearTimeout(timer);
      // A browser does not say why.
      reject(new ConnectionFailed("the server does not open a session: is it running, and the token right?"));
    };
    const timer = setTimeout(refused, OPEN_TIMEOUT);
    socket.addEventListener("open", () => {
      clearTimeout(timer);
      resolve();
    });
    socket.addEventListener("close", refused);
    socket.addEventListener("error", refused);
  });
}
