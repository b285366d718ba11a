"""When a run may go on without a teacher's scores, and what is saved when it may not: our mixins without verl."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config import GKDConfig
from trainer.config.gkd import ActorConfig, TeacherConfig
from trainer.errors import CheckpointError, TeacherLostError
from trainer.verl_adapter.cpu import vllm_metadata

LOST = {"gkd_teacher_lost": "no replica serves"}


@pytest.fixture(scope="module", autouse=True)
def _vllm_alias() -> None:
    """verl asks for the metadata of `vllm` at import."""
    vllm_metadata.install_vllm_alias()


def _responses(num_lost: int, num: int = 8) -> dict[str, dict[str, Any]]:
    return {f"u{i // 4}_{i % 4}_0": dict(LOST) if i < num_lost else {} for i in range(num)}


def _trainer(teacher: dict[str, Any], actor: dict[str, Any] | None = None) -> Any:
    from trainer.verl_adapter.trainers import GKDTrainerMixin

    made: Any = GKDTrainerMixin.__new__(GKDTrainerMixin)
    made.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(n=4)))
    gkd = GKDConfig(actor=ActorConfig(use_teacher_kl_loss=True, **(actor or {})), teacher=TeacherConfig(**teacher))
    vars(made)["_gkd"] = gkd  # a cached property
    return made


@pytest.mark.parametrize("on_failure", ["wait", "fail"])
@pytest.mark.parametrize("taken", [False, True])
def test_one_lost_response_ends_the_run_as_soon_as_it_is_seen(on_failure: str, taken: bool) -> None:
    """Whether or not the step has all the others."""
    trainer = _trainer({"on_failure": on_failure})
    trainer._check_responses(_responses(0), taken=taken)
    with pytest.raises(TeacherLostError, match=f"1 of 8 responses .*on_failure={on_failure}.*no replica serves"):
        trainer._check_responses(_responses(1), taken=taken)


def test_degrade_counts_when_the_step_takes_its_batch() -> None:
    """Half of the responses are enough for a coverage of .5, fewer are not; before that nothing is decided."""
    trainer = _trainer({"on_failure": "degrade", "min_coverage": 0.5})
    trainer._check_responses(_responses(8), taken=False)
    trainer._check_responses(_responses(4), taken=True)
    with pytest.raises(TeacherLostError, match=r"38% of the step's selected responses.*min_coverage=0.5"):
        trainer._check_responses(_responses(5), taken=True)


def test_only_selected_responses_count_for_the_coverage() -> None:
    """One of four is asked about: of two prompts, one lost response is half."""
    trainer = _trainer(
        {"on_failure": "degrade", "min_coverage": 0.6}, {"gkd_select_strategy": "random", "gkd_select_k": 1}
    )
    with pytest.raises(TeacherLostError, match="50%"):
        trainer._check_responses(_responses(1), taken=True)


class _Verl:
    """verl's trainer, as far as the mixin needs it."""

    def __init__(self, folder: Path, fails: BaseException | None = None) -> None:
        self.config = SimpleNamespace(trainer=SimpleNamespace(default_local_dir=f"{folder}"))
        self.trainer_mode = "sync"
        self.train_dataloader: Any = SimpleNamespace(fetched=0)
        self.train_dataloader.state_dict = lambda: {"fetched": self.train_dataloader.fetched}
        self.global_steps = 0
        self.saved: list[tuple[int, Any]] = []
        self.save_error: BaseException | None = None
        self.fails = fails

    def fit(self, _manager: object) -> None:
        """Two whole steps, and a third one that fails after its batch was fetched."""
        for step in (1, 2, 3):
            self.global_steps = step
            self.train_dataloader.fetched += 1
            if step == 3 and self.fails is not None:
                raise self.fails
            self.on_step_end()

    def on_step_end(self) -> None:
        """Nothing."""

    def _save_checkpoint(self) -> None:
        if self.save_error is not None:
            raise self.save_error
        self.saved.append((self.global_steps, self.train_dataloader.state_dict()))

    def _shutdown_dump_executor(self) -> None:
        """Nothing."""


def _stoppable(folder: Path, fails: BaseException | None) -> Any:
    from trainer.verl_adapter.stopping import StoppableMixin

    return type("Stoppable", (StoppableMixin, _Verl), {})(folder, fails)


def test_a_stop_saves_the_last_whole_step_with_the_data_of_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the batch that was fetched for the step that is given up."""
    from trainer.verl_adapter.stopping import StopRequested

    trainer = _stoppable(tmp_path, StopRequested())
    trainer.fit(None)
    assert trainer.saved == [(2, {"fetched": 2})]
    assert (trainer.global_steps, trainer.train_dataloader.fetched) == (3, 3)
    assert f"the checkpoint of step 2 is in {tmp_path}" in capsys.readouterr().out


def test_a_lost_teacher_saves_and_says_where(tmp_path: Path) -> None:
    """The error that ends the run names the checkpoint."""
    trainer = _stoppable(tmp_path, TeacherLostError("8 of 8 responses"))
    with pytest.raises(TeacherLostError, match=r"8 of 8 responses; the checkpoint of step 2 is in .*resume_mode=auto"):
        trainer.fit(None)
    assert trainer.saved == [(2, {"fetched": 2})]


def test_a_lost_teacher_and_a_full_disk_are_both_told(tmp_path: Path) -> None:
    """Neither hides the other."""
    trainer = _stoppable(tmp_path, TeacherLostError("8 of 8 responses"))
    trainer.save_error = OSError(28, "No space left on device")
    with pytest.raises(TeacherLostError, match=r"8 of 8 responses; moreover, the checkpoint of step 2 .*No space left"):
        trainer.fit(None)


def test_a_checkpoint_that_fails_names_the_last_whole_one(tmp_path: Path) -> None:
    """As does one that verl writes in its loop."""
    trainer = _stoppable(tmp_path, None)
    trainer.global_steps = 3
    trainer._save_checkpoint()
    trainer.global_steps = 6
    trainer.save_error = RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed")
    with pytest.raises(
        CheckpointError, match=r"step 6 can't be written to .*PytorchStreamWriter failed; that of step 3"
    ):
        trainer._save_checkpoint()


def test_what_was_saved_already_is_not_saved_again(tmp_path: Path) -> None:
    """A stop right after a checkpoint."""
    from trainer.verl_adapter.stopping import StopRequested

    trainer = _stoppable(tmp_path, StopRequested())
    trainer._saved_step = 2
    trainer.fit(None)
    assert trainer.saved == []
