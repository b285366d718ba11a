"""The GKD keys: read from the composed configuration, validated, and taken out of what verl sees."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from trainer.errors import ConfigError
from trainer.types import Distillation, Tail, TopKDivergence

_FROZEN = ConfigDict(frozen=True, extra="forbid")


SelectStrategy = Literal["all", "random", "best", "worst"]
OnFailure = Literal["wait", "degrade", "fail"]
Endpoints = tuple[str, ...] | str
"""`host:port` of every replica; or one DNS name and port that resolve to all of them."""
ONLY_TEACHER = "teacher"
"""Name of the teacher of a run without `teacher.routes`."""
SYSTEM_CA = "system"
"""Value of `teacher.tls.ca` for the public authorities."""
ANY_VALUE = "*"
"""Key of `teacher.routes` that takes all values without a route of their own."""
REWARD_STRATEGIES: frozenset[SelectStrategy] = frozenset({"best", "worst"})
"""Those that rank a prompt's responses by reward."""


class Mode(enum.StrEnum):
    """What a run optimises."""

    GRPO = "grpo"
    """Reinforcement learning alone; no teacher."""
    GKD = "gkd"
    """Distillation alone; no reward."""
    GKD_GRPO = "gkd_grpo"
    """Policy gradient plus distillation."""


class ActorConfig(BaseModel):
    """`actor_rollout_ref.actor.*`: the keys beside verl's own."""

    model_config = _FROZEN

    use_teacher_kl_loss: bool = False
    """Distil from a teacher."""
    gkd_only_mode: bool = False
    """Distillation alone, without a policy-gradient loss."""
    teacher_kl_coef: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the divergence in the loss."""
    teacher_kl_temperature: PositiveFloat = Field(default=1.0, allow_inf_nan=False)
    """Temperature of both sides of the divergence."""
    gkd_select_strategy: SelectStrategy = "all"
    """Which of a prompt's n responses the teacher scores."""
    gkd_select_k: PositiveInt = 1
    """How many of them, for random, best and worst."""
    gkd_divergence: Distillation = "forward_kl"
    """Which divergence, or policy_gradient."""
    gkd_beta: float = Field(default=0.5, ge=0, le=1)
    """The teacher's share of jsd's mixture: 0 is forward_kl, 1 is reverse_kl."""
    gkd_skew_alpha: float = Field(default=0.1, ge=0, lt=1)
    """Share of a skewed KL's first argument in its second."""
    gkd_tail: Tail = "bucket"
    """What becomes of the probability outside the top-k."""

    @property
    def topk_divergence(self) -> TopKDivergence:
        """The divergence whose gradient teaches.

        Raises:
            ConfigError: with policy_gradient there is none.
        """
        if self.gkd_divergence == "policy_gradient":
            raise ConfigError("gkd_divergence=policy_gradient teaches by advantages, not by a divergence's gradient")
        return self.gkd_divergence


class TlsConfig(BaseModel):
    """`actor_rollout_ref.teacher.tls.*`: plain text where all are null."""

    model_config = _FROZEN

    ca: str | None = None
    """PEM file of the CA that signed the teacher's certificate; `system`: the public authorities."""
    cert: str | None = None
    """PEM file of the trainer's own certificate, for a teacher that wants one."""
    key: str | None = None
    """PEM file of its private key."""
    server_name: str | None = None
    """Name that the teacher's certificate must have; null: the endpoint's own."""

    @field_validator("ca", "cert", "key")
    @classmethod
    def _from_root(cls, value: str | None) -> str | None:
        return value if value == SYSTEM_CA else _absolute(value)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together; set both, or neither")
        if self.ca is None and (self.cert or self.server_name):
            raise ValueError(f"ca is null, so nothing would be encrypted; name the CA's PEM file, or {SYSTEM_CA!r}")
        return self


class TeacherConfig(BaseModel):
    """`actor_rollout_ref.teacher.*`."""

    model_config = _FROZEN

    server_ip: str = "127.0.0.1"
    """Host of the teacher service."""
    server_port: int = Field(default=15555, ge=1, le=65535)
    """Its gRPC port."""
    n_server_workers: PositiveInt = 1
    """Teacher replicas or workers that share the load."""
    temperature: PositiveFloat = Field(default=1.0, allow_inf_nan=False)
    """Temperature of the teacher's side, applied by the teacher before its softmax."""
    endpoints: Endpoints | None = None
    """`host:port` of every replica, or one DNS name with a port that resolves to all of them, looked up again as they
    come and go; null: `server_ip:server_port`."""
    routes: dict[str, Endpoints] | None = None
    """Several teachers: a value of the column `route_key` -> the endpoints of its teacher; `*` takes the rest."""
    route_key: str = "data_source"
    """The data's column that chooses the teacher."""
    num_logprobs: PositiveInt = 64
    """K, the top-k entries per position that the teacher sends. Capped at the teacher's vocabulary."""
    timeout_s: PositiveFloat = Field(default=60.0, allow_inf_nan=False)
    """Seconds that one attempt may take."""
    max_wait_s: PositiveFloat = Field(default=600.0, allow_inf_nan=False)
    """Seconds that one sequence may take, retries included."""
    on_failure: OnFailure = "wait"
    """What becomes of a response that the teacher can't score: `wait` tries for max_wait_s, then saves a checkpoint and
    ends the run; `fail` does so after timeout_s; `degrade` goes on without its distillation term (GKD + GRPO only)."""
    min_coverage: float = Field(default=0.5, ge=0, le=1)
    """Under `degrade`, the share of the selected responses that must be scored in each step; below it the run ends."""
    hedge_percentile: float | None = Field(default=None, gt=0.5, lt=1)
    """Ask a second replica once a request has taken longer than this share of the recent ones; null: never."""
    connect_timeout_s: PositiveFloat = Field(default=10.0, allow_inf_nan=False)
    """Seconds to wait at start for a teacher that is not there or not ready yet."""
    max_inflight_per_worker: PositiveInt = 64
    """Sequences in flight per teacher worker: n_server_workers times this is the client's bound."""
    tls: TlsConfig = TlsConfig()
    """TLS to every teacher."""
    token_file: str | None = None
    """File whose first line is the token for every teacher; each node that runs agent-loop workers needs it."""

    @field_validator("token_file")
    @classmethod
    def _from_root(cls, value: str | None) -> str | None:
        return _absolute(value)

    @property
    def teachers(self) -> Mapping[str, Endpoints]:
        """The endpoints of each teacher, by the value of `route_key` that it serves."""
        if self.routes is not None:
            return self.routes
        return {ONLY_TEACHER: self.endpoints or (f"{self.server_ip}:{self.server_port}",)}

    def teacher_for(self, value: object) -> str:
        """The name of the teacher for a row whose `route_key` holds `value`.

        Raises:
            ConfigError: there is no route for it.
        """
        if self.routes is None:
            return ONLY_TEACHER
        name = str(value)
        if name in self.routes:
            return name
        if ANY_VALUE in self.routes:
            return ANY_VALUE
        raise ConfigError(
            f"a row has {self.route_key}={name!r}, and actor_rollout_ref.teacher.routes knows only "
            f"{', '.join(self.routes)}; add a route for it, or one for {ANY_VALUE!r}, which takes the rest"
        )

    @property
    def give_up_s(self) -> float:
        """Seconds after which a response counts as not scored."""
        return self.timeout_s if self.on_failure == "fail" else self.max_wait_s

    @property
    def max_inflight(self) -> int:
        """Sequences that one client keeps in flight."""
        return self.n_server_workers * self.max_inflight_per_worker


def _absolute(path: str | None) -> str | None:
    """The path from the root: a worker of Ray may stand in another folder."""
    return None if path is None else f"{Path(path).expanduser().absolute()}"


class TrainerConfig(BaseModel):
    """`trainer.*`: the keys beside verl's own."""

    model_config = _FROZEN

    enable_off_policy: bool = False
    """Mix in ground-truth answers (GKD only)."""
    gkd_lambda: float = Field(default=1.0, ge=0, le=1)
    """Share of the questions that is on-policy; read where enable_off_policy is true."""
    data_partition_seed: int = Field(default=12345, ge=0)
    """Seed of the split of the questions."""
    metrics_address: str | None = Field(default=None, pattern=r"^\S+:[0-9]{1,5}$")
    """`host:port` at which Prometheus finds the metrics of the last step, in the trainer's process; null: nowhere."""


class DataConfig(BaseModel):
    """`data.*`: the keys beside verl's own."""

    model_config = _FROZEN

    question_key: str = "question"
    """Column of the question, where there is no prompt column."""
    answer_key: str = "answer"
    """Column of the ground-truth answer."""
    off_policy_files: str | tuple[str, ...] | None = None
    """Parquet files of the off-policy data; null: the answers of `data.train_files`."""
    off_policy_batch_size: PositiveInt | None = None
    """Rows per off-policy batch; null: `data.train_batch_size`."""


class GKDConfig(BaseModel):
    """All GKD keys of a run."""

    model_config = _FROZEN

    actor: ActorConfig = ActorConfig()
    teacher: TeacherConfig = TeacherConfig()
    trainer: TrainerConfig = TrainerConfig()
    data: DataConfig = DataConfig()

    @property
    def mode(self) -> Mode:
        """What the run optimises."""
        if not self.actor.use_teacher_kl_loss:
            return Mode.GRPO
        return Mode.GKD if self.actor.gkd_only_mode else Mode.GKD_GRPO

    @property
    def mixes_off_policy(self) -> bool:
        """Whether some batches are ground-truth answers."""
        return self.mode is Mode.GKD and self.trainer.enable_off_policy and self.trainer.gkd_lambda < 1

    @property
    def selects(self) -> bool:
        """Whether some responses may go unscored."""
        return self.mode is not Mode.GRPO and self.actor.gkd_select_strategy != "all"

    @property
    def scores_partly(self) -> bool:
        """Whether a batch may hold responses without teacher scores."""
        return self.selects or (self.mode is not Mode.GRPO and self.teacher.on_failure == "degrade")

    @property
    def teaches_by_advantages(self) -> bool:
        """Whether the teacher acts through the policy gradient, not through a divergence of its own."""
        return self.mode is not Mode.GRPO and self.actor.gkd_divergence == "policy_gradient"

    @property
    def request_temperature(self) -> float:
        """The temperature that the teacher is asked to apply before its softmax."""
        return self.actor.teacher_kl_temperature * self.teacher.temperature

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> GKDConfig:
        """Read the GKD keys of a composed and resolved configuration.

        Args:
            config: plain nested mappings (`OmegaConf.to_container(..., resolve=True)`).

        Raises:
            ConfigError: a value is out of range, or a key of the teacher section is unknown.
        """
        actor_rollout_ref = config["actor_rollout_ref"]
        sections = {
            "actor": (_pick(ActorConfig, actor_rollout_ref["actor"]), "actor_rollout_ref.actor"),
            "teacher": (dict(actor_rollout_ref["teacher"]), "actor_rollout_ref.teacher"),
            "trainer": (_pick(TrainerConfig, config["trainer"]), "trainer"),
            "data": (_pick(DataConfig, config["data"]), "data"),
        }
        try:
            return cls.model_validate({name: values for name, (values, _) in sections.items()})
        except ValidationError as exc:
            raise ConfigError(_explain(exc, {name: path for name, (_, path) in sections.items()})) from exc


def _pick(model: type[BaseModel], section: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own keys of a section that also holds verl's."""
    return {name: section[name] for name in model.model_fields if name in section}


def _explain(exc: ValidationError, paths: Mapping[str, str]) -> str:
    lines = []
    for error in exc.errors():
        section, *rest = (str(part) for part in error["loc"])
        key = ".".join([paths[section], *rest])
        if error["type"] == "extra_forbidden":
            known = sorted((TlsConfig if rest[0] == "tls" else TeacherConfig).model_fields)
            near = difflib.get_close_matches(rest[-1], known, n=1)
            hint = f"did you mean {key.removesuffix(rest[-1])}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{key} is not a key of this trainer; {hint}")
        else:
            lines.append(f"{key}={error['input']!r}: {error['msg']}")
    return "\n".join(lines)
