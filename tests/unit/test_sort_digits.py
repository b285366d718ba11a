"""The demo's task, models and files."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
from hydra.core.override_parser.overrides_parser import OverridesParser
from typer.testing import CliRunner

from examples.sort_digits import demo, settings, task
from examples.sort_digits.encoding import encode_rows
from examples.sort_digits.errors import DemoError
from examples.sort_digits.evaluate import evaluate, read_rows
from examples.sort_digits.interrupts import Interrupted, Interrupts
from examples.sort_digits.metrics_log import MetricsLog, StepMetrics
from examples.sort_digits.models import STUDENT_SIZE, build_model, build_tokenizer, save_model
from examples.sort_digits.plot import plot_run
from examples.sort_digits.pretrain import STUDENT_RECIPE, PretrainingError, greedy_accuracy, one_thread, train
from examples.sort_digits.run_folder import RunFolder
from examples.sort_digits.summary import Summary
from examples.sort_digits.task import Row, TaskConfig, make_splits, write_parquet, write_splits

SMALL = TaskConfig(num_digits=2, num_train=60, num_validation=20, num_held_out=20, seed=3)
"""All hundred questions of two digits."""

EASY = dataclasses.replace(STUDENT_RECIPE, target_accuracy=0.3, validate_every=5, learning_rate=3e-3, max_steps=100)
"""Reached within seconds on SMALL."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    with one_thread():
        yield


# --- the task ---


def test_answers_are_the_digits_in_order() -> None:
    """Every question is its digits and "="; leading zeros and repeats are kept."""
    splits = make_splits(TaskConfig(num_train=2000))
    assert all(len(row.question) == 6 and row.question.endswith("=") for row in splits.train)
    assert all(row.answer == "".join(sorted(row.question[:5])) for row in splits.train)
    assert any(row.question.startswith("0") for row in splits.train)
    assert any(len(set(row.answer)) < 5 for row in splits.train)


def test_no_question_is_drawn_twice() -> None:
    """Splits that take every question there is hold each exactly once."""
    splits = make_splits(SMALL)
    assert [len(splits.train), len(splits.validation), len(splits.held_out)] == [60, 20, 20]
    questions = [row.question for row in splits.train + splits.validation + splits.held_out]
    assert sorted(questions) == [f"{number:02d}=" for number in range(100)]


def test_the_seed_decides_what_is_drawn() -> None:
    """The same values give the same rows, another seed others."""
    assert make_splits(SMALL) == make_splits(SMALL)
    assert make_splits(SMALL) != make_splits(dataclasses.replace(SMALL, seed=4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_digits": 0}, "num_digits is 0, must be at least 1"),
        ({"num_train": -1}, "num_train is -1, must be at least 0"),
        ({"num_digits": 2}, "21500 distinct questions were asked for, but only 100 have 2 digits"),
    ],
)
def test_impossible_tasks_are_refused(values: dict[str, int], message: str) -> None:
    """A size that can't be had is named with its limit."""
    with pytest.raises(ValueError, match=message):
        TaskConfig(**values)


def test_parquet_files_hold_questions_and_answers(tmp_path: Path) -> None:
    """What is written is read back, leading zeros included."""
    rows = (Row(question="00310=", answer="00013"), Row(question="52413=", answer="12345"))
    write_parquet(rows, tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == rows


def test_the_command_writes_all_splits(tmp_path: Path) -> None:
    """Options reach the generator; the files are those of the function."""
    sizes = ["--num-train", "60", "--num-validation", "20", "--num-held-out", "20"]
    arguments = ["--output-dir", f"{tmp_path / 'cli'}", "--num-digits", "2", "--seed", "3", *sizes]
    result = CliRunner().invoke(_app(task.main), arguments)
    assert result.exit_code == 0, result.output
    for name, path in write_splits(make_splits(SMALL), tmp_path / "function").items():
        assert read_rows(tmp_path / "cli" / f"{name}.parquet") == read_rows(path)


# --- the models ---


def test_rows_are_tokenised_as_the_trainer_does() -> None:
    """One token per character: user turn, start of the assistant's turn | digits, end of turn."""
    encoded = encode_rows([Row(question="52413=", answer="12345")], build_tokenizer())
    assert encoded.prompts.tolist() == [[26, 22, 0, 6, 3, 5, 2, 4, 11, 24, 0, 26, 23, 0]]
    assert encoded.answers.tolist() == [[2, 3, 4, 5, 6, 24]]


def test_rows_of_different_lengths_are_refused() -> None:
    """Nothing is padded, so nothing may need padding."""
    rows = [Row(question="1=", answer="1"), Row(question="12=", answer="12")]
    with pytest.raises(ValueError, match=r"questions have \[10, 11\] tokens; rows must be of one length"):
        encode_rows(rows, build_tokenizer())


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, tuple[Row, ...]]:
    """A model that gets some of the two-digit questions right, and all of those questions."""
    splits, tokenizer = make_splits(SMALL), build_tokenizer()
    rows = splits.train + splits.validation + splits.held_out
    encoded = encode_rows(rows, tokenizer)
    return train(EASY, encoded, encoded, seed=0, on_step=lambda _step, _accuracy: None).model, rows


def test_training_stops_at_its_accuracy_and_repeats_itself() -> None:
    """It stops at the first validation that reaches the target; the same seed gives the same weights."""
    encoded = encode_rows(make_splits(SMALL).train, build_tokenizer())
    history: list[tuple[int, float]] = []
    first = train(EASY, encoded, encoded, seed=0, on_step=lambda *seen: history.append(seen))
    second = train(EASY, encoded, encoded, seed=0, on_step=lambda _step, _accuracy: None)
    assert [step for step, _ in history] == list(range(5, first.steps + 1, 5))
    assert history[-1][1] == first.validation_accuracy >= 0.3
    assert all(accuracy < 0.3 for _, accuracy in history[:-1])
    for name, weights in first.model.state_dict().items():
        assert torch.equal(weights, second.model.state_dict()[name]), name


def test_training_that_misses_its_accuracy_says_so() -> None:
    """The best accuracy, the needed one and the remedy."""
    encoded = encode_rows(make_splits(SMALL).train, build_tokenizer())
    hopeless = dataclasses.replace(EASY, max_steps=5, target_accuracy=0.9)
    with pytest.raises(PretrainingError, match=r"student answers .*% .* after 5 steps, 90.0% are needed; try another"):
        train(hopeless, encoded, encoded, seed=0, on_step=lambda _step, _accuracy: None)


def test_both_measures_agree_with_naive_greedy_decoding(
    trained: tuple[torch.nn.Module, tuple[Row, ...]], tmp_path: Path
) -> None:
    """One forward pass over the answers, generation from a checkpoint, and token-by-token argmax count the same."""
    model, rows = trained
    right = 0
    for row in rows:
        encoded = encode_rows([row], build_tokenizer())
        token_ids = encoded.prompts
        for _ in range(3):
            token_ids = torch.cat([token_ids, model(input_ids=token_ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        right += token_ids.tolist() == encoded.token_ids.tolist()
    assert 0.3 <= right / 100 < 1
    assert greedy_accuracy(model, encode_rows(rows, build_tokenizer())) == pytest.approx(right / 100)
    save_model(model, tmp_path, dtype=torch.float32)
    assert evaluate(tmp_path, rows) == right / 100


def test_a_model_that_ends_every_turn_at_once_is_never_right(tmp_path: Path) -> None:
    """Generation shorter than the answers counts as wrong, not as an error."""
    rows, tokenizer = [Row(question="52413=", answer="12345")], build_tokenizer()
    model = build_model(STUDENT_SIZE, seed=0)
    with torch.no_grad():
        # Every token is the same vector, and the end of turn the longest: with tied embeddings the likeliest.
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.embed_tokens.weight[tokenizer.eos_token_id] = 10.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        logits = model(input_ids=encode_rows(rows, tokenizer).prompts).logits
    assert int(logits[0, -1].argmax()) == tokenizer.eos_token_id
    save_model(model, tmp_path)
    assert evaluate(tmp_path, rows) == 0.0


# --- the run's files ---


def _line(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, "data": metrics}) + "\n"


def test_metrics_are_read_as_they_come(tmp_path: Path) -> None:
    """A half-written line waits for its other half; validations by themselves are no steps."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    assert log.read_new() == ()
    first = _line(1, **{"actor/teacher_kl_loss": 1.5, "gkd/scored_tokens": 700.0, "timing_s/step": 2.5})
    path.write_text(_line(0, **{"val/accuracy": 0.2}) + first[:30])
    assert log.read_new() == []
    path.write_text(_line(0, **{"val/accuracy": 0.2}) + first)
    assert log.read_new() == [StepMetrics(step=1, teacher_kl=1.5, scored_tokens=700, seconds=2.5)]
    assert log.read_new() == []
    assert [one.step for one in log.steps] == [1]


def test_a_step_without_the_teacher_is_an_error(tmp_path: Path) -> None:
    """What the demo reports must have been measured."""
    (tmp_path / "metrics.jsonl").write_text(_line(4, **{"gkd/scored_tokens": 7.0, "timing_s/step": 2.5}))
    with pytest.raises(DemoError, match=r"step 4 in .* lacks actor/teacher_kl_loss"):
        MetricsLog(tmp_path / "metrics.jsonl").read_new()


def test_a_folder_of_an_earlier_run_is_emptied(tmp_path: Path) -> None:
    """Files, folders and links of the earlier run go; what a link points to stays."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    folder = RunFolder(tmp_path / "run")
    with folder.claimed():
        folder.student.mkdir()
        (folder.student / "config.json").touch()
        folder.summary.touch()
        (folder.path / "link").symlink_to(tmp_path / "elsewhere")
    with folder.claimed():
        assert [one.name for one in folder.path.iterdir()] == [".sort-digits-demo"]
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    """A folder with files that no demo wrote is refused, and so is a file."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DemoError, match="holds files that no demo run wrote"), RunFolder(tmp_path).claimed():
        pass
    with pytest.raises(DemoError, match="is no folder"), RunFolder(tmp_path / "thesis.tex").claimed():
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second is refused while the first is using it, and nothing of the first is removed."""
    folder = RunFolder(tmp_path / "run")
    with folder.claimed():
        folder.summary.touch()
        with pytest.raises(DemoError, match="another demo run is using"), RunFolder(tmp_path / "run").claimed():
            pass
        assert folder.summary.exists()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1234", "[::1]:1234", "teachers:1234"])
@pytest.mark.parametrize("name", ["plain", "with space", "a=b,c", "{x}", "it's", "back\\slash", "täst"])
def test_any_path_and_address_survive_hydra(name: str, endpoint: str) -> None:
    """Whatever characters they have, the trainer gets that folder and that teacher."""
    path = Path("/tmp") / name  # noqa: S108 - never made
    command = settings.trainer_command(
        settings.Distillation(),
        student=path,
        train_file=path,
        validation_file=path,
        endpoint=endpoint,
        checkpoints=path,
        hydra_dir=path,
    )
    assert command[1:3] == ["-m", "trainer.main_ppo"]
    parsed = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(command[3:])}
    assert parsed["actor_rollout_ref.model.path"] == f"{path}"
    assert parsed["actor_rollout_ref.teacher.endpoints"] == endpoint
    assert parsed["trainer.logger"] == ["console", "file"]


SUMMARY = Summary(
    teacher_accuracy=0.98,
    student_accuracy_before=0.25,
    student_accuracy_after=0.9,
    teacher_kl_first=2.0,
    teacher_kl_last=0.3,
    steps=2,
    seconds=200.5,
    scored_tokens=1500,
)


def test_the_summary_holds_the_eight_numbers(tmp_path: Path) -> None:
    """The file has exactly these keys; the table shows the accuracies as percentages."""
    SUMMARY.write(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "teacher_accuracy": 0.98,
        "student_accuracy_before": 0.25,
        "student_accuracy_after": 0.9,
        "teacher_kl_first": 2.0,
        "teacher_kl_last": 0.3,
        "steps": 2,
        "seconds": 200.5,
        "scored_tokens": 1500,
    }
    cells = [list(column.cells) for column in SUMMARY.as_table().columns]
    assert (cells[1][0], cells[2][0]) == ("25.0%", "90.0%")


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    """It is drawn without a display, at a size one can read."""
    steps = [StepMetrics(step=one, teacher_kl=2.0 / one, scored_tokens=700, seconds=2.0) for one in (1, 2)]
    plot_run(steps, SUMMARY, tmp_path / "curves.png")
    header = (tmp_path / "curves.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1200, 480)


def test_a_foreign_teacher_needs_its_models(tmp_path: Path) -> None:
    """--endpoint alone is refused: the teacher's accuracy and the held-out questions would be unknown."""
    result = CliRunner().invoke(_app(demo.main), ["--endpoint", "127.0.0.1:1", "--output-dir", f"{tmp_path / 'run'}"])
    assert result.exit_code == 2
    assert "--endpoint needs --models" in result.output
    assert not (tmp_path / "run").exists()


def _app(command: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    return app


# --- interruptions ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_once_and_handlers_are_restored(number: signal.Signals) -> None:
    """The first signal raises, a second one does not, and afterwards everything is as it was."""
    # under nohup the tests themselves are told to ignore SIGHUP, which the next test but one is about
    inherited = signal.signal(number, signal.default_int_handler)
    interrupts = Interrupts()
    try:
        with interrupts.watched():
            with pytest.raises(Interrupted) as caught:
                signal.raise_signal(number)
            signal.raise_signal(number)
        assert caught.value.signal_number == number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, inherited)


def test_cleaning_up_is_shielded() -> None:
    """A signal that comes while cleaning up is raised when that is done, not in its midst."""
    interrupts = Interrupts()
    done = []

    def clean_up() -> None:
        with interrupts.shielded():
            with interrupts.shielded():
                signal.raise_signal(signal.SIGTERM)
            done.append("inner")
            done.append("outer")

    with interrupts.watched(), pytest.raises(Interrupted):
        clean_up()
    assert done == ["inner", "outer"]


def test_nohup_is_respected() -> None:
    """A run that was told to ignore the end of its terminal does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().watched():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
