"""Batches are split into examples."""

import numpy as np
import pytest
import torch
import transformers as hf
from cases import autograd_kernel, batch, classifier, randomized, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import ntk
from ntk.inputs import group_examples, tiles


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    extra=st.integers(0, 4),
    side=st.sampled_from(["left", "right"]),
    size=st.integers(1, 5),
)
def test_groups_and_tiles_cover_every_example_once_without_its_padding(lengths, extra, side, size):
    inputs = batch(tuple(lengths), side=side, extra=extra)
    plain = batch(tuple(lengths))
    groups = group_examples(inputs | {"flag": True})
    assert sorted(i for group in groups for i in group.indices) == list(range(len(lengths)))
    assert len(groups) == len(set(lengths))
    for group in groups:
        assert group.constant["flag"] is True
        assert group.constant["attention_mask"].all()
        for position, i in enumerate(group.indices):
            assert torch.equal(group.example(position)["input_ids"][0], plain["input_ids"][i, : lengths[i]])
    cut = tiles(groups, size)
    counts = [sum(len(group.indices) for group in tile) for tile in cut]
    assert sum(counts) == len(lengths)
    assert all(count == size for count in counts[:-1])
    assert 1 <= counts[-1] <= size


def test_entries_of_batch_one_are_shared_and_cut_alongside():
    inputs = batch((3, 5), side="left", extra=1) | {
        "position_ids": torch.arange(6)[None],
        "token_type_ids": torch.zeros(1, 6),
    }
    for group in group_examples(inputs):
        length = group.batched["input_ids"].shape[1]
        assert group.batched["position_ids"].tolist() == [list(range(6 - length, 6))]
        assert group.batched["token_type_ids"].shape == (1, length)


def test_decoder_entries_follow_the_decoder_mask_and_pixels_none():
    inputs = batch((2, 4)) | {
        "decoder_input_ids": torch.tensor([[7, 8, 9], [7, 8, 1]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[8, 9, 2, 2], [8, 2, 2, 2]]),
        "pixel_values": torch.zeros(2, 4, 4, 4),
    }
    first, second = group_examples(inputs, encoder_decoder=True)
    assert first.batched["decoder_input_ids"].tolist() == [[7, 8, 9]]
    assert second.batched["decoder_input_ids"].tolist() == [[7, 8]]
    assert first.batched["labels"].shape == second.batched["labels"].shape == (1, 4)
    assert first.batched["pixel_values"].shape == (1, 4, 4, 4)


@pytest.mark.parametrize("method", ["structured", "jacobian", "auto"])
def test_inputs_on_another_device_are_named(method):
    elsewhere = {name: value.to("meta") for name, value in batch().items()}
    with pytest.raises(ValueError, match=r"expected inputs on the model's device, cpu; input_ids is on meta"):
        ntk.empirical_ntk(classifier("bert"), elsewhere, method=method)
    with pytest.raises(ValueError, match=r"inputs is on meta: move it there by .to\('cpu'\)"):
        ntk.empirical_ntk(torch.nn.Linear(2, 1), torch.zeros(3, 2), torch.zeros(3, 2, device="meta"), method=method)


class Pooled(torch.nn.Module):
    """A mean over each example's first ``lengths`` tokens; lengths may have any type."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 5), torch.nn.Linear(5, 2)

    def forward(self, x, lengths, pairs=None, names=None, layers=(0, 1, 2), **settings):
        lengths = torch.as_tensor([int(length) for length in lengths])
        assert len(lengths) == len(x)
        assert names is None or len(names) == len(x)
        assert tuple(layers) == (0, 1, 2)
        hidden = self.first(x)
        if pairs is not None:
            hidden = hidden * torch.as_tensor([[a + 2.0 * b] for a, b in pairs], dtype=x.dtype)[:, :, None]
        keep = torch.arange(x.shape[1])[None] < lengths[:, None]
        return self.second(((hidden * keep[:, :, None]).sum(1) / lengths[:, None]).tanh())


LENGTHS, PAIRS = [3, 1, 2, 3, 1], [[1, 2], [3, 4], [1, 2], [0, 1], [3, 4]]


@pytest.mark.parametrize("method", ["jacobian", "auto"])
@pytest.mark.parametrize(
    ("more", "tensors"),
    [
        ({"lengths": LENGTHS}, {}),
        ({"lengths": tuple(LENGTHS)}, {}),
        ({"lengths": np.array(LENGTHS)}, {}),
        ({"lengths": [np.int64(length) for length in LENGTHS]}, {}),
        ({"lengths": LENGTHS, "pairs": PAIRS}, {"pairs": torch.tensor(PAIRS)}),
        ({"lengths": np.array(LENGTHS), "pairs": np.array(PAIRS)}, {"pairs": torch.tensor(PAIRS)}),
        (
            {
                "lengths": LENGTHS,
                "names": ["a", "b", "c", "d", "e"],
                "layers": [0, 1, 2],
                "flag": True,
                "more": {"a": 1},
            },
            {},
        ),
    ],
    ids=["list", "tuple", "array", "numbers", "nested list", "nested array", "words and settings"],
)
def test_lists_and_arrays_are_split_like_tensors(method, more, tensors):
    model, x = Pooled().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    expected = ntk.empirical_ntk(model, {"x": x, "lengths": torch.tensor(LENGTHS)} | tensors, method="jacobian")
    found = ntk.empirical_ntk(model, {"x": x} | more, method=method)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found = ntk.empirical_ntk(model, {"x": x[1:3]} | {k: v[1:3] if _long(v) else v for k, v in more.items()},
                              {"x": x} | more, method=method)  # fmt: skip
    torch.testing.assert_close(found, expected[1:3], rtol=1e-12, atol=0)


def _long(value) -> bool:
    return hasattr(value, "__len__") and len(value) == 5


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.array([3, 1]), "an array of 2 rows, and there are 5 examples"),
        ({"all": LENGTHS}, "a dict, which cannot be split into examples"),
        ({"all": torch.tensor(LENGTHS)}, "tensors or arrays inside of a dict"),
        ([torch.tensor(LENGTHS), torch.tensor(LENGTHS)], "tensors or arrays inside of a list"),
        ({3, 1, 2}, "a set, which cannot be split"),
    ],
)
def test_containers_that_cannot_be_split_are_refused(lengths, message):
    inputs = {"x": torch.randn(5, 3, 4, dtype=torch.float64), "lengths": lengths}
    for method in ("auto", "jacobian"):
        with pytest.raises(ValueError, match=message):
            ntk.empirical_ntk(Pooled().double(), inputs, method=method)


@pytest.mark.parametrize("method", ["jacobian", "auto"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_inputs_that_are_not_finite_are_refused_in_every_row(method, value):
    """A saturated activation has gradient 0 at such inputs, and would hide them."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    for row in range(4):
        x = torch.randn(4, 3, dtype=torch.float64)
        x[row, 1] = value
        with pytest.raises(ValueError, match=rf"the inputs hold NaN or infinite values, first in row {row}"):
            ntk.empirical_ntk(model, x, method=method)
        with pytest.raises(ValueError, match="the inputs hold NaN"):
            ntk.empirical_ntk(model, torch.zeros(2, 3, dtype=torch.float64), x, method=method)
    with pytest.raises(ValueError, match=r"the inputs \(lengths\) hold NaN"):
        ntk.empirical_ntk(Pooled(), {"x": torch.zeros(2, 3, 4), "lengths": [1, value]}, method=method)


class Patients(torch.nn.Module):
    """A model with tokens and a second input, which may be as wide as the padded tokens."""

    def __init__(self, words_alone: bool):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.other = torch.nn.Embedding(50, 4), torch.nn.Linear(1, 4)
        self.out, self.words_alone = torch.nn.Linear(4, 2), words_alone

    def forward(self, input_ids, attention_mask, **others):
        words = (self.embed(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        if self.words_alone:
            return self.out(torch.tanh(words))
        (history,) = others.values()
        return self.out(torch.tanh(words + self.other(history.flatten(2).mean((1, 2))[:, None] if history.ndim > 2
                                                      else history.mean(1, keepdim=True))))  # fmt: skip


@pytest.mark.parametrize("method", ["auto", "jacobian"])
@pytest.mark.parametrize("name", ["age_hist", "pixel_values", "input_features", "decoder_notes"])
@pytest.mark.parametrize("shape", [(5,), (6,), (7,), (6, 2)])
def test_what_is_cut_is_known_to_be_tokens(name, shape, method):
    """An entry that happens to be as wide as the padded tokens is not cut."""
    model, inputs = Patients(words_alone=False).double(), batch((6, 2, 3))
    inputs[name] = torch.randn(3, *shape, dtype=torch.float64)
    expected = autograd_kernel(model, inputs)
    assert relative_error(ntk.empirical_ntk(model, inputs, method=method), expected) <= 1e-10


@pytest.mark.parametrize("method", ["auto", "jacobian"])
@pytest.mark.parametrize("width", [5, 6, 7])
def test_float_labels_are_no_tokens(width, method):
    model, inputs = Patients(words_alone=True).double(), batch((6, 2, 3))
    inputs["labels"] = torch.rand(3, width, dtype=torch.float64)

    def output(values, given):
        return values * given["labels"].mean(1, keepdim=True)

    expected = autograd_kernel(model, inputs, output=output)
    assert relative_error(ntk.empirical_ntk(model, inputs, output=output, method=method), expected) <= 1e-10


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_padding_of_sounds_does_not_enter(norm):
    """The padding of sounds has no effect, even if the model has a norm over time."""
    config = hf.Wav2Vec2Config(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(6, 6),
        conv_kernel=(4, 3), conv_stride=(2, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm=norm, classifier_proj_size=6, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomized(hf.Wav2Vec2ForSequenceClassification(config).double()).eval()
    lengths = (40, 24, 31)
    sounds = [torch.randn(1, length, dtype=torch.float64) for length in lengths]
    padded = torch.cat([torch.nn.functional.pad(s, (0, 48 - s.shape[1])) for s in sounds])
    mask = torch.stack([torch.arange(48) < length for length in lengths]).long()
    kernel = ntk.empirical_ntk(model, {"input_values": padded, "attention_mask": mask}, reduce="trace")
    for i, left in enumerate(sounds):
        for j, right in enumerate(sounds):
            alone = ntk.empirical_ntk(
                model, {"input_values": left}, {"input_values": right}, reduce="trace", method="jacobian"
            )
            assert torch.allclose(kernel[i, j], alone[0, 0], rtol=1e-10)
