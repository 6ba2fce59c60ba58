"""The key-value cache that is kept from text to text: what is read, and that the texts are the same."""

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from cipherlm import load_model
from cipherlm.linear.prefix import public_prefix_cache
from cipherlm.models.kept import KeptCache, in_common


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture
def read(model):
    """How many tokens each call of the model has read."""
    counts: list[int] = []

    def hear(_, args, kwargs):
        counts.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(hear, with_kwargs=True)
    yield counts
    hook.remove()


def plain(model, ids, new):
    return model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0].tolist()


def test_only_what_is_new_is_read(model, read):
    kept = KeptCache(model)
    first = kept.generate([1, 2, 3, 4], max_new_tokens=3, do_sample=False)
    assert read == [4, 1, 1]
    following = [*first, 7, 8]
    assert kept.shared(following) == 6
    read.clear()
    second = kept.generate(following, max_new_tokens=2, do_sample=False)
    assert read == [3, 1]
    assert first == plain(model, [1, 2, 3, 4], 3)
    assert second == plain(model, following, 2)


@pytest.mark.parametrize("ids", [[1, 2, 9, 9, 9], [5, 6], [1, 2, 3], [1, 2, 3, 4]])
def test_another_text(model, ids):
    kept = KeptCache(model)
    kept.generate([1, 2, 3, 4], max_new_tokens=3, do_sample=False)
    assert kept.generate(ids, max_new_tokens=3, do_sample=False) == plain(model, ids, 3)


def test_what_a_failed_generation_has_read_is_forgotten(model):
    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            raise RuntimeError("lost")

    kept = KeptCache(model)
    kept.generate([1, 2, 3, 4], max_new_tokens=2, do_sample=False)
    with pytest.raises(RuntimeError, match="lost"):
        kept.generate(
            [1, 2, 3, 9, 9, 9],
            max_new_tokens=4,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([Fails()]),
        )
    ids = [1, 2, 3, 4, 5]
    assert kept.shared(ids) == 3
    assert kept.generate(ids, max_new_tokens=3, do_sample=False) == plain(model, ids, 3)


def test_in_common():
    assert in_common([1, 2, 3], [1, 2, 4]) == 2
    assert in_common([1, 2], [1, 2, 4]) == 2
    assert in_common([], [1]) == 0


def test_drafts_in_a_text_that_goes_on(model, read):
    """Assisted decoding reads only what is new, too, and the text is the same as without."""
    ids, drafts = [500, 600, 700, 500, 600, 700, 500, 600], {"prompt_lookup_num_tokens": 3}
    kept = KeptCache(model)
    first = kept.generate(ids, max_new_tokens=5, do_sample=False, **drafts)
    following, proposed = [*first, 500, 600], 3
    read.clear()
    second = kept.generate(following, max_new_tokens=6, do_sample=False, **drafts)
    assert read[0] <= len(following) - kept.shared(first) + proposed
    assert first == plain(model, ids, 5)
    assert second == plain(model, following, 6)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_drafts_behind_a_public_prefix(model):
    ids = torch.tensor([500, 600, 700, 500, 600, 700, 500, 600, 700, 500, 600])
    prefix = public_prefix_cache(model, ids[:4])
    options = {"max_new_tokens": 8, "do_sample": False}
    proposed = prefix.generate(model, ids[None, 4:], prompt_lookup_num_tokens=3, **options)
    assert proposed[0].tolist() == plain(model, ids.tolist(), 8)
