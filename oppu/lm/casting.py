"""A model's weights in another type, and what it computes with beside them as it is."""

from typing import Any


def cast(model: Any, dtype: Any) -> Any:
    """Give a model's weights another type, in place.

    Buffers that are no part of its file are computed from its configuration and keep their type, as where the library
    loads a model in this type: rotary frequencies rounded to bfloat16 turn the thousandth position by a radian.

    Args:
        model: A torch module.
        dtype: A torch floating-point type.

    Returns:
        The model.
    """
    filed = set(model.state_dict())
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in filed}
    model.to(dtype)
    for name, buffer in computed.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer)
    return model
