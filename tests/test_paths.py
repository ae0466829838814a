"""An address is refused wherever a path is asked for: it would be taken for a folder called `gs:`."""

from pathlib import Path

import pytest

from dsv4_jax import api, cli
from dsv4_jax.checkpoint import read_config
from dsv4_jax.config_json import config_from_json
from dsv4_jax.errors import UserError
from dsv4_jax.inference.prefix_store import PrefixStore
from dsv4_jax.paths import local_path
from train.ablation_run import ablate
from train.checkpointing import Checkpoints, load_params
from train.data.corpus import resolve
from train.data.tokens import prepare
from train.loop import use_compilation_cache
from train.recipe import find_recipe
from train.run_folder import RunFolder
from train.starting import settings_from

ASKING = {
    "run folder": RunFolder,
    "checkpoints": Checkpoints,
    "parameters": load_params,
    "ablation": lambda path: ablate(find_recipe("recall"), path),
    "text": resolve,
    "conversations": lambda path: resolve(path, "chat"),
    "tokens": lambda path: prepare("python", "bytes", cache=path),
    "programs": use_compilation_cache,
    "weights to begin with": settings_from,
    "model": api.load,
    "released folder": read_config,
    "prefixes": lambda path: PrefixStore(path, {}),
    "config": config_from_json,
}


@pytest.mark.parametrize("what", ASKING)
@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/texts/*.jsonl", Path("gs://bucket/run")])
def test_an_address_is_refused_with_what_to_do(what, address, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with pytest.raises(UserError, match="is an address, and only paths .*: mount that storage"):
        ASKING[what](str(address) if what in ("text", "conversations") else address)


def test_commands_refuse_an_address_and_make_no_folder_of_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert cli.main(["train", "nano", "--out", "gs://bucket/run"]) == 2
    assert cli.main(["audit", "run", "--out", "gs://bucket/page.html"]) == 2
    assert capsys.readouterr().err.count("mount that storage") == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["runs/a", "/mnt/bucket/run", "C:/runs/a", "a colon: x", "hf:owner/name", "."])
def test_paths_are_paths(path):
    assert local_path(path) == Path(path)


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("~/runs") == Path("/home/someone/runs")
