"""The kernels of the fused softmax, compiled ahead of time: the interpreter runs more than the compiler takes."""

import itertools

import pytest

from aroface.heads.fused import _NEW_TILES, _TILES

pytest.importorskip("triton", reason="the fused kernels need triton; it comes with PyTorch for CUDA")

#: compute capability -> tiles, and shared memory of a block in bytes: of an H100, and of an RTX 3090 to 5090
_GPUS = {90: (_NEW_TILES, 232_448), 86: (_TILES, 101_376)}


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "precision"), list(itertools.product(_GPUS, ("bf16", "fp32"))))
def test_kernels_compile_and_fit_into_shared_memory(capability, precision):
    from aroface.heads import fused_kernels

    tiles, limit = _GPUS[capability][0][precision], _GPUS[capability][1]
    sizes = {"tile_rows": tiles.rows, "tile_classes": tiles.classes, "tile_dim": tiles.dim, "padded_dim": 512}
    matrices = {"rows": (tiles.rows, tiles.dim), "centres": (tiles.classes, tiles.dim)}
    for kernel, result in ((fused_kernels.row_terms, None), (fused_kernels.row_shares, (tiles.rows, tiles.classes))):
        types = {"targets": "*i64", "totals": "*fp32", "result": "*fp32"}
        for name, tile in (matrices | ({"result": result} if result else {})).items():
            types[name] = f"tensordesc<{precision}[{tile[0]},{tile[1]}]>" if tiles.described else f"*{precision}"
        shared = _shared_memory(kernel, types, sizes | {"described": tiles.described}, tiles, capability)
        assert shared <= limit
    for kernel in (fused_kernels.unit_centres, fused_kernels.through_length):
        types = {"centres": "*fp32", "gradient": "*fp32", "result": f"*{precision}", "min_length": "fp32"}
        assert _shared_memory(kernel, types, {"tile_classes": 8, "block_dim": 512}, tiles, capability) <= limit


def _shared_memory(kernel, types, constants, tiles, capability):
    """Bytes of a block; arguments without a type are integers, and like pointers divisible by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared
