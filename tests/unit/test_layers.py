"""The code keeps its layers, and every rule is shown to catch a violation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.import_rules import (
    PLUGINS,
    Graph,
    Sources,
    cycles,
    forbidden_packages,
    foreign_libraries,
    import_graph,
    imported_plugins,
    leaked_stubs,
    loaded_heavy_modules,
    module_name,
    read_sources,
    side_effects,
    upward_imports,
)

ROOT = Path(__file__).parents[2]

GRAPH_RULES = (forbidden_packages, upward_imports, foreign_libraries, leaked_stubs, imported_plugins, cycles)


@pytest.mark.parametrize("rule", GRAPH_RULES, ids=lambda rule: rule.__name__)
def test_import_graph_keeps_the_rule(rule: Callable[[Graph], list[str]]) -> None:
    """No import anywhere in the three packages breaks a rule of the layers."""
    assert rule(import_graph(read_sources(ROOT))) == []


def test_modules_have_no_side_effects_at_import() -> None:
    """Importing any module of the three packages only defines things."""
    assert side_effects(read_sources(ROOT)) == []


CONFIG_MODULES = sorted(
    {"teacher_service.config", "trainer.config"}
    | {module_name(path) for path in read_sources(ROOT) if path.endswith("/config.py")}
)


@pytest.mark.parametrize("module", CONFIG_MODULES)
def test_importing_a_config_module_loads_nothing_heavy(module: str) -> None:
    """Settings can be read and shown on a machine, and in a moment, that has no room for an engine."""
    assert loaded_heavy_modules(module, ROOT) == []


def test_heavy_import_in_a_config_module_is_caught(tmp_path: Path) -> None:
    """The check above sees a library that a config module loads by way of another module."""
    (tmp_path / "config.py").write_text("import other\n")
    (tmp_path / "other.py").write_text("import grpc\n")
    assert loaded_heavy_modules("config", tmp_path) == ["grpc"]


def test_every_package_is_seen() -> None:
    """The graph holds the real modules, so that an empty one can't pass for a clean one."""
    graph = import_graph(read_sources(ROOT))
    assert {"protos.codec", "teacher_service.errors", "teacher_service.engine.base", "trainer.errors"} <= graph.keys()
    assert "protos.teacher.v1.teacher_pb2" in graph["protos.codec"]
    assert graph.keys() >= set(PLUGINS)


@pytest.mark.parametrize(
    ("rule", "sources", "violation"),
    [
        (
            forbidden_packages,
            {"trainer/losses/kl.py": "from teacher_service.types import ScoreJob"},
            "trainer.losses.kl imports teacher_service.types",
        ),
        (
            forbidden_packages,
            {"teacher_service/scoring.py": "def f():\n    import trainer.errors"},
            "teacher_service.scoring imports trainer.errors",
        ),
        (forbidden_packages, {"protos/codec.py": "import trainer"}, "protos.codec imports trainer"),
        (
            upward_imports,
            {"teacher_service/scoring.py": "from teacher_service.transports import http"},
            "teacher_service.scoring imports teacher_service.transports, which is no lower layer",
        ),
        (
            upward_imports,
            {"teacher_service/admission/admission.py": "from teacher_service.engine.base import Engine"},
            "teacher_service.admission.admission imports teacher_service.engine.base, which is no lower layer",
        ),
        (
            upward_imports,
            {"teacher_service/engine/fake.py": "from ..scoring import Scorer"},
            "teacher_service.engine.fake imports teacher_service.scoring, which is no lower layer",
        ),
        (
            upward_imports,
            {"trainer/losses/kl.py": "from trainer.selection import select"},
            "trainer.losses.kl imports trainer.selection, which is no lower layer",
        ),
        (
            upward_imports,
            {"trainer/metrics.py": "", "trainer/teacher/client.py": "from trainer import metrics"},
            "trainer.teacher.client imports trainer.metrics, which is no lower layer",
        ),
        (
            upward_imports,
            {"trainer/helpers.py": "import json"},
            "trainer.helpers has no layer; give 'helpers' one in LAYERS",
        ),
        (
            foreign_libraries,
            {"teacher_service/engine/transformers.py": "def f():\n    from vllm.sampling_params import SamplingParams"},
            "teacher_service.engine.transformers imports vllm.sampling_params, which belongs to "
            "teacher_service.engine.vllm, trainer.verl_adapter.cpu.rollout",
        ),
        (
            foreign_libraries,
            {"trainer/metrics.py": "if TYPE_CHECKING:\n    import ray"},
            "trainer.metrics imports ray, which belongs to trainer.verl_adapter, trainer.main_ppo",
        ),
        (
            foreign_libraries,
            {"trainer/config.py": "import importlib\nimportlib.import_module('verl.trainer')"},
            "trainer.config imports verl.trainer, which belongs to trainer.verl_adapter, trainer.main_ppo",
        ),
        (
            foreign_libraries,
            {"teacher_service/server.py": "import fastapi"},
            "teacher_service.server imports fastapi, which belongs to teacher_service.transports",
        ),
        (
            foreign_libraries,
            {"teacher_service/scoring.py": "import grpc.aio"},
            "teacher_service.scoring imports grpc.aio, which belongs to teacher_service.transports, "
            "teacher_service.server, trainer.teacher, protos.teacher.v1",
        ),
        (
            leaked_stubs,
            {
                "protos/teacher/v1/teacher_pb2.py": "",
                "teacher_service/scoring.py": "from protos.teacher.v1 import teacher_pb2 as pb",
            },
            "teacher_service.scoring imports protos.teacher.v1.teacher_pb2",
        ),
        (
            imported_plugins,
            {
                "trainer/verl_adapter/cpu/plugin.py": "",
                "trainer/main_ppo.py": "def f():\n    from trainer.verl_adapter.cpu import plugin",
            },
            "trainer.main_ppo imports trainer.verl_adapter.cpu.plugin",
        ),
        (
            cycles,
            {
                "trainer/errors.py": "def f():\n    from trainer import types",
                "trainer/types.py": "import trainer.errors",
            },
            "trainer.errors -> trainer.types -> trainer.errors",
        ),
    ],
)
def test_each_graph_rule_catches_its_violation(
    rule: Callable[[Graph], list[str]], sources: Sources, violation: str
) -> None:
    """A rule names the offending import, wherever in the file and in whichever form it stands."""
    assert violation in rule(import_graph(sources))


@pytest.mark.parametrize(
    "source",
    [
        "print('hello')",
        "import os\nos.environ['A'] = '1'",
        "import os\nos.environ.setdefault('A', '1')",
        "import sys\nsys.flags.x = 1",
        "for i in range(3):\n    pass",
        "try:\n    import torch\nexcept ImportError:\n    torch = None",
        "class A:\n    register('a')",
        "if DEBUG:\n    pass",
    ],
)
def test_side_effect_at_import_is_caught(source: str) -> None:
    """A statement that acts while its module is imported is named with its file."""
    assert [line.split(":")[0] for line in side_effects({"trainer/x.py": source})] == ["trainer/x.py"]


def test_definitions_are_no_side_effect() -> None:
    """Imports, constants, classes, functions, type-only imports and the main guard are what a module is made of."""
    source = '''"""Doc."""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
LIMIT: int = 3
"""Doc of LIMIT."""
low, high = 1, 2
class A:
    """Doc."""
    size = 1
    def f(self) -> None: print("later")
if __name__ == "__main__":
    A().f()
'''
    assert side_effects({"trainer/x.py": source}) == []
