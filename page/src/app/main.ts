// The page: server, keys, conversation, one after the other.
import { size } from "../bytes";
import { Client } from "../client";
import { PageError, textOf } from "../errors";
import type { Engines } from "../engine/pool";
import type { Model } from "../model";
import type { Plan } from "../plan";
import { Server } from "../server";
import { Store } from "../store";
import type { TextCodec } from "../text";
import { Conversation } from "./conversation";
import { element, progress, quiet, show, write } from "./elements";
import { Panel } from "./panel";
import { loadEngines, loadModel, loadPlan } from "./start";

const OTHER = "other";

class Page {
  private readonly panel = new Panel();
  private client: Client | undefined;

  constructor(
    private readonly plan: Plan,
    private readonly store: Store,
    private readonly engines: Engines,
    private readonly model: Model,
    private readonly codec: TextCodec,
  ) {}

  begin(): void {
    write("model-name", this.plan.name);
    const choice = element<HTMLSelectElement>("choice");
    for (const server of this.plan.servers) choice.add(new Option(server === "" ? location.host : server, server));
    if (this.plan.any_server) choice.add(new Option("another one", OTHER));
    choice.onchange = () => {
      show("address-label", choice.value === OTHER);
      this.tellTrust();
    };
    choice.onchange(new Event("change"));
    element<HTMLFormElement>("connect-form").onsubmit = handled(() => this.connect());
    element<HTMLFormElement>("keys-form").onsubmit = handled(() => this.useKeys());
    element("delete-button").onclick = handled(() => this.deleteKeys());
    show("connect");
  }

  private get address(): string {
    const choice = element<HTMLSelectElement>("choice").value;
    return choice === OTHER ? element<HTMLInputElement>("address").value.trim() : choice;
  }

  private async connect(): Promise<void> {
    const { address } = this;
    if (address === "" && element<HTMLSelectElement>("choice").value === OTHER)
      throw new PageError("type the address of a server");
    this.client?.leave();
    show("keys", false);
    show("chat", false);
    progress("Asking the server for its model");
    const server = new Server(address, element<HTMLInputElement>("token").value, this.panel);
    const shown = (received: number, whole: number) =>
      progress(`Sending evaluation keys, once: ${size(received)} of ${size(whole)}`, received, whole);
    this.client = new Client(this.plan, server, this.store, this.engines, this.model, this.panel, shown);
    await this.client.check();
    await this.showKeys();
  }

  /** Ask for a passphrase where there are keys with one; offer to make keys where there are none. */
  private async showKeys(): Promise<void> {
    const client = this.connected();
    const { record, spent } = await client.ring.existing();
    quiet();
    if (record !== undefined && "clear" in record.secret) {
      await this.open("");
      return;
    }
    const there = record !== undefined;
    write(
      "keys-note",
      there
        ? "This browser has keys for this server. Their passphrase opens them."
        : spent
          ? `The keys have served ${this.plan.key_budget} texts. A server that cheats could learn a bit of a key from each, so new ones take their place.`
          : `Made here, once: a secret key, which stays in this browser, and evaluation keys for the server, with which it computes and cannot decrypt.`,
    );
    write("passphrase-text", there ? "Passphrase" : "Passphrase (optional)");
    write("keys-button", there ? "Open the keys" : "Make keys");
    show("passphrase-note", !there);
    show("delete-button", there);
    show("keys");
    element("passphrase").focus();
  }

  private async useKeys(): Promise<void> {
    const client = this.connected();
    const field = element<HTMLInputElement>("passphrase");
    const passphrase = field.value;
    const { record } = await client.ring.existing();
    if (record === undefined) await this.make(passphrase);
    await this.open(passphrase);
    field.value = "";
  }

  private async make(passphrase: string): Promise<void> {
    const began = performance.now();
    progress("Making keys");
    const bar = (done: number, total: number) => progress(`Making keys: ${done} of ${total}`, done, total);
    await this.connected().ring.make(passphrase, bar);
    this.panel.keysMade(performance.now() - began);
  }

  private async open(passphrase: string): Promise<void> {
    const client = this.connected();
    const { record } = await client.ring.existing();
    if (record === undefined) throw new PageError("the keys are gone: connect again");
    progress("Opening the keys");
    try {
      await client.use(record, passphrase);
    } catch (error) {
      // What is damaged can be deleted.
      show("keys");
      show("delete-button");
      throw error;
    }
    this.panel.keys(record.evaluation.bytes + record.publicKey.length);
    progress("Opening a session");
    try {
      await client.connect();
    } catch (error) {
      show("keys");
      show("delete-button");
      throw error;
    }
    quiet();
    show("keys", false);
    if (element("chat").hidden) {
      show("chat");
      new Conversation(this.plan, client, this.codec, this.panel, () => this.renew(), fail);
    }
    element("text").focus();
  }

  /** Take new keys, because those that are used are spent. A passphrase is asked for again. */
  private async renew(): Promise<void> {
    const client = this.connected();
    const sealed = client.record !== undefined && !("clear" in client.record.secret);
    client.leave();
    if (!sealed) {
      await this.make("");
      await this.open("");
      return;
    }
    show("chat", false);
    await this.showKeys();
    throw new PageError(`these keys have served ${this.plan.key_budget} texts, as many as they may: make new ones`);
  }

  private async deleteKeys(): Promise<void> {
    const client = this.connected();
    client.leave();
    for (const record of await this.store.keys(client.server.identity, this.plan.fingerprint))
      await this.store.remove(record.id);
    show("chat", false);
    await this.showKeys();
  }

  private connected(): Client {
    if (this.client === undefined) throw new PageError("connect to a server first");
    return this.client;
  }

  private tellTrust(): void {
    const own = this.address === "" || (URL.canParse(this.address) && new URL(this.address).origin === location.origin);
    write(
      "trust",
      own
        ? "This page comes from the server itself. A server that cheats could send another page, one that gives your key away: this is a demonstration, and no protection from that server. Get the page from somewhere that you trust (`cipherlm page`), and compare its digest."
        : `This page comes from ${location.host}, and whoever runs that could change it: compare its digest with the published one. The server with the model sees ciphertexts only.`,
    );
  }
}

/** Return a handler that shows what goes wrong. */
function handled(action: () => Promise<void>): (event: Event) => void {
  return (event) => {
    event.preventDefault();
    show("error", false);
    const buttons = Array.from(document.querySelectorAll<HTMLButtonElement>("#connect-form button, #keys-form button"));
    for (const button of buttons) button.disabled = true;
    action()
      .catch(fail)
      .finally(() => {
        for (const button of buttons) button.disabled = false;
      });
  };
}

function fail(error: unknown): void {
  quiet();
  write("error", `${capital(textOf(error))}.`);
  show("error");
}

function capital(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

async function main(): Promise<void> {
  if (!window.isSecureContext)
    throw new PageError("a browser keeps keys only for pages that come by https:// or from this machine");
  show("connect", false);
  progress("Loading");
  const plan = await loadPlan();
  const [store, engines] = await Promise.all([Store.open(), loadEngines(plan)]);
  const { model, codec } = await loadModel(plan, store, (received, whole) =>
    progress(`Fetching the model's embeddings, once: ${size(received)} of ${size(whole)}`, received, whole),
  );
  quiet();
  new Page(plan, store, engines, model, codec).begin();
}

main().catch(fail);
