"""Directories that are no models: links, pipes, indexes that name what lies elsewhere, code, numbers out of bounds."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

BERT: dict[str, Any] = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8}


def _config(folder: Path, **more: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**BERT, **more}))
    return folder


def _shard(path: Path, *names: str) -> None:
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]} for at, name in enumerate(names)}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * len(names)))


def _index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write(folder: Path, canary: Path) -> None:
    _of_files(folder)
    _of_configurations(folder, canary)
    _of_indexes(folder)


def _of_files(folder: Path) -> None:
    (folder / "dir-empty").mkdir()
    (folder / "dir-loop").mkdir()
    (folder / "dir-loop" / "self").symlink_to(".")
    (folder / "dir-loop" / "config.json").symlink_to("config.json")
    (folder / "dir-link").mkdir()
    (folder / "dir-link" / "config.json").symlink_to("/etc/passwd")
    (folder / "dir-cache-link").mkdir()
    (folder / "dir-cache-link" / "config.json").symlink_to("../../blobs/" + "a" * 40)
    (folder / "dir-device").mkdir()
    (folder / "dir-device" / "model.safetensors").symlink_to("/dev/zero")
    (folder / "dir-pipe").mkdir()
    os.mkfifo(folder / "dir-pipe" / "config.json")
    (folder / "dir-nested" / "config.json").mkdir(parents=True)
    (folder / "dir-variables").mkdir()
    (folder / "dir-variables" / "variables").symlink_to("/etc")
    (folder / "dir-variables" / "saved_model.pb").write_bytes(b"\x08\x01\x12\xff\xff\xff\xff\x0f")
    many = folder / "dir-many"
    many.mkdir()
    for number in range(5_000):
        (many / f"{number}.safetensors").touch()
    os.mkfifo(folder / "pipe")
    (folder / "link-loop").symlink_to("link-loop")
    (folder / "link-device").symlink_to("/dev/zero")


def _of_configurations(folder: Path, canary: Path) -> None:
    code = _config(folder / "dir-code", auto_map={"AutoModel": "modeling_evil.Evil"})
    (code / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    _config(folder / "dir-code-inside", text_config={"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}})
    _config(folder / "dir-attention", attn_implementation="someone/kernel")
    _config(folder / "dir-quantised", quantization_config={"quant_method": "gptq"})
    for field, value in (
        ("hidden_size", 10**12), ("num_hidden_layers", 10**9), ("vocab_size", 1e300), ("hidden_sizes", [8, 10**12]),
        ("num_experts", 10**7),
    ):  # fmt: skip
        _config(folder / f"dir-size-{field}", **{field: value})
    pickled = _config(folder / "dir-pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.")
    deep = folder / "dir-deep"
    deep.mkdir()
    (deep / "config.json").write_text('{"model_type": ' + "[" * 200_000)
    huge = folder / "dir-huge-config"
    huge.mkdir()
    with (huge / "config.json").open("wb") as file:
        file.truncate(10 * 1024**3)
    adapter = folder / "dir-adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "\\u001b[31m../../etc"}')


def _of_indexes(folder: Path) -> None:
    for name, file in (
        ("parent", "../shard.safetensors"), ("absolute", "/etc/passwd"), ("missing", "other.safetensors"),
        ("number", 7), ("list", ["x"]),
    ):  # fmt: skip
        _index(_config(folder / f"dir-index-{name}"), {"w": file})
    other = _config(folder / "dir-index-other-tensors")
    _index(other, {"w": "a.safetensors"})
    _shard(other / "a.safetensors", "v")
    twice = _config(folder / "dir-index-twice")
    _shard(twice / "a.safetensors", "w")
    _shard(twice / "b.safetensors", "w")
    more = _config(folder / "dir-index-unlisted")
    _index(more, {"w": "a.safetensors"})
    _shard(more / "a.safetensors", "w", "v")
    _index(_config(folder / "dir-index-empty"), {})
    broken = _config(folder / "dir-broken-shard")
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{")
