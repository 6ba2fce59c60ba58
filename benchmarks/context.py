"""Evaluate one text that fills the context on ciphertexts, and compare it with the clear model.

    python benchmarks/context.py
    python benchmarks/context.py --model tiny
    python benchmarks/context.py --context 64 --mode simulate --json

A chat model gets a conversation: questions of the package that nothing was calibrated on, one after the
other, with the clear model's answers. Another model gets a sentence of that kind that the clear model went on
with, by sampling, and is calibrated on as long texts. All tokens but the last are evaluated as a prompt, in
chunks, and the last as a decoded token. The first pass also encodes the weights.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from transformers import DynamicCache

from cipherlm import EncryptionConfig, get_encrypted_model, load_model, load_tokenizer
from cipherlm.cli.whole import is_chat, whole_chat_model
from cipherlm.evaluation.chats import evaluation_chats
from cipherlm.evaluation.fidelity import divergences
from cipherlm.evaluation.texts import calibration_sentences, encode, evaluation_sentences
from cipherlm.progress import TerminalProgress


def conversation(model: Any, tokenizer: Any, tokens: int, answer: int = 32) -> torch.Tensor:
    """Return token ids (1, tokens) of questions that the clear model answered."""
    messages: list[dict[str, str]] = []
    for chat in evaluation_chats():
        messages.append(dict(chat[-1]))
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        ids = model.generate(prompt, max_new_tokens=answer, do_sample=False)
        if ids.shape[1] >= tokens:
            return ids[:, :tokens]
        said = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": said})
    raise SystemExit(f"the package's questions do not fill {tokens} tokens")


def continued(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return a text (1, tokens) that the clear model went on with."""
    torch.manual_seed(0)
    more = tokens - ids.shape[1]
    return model.generate(ids, max_new_tokens=more, min_new_tokens=more, do_sample=True, top_k=50)


def prepared(name: str, context: int) -> tuple[Any, torch.Tensor]:
    """Return an encrypted model, calibrated, and the text (1, context) to evaluate."""
    tokenizer, clear, progress = load_tokenizer(name), load_model(name), TerminalProgress()
    if is_chat(tokenizer):
        ids = conversation(clear, tokenizer, context)
        return whole_chat_model(clear, tokenizer, progress, context=context), ids
    model = get_encrypted_model(clear, EncryptionConfig(context=context), progress=progress)

    def texts(sentences: list[str]) -> list[torch.Tensor]:
        with model.in_clear():
            return [continued(model, model.with_prefix(ids), context) for ids in encode(tokenizer, sentences)]

    model.calibrate(texts(calibration_sentences()))
    return model, texts(evaluation_sentences()[:1])[0]


def main() -> int:
    """Evaluate in two passes, and print what they took and how far they are from the clear model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="smollm2 (the default), tiny, or a directory")
    parser.add_argument("--context", type=int, default=256, metavar="N", help="tokens (default: 256)")
    parser.add_argument("--mode", choices=("disable", "simulate", "execute"), default="execute")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    model, ids = prepared(options.model, options.context)
    with torch.no_grad(), model.in_clear():
        want = model(ids).logits
    model.set_fhe_mode(options.mode)
    cache, passes, logits = DynamicCache(), {}, []
    for name, part in (("prompt", ids[:, :-1]), ("token", ids[:, -1:])):
        before, began, processor = asdict(model.placement.traffic), time.perf_counter(), time.process_time()
        with torch.no_grad():
            logits.append(model(part, past_key_values=cache).logits)
        after = asdict(model.placement.traffic)
        passes[name] = {
            "tokens": part.shape[1],
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - processor,
            **{key: after[key] - before[key] for key in after},
        }
    private = slice(len(model.prefix), None)
    got, want = torch.cat(logits, dim=1)[:, private], want[:, private]
    result = {
        "model": options.model,
        "mode": options.mode,
        "public_tokens": len(model.prefix),
        **passes,
        "positions": got.shape[1],
        "top_1": float((got.argmax(-1) == want.argmax(-1)).double().mean()),
        "mean_divergence": float(divergences(want[0], got[0]).mean()),
        "max_logit_error": float((got - want).abs().max()),
        "max_logit": float(want.abs().max()),
    }
    json.dump(result, sys.stdout, indent=None if options.json else 1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
