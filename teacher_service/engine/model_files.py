"""What lies in a checkpoint's folder: where it is, a digest of its weights, the map of its tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from protos.manifest import SPECIAL_ROLES, TokenizerManifest
from teacher_service.errors import EngineStartError

SAMPLES_PER_FILE = 64
"""Evenly spaced samples of each weight file that enter the digest, the first and the last bytes among them."""
SAMPLE_BYTES = 16 * 1024
"""Bytes of one sample: 1 MiB per file, so 200 files of 5 GB take 200 MB of reading."""

TRUST_REMEDY = "Read that code; if you trust it, pass --trust-remote-code (TEACHER_TRUST_REMOTE_CODE=true)"

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
_TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SAFETENSORS_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors format itself


def model_name(model: str) -> str:
    """The last component of a path or of a hub id."""
    return Path(os.path.abspath(model)).name if _looks_like_path(model) else model.rsplit("/", 1)[-1]


def locate_model(model: str) -> Path:
    """Folder of a checkpoint: the given one, or the hub's snapshot of the given id (fetched where it isn't cached).

    Raises:
        EngineStartError: the path does not exist, is no folder or holds no model; or the hub lacks the id.
    """
    path = Path(model).expanduser()
    if not path.exists():
        if _looks_like_path(model):
            raise EngineStartError(
                f"model path {model!r} does not exist (looked at {path.absolute()}); give the folder of a "
                "Hugging Face checkpoint, or a hub id of the form owner/name"
            )
        return _hub_snapshot(model)
    if not path.is_dir():
        raise EngineStartError(f"model path {model!r} is a file; give the folder that holds config.json")
    if not (path / "config.json").is_file():
        raise EngineStartError(f"model path {model!r} has no config.json; give the folder of a Hugging Face checkpoint")
    if not weight_files(path):
        raise EngineStartError(
            f"model path {model!r} has no weight file ({', '.join(_WEIGHT_PATTERNS)}); is the download complete?"
        )
    return path


def _looks_like_path(model: str) -> bool:
    path = Path(model).expanduser()
    # `models/teacher` may be both: with a folder `models` here it is a path, else a hub id.
    inside_existing_folder = len(path.parts) > 1 and path.parent.exists()
    return path.exists() or inside_existing_folder or model.startswith((".", "~")) or _HUB_ID.fullmatch(model) is None


def _hub_snapshot(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, ignore_patterns=["original/*", "*.pth", "*.gguf", "*.onnx"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise EngineStartError(
            f"model {model!r} is no folder here, and the hub did not give it: {exc}; check the name, the network "
            "and HF_TOKEN"
        ) from exc


def checkpoint_dtype(directory: Path) -> str | None:
    """Arithmetic type that the checkpoint's config names, e.g. `bfloat16`; None where it names none.

    Raises:
        EngineStartError: config.json is no JSON object.
    """
    config = _config(directory)
    text_config = config.get("text_config", {})  # where a model with several parts keeps its language model
    for section in (config, text_config):
        for key in ("dtype", "torch_dtype"):  # the second is the older name
            if isinstance(section.get(key), str):
                return str(section[key]).removeprefix("torch.")
    return None


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise EngineStartError(f"{path} is no JSON: {exc}; is the download complete?") from exc
    if not isinstance(config, dict):
        raise EngineStartError(f"{path} holds a {type(config).__name__}, not an object; is it a model's config?")
    return config


def check_remote_code(directory: Path, *, is_trusted: bool, model_types: Container[str] = ()) -> None:
    """Refuse a checkpoint that only Python code of its own can load, unless that code is trusted.

    Many checkpoints carry such code for older libraries; one whose type a library knows does without it.

    Args:
        directory: of the checkpoint.
        is_trusted: whether its code may run.
        model_types: those that the engine knows beside transformers' own.

    Raises:
        EngineStartError: its code is needed and not trusted.
    """
    config = _config(directory)
    if is_trusted or not config.get("auto_map"):
        return
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING or model_type in model_types:
        return
    raise EngineStartError(
        f"no library here knows models of the type {model_type!r}: the checkpoint in {directory} brings Python code of "
        f"its own, which would run in this service, with all that the service may do. {TRUST_REMEDY}"
    )


def weight_files(directory: Path) -> Sequence[Path]:
    """The folder's weight files in order of name: those of the first format present. Empty: none."""
    for pattern in _WEIGHT_PATTERNS:
        if found := sorted(directory.glob(pattern)):
            return found
    return ()


def weights_bytes(model: str) -> int | None:
    """Size of a local checkpoint's weight files; None for a hub id, whose files may still be on their way."""
    folder = Path(model).expanduser()
    return sum(path.stat().st_size for path in weight_files(folder)) if folder.is_dir() else None


def weights_digest(*directories: Path) -> str | None:
    """SHA-256, lowercase hex, over each weight file's name, size, header and samples; None without weight files.

    Of several folders, such as a model's and its adapter's, the files follow each other.

    Reads at most the header and `SAMPLES_PER_FILE * SAMPLE_BYTES` of a file, so a change that touches only bytes
    between the samples of a large file goes unseen. Training changes all of them.
    """
    files = [path for directory in directories for path in weight_files(directory)]
    if not files:
        return None
    whole = hashlib.sha256()
    for path in files:
        num_bytes = path.stat().st_size
        whole.update(json.dumps([path.name, num_bytes]).encode() + b"\n")
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                whole.update(_safetensors_header(file))
            for offset in _sample_offsets(num_bytes):
                file.seek(offset)
                whole.update(file.read(SAMPLE_BYTES))
    return whole.hexdigest()


def _safetensors_header(file: BinaryIO) -> bytes:
    num_bytes = int.from_bytes(file.read(_SAFETENSORS_LENGTH_BYTES), "little")
    return file.read(min(num_bytes, _MAX_HEADER_BYTES))


def _sample_offsets(num_bytes: int) -> Sequence[int]:
    """Where samples start: everything where the samples cover the file, else evenly spaced up to its last bytes."""
    if num_bytes <= SAMPLES_PER_FILE * SAMPLE_BYTES:
        return range(0, num_bytes, SAMPLE_BYTES)
    last = num_bytes - SAMPLE_BYTES
    return [last * i // (SAMPLES_PER_FILE - 1) for i in range(SAMPLES_PER_FILE)]


def tokenizer_manifest(directory: Path, *, trust_remote_code: bool = False) -> TokenizerManifest | None:
    """What the folder's tokenizer maps; None where the folder has no tokenizer files.

    Args:
        directory: of the checkpoint.
        trust_remote_code: whether the tokenizer may be Python code that lies there.

    Raises:
        EngineStartError: there are tokenizer files, but they can't be loaded.
    """
    if not any(any(directory.glob(pattern)) for pattern in _TOKENIZER_PATTERNS):
        return None
    from transformers import AutoTokenizer

    try:
        # False and not unset: transformers would ask on the terminal
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
        return manifest_of_tokenizer(tokenizer)
    except Exception as exc:
        remedy = "repair or remove its files"
        if not trust_remote_code and _brings_tokenizer_code(directory):
            remedy += f", or, as it brings Python code of its own: {TRUST_REMEDY}"
        raise EngineStartError(f"the tokenizer in {directory} can't be loaded: {exc}; {remedy}") from exc


def _brings_tokenizer_code(directory: Path) -> bool:
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("auto_map"))


def manifest_of_tokenizer(tokenizer: Any) -> TokenizerManifest:
    """What a tokenizer of transformers maps.

    Raises:
        ValueError: it has no token.
    """
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in SPECIAL_ROLES}
    return TokenizerManifest.from_vocabulary(
        tokenizer.get_vocab(), {role: token_id for role, token_id in ids.items() if token_id is not None}
    )
