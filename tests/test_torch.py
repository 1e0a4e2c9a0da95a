"""Torch tensors go in and come out without a copy where they are on the right device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import random_image, to_host

from nbvision.codecs import encode
from nbvision.errors import MemoryLimitError
from nbvision.image import ImageBatch, as_batch
from nbvision.ops.boxes import nms
from nbvision.ops.preprocess import Preprocess
from nbvision.ops.warp import flip, rotate, warp_affine
from nbvision.runtime import memory


def test_tensor_in_shares_memory(device, rng):
    tensor = torch.from_numpy(random_image(rng, 20, 30)).to(device)
    batch = ImageBatch.from_arrays([tensor])
    assert batch.device == device
    assert int(to_host(batch.table)[0, 0]) == tensor.data_ptr()


def test_a_tensor_is_encoded(device, rng):
    pixels = random_image(rng, 9, 11)
    assert encode(torch.from_numpy(pixels).to(device), "png") == encode(pixels, "png")


def test_stacked_tensor_is_a_batch(device, rng):
    stack = torch.from_numpy(np.stack([random_image(rng, 9, 7) for _ in range(3)])).to(device)
    batch = as_batch(stack)
    assert len(batch) == 3
    np.testing.assert_array_equal(to_host(batch[1]), stack[1].cpu().numpy())


def test_tensor_out_is_written(device, rng):
    image = random_image(rng, 40, 50)
    pre = Preprocess((16, 16), scale=1 / 255)
    wanted, _ = pre(ImageBatch.from_arrays([image], device=device))
    out = torch.full((1, 3, 16, 16), float("nan"), device=device)
    got, _ = pre(torch.from_numpy(image).to(device), out=out)
    if device == "cuda":
        torch.cuda.synchronize()
    assert got is out
    np.testing.assert_array_equal(out.cpu().numpy(), to_host(wanted))


def test_predictions_and_boxes_of_torch(device, rng):
    _, geometry = Preprocess((32, 32))(ImageBatch.from_arrays([random_image(rng, 32, 32)], device=device))
    head = torch.zeros((1, 5, 4), device=device)
    head[0, :, 0] = torch.tensor([16.0, 16.0, 8.0, 8.0, 0.9])
    found = nms(head, geometry)
    np.testing.assert_allclose(to_host(found.boxes)[0, 0], [12, 12, 20, 20], atol=1e-4)
    crops, _ = Preprocess((8, 8), fit="stretch")(
        [random_image(rng, 32, 32)], boxes=torch.tensor([[12.0, 12, 20, 20]]), box_images=torch.tensor([0])
    )
    assert crops.shape == (1, 3, 8, 8)


def test_tensors_become_tensors(device, rng):
    image = random_image(rng, 20, 30)
    tensor = torch.from_numpy(image).to(device)
    turned = rotate(tensor, 1)
    assert isinstance(turned, torch.Tensor)
    assert turned.device == tensor.device
    np.testing.assert_array_equal(turned.cpu().numpy(), np.rot90(image))
    moved = warp_affine([tensor, tensor], [[1, 0, 2], [0, 1, 1]], (21, 32))
    np.testing.assert_array_equal(moved[1, 1:, 2:].cpu().numpy(), image)
    for flipped, length in zip(flip([tensor, tensor[:9]], vertical=True), (20, 9), strict=True):
        np.testing.assert_array_equal(flipped.cpu().numpy(), image[:length][::-1])
    out = torch.empty_like(tensor)
    assert flip(tensor, horizontal=True, out=out) is out
    np.testing.assert_array_equal(out.cpu().numpy(), image[:, ::-1])


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_antialiased_resize_is_within_a_level_of_torchs(device, rng, interpolation):
    image = random_image(rng, 333, 517)
    pre = Preprocess((224, 150), fit="stretch", interpolation=interpolation, parity="torch", dtype="uint8")
    tensor, _ = pre(as_batch(image, device=device))
    given = torch.from_numpy(image).to("cpu" if device == "cpu" else "cuda").permute(2, 0, 1)[None].float()
    mode = {"linear": "bilinear", "cubic": "bicubic"}[interpolation]
    wanted = torch.nn.functional.interpolate(given, (224, 150), mode=mode, antialias=True).clamp(0, 255).round()
    assert np.abs(to_host(tensor)[0].astype(int) - wanted[0].cpu().numpy()).max() <= 1


@pytest.mark.needs_cuda
def test_one_pool_for_both():
    import cupy

    memory.clear(device="cuda")
    before = torch.cuda.memory_allocated()
    try:
        memory.share_with_torch()
        with memory.source("shared with torch"):
            lease = memory.acquire(50_000_000, device="cuda")
        assert torch.cuda.memory_allocated() - before >= 50_000_000
        view = lease.view((50_000_000,))
        view.fill(7)
        assert int(torch.as_tensor(view, device="cuda").sum()) == 350_000_000
        with pytest.raises(MemoryLimitError, match=r"no .* MB left"):
            memory.acquire(1 << 42, device="cuda")
        del lease, view
        memory.clear(device="cuda")
        assert torch.cuda.memory_allocated() == before
    finally:
        memory.clear(device="cuda")
        cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
