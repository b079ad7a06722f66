# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The patched CPU kernels against double precision, against stock, and in llama.cpp's own tests.

The quick form is what `make test` runs. CPULLM_SOAK=1 adds ten times as many random cases and sanitizer builds;
CPULLM_KERNEL_SEED chooses the cases, which are printed with every failure.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.engine import kernels
from tests.engine.kernels import BEST, ISAS, SEED, SOAK, built, cases
from tests.engine.source import apply_patches, unpack

ROUNDS = 1500 if SOAK else 150


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("check", kernels.CHECKS)
def test_kernels_agree_with_double_precision(trees: Path, isa: str, check: str) -> None:
    """Every size around a tile's edges, every kind of scale and code, and random ones."""
    rounds = ROUNDS if check == "matmul_check" else ROUNDS // 5
    assert cases(built(trees, "patched", isa).run(check, SEED, rounds)) > rounds


def test_tiled_kernel_takes_few_rows_when_forced(trees: Path) -> None:
    """From one row on, where otherwise packing would not pay."""
    output = built(trees, "patched", BEST).run("matmul_check", SEED + 1, ROUNDS, GGML_CPU_TILED_MM_FORCE="1")
    assert cases(output) > ROUNDS


def test_the_check_finds_a_wrong_kernel(trees: Path, tmp_path: Path) -> None:
    """One byte in a thousand blocks off by one is found."""
    source = trees / "patched" / "source" / "ggml/src/ggml-cpu/tiled/tiled-q8_0.cpp"
    right = source.read_text(encoding="utf-8")
    wrong = right.replace("y[b].corr = -128 *", "y[b].corr = (x[b].qs[0] == 77) - 128 *")
    assert wrong != right
    tree = apply_patches(unpack(tmp_path / "source"))
    (tree / source.relative_to(trees / "patched" / "source")).write_text(wrong, encoding="utf-8")
    checks = kernels.build(tree, tmp_path / "build", BEST, targets=["matmul_check"])
    if BEST == "avx512":
        with pytest.raises(AssertionError, match="FAIL mul_mat"):
            checks.run("matmul_check", SEED, ROUNDS)
    else:
        # Without AVX-512 the changed line is not compiled.
        assert cases(checks.run("matmul_check", SEED, ROUNDS)) > ROUNDS


@pytest.mark.parametrize("check", kernels.CHECKS)
def test_avx2_builds_compute_the_same_bits_as_stock(trees: Path, check: str) -> None:
    """The patches change nothing for a CPU without AVX-512."""
    stock, patched = (built(trees, tree, "avx2").run(check, "bits", SEED, 40) for tree in ("stock", "patched"))
    assert re.fullmatch(r"bits=[0-9a-f]{16}\n", stock)
    assert patched == stock


def test_switched_off_it_agrees_as_well(trees: Path) -> None:
    """GGML_CPU_TILED_MM=0 leaves the products to llamafile's kernel and to the dot product."""
    output = built(trees, "patched", BEST).run("matmul_check", SEED, ROUNDS, GGML_CPU_TILED_MM="0")
    assert cases(output) > ROUNDS


def test_attention_computes_the_same_bits_as_stock(trees: Path) -> None:
    """Packing and order of panels do not change one bit of prefill's attention."""
    stock, patched = (
        built(trees, tree, BEST).run("attention_check", "bits", SEED, 40) for tree in ("stock", "patched")
    )
    assert patched == stock


@pytest.mark.parametrize("isa", ISAS if SOAK else [BEST])
@pytest.mark.parametrize("operation", ["MUL_MAT", "MUL_MAT_ID"])
def test_backend_ops_of_llama_cpp(trees: Path, operation: str, isa: str) -> None:
    """llama.cpp's own comparison of the CPU backend with its reference."""
    checks = built(trees, "patched", isa, targets=("test-backend-ops",))
    output = checks.run("test-backend-ops", "test", "-b", "CPU", "-o", operation, "-p", "type_a=q8_0")
    found = re.search(r"(\d+)/(\d+) tests passed", output)
    assert found, output[-2000:]
    assert found[1] == found[2]
    assert int(found[1]) > 10


def test_tiled_matmul_test_of_llama_cpp(trees: Path) -> None:
    """llama.cpp's own test of the tiled path still passes for the types that it had."""
    output = built(trees, "patched", BEST, targets=("test-tiled-mulmat",)).run("test-tiled-mulmat")
    assert "PASS" in output
    assert "FAIL" not in output


if SOAK:

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("sanitizer", list(kernels.SANITIZERS))
    @pytest.mark.parametrize("check", kernels.CHECKS)
    def test_sanitizers_find_nothing(trees: Path, check: str, sanitizer: str, isa: str) -> None:
        """Address, undefined behaviour and threads."""
        rounds = ROUNDS // 10 if check == "matmul_check" else 20
        assert cases(built(trees, "patched", isa, sanitizer).run(check, SEED, rounds)) > rounds
