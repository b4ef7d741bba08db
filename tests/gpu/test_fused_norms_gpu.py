"""The fused batch norms compiled for a GPU, against float64; the interpreter runs the same checks on the CPU."""

import pytest
import torch

from tests.helpers import fused_norms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("has_prelu", "has_residual"), fused_norms.FOLLOWERS)
@pytest.mark.parametrize("shape", [*fused_norms.SHAPES, (64, 64, 56, 56), (3, 512, 7, 7)])
def test_norms(shape, dtype, has_prelu, has_residual):
    fused_norms.norm_against_float64(shape, dtype, "cuda", has_prelu=has_prelu, has_residual=has_residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("has_prelu", "has_residual"), fused_norms.FOLLOWERS)
@pytest.mark.parametrize("shape", [fused_norms.SHAPES[3], (64, 64, 56, 56)])
def test_norms_with_running_averages(shape, dtype, has_prelu, has_residual):
    followers = {"has_prelu": has_prelu, "has_residual": has_residual}
    fused_norms.norm_against_float64(shape, dtype, "cuda", **followers, is_frozen=True)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*fused_norms.SHAPES, (64, 64, 56, 56)])
def test_a_fork(shape, dtype, is_frozen):
    fused_norms.fork_against_float64(shape, dtype, "cuda", is_frozen=is_frozen)


def test_statistics():
    fused_norms.variance_beside_a_large_mean("cuda")
    fused_norms.statistics_that_are_not_recorded("cuda")
    fused_norms.constant_weights("cuda", is_frozen=False)
    fused_norms.constant_weights("cuda", is_frozen=True)


@pytest.mark.parametrize("family", ["iresnet", "ir", "mobilefacenet"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_network(family, dtype):
    fused_norms.network_against_its_twin(fused_norms.networks(image_size=112)[family], "cuda", dtype=dtype)
