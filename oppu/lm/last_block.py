"""Compute a base's last block behind its attention only where logits are read.

Nothing later looks at the other positions, and all that follows the attention is done position by position, so the
logits are the same. Invariant: rows stay rows, so that a bank's hooks on layers of the last block still fit them.
"""

from typing import Any

import torch

from oppu.lm.streams import OfThread

_ATTENTION = {
    "BertLayer": ("attention.self", None),
    "GemmaDecoderLayer": ("self_attn", "input_layernorm"),
    "LlamaDecoderLayer": ("self_attn", "input_layernorm"),
    "MistralDecoderLayer": ("self_attn", "input_layernorm"),
    "Qwen2DecoderLayer": ("self_attn", "input_layernorm"),
}
"""Each block's attention and the norm before it. GPT-2 is not among them: it shapes its output like its input."""


class _Forward(OfThread):
    """What a thread's next forward reads, and meanwhile the whole of what its block was given."""

    read: torch.Tensor | None = None
    whole: torch.Tensor | None = None


class LastBlock:
    """Hooks on the last block, idle unless ``read`` is set. Other architectures than those known get none."""

    def __init__(self, model: Any, *, known: bool = True) -> None:
        """Attach to a base.

        Args:
            model: A Hugging Face causal language model.
            known: Whether to look for a block of a known kind; if not, all of them are computed whole.
        """
        self._forward = _Forward()
        self._hooks: list[Any] = []
        blocks = [module for module in model.base_model.modules() if type(module).__name__ in _ATTENTION]
        if blocks and known:
            self._attach(blocks[-1])

    @property
    def read(self) -> torch.Tensor | None:
        """``[n, p] int64``, the positions of each row that this thread's next forward reads; ``None``: all."""
        return self._forward.read

    @read.setter
    def read(self, positions: torch.Tensor | None) -> None:
        self._forward.read = positions

    @property
    def known(self) -> bool:
        """Whether the base has a last block of a known kind."""
        return bool(self._hooks)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _attach(self, block: Any) -> None:
        path, norm = _ATTENTION[type(block).__name__]
        attention, before = block.get_submodule(path), getattr(block, norm) if norm else torch.nn.Identity()

        def narrow(_block: Any, args: Any) -> Any:
            if self.read is None:
                return None
            self._forward.whole = args[0]
            return picked(args[0], self.read), *args[1:]

        def widen(_attention: Any, args: Any, kwargs: Any) -> Any:
            if self.read is None:
                return None
            whole, self._forward.whole = before(self._forward.whole), None
            return ((whole, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": whole})

        def pick(_attention: Any, _args: Any, output: Any) -> Any:
            return None if self.read is None else (picked(output[0], self.read), *output[1:])

        self._hooks = [
            block.register_forward_pre_hook(narrow),
            attention.register_forward_pre_hook(widen, with_kwargs=True),
            attention.register_forward_hook(pick),
        ]


def picked(hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """Return ``[n, p, d]``, the read positions of ``[n, t, d]``."""
    return hidden.gather(1, read[:, :, None].expand(-1, -1, hidden.shape[2]))
