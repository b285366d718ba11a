"""Whether vLLM is what this project takes it for: the check itself, on trees made by hand, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from teacher_service.engine.vllm.seam_table import FAST_PARTS, SEAMS
from teacher_service.engine.vllm.seams import Seam, for_parts, problems
from teacher_service.engine.vllm.source_tree import SourceTree
from tests.unit.seam_rules import (
    imported,
    installed_root,
    keywords_of,
    named_in_strings,
    parsed,
    serves,
    unlisted,
    unlisted_attributes,
    unlisted_overrides,
)

USES_VLLM = "teacher_service/engine/vllm"

FILES = {
    "lib/__init__.py": """
MODULE_ATTRS = {"Engine": ".engine:Engine", "Lost": ".engine:Lost"}
if TYPE_CHECKING:
    from lib.params import Params
def __getattr__(name):
    if name == "platform":
        return find()
""",
    "lib/engine.py": """
import outside
from . import base
from .base import Base as Parent
from .star import *
Alias = Parent
class Engine(Parent, outside.Thing):
    handler: object = None
    def __init__(self, config, *, start=True):
        self.config = config
        for self.rank in range(2):
            if start:
                (self.first, self.second) = 1, 2
    @property
    def errored(self): ...
    async def generate(self, prompt, /, params, *rest, lora=None, **more): ...
class Other(base.Base): ...
""",
    "lib/base.py": """
class Base:
    def shut_down(self, timeout=None):
        self.is_down: bool = True
""",
    "lib/star.py": "def from_star(a): ...\n",
    "lib/params.py": """
try:
    from outside import Struct
except ImportError:
    Struct = None
class Shared(Struct):
    seed: int = 0
class Params(Shared):
    KINDS: ClassVar[int] = 3
    k: int
    hidden: int = field(init=False)
    cache = {}
    def clone(self): ...
""",
    "lib/broken.py": "def f(:\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the package above."""
    write(tmp_path, FILES)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def seam(path: str, **expected: tuple[object, ...]) -> Seam:
    return Seam(("part",), path, **expected)  # type: ignore[arg-type] # each test gives what its field takes


@pytest.mark.parametrize(
    "holds",
    [
        seam("lib.engine"),
        seam("lib:engine"),
        seam("lib:Engine"),
        seam("lib:Params", accepts=("seed", "k"), has=("clone", "cache", "KINDS", "hidden")),
        seam("lib:Params", parameters=(("seed", "k"),)),
        seam("lib:platform"),
        seam("lib.engine:Alias", has=("shut_down",)),
        seam("lib.engine:from_star", parameters=(("a",),)),
        seam("lib.engine:outside"),
        seam("lib.engine:Engine", parameters=(("self", "config", "*", "start"),)),
        seam("lib.engine:Engine.__init__", accepts=("start",)),
        seam("lib.engine:Engine", has=("handler", "config", "rank", "first", "second", "errored", "is_down")),
        seam("lib.engine:Engine.generate", parameters=(("self", "prompt", "/", "params", "*rest", "lora", "**more"),)),
        seam("lib.engine:Engine.shut_down", parameters=(("self",), ("self", "timeout"))),
        seam("lib.engine:Other", has=("shut_down",)),
        seam("lib.engine:Engine.__init__", contains=("(self.first,self.second) = 1,2",)),
        seam("lib.engine", contains=("class Other(base.Base)",)),
    ],
    ids=lambda one: one.path,
)
def test_what_holds_is_no_problem(root: Path, holds: Seam) -> None:
    """Re-exports, lazy tables, aliases, stars, base classes and all ways to declare an attribute are followed."""
    assert problems(root, [holds]) == []


@pytest.mark.parametrize(
    ("violated", "problem"),
    [
        (seam("lib.gone:Engine"), "lib.gone:Engine is missing: there is no module lib.gone (needed by part)"),
        (seam("lib.gone"), "lib.gone is missing: there is no module lib.gone (needed by part)"),
        (seam("gone.x:Y"), "gone.x:Y is missing: there is no module gone.x (needed by part)"),
        (seam("lib:Gone"), "lib:Gone is missing in lib/__init__.py (needed by part)"),
        (seam("lib:Lost"), "lib:Lost is missing in lib/__init__.py (needed by part)"),
        (
            seam("lib:Engine.stop"),
            "lib:Engine.stop is missing in lib/engine.py:7 (needed by part)",
        ),
        (
            seam("lib.base:Base.shut_down", parameters=(("self",), ("self", "timeout_s"))),
            "lib.base:Base.shut_down takes (self, timeout), expected (self) or (self, timeout_s) "
            "(lib/base.py:3; needed by part)",
        ),
        (
            seam("lib.engine:from_star", accepts=("a", "b", "c")),
            "lib.engine:from_star does not take b, c; it takes (a) (lib/star.py:1; needed by part)",
        ),
        (
            seam("lib:Params", accepts=("k", "KINDS", "hidden", "n")),
            "lib:Params does not take KINDS, hidden, n; it takes (seed, k) (lib/params.py:8; needed by part)",
        ),
        (
            seam("lib:Engine", has=("config", "start", "handlers")),
            "lib:Engine has no start, handlers (lib/engine.py:7; needed by part)",
        ),
        (
            seam("lib.engine:outside", parameters=(("a",),)),
            "lib.engine:outside takes nothing that could be read, expected (a) (lib/engine.py; needed by part)",
        ),
        (
            seam("lib.base:Base", contains=("self.is_up",)),
            "lib.base:Base does not contain 'self.is_up' (lib/base.py:2; needed by part)",
        ),
    ],
    ids=lambda one: one.path if isinstance(one, Seam) else "",
)
def test_what_is_violated_is_named(root: Path, violated: Seam, problem: str) -> None:
    """One line says what was expected, what was found, where, and who needs it."""
    assert problems(root, [violated]) == [problem]


def test_each_violation_of_a_seam_has_its_line(root: Path) -> None:
    """None hides another."""
    found = problems(root, [seam("lib:Engine", accepts=("x",), has=("y",), contains=("z",)), seam("lib:Gone")])
    assert [line.split(" (")[0] for line in found] == [
        "lib:Engine does not take x; it takes",
        "lib:Engine has no y",
        "lib:Engine does not contain 'z'",
        "lib:Gone is missing in lib/__init__.py",
    ]


def test_a_file_that_can_t_be_read_is_a_problem(root: Path) -> None:
    """Neither broken text nor broken syntax is raised."""
    (root / "lib" / "binary.py").write_bytes(b"\xff\xfe\x00")
    (root / "lib" / "secret.py").symlink_to(root / "lib" / "secret.py")  # a loop, which no user can open
    found = problems(root, [seam("lib.broken:f"), seam("lib.binary:f"), seam("lib.secret:f"), seam("lib:Engine")])
    assert [line.split(":", 2)[:2] for line in found] == [
        ["lib.broken", "f"],
        ["lib.binary", "f"],
        ["lib.secret", "f is missing"],
    ]
    assert "lib/broken.py can't be read: invalid syntax" in found[0]
    assert "lib/binary.py can't be read: 'utf-8' codec" in found[1]


def test_imports_in_a_circle_end(tmp_path: Path) -> None:
    """A name that two modules have from each other is nowhere defined; a class that inherits its own name is."""
    write(
        tmp_path,
        {
            "lib/__init__.py": "",
            "lib/a.py": "from .b import X\n",
            "lib/b.py": "from .a import X\nclass Y(Y): ...\n",
        },
    )
    assert len(problems(tmp_path, [seam("lib.a:X")])) == 1
    assert problems(tmp_path, [seam("lib.b:Y", has=())]) == []
    assert len(problems(tmp_path, [seam("lib.b:Y", has=("z",))])) == 1


def test_a_file_is_read_once(root: Path) -> None:
    """However many seams lie in it."""
    tree = SourceTree(root)
    first = tree.find("lib", "Engine")
    (root / "lib" / "engine.py").unlink()
    second = tree.find("lib.engine", "Engine")
    assert first is not None
    assert second is not None
    assert first.node is second.node


def test_parts_choose_their_seams() -> None:
    """A seam of several parts belongs to each of them."""
    one, two = Seam(("a", "b"), "x:Y"), Seam(("c",), "x:Z")
    assert for_parts([one, two], ["b"]) == [one]
    assert for_parts([one, two], ["a", "c"]) == [one, two]


VLLM_033 = {
    "vllm/v1/core/kv_cache_manager.py": """
class KVCacheManager:
    def get_computed_blocks(self, request, max_cache_hit_length=None):
        if max_cache_hit_length is None:
            max_cache_hit_length = request.num_tokens - 1
""",
    "vllm/model_executor/layers/logits_processor.py": """
class LogitsProcessor:
    def _get_logits(self, hidden_states, lm_head, embedding_bias, skip_gather=False):
        return self._gather_logits(logits)
""",
}
"""Two signatures as vLLM 0.33 has them."""
ASSUMED_BEFORE = [
    Seam(
        ("fast",),
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        parameters=(("self", "request"),),
    ),
    Seam(
        ("lora",),
        "vllm.model_executor.layers.logits_processor:LogitsProcessor._get_logits",
        parameters=(("self", "hidden_states", "lm_head", "embedding_bias"),),
    ),
]
"""What this project's scheduler and adapter were written for, before 0.29."""


def test_the_code_before_is_refused_on_033(tmp_path: Path) -> None:
    """The engine died of the first in its first step, and `--lora` of the second; today's table allows both."""
    write(tmp_path, VLLM_033)
    assert problems(tmp_path, ASSUMED_BEFORE) == [
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks takes (self, request, max_cache_hit_length), "
        "expected (self, request) (vllm/v1/core/kv_cache_manager.py:3; needed by fast)",
        "vllm.model_executor.layers.logits_processor:LogitsProcessor._get_logits takes (self, hidden_states, lm_head, "
        "embedding_bias, skip_gather), expected (self, hidden_states, lm_head, embedding_bias) "
        "(vllm/model_executor/layers/logits_processor.py:3; needed by lora)",
    ]
    places = {one.path for one in ASSUMED_BEFORE}
    today = [one for one in SEAMS if one.path in places]
    assert len(today) == len(places)
    assert problems(tmp_path, today) == []


def test_the_installed_vllm_is_as_the_table_says() -> None:
    """All of it, though the route in use needs a part."""
    assert problems(installed_root("vllm"), SEAMS) == []


def test_every_import_of_vllm_is_in_the_table() -> None:
    """In whichever function it stands, and what is named in a string, as classes are that vLLM loads."""
    files = parsed(USES_VLLM)
    used = imported(files, "vllm")
    assert used["vllm:SamplingParams"].startswith(USES_VLLM)
    named = named_in_strings(files, r"vllm(\.\w+)+\.[A-Z]\w+")
    assert "vllm.v1.executor.uniproc_executor.UniProcExecutor" in named
    used |= {":".join(name.rsplit(".", 1)): path for name, path in named.items()}
    assert unlisted(used, SEAMS) == []


def test_every_override_is_in_the_table() -> None:
    """With parameters that the method here can serve, in each of their forms."""
    theirs = SourceTree(installed_root("vllm"))
    assert unlisted_overrides(parsed(USES_VLLM), theirs, "vllm", SEAMS) == []
    without = [one for one in SEAMS if not one.path.endswith("PromptLogprobsWorker.add_request")]
    assert len(unlisted_overrides(parsed(USES_VLLM), theirs, "vllm", without)) == 1


def test_every_attribute_of_a_base_class_is_in_the_table() -> None:
    """What methods here read of `self` and vLLM assigns."""
    assert unlisted_attributes(parsed(USES_VLLM), "vllm", SEAMS) == []
    without = [one for one in SEAMS if "uses_prompt_logprobs" not in one.has]
    assert unlisted_attributes(parsed(USES_VLLM), "vllm", without) == [
        f"ResponseRowsWorker reads {name} of vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker"
        for name in ("in_progress_prompt_logprobs", "uses_prompt_logprobs")
    ]


@pytest.mark.parametrize(
    ("path", "function", "dicts_of", "one_of_them"),
    [
        (
            "vllm.engine.arg_utils:AsyncEngineArgs",
            "AsyncEngineArgs",
            ("engine_arguments", "_cpu_defaults"),
            "skip_tokenizer_init",
        ),
        ("vllm:SamplingParams", "SamplingParams", ("sampling", "pack"), "prompt_logprobs"),
    ],
)
def test_every_keyword_is_in_the_table(path: str, function: str, dicts_of: tuple[str, ...], one_of_them: str) -> None:
    """Of the calls, and of the functions that make their arguments."""
    used = keywords_of(parsed(USES_VLLM), function, dicts_of=dicts_of)
    assert one_of_them in used
    (listed,) = (one.accepts for one in SEAMS if one.path == path)
    assert used - set(listed) == set()


def test_every_environment_variable_of_vllm_is_in_the_table() -> None:
    """A variable that vLLM no longer reads would be set in vain."""
    used = named_in_strings(parsed(USES_VLLM), r"VLLM_[A-Z0-9_]+")
    assert "VLLM_RPC_BASE_PATH" in used
    assert unlisted({f"vllm.envs:{name}": path for name, path in used.items()}, SEAMS) == []


def test_the_fast_route_has_seams_of_each_part() -> None:
    """A part without any would be a misspelled one."""
    for part in FAST_PARTS:
        assert for_parts(SEAMS, [part])


@pytest.mark.parametrize(
    ("ours", "theirs", "serve"),
    [
        (("self", "a", "b"), ("self", "a", "b"), True),
        (("self", "a"), ("self", "a", "b"), False),
        (("self", "b", "a"), ("self", "a", "b"), False),
        (("self", "a", "more"), ("self", "a"), True),
        (("self", "*rest", "**named"), ("self", "a", "*", "b"), True),
        (("self", "*rest"), ("self", "a"), False),
        (("self", "a", "*rest", "**named"), ("self", "a", "b"), True),
        (("self", "a"), ("self", "a", "*", "b"), False),
        (("self", "a", "b"), ("self", "a", "*", "b"), True),
        (("self", "a"), ("self", "**named"), False),
    ],
)
def test_parameters_serve_a_call_or_not(ours: tuple[str, ...], theirs: tuple[str, ...], serve: bool) -> None:
    """The rule by which overrides are judged above."""
    assert serves(ours, theirs) is serve
