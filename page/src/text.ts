// Text to token ids and back, by the model's own tokenizer and chat template.
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import { PageError } from "./errors";
import type { Plan } from "./plan";

export interface Message {
  role: "user" | "assistant";
  content: string;
}

export class TextCodec {
  private readonly tokenizer: Tokenizer;
  private readonly template: Template | undefined;
  private readonly end: Set<number>;

  constructor(
    private readonly plan: Plan,
    tokenizer: unknown,
    config: unknown,
  ) {
    try {
      this.tokenizer = new Tokenizer(tokenizer as object, config as object);
      this.template = plan.text.template === null ? undefined : new Template(plan.text.template);
    } catch {
      throw new PageError("this page cannot read the model's tokenizer or chat template");
    }
    this.end = new Set(plan.text.end);
  }

  /** Whether the model answers messages. One that does not continues texts. */
  get chats(): boolean {
    return this.template !== undefined;
  }

  /** Return the private token ids of a conversation that waits for an answer, without the public prefix. */
  prompt(messages: Message[]): number[] {
    const { prefix } = this.plan;
    const ids = this.template === undefined ? this.plainIds(messages) : this.templateIds(this.template, messages);
    const known = prefix.every((token, i) => ids[i] === token);
    return known && prefix.length > 0 ? ids.slice(prefix.length) : ids;
  }

  decode(ids: number[]): string {
    // A character whose last bytes are still to come.
    return ids.length === 0 ? "" : this.tokenizer.decode(ids, { skip_special_tokens: true }).replace(/\ufffd+$/, "");
  }

  ends(token: number): boolean {
    return this.end.has(token);
  }

  private plainIds(messages: Message[]): number[] {
    return this.tokenizer.encode(messages.map((message) => message.content).join("")).ids;
  }

  private templateIds(template: Template, messages: Message[]): number[] {
    let text: string;
    try {
      text = template.render({ messages, add_generation_prompt: true, ...this.plan.text.tokens });
    } catch {
      throw new PageError("the model's chat template fails on this conversation: start a new one");
    }
    return this.tokenizer.encode(text, { add_special_tokens: false }).ids;
  }
}
