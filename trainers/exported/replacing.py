"""The folder of an export: what in it may be replaced, and the order of changes that lets a cut export be told.

A folder is ours if config.json has our key, or task.json our content; transformers' save_pretrained keeps such keys but
adds its version, so a model that was trained on there counts as foreign. From the first change to the last one
UNFINISHED names the weight files, so that whoever exports again knows them for ours.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.console.errors import UserError
from cluster.storage.uris import Store
from trainers.exported.formats import CONFIG, PRETRAINING, TASK
from trainers.exported.model_files import INDEX, WEIGHTS

UNFINISHED = "export.unfinished.json"
OTHERS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", TASK)
TASK_KEYS = {"task", "scale", "max_tokens", "pooling"}
_WEIGHTS = re.compile(r"model(-\d{5}(-of-\d{5})?)?\.safetensors|model\.safetensors\.index\.json")
"""transformers' names, and `model-00001.safetensors` of our earlier versions."""


class ForeignFolderError(UserError, ValueError):
    """A folder holds files that no export of this project wrote."""


@contextmanager
def replacing(target: Store, weights: Collection[str], *, overwrite: bool = False) -> Iterator[None]:
    """Make room for a model of these weight files, which the with-block writes, config.json last.

    Of what is there only weight files are deleted, in the folder itself: those that an export of ours names, and with
    `overwrite` all that are named as weights are.

    Raises:
        ForeignFolderError: without `overwrite`, files are there that an export would replace and did not write.
    """
    ours = _weights_of_ours(target)
    foreign = _foreign(target, ours, weights)
    if foreign and not overwrite:
        raise ForeignFolderError(
            f"{target.uri} holds {foreign[0]}, which no export of this project wrote; choose another folder, or "
            "replace the model there with --overwrite"
        )
    old = {*(ours or ()), *(name for name in foreign if _WEIGHTS.fullmatch(name))}
    target.put(
        UNFINISHED, json.dumps({"files": sorted(old | set(weights))}, indent=2, allow_nan=False).encode()
    )
    target.delete(CONFIG)
    if _is_our_task(_read(target, TASK)):
        target.delete(TASK)
    for name in sorted(old - set(weights)):
        target.delete(name)
    yield
    target.delete(UNFINISHED)


def foreign_problem(target: Store, *, begun: bool = True) -> str | None:
    """Why a run may not export into its folder, in one line; None if it may. Of a run that has `begun` weights without
    config.json may be its own: our earlier versions left them when they were cut off."""
    if begun and not target.exists(CONFIG):
        return None
    if not (foreign := _foreign(target, _weights_of_ours(target), ())):
        return None
    return f"{target.uri} holds {foreign[0]}, which no run wrote; the run exports there: move that model elsewhere"


def _weights_of_ours(target: Store) -> set[str] | None:
    """Names of the weight files that our exports into this folder wrote; None if it is not ours."""
    named, config = set(_texts(_read(target, UNFINISHED).get("files"))), _read(target, CONFIG)
    written_here = PRETRAINING in config or _is_our_task(_read(target, TASK))
    if written_here and "transformers_version" not in config:
        index = _read(target, INDEX)
        named |= {INDEX, *_texts(_mapping(index.get("weight_map")).values())} if index else {WEIGHTS}
    elif not named or target.exists(CONFIG):
        return None
    return {name for name in named if _WEIGHTS.fullmatch(name)}


def _foreign(target: Store, ours: Collection[str] | None, weights: Collection[str]) -> list[str]:
    """Files that an export would replace, or that would be read in its place, and that none of ours wrote."""
    if ours is not None:
        return [
            name
            for name in dict.fromkeys((WEIGHTS, INDEX, *weights))
            if name not in ours and target.exists(name)
        ]
    names = dict.fromkeys((CONFIG, WEIGHTS, INDEX, *weights, *OTHERS))
    shards = (info.path for info in target.list("model-") if _WEIGHTS.fullmatch(info.path))
    return list(dict.fromkeys([*(name for name in names if target.exists(name)), *shards]))


def _is_our_task(content: Mapping[str, Any]) -> bool:
    return content.keys() == TASK_KEYS


def _read(target: Store, name: str) -> Mapping[str, Any]:
    """A JSON object of the folder; empty if there is none, or something else."""
    try:
        return _mapping(json.loads(target.read(name)))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(values: Any) -> list[str]:
    return [each for each in values or () if isinstance(each, str)]
