"""The loss on logits whose vocabulary is split over ranks, over gloo, against the dense form."""

from __future__ import annotations

from pathlib import Path

from tests.support import vocabulary_ranks
from tests.support.ranks import run_ranks
from tests.support.vocabulary_ranks import SPLITS
from trainer.losses import DIVERGENCES, TAILS

ENGINES = ("thd", "bshd", "ulysses")


async def test_split_vocabulary_equals_the_dense_form(tmp_path: Path) -> None:
    """Every divergence and tail at two temperatures, value, gradient and statistics, with padded columns, on 2 and 4.

    And the whole loss through verl's own Megatron packing and LM-head hook, in both of its layouts, and on the shares
    of FSDP's sequence parallelism.
    """
    errors = await run_ranks(vocabulary_ranks.__name__, folder=tmp_path, world_size=max(SPLITS), isolated=True)
    engine = {name: error for name, error in errors.items() if name.split("/")[1] in ENGINES}
    forms = {name: error for name, error in errors.items() if name not in engine}
    assert len(forms) == len(SPLITS) * len(DIVERGENCES) * len(TAILS) * 2 * 5
    assert {name: error for name, error in forms.items() if not error < 1e-12} == {}
    assert {f"{n}/{one}/gradient" for n in SPLITS for one in ENGINES} <= engine.keys()
    assert {name: error for name, error in engine.items() if not error < 1e-5} == {}
