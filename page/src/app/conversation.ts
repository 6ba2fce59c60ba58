// The conversation: what was said, and one answer at a time.
import { Cancelled, textOf } from "../errors";
import type { Client } from "../client";
import type { Listener } from "../generate";
import type { Plan } from "../plan";
import type { Message, TextCodec } from "../text";
import { element, show, write } from "./elements";
import type { Panel } from "./panel";

const DEFAULT_ANSWER = 12;

export class Conversation {
  private messages: Message[] = [];
  private reading = true;
  private running: AbortController | undefined;

  constructor(
    private readonly plan: Plan,
    private readonly client: Client,
    private readonly codec: TextCodec,
    private readonly panel: Panel,
    /** Called where the keys are spent before a text. */
    private readonly renew: () => Promise<void>,
    private readonly failed: (error: unknown) => void,
  ) {
    const most = element<HTMLInputElement>("most");
    most.max = String(plan.context - plan.prefix.length);
    most.value = String(Math.min(DEFAULT_ANSWER, plan.context - plan.prefix.length - 1));
    write("text-label", codec.chats ? "Your question" : "The text to continue");
    write("send", codec.chats ? "Ask, encrypted" : "Continue it, encrypted");
    const text = element<HTMLTextAreaElement>("text");
    text.placeholder = codec.chats ? "What is the capital of France?" : "The old man looked at the sea and";
    text.oninput = () => this.note();
    text.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        element<HTMLFormElement>("ask-form").requestSubmit();
      }
    };
    most.oninput = () => this.note();
    element<HTMLFormElement>("ask-form").onsubmit = (event) => {
      event.preventDefault();
      void this.ask();
    };
    element("stop").onclick = () => this.stop();
    element("clear").onclick = () => this.clear();
    this.note();
  }

  private async ask(): Promise<void> {
    const text = element<HTMLTextAreaElement>("text");
    if (this.running !== undefined || text.value.trim() === "") return;
    const most = Number(element<HTMLInputElement>("most").value);
    const messages: Message[] = [...(this.codec.chats ? this.messages : []), { role: "user", content: text.value }];
    this.running = new AbortController();
    this.reading = true;
    this.busy(true);
    const prompt = this.item(this.codec.chats ? "You" : "Your text", text.value);
    const answer = this.item(this.codec.chats ? this.plan.name : "It goes on", "");
    try {
      const ids = this.codec.prompt(messages);
      if (!(await this.client.spend())) {
        await this.renew();
        await this.client.spend();
      }
      const tokens: number[] = [];
      this.panel.textBegins();
      await this.client.generate(
        ids,
        most,
        (token) => this.codec.ends(token),
        () => this.reading,
        this.listener(tokens, ids, answer),
        this.running.signal,
      );
      this.messages = [...messages, { role: "assistant", content: this.answer(ids, tokens) }];
      text.value = "";
      write("status", "");
    } catch (error) {
      if (!answer.textContent) {
        prompt.parentElement?.remove();
        answer.parentElement?.remove();
      }
      if (!(error instanceof Cancelled)) this.failed(error);
      write("status", error instanceof Cancelled ? "Broken off: the server saw that." : textOf(error));
    } finally {
      this.running = undefined;
      this.busy(false);
      this.note();
      text.focus();
    }
  }

  private listener(tokens: number[], prompt: number[], answer: HTMLElement): Listener {
    const { panel } = this;
    let hidden = false;
    let where = "";
    const status = (what: string) => {
      const note = hidden
        ? "The answer is complete. What is still evaluated hides from the server how long it is. "
        : "";
      write("status", `${note}${where}${what}`);
    };
    return {
      begins: (seen, total) => {
        where = `Token ${seen + 1} of ${total}: `;
        panel.evaluationBegins();
        status("encrypting");
      },
      evaluated: () => panel.evaluationEnds(),
      queued: (before) => status(`${before} before this one in the server's queue`),
      progress: (done, total) => status(`block ${done} of ${total}`),
      refreshed: (request) => {
        panel.refreshed();
        panel.ciphertext(request, "down");
      },
      ciphertext: (data, way) => panel.ciphertext(data, way),
      worked: (milliseconds) => panel.worked(milliseconds),
      token: (token) => {
        tokens.push(token);
        answer.textContent = this.answer(prompt, tokens);
      },
      ended: () => {
        hidden = true;
        answer.textContent = this.answer(prompt, tokens) || "(nothing)";
        write("stop", "Break off (the server sees it)");
      },
      lost: () => status("the connection was lost; the text begins anew"),
    };
  }

  /** Return the answer's text: what the tokens add to the prompt. */
  private answer(prompt: number[], tokens: number[]): string {
    if (this.codec.chats) return this.codec.decode(tokens);
    return this.codec.decode([...prompt, ...tokens]).slice(this.codec.decode(prompt).length);
  }

  /** First reading ends, which the server does not see; then everything. */
  private stop(): void {
    if (this.reading) {
      this.reading = false;
      write("stop", "Break off (the server sees it)");
    } else this.running?.abort();
  }

  private clear(): void {
    if (this.running !== undefined) return;
    this.messages = [];
    element("log").replaceChildren();
    write("status", "");
    this.note();
    element("text").focus();
  }

  /** Say how long the text is, and whether it fits. */
  private note(): void {
    const text = element<HTMLTextAreaElement>("text").value;
    const most = element<HTMLInputElement>("most");
    const room = this.plan.context - this.plan.prefix.length;
    const messages: Message[] = this.codec.chats ? this.messages : [];
    const length = text === "" ? 0 : this.codec.prompt([...messages, { role: "user", content: text }]).length;
    const fits = length + Number(most.value) - 1 <= room;
    write("text-note", length === 0 ? "" : `${length} tokens, and room for ${room - length + 1} of answer`);
    element("text-note").classList.toggle("error", !fits);
    element<HTMLButtonElement>("send").disabled = this.running !== undefined || !fits;
  }

  private busy(running: boolean): void {
    element<HTMLTextAreaElement>("text").readOnly = running;
    element<HTMLButtonElement>("send").disabled = running;
    element<HTMLButtonElement>("clear").disabled = running;
    write("stop", "Stop reading");
    show("stop", running);
  }

  private item(who: string, text: string): HTMLElement {
    const item = document.createElement("div");
    const name = document.createElement("strong");
    item.className = "said";
    const content = document.createElement("p");
    name.textContent = who;
    content.textContent = text;
    item.append(name, content);
    element("log").append(item);
    item.scrollIntoView({ block: "nearest" });
    return content;
  }
}
