/** What went wrong, as people may read it. Nothing in it depends on what was decrypted. */
export class PageError extends Error {
  override name = "PageError";
}

/** The server could not be reached, or the connection broke off. */
export class ConnectionFailed extends PageError {
  override name = "ConnectionFailed";
}

/** The session has ended, and with it what the server remembered of the text. */
export class SessionLost extends PageError {
  override name = "SessionLost";
}

/** The server hosts another model than the page was made for. */
export class WrongModel extends PageError {
  override name = "WrongModel";
}

/** The user has broken off. */
export class Cancelled extends PageError {
  override name = "Cancelled";
}

/** A refusal by the server, with its code of the protocol. */
export class ServerError extends PageError {
  override name = "ServerError";

  constructor(
    readonly code: string,
    message: string,
    readonly retry: boolean,
    readonly status?: number,
    readonly retryAfter?: number,
  ) {
    super(message);
  }
}

/** Return an error's text for people. */
export function textOf(error: unknown): string {
  if (error instanceof PageError) return error.message;
  return `the page has a fault: ${error instanceof Error ? `${error.name}: ${error.message}` : String(error)}`;
}
