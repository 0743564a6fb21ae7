"""The stubs in protos/gen are what the .proto files give, and every message and service is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from protos import generate

PROTOS = Path(generate.__file__).parent


def test_the_stubs_are_fresh() -> None:
    pytest.importorskip("grpc_tools", reason="the generator is installed for development only")
    assert generate.stale() == [], "run python -m protos.generate"


@pytest.mark.parametrize("path", sorted(PROTOS.glob("*.proto")), ids=lambda path: path.name)
def test_every_message_and_service_of_a_file_has_its_stub(path: Path) -> None:
    text = path.read_text()
    messages = importlib.import_module(f"protos.gen.{path.stem}_pb2")
    services = importlib.import_module(f"protos.gen.{path.stem}_pb2_grpc")
    for name in re.findall(r"^message (\w+)", text, re.MULTILINE):
        assert hasattr(messages, name)
    for name in re.findall(r"^service (\w+)", text, re.MULTILINE):
        assert hasattr(services, f"{name}Servicer")


@pytest.mark.parametrize("path", sorted(PROTOS.glob("*.proto")), ids=lambda path: path.name)
def test_no_field_number_is_used_twice(path: Path) -> None:
    module = importlib.import_module(f"protos.gen.{path.stem}_pb2")
    for message in module.DESCRIPTOR.message_types_by_name.values():
        numbers = [field.number for field in message.fields]
        assert len(numbers) == len(set(numbers))
        assert message.full_name.startswith("hive.v1.")
