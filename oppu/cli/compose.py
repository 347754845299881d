"""Build the stages from the settings: every constructor is called here and nowhere else.

Imports are inside the functions so that a light command loads only what it uses.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oppu.errors import ConfigError
from oppu.settings import Settings
from oppu.wire import Topics

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from inference.blending import TextFusion
    from inference.worker import InferenceWorker
    from ingest.step import IngestWorker
    from oppu.embedder import Embedder
    from oppu.fusion import Fusion
    from oppu.kafka.client import KafkaBroker
    from oppu.lm.model import TorchModel
    from oppu.metrics import Metrics
    from oppu.privacy import UserHash
    from oppu.registry import AdapterRegistry
    from oppu.store.port import HistoryStore
    from oppu.store.sql import SqlStore
    from oppu.tasks import Tasks
    from retriever.service import Retriever
    from updater.worker import Updater


ADAPTER_READERS = 4
"""Threads that read adapters ahead: reading is waiting, hashing and copying, which let each other run."""


def topics(settings: Settings) -> Topics:
    """Return the topic names."""
    return Topics(settings.kafka.topic_prefix)


def tasks(settings: Settings) -> Tasks:
    """Read the task files."""
    from oppu.tasks import load_tasks

    return load_tasks(settings.service.tasks_dir)


def broker(settings: Settings) -> KafkaBroker:
    """Return the way to the cluster; nothing is connected yet."""
    from oppu.kafka.client import KafkaBroker
    from oppu.kafka.topics import largest_record_bytes

    return KafkaBroker(settings.kafka, max_record_bytes=largest_record_bytes(settings))


def cluster_id(settings: Settings) -> str:
    """Ask the cluster for its id.

    Args:
        settings: The settings.

    Returns:
        The cluster's id.

    Raises:
        TransientError: The cluster cannot be reached.
    """
    admin = broker(settings).admin()
    try:
        return admin.cluster_id()
    finally:
        admin.close()


def store(settings: Settings) -> SqlStore:
    """Open the history store.

    Args:
        settings: The settings.

    Returns:
        The open store.

    Raises:
        ConfigError: Its schema version is not ours.
    """
    from oppu.store.sql import open_store

    opened = open_store(settings.store, deployment_key=_deployment_key(settings))
    opened.ping()
    return opened


def user_hash(settings: Settings) -> UserHash:
    """Return the keyed hash that stands for user ids in logs and paths."""
    from oppu.privacy import UserHash

    return UserHash(_deployment_key(settings))


def embedder(settings: Settings) -> Embedder:
    """Load the sentence embedder."""
    from oppu.embedder import SentenceEmbedder

    return SentenceEmbedder(settings.model.embedder, **_embedding(settings))


def query_encoder(settings: Settings) -> Embedder:
    """Load what embeds queries: the embedder, unless there is a smaller one."""
    from oppu.embedder import QueryEncoder, loaded

    name = settings.model.query_encoder
    if not name:
        return embedder(settings)
    _, documents = loaded(settings.model.embedder, "cpu")
    return QueryEncoder(name, documents, **_embedding(settings))


def queries_apart(settings: Settings, documents: Embedder) -> Embedder | None:
    """Load the query encoder, where there is one beside the embedder of ``documents``."""
    from oppu.embedder import QueryEncoder

    name = settings.model.query_encoder
    return QueryEncoder(name, documents.fingerprint, **_embedding(settings)) if name else None


def model(settings: Settings, *, slots: int) -> TorchModel:
    """Load the base model with a bank of ``slots`` adapters."""
    from oppu.lm.base import load_base
    from oppu.lm.model import TorchModel

    return TorchModel(load_base(settings.model), tasks(settings), settings=settings.model, slots=slots)


def registry(settings: Settings, base: str, adapter_config: object = None) -> AdapterRegistry:
    """Open the adapter registry of one base."""
    from typing import cast

    from oppu.registry import AdapterRegistry
    from oppu.values import BaseId

    return AdapterRegistry(
        settings.registry.url,
        base=BaseId(base),
        user_hash=user_hash(settings),
        adapter_config=cast("dict[str, object] | None", adapter_config),
    )


def retriever(
    settings: Settings, history: HistoryStore, embed: Embedder, metrics: Metrics, ahead: Executor | None = None
) -> Retriever:
    """Build the retriever over the store; ``ahead``: a thread that embeds what will be asked."""
    from retriever.service import Retriever

    return Retriever(history, embed, settings.retriever, metrics, ahead)


def ingest_worker(settings: Settings, metrics: Metrics) -> IngestWorker:
    """Build the ingest worker."""
    from ingest.step import IngestWorker
    from oppu.clock import SystemClock

    return IngestWorker(
        broker(settings),
        store(settings),
        embedder(settings),
        tasks(settings),
        settings,
        metrics,
        clock=SystemClock(),
        cluster_id=cluster_id(settings),
    )


def inference_worker(settings: Settings, metrics: Metrics) -> InferenceWorker:
    """Build the inference worker, its base model loaded."""
    from inference.host_cache import HostCache
    from inference.readers import Readers
    from inference.worker import InferenceWorker
    from oppu.clock import SystemClock
    from retriever.vectors import background

    history, language_model = (
        store(settings),
        model(settings, slots=settings.inference.resident_adapters),
    )
    return InferenceWorker(
        broker(settings),
        history,
        retriever(settings, history, query_encoder(settings), metrics, background()),
        language_model,
        HostCache(
            registry(settings, language_model.base, language_model.adapter_config()),
            capacity=settings.inference.host_adapters,
            readers=Readers(ADAPTER_READERS),
            on_hit=metrics.bank_events.labels("host_hit").inc,
        ),
        tasks(settings),
        settings,
        metrics,
        clock=SystemClock(),
        cluster_id=cluster_id(settings),
        fusion=fusion(settings),
        text_fusion=text_fusion(settings),
    )


def fusion(settings: Settings) -> Fusion:
    """Read how sources are weighed: the named file, else the one beside the base, else what is built in.

    Args:
        settings: The settings.

    Returns:
        The fitted stacks.

    Raises:
        ConfigError: A file that cannot be used.
    """
    from oppu.fusion import DEFAULT, FILE, load_fusion

    path = _fitted(settings, settings.model.fusion, FILE)
    return DEFAULT if path is None else load_fusion(path)


def text_fusion(settings: Settings) -> TextFusion:
    """Read how texts are written: the named file, else the one beside the base, else what is built in.

    Args:
        settings: The settings.

    Returns:
        The fitted weights.

    Raises:
        ConfigError: A file that cannot be used.
    """
    from inference.blending import DEFAULT, FILE, load_text_fusion

    path = _fitted(settings, settings.model.text_fusion, FILE)
    return DEFAULT if path is None else load_text_fusion(path)


def updater(settings: Settings, metrics: Metrics) -> Updater:
    """Build the updater, its base model loaded."""
    from updater.earning import Judge
    from updater.material import Prompts
    from updater.worker import Updater

    history, language_model = store(settings), model(settings, slots=1)
    evidence = retriever(settings, history, query_encoder(settings), metrics)
    return Updater(
        history,
        registry(settings, language_model.base, language_model.adapter_config()),
        language_model,
        tasks(settings),
        settings.updater,
        topics=topics(settings),
        holder=f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
        metrics=metrics,
        user_hash=user_hash(settings),
        collection=settings.registry,
        prompts=Prompts(evidence, settings.model, settings.retriever.k),
        judge=Judge(evidence, fusion(settings), settings.retriever.neighbours),
    )


def state_dir(settings: Settings) -> Path:
    """Return the folder for small per-worker files, made where it is missing.

    Args:
        settings: The settings.

    Returns:
        The folder.

    Raises:
        ConfigError: It cannot be made.
    """
    folder = settings.service.state_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # crash marks tell of users, and the store may lie here
    except OSError as error:
        raise ConfigError(f"service.state_dir: cannot make {folder}: {error.strerror}") from error
    return folder


def _fitted(settings: Settings, named: str | None, name: str) -> Path | None:
    """Return the file of fitted weights: the named one, else the one beside the base where there is one."""
    if named is not None:
        return Path(named)
    beside = Path(settings.model.base) / name
    return beside if beside.is_file() else None


def _embedding(settings: Settings) -> dict[str, Any]:
    own = settings.model
    batch = settings.ingest.embed_batch
    return {"device": own.device, "dtype": own.dtype, "threads": own.threads, "batch": batch}


def _deployment_key(settings: Settings) -> str:
    return settings.service.deployment_key.get_secret_value()
