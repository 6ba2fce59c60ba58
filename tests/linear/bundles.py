"""A small model in bundles, with a tokenizer of its own."""

from functools import cache
from pathlib import Path

import numpy as np
import scratch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cipherlm.linear.plan import make_plan
from cipherlm.linear.products import LinearGroup
from cipherlm.linear.server import PLAN_NAME, encode_to
from cipherlm.models.config import EncryptionConfig
from cipherlm.serving.bundle import LINEAR, new_bundles, seal
from cipherlm.serving.linear import describe
from cipherlm.serving.linear_bundle import export_linear
from linear.architectures import VOCABULARY, tiny

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "system",
    "user",
    "assistant",
    *(f"w{i}" for i in range(6, VOCABULARY - 2)),
    "a",
    "b",
]
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one word a token, with a chat template."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    made.chat_template = TEMPLATE
    return made


@cache
def _base() -> Path:
    return scratch.directory("linear")


@cache
def exported(architecture: str = "llama", *, seed: int = 0, **options: str | bool) -> Path:
    """Return the directory with the bundles ``server`` and ``client`` of a small model."""
    name = "-".join([architecture, str(seed), *(f"{key}={value}" for key, value in options.items())])
    directory = _base() / name
    export_linear(
        tiny(architecture, seed=seed),
        EncryptionConfig("linear"),
        directory,
        tokenizer(),
        name=name,
        **options,
    )
    return directory


WIDE = LinearGroup("wide", ("wide",), 300, (900,))
"""It needs rotations, which the layers of small models do not."""


@cache
def wide_weights() -> dict[str, NDArray[np.float32]]:
    return {"wide": np.random.default_rng(3).normal(0, 0.05, (900, 300)).astype(np.float32)}


@cache
def exported_wide() -> Path:
    """Return the directory with the bundles of one matrix, without a model around it."""
    root = _base() / "wide"
    server, client = new_bundles(root)
    plan = make_plan([WIDE], wide_weights())
    encode_to(server, plan, wide_weights())
    (client / PLAN_NAME).write_bytes((server / PLAN_NAME).read_bytes())
    common = {"scheme": "ckks", "placement": LINEAR, "name": "wide", "fingerprint": "ab" * 32}
    seal(server, {**common, "party": "server"})
    seal(client, {**common, "party": "client", "description": describe(plan, "ab" * 32, "wide")})
    return root
