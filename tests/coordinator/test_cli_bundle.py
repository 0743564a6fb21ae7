"""From a job file to what travels: overrides, code found by syntax, data listed, missing things named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.bundle import Bundle, bundle
from coordinator.jobfile import overridden, read_job
from coordinator.loading import load_lines
from coordinator.source_files import imported_files, names_defined
from protos import limits
from protos.artifact import digest_file
from protos.errors import HiveError, NotFound, SpecError

JOB = "model: {source: 'model.py:build'}\ndata: {source: train.csv, target: y}\n"


def folder_of(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def bundled(root: Path, **files: str) -> Bundle:
    names = {"job.yaml": JOB, "model.py": "def build(): ...\n", "train.csv": "x,y\n1,2\n"}
    folder_of(root, {**names, **{name.replace("__", "/").replace("_py", ".py"): text for name, text in files.items()}})
    return bundle(read_job(root / "job.yaml"), root)


def paths(made: Bundle, kind: str) -> list[str]:
    manifest = getattr(made, kind)
    return [entry.path for entry in manifest.files]


def test_code_and_data_become_manifests_of_content(tmp_path: Path) -> None:
    made = bundled(tmp_path)
    assert paths(made, "code") == ["model.py"]
    assert paths(made, "data") == ["train.csv"]
    assert made.test is None and made.weights is None
    entry = made.data.files[0] if made.data else None
    assert entry is not None
    assert entry.digest == digest_file(tmp_path / "train.csv")
    assert entry.origin == str(tmp_path / "train.csv")
    assert made.files[entry.digest] == tmp_path / "train.csv"


def test_code_is_never_taken_from_a_shared_path(tmp_path: Path) -> None:
    made = bundled(tmp_path)
    assert made.code is not None
    assert [entry.origin for entry in made.code.files] == [""]


def test_equal_content_gives_equal_manifests_wherever_it_lies(tmp_path: Path) -> None:
    one, other = bundled(tmp_path / "a"), bundled(tmp_path / "b")
    assert one.data and other.data and one.code and other.code
    assert (one.data.digest, one.code.digest) == (other.data.digest, other.code.digest)


def test_imports_beside_the_entry_point_are_followed_and_others_are_not(tmp_path: Path) -> None:
    root = folder_of(
        tmp_path,
        {
            "model.py": "import torch\nimport layers\nfrom package import deep\ndef build():\n    import late\n",
            "layers.py": "from package.deep import thing\nimport model\n",
            "late.py": "",
            "package/__init__.py": "from . import sibling\n",
            "package/deep.py": "from .sibling import x\nfrom ..outside import y\n",
            "package/sibling.py": "",
            "outside.py": "",
            "unused.py": "",
        },
    )
    found = sorted(path.relative_to(root).as_posix() for path in imported_files(root / "model.py", root))
    assert found == [
        "late.py",
        "layers.py",
        "model.py",
        "outside.py",
        "package/__init__.py",
        "package/deep.py",
        "package/sibling.py",
    ]


def test_code_below_the_job_file_keeps_its_folder_and_sees_both(tmp_path: Path) -> None:
    files = {"src/net.py": "import blocks, shared\ndef build(): ...\n", "src/blocks.py": "", "shared.py": ""}
    folder_of(
        tmp_path, {**files, "job.yaml": "model: {source: 'src/net.py:build'}\ndata: {source: 'builtin:digits'}\n"}
    )
    made = bundle(read_job(tmp_path / "job.yaml"), tmp_path)
    assert paths(made, "code") == ["shared.py", "src/blocks.py", "src/net.py"]
    assert made.data is None


def test_nothing_is_executed(tmp_path: Path) -> None:
    flag = tmp_path / "executed"
    bundled(tmp_path, model_py=f"open({str(flag)!r}, 'w')\ndef build(): ...\n")
    assert not flag.exists()


@pytest.mark.parametrize(
    "source",
    [
        "def build(): ...",
        "class build: ...",
        "build = make()",
        "from elsewhere import build",
        "from elsewhere import other as build",
        "try:\n    import x as build\nexcept ImportError:\n    pass",
        "if True:\n    def build(): ...",
        "a, build = 1, 2",
        "from elsewhere import *",
    ],
)
def test_a_name_counts_as_defined_however_it_is_bound(tmp_path: Path, source: str) -> None:
    (tmp_path / "m.py").write_text(source)
    assert names_defined(tmp_path / "m.py") & {"build", "*"}


def test_a_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"model\.py defines no 'build'"):
        bundled(tmp_path, model_py="def biuld(): ...\n")


def test_a_syntax_error_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="line 2") as caught:
        bundled(tmp_path, model_py="\ndef build(:\n")
    assert caught.value.exit_code == 3


def test_missing_files_are_named_with_their_field(tmp_path: Path) -> None:
    folder_of(tmp_path, {"job.yaml": JOB, "model.py": "def build(): ..."})
    with pytest.raises(SpecError, match=r"data\.source: there is no file or folder .*train\.csv"):
        bundle(read_job(tmp_path / "job.yaml"), tmp_path)
    (tmp_path / "train.csv").touch()
    (tmp_path / "model.py").unlink()
    with pytest.raises(SpecError, match=r"model\.source: there is no file .*model\.py"):
        bundle(read_job(tmp_path / "job.yaml"), tmp_path)


def test_code_outside_the_folder_of_the_job_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, {"model.py": "def build(): ...", "jobs/train.csv": "x,y\n"})
    (tmp_path / "jobs" / "job.yaml").write_text(JOB.replace("model.py", "../model.py"))
    with pytest.raises(SpecError, match="outside"):
        bundle(read_job(tmp_path / "jobs" / "job.yaml"), tmp_path / "jobs")


def test_a_folder_of_data_is_listed_without_hidden_files(tmp_path: Path) -> None:
    folder_of(
        tmp_path,
        {
            "job.yaml": JOB.replace("train.csv", "rows"),
            "model.py": "def build(): ...",
            "rows/b.csv": "b",
            "rows/a/1.csv": "a",
            "rows/.hidden": "",
            "rows/.git/config": "",
        },
    )
    made = bundle(read_job(tmp_path / "job.yaml"), tmp_path)
    assert sorted(paths(made, "data")) == ["a/1.csv", "b.csv"]


def test_an_empty_folder_of_data_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, {"job.yaml": JOB.replace("train.csv", "rows"), "model.py": "def build(): ..."})
    (tmp_path / "rows").mkdir()
    with pytest.raises(SpecError, match="is empty"):
        bundle(read_job(tmp_path / "job.yaml"), tmp_path)


def test_overrides_are_yaml_values_at_dotted_keys(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    spec = read_job(tmp_path / "job.yaml", ["train.epochs=5", "train.optimizer.lr=0.5", "name=x", "nodes.max=2"])
    assert (spec.train.epochs, spec.train.optimizer.lr, spec.name, spec.nodes.max) == (5, 0.5, "x", 2)


@pytest.mark.parametrize("override", ["train.epochs", "=5", "a..b=1", "model.source.x=1", "name=[", ".=1"])
def test_wrong_overrides_are_refused(tmp_path: Path, override: str) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    with pytest.raises(SpecError, match="--set"):
        read_job(tmp_path / "job.yaml", [override])


def test_an_override_with_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    with pytest.raises(SpecError, match="did you mean 'epochs'"):
        read_job(tmp_path / "job.yaml", ["train.epoch=5"])


def test_an_override_leaves_the_document_it_was_given_alone() -> None:
    document = {"train": {"epochs": 1}}
    assert overridden(document, "train.epochs=2") == {"train": {"epochs": 2}}
    assert document == {"train": {"epochs": 1}}


def test_a_missing_job_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_job(tmp_path / "none.yaml")
    (tmp_path / "job.yaml").write_text("model: {\n")
    with pytest.raises(SpecError, match="line 2"):
        read_job(tmp_path / "job.yaml")


@given(st.binary(max_size=300))
def test_no_bytes_make_the_job_reader_fail_otherwise_than_by_its_errors(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "job.yaml"
    path.write_bytes(content)
    try:
        read_job(path)
    except HiveError as error:
        assert error.exit_code == 3


def test_what_has_no_end_or_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (Path("/dev/zero"), tmp_path / "pipe.yaml", tmp_path):
        with pytest.raises(SpecError, match="is not a file"):
            read_job(path)
    (tmp_path / "big.yaml").write_bytes(b"#" * (limits.MAX_JOB_SPEC_BYTES + 1))
    with pytest.raises(SpecError, match="is over"):
        read_job(tmp_path / "big.yaml")


def test_the_lines_that_load_a_model_are_exact(tmp_path: Path) -> None:
    folder_of(tmp_path, {"model.safetensors": "", "code/src/net.py": "def build(hidden, name): ..."})
    lines = load_lines(tmp_path, {"source": "src/net.py:build", "args": {"hidden": 8, "name": "x"}})
    assert len(lines) == 3
    assert "from net import build; model = build(hidden=8, name='x')" in lines[1]
    assert str(tmp_path / "code" / "src") in lines[0]
    assert lines[2] == f"safetensors.torch.load_model(model, {str(tmp_path / 'model.safetensors')!r})"
    assert load_lines(tmp_path / "none", None) == []
    exported = load_lines(tmp_path, {"source": "net.pt2", "args": {}})
    assert "torch.export.load('net.pt2').module()" in exported[1]
    bert = {"source": "tiny", "args": {"task": "masked_lm", "hidden_dropout_prob": 0.0}}
    config = "transformers.AutoConfig.from_pretrained('tiny', hidden_dropout_prob=0.0)"
    assert config in load_lines(tmp_path, bert)[1]
    assert "model = transformers.AutoModelForMaskedLM.from_config(config)" in load_lines(tmp_path, bert)[1]


def test_a_hugging_face_directory_travels_in_the_place_of_weights(tmp_path: Path) -> None:
    job = "model: {source: bert}\ndata: {source: train.csv, target: y}\n"
    names = {"job.yaml": job, "bert/config.json": "{}", "bert/model.safetensors": "w", "bert/modeling.py": "boom"}
    folder_of(tmp_path, {**names, "bert/vocab.txt": "a", "train.csv": "x,y\n1,2\n"})
    made = bundle(read_job(tmp_path / "job.yaml"), tmp_path)
    assert paths(made, "weights") == ["config.json", "model.safetensors"] and made.code is None
    none = bundle(read_job(tmp_path / "job.yaml", ["model.weights=none"]), tmp_path)
    assert paths(none, "weights") == ["config.json"]
    (tmp_path / "bert" / "config.json").unlink()
    with pytest.raises(SpecError, match=r"has no config\.json"):
        bundle(read_job(tmp_path / "job.yaml"), tmp_path)


def test_a_pt2_file_is_the_model_and_brings_its_weights(tmp_path: Path) -> None:
    job = "model: {source: models/m.pt2}\ndata: {source: train.csv, target: y}\n"
    folder_of(tmp_path, {"job.yaml": job, "models/m.pt2": "x", "train.csv": "x,y\n1,2\n"})
    assert paths(bundle(read_job(tmp_path / "job.yaml"), tmp_path), "weights") == ["m.pt2"]
    with pytest.raises(SpecError, match=r"model\.weights: only for a model that is Python source"):
        bundle(read_job(tmp_path / "job.yaml", ["model.weights=w.safetensors"]), tmp_path)
