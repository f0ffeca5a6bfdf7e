"""What a backbone was pretrained on, by the configuration of its run: no test text may stand there."""

from dataclasses import dataclass

from cluster.configuration.stored_file import read_yaml
from cluster.storage.uris import Store, open_store
from trainers.pretraining.run_folder import CONFIG
from trainers.stored.run_files import StoredConfig


@dataclass(frozen=True)
class PretrainingText:
    """Raw text that a backbone has read."""

    uris: tuple[str, ...]
    unknown: str
    """Why that is not all, if so."""


def pretraining_text(backbone_uri: str) -> PretrainingText:
    """The corpora of the run that exported a backbone, and of those that it was started from."""
    uris: list[str] = []
    seen: set[str] = set()
    backbone = open_store(backbone_uri).uri
    while backbone:
        if backbone in seen:
            return PretrainingText(tuple(uris), f"{backbone} was started from itself")
        seen.add(backbone)
        run = open_store(backbone.rstrip("/").rpartition("/")[0])
        config = stored_config(run)
        if not config:
            return PretrainingText(
                tuple(uris), f"{run.uri} holds no {CONFIG} of the pretraining run of {backbone}"
            )
        corpus = config["corpus"]
        uris += [uri for uri in (corpus.get("uri"), *(corpus.get("sources") or {}).values()) if uri]
        backbone = (config.get("run") or {}).get("init_from") or ""
    return PretrainingText(tuple(dict.fromkeys(uris)), "")


def stored_config(run: Store) -> dict | None:
    """The configuration of a pretraining run; None where there is none. Raises `DamagedFileError`."""
    remedy = "put it back, or name the text by curve.pretraining_text"
    try:
        config = read_yaml(run, CONFIG, StoredConfig, remedy)
    except FileNotFoundError:
        return None
    return config if "corpus" in config else None
