"""A checkpoint's index, and its shards where they are, against what a configuration says it must hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsv4_jax.checkpoint.files import Entry, listed, read_header, read_index
from dsv4_jax.checkpoint.storage import Spec, inventory
from dsv4_jax.config import DeepseekV4Config


@dataclass(frozen=True)
class Comparison:
    """What an index lacks, has besides, and holds in another shape or dtype.

    Attributes:
        scheme: the naming scheme that fits best.
        missing: names that the configuration has and the index has not.
        extra: names that the index has and the configuration has not.
        misshapen: `name: found instead of expected`, of the tensors in shards that lie beside the index.
        read: how many of the named shards lie there.
        shards: how many shards the index names.
        drafting: how many tensors belong to DSpark's drafting blocks, which are not compared.
    """

    scheme: str
    missing: list[str]
    extra: list[str]
    misshapen: list[str]
    read: int
    shards: int
    drafting: int = 0

    @property
    def fits(self) -> bool:
        """Whether nothing differs."""
        return not (self.missing or self.extra or self.misshapen)

    def lines(self) -> Iterator[str]:
        """The result in sentences."""
        yield f"names: {self.scheme}; shards whose headers were read: {self.read} of {self.shards}"
        if self.drafting:
            yield f"tensors of DSpark drafting blocks (mtp.*), which are not used and not compared: {self.drafting:,}"
        for what, names in (("missing", self.missing), ("extra", self.extra), ("misshapen", self.misshapen)):
            yield f"{what}: {len(names):,}" + (f": {listed(names)}" if names else "")


def compare(config: DeepseekV4Config, index: str | Path, dspark: bool = False) -> Comparison:
    """Hold the index file `index` against the inventory of `config`; only headers are read.

    Args:
        config: the architecture, with its quantisation settings.
        index: a `model.safetensors.index.json`; shards that lie beside it are opened.
        dspark: whether `mtp.*` are drafting blocks, which `config` does not describe.

    Raises:
        FileNotFoundError: when there is no such file.
        CheckpointError: when it is no index, places shards outside its folder, or a shard is damaged.
    """
    index = Path(index)
    if not index.is_file():
        raise FileNotFoundError(f"{index} does not exist: a model.safetensors.index.json is needed")
    weight_map = read_index(index)
    present = [file for file in sorted(set(weight_map.values())) if (index.parent / file).exists()]
    entries: dict[str, Entry] = {}
    for file in present:
        entries |= read_header(index.parent / file)
    schemes = {scheme: inventory(config, scheme) for scheme in ("released", "transformers", "mix")}
    scheme = max(schemes, key=lambda name: len(schemes[name].keys() & weight_map.keys()))
    expected = schemes[scheme]
    drafting = {name for name in weight_map if dspark and name.startswith("mtp.")}
    missing = set(expected) - set(weight_map)
    missing |= {name for name, file in weight_map.items() if file in present and name not in entries}
    extra = (set(weight_map) | set(entries)) - set(expected) - drafting
    misshapen = [
        f"{name}: {found} instead of {expected[name]}"
        for name, entry in entries.items()
        if name in expected and (found := Spec(entry.dtype, entry.shape)) != expected[name]
    ]
    shards = len(set(weight_map.values()))
    return Comparison(scheme, sorted(missing), sorted(extra), sorted(misshapen), len(present), shards, len(drafting))
