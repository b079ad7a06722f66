# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.cpullm.epyc.plugins.filter.models_table import FilterModule, models_table
from ansible_collections.cpullm.epyc.plugins.module_utils._manifest import Candidate, choose_shards
from ansible_collections.cpullm.epyc.plugins.plugin_utils import _catalog
from ansible_collections.cpullm.epyc.plugins.plugin_utils._catalog import KnownModel
from hypothesis import given
from hypothesis import strategies as st

from tests.support import gguf_file, hub
from tests.unit.test_gguf import TINY

CLONE = Path(__file__).resolve().parents[2]
KNOWN = {model.name: model for model in _catalog.read_catalog()}

# First shards as public listings, guides and logs show them, under the folder that they lie in.
SEEN = {
    "deepseek-r1-q8_0": "DeepSeek-R1-Q8_0/DeepSeek-R1.Q8_0-00001-of-00015.gguf",
    "deepseek-r1-q4_k_m": "DeepSeek-R1-Q4_K_M/DeepSeek-R1-Q4_K_M-00001-of-00009.gguf",
    "deepseek-r1-ud-q2_k_xl": "DeepSeek-R1-UD-Q2_K_XL/DeepSeek-R1-UD-Q2_K_XL-00001-of-00005.gguf",
    "deepseek-r1-zero-q8_0": "DeepSeek-R1-Zero-Q8_0/DeepSeek-R1-Zero-BF16-256x20B-Q8_0-00001-of-00016.gguf",
    "deepseek-r1-zero-q4_k_m": "DeepSeek-R1-Zero-Q4_K_M/DeepSeek-R1-Zero-Q4_K_M-00001-of-00009.gguf",
    "deepseek-r1-zero-q2_k_l": "DeepSeek-R1-Zero-Q2_K_L/DeepSeek-R1-Zero-Q2_K_L-00001-of-00005.gguf",
    "deepseek-r1-0528-q4_k_m": "Q4_K_M/DeepSeek-R1-0528-Q4_K_M-00001-of-00009.gguf",
    "deepseek-v3-q4_k_m": "DeepSeek-V3-Q4_K_M/DeepSeek-V3-Q4_K_M-00001-of-00009.gguf",
    "deepseek-v3-0324-ud-q2_k_xl": "UD-Q2_K_XL/DeepSeek-V3-0324-UD-Q2_K_XL-00001-of-00006.gguf",
    "deepseek-v3.1-q4_k_m": "Q4_K_M/DeepSeek-V3.1-Q4_K_M-00001-of-00009.gguf",
    "deepseek-v3.1-ud-q2_k_xl": "UD-Q2_K_XL/DeepSeek-V3.1-UD-Q2_K_XL-00001-of-00006.gguf",
    "kimi-k2-q8_0": "Q8_0/Kimi-K2-Instruct-Q8_0-00001-of-00023.gguf",
    "kimi-k2-ud-q4_k_xl": "UD-Q4_K_XL/Kimi-K2-Instruct-UD-Q4_K_XL-00001-of-00013.gguf",
    "kimi-k2-ud-q2_k_xl": "UD-Q2_K_XL/Kimi-K2-Instruct-UD-Q2_K_XL-00001-of-00008.gguf",
    "qwen3-coder-480b-q4_k_m": "Q4_K_M/Qwen3-Coder-480B-A35B-Instruct-Q4_K_M-00001-of-00006.gguf",
    "qwen3-coder-480b-ud-q2_k_xl": "UD-Q2_K_XL/Qwen3-Coder-480B-A35B-Instruct-UD-Q2_K_XL-00001-of-00004.gguf",
    "qwen3-235b-2507-q8_0": "Q8_0/Qwen3-235B-A22B-Instruct-2507-Q8_0-00001-of-00006.gguf",
    "qwen3-235b-2507-q4_k_m": "Q4_K_M/Qwen3-235B-A22B-Instruct-2507-Q4_K_M-00001-of-00003.gguf",
    "qwen3-235b-2507-ud-q2_k_xl": "UD-Q2_K_XL/Qwen3-235B-A22B-Instruct-2507-UD-Q2_K_XL-00001-of-00002.gguf",
    "glm-4.6-ud-q2_k_xl": "UD-Q2_K_XL/GLM-4.6-UD-Q2_K_XL-00001-of-00003.gguf",
    "llama-4-maverick-ud-q4_k_xl": "UD-Q4_K_XL/Llama-4-Maverick-17B-128E-Instruct-UD-Q4_K_XL-00001-of-00005.gguf",
    "gpt-oss-120b-mxfp4": "gpt-oss-120b-mxfp4-00001-of-00003.gguf",
}
# What lies beside them in such repositories.
BESIDE = (
    "DeepSeek-R1-0528-UD-TQ1_0.gguf",
    "UD-Q8_K_XL/Z-UD-Q8_K_XL-00001-of-00001.gguf",
    "mmproj-BF16.gguf",
    "README.md",
)


def shards(model: KnownModel) -> list[Candidate]:
    """Return all shards of a model, with the names seen, or with made-up ones."""
    first = SEEN.get(model.name, model.pattern.replace("*", f"{model.name}-00001-of-00003"))
    count = int(first[-10:-5])
    return [Candidate(first.replace("-00001-of-", f"-{number:05d}-of-"), 1, None) for number in range(1, count + 1)]


@pytest.mark.parametrize("name", KNOWN)
def test_a_pattern_chooses_one_whole_model_of_its_repository(name: str) -> None:
    repo = [model for model in KNOWN.values() if model.repo == KNOWN[name].repo]
    listing = [file for model in repo for file in shards(model)]
    listing += [Candidate(path, 1, None) for path in BESIDE]
    assert list(choose_shards(listing, KNOWN[name].pattern)[2]) == shards(KNOWN[name])


def test_the_catalog_holds_the_models_that_were_promised() -> None:
    families = ("r1", "r1-zero", "r1-0528", "v3", "v3-0324", "v3.1-terminus")
    assert {f"deepseek-{family}-q8_0" for family in families} <= set(KNOWN)
    assert {"kimi-k2-q8_0", "qwen3-235b-2507-q8_0", "glm-4.6-ud-q2_k_xl", "gpt-oss-120b-mxfp4"} <= set(KNOWN)
    assert set(SEEN) <= set(KNOWN)


def test_the_catalog_holds_nothing_that_a_fetch_must_prove() -> None:
    text = _catalog.CATALOG.read_text()
    assert not re.search(r"\b[0-9a-f]{40}\b|\b[0-9a-f]{64}\b", text)
    assert {key for entry in yaml.safe_load(text)["models"] for key in entry} == {
        "name",
        "title",
        "repo",
        "pattern",
        "mla",
        "note",
    }


def test_the_first_uploads_are_known_to_lack_mla() -> None:
    assert {model.repo for model in KNOWN.values() if model.mla is False} == {
        "unsloth/DeepSeek-R1-GGUF",
        "unsloth/DeepSeek-R1-Zero-GGUF",
        "unsloth/DeepSeek-V3-GGUF",
        "unsloth/DeepSeek-V3-0324-GGUF",
    }


def catalog(**changes: object) -> str:
    """Return a catalog of two entries, the second one changed; None takes a field out."""
    entry: dict[str, object] = {"name": "b", "title": "B", "repo": "x/y", "pattern": "*.gguf"}
    entry = {key: value for key, value in {**entry, **changes}.items() if value is not None}
    return yaml.safe_dump({"models": [{"name": "a", "title": "A", "repo": "x/y", "pattern": "*.gguf"}, entry]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "models: missing, expected a list", id="empty"),
        pytest.param("[", "found no YAML", id="no-yaml"),
        pytest.param("models: {}", "models: missing, expected a list", id="no-list"),
        pytest.param("models: [7]", "models[0]: found 7, expected an object", id="no-object"),
        pytest.param(catalog(sha256="0" * 64), "models[1]: found sha256, expected only name, title", id="hash"),
        pytest.param(catalog(bytes=1), "models[1]: found bytes, expected only name, title", id="size"),
        pytest.param(catalog(repo=None), "models[1]: repo: missing", id="missing"),
        pytest.param(catalog(name="a"), "models[1]: the name a is there twice", id="twice"),
        pytest.param(catalog(name="a/b"), "models[1]: name: found 'a/b', expected letters", id="name"),
        pytest.param(catalog(repo="y"), "models[1]: repo: found 'y', expected organisation/name", id="repo"),
        pytest.param(catalog(pattern="Q8_0/*"), "found 'Q8_0/*', expected one that ends in .gguf", id="pattern"),
        pytest.param(catalog(title="A\nB"), "models[1]: title: found 'A\\nB', expected one line of text", id="line"),
        pytest.param(catalog(title=""), "models[1]: title: found '', expected one line of text", id="no-title"),
        pytest.param(catalog(mla="no"), "models[1]: mla: found 'no', expected true or false", id="mla"),
    ],
)
def test_damaged_catalogs_are_refused_by_entry(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        _catalog.parse_catalog(text)
    assert message in str(caught.value)


@given(
    st.fixed_dictionaries(
        {"models": st.lists(st.dictionaries(st.sampled_from(["name", "repo", "mla", "x"]), st.integers() | st.text()))}
    )
)
def test_random_entries_raise_nothing_but_value_errors(data: object) -> None:
    try:
        assert _catalog.parse_catalog(yaml.safe_dump(data)) == ()
    except ValueError as error:
        assert "models[" in str(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("deepseek-r1-q8", "such as deepseek-r1-q8_0, ", id="short"),
        pytest.param("DeepSeek-R1-Q8_0", "such as deepseek-r1-q8_0, ", id="capitals"),
        pytest.param("deepsek-v3.1-q4_k_m", "such as deepseek-v3.1-q4_k_m, ", id="typing-error"),
        pytest.param(
            "?", f"found '?', expected a name; playbooks/models.yml lists all {len(KNOWN)}", id="nothing-near"
        ),
        pytest.param("", "found '', expected a name; playbooks/models.yml lists", id="empty"),
    ],
)
def test_unknown_names_are_refused_with_the_near_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^model: found ") as caught:
        _catalog.find_model(name, tuple(KNOWN.values()))
    assert message in str(caught.value)


# --- The table ------------------------------------------------------------------------------------------------------


def test_the_table_shows_every_model_once() -> None:
    lines = models_table("")
    assert [line.split()[0] for line in lines if re.match(r"[a-z0-9.-]+\S*  ", line)] == list(KNOWN)
    assert lines[-1].startswith("no MLA: ")
    assert set(FilterModule().filters()) == {"models_table"}


def test_the_table_of_one_family() -> None:
    lines = models_table("V3-0324")
    assert [line.split()[0] for line in lines[:3]] == [name for name in KNOWN if "v3-0324" in name]
    assert "no MLA  unsloth/DeepSeek-V3-0324-GGUF Q8_0/*.gguf" in lines[0]
    assert "  MLA     unsloth/DeepSeek-V3-0324-GGUF-UD UD-Q2_K_XL/*.gguf" in lines[2]


def test_no_model_no_table() -> None:
    with pytest.raises(
        AnsibleFilterError, match=f"found no model with 'gpt-5' in name or title, expected one of {len(KNOWN)}"
    ):
        models_table("gpt-5")


# --- The playbook, against a hub ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub.Hub]:
    """Serve the catalog's DeepSeek-R1 in Q8_0 without MLA tensors, another model beside it, and one with them."""
    first = tmp_path_factory.mktemp("r1")
    (first / "DeepSeek-R1-Q8_0").mkdir()
    (first / "DeepSeek-R1-Q4_K_M").mkdir()
    plain = dataclasses.replace(TINY, mla=False)
    gguf_file.write_model(first / "DeepSeek-R1-Q8_0", "DeepSeek-R1.Q8_0", plain.pairs(), plain.tensors(), 3)
    gguf_file.write_model(first / "DeepSeek-R1-Q4_K_M", "DeepSeek-R1-Q4_K_M", plain.pairs(), plain.tensors(), 2)
    second = tmp_path_factory.mktemp("v3.1")
    (second / "UD-Q2_K_XL").mkdir()
    gguf_file.write_model(second / "UD-Q2_K_XL", "DeepSeek-V3.1-UD-Q2_K_XL", TINY.pairs(), TINY.tensors(), 2)
    with hub.Hub() as running:
        running.add("unsloth/DeepSeek-R1-GGUF", first)
        running.add("unsloth/DeepSeek-V3.1-GGUF", second)
        yield running


def play(playbook: str, server: hub.Hub | None = None, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a playbook as an operator does; ``server`` stands in HF_ENDPOINT, else there is no hub to reach."""
    program = str(Path(sys.executable).parent / "ansible-playbook")
    words = [f"--extra-vars={key}={value}" for key, value in variables.items()]
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(CLONE / "ansible.cfg"),
        "HF_ENDPOINT": server.url if server else "http://127.0.0.1:9",
    }
    environment.pop("HF_TOKEN", None)
    return subprocess.run(
        [program, playbook, *words], cwd=CLONE, env=environment, check=False, capture_output=True, text=True
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a playbook said, without the line breaks that it made."""
    return " ".join((done.stdout + done.stderr).split())


def test_a_name_becomes_a_lock_that_says_loudly_what_missing_mla_costs(server: hub.Hub, tmp_path: Path) -> None:
    lock = tmp_path / "r1.json"
    done = play("playbooks/lock.yml", server, lock_model="deepseek-r1-q8_0", lock_file=lock)
    assert done.returncode == 0, said(done)
    data = json.loads(lock.read_text())
    commit = server.repo("unsloth/DeepSeek-R1-GGUF").commit  # type: ignore[union-attr]
    assert data["name"] == "deepseek-r1-q8_0"
    assert data["source"] == {
        "type": "hub",
        "endpoint": server.url,
        "repo": "unsloth/DeepSeek-R1-GGUF",
        "commit": commit,
        "prefix": "DeepSeek-R1-Q8_0/",
    }
    assert [shard["file"] for shard in data["shards"]] == [f"DeepSeek-R1.Q8_0-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    # 3 layers of 4 heads: 4 x 64 values in q8_0 and 4 x 32 in F16; with MLA 64 + 32 values in q8_0.
    cost = "1584 bytes of KV cache for each token of context, 5 times the 306 with MLA"
    assert f"[WARNING]: deepseek-r1-q8_0: a GGUF without attn_k_b and attn_v_b: {cost}." in said(done)


def test_revision_endpoint_and_name_are_the_operators(server: hub.Hub, tmp_path: Path) -> None:
    lock = tmp_path / "v3.json"
    words = {"lock_model": "deepseek-v3.1-ud-q2_k_xl", "lock_file": lock, "lock_endpoint": server.url}
    commit = server.repo("unsloth/DeepSeek-V3.1-GGUF").commit  # type: ignore[union-attr]
    done = play("playbooks/lock.yml", lock_revision=commit, lock_name="v3.1", **words)
    assert done.returncode == 0, said(done)
    assert "without attn_k_b" not in said(done)
    data = json.loads(lock.read_text())
    assert (data["name"], data["source"]["commit"], data["gguf"]["mla"]) == ("v3.1", commit, True)
    lock.unlink()
    done = play("playbooks/lock.yml", lock_revision="gone", **words)
    assert done.returncode == 2
    assert not lock.exists()
    assert "deepseek-v3.1-ud-q2_k_xl, unsloth/DeepSeek-V3.1-GGUF: " in said(done)
    assert "/revision/gone: HTTP 404" in said(done)


LISTED = "playbooks/models.yml lists"


@pytest.mark.parametrize(
    ("variables", "message", "way_out"),
    [
        pytest.param({}, "Found lock_file; expected lock_file (to write), and one of lock_model ", LISTED, id="none"),
        pytest.param(
            {"lock_model": "deepseek-r1-q8_0", "lock_repo": "a/b"},
            "Found lock_file, lock_model, lock_repo; ",
            LISTED,
            id="repo",
        ),
        pytest.param(
            {"lock_model": "deepseek-r1-q8_0", "lock_directory": "/srv"},
            "Found lock_directory, lock_file, lock_model; ",
            LISTED,
            id="directory",
        ),
        pytest.param(
            {"lock_model": "deepseek-r1-q8_0", "lock_pattern": "*"},
            "Found lock_file, lock_model, lock_pattern; ",
            "lock_pattern goes with the last two",
            id="pattern",
        ),
        pytest.param(
            {"lock_model": "deepseek-r1"},
            "model: found 'deepseek-r1', expected a name such as deepseek-r1-q8_0, ",
            LISTED,
            id="unknown",
        ),
        pytest.param(
            {"lock_model": "deepseek-r1-ud-q2_k_xl"},
            "deepseek-r1-ud-q2_k_xl, unsloth/DeepSeek-R1-GGUF: found no GGUF file among 5 files that match "
            "'DeepSeek-R1-UD-Q2_K_XL/*.gguf'",
            "give lock_repo and lock_pattern if the upload moved",
            id="moved-away",
        ),
    ],
)
def test_wishes_that_are_refused(
    variables: dict[str, str], message: str, way_out: str, server: hub.Hub, tmp_path: Path
) -> None:
    lock = tmp_path / "x.json"
    done = play("playbooks/lock.yml", server, lock_file=lock, **variables)
    assert done.returncode == 2
    assert message in said(done)
    assert way_out in said(done)
    assert not lock.exists()


def test_models_are_listed_without_a_hub() -> None:
    done = play("playbooks/models.yml", models_like="kimi")
    assert done.returncode == 0, said(done)
    assert re.findall(r"kimi-k2-[a-z0-9_-]+", done.stdout) == [name for name in KNOWN if name.startswith("kimi")]
