# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What decoding takes of the patched CPU kernels, against double precision, against stock, and in llama.cpp's own test.

The quick form is what `make test` runs. CPULLM_SOAK=1 adds twenty times as many random cases and sanitizer builds;
CPULLM_KERNEL_SEED chooses the cases.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.engine import kernels
from tests.engine.kernels import BEST, ISAS, SEED, SOAK, Checks, cases
from tests.engine.source import apply_patches, unpack

ROUNDS = 1000 if SOAK else 50
KERNELS = "ggml/src/ggml-cpu"


def built(trees: Path, tree: str, isa: str, sanitizer: str = "") -> Checks:
    """Return the check of a tree, built once."""
    return kernels.built(trees, tree, isa, sanitizer, ("decode_check",))


def bits(output: str) -> str:
    """Return the hash of all results."""
    found = re.search(r"^bits=([0-9a-f]{16})$", output, re.M)
    assert found, output
    return found[1]


def test_avx2_builds_compute_the_same_bits_as_stock(trees: Path) -> None:
    """The patches change nothing for a CPU without AVX-512, F16 and Q8_0 caches included."""
    stock, patched = (
        bits(built(trees, tree, "avx2").run("decode_check", "bits", SEED, 20)) for tree in ("stock", "patched")
    )
    assert patched == stock


if BEST == "avx512":
    # Stock's own kernels are not held to double precision: they add V up in F16 and get -128 on both sides wrong.

    def test_decoding_agrees_with_double_precision(trees: Path) -> None:
        """Every kind of scale and code, lengths and numbers of rows around each edge, masks, ALiBi, caps, sinks."""
        assert cases(built(trees, "patched", BEST).run("decode_check", SEED, ROUNDS)) > 4 * ROUNDS

    @pytest.mark.parametrize(
        ("file", "right", "wrong", "message"),
        [
            pytest.param(
                "arch/x86/quants.c",
                "permutexvar_ps(hi, d)",
                "permutexvar_ps(lo, d)",
                "FAIL (dot|columns)",
                id="wrong-scale",
            ),
            pytest.param("matvec.c", "quantized != col.src1", "quantized == NULL", "FAIL columns", id="old-column"),
            pytest.param(
                "fattn.cpp", "S*ms + st.S[row]*vs", "S*ms + st.S[row]", "FAIL K f16", id="parts-added-as-they-are"
            ),
            pytest.param("fattn.cpp", "i % group, i / group", "i % group, 0", "FAIL K f16", id="first-token"),
            pytest.param("fattn.cpp", "S*ms + 1.0f", "S*ms", "FAIL K f16", id="sink-not-counted"),
        ],
    )
    def test_the_check_finds_a_wrong_kernel(tmp_path: Path, file: str, right: str, wrong: str, message: str) -> None:
        """Each mistake is seen."""
        tree = apply_patches(unpack(tmp_path / "wrong"))
        source = tree / KERNELS / file
        text = source.read_text(encoding="utf-8")
        assert text.count(right) == 1
        source.write_text(text.replace(right, wrong), encoding="utf-8")
        check = kernels.build(tree, tmp_path / "build", BEST, targets=["decode_check"])
        with pytest.raises(AssertionError, match=message):
            check.run("decode_check", SEED, 0)


@pytest.mark.parametrize("isa", ISAS if SOAK else [BEST])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_backend_ops_of_llama_cpp(trees: Path, cache: str, isa: str) -> None:
    """llama.cpp's own comparison of flash attention with its reference."""
    checks = kernels.built(trees, "patched", isa, targets=("test-backend-ops",))
    # With F16 there are thousands; those of MLA's size are enough for the quick form.
    size = "hsk=576.*" if cache == "f16" and not SOAK else ""
    output = checks.run(
        *("test-backend-ops", "test", "-b", "CPU", "-o", "FLASH_ATTN_EXT", "-p", f"{size}type_K={cache},type_V={cache}")
    )
    found = re.search(r"(\d+)/(\d+) tests passed", output)
    assert found, output[-2000:]
    assert found[1] == found[2]
    assert int(found[1]) > 10


if SOAK:

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("sanitizer", list(kernels.SANITIZERS))
    def test_sanitizers_find_nothing(trees: Path, sanitizer: str, isa: str) -> None:
        """Address, undefined behaviour and threads; what AVX2 computes is stock's, and not held to double precision."""
        check = built(trees, "patched", isa, sanitizer)
        if isa == "avx512":
            assert cases(check.run("decode_check", SEED, ROUNDS // 20)) > ROUNDS // 20
        else:
            assert bits(check.run("decode_check", "bits", SEED, ROUNDS // 20))
