"""What lies in a checkpoint's folder: path checks, the weights' digest, the tokenizer's manifest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Container
from pathlib import Path

import pytest
import torch

from examples.sort_digits.models import build_tokenizer
from teacher_service.engine import model_files
from teacher_service.errors import EngineStartError
from tests.support.models import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", dtype=torch.bfloat16)


def test_an_existing_checkpoint_is_located_and_named_by_its_last_component(checkpoint: Path) -> None:
    """The folder itself, with or without a trailing slash."""
    assert model_files.locate_model(str(checkpoint)) == checkpoint
    assert model_files.model_name(f"{checkpoint}/") == "tiny"


def test_a_hub_id_is_named_by_its_last_component() -> None:
    """`owner/name` is `name`."""
    assert model_files.model_name("owner/Some-Model-7B") == "Some-Model-7B"


@pytest.mark.parametrize("path", ["/no/such/model", "./no/such", "no/such/model", "~/no-such-model-here"])
def test_a_path_that_does_not_exist_is_an_error_that_names_it(path: str) -> None:
    """What can only be a path never reaches the hub."""
    with pytest.raises(EngineStartError, match=r"does not exist.*give the folder") as caught:
        model_files.locate_model(path)
    assert path in str(caught.value)


def test_a_misspelled_name_in_an_existing_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models/teachr` beside an existing `models` is a typo of a path, though it could be a hub id."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineStartError, match="does not exist"):
        model_files.locate_model("models/teachr")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    """A path to a file says to give its folder."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(EngineStartError, match="is a file; give the folder"):
        model_files.locate_model(str(file))


def test_a_folder_without_config_or_weights_is_no_model(tmp_path: Path) -> None:
    """Each missing part is named."""
    with pytest.raises(EngineStartError, match=r"no config\.json"):
        model_files.locate_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineStartError, match="no weight file"):
        model_files.locate_model(str(tmp_path))


def test_digest_is_stable_and_independent_of_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    """A copy elsewhere has the same digest."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert model_files.weights_digest(copy) == model_files.weights_digest(checkpoint)


def test_digest_of_a_small_file_covers_every_byte(tmp_path: Path) -> None:
    """Name, size and content, as the documentation says, literally."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"0123456789")
    expected = hashlib.sha256(b'["pytorch_model.bin", 10]\n' + b"0123456789").hexdigest()
    assert model_files.weights_digest(tmp_path) == expected


def test_digest_changes_with_a_weight_a_name_or_a_size(tmp_path: Path) -> None:
    """One byte, one letter of a name, one byte more: each another digest."""

    def digest_of(folder: str, name: str, content: bytes) -> str | None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
        return model_files.weights_digest(tmp_path / folder)

    digests = {
        digest_of("a", "pytorch_model.bin", b"0123456789"),
        digest_of("b", "pytorch_model.bin", b"0123456788"),
        digest_of("c", "pytorch_modem.bin", b"0123456789"),
        digest_of("d", "pytorch_model.bin", b"01234567890"),
    }
    assert len(digests) == 4


def test_digest_of_a_large_file_reads_header_and_samples_up_to_both_ends(tmp_path: Path) -> None:
    """Changes in the header, the first and the last bytes show; at most the documented number of bytes is read."""
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    body = bytes(8 * 1024 * 1024)
    path = tmp_path / "model.safetensors"

    def digest_with(header: bytes, body: bytes) -> str | None:
        path.write_bytes(len(header).to_bytes(8, "little") + header + body)
        return model_files.weights_digest(tmp_path)

    digests = {
        digest_with(header, body),
        digest_with(header.replace(b"pt", b"tp"), body),
        digest_with(header, b"\x01" + body[1:]),
        digest_with(header, body[:-1] + b"\x01"),
    }
    assert len(digests) == 4


def test_without_weight_files_there_is_no_digest(tmp_path: Path) -> None:
    """Absent, not a digest of nothing."""
    assert model_files.weights_digest(tmp_path) is None


def test_the_tokenizer_manifest_covers_added_tokens_and_names_the_roles_there_are(checkpoint: Path) -> None:
    """All tokens of the map, with eos and pad; bos and unk, which this tokenizer lacks, are absent."""
    tokenizer = build_tokenizer()
    manifest = model_files.tokenizer_manifest(checkpoint)
    assert manifest is not None
    assert manifest.token_count == len(tokenizer)
    assert manifest.special_token_ids == {
        "eos": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def test_a_tokenizer_with_another_map_has_another_digest(checkpoint: Path, tmp_path: Path) -> None:
    """One more token changes the digest; saving and loading does not."""
    ours = model_files.tokenizer_manifest(checkpoint)
    same, other = build_tokenizer(), build_tokenizer()
    other.add_tokens(["extra"])
    same.save_pretrained(tmp_path / "same")
    other.save_pretrained(tmp_path / "other")
    assert model_files.tokenizer_manifest(tmp_path / "same") == ours
    theirs = model_files.tokenizer_manifest(tmp_path / "other")
    assert ours is not None
    assert theirs is not None
    assert theirs.digest != ours.digest


def test_without_tokenizer_files_there_is_no_manifest(tmp_path: Path) -> None:
    """A teacher that takes ids as they are says so by absence."""
    assert model_files.tokenizer_manifest(tmp_path) is None


def test_broken_tokenizer_files_are_an_error(tmp_path: Path) -> None:
    """Files that can't be read stop the start instead of passing for no tokenizer."""
    (tmp_path / "tokenizer.json").write_text("not json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(EngineStartError, match="can't be loaded"):
        model_files.tokenizer_manifest(tmp_path)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({}, None),
    ],
)
def test_the_checkpoints_dtype_is_the_configs(tmp_path: Path, config: dict[str, object], dtype: str | None) -> None:
    """Under its new or old name, at the top or in the language model's section; None where it is not named."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_files.checkpoint_dtype(tmp_path) == dtype


@pytest.mark.parametrize(("content", "named"), [("{", "is no JSON"), ("[]", "holds a list")])
def test_a_config_that_is_no_object_is_an_error(tmp_path: Path, content: str, named: str) -> None:
    """A torn config is named as such."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EngineStartError, match=named):
        model_files.checkpoint_dtype(tmp_path)


@pytest.mark.parametrize(
    ("config", "model_types"),
    [
        ({"model_type": "qwen3"}, ()),
        ({"model_type": "qwen3", "auto_map": {"AutoConfig": "own.Config"}}, ()),
        ({"model_type": "novel"}, ()),
        ({"model_type": "novel", "auto_map": {}}, ()),
        ({"model_type": "novel", "auto_map": {"AutoConfig": "own.Config"}}, {"novel"}),
    ],
)
def test_a_checkpoint_that_a_library_knows_needs_none_of_its_own_code(
    config: dict[str, object], model_types: Container[str], tmp_path: Path
) -> None:
    """Though it may bring some; a type that nobody knows is the library's to refuse."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    model_files.check_remote_code(tmp_path, is_trusted=False, model_types=model_types)


@pytest.mark.parametrize("model_type", ["novel", None])
def test_a_checkpoint_that_needs_its_own_code_is_refused_unless_that_is_trusted(
    model_type: str | None, tmp_path: Path
) -> None:
    """With what that means, and the flag."""
    config = {"model_type": model_type, "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineStartError, match=r"Python code of its own, which would run.*pass --trust-remote-code"):
        model_files.check_remote_code(tmp_path, is_trusted=False)
    model_files.check_remote_code(tmp_path, is_trusted=True)


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
"""


def test_a_tokenizer_of_its_own_code_is_loaded_only_if_that_is_trusted(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its map is then as good as another's; else the refusal names the flag, and nothing asks on the terminal."""
    # where transformers copies such code to
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    build_tokenizer().save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "own.py").write_text(OWN_TOKENIZER)
    config = tmp_path / "own" / "tokenizer_config.json"
    changed = json.loads(config.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": [None, "own.Own"]},
    }
    config.write_text(json.dumps(changed))
    ours = model_files.tokenizer_manifest(checkpoint)
    assert model_files.tokenizer_manifest(tmp_path / "own", trust_remote_code=True) == ours
    with pytest.raises(EngineStartError, match="pass --trust-remote-code"):
        model_files.tokenizer_manifest(tmp_path / "own")
