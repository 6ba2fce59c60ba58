"""A small model in bundles, with a tokenizer of its own."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cipherlm.models.config import EncryptionConfig
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
    "0",
    "x",
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


_directory = TemporaryDirectory(prefix="cipherlm-linear-")


@cache
def exported(architecture: str = "llama", *, seed: int = 0, **options: str | bool) -> Path:
    """Return the directory with the bundles ``server`` and ``client`` of a small model."""
    name = "-".join([architecture, str(seed), *(f"{key}={value}" for key, value in options.items())])
    directory = Path(_directory.name) / name
    export_linear(
        tiny(architecture, seed=seed),
        EncryptionConfig("linear"),
        directory,
        tokenizer(),
        name=name,
        **options,
    )
    return directory
