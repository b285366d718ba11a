"""Runs the demo with a teacher and a trainer of the tests: demo_run.py OUTPUT_DIR MODELS BEHAVIOUR FOOTPRINT.

MODELS may be "-": the demo then makes its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from examples.sort_digits.demo import Options, run
from examples.sort_digits.settings import Distillation, trained_student

TRAINER = Path(__file__).parent / "demo_trainer.py"


def main() -> None:
    output_dir, models, behaviour, footprint = sys.argv[1:]

    def teacher_command(_model: Path, port_file: Path) -> list[str]:
        """The real service with the analytic engine; or one that never gets ready."""
        if behaviour == "teacher-hangs":
            return [sys.executable, "-c", "import time; time.sleep(600)"]
        if behaviour == "teacher-fails":
            return [sys.executable, "-c", "import sys; sys.exit('no such model')"]
        serve = [sys.executable, "-m", "teacher_service", "serve", "--engine", "fake"]
        return [*serve, "--grpc-port", "0", "--http-port", "0", "--port-file", f"{port_file}"]

    def trainer_command(settings: Distillation, *, student: Path, checkpoints: Path, **_rest: object) -> list[str]:
        target = trained_student(checkpoints, settings)
        command = [sys.executable, TRAINER, behaviour, footprint, student, target, settings.steps]
        return [f"{one}" for one in command]

    options = Options(
        output_dir=Path(output_dir),
        distillation=Distillation(steps=3),
        models=None if models == "-" else Path(models),
        teacher_command=teacher_command,
        trainer_command=trainer_command,
        trainer_grace_s=1.0,
    )
    sys.exit(run(options, Console(width=200)))


if __name__ == "__main__":
    main()
