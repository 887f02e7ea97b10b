"""Atomic writes, stage folders, manifests, verification, full disks."""

import errno
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flows import artefacts
from flows.artefacts import (
    Manifest,
    StageDir,
    StageKey,
    atomic_write,
    check_safetensors,
    code_version,
    disk_errors,
    require_space,
    sha256_file,
    sha256_json,
    tree_sha,
)
from search.errors import CorruptArtefact, DiskError

KEY = StageKey("search", "v1", sha256_json({"samples": 4}), {"base": "abc"})


def safetensors_bytes(num_bytes: int = 16) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(range(num_bytes))


@pytest.fixture
def round_dir(tmp_path):
    folder = tmp_path / "loop" / "round-001"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def stage(round_dir):
    return StageDir(round_dir, "search")


def fill(out) -> None:
    atomic_write(out / "rows.jsonl", '{"a": 1}\n')
    (out / "model").mkdir(exist_ok=True)
    atomic_write(out / "model" / "model.safetensors", safetensors_bytes())
    atomic_write(out / "log.txt", "took 3 s\n")
    atomic_write(out / "timing.json", "{}")


def commit(stage: StageDir, key: StageKey = KEY) -> Manifest:
    fill(stage.begin(key))
    return stage.commit(key)


# ---------------------------------------------------------------- files


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.json"]


def test_atomic_write_keeps_the_mode_and_follows_the_umask(tmp_path):
    path = tmp_path / "a"
    old = os.umask(0o077)
    try:
        atomic_write(path, "x")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o640)
        atomic_write(path, "y")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        os.umask(0o022)
        atomic_write(tmp_path / "b", "z")
        assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o644
    finally:
        os.umask(old)


def test_atomic_write_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to("target")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()


def disk_full_after(monkeypatch, num_bytes: int) -> None:
    """Every write succeeds up to `num_bytes` in all, then the disk is full."""
    left = [num_bytes]

    def write(descriptor, data):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[: left[0]]
        left[0] -= len(part)
        return os.write(descriptor, part)

    monkeypatch.setattr(artefacts, "_os_write", write)


@pytest.mark.parametrize("num_bytes", [0, 1, 999])
def test_a_full_disk_keeps_the_old_content_and_names_the_numbers(tmp_path, monkeypatch, num_bytes):
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    disk_full_after(monkeypatch, num_bytes)
    with pytest.raises(DiskError, match=r"no space left to write .*a\.json \(1,000 bytes\): .* MiB free"):
        atomic_write(path, b"x" * 1000)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_short_writes_are_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "_os_write", lambda descriptor, data: os.write(descriptor, bytes(data)[:7]))
    atomic_write(tmp_path / "a", b"x" * 100)
    assert (tmp_path / "a").read_bytes() == b"x" * 100


def test_a_file_size_limit_of_the_shell_is_explained(tmp_path):
    source = "import sys; from pathlib import Path; from flows.artefacts import atomic_write\n"
    source += "atomic_write(Path(sys.argv[1], 'a'), b'x' * 100_000)"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    found = subprocess.run(
        [sys.executable, "-c", source, str(tmp_path)], capture_output=True, text=True, preexec_fn=limit, check=False
    )
    assert "DiskError" in found.stderr
    assert "ulimit -f" in found.stderr
    assert os.listdir(tmp_path) == []


def write_to_full_device() -> None:
    with disk_errors(Path("x")), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def test_the_kernels_full_device_is_understood():
    with pytest.raises(DiskError, match="no space left"):
        write_to_full_device()


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "nothing").read_bytes()


def test_require_space_names_both_numbers(tmp_path):
    require_space(tmp_path / "not" / "yet" / "there", 1, "one byte")
    with pytest.raises(DiskError, match=r"three checkpoints needs about 953,674,316 MiB in .*, where [\d,]+ MiB"):
        require_space(tmp_path, 1e15, "three checkpoints")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:5], lambda b: b"", lambda b: b"\xff" * 40]
)
def test_a_damaged_safetensors_file_is_seen_by_its_header(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes())
    check_safetensors(path)
    path.write_bytes(damage(safetensors_bytes()))
    with pytest.raises(CorruptArtefact):
        check_safetensors(path)


def test_real_safetensors_files_pass_the_check(tmp_path):
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    save_file({"a": numpy.zeros((3, 5)), "b": numpy.ones(2, dtype="int8")}, tmp_path / "m.safetensors", {"k": "v"})
    check_safetensors(tmp_path / "m.safetensors")


# ---------------------------------------------------------------- stages


def test_a_stage_appears_whole_by_rename(stage):
    out = stage.begin(KEY)
    assert out.name == "search.work"
    fill(out)
    assert stage.committed() is None
    manifest = stage.commit(KEY)
    assert not stage.work.exists()
    assert sorted(p.name for p in stage.path.iterdir()) == [
        "log.txt", "manifest.json", "model", "rows.jsonl", "timing.json",
    ]  # fmt: skip
    assert stage.committed(inputs={"base": "abc"}, verify=True) == manifest
    assert sorted(manifest.outputs) == ["model/model.safetensors", "rows.jsonl"]
    assert manifest.outputs["rows.jsonl"].sha256 == sha256_file(stage.path / "rows.jsonl")


def test_the_manifest_is_what_the_files_on_disk_say(stage):
    manifest = commit(stage)
    row = json.loads((stage.path / "manifest.json").read_text())
    assert row["stage"] == "search"
    assert row["inputs"] == {"base": "abc"}
    assert row["id"] == manifest.id
    assert row["key"] == KEY.digest
    assert Manifest.from_json(row) == manifest


def test_the_id_follows_the_content_only(round_dir):
    one = commit(StageDir(round_dir, "a"))
    two = commit(StageDir(round_dir, "b"), StageKey("b", "v2", "other", {}))
    assert one.id == two.id
    out = (third := StageDir(round_dir, "c")).begin(KEY)
    fill(out)
    (out / "log.txt").write_text("took 9 s\n")
    assert third.commit(KEY).id == one.id
    out = (fourth := StageDir(round_dir, "d")).begin(KEY)
    fill(out)
    (out / "rows.jsonl").write_text('{"a": 2}\n')
    assert fourth.commit(KEY).id != one.id


@pytest.mark.parametrize(
    "other",
    [
        StageKey("select", KEY.code_version, KEY.config_sha, KEY.inputs),
        StageKey("search", "v2", KEY.config_sha, KEY.inputs),
        StageKey("search", KEY.code_version, "other", KEY.inputs),
        StageKey("search", KEY.code_version, KEY.config_sha, {"base": "abd"}),
    ],
)
def test_partial_results_are_kept_under_the_same_key_only(stage, other):
    atomic_write(stage.begin(KEY) / "shard-0.jsonl", "{}\n")
    (stage.work / ".shard-1.jsonl.tmp-1-1").write_text("half")
    assert [p.name for p in stage.begin(KEY).iterdir() if p.name != ".key"] == ["shard-0.jsonl"]
    assert [p.name for p in stage.begin(other).iterdir()] == [".key"]


def test_a_work_folder_without_a_key_is_not_trusted(stage):
    atomic_write(stage.begin(KEY) / "shard-0.jsonl", "{}\n")
    (stage.work / ".key").unlink()
    assert [p.name for p in stage.begin(KEY).iterdir()] == [".key"]


def test_temporary_files_are_not_committed(stage):
    out = stage.begin(KEY)
    fill(out)
    (out / "model" / ".model.safetensors.tmp-7-1").write_text("half")
    stage.commit(KEY)
    assert not [*stage.path.rglob(".*")]


def test_another_input_sets_the_result_aside(stage, round_dir):
    commit(stage)
    assert stage.committed(inputs={"base": "new"}) is None
    assert not stage.path.exists()
    assert (round_dir / "stale" / "search-1" / "rows.jsonl").exists()
    assert "'new'" in (round_dir / "stale" / "search-1.txt").read_text()
    commit(stage)
    stage.committed(inputs={})
    assert (round_dir / "stale" / "search-2").exists()


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # two: the last byte of a manifest is a line end


@pytest.mark.parametrize("name", ["rows.jsonl", "model/model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, truncate, os.unlink], ids=["flip", "truncate", "delete"])
def test_every_damage_is_found_and_the_stage_done_again(stage, round_dir, name, damage):
    before = commit(stage)
    damage(stage.path / name)
    with pytest.raises(CorruptArtefact, match=os.path.basename(name)):
        stage.read(verify=True)
    assert stage.path.exists(), "read changes nothing"
    assert stage.committed(verify=True) is None
    assert (round_dir / "corrupt" / "search-1.txt").read_text().strip()
    assert commit(stage) == before


@pytest.mark.parametrize("name", ["rows.jsonl", "model/model.safetensors"])
def test_the_cheap_check_sees_sizes(stage, name):
    commit(stage)
    truncate(stage.path / name)
    assert stage.committed() is None


def test_a_log_may_change(stage):
    commit(stage)
    (stage.path / "log.txt").write_text("and more")
    assert stage.committed(verify=True) is not None


@pytest.mark.parametrize("number", range(200))
def test_a_flipped_bit_in_a_manifest_never_passes(stage, number):
    manifest = commit(stage)
    path = stage.path / "manifest.json"
    data = bytearray(path.read_bytes())
    position = number * len(data) // 200
    data[position] ^= 1 << (number % 8)
    path.write_bytes(data)
    try:
        found = stage.read()
    except CorruptArtefact:
        return
    assert found == manifest  # the flip hit white space


# ---------------------------------------------------------------- links


def test_a_link_inside_the_loop_is_kept_as_a_link(round_dir):
    commit(StageDir(round_dir, "base"))
    stage = StageDir(round_dir, "search")
    (stage.begin(KEY) / "model").symlink_to("../base/model")
    manifest = stage.commit(KEY)
    assert manifest.outputs["model"].link == "../base/model"
    assert stage.committed(verify=True) == manifest
    (stage.path / "model").unlink()
    (stage.path / "model").symlink_to("../base")
    assert stage.committed() is None


@pytest.mark.parametrize("target", ["/etc", "../../../outside", "nowhere"])
def test_links_that_leave_the_loop_are_refused(stage, tmp_path, target):
    (tmp_path / "outside").mkdir()
    (stage.begin(KEY) / "link").symlink_to(target)
    with pytest.raises(CorruptArtefact, match="links to"):
        stage.commit(KEY)
    assert not stage.path.exists()


def test_a_pipe_among_the_outputs_is_refused_and_not_waited_for(stage):
    os.mkfifo(stage.begin(KEY) / "pipe")
    with pytest.raises(CorruptArtefact, match="neither a file nor a link"):
        stage.commit(KEY)


def test_a_link_at_the_work_folders_place_is_not_followed(stage, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    stage.work.symlink_to(tmp_path / "precious")
    assert not stage.begin(KEY).is_symlink()
    assert (tmp_path / "precious" / "file").exists()


def test_tree_sha_of_files_and_folders(stage, tmp_path):
    commit(stage)
    model = stage.path / "model"
    assert tree_sha(model / "model.safetensors", tmp_path) == sha256_file(model / "model.safetensors")
    before = tree_sha(model, tmp_path)
    (model / "log.txt").write_text("not hashed")
    assert tree_sha(model, tmp_path) == before
    (model / "config.json").write_text("{}")
    assert tree_sha(model, tmp_path) != before
    with pytest.raises(CorruptArtefact, match="missing"):
        tree_sha(tmp_path / "nothing", tmp_path)


def test_a_stage_folder_nests_for_checkpoints(stage):
    out = stage.begin(KEY)
    checkpoint = StageDir(out, "step-200", root=stage.round_dir)
    commit(checkpoint)
    truncate(checkpoint.path / "rows.jsonl")
    assert checkpoint.committed() is None


def test_a_full_disk_at_the_commit_leaves_the_work(stage, monkeypatch):
    fill(stage.begin(KEY))
    disk_full_after(monkeypatch, 10)
    with pytest.raises(DiskError):
        stage.commit(KEY)
    monkeypatch.undo()
    assert stage.committed() is None
    assert (stage.begin(KEY) / "rows.jsonl").exists()
    assert stage.commit(KEY).outputs


def test_code_version_is_stable_and_short():
    assert code_version() == code_version()
    assert len(code_version()) == 16


def test_start_up_is_light():
    source = "import sys, flows.state, flows.child\n"
    source += "print([m for m in ('torch', 'prefect', 'mlflow', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
