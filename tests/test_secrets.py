"""Keys that are planted in a run's surroundings are found nowhere that it writes to (law L9)."""

import ast
import json
import re
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest

from cluster.local_s3 import LocalS3
from cluster.sessions.session import PROJECT
from cluster.storage.store import Store
from cluster.storage.uris import open_store
from k8s.check import K8S
from tests.small_run import SmallRun, put_corpus

VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN")


UNPICKLED = (
    "torch.load(file)",
    "pickle.loads(data)",
    "cloudpickle.load(file)",
    "pickle.Unpickler(file)",
    "np.load(file, allow_pickle=True)",
    "joblib.load(file)",
    "from pickle import loads",
    "from torch import load",
    "yaml.unsafe_load(text)",
    "yaml.load(text, Loader=yaml.Loader)",
)
LOADERS = {"torch.load", "torch.jit.load", "joblib.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load"}
PICKLES = {"pickle", "cloudpickle", "dill", "ray.cloudpickle", "shelve", "marshal"}


def unpickles(node: ast.AST) -> bool:
    """Whether a piece of Python makes objects of bytes in a way that can run code."""
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        return bool(names & LOADERS) or (node.module in PICKLES and any("oad" in name for name in names))
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    module, _, name = called.rpartition(".")
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if "allow_pickle" in keywords:
        return True
    if keywords.get("Loader") == "ConfigLoader":  # cluster/limits/strict_yaml.py's, a SafeLoader
        return False
    return called in LOADERS or (module in PICKLES and name in ("load", "loads", "Unpickler", "open"))


def files_with(folder: Path, words: list[bytes]) -> list[str]:
    """Files below a folder that hold any of the words, in their names or contents."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and any(word in path.read_bytes() or word in str(path).encode() for word in words)
    ]


def found_after_a_run(root: str, folder: Path, words: list[bytes], monkeypatch) -> tuple[Store, list[str]]:
    """A small run's folder, and the files of this machine that hold any of the words: its own, Ray's logs."""
    session = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path: it becomes that of sockets
    monkeypatch.setenv("RAY_TMPDIR", session)
    run = SmallRun(root, folder / "log.txt")
    put_corpus(open_store(f"{root}/raw"))
    try:
        assert run.finish(run.start(run__steps=4)) == 0, run.output()
        assert list(Path(session).rglob("*.log")), "no log of Ray was looked at"
        return open_store(f"{root}/runs/pretrain"), files_with(folder, words) + files_with(
            Path(session), words
        )
    finally:
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.cluster
def test_planted_keys_are_in_no_file_of_the_run_nor_in_any_log(tmp_path, monkeypatch) -> None:
    planted = {name: secrets.token_hex(16) for name in VARIABLES}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    words = [value.encode() for value in planted.values()]
    store, files = found_after_a_run(str(tmp_path / "storage"), tmp_path, words, monkeypatch)
    assert store.exists("report.html")
    assert files == []


@pytest.mark.cluster
def test_the_keys_that_a_run_opens_its_s3_store_with_are_in_no_object_and_no_log(
    s3: LocalS3, s3_uri: str, tmp_path: Path, monkeypatch
) -> None:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    words = [s3.environment[name].encode() for name in names]
    assert all(len(word) >= 8 for word in words), "too short to be told from other text"
    store, files = found_after_a_run(s3_uri, tmp_path, words, monkeypatch)
    assert store.exists("report.html")
    assert files == []
    everything = open_store(s3_uri)
    paths = [info.path for info in everything.list("")]
    assert len(paths) > 10
    assert [path for path in paths if any(word in everything.read(path) for word in words)] == []


# `import` of what runs code from bytes -> why it is harmless there.
UNPICKLING = {
    "data/rows/stream.py": "parts of one pipeline, from worker 0 to the others of its group; they were never stored"
}


def test_no_module_unpickles_what_a_writer_of_a_bucket_could_have_put_there() -> None:
    found = {}
    for path in (p for top in ("cluster", "data", "trainers", "tune") for p in (PROJECT / top).rglob("*.py")):
        calls = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if unpickles(node)]
        if calls:
            found[str(path.relative_to(PROJECT))] = calls
    assert found.keys() == UNPICKLING.keys(), found


@pytest.mark.parametrize("code", UNPICKLED)
def test_each_way_to_unpickle_is_seen(code: str) -> None:
    assert any(unpickles(node) for node in ast.walk(ast.parse(code)))


def test_safetensors_and_json_are_not_taken_for_pickles() -> None:
    for code in ("safetensors.torch.load(data)", "json.loads(data)", "torch.save(a, b)", "yaml.safe_load(t)"):
        assert not any(unpickles(node) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize(
    "key", ["AKIAPLANTED:planted/key@bucket", "AKIAPLANTED:planted@bucket", "planted@bucket"]
)
def test_a_key_in_a_uri_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="credentials") as found:
        open_store(f"s3://{key}/prefix")
    assert "planted" not in str(found.value).lower()


def test_the_policy_lets_a_run_write_its_own_places_and_nothing_else() -> None:
    policy = json.loads((K8S / "s3-policy.json").read_text())
    allowed: dict[str, set[str]] = {}
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        for resource in statement["Resource"]:
            allowed.setdefault(resource, set()).update(statement["Action"])
    writable = {resource for resource, actions in allowed.items() if "s3:PutObject" in actions}
    assert writable == {"arn:aws:s3:::example-corpus/prepared/*", "arn:aws:s3:::example-runs/runs/*"}
    assert not any("*" in action for actions in allowed.values() for action in actions)
    assert all(resource.startswith("arn:aws:s3:::example-") for resource in allowed)


STARTS_A_NODE = re.compile(
    r"ray[\"']?,? +[\"']?start\b.*--(head|address|node-ip-address|dashboard-host)|^kind: Ray(Job|Cluster)$",
    re.MULTILINE,
)
ASKS_FOR_A_TOKEN = re.compile(r"RAY_AUTH_MODE[\"']?(=|: *)[\"']?token|authOptions:\s+mode: token")
COMMANDS = ("*.py", "*.sh", "*.md", "*.yaml", "*.yml", "Makefile", "Dockerfile*")


def is_open(text: str) -> bool:
    """Whether a file starts a node of Ray that others reach, and nowhere says that it asks for a token."""
    return bool(STARTS_A_NODE.search(text)) and not ASKS_FOR_A_TOKEN.search(text)


def test_nothing_that_starts_ray_beyond_loopback_goes_without_a_token() -> None:
    folders = ("cluster", "data", "trainers", "tune", "k8s", "benchmarks", ".github")
    files = [path for pattern in COMMANDS for path in PROJECT.glob(pattern)]
    files += [path for name in folders for pattern in COMMANDS for path in (PROJECT / name).rglob(pattern)]
    # The rule of manifests is code that speaks of them.
    manifests = [path for path in files if path.parts[-2:-1] == ("k8s",) and path.suffix == ".py"]
    assert len(files) > 200 and PROJECT / "k8s/base/rayjob.yaml" in files
    assert [str(path) for path in files if path not in manifests and is_open(path.read_text())] == []


def test_the_one_place_that_starts_a_ray_of_its_own_keeps_it_on_this_machine() -> None:
    starts = {}
    for path in (p for top in ("cluster", "data", "trainers", "tune") for p in (PROJECT / top).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if found := [node for node in calls if ast.unparse(node.func) in ("ray.init", "Cluster")]:
            starts[str(path.relative_to(PROJECT))] = len(found)
    assert starts == {"cluster/sessions/session.py": 1}, (
        "which gives `local`, loopback and no dashboard, or an address"
    )


@pytest.mark.parametrize(
    "text",
    [
        "ray start --head --port 6379",
        "ssh node2 ray start --address=10.0.0.1:6379",
        'Popen(["ray", "start", "--block", "--head"])',
        "apiVersion: ray.io/v1\nkind: RayCluster\n",
        "RAY_AUTH_MODE=disabled ray start --head",
    ],
)
def test_each_way_to_start_a_node_for_others_is_seen_and_with_a_token_accepted(text: str) -> None:
    assert is_open(text)
    assert not is_open(f"export RAY_AUTH_MODE=token\n{text}")
    assert not is_open(f"{text}\nauthOptions:\n  mode: token\n")
