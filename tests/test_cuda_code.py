"""nvcc's code for the product kernels: tensor cores idle while other instructions are issued, and
code that exceeds the caches is fetched again. Needs the library that `make cuda` builds, no GPU."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import sass

LIBRARY = os.environ.get("MGHF_TEST_CUDA_CODE")


@dataclass(frozen=True)
class Bounds:
    """An instance's mangled name, the minimum share of tensor instructions in its loops of
    products, and the maximum size of its code."""

    source: str
    kernel: str
    tensor_share: float
    kibibytes: float
    generic_loads: bool = False
    """Whether it may have generic loads, whose memory space is unknown."""
    spills: int = 0
    """Accesses to spilled registers that it may have, outside of its loops of products."""
    of_three: bool = False
    """Whether it has loops of one product, for less precision, which the share leaves out."""


# Shares and sizes: within about a tenth of the counted ones.
BOUNDS = [
    Bounds("patches", "7projectIfLb0ELi4E", 0.22, 51, of_three=True),
    # One instruction of a warpgroup makes the products of 128 of those above.
    Bounds("patches", "12project_rowsIfLi2ELi2E", 0.0145, 55),
    Bounds("patches", "12project_rowsINS0_8BFloat16ELi2ELi2E", 0.014, 54),
    Bounds("patches", "12project_rowsINS0_4HalfELi2ELi2E", 0.0145, 51),
    Bounds("patches", "19image_gradient_rowsIfLi2E", 0.0315, 40),
    Bounds("patches", "19image_gradient_rowsINS0_8BFloat16ELi2E", 0.0305, 41),
    Bounds("patches", "19image_gradient_rowsINS0_4HalfELi2E", 0.0305, 41),
    Bounds("patches", "20hidden_gradient_rowsILi2E", 0.0068, 50),
    # For less precision, one product for three.
    Bounds("patches", "12project_rowsIfLi2ELi1E", 0.0055, 50),
    Bounds("patches", "12project_rowsINS0_8BFloat16ELi2ELi1E", 0.0054, 50),
    Bounds("patches", "12project_rowsINS0_4HalfELi2ELi1E", 0.0058, 47),
    Bounds("patches", "19image_gradient_rowsIfLi1E", 0.0108, 39),
    Bounds("patches", "19image_gradient_rowsINS0_8BFloat16ELi1E", 0.0106, 40),
    Bounds("patches", "19image_gradient_rowsINS0_4HalfELi1E", 0.0106, 40),
    Bounds("patches", "20hidden_gradient_rowsILi1E", 0.0028, 45),
    Bounds("patches", "15hidden_gradientILb1E", 0.21, 46, of_three=True),
    Bounds("patches", "14image_gradientIfE", 0.27, 51, of_three=True),
    Bounds("patches", "13outer_productIfLb1E", 0.16, 26),
    Bounds("coupling", "13forward_stageIfNS1_12ForwardSizesIfLi64ELi8ELi2ELi32ELb0E", 0.21, 88),
    Bounds("coupling", "13forward_stageIfNS1_12ForwardSizesIfLi64ELi8ELi2ELi32ELb1E", 0.195, 107),
    # One instruction of a warpgroup makes a warp the products of 16 of those above.
    Bounds("coupling", "11stream_rowsIfNS1_9RowsSizesIfLi64ELb0ELi2ELb0E", 0.0095, 56),
    Bounds("coupling", "11stream_rowsIfNS1_9RowsSizesIfLi64ELb1ELi2ELb0E", 0.0075, 64),
    Bounds("coupling", "11stream_rowsIfNS1_9RowsSizesIfLi64ELb0ELi2ELb1E", 0.009, 59),
    Bounds("coupling", "11stream_rowsIfNS1_9RowsSizesIfLi64ELb1ELi2ELb1E", 0.0073, 64),
    Bounds("coupling", "8mix_rowsIfNS1_12MixRowsSizesIfLi1ELi8ELi64ELi2E", 0.008, 48),
    Bounds("coupling", "8mix_rowsIfNS1_12MixRowsSizesIfLi3ELi2ELi64ELi2E", 0.0065, 20),
    Bounds("coupling", "11stream_rowsIfNS1_9RowsSizesIfLi64ELb0ELi1ELb0E", 0.0035, 51),
    Bounds("coupling", "11stream_rowsIfNS1_9RowsSizesIfLi64ELb1ELi1ELb0E", 0.0027, 63),
    Bounds("coupling", "11stream_rowsIfNS1_9RowsSizesIfLi64ELb1ELi1ELb1E", 0.0026, 64),
    Bounds("coupling", "8mix_rowsIfNS1_12MixRowsSizesIfLi1ELi8ELi64ELi1E", 0.003, 44),
    Bounds("coupling", "8mix_rowsIfNS1_12MixRowsSizesIfLi3ELi2ELi64ELi1E", 0.0024, 19),
    Bounds("coupling", "9kept_rowsIfNS1_13KeptRowsSizesIfLb1ELi64ELi2E", 0.0085, 60),
    Bounds("coupling", "9kept_rowsIfNS1_13KeptRowsSizesIfLb0ELi64ELi2E", 0.0138, 63),
    Bounds("coupling", "9kept_rowsIfNS1_13KeptRowsSizesIfLb1ELi32ELi2E", 0.0068, 44),
    Bounds("coupling", "9kept_rowsIfNS1_13KeptRowsSizesIfLb0ELi32ELi2E", 0.011, 45),
    Bounds("coupling", "9kept_rowsIfNS1_13KeptRowsSizesIfLb1ELi64ELi1E", 0.003, 56),
    Bounds("coupling", "9kept_rowsIfNS1_13KeptRowsSizesIfLb0ELi64ELi1E", 0.0051, 56),
    Bounds("coupling", "10kept_stageIfNS1_9KeptSizesIfLb1ELi64E", 0.05, 62),
    Bounds("coupling", "10kept_stageIfNS1_9KeptSizesIfLb0ELi64E", 0.076, 80),
    Bounds("coupling", "10unmix_tapsIfE", 0.19, 11.5),
    Bounds("coupling", "14backward_stageIfNS1_13BackwardSizesIfLi64ELi8E", 0.041, 78),
    Bounds("coupling", "3mixIffNS0_11ExactFloatsELi1E", 0.24, 39),
    Bounds("coupling_weights", "8multiplyINS1_8OfPixelsENS1_9OfWeightsE", 0.15, 27),
    # What prepares its loop of one product lies in the other loop: 348 instructions, not 327.
    Bounds("gram", "16products_of_runsIfLNS0_7ReadingE2E", 0.135, 14, of_three=True),
    Bounds("gram", "8gradientIfLNS0_7ReadingE2E", 0.25, 11, of_three=True),
    Bounds("content_style", "15stream_gradientIfLNS0_7ReadingE2ELb1E", 0.245, 27, of_three=True),
    Bounds("dec", "13sums_of_pairs", 0.26, 35),
    Bounds("dec", "17gradient_of_pairsILi3E", 0.3, 64),
    Bounds("monce", "8contrastILi14ELb1E", 0.045, 290, generic_loads=True),
    # The sums of three products are added outside the tensor cores: 56 additions for their 42
    # instructions, of which each takes longer than four of the others.
    Bounds("monce_chip", "16contrast_on_chipILb0ELb0E", 0.32, 41),
    Bounds("monce_chip", "16contrast_on_chipILb1ELb0E", 0.32, 43),
    Bounds("monce_chip", "16contrast_on_chipILb0ELb1E", 0.31, 64),
    Bounds("monce_chip", "16contrast_on_chipILb1ELb1E", 0.31, 64),
    # What prepares few products: factors are split, and read from permuted places.
    Bounds("monce_warp", "15losses_by_warpsILi1E", 0.083, 17),
    Bounds("monce_warp", "15losses_by_warpsILi2E", 0.084, 21),
    Bounds("monce_warp", "15losses_by_warpsILi4E", 0.187, 31),
    Bounds("monce_warp", "17gradient_by_warpsILi1E", 0.06, 28.5),
    Bounds("monce_warp", "17gradient_by_warpsILi2E", 0.065, 35),
    Bounds("monce_warp", "17gradient_by_warpsILi4E", 0.147, 55),
    # One instruction of a warpgroup makes a warp the products of 14 of those above; generic loads
    # are those from other blocks.
    Bounds("monce_cluster", "20contrast_by_clustersILb0E", 0.022, 44, generic_loads=True),
    Bounds("monce_cluster", "20contrast_by_clustersILb1E", 0.044, 64, generic_loads=True),
]


def complaints(kernel: sass.Kernel, bounds: Bounds) -> list[str]:
    found = []
    if (share := kernel.tensor_share(bounds.of_three)) < bounds.tensor_share:
        found.append(f"{share:.1%} of the instructions in its loops of products are tensor cores'")
    if kernel.kibibytes > bounds.kibibytes:
        found.append(f"{kernel.kibibytes:.1f} KiB of code")
    if (spilled := kernel.count("LDL", "STL")) > bounds.spills:
        found.append(f"{spilled} accesses to spilled registers")
    if slow := kernel.count("F2F"):
        found.append(f"{slow} conversions one by one")
    if not bounds.generic_loads and (generic := kernel.count("LD", "ST")):
        found.append(f"{generic} accesses through generic addresses")
    return found


Compiled = dict[str, list[sass.Kernel]]
"""The kernels of each source."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if LIBRARY is None:
        pytest.skip("MGHF_TEST_CUDA_CODE names no library of the CUDA kernels; `make cuda` does")
    texts = list(sass.disassemblies(Path(LIBRARY), tmp_path_factory.mktemp("cubin")))
    if not texts:
        pytest.skip(f"the library has no code for {sass.ARCHITECTURE}")
    # The names of what is in an unnamed namespace have the source's name.
    sources = [re.search(r"GLOBAL__N__\w+?_\d+_([a-z_]+)_cu_", text) for text in texts]
    return {s[1]: list(sass.kernels(text)) for s, text in zip(sources, texts, strict=True) if s}


@pytest.mark.parametrize("bounds", BOUNDS, ids=lambda b: b.kernel)
def test_products_are_mostly_products(bounds: Bounds, compiled: Compiled) -> None:
    (kernel,) = [k for k in compiled[bounds.source] if bounds.kernel in k.name]
    assert complaints(kernel, bounds) == []


MOST_KIBIBYTES = 64
# What larger kernels are for: comparison with newer ones, and what those do not take; packing runs
# once for its weights.
LARGER = {
    "coupling": ("forward_stage", "backward_stage", "kept_stage", "pack_weights"),
    "monce": ("8contrastI",),
}


@pytest.mark.parametrize("source", sorted({b.source for b in BOUNDS}))
def test_code_is_short(source: str, compiled: Compiled) -> None:
    """Code that a launch executes for the first time comes from memory."""
    kernels = [k for k in compiled[source] if not any(n in k.name for n in LARGER.get(source, ()))]
    assert kernels
    assert {k.name: k.kibibytes for k in kernels if k.kibibytes > MOST_KIBIBYTES} == {}


@pytest.mark.parametrize("source", ["content_style", "entropy"])
def test_sweeps_use_no_generic_addresses(source: str, compiled: Compiled) -> None:
    """And spill no registers. Which of two images a block reads, it must find out without that."""
    for kernel in compiled[source]:
        assert kernel.count("LD", "ST") == 0, kernel.name
        assert kernel.count("LDL", "STL") == 0, kernel.name


TEXT = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDS R2, [R1] ;
.L_x_2:
        /*0020*/                   HMMA.1688.F32.TF32 R4, R8, R2, R4 ;
        /*0030*/               @P0 FADD R4, R4, R2 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
        /*0050*/                   LD.E R2, [R4] ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/               @P0 BRA `(.L_x_3) ;
.L_x_3:
        /*0090*/                   EXIT ;
"""


def test_what_is_read_from_a_disassembly() -> None:
    (kernel,) = sass.kernels(TEXT)
    assert kernel.name == "kernel" and len(kernel.instructions) == 10
    assert kernel.loops == ((1, 6), (2, 4))
    assert kernel.tensor_share() == 1 / 3
    assert complaints(kernel, Bounds("", "", 0.3, 1, generic_loads=True)) == [
        "1 accesses to spilled registers"
    ]
    assert len(complaints(kernel, Bounds("", "", 0.4, 0.1))) == 4
