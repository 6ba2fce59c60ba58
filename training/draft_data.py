"""Write conversations for training a draft: a chat model asks, and answers its own questions.

The model samples what users say behind the user's header of its chat template, and answers greedily.
Questions start with openings and words of its vocabulary, so that they differ; a share of them are forms with
such words, which cost nothing to write. Conversations that come with the package are left out: drafts are
measured on them. Each batch is a file, with the features that the output layer read: hidden states behind the
final normalisation. A directory that has some gets more.

Example: python training/draft_data.py chats --chats 4000
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from options import add_run_options, begin
from safetensors.torch import save_file
from tqdm import tqdm

from cipherlm import load_model, load_tokenizer
from cipherlm.evaluation.chats import calibration_chats, evaluation_chats
from cipherlm.models.chat import public_head, template_ids

OPENINGS = (
    *("", "", "", "", "I", "My", "I have", "I am", "My son", "My boss", "We", "You are", "Please", "Hi,"),
    *("What is", "What is the difference between", "What does the word", "What are", "What should I", "What"),
    *("How", "How do I", "How long", "How much", "How often should I", "How can I", "How many", "How does"),
    *(
        "Why",
        "Why do",
        "Why is",
        "Who",
        "Who was",
        "When",
        "Where",
        "Which",
        "Is",
        "Is it",
        "Is it true that",
    ),
    *("Are", "Do", "Does", "Can", "Can you", "Could you", "Should I", "Tell me", "Tell me about", "Give me"),
    *("Give me three", "Name", "List", "List five", "Explain", "Explain how", "Describe", "Compare", "Plan"),
    *(
        "Write",
        "Write a short",
        "Write a poem about",
        "Write an e-mail",
        "Write a function",
        "Suggest",
        "Help me",
    ),
    *("Summarize", "Translate", "Rewrite", "Correct", "Recommend", "Define", "Solve", "Calculate", "Convert"),
)

FORMS = (
    *(
        "What is {}?",
        "What does {} mean?",
        "Explain {} to a child.",
        "Why is {} important?",
        "Who invented {}?",
    ),
    *("What is the difference between {} and {}?", "How does {} work?", "Tell me about {}.", "Define {}."),
    *(
        "How do I choose {} for my {}?",
        "Give me three tips about {}.",
        "Write a short story about {} and {}.",
    ),
    *(
        "Write a poem about {}.",
        "Is {} good for {}?",
        "What are the benefits of {}?",
        "List five kinds of {}.",
    ),
    *(
        "I am worried about my {}. What should I do?",
        "How can I learn {} quickly?",
        "Suggest a name for a {}.",
    ),
    *("My {} is broken. How do I fix it?", "Write an e-mail to my boss about {}.", "What rhymes with {}?"),
    *("Can you recommend a book about {}?", "Translate {} into French.", "Use {} in a sentence."),
    *(
        "Plan a day with {} and {}.",
        "How long does {} take?",
        "What is the history of {}?",
        "Compare {} and {}.",
    ),
    *(
        "Write a Python function that counts {}.",
        "How much does {} cost?",
        "Summarize what you know about {}.",
    ),
    *("What should I say to somebody who likes {}?", "When should I use {} instead of {}?", "Where is {}?"),
    *(
        "What are common mistakes with {}?",
        "Write a product description for {}.",
        "Is it safe to mix {} and {}?",
    ),
)


def words(tokenizer: Any) -> list[str]:
    """Return the words of a vocabulary that are one token each."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return [name[1:] for name, _ in tokens if name[0] == "Ġ" and len(name) > 4 and name[1:].isalpha()]


def starts(tokenizer: Any, count: int, source: random.Random) -> list[str]:
    """Return beginnings of what users say: an opening, in a half of them with a word of the vocabulary."""
    vocabulary = words(tokenizer)
    found = []
    for _ in range(count):
        opening = source.choice(OPENINGS)
        word = source.choice(vocabulary)
        found.append(f"{opening} {word}" if opening and source.random() < 0.5 else opening)
    return found


@torch.inference_mode()
def continued(model: Any, texts: list[list[int]], pad: int, **options: Any) -> list[list[int]]:
    """Return what follows each text, up to the end of the turn or to the length asked for."""
    longest = max(map(len, texts))
    ids = torch.tensor([[pad] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    rows = model.generate(ids, attention_mask=mask, pad_token_id=pad, **options)[:, longest:].tolist()
    return [row[: row.index(pad) + 1] if pad in row else row for row in rows]


def answered(model: Any, prompts: list[list[int]], end: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return prompts with the model's answers, and what the output layer read of all tokens but the last.

    ``ids`` (n, tokens) and ``features`` (n, tokens, width) have zeros behind a text of ``length`` tokens, the
    first ``prompt`` of which were not generated.
    """
    read: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda *args: read.append(args[2].half()))
    try:
        answers = continued(model, prompts, end, do_sample=False, max_new_tokens=tokens)
    finally:
        hook.remove()
    features, longest = torch.cat(read, dim=1), max(map(len, prompts))
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    lengths = [len(text) for text in texts]
    rows = [features[i, longest - len(prompts[i]) :][: lengths[i] - 1] for i in range(len(texts))]
    return {
        "ids": torch.tensor([text + [0] * (max(lengths) - len(text)) for text in texts], dtype=torch.int32),
        "features": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "prompt": torch.tensor([len(prompt) for prompt in prompts]),
        "length": torch.tensor(lengths),
    }


def questions(model: Any, tokenizer: Any, args: argparse.Namespace, source: random.Random) -> Iterator[str]:
    """Yield what users might say."""
    known = {m["content"].lower() for chat in calibration_chats() + evaluation_chats() for m in chat}
    head, end = public_head(tokenizer), model.config.eos_token_id
    vocabulary = words(tokenizer)
    while True:
        for _ in range(round(args.batch_size * 4 * args.forms)):
            form = source.choice(FORMS)
            yield form.format(*source.choices(vocabulary, k=form.count("{}")))
        # Beginnings of one length go together, so that there is little padding.
        beginnings = sorted(starts(tokenizer, round(args.batch_size * 8 * (1 - args.forms)), source), key=len)
        for first in range(0, len(beginnings), args.batch_size):
            given = [
                [*head, *tokenizer(text).input_ids] for text in beginnings[first : first + args.batch_size]
            ]
            rows = continued(
                model,
                given,
                end,
                do_sample=True,
                top_k=100,
                temperature=1.0,
                max_new_tokens=args.question_tokens,
            )
            for prompt, row in zip(given, rows, strict=True):
                text = tokenizer.decode([*prompt[len(head) :], *row], skip_special_tokens=True).strip()
                # What does not end is cut off in the middle, which no user does.
                if row[-1] == end and len(row) > 2 and text.lower() not in known:
                    yield text


def conversations(
    model: Any, tokenizer: Any, args: argparse.Namespace, source: random.Random
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of prompts, with the model's template around them, and their answers."""
    end, asked = model.config.eos_token_id, questions(model, tokenizer, args, source)
    while True:
        prompts = [
            template_ids(tokenizer, [{"role": "user", "content": next(asked)}])
            for _ in range(args.batch_size * 4)
        ]
        prompts.sort(key=len)
        for first in range(0, len(prompts), args.batch_size):
            yield answered(model, prompts[first : first + args.batch_size], end, args.answer_tokens)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory for the batches, one safetensors file each")
    parser.add_argument("--model", default="smollm2", help="the chat model (default: smollm2)")
    parser.add_argument("--chats", type=int, default=4000, help="how many conversations (default: 4000)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--question-tokens", type=int, default=40, help="longer questions are dropped")
    parser.add_argument("--answer-tokens", type=int, default=64, help="where answers are cut off")
    parser.add_argument("--forms", type=float, default=0.5, help="share of questions made of forms")
    add_run_options(parser)
    return parser.parse_args()


def main() -> None:
    """Write batches until all conversations are there."""
    args = parse()
    begin(args)
    args.out.mkdir(parents=True, exist_ok=True)
    done = sum(1 for _ in args.out.glob(f"{args.seed}-*.safetensors"))
    source = random.Random(f"{args.seed} {done}")
    torch.manual_seed(source.randrange(2**32))
    model: Any = load_model(args.model).to(torch.bfloat16)
    tokenizer = load_tokenizer(args.model)
    found = conversations(model, tokenizer, args, source)
    for number in tqdm(range(done, -(-args.chats // args.batch_size)), mininterval=30):
        save_file(next(found), args.out / f"{args.seed}-{number:05}.safetensors")


if __name__ == "__main__":
    main()
