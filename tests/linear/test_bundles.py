"""Linear layers exported: what is in each bundle, and what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cipherlm.linear.clear import ClearProducts
from cipherlm.linear.model import load_client_model, load_groups
from cipherlm.linear.plan import Plan
from cipherlm.linear.prefix import PREFIX_NAME, PublicPrefix
from cipherlm.linear.server import MATRICES_NAME, PLAN_NAME
from cipherlm.models.config import EncryptionConfig
from cipherlm.serving.bundle import Bundle, BundleError, load_hosted_model
from cipherlm.serving.linear_bundle import export_linear, public_ids
from linear.architectures import remote, tiny
from linear.bundles import exported, tokenizer


def test_the_server_loads_what_was_exported():
    root = exported()
    model = load_hosted_model(root / "server")
    plan = Plan.from_dict(json.loads((root / "client" / PLAN_NAME).read_text()))
    assert model.description == Bundle.load(root / "client", "client").about["description"]
    assert model.description["plan"] == plan.digest


def test_the_client_has_no_weight_of_a_remote_layer():
    root = exported()
    names = {f"{member}.weight" for group in load_groups(root / "client") for member in group.members}
    assert names
    assert not names & load_file(root / "client" / "model.safetensors").keys()
    assert not (root / "client" / MATRICES_NAME).exists()


def test_the_public_prefix_comes_with_the_clients_bundle():
    root = exported(prefix="w9 w8 w7")
    prefix = PublicPrefix.load(root / "client" / PREFIX_NAME)
    products, _ = remote(tiny("llama"))
    model = load_client_model(root / "client", ClearProducts(products.weights))
    text = torch.tensor([[20, 21]])
    found = prefix.generate(model, text, max_new_tokens=5, do_sample=False)
    expected = tiny("llama").generate(torch.tensor([[9, 8, 7, 20, 21]]), max_new_tokens=5, do_sample=False)
    assert found.tolist() == expected.tolist()


def test_a_chat_begins_with_all_that_is_before_the_message():
    ids = public_ids(tokenizer(), system="w9 w10")
    assert tokenizer().decode(ids) == "<s> system w9 w10 </s> <s> user"


def test_a_template_that_drops_the_system_message_is_refused():
    made = tokenizer()
    made.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="does not begin with the system prompt"):
        public_ids(made, system="w9")


def test_layers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no linear layer 'attn'"):
        export_linear(tiny("llama"), EncryptionConfig("attn"), tmp_path / "out", tokenizer(), name="x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [PLAN_NAME, MATRICES_NAME, "matrices.json"])
def test_damaged_bundles_are_refused(tmp_path, name):
    shutil.copytree(exported() / "server", tmp_path / "server")
    file = tmp_path / "server" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=name):
        load_hosted_model(tmp_path / "server")


def test_a_bundle_without_the_weights_of_a_layer_is_refused(tmp_path):
    shutil.copytree(exported() / "server", tmp_path / "server")
    (tmp_path / "server" / MATRICES_NAME).unlink()
    with pytest.raises(BundleError, match=f"{MATRICES_NAME} is missing"):
        load_hosted_model(tmp_path / "server")


def test_a_server_needs_no_library_for_models():
    code = (
        "import sys; from cipherlm.cli import serve; from cipherlm.serving import run;"
        "from cipherlm.serving.bundle import load_hosted_model;"
        f"model = load_hosted_model({str(exported() / 'server')!r}); assert model.description['modules'];"
        "print(*{'torch', 'transformers', 'tokenizers', 'concrete'} & {*sys.modules})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""
