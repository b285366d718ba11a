"""The committed stubs are what the contract generates, and every part of the contract says what it means."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).parents[2]
PROTO = "protos/teacher/v1/teacher.proto"
STUBS = ("teacher_pb2.py", "teacher_pb2.pyi", "teacher_pb2_grpc.py")

# Field numbers inside descriptor.proto: what SourceCodeInfo's paths are made of.
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS, NESTED_MESSAGES, NESTED_ENUMS, ONEOFS = 2, 3, 4, 8
VALUES, METHODS = 2, 2

Part = tuple[str, tuple[int, ...]]
"""A name in the contract, and its path in the descriptor."""


def protoc(*arguments: str, root: Path = ROOT) -> None:
    """Run protoc as `make protos` does."""
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(root), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=root)
    assert finished.returncode == 0, finished.stderr


def described(root: Path, proto: str, out: Path) -> FileDescriptorProto:
    """The descriptor of one proto file, its comments included."""
    protoc(f"--descriptor_set_out={out}", "--include_source_info", proto, root=root)
    (descriptor,) = FileDescriptorSet.FromString(out.read_bytes()).file
    return descriptor


def uncommented(descriptor: FileDescriptorProto) -> list[str]:
    """Names of the messages, fields, oneofs, enums, values, services and methods without a leading comment."""
    commented = {
        tuple(location.path) for location in descriptor.source_code_info.location if location.leading_comments.strip()
    }
    return [name for name, path in parts_of(descriptor) if path not in commented]


def parts_of(descriptor: FileDescriptorProto) -> Iterator[Part]:
    yield from messages_of(descriptor.message_type, (MESSAGES,), "")
    yield from enums_of(descriptor.enum_type, (ENUMS,), "")
    yield from services_of(descriptor.service)


def messages_of(messages: Iterable[DescriptorProto], prefix: tuple[int, ...], scope: str) -> Iterator[Part]:
    for i, message in enumerate(messages):
        path, name = (*prefix, i), scope + message.name
        if message.options.map_entry:  # protoc's own: a map has its comment at the field
            continue
        yield name, path
        yield from ((f"{name}.{one.name}", (*path, FIELDS, j)) for j, one in enumerate(message.field))
        for j, oneof in enumerate(message.oneof_decl):
            if not oneof.name.startswith("_"):  # protoc's own, for an optional field
                yield f"{name}.{oneof.name}", (*path, ONEOFS, j)
        yield from messages_of(message.nested_type, (*path, NESTED_MESSAGES), f"{name}.")
        yield from enums_of(message.enum_type, (*path, NESTED_ENUMS), f"{name}.")


def enums_of(enums: Iterable[EnumDescriptorProto], prefix: tuple[int, ...], scope: str) -> Iterator[Part]:
    for i, enum in enumerate(enums):
        yield scope + enum.name, (*prefix, i)
        yield from ((f"{scope}{enum.name}.{one.name}", (*prefix, i, VALUES, j)) for j, one in enumerate(enum.value))


def services_of(services: Iterable[ServiceDescriptorProto]) -> Iterator[Part]:
    for i, service in enumerate(services):
        yield service.name, (SERVICES, i)
        yield from ((f"{service.name}.{one.name}", (SERVICES, i, METHODS, j)) for j, one in enumerate(service.method))


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    """The committed stubs are byte for byte what `make protos` writes."""
    protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", PROTO)
    generated = tmp_path / Path(PROTO).parent
    assert sorted(path.name for path in generated.iterdir()) == sorted(STUBS)
    for stub in STUBS:
        committed = ROOT / Path(PROTO).parent / stub
        assert committed.read_text() == (generated / stub).read_text(), f"{stub} is stale; run `make protos`"


def test_every_part_of_the_contract_is_commented(tmp_path: Path) -> None:
    """No message, field, oneof, enum, value, service or method goes without a word on what it means."""
    descriptor = described(ROOT, PROTO, tmp_path / "teacher.pb")
    names = [name for name, _ in parts_of(descriptor)]
    assert {"ScoreRequest.token_ids", "WireDtype.WIRE_DTYPE_FLOAT16", "TeacherService.ScoreStream"} <= set(names)
    assert uncommented(descriptor) == []


@pytest.mark.parametrize(
    ("comment", "name"),
    [
        ("// Asks.", "Asking"),
        ("// Which.", "Asking.which"),
        ("// One of.", "Asking.choice"),
        ("// Kinds.", "Kind"),
        ("// None.", "Kind.KIND_UNSPECIFIED"),
        ("// Answers.", "Oracle"),
        ("// Ask it.", "Oracle.Ask"),
    ],
)
def test_missing_comment_is_caught(tmp_path: Path, comment: str, name: str) -> None:
    """The check above names exactly the part that lost its comment."""
    source = """syntax = "proto3";
// Asks.
message Asking {
  // Which.
  optional int32 which = 1;
  // By name.
  map<string, int32> ids = 2;
  // One of.
  oneof choice {
    // Left.
    bool left = 3;
  }
}
// Kinds.
enum Kind {
  // None.
  KIND_UNSPECIFIED = 0;
}
// Answers.
service Oracle {
  // Ask it.
  rpc Ask(Asking) returns (Asking);
}
"""
    (tmp_path / "x.proto").write_text(source)
    assert uncommented(described(tmp_path, "x.proto", tmp_path / "x.pb")) == []
    (tmp_path / "x.proto").write_text(source.replace(comment, ""))
    assert uncommented(described(tmp_path, "x.proto", tmp_path / "x.pb")) == [name]
