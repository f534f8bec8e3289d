"""Blocks that are optional while a network is trained to do without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from catimage_accel.efficient_unet import removable_blocks, with_repeats
from catimage_accel.engines.loading import load_unet
from catimage_accel.snapfusion.robust import OptionalBlock, leaving_out, only, optional_blocks, plain_name

INPUTS = (torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 24, 32))


@pytest.fixture
def unet(tiny_sd_folder):
    return load_unet(tiny_sd_folder, "unet", torch.float32)


@torch.no_grad()
def predicted(unet) -> Tensor:
    return unet(*INPUTS, return_dict=False)[0]


def test_a_block_that_does_not_run_is_one_left_out(unet) -> None:
    paths = removable_blocks(unet)
    with optional_blocks(unet, paths) as blocks:
        for path in paths:
            with only(blocks, [other for other in paths if other != path]):
                without = predicted(unet)
            assert torch.equal(without, predicted(with_repeats(plain(unet, blocks), {path: 0})))


def plain(unet, blocks):
    """The same weights in a UNet of its own, without optional blocks."""
    import copy

    copied = copy.deepcopy(unet)
    for path in blocks:
        copied.set_submodule(path, copied.get_submodule(path).block, strict=True)
    return copied


def test_the_network_is_as_before_afterwards_also_after_an_error(unet) -> None:
    names, before = list(unet.state_dict()), predicted(unet)

    def interrupted() -> None:
        with optional_blocks(unet, removable_blocks(unet)) as blocks, only(blocks, []):
            raise RuntimeError("stop")

    with optional_blocks(unet, removable_blocks(unet)):
        assert sorted(plain_name(name) for name, _ in unet.named_parameters()) == sorted(names)
        assert torch.equal(predicted(unet), before)
    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert list(unet.state_dict()) == names
    assert torch.equal(predicted(unet), before)
    assert not any(isinstance(module, OptionalBlock) for module in unet.modules())


def test_each_block_is_kept_about_as_often_as_asked_for(unet) -> None:
    kept: list[list[bool]] = []
    with optional_blocks(unet, removable_blocks(unet)) as blocks:
        loss_fn = leaving_out(
            blocks, (0.5, 1.0), lambda _: kept.append([one.active for one in blocks.values()]) or torch.zeros(())
        )
        for batch in range(400):
            loss_fn(batch, torch.Generator().manual_seed(batch))
        assert all(block.active for block in blocks.values())
    shares = torch.tensor(kept).float()
    assert (shares.mean(0) - 0.75).abs().max() < 0.1
    assert shares.mean(1).std() > 0.15  # whole batches are thick or thin
