"""The benchmark of scoring rows: its forms agree, and what can't run is left out with its reason."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import scoring_rows
from benchmarks.losses import BenchmarkError

R, V, K = 5, 130, 3


def _logits() -> torch.Tensor:
    return scoring_rows.make_logits(R, V, dtype=torch.bfloat16, device="cpu")


@pytest.mark.parametrize("k", [0, K])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_forms_agree_on_a_cpu_and_the_kernel_is_left_out(k: int, entropy: bool) -> None:
    """The words say why and what to do."""
    console = Console(record=True, quiet=False, width=120)
    calls = scoring_rows.make_calls(_logits(), k, entropy=entropy, console=console)
    assert list(calls) == ["read", "torch", "softmax"]
    assert scoring_rows.NO_GPU in console.export_text()
    scoring_rows.check_agreement(calls)
    assert torch.equal(calls["read"](), _logits().max(-1).values)


def test_a_form_that_differs_is_refused() -> None:
    """Nothing is timed then."""
    calls = scoring_rows.make_calls(_logits(), K, entropy=True, console=Console(quiet=True))
    right = calls["torch"]()
    calls["torch"] = lambda: right._replace(given=right.given + 0.01)
    with pytest.raises(BenchmarkError, match=r"torch differs from softmax by 0\.01 nats in given"):
        scoring_rows.check_agreement(calls)


def test_results_are_json_that_holds_each_form_and_its_ratio() -> None:
    """Without and with the entropy; reading the logits is the unit."""
    app = typer.Typer()
    app.command()(scoring_rows.main)
    given = ["--device", "cpu", "--rows", f"{R}", "--V", f"{V}", "--K", f"{K}", "--repeats", "1", "--json"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert [(one["form"], one["entropy"]) for one in results] == [
        (form, entropy) for entropy in (False, True) for form in ("read", "torch", "softmax")
    ]
    assert [one["reads"] for one in results if one["form"] == "read"] == [1.0, 1.0]
