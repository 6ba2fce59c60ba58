import { describe, expect, test } from "vitest";
import tokenizerText from "../../src/cipherlm/models/tiny/tokenizer.json?raw";
import configText from "../../src/cipherlm/models/tiny/tokenizer_config.json?raw";
import { PageError } from "../src/errors";
import type { Plan } from "../src/plan";
import { TextCodec } from "../src/text";

// The embedded model's tokenizer; ids are those of transformers in Python.
const tokenizer: unknown = JSON.parse(tokenizerText);
const config: unknown = JSON.parse(configText);
const TEMPLATE =
  "{% for message in messages %}{{ eos_token }}{{ message.role }}: {{ message.content }}{% endfor %}" +
  "{% if add_generation_prompt %}{{ eos_token }}assistant:{% endif %}";

function codec(template: string | null, prefix: number[]): TextCodec {
  const plan = { prefix, text: { end: [0], template, tokens: { eos_token: "<|endoftext|>" } } };
  return new TextCodec(plan as unknown as Plan, tokenizer, config);
}

describe("a model that continues texts", () => {
  test.each([
    ["The old man looked at the sea", [665, 673, 448, 743, 354, 263, 1429]],
    [
      '  Ünïcode — "quotes", 1,234 & más…\n\nnew',
      [
        221, 221, 128, 251, 78, 128, 108, 67, 567, 69, 221, 159, 223, 243, 393, 403, 304, 293, 2, 12, 2324, 12, 18, 19, 20,
        221, 6, 271, 128, 95, 83, 159, 223, 100, 199, 199, 610, 87,
      ],
    ],
  ])("%s", (text, ids) => {
    const { chats } = codec(null, [0]);
    expect(chats).toBe(false);
    expect(codec(null, [0]).prompt([{ role: "user", content: text }])).toEqual(ids);
    expect(codec(null, [0]).decode(ids)).toBe(text);
  });

  test("half a character is not shown", () => {
    expect(codec(null, [0]).decode([665, 128])).toBe("The");
    expect(codec(null, [0]).decode([])).toBe("");
  });

  test("ends with its token", () => {
    expect([codec(null, []).ends(0), codec(null, []).ends(1)]).toEqual([true, false]);
  });
});

describe("a model that answers", () => {
  const messages = [{ role: "user" as const, content: "hi" }];

  test("gets its template, and of that what is not public", () => {
    expect(codec(TEMPLATE, []).chats).toBe(true);
    expect(codec(TEMPLATE, []).prompt(messages)).toEqual([0, 476, 269, 26, 288, 73, 0, 608, 502, 439, 26]);
    expect(codec(TEMPLATE, [0, 476, 269, 26]).prompt(messages)).toEqual([288, 73, 0, 608, 502, 439, 26]);
    expect(codec(TEMPLATE, [1]).prompt(messages)).toEqual([0, 476, 269, 26, 288, 73, 0, 608, 502, 439, 26]);
  });

  test("has a template that may fail", () => {
    expect(() => codec("{{ raise_exception('no') }}", []).prompt(messages)).toThrow(PageError);
    expect(() => codec("{% for", [])).toThrow(PageError);
  });
});
