"""Adapters at the client, over layers that are elsewhere: PEFT and Trainer as with a clear model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from cipherlm import EncryptionConfig, get_encrypted_model
from cipherlm.linear.clear import ClearProducts

from .architectures import tiny
from .test_integration import IDS

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

STEPS = 20
LINEAR = EncryptionConfig(target_modules="linear")


class CountedProducts(ClearProducts):
    """Products in the clear that know how many were asked for."""

    def __init__(self, weights):
        super().__init__(weights)
        self.calls: list[tuple[str, bool]] = []

    def product(self, group, x, *, transposed=False):
        self.calls.append((group, transposed))
        return super().product(group, x, transposed=transposed)


class Texts(torch.utils.data.Dataset):
    """Rows that repeat, so that there is something to learn."""

    def __init__(self, vocabulary: int = 64, tokens: int = 12) -> None:
        rows = (np.arange(16)[:, None] * 3 + np.arange(tokens) % 4) % (vocabulary - 3) + 3
        self.rows = torch.tensor(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def adapted(model: nn.Module, **options) -> nn.Module:
    torch.manual_seed(5)
    targets = options.pop("target_modules", "all-linear")
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)
    )


def losses(
    model: nn.Module, directory, steps: int = STEPS, texts: Texts | None = None, **options
) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **{"per_device_train_batch_size": 4, **options},
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=texts or Texts())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("architecture", "steps"), [("llama", 8), ("gpt2", 5)])
def test_the_losses_are_those_of_the_clear_model(architecture, steps, tmp_path):
    fan = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    expected = losses(adapted(tiny(architecture), **fan), tmp_path, steps)
    model = get_encrypted_model(tiny(architecture), LINEAR)
    products = CountedProducts(model._weights)
    model.connect(products)
    model.set_fhe_mode("execute")
    found = losses(adapted(model), tmp_path, steps)
    assert len(found) == steps
    assert found == pytest.approx(expected, rel=0.02)
    assert found[-1] < found[0]
    # One product a group and direction. The first group's input is the embedding, which nothing trains, but
    # for what adapters on it need.
    assert sum(not transposed for _, transposed in products.calls) == steps * len(model.groups)
    assert sum(transposed for _, transposed in products.calls) == steps * (len(model.groups) - 1)


@pytest.mark.slow
def test_losses_on_ciphertexts(tmp_path):
    options = {"texts": Texts(tokens=5), "per_device_train_batch_size": 1}
    expected = losses(adapted(tiny("llama")), tmp_path, **options)
    model = get_encrypted_model(tiny("llama"), LINEAR)
    model.set_fhe_mode("execute")
    found = losses(adapted(model), tmp_path, **options)
    assert found == pytest.approx(expected, rel=0.02)
    assert found != expected
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])


def test_checkpointed_gradients(tmp_path):
    expected = losses(adapted(tiny("llama")), tmp_path, 5)
    model = get_encrypted_model(tiny("llama"), LINEAR)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert losses(adapted(model), tmp_path, 5, **options) == pytest.approx(expected, rel=0.02)


def test_adapters_have_memory_and_the_base_has_none(tmp_path):
    model = get_encrypted_model(tiny("llama"), LINEAR)
    products = model.remote_modules
    wrapped = adapted(model, target_modules=["q_proj", "up_proj"])
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    assert not any(parameter.is_meta for parameter in wrapped.parameters())
    # Through PEFT's wrapper, everything has its name still.
    assert wrapped.remote_modules.keys() == products.keys()
    wrapped.set_fhe_mode("disable", ["q_proj"])
    wrapped.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*"))
    again = peft.PeftModel.from_pretrained(get_encrypted_model(tiny("llama"), LINEAR), str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, wrapped.eval()(IDS).logits)


def test_what_needs_weights_says_so():
    model = get_encrypted_model(tiny("llama"), LINEAR)
    wrapped = adapted(model, target_modules=["q_proj"])
    with pytest.raises(RuntimeError, match=r"weights of model\.layers\.0\S+q_proj are on the server"):
        wrapped.merge_and_unload()
    with pytest.raises(ValueError, match="has an adapter: encrypt the model first"):
        get_encrypted_model(adapted(tiny("llama"), target_modules=["q_proj"]), LINEAR)


def test_dora_is_refused_by_name():
    model = get_encrypted_model(tiny("llama"), LINEAR)
    with pytest.raises(RuntimeError, match="are on the server"):
        adapted(model, target_modules=["q_proj"], use_dora=True)


def test_a_copy_trains_alone():
    model = adapted(get_encrypted_model(tiny("llama"), LINEAR))
    again = copy.deepcopy(model)
    again(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is None for gradient in gradients)
    assert any(p.grad is not None for p in again.parameters())
