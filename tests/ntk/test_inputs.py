"""Batches taken apart into examples."""

import pytest
import torch
from cases import batch, classifier
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
