"""One frozen, typed settings object, built once in ``main`` from the environment and an optional TOML file.

``OPPU_<SECTION>__<NAME>`` sets a value; the environment wins over the file named by ``--config``. Nobody else
reads the environment. Units are in the names. Secrets print as stars.
"""

import difflib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from oppu.errors import ConfigError

LONGEST_CLAIM_SECONDS = 3600.0
"""Of any worker's ``updater.claim_seconds``: one that ends later was made by a clock that was ahead."""
LONGEST_RETRY_SECONDS = 6 * 3600.0
"""Cap of the back-off after failures; one that ends later was made by a clock that was ahead."""


PUBLIC_KEYS = ("oppu-development-key", "change-me-before-real-use")
"""Deployment keys that anybody can read: the default, and that of deploy/compose.yaml."""

_PREFIX = "OPPU_"
_IN_KUBERNETES = "KUBERNETES_SERVICE_HOST"
_SERVICE_LINK = re.compile(r"OPPU(_[A-Z0-9]+)*_(SERVICE_HOST|(SERVICE_)?PORT(_[A-Z0-9_]+)?)")
"""What Kubernetes tells its containers of a Service whose name begins like ours."""
_NO_SETTINGS = frozenset({"OPPU_CONFIG", "OPPU_PARENT", "OPPU_KILL_EVENTS", "OPPU_KILL_SEED", "OPPU_SIM_SEED"})
"""Variables with our prefix that others read: the command line, workers of ``oppu up``, tests."""
_ALIKE = 0.8
"""Of difflib: a section left out is found, and all names sharing our prefix are not."""

_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%[^\s\]]+)?\]|[^\s:;,/@\[\]]+):(?P<port>[0-9]{1,5})")
_LAST_PORT = 65_535


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KafkaSettings(_Section):
    """Connection to the cluster and the shape of our topics."""

    bootstrap_servers: str = Field("127.0.0.1:9092", description="Comma-separated host:port list; IPv6 in brackets.")
    topic_prefix: str = Field("oppu.", pattern=r"^[a-zA-Z0-9._-]*$", description="Put before each topic's name.")
    group_prefix: str = Field("oppu-", description="Put before each consumer group's and transaction's name.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, description="PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512."
    )
    sasl_username: str | None = Field(None, description="With a SASL protocol.")
    sasl_password: SecretStr | None = Field(None, description="With a SASL protocol; never printed.")
    ssl_cafile: FilePath | None = Field(None, description="CA certificates; none = the system's.")
    ssl_certfile: FilePath | None = Field(None, description="Our certificate, where the broker asks for one.")
    ssl_keyfile: FilePath | None = Field(None, description="Its private key.")
    partitions: int = Field(6, ge=1, description="Partitions of topics we create.")
    replication: int = Field(3, ge=1, description="Replication factor of topics we create.")
    min_insync_replicas: int = Field(2, ge=1, description="Of topics we create; at most their replication.")
    max_poll_records: int = Field(
        1000, ge=1, le=10_000, description="Records of one poll. Where so many are left over, nothing is polled."
    )
    poll_timeout_seconds: float = Field(
        0.25, gt=0, le=5, description="Longest wait of one poll where nothing comes; a stop waits as long."
    )
    session_timeout_seconds: float = Field(10.0, gt=1, description="A member silent for so long is out of the group.")
    transaction_timeout_seconds: float = Field(10.0, gt=1, description="The broker aborts an open transaction then.")
    request_timeout_seconds: float = Field(15.0, gt=1, description="Longest wait for one answer of the broker.")
    stuck_after_seconds: float = Field(
        60.0, gt=0, description="Lag grows but polls return nothing: rebuild the client."
    )
    dead_letter_retention_seconds: int = Field(7 * 86_400, ge=60, description="Dead letters hold users' text.")

    @field_validator("bootstrap_servers")
    @classmethod
    def _addresses(cls, servers: str) -> str:
        # a client would take what is none for a broker that is away, and try for ever
        named = [server.strip() for server in servers.rstrip(", ").split(",")]
        wrong = [server for server in named if not _is_address(server)]
        if wrong:
            raise ValueError(f"expected host:port, separated by commas, got {', '.join(map(repr, wrong))}")
        return ",".join(named)

    @field_validator("ssl_cafile", "ssl_certfile", "ssl_keyfile", mode="before")
    @classmethod
    def _empty_is_none(cls, file: object) -> object:
        return None if file == "" else file

    @model_validator(mode="after")
    def _sasl_is_whole_or_not_there(self) -> "KafkaSettings":
        credentials = (self.sasl_mechanism, self.sasl_username, self.sasl_password)
        if self.security_protocol.startswith("SASL"):
            if not all(credentials):
                raise ValueError(
                    f"security_protocol {self.security_protocol} needs sasl_mechanism, sasl_username and sasl_password"
                )
        elif any(credentials):
            raise ValueError(
                "sasl_mechanism, sasl_username and sasl_password need security_protocol SASL_PLAINTEXT or SASL_SSL, "
                f"got {self.security_protocol}"
            )
        return self


class StoreSettings(_Section):
    """The history store."""

    url: str = Field("sqlite:///.oppu/history.db", description="SQLAlchemy URL: sqlite:///… or postgresql+psycopg://…")
    busy_timeout_seconds: float = Field(5.0, gt=0, description="How long to wait for a lock.")
    answers_retention_seconds: int = Field(7 * 86_400, ge=60, description="How long answers are kept for matching.")


class RegistrySettings(_Section):
    """Where adapter versions lie."""

    url: str = Field(".oppu/adapters", description="Any fsspec URL or a folder.")
    keep_versions: int = Field(3, ge=1, description="Versions kept beside head and parent.")
    grace_seconds: float = Field(600.0, ge=0, description="Younger versions are never collected.")


class LimitsSettings(_Section):
    """Maxima of what a record may ask; over them the answer is ``limit_exceeded``."""

    record_bytes: int = Field(256 * 1024, ge=1024, description="Size of a record's value.")
    text_characters: int = Field(20_000, ge=1, description="Of input, output and each choice.")
    user_id_bytes: int = Field(512, ge=1, description="UTF-8 length of a user id.")
    choices: int = Field(1_000, ge=2, description="Number of a record's choices.")
    retrieve: int = Field(64, ge=0, description="Of options.retrieve.")
    max_new_tokens: int = Field(256, ge=1, description="Of options.max_new_tokens.")
    past_years: int = Field(100, ge=1, description="How old occurred_at may be.")
    future_seconds: float = Field(86_400, ge=0, description="How far ahead occurred_at may be.")


class IngestSettings(_Section):
    """The ingest worker."""

    dead_letter_share: float | None = Field(
        None, gt=0, le=1, description="Stop when this share of recent records is refused; none = never."
    )
    dead_letter_window_records: int = Field(1_000, ge=10, description="How many recent records the share is of.")
    dead_letter_min_users: int = Field(10, ge=1, description="Distinct keys among the refused before it counts.")
    embed_batch: int = Field(
        64, ge=1, description="Texts embedded in one forward pass; where they share rows: as many as have 8,192 tokens."
    )


class RetrieverSettings(_Section):
    """Evidence from a user's history."""

    mode: Literal["dense", "bm25", "recency", "hybrid"] = Field(
        "hybrid", description="How items for prompts are ranked: dense, bm25, recency or hybrid (reciprocal ranks)."
    )
    k: int = Field(4, ge=0, description="Items retrieved where a request does not say.")
    neighbours: int = Field(16, ge=1, description="Neighbours in the kNN distribution over outputs.")
    resident_bytes: int = Field(512 * 2**20, ge=2**20, description="Memory of all loaded users' views.")
    max_items: int = Field(5_000, ge=1, description="Newest items kept for a user.")
    half_life_events: float = Field(50.0, gt=0, description="Recency weight of the profile's label prior.")


class ModelSettings(_Section):
    """The shared base model and the embedder."""

    base: str = Field("offline", description="Hugging Face id or path of a causal LM; 'offline' = MiniLM warm start.")
    embedder: str = Field(
        "offline", description="sentence-transformers id or path, chosen once; 'offline' = packaged MiniLM."
    )
    query_encoder: str | None = Field(
        None, description="Folder by oppu distill of a smaller embedder for queries alone; none = the embedder."
    )
    device: str = Field("cpu", description="Torch device: cpu, cuda, cuda:1 …")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of base, embedder and served adapters. auto: bfloat16 where the hardware has it."
    )
    threads: int | None = Field(None, ge=1, description="Torch threads; none = all cores.")
    max_tokens: int = Field(256, ge=32, description="Prompt length; evidence is cut first, the query's end last.")
    lora_rank: int = Field(8, ge=1, le=256, description="Rank of new adapters.")
    lora_alpha: float = Field(16.0, gt=0, description="Their scale is alpha / rank.")
    lora_targets: tuple[str, ...] | None = Field(
        None, description="Module name endings, a list (JSON in the environment); none = query and value."
    )
    lora_upper: float = Field(
        1.0, gt=0, le=1, description="Share of the base's blocks that adapters attach to, from the last one down."
    )
    prompt_evidence: Literal["none", "text", "all"] = Field(
        "none",
        description="Tasks whose prompts, served and trained on, hold retrieved items and profile: none, text, all"
        " (bases adapted so).",
    )
    fusion: str | None = Field(
        None, description="File of oppu calibrate; none = fusion.json beside the base, else what is built in."
    )
    text_fusion: str | None = Field(
        None, description="The same for text tasks; none = text_fusion.json beside the base, else what is built in."
    )

    def prompts_hold_evidence(self, choices: Sequence[str]) -> bool:
        """Say whether a prompt with these allowed outputs (none: a text) holds retrieved items and profile."""
        return self.prompt_evidence in (("all",) if choices else ("text", "all"))


class UpdaterSettings(_Section):
    """The scheduled updater."""

    interval_seconds: float = Field(5.0, gt=0, description="Time between looks for due users.")
    min_pending: int = Field(16, ge=1, description="New events that make a user due.")
    max_pending: int = Field(512, ge=1, description="New events taken by one update, the newest first.")
    users_per_tick: int = Field(8, ge=1, description="Users trained together.")
    replay: int = Field(16, ge=0, description="Older events mixed in for every min_pending new ones.")
    passes: int = Field(2, ge=1, description="Passes over an update's examples.")
    batch: int = Field(16, ge=1, description="Rows of one user in an optimizer step.")
    learning_rate: float = Field(2e-3, gt=0, description="AdamW's, after warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's.")
    clip_norm: float = Field(1.0, gt=0, description="Bound of each user's gradient in a step.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of their inputs that adapters do not see while they learn."
    )
    holdout_share: float = Field(0.2, gt=0, lt=1, description="Newest share of the pending events that validates.")
    claim_seconds: float = Field(
        60.0,
        gt=0,
        le=LONGEST_CLAIM_SECONDS,
        description="A claim lasts so long unless renewed: over twice the registry's slowest write.",
    )
    quarantine_after: int = Field(5, ge=1, description="Failures in a row that quarantine a user.")
    retry_seconds: float = Field(30.0, gt=0, description="First back-off after a failure; doubles.")


class InferenceSettings(_Section):
    """The inference worker."""

    slot: str = Field(
        "0", pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="Stable name of this worker's transactional.id."
    )
    batch: int = Field(128, ge=1, description="Rows answered at a time; deadlines are looked at in between.")
    resident_adapters: int = Field(256, ge=1, description="Slots of the adapter bank.")
    host_adapters: int = Field(1024, ge=1, description="Adapters kept in host memory beside the bank.")
    adapter_wait_seconds: float = Field(
        0.25, ge=0, description="Longest wait of a batch for adapters that are still being read."
    )
    default_deadline_seconds: float = Field(30.0, ge=0, description="0 = none.")
    history_wait_seconds: float = Field(0.5, ge=0, description="Longest wait for a request's after.")


class ServiceSettings(_Section):
    """What every worker has."""

    state_dir: Path = Field(Path(".oppu"), description="Small per-worker files (crash marks, addresses).")
    metrics_host: str = Field("127.0.0.1", description="Where /metrics, /healthz and /readyz listen.")
    metrics_port: int = Field(0, ge=0, le=65_535, description="0 = a free port, which is logged.")
    live_within_seconds: float = Field(120.0, gt=0, description="/healthz fails when the loop stood longer.")
    max_backoff_seconds: float = Field(10.0, gt=0, description="Longest pause between retries.")
    deployment_key: SecretStr = Field(SecretStr(PUBLIC_KEYS[0]), description="HMAC key of user ids in logs and paths.")
    tasks_dir: Path | None = Field(None, description="Folder of further task files (TOML).")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR."
    )
    log_format: Literal["plain", "json"] = Field("plain", description="plain or json.")

    @property
    def key_is_public(self) -> bool:
        """Whether anybody can compute the names that stand for users."""
        return self.deployment_key.get_secret_value() in PUBLIC_KEYS


class Settings(BaseSettings):
    """All settings, by section."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", toml_file=None
    )

    kafka: KafkaSettings = KafkaSettings()
    store: StoreSettings = StoreSettings()
    registry: RegistrySettings = RegistrySettings()
    limits: LimitsSettings = LimitsSettings()
    ingest: IngestSettings = IngestSettings()
    retriever: RetrieverSettings = RetrieverSettings()
    model: ModelSettings = ModelSettings()
    updater: UpdaterSettings = UpdaterSettings()
    inference: InferenceSettings = InferenceSettings()
    service: ServiceSettings = ServiceSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put arguments before the environment before the TOML file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @classmethod
    def load(cls, path: Path | None = None, **overrides: Any) -> "Settings":
        """Build the settings.

        Args:
            path: An optional TOML file.
            **overrides: Sections given by the caller, over all other sources.

        Returns:
            The checked settings.

        Raises:
            ConfigError: Listing every fault at once, each by its name; among them variables that set nothing.
        """
        if path is not None and not path.is_file():
            raise ConfigError(f"--config: no such file: {path}")

        class _FromFile(cls):  # type: ignore[valid-type,misc]
            model_config = SettingsConfigDict(**{**cls.model_config, "toml_file": path})

        unknown = _unknown(os.environ)
        try:
            settings = _FromFile(**overrides)
        except ValidationError as error:
            faults = [fault for fault in error.errors() if _variable(fault) not in unknown]
            raise ConfigError(*unknown.values(), *map(_problem, faults)) from error
        except SettingsError as error:  # a whole section in one variable
            raise ConfigError(*unknown.values(), f"environment: expected JSON: {error}") from error
        except ValueError as error:  # a TOML file that does not parse
            raise ConfigError(*unknown.values(), f"--config: {error}") from error
        if unknown:
            raise ConfigError(*unknown.values())
        return cls.model_construct(**{name: getattr(settings, name) for name in cls.model_fields})


def _is_address(server: str) -> bool:
    found = _ADDRESS.fullmatch(server)
    return found is not None and 0 < int(found["port"]) <= _LAST_PORT


def _unknown(environment: Collection[str]) -> dict[str, str]:
    """Return what is wrong with each variable, in upper case, that has our prefix and sets nothing."""
    sections = {f"{_PREFIX}{name.upper()}": type(field.default) for name, field in Settings.model_fields.items()}
    names = {f"{section}__{name.upper()}" for section, kind in sections.items() for name in kind.model_fields}
    known, expected = names | _NO_SETTINGS, f"expected {_PREFIX}SECTION__NAME, as docs/contracts/settings.md lists them"
    problems: dict[str, str] = {}
    for variable in sorted(environment):
        name = variable.upper()  # a setting may be written in any case, what others read may not
        if not name.startswith(_PREFIX) or name in names or name in sections or variable in _NO_SETTINGS:
            continue
        if _IN_KUBERNETES in environment and _SERVICE_LINK.fullmatch(variable):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE)
        problems[name] = f"{variable}: no such setting; {f'did you mean {close[0]}?' if close else expected}"
    return problems


def _variable(fault: Any) -> str:
    return _PREFIX + "__".join(str(part).upper() for part in fault["loc"])


def _problem(fault: Any) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    return f"{name} (or {_variable(fault)}): {fault['msg']}"
